"""Corpus -> encoder: pretrains a vision transformer without labels, as a masked autoencoder.

python -m jobs.pretrain_encoder conf/pretrain/demo.yaml hub_uri=runs/demo/hub

Ray Data streams and augments the corpus, Ray Train runs DeepSpeed ZeRO. A killed run continues from its last committed
checkpoint when the same command is run again. Records one Encoder and prints its id.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console


@dataclass(frozen=True)
class EncoderConfig:
    """The vision transformer; sizes of 0 are those of ``architecture``."""

    architecture: str = setting("vit_large_patch16_224", "a timm vision transformer")
    image_size_px: int = setting(224, "side of the square input, pixels")
    patch_size: int = setting(0, "side of a patch, pixels")
    embed_dim: int = setting(0, "width")
    depth: int = setting(0, "blocks")
    num_heads: int = setting(0, "attention heads")


@dataclass(frozen=True)
class MAEConfig:
    """The masked autoencoder (He et al., CVPR 2022)."""

    mask_ratio: float = setting(0.75, "share of patches hidden from the encoder")
    decoder_width: int = setting(512, "width of the decoder")
    decoder_depth: int = setting(8, "blocks of the decoder")
    decoder_num_heads: int = setting(16, "attention heads of the decoder")
    normalise_patches: bool = setting(True, "normalise each target patch by its own mean and variance")


@dataclass(frozen=True)
class FitConfig:
    """The optimisation; progress and schedule are counted in images."""

    num_images: int = setting(904_170 * 800, "images to see in all")
    batch_size: int = setting(1792, "images a step, over all workers")
    accumulation: int = setting(1, "micro-batches a step")
    base_lr: float = setting(1.5e-4, "peak learning rate for 256 images a step; scaled linearly")
    warmup_images: int = setting(904_170 * 15, "images over which the rate rises")
    weight_decay: float = setting(0.05, "AdamW's, on matrices only")
    clip_norm: float = setting(0.0, "largest gradient norm; 0: no clipping")
    precision: str = setting("bfloat16", "float32 or bfloat16")
    zero_stage: int = setting(1, "DeepSpeed ZeRO stage, 0 to 3")
    checkpoint_every_images: int = setting(904_170, "images between checkpoints; 0: at the end only")


@dataclass(frozen=True)
class ClusterConfig:
    """What the run takes of the cluster."""

    num_workers: int = setting(1, "training workers")
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
    crop_scale_min: float = setting(0.2, "smallest share of the field of view that a crop covers; 0 to 1")
    project: str = setting("gretfound", "the W&B project")
    encoder: EncoderConfig = setting(EncoderConfig())
    mae: MAEConfig = setting(MAEConfig())
    fit: FitConfig = setting(FitConfig())
    cluster: ClusterConfig = setting(ClusterConfig())

    @property
    def num_images_seen(self) -> int:
        """The images of the whole run, rounded up to whole steps."""
        return -(-self.fit.num_images // self.fit.batch_size) * self.fit.batch_size

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        share = self.cluster.num_workers * self.fit.accumulation
        if self.fit.batch_size % share:
            raise ConfigError(
                f"fit.batch_size={self.fit.batch_size} is not divisible by "
                f"cluster.num_workers * fit.accumulation = {share}"
            )
        if self.fit.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"fit.precision={self.fit.precision!r} is neither float32 nor bfloat16")
        if self.fit.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"fit.zero_stage={self.fit.zero_stage} is none of 0, 1, 2, 3")


def build_objective(config: Config) -> Any:
    """Builds the untrained autoencoder of a configuration; a finished run's weights fit it."""
    import torch

    from gretfound.encoder.architecture import build_encoder
    from gretfound.encoder.mae import MaskedAutoencoder

    torch.manual_seed(config.seed)
    encoder = build_encoder(**asdict(config.encoder))
    return MaskedAutoencoder(encoder, mask_seed=config.seed, **asdict(config.mae))


def build_views(config: Config) -> dict[str, Any]:
    """Returns the crops that the configuration's objective takes."""
    from gretfound.encoder.crops import View

    return {"image": View(size_px=config.encoder.image_size_px, scale=(config.crop_scale_min, 1.0))}


