"""Encoding: the photographs of sites become latents at the hub, once, by Ray Data.

The work of one actor is one shard. Its cache (`gretfound.generator.latents`) lies in HUB/latents/SITE/KEY/ under a key
that says all that it depends on, and is complete when its `latents.parquet` is there: the other file is written before.
So a job that is run again, or another one on the same photographs and base, encodes nothing twice; the folder may be
deleted at any time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gretfound import storage, synthesis
from gretfound.errors import GretfoundError
from gretfound.generator import latents, pipeline
from gretfound.lineage import Generator, ShardSet

FILES = (latents.CAPTIONS_NAME, latents.LATENTS_NAME)  # in the order in which they are written


@dataclass(frozen=True, kw_only=True)
class Part:
    """One unit of work: a shard, and the base whose encoders are used.

    ``site_id`` is told of in a fault; ``num_images`` is how many photographs the shard has.
    """

    site_id: str
    base_id: str
    shard_path: str
    shard_sha256: str
    num_images: int
    resolution_px: int

    def key(self, base: Generator) -> str:
        """Names the part's cache."""
        files = [(file.path, file.sha256) for file in base.files]
        return latents.key_of(files, shard_sha256=self.shard_sha256, resolution_px=self.resolution_px)

    def cache_uri(self, hub_uri: str, base: Generator) -> str:
        """Returns the folder of the part's cache."""
        return storage.join(storage.latents_uri(hub_uri, self.site_id), self.key(base))

    def is_encoded(self, hub_uri: str, base: Generator) -> bool:
        """Tells whether the cache is there, and complete."""
        return storage.exists(storage.join(self.cache_uri(hub_uri, base), FILES[-1]))


def parts_of(shard_set: ShardSet, *, base: Generator, resolution_px: int | None) -> list[Part]:
    """Returns the parts of a shard set, in its order; without a resolution the base's own is taken."""
    return [
        Part(
            site_id=shard_set.site_id,
            base_id=base.id,
            shard_path=each.path,
            shard_sha256=each.sha256,
            num_images=each.num_images,
            resolution_px=resolution_px if resolution_px is not None else base.resolution_px,
        )
        for each in shard_set.shards
    ]


class Encoder:
    """Encodes parts; one actor of the pool. It keeps the last base loaded.

    Args:
        hub_uri: The hub.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, *, hub_uri: str, device: str) -> None:
        self._hub_uri, self._device = hub_uri, device
        self._loaded: tuple[str, Any, Any] = ("", None, None)

    def __call__(self, parts: dict[str, npt.NDArray[Any]]) -> dict[str, list[Any]]:
        """Encodes each part; returns its site, the photographs done, and what was wrong with it, or nothing."""
        names = list(Part.__dataclass_fields__)
        rows = [
            Part(**dict(zip(names, row, strict=True))) for row in zip(*(parts[n].tolist() for n in names), strict=True)
        ]
        faults = []
        for part in rows:
            try:
                self.encode(part)
                faults.append("")
            except GretfoundError as error:  # of this site alone: the others go on
                faults.append(f"{type(error).__name__}: {error}")
        return {
            "site_id": [part.site_id for part in rows],
            "num_images": [part.num_images for part in rows],
            "fault": faults,
        }

    def encode(self, part: Part) -> None:
        """Encodes one part and writes its cache, if it is not there.

        Raises:
            GretfoundError: If the shard is absent or damaged, or the base or the resolution cannot be used.
        """
        base, loaded = self._base(part.base_id)
        if part.is_encoded(self._hub_uri, base):
            return
        with storage.scratch_folder() as folder:
            shard_path, cache_path = Path(folder) / "shard.parquet", Path(folder) / "cache"
            storage.download_file(storage.join(self._hub_uri, part.shard_path), shard_path, sha256=part.shard_sha256)
            latents.encode_shard(shard_path, cache_path, base=loaded, resolution_px=part.resolution_px)
            for name in FILES:
                storage.upload_file(cache_path / name, storage.join(part.cache_uri(self._hub_uri, base), name))

    def _base(self, base_id: str) -> tuple[Generator, Any]:
        if self._loaded[0] != base_id:
            record = storage.read_record(self._hub_uri, base_id, Generator)
            with storage.scratch_folder() as folder:
                path = storage.fetch_folder(self._hub_uri, record, Path(folder))
                self._loaded = (base_id, record, pipeline.load_pipeline(path, device=self._device))
        return self._loaded[1], self._loaded[2]


def encode(
    hub_uri: str,
    parts: Sequence[Part],
    *,
    bases: Mapping[str, Generator],
    num_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    on_progress: Callable[[int], object],
) -> dict[str, str]:
    """Encodes the parts that have no cache yet with a pool of actors on the cluster.

    Args:
        hub_uri: The hub.
        parts: Of any number of sites.
        bases: The base generators by id.
        num_actors: Actors at most, each with a base loaded.
        cpus_per_actor: CPUs that each one reserves.
        gpus_per_actor: GPUs that each one reserves; 0 encodes on CPU.
        on_progress: Told the number of photographs of each finished part.

    Returns:
        By site, what was wrong with a part of it; sites without a fault are not in it.
    """
    missing = [part for part in parts if not part.is_encoded(hub_uri, bases[part.base_id])]
    on_progress(sum(part.num_images for part in parts) - sum(part.num_images for part in missing))
    faults: dict[str, str] = {}
    done = synthesis.work_off(
        [asdict(part) for part in missing],
        Encoder,
        {"hub_uri": hub_uri, "device": "cuda" if gpus_per_actor else "cpu"},
        num_actors=num_actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
    )
    for row in done:
        on_progress(int(row["num_images"]))
        if row["fault"]:
            faults[row["site_id"]] = row["fault"]
    return faults


def fetch(hub_uri: str, parts: Sequence[Part], folder_path: Path, *, base: Generator) -> Path:
    """Brings the caches of parts to the local disk, in an order that their names keep.

    Returns:
        ``folder_path``, which `gretfound.generator.finetune.finetune_locally` takes as ``latents_path``.

    Raises:
        StorageError: If one is absent.
    """
    for index, part in enumerate(parts):
        for name in FILES:
            cache_path = folder_path / f"{index:06d}-{part.key(base)}"
            storage.download_file(storage.join(part.cache_uri(hub_uri, base), name), cache_path / name)
    return folder_path
