"""Corpus -> encoder: pretrains a vision transformer without labels, as a masked autoencoder or by self-distillation.

python -m jobs.pretrain_encoder conf/pretrain/demo.yaml hub_uri=runs/demo/hub

Ray Data streams and augments the corpus, Ray Train runs DeepSpeed ZeRO. A killed run continues from its last committed
checkpoint when the same command is run again. Records one Encoder and prints its id.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console
from jobs.recipe import CropConfig, DINOv2Config, EncoderConfig, FitConfig, MAEConfig

ENCODER_ID_PREFIX = "encoder-"
OBJECTIVE_NAMES = {"mae": "mae.safetensors", "dinov2": "dinov2.safetensors"}


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
    initial_weights_uri: str = setting("", "weights to start from: MAE, RETFound, DINOv2, timm or our own; empty: none")
    project: str = setting("gretfound", "the W&B project")
    encoder: EncoderConfig = setting(EncoderConfig())
    mae: MAEConfig = setting(MAEConfig())
    dinov2: DINOv2Config = setting(DINOv2Config())
    crops: CropConfig = setting(CropConfig())
    fit: FitConfig = setting(FitConfig())
    cluster: ClusterConfig = setting(ClusterConfig())

    @property
    def num_images_seen(self) -> int:
        """The images of the whole run, rounded up to whole steps."""
        return -(-self.fit.num_images // self.fit.batch_size) * self.fit.batch_size

    @property
    def starts_from_encoder(self) -> bool:
        """Whether the initial weights are an encoder of the hub, and so a parent."""
        return self.initial_weights_uri.startswith(ENCODER_ID_PREFIX)

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
        if self.fit.lr_scaling not in ("linear", "sqrt"):
            raise ConfigError(f"fit.lr_scaling={self.fit.lr_scaling!r} is neither linear nor sqrt")
        if self.objective not in ("mae", "dinov2"):
            raise ConfigError(f"objective={self.objective!r} is neither mae nor dinov2")
        if self.fit.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"fit.precision={self.fit.precision!r} is neither float32 nor bfloat16")
        if self.fit.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"fit.zero_stage={self.fit.zero_stage} is none of 0, 1, 2, 3")


def build_objective(config: Config, *, initial_weights_path: Path | None = None) -> Any:
    """Builds the objective of a configuration before its first step; a finished run's weights fit it."""
    import torch

    from gretfound.encoder.architecture import build_encoder
    from gretfound.encoder.dinov2 import SelfDistillation
    from gretfound.encoder.importers import import_weights
    from gretfound.encoder.mae import MaskedAutoencoder

    torch.manual_seed(config.seed)
    encoder = build_encoder(**asdict(config.encoder))
    match config.objective:
        case "mae":
            objective: Any = MaskedAutoencoder(encoder, mask_seed=config.seed, **asdict(config.mae))
            if initial_weights_path:  # after the autoencoder has set its own
                import_weights(encoder, initial_weights_path)
        case "dinov2":
            if initial_weights_path:  # before the teacher copies them
                import_weights(encoder, initial_weights_path)
            objective = SelfDistillation(
                encoder, num_images=config.num_images_seen, mask_seed=config.seed, **asdict(config.dinov2)
            )
    return objective


def fetch_initial_weights(hub_uri: str, uri: str, folder: Path) -> Path:
    """Brings the weights that a run starts from to this machine: an encoder of the hub, or a file of any importer."""
    from gretfound import storage
    from gretfound.lineage import Encoder

    if uri.startswith(ENCODER_ID_PREFIX):
        return storage.fetch_folder(hub_uri, storage.read_record(hub_uri, uri, Encoder), folder)
    if path := storage.local_path(uri):
        return path
    storage.download_file(uri, folder / uri.rpartition("/")[2])
    return folder / uri.rpartition("/")[2]


def build_views(config: Config) -> dict[str, Any]:
    """Returns the crops that the configuration's objective takes."""
    from gretfound.encoder.crops import View

    crops = config.crops
    whole = View(size_px=config.encoder.image_size_px, scale=(crops.global_scale_min, 1.0), colour=crops.colour)
    if config.objective == "mae":
        return {"image": whole}
    local_scale = (crops.local_scale_min, crops.local_scale_max)
    local = View(size_px=crops.local_size_px, scale=local_scale, number=crops.num_local, colour=crops.colour)
    return {"global_crop": replace(whole, number=2), "local_crop": local}


