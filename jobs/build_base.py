"""(Nothing) -> generator: makes the base generator that every site's fine-tuning starts from.

    python -m jobs.build_base conf/generator/base_demo.yaml hub_uri=runs/demo/hub
    python -m jobs.build_base hub_uri=s3://hub source=hf://stable-diffusion-v1-5/stable-diffusion-v1-5

With source, a finished pipeline is taken into the hub. Without, a small one is built from the configuration and trained
on photographs: those of a site folder, or drawn ones. Training runs in this process; a run that was cut short goes on
from its last checkpoint in the hub when the same command is run again. Records one Generator without a
site and prints its id.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console

if TYPE_CHECKING:
    from gretfound.lineage import Generator


@dataclass(frozen=True)
class NetworksConfig:
    """The networks of a pipeline that is built; see `gretfound.generator.pipeline.build_pipeline`."""

    resolution_px: int = setting(64, "side of the square photographs, pixels")
    latent_channels: int = setting(8, "channels of the latents")
    encoder_width: int = setting(48, "channels within the autoencoder's encoder")
    decoder_width: int = setting(16, "channels within the autoencoder's decoder")
    num_halvings: int = setting(2, "how often the autoencoder halves the side")
    unet_channels: list[int] = setting([32, 64, 128], "channels of the UNet from fine to coarse; each step halves")
    unet_layers: int = setting(1, "residual blocks at each resolution of the UNet")
    text_width: int = setting(64, "width of the text encoder")
    text_layers: int = setting(1, "transformer layers of the text encoder")
    max_tokens: int = setting(48, "tokens that captions are padded or cut to")


@dataclass(frozen=True)
class TrainingConfig:
    """The training of the UNet and the text encoder; the autoencoder is fitted in closed form."""

    num_images: int = setting(8000, "photographs to train on, repeats counted")
    batch_size: int = setting(16, "photographs a step")
    learning_rate: float = setting(1e-3, "peak learning rate")
    caption_dropout: float = setting(0.1, "share of images that see the empty caption")
    min_snr_gamma: float | None = setting(None, "min-SNR weighting; null: all times weigh alike")
    average_decay: float = setting(0.9999, "of the moving average of the weights that is kept, per step; 0: the last")


@dataclass(frozen=True)
class Config:
    """What `build_base` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    source: str = setting("", "a finished pipeline: a folder, an object-store URI or hf://ORG/NAME; empty: build one")
    photographs_uri: str = setting("", "a local site folder to train on; empty: drawn photographs")
    phantom_site: str = setting("public", "which drawn site to train on, without photographs_uri")
    num_photographs: int = setting(480, "photographs to draw, without photographs_uri")
    seed: int = setting(0, "decides photographs, weights, order and noise")
    checkpoint_every_images: int = setting(2000, "images between checkpoints; 0: at the end only")
    project: str = setting("gretfound", "the W&B project")
    networks: NetworksConfig = setting(NetworksConfig())
    training: TrainingConfig = setting(TrainingConfig())

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        if self.source and self.photographs_uri:
            raise ConfigError("source and photographs_uri exclude each other: a finished pipeline is not trained here")


WITHOUT_EFFECT = ("hub_uri", "project", "checkpoint_every_images")  # on the generator


def main(argv: list[str]) -> str:
    """Runs the job; returns the generator's id."""
    config = load(Config, argv)
    from gretfound import lineage, storage
    from gretfound.lineage import Generator

    hub_uri = storage.normalised(config.hub_uri)
    settings = {name: value for name, value in canonical(config).items() if name not in WITHOUT_EFFECT}
    recipe = lineage.recipe_id("build_base", settings, [])
    if finished := storage.finished_record(hub_uri, recipe, Generator):
        return finished.id
    run_uri = storage.run_uri(hub_uri, recipe)
    storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
    with storage.scratch_folder() as folder:
        make = adopt if config.source else build
        path, record = make(config, run_uri=run_uri, recipe_id=recipe, scratch_path=Path(folder))
        return storage.publish_folder(hub_uri, path, record).id


def adopt(config: Config, *, run_uri: str, recipe_id: str, scratch_path: Path) -> "tuple[Path, Generator]":
    """Brings a finished pipeline here, holds it against what this version supports, and keeps what it uses."""
    from gretfound import storage
    from gretfound.generator import families, pipeline
    from gretfound.lineage import Generator

    source_path = pipeline.fetch_base(config.source, hub_uri=None, folder_path=scratch_path / "source")
    loaded = pipeline.load_pipeline(source_path)
    path = pipeline.save_pipeline(loaded, scratch_path / "pipeline")
    storage.write_json(storage.join(run_uri, "source.json"), {"denoiser_sha256": pipeline.denoiser_sha256(source_path)})
    record = Generator(
        recipe_id=recipe_id,
        site_id="",
        method="adopted",
        resolution_px=families.native_px(loaded),
        num_images=0,
        images_seen=0,
        final_loss=0.0,
    )
    return path, record


def build(config: Config, *, run_uri: str, recipe_id: str, scratch_path: Path) -> "tuple[Path, Generator]":
    """Builds a small pipeline and trains it from nothing."""
    from gretfound import metadata, storage, tracking
    from gretfound.checkpoints import HubCheckpoints
    from gretfound.generator import pipeline, pretraining, squares
    from gretfound.lineage import Generator

    folder_path = photographs_of(config, scratch_path)
    rows = metadata.read_metadata(folder_path / "metadata.csv").rows
    encoded = (((folder_path / "traindata" / row.image).read_bytes(), row.cells) for row in rows)
    photographs = list(squares.squares_of(encoded, resolution_px=config.networks.resolution_px))
    words = {word for square in photographs for word in square.caption.split()} | set(metadata.caption_words())
    untrained = pipeline.build_pipeline(**asdict(config.networks), vocabulary=sorted(words), seed=config.seed)
    tracker = tracking.Tracker(run_uri, run_id=recipe_id, project=config.project, settings=canonical(config))
    with tracker, tracking.progress_bar(run_uri, "training the base"):
        summary = pretraining.train_from_nothing(
            untrained,
            photographs,
            work_path=scratch_path / "work",
            seed=config.seed,
            checkpoints=HubCheckpoints(storage.join(run_uri, "checkpoints")),
            checkpoint_every_images=config.checkpoint_every_images,
            on_progress=lambda progress: tracker.write(progress.figures()),
            **asdict(config.training),
        )
    path = pipeline.save_pipeline(untrained, scratch_path / "pipeline")
    record = Generator(
        recipe_id=recipe_id,
        site_id="",
        method="full",
        resolution_px=config.networks.resolution_px,
        num_images=len(photographs),
        images_seen=summary.images_seen,
        final_loss=summary.final_loss,
    )
    return path, record


def photographs_of(config: Config, scratch_path: Path) -> Path:
    """Returns a site folder to train on: the one that is configured, or a drawn one."""
    from gretfound import phantom, storage

    if config.photographs_uri:
        path = storage.local_path(config.photographs_uri)
        if path is None or not (path / "metadata.csv").is_file():
            raise ConfigError(f"photographs_uri={config.photographs_uri!r} is no local site folder with a metadata.csv")
        return path
    if config.phantom_site not in phantom.SITES:
        raise ConfigError(f"phantom_site={config.phantom_site!r} is none of {sorted(phantom.SITES)}")
    return phantom.write_site(
        phantom.SITES[config.phantom_site],
        scratch_path / "photographs",
        num_images=config.num_photographs,
        seed=config.seed,
        size_px=2 * config.networks.resolution_px,
    )


if __name__ == "__main__":
    console.run(Config, main)
