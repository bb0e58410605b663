"""jobs.build_base: builds a small base, finds it again, and takes a finished pipeline into the hub."""

from pathlib import Path

import pytest

from gretfound import storage, tracking
from gretfound.config import load
from gretfound.errors import ConfigError
from gretfound.generator import pipeline
from gretfound.generator.sampling import draw_photographs
from gretfound.lineage import Generator
from jobs import build_base
from tests.tiny_generator import unet_output, write_base

SMALL = [
    "num_photographs=12", "networks.resolution_px=32", "networks.latent_channels=4", "networks.encoder_width=12",
    "networks.decoder_width=8", "networks.num_halvings=1", "networks.unet_channels=[16,32]", "networks.text_width=32",
    "training.num_images=32", "training.batch_size=8",
]  # fmt: skip


def test_build_base__draws_photographs_and_is_found_again(tmp_path: Path) -> None:
    keys = [f"hub_uri={tmp_path / 'hub'}", *SMALL]
    generator_id = build_base.main(keys)
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    record = storage.read_record(hub_uri, generator_id, Generator)
    assert (record.site_id, record.resolution_px, record.num_images, record.images_seen) == ("", 32, 12, 32)
    loaded = pipeline.load_pipeline(storage.fetch_folder(hub_uri, record, tmp_path / "fetched"))
    (drawn,) = draw_photographs(pipeline=loaded, captions=["colour fundus photograph"], seeds=[0], num_steps=2)
    assert drawn.shape == (32, 32, 3)
    metrics = tracking.read_metrics(storage.run_uri(hub_uri, record.recipe_id))
    assert metrics[-1]["images_seen"] == 32
    assert build_base.main(keys) == generator_id


def test_build_base__takes_a_finished_pipeline_into_the_hub(tmp_path: Path) -> None:
    source_path = write_base(tmp_path / "source")
    generator_id = build_base.main([f"hub_uri={tmp_path / 'hub'}", f"source={source_path}"])
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    record = storage.read_record(hub_uri, generator_id, Generator)
    fetched = pipeline.load_pipeline(storage.fetch_folder(hub_uri, record, tmp_path / "fetched"))
    assert (unet_output(fetched.unet) == unet_output(pipeline.load_pipeline(source_path).unet)).all()


def test_config__source_and_photographs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load(build_base.Config, ["hub_uri=x", "source=a", "photographs_uri=b"])