def pretrain_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each Ray Train worker: streams, trains, and leaves the encoder in the run's folder."""
    import ray.train
    import ray.train.collective

    from gretfound import fit, ingest, storage, tracking
    from gretfound.checkpoints import RayCheckpoints
    from gretfound.encoder.health import Monitor
    from gretfound.lineage import Corpus

    config: Config = settings["config"]
    hub_uri, run_uri = settings["hub_uri"], settings["run_uri"]
    worker = ray.train.get_context()
    is_first = worker.get_world_rank() == 0
    rejected: set[str] = set()
    rejected_uri = storage.join(run_uri, "rejected", f"{worker.get_world_rank():05d}-{secrets.token_hex(4)}.json")
    num_written = 0

    def batches(start: int) -> Iterator[Any]:
        corpus = storage.read_record(hub_uri, config.corpus_id, Corpus)
        for first, end in ingest.segments(start, config.num_images_seen, batch_size=config.fit.batch_size):
            iterators = None
            if is_first:
                iterators = ingest.stream(
                    hub_uri,
                    corpus,
                    start=first,
                    end=end,
                    num_workers=worker.get_world_size(),
                    batch_size=config.fit.batch_size,
                    views=build_views(config),
                    seed=config.seed,
                    data_cpus=config.cluster.data_cpus,
                )
            iterator = ray.train.collective.broadcast_from_rank_zero(iterators)[worker.get_world_rank()]
            images_per_batch = config.fit.batch_size // (worker.get_world_size() * config.fit.accumulation)
            yield from ingest.torch_batches(iterator, images_per_batch=images_per_batch, rejected=rejected)

    tracker = tracking.Tracker(
        run_uri,
        run_id=settings["run_id"],
        project=config.project,
        settings=canonical(config),
        is_active=is_first,
    )
    with tracker, storage.scratch_folder() as folder:
        uri = config.initial_weights_uri
        weights_path = fetch_initial_weights(hub_uri, uri, Path(folder)) if uri else None
        objective = build_objective(config, initial_weights_path=weights_path)
        monitor = Monitor(objective)
        groups = (
            ingest.plan_of(hub_uri, config.corpus_id, config.seed, config.fit.batch_size)[1].groups if is_first else []
        )
        group_names = ["/".join(group) for group in groups]

        def watch(batch: Mapping[str, Any]) -> None:
            nonlocal num_written
            if is_first:
                monitor.observe(batch)
            if len(rejected) > num_written:
                storage.write_json(rejected_uri, sorted(rejected))
                num_written = len(rejected)

        def tell(progress: fit.Progress) -> None:
            tracker.write(progress.figures(group_names) | monitor.figures() | {"num_rejected": len(rejected)})

        summary = fit.train(
            objective,
            batches,
            num_images=config.num_images_seen,
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
            on_batch=watch,
            on_progress=tell,
        )
    if is_first:
        write_encoder(config, summary, storage.join(run_uri, "encoder"))


def write_encoder(config: Config, summary: Any, uri: str) -> None:
    """Writes the encoder folder, and beside it the whole objective, for reconstructions and for training on."""
    import json

    from safetensors.torch import save_file

    from gretfound import storage
    from gretfound.encoder.folder import load_strictly, write_encoder_folder
    from gretfound.encoder.transform import Transform

    fresh = build_objective(config)
    load_strictly(fresh, summary.weights)
    with storage.scratch_folder() as folder:
        path = write_encoder_folder(
            fresh.encoder,
            Path(folder),
            architecture=config.encoder.architecture,
            transform=Transform(image_size_px=config.encoder.image_size_px),
            extra={"objective": config.objective, "images_seen": summary.images_seen},
        )
        save_file(summary.weights, path / OBJECTIVE_NAMES[config.objective], metadata={"format": "pt"})
        (path / "config.yaml").write_text(to_yaml(config))
        (path / "training.json").write_text(
            json.dumps({"images_seen": summary.images_seen, "final_loss": summary.final_loss}) + "\n"
        )
        for file_path, _, _ in storage.describe_folder(path):
            storage.upload_file(file_path, storage.join(uri, file_path.name))


def main(argv: list[str]) -> str:
    """Runs the job; returns the encoder's id."""
    config = load(Config, argv)
    from gretfound import fit, lineage, storage, tracking
    from gretfound.corpus import check_uncontaminated
    from gretfound.lineage import Corpus, Encoder

    hub_uri = storage.normalised(config.hub_uri)
    corpus = storage.read_record(hub_uri, config.corpus_id, Corpus)
    settings = {
        name: value for name, value in canonical(config).items() if name not in ("hub_uri", "cluster", "project")
    }
    if config.initial_weights_uri and not config.starts_from_encoder:
        with storage.scratch_folder() as folder:  # what is under a name may change: its digest is part of the recipe
            path = fetch_initial_weights(hub_uri, config.initial_weights_uri, Path(folder))
            files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
            settings["initial_weights_sha256"] = [storage.sha256_of(each) for each in files]
    parents = (corpus.id, *([config.initial_weights_uri] if config.starts_from_encoder else []))
    recipe = lineage.recipe_id("pretrain_encoder", settings, list(parents))
    if finished := storage.finished_record(hub_uri, recipe, Encoder):
        return finished.id
    check_uncontaminated(hub_uri, corpus)
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
        summary = storage.read_json(storage.join(run_uri, "encoder", "training.json"))
        for uri in storage.list_uris(storage.join(run_uri, "encoder")):
            storage.download_file(uri, Path(folder) / uri.rpartition("/")[2])
        record = Encoder(
            parents=parents,
            recipe_id=recipe,
            architecture=config.encoder.architecture,
            objective=config.objective,
            image_size_px=config.encoder.image_size_px,
            images_seen=summary["images_seen"],
            final_loss=summary["final_loss"],
        )
        return storage.publish_folder(hub_uri, Path(folder), record).id


if __name__ == "__main__":
    console.run(Config, main)