def pretrain_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each Ray Train worker: streams, trains, and leaves the encoder in the run's folder."""
    import ray.train
    import ray.train.collective

    from gretfound import fit, ingest, storage, tracking
    from gretfound.lineage import Corpus

    config: Config = settings["config"]
    hub_uri, run_uri = settings["hub_uri"], settings["run_uri"]
    worker = ray.train.get_context()
    images_per_step = config.fit.batch_size // worker.get_world_size()
    rejected: dict[int, str] = {}

    def batches(start: int) -> Iterator[Any]:
        corpus = storage.read_record(hub_uri, config.corpus_id, Corpus)
        for first, end in ingest.segments(start, config.num_images_seen, batch_size=config.fit.batch_size):
            iterators = None
            if worker.get_world_rank() == 0:
                iterators = ingest.stream(
                    hub_uri,
                    corpus,
                    start=first,
                    end=end,
                    num_workers=worker.get_world_size(),
                    images_per_worker_step=images_per_step,
                    views=build_views(config),
                    seed=config.seed,
                    data_cpus=config.cluster.data_cpus,
                )
            iterator = ray.train.collective.broadcast_from_rank_zero(iterators)[worker.get_world_rank()]
            images_per_batch = images_per_step // config.fit.accumulation
            yield from ingest.torch_batches(iterator, images_per_batch=images_per_batch, rejected=rejected)

    tracker = tracking.Tracker(
        run_uri,
        run_id=settings["run_id"],
        project=config.project,
        settings=canonical(config),
        is_active=worker.get_world_rank() == 0,
    )
    with tracker:
        objective = build_objective(config)
        summary = fit.train(
            objective,
            batches,
            num_images=config.num_images_seen,
            batch_size=config.fit.batch_size,
            accumulation=config.fit.accumulation,
            peak_lr=fit.peak_lr_for(config.fit.batch_size, base_lr=config.fit.base_lr),
            warmup_images=config.fit.warmup_images,
            weight_decay=config.fit.weight_decay,
            clip_norm=config.fit.clip_norm,
            precision=config.fit.precision,
            zero_stage=config.fit.zero_stage,
            device="cuda" if config.cluster.gpus_per_worker else "cpu",
            seed=config.seed,
            checkpoints=fit.RayCheckpoints(),
            checkpoint_every_images=config.fit.checkpoint_every_images,
            on_progress=lambda progress: tracker.write(asdict(progress)),
        )
    if rejected:
        name = f"{worker.get_world_rank():05d}-{min(rejected):015d}.json"
        storage.write_json(storage.join(run_uri, "rejected", name), {str(place): rejected[place] for place in rejected})
    if worker.get_world_rank() == 0:
        write_encoder(config, summary, storage.join(run_uri, "encoder"))


def write_encoder(config: Config, summary: Any, uri: str) -> None:
    """Writes the encoder folder, and beside it the whole autoencoder for reconstructions and for training on."""
    import json

    from safetensors.torch import save_file

    from gretfound import storage
    from gretfound.encoder.folder import load_strictly, write_encoder_folder
    from gretfound.encoder.mae import AUTOENCODER_NAME
    from gretfound.encoder.transform import Transform

    fresh = build_objective(config)
    load_strictly(fresh, summary.weights)
    with storage.scratch_folder() as folder:
        path = write_encoder_folder(
            fresh.encoder,
            Path(folder),
            architecture=config.encoder.architecture,
            transform=Transform(image_size_px=config.encoder.image_size_px),
            extra={"objective": "mae", "images_seen": summary.images_seen},
        )
        save_file(summary.weights, path / AUTOENCODER_NAME, metadata={"format": "pt"})
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
    check_uncontaminated(hub_uri, corpus)
    settings = {
        name: value for name, value in canonical(config).items() if name not in ("hub_uri", "cluster", "project")
    }
    recipe = lineage.recipe_id("pretrain_encoder", settings, [corpus.id])
    if finished := storage.finished_record(hub_uri, recipe, Encoder):
        return finished.id
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
            parents=(corpus.id,),
            recipe_id=recipe,
            architecture=config.encoder.architecture,
            objective="mae",
            image_size_px=config.encoder.image_size_px,
            images_seen=summary["images_seen"],
            final_loss=summary["final_loss"],
        )
        return storage.publish_folder(hub_uri, Path(folder), record).id


if __name__ == "__main__":
    console.run(Config, main)
