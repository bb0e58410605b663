"""Corpus -> encoder: pretrains a vision transformer without labels, as a masked autoencoder or by self-distillation.

python -m jobs.pretrain_encoder conf/pretrain/demo.yaml hub_uri=runs/demo/hub

Ray Data streams and augments the corpus, Ray Train runs DeepSpeed ZeRO. A killed run continues from its last committed
checkpoint when the same command is run again. Records one Encoder and prints its id.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console
from jobs.recipe import (
    CropConfig,
    DINOv2Config,
    EncoderConfig,
    FitConfig,
    MAEConfig,
    build_objective,
    build_views,
)


@dataclass(frozen=True)
class ClusterConfig:
    """What the run takes of the cluster."""

    num_workers: int = setting(1, "training workers")
    min_workers: int = setting(0, "go on with as few workers as these when nodes are lost; 0: only with num_workers")
    cpus_per_worker: float = setting(1.0, "CPUs that each one reserves")
    gpus_per_worker: float = setting(0.0, "GPUs that each one reserves; 0 trains on CPU")
    data_cpus: float = setting(1.0, "CPUs for Ray Data: decoding and augmenting")
    autoscaling: bool = setting(False, "whether the cluster adds nodes on demand")
    max_failures: int = setting(3, "restarts from the last checkpoint before giving up")


@dataclass(frozen=True)
class Config:
    """What `pretrain_encoder` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    corpus_id: str = setting(help="the corpus's record id")
    seed: int = setting(0, "decides order, crops, masks and initial weights")
    objective: str = setting("mae", "mae: masked autoencoder; dinov2: self-distillation")
    embedded_size_px: int = setting(0, "side of what the finished encoder takes; 0: encoder.image_size_px")
    initial_weights_uri: str = setting("", "weights to start from: MAE, RETFound, DINOv2, timm or our own; empty: none")
    project: str = setting("gretfound", "the W&B project")
    encoder: EncoderConfig = setting(EncoderConfig())
    mae: MAEConfig = setting(MAEConfig())
    dinov2: DINOv2Config = setting(DINOv2Config())
    crops: CropConfig = setting(CropConfig())
    fit: FitConfig = setting(FitConfig())
    cluster: ClusterConfig = setting(ClusterConfig())

    @property
    def finished_size_px(self) -> int:
        """Side of the square that the finished encoder takes."""
        return self.embedded_size_px or self.encoder.image_size_px

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        if (
            self.cluster.min_workers > self.cluster.num_workers
            or min(self.crops.num_local, self.cluster.min_workers) < 0
        ):
            raise ConfigError(
                f"found cluster.min_workers={self.cluster.min_workers}, cluster.num_workers={self.cluster.num_workers} "
                f"and crops.num_local={self.crops.num_local}; required min_workers up to num_workers, none below 0"
            )
        for num_workers in range(self.cluster.min_workers or self.cluster.num_workers, self.cluster.num_workers + 1):
            if self.fit.batch_size % (num_workers * self.fit.accumulation):
                raise ConfigError(
                    f"fit.batch_size={self.fit.batch_size} is not divisible by cluster.num_workers={num_workers} times "
                    f"fit.accumulation={self.fit.accumulation}; every number of workers from cluster.min_workers on "
                    "has to divide it"
                )
        if self.objective not in ("mae", "dinov2"):
            raise ConfigError(f"objective={self.objective!r} is neither mae nor dinov2")


