"""Encoding: caches at the hub are complete or absent, and a damaged shard is its own site's fault alone."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gretfound import encoding, shard, storage
from gretfound.encoding import Attempts, Encoder
from gretfound.errors import StorageError
from gretfound.generator import latents, squares
from tests.tiny_generator import RESOLUTION_PX, publish_base, publish_site, write_base


def rows_of(parts: list[encoding.Part]) -> dict[str, Any]:
    """Returns parts as Ray Data gives them to an actor."""
    return {name: np.array([asdict(part)[name] for part in parts]) for name in encoding.Part.__dataclass_fields__}


def test_encoder__a_damaged_shard_is_told_of_and_nothing_is_encoded_twice(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    shard_sets = [publish_site(hub_uri, tmp_path / name, num_images=3, site_id=name)[1] for name in ("aster", "birch")]
    aster, birch = [encoding.parts_of(each, base=base, resolution_px=None)[0] for each in shard_sets]
    damaged = tmp_path / "hub" / birch.shard_path
    damaged.write_bytes(damaged.read_bytes()[:-1])
    told = Encoder(hub_uri=hub_uri, device="cpu")(rows_of([birch, aster]))
    assert told["site_id"] == ["birch", "aster"]
    assert told["num_images"] == [3, 3]
    assert "SHA-256" in told["fault"][0]
    assert told["fault"][1] == ""
    cache = tmp_path / "hub" / "latents" / "aster" / aster.key(base)
    assert sorted(path.name for path in cache.iterdir()) == sorted(encoding.FILES)
    written = (cache / latents.LATENTS_NAME).stat().st_mtime_ns
    assert Encoder(hub_uri=hub_uri, device="cpu")(rows_of([aster]))["fault"] == [""]
    assert (cache / latents.LATENTS_NAME).stat().st_mtime_ns == written
    # What is there needs no actor and no Ray; what is missing is not guessed.
    seen: list[int] = []
    settings: dict[str, Any] = {"num_actors": 1, "cpus_per_actor": 1.0, "gpus_per_actor": 0.0}
    assert encoding.encode(hub_uri, [aster], bases={base.id: base}, on_progress=seen.append, **settings) == {}
    assert seen == [3]
    fetched = encoding.fetch(hub_uri, [aster], tmp_path / "fetched", base=base)
    assert latents.lay_out(sorted(fetched.iterdir()), tmp_path / "rows").num_images == 3
    with pytest.raises(StorageError, match="does not exist"):
        encoding.fetch(hub_uri, [birch], tmp_path / "fetched", base=base)


def test_parts_of__another_size_is_another_cache(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    _, shard_set = publish_site(hub_uri, tmp_path / "aster", num_images=2)
    native, larger = (encoding.parts_of(shard_set, base=base, resolution_px=side)[0] for side in (None, 64))
    assert (native.resolution_px, larger.resolution_px) == (RESOLUTION_PX, 64)
    assert native.key(base) != larger.key(base)


class KilledEncoder(Encoder):
    """An encoder whose process ends when it decodes the photograph of one patient."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        decode = squares.square_of

        def square_of(encoded: bytes, cells: Any, *, resolution_px: int) -> squares.Square:
            if cells["patient"] == "p1":
                os._exit(1)
            return decode(encoded, cells, resolution_px=resolution_px)

        squares.square_of = square_of


@pytest.mark.parametrize("max_ends", [pytest.param(5, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.slow)])
def test_encode__a_photograph_that_ends_processes_is_named_and_the_others_go_on(
    max_ends: int, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    _, shard_set = publish_site(hub_uri, tmp_path / "aster", num_images=3)
    (part,) = encoding.parts_of(shard_set, base=base, resolution_px=None)
    bad_id = next(
        row["image_id"] for row in shard.read_rows(storage.join(hub_uri, part.shard_path)) if row["patient"] == "p1"
    )
    monkeypatch.setattr(encoding, "Encoder", KilledEncoder)
    monkeypatch.setattr(encoding, "MAX_ENDS", max_ends)
    settings: dict[str, Any] = {"num_actors": 1, "cpus_per_actor": 1.0, "gpus_per_actor": 0.0}
    with caplog.at_level(logging.WARNING):
        faults = encoding.encode(hub_uri, [part], bases={base.id: base}, on_progress=lambda _: None, **settings)
    if max_ends == 2:
        assert list(faults) == ["aster"]
        assert f"2 processes ended while they encoded a shard, at {bad_id}" in faults["aster"]
        assert not part.is_encoded(hub_uri, base)
        return
    assert faults == {}
    assert bad_id in caplog.text and "p1" not in caplog.text
    assert storage.read_json(storage.join(part.cache_uri(hub_uri, base), encoding.REJECTED_NAME)) == [bad_id]
    fetched = encoding.fetch(hub_uri, [part], tmp_path / "fetched", base=base)
    assert latents.lay_out(sorted(fetched.iterdir()), tmp_path / "rows").num_images == 2


def test_attempts__count_what_did_not_come_to_its_end() -> None:
    attempts = Attempts()
    assert attempts.begin("part").total() == 0
    attempts.note("part", "first")
    attempts.note("part", "")
    attempts.note("part", "second")
    assert attempts.begin("part") == {"second": 1}
    attempts.finish("part")
    assert attempts.begin("part") == {"second": 1}, "an end, good or bad, is no crash"
    assert attempts.begin("part") == {"second": 1, "": 1}, "outside of any photograph"
    assert attempts.begin("other").total() == 0
