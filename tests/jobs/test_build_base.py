"""jobs.build_base: builds a small base, finds it again, and takes a finished pipeline into the hub."""

from pathlib import Path
from typing import Any

import pytest

from gretfound import checkpoints, storage, tracking
from gretfound.checkpoints import HubCheckpoints
from gretfound.config import load
from gretfound.errors import ConfigError, StorageError
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


class _Killed(Exception):
    pass


class _Dying(HubCheckpoints):
    """Keeps state in the hub, until the process is killed after the second checkpoint."""

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        name = super().save(engine, images_seen=images_seen, losses=losses)
        if images_seen == 16:
            raise _Killed
        return name


def test_build_base__goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A record's id follows from the digests of its weights: equal ids are equal weights.
    undisturbed = build_base.main([f"hub_uri={tmp_path / 'a'}", *SMALL])
    keys = [f"hub_uri={tmp_path / 'b'}", *SMALL, "checkpoint_every_images=8"]
    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(checkpoints, "HubCheckpoints", _Dying)
        build_base.main(keys)
    assert build_base.main(keys) == undisturbed
    # It did go on from what is there: damaged, that is told and not trained over.
    next((tmp_path / "b").glob("runs/*/record.json")).unlink()
    for state in (tmp_path / "b").glob("runs/*/checkpoints/*/state/state.pt"):
        state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(StorageError, match="SHA-256"):
        build_base.main(keys)


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