def pretrain_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each Ray Train worker: streams, trains, and the first one leaves the encoder in the run's folder."""
    import ray.train

    from gretfound import fit, ingest, pretraining, storage, tracking
    from gretfound.checkpoints import RayCheckpoints
    from gretfound.lineage import Corpus

    config: Config = settings["config"]
    hub_uri, run_uri = settings["hub_uri"], settings["run_uri"]
    rank = ray.train.get_context().get_world_rank()
    tracker = tracking.Tracker(
        run_uri,
        run_id=settings["run_id"],
        project=config.project,
        settings=canonical(config),
        is_active=rank == 0,
    )
    with tracker, storage.scratch_folder() as folder:
        uri = config.initial_weights_uri
        weights_path = pretraining.fetch_initial_weights(hub_uri, uri, Path(folder)) if uri else None
        objective = build_objective(config, seed=config.seed, initial_weights_path=weights_path)
        planned = (hub_uri, config.corpus_id, config.seed, config.fit.batch_size)
        group_names = ingest.plan_of(*planned)[1].group_names if rank == 0 else []
        watch = pretraining.Watch(objective, tracker, run_uri=run_uri, rank=rank, group_names=group_names)
        summary = fit.train(
            objective,
            functools.partial(
                ingest.worker_batches,
                hub_uri,
                storage.read_record(hub_uri, config.corpus_id, Corpus),
                end=config.fit.num_images_seen,
                batch_size=config.fit.batch_size,
                accumulation=config.fit.accumulation,
                views=build_views(config),
                seed=config.seed,
                data_cpus=config.cluster.data_cpus,
                rejected=watch.rejected,
            ),
            num_images=config.fit.num_images_seen,
            batch_size=config.fit.batch_size,
            accumulation=config.fit.accumulation,
            peak_lr=fit.peak_lr_for(config.fit.batch_size, base_lr=config.fit.base_lr, scaling=config.fit.lr_scaling),
            warmup_images=config.fit.warmup_images,
            weight_decay=config.fit.weight_decay,
            final_weight_decay=config.fit.final_weight_decay,
            betas=(0.9, config.fit.second_beta),
            clip_norm=config.fit.clip_norm,
            precision=config.fit.precision,
            zero_stage=config.fit.zero_stage,
            recomputes_activations=config.fit.recomputes_activations,
            device="cuda" if config.cluster.gpus_per_worker else "cpu",
            seed=config.seed,
            checkpoints=RayCheckpoints(fit.train_uri(run_uri, settings["run_id"])),
            checkpoint_every_images=config.fit.checkpoint_every_images,
            on_batch=watch.observe,
            on_progress=watch.tell,
        )
    if rank == 0:
        pretraining.write_encoder(
            storage.join(run_uri, "encoder"),
            build_objective(config, seed=config.seed),
            summary,
            objective_name=config.objective,
            architecture=config.encoder.architecture,
            image_size_px=config.finished_size_px,
            config_yaml=to_yaml(config),
        )


def main(argv: list[str]) -> str:
    """Runs the job; returns the encoder's id."""
    config = load(Config, argv)
    from gretfound import fit, lineage, pretraining, storage, tracking, veto, withdrawal
    from gretfound.corpus import check_uncontaminated, check_unvetoed
    from gretfound.lineage import Corpus, Encoder

    hub_uri, weights_uri = storage.normalised(config.hub_uri), config.initial_weights_uri
    corpus = storage.read_record(hub_uri, config.corpus_id, Corpus)
    withdrawal.require_unmarked(hub_uri, corpus)
    settings = {
        name: value for name, value in canonical(config).items() if name not in ("hub_uri", "cluster", "project")
    }
    starts_from_encoder = pretraining.names_encoder(weights_uri)
    if starts_from_encoder:
        withdrawal.require_unmarked(hub_uri, storage.read_record(hub_uri, weights_uri, Encoder))
    elif weights_uri:
        digests = pretraining.digest_initial_weights(hub_uri, weights_uri)
        withdrawal.require_unmarked_files(hub_uri, digests)
        settings["initial_weights_sha256"] = digests
    parents = (corpus.id, *([weights_uri] if starts_from_encoder else []))
    recipe = lineage.recipe_id("pretrain_encoder", settings, list(parents))
    if finished := storage.finished_record(hub_uri, recipe, Encoder):
        return finished.id
    check_uncontaminated(hub_uri, corpus)
    check_unvetoed(hub_uri, corpus, veto.vetoed_image_ids(hub_uri))
    run_uri = storage.run_uri(hub_uri, recipe)
    storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
    console.start_ray()
    with tracking.progress_bar(run_uri, "pretraining"):
        fit.run(
            pretrain_on_worker,
            {"hub_uri": hub_uri, "run_uri": run_uri, "run_id": recipe, "config": config},
            run_uri=run_uri,
            name=recipe,
            **asdict(config.cluster),
        )
    with storage.scratch_folder() as folder:
        summary = pretraining.read_encoder(storage.join(run_uri, "encoder"), Path(folder))
        record = Encoder(
            parents=parents,
            recipe_id=recipe,
            architecture=config.encoder.architecture,
            objective=config.objective,
            image_size_px=config.finished_size_px,
            images_seen=summary["images_seen"],
            final_loss=summary["final_loss"],
        )
        return storage.publish_folder(hub_uri, Path(folder), record).id


if __name__ == "__main__":
    console.run(Config, main)
