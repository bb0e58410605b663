"""Encoding: the photographs of sites become latents at the hub, once, by Ray Data.

The work of one actor is one shard. Its cache (`gretfound.generator.latents`) lies in HUB/latents/SITE/KEY/ under a key
that says all that it depends on, and is complete when its `latents.parquet` is there: the other file is written before.
So a job that is run again, or another one on the same photographs and base, encodes nothing twice; the folder may be
deleted at any time.

A photograph may take the process of its actor down. Ray starts another one and gives it the shard again, for ever; here
the second process that ends at one photograph is the last to try it: it is left out, named by its image id, and the
cache's `rejected.json` lists it. A shard at which `MAX_ENDS` processes end is its site's fault, and the others go on.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import ray

from gretfound import storage, synthesis
from gretfound.errors import GretfoundError
from gretfound.generator import latents, pipeline
from gretfound.lineage import Generator, ShardSet

log = logging.getLogger(__name__)
REJECTED_NAME = "rejected.json"
MAX_ENDS = 5  # of processes at one part, in one run
ENDS_OF_A_PHOTOGRAPH = 2  # the first one may be a lost node's
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
    cell_dropout: float = 0.0

    def key(self, base: Generator) -> str:
        """Names the part's cache."""
        files = [(file.path, file.sha256) for file in base.files]
        return latents.key_of(
            files, shard_sha256=self.shard_sha256, resolution_px=self.resolution_px, cell_dropout=self.cell_dropout
        )

    def cache_uri(self, hub_uri: str, base: Generator) -> str:
        """Returns the folder of the part's cache."""
        return storage.join(storage.latents_uri(hub_uri, self.site_id), self.key(base))

    def is_encoded(self, hub_uri: str, base: Generator) -> bool:
        """Tells whether the cache is there, and complete."""
        return storage.exists(storage.join(self.cache_uri(hub_uri, base), FILES[-1]))


def parts_of(
    shard_set: ShardSet, *, base: Generator, resolution_px: int | None, cell_dropout: float = 0.0
) -> list[Part]:
    """Returns the parts of a shard set, in its order; without a resolution the base's own is taken."""
    return [
        Part(
            site_id=shard_set.site_id,
            base_id=base.id,
            shard_path=each.path,
            shard_sha256=each.sha256,
            num_images=each.num_images,
            resolution_px=resolution_px if resolution_px is not None else base.resolution_px,
            cell_dropout=cell_dropout,
        )
        for each in shard_set.shards
    ]


class Attempts:
    """What the actors of a run are at, kept outside of their processes."""

    def __init__(self) -> None:
        self._at: dict[str, str] = {}
        self._ends: dict[str, Counter[str]] = {}

    def begin(self, part: str) -> Counter[str]:
        """Notes that an actor takes up a part; returns how many processes ended at it before, by photograph."""
        ends = self._ends.setdefault(part, Counter())
        if part in self._at:  # whoever had it before did not come to its end
            ends[self._at[part]] += 1
        self._at[part] = ""
        return ends

    def note(self, part: str, image_id: str) -> None:
        """Notes the photograph that a part's actor decodes; ``""`` for none."""
        self._at[part] = image_id

    def finish(self, part: str) -> None:
        """Notes that the part's actor came to an end with it, good or bad."""
        self._at.pop(part, None)


class Encoder:
    """Encodes parts; one actor of the pool. It keeps the last base loaded.

    Args:
        hub_uri: The hub.
        device: ``cpu`` or ``cuda``.
        attempts: Ray's handle of the run's `Attempts`; without one nothing is known of processes that ended.
        max_ends: Processes that may end at a part.
    """

    def __init__(self, *, hub_uri: str, device: str, attempts: Any = None, max_ends: int = MAX_ENDS) -> None:
        self._hub_uri, self._device = hub_uri, device
        self._attempts, self._max_ends = attempts, max_ends
        self._loaded: tuple[str, Any, Any] = ("", None, None)

    def __call__(self, parts: dict[str, npt.NDArray[Any]]) -> dict[str, list[Any]]:
        """Encodes each part; returns its site, the photographs done, and what was wrong with it, or nothing."""
        names = list(Part.__dataclass_fields__)
        rows = [
            Part(**dict(zip(names, row, strict=True))) for row in zip(*(parts[n].tolist() for n in names), strict=True)
        ]
        faults, rejected = [], []
        for part in rows:
            try:
                rejected.append(", ".join(self.encode(part)))
                faults.append("")
            except GretfoundError as error:  # of this site alone: the others go on
                rejected.append("")
                faults.append(f"{type(error).__name__}: {error}")
        return {
            "site_id": [part.site_id for part in rows],
            "num_images": [part.num_images for part in rows],
            "rejected": rejected,
            "fault": faults,
        }

    def encode(self, part: Part) -> list[str]:
        """Encodes one part and writes its cache, if it is not there.

        Returns:
            The ids of the photographs that are left out because processes ended at them.

        Raises:
            GretfoundError: If the shard is absent or damaged, the base or the resolution cannot be used, or as many
                processes as may be ended at the part.
        """
        named = f"{part.base_id}/{part.shard_path}"
        ends: Counter[str] = self._tell("begin", named) or Counter()
        try:
            if ends.total() >= self._max_ends:
                photographs = ", ".join(sorted(filter(None, ends))) or "none of its photographs"
                raise GretfoundError(
                    f"{ends.total()} processes ended while they encoded a shard, at {photographs}; required fewer than "
                    f"{self._max_ends}: see the nodes' memory and Ray's logs, and run the job again"
                )
            rejected = sorted(image_id for image_id, num in ends.items() if image_id and num >= ENDS_OF_A_PHOTOGRAPH)
            self._write_cache(part, rejected, on_decoding=lambda image_id: self._tell("note", named, image_id))
        finally:
            self._tell("finish", named)
        return rejected

    def _write_cache(self, part: Part, rejected: list[str], *, on_decoding: Callable[[str], object]) -> None:
        base, loaded = self._base(part.base_id)
        if part.is_encoded(self._hub_uri, base):
            return
        cache_uri = part.cache_uri(self._hub_uri, base)
        with storage.scratch_folder() as folder:
            shard_path, cache_path = Path(folder) / "shard.parquet", Path(folder) / "cache"
            storage.download_file(storage.join(self._hub_uri, part.shard_path), shard_path, sha256=part.shard_sha256)
            latents.encode_shard(
                shard_path,
                cache_path,
                base=loaded,
                resolution_px=part.resolution_px,
                cell_dropout=part.cell_dropout,
                left_out=rejected,
                on_decoding=on_decoding,
            )
            if rejected:
                storage.write_json(storage.join(cache_uri, REJECTED_NAME), rejected)
            for name in FILES:
                storage.upload_file(cache_path / name, storage.join(cache_uri, name))

    def _tell(self, what: str, *content: str) -> Any:
        if self._attempts is None:
            return None
        told = getattr(self._attempts, what).remote(*content)
        # What may end this process has to be known before; that it did not may arrive with the next thing told.
        return ray.get(told) if content[-1] else None

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
    if not missing:
        return faults
    settings = {
        "hub_uri": hub_uri,
        "device": "cuda" if gpus_per_actor else "cpu",
        "attempts": ray.remote(num_cpus=0)(Attempts).remote(),
        "max_ends": MAX_ENDS,
    }
    done = synthesis.work_off(
        [asdict(part) for part in missing],
        Encoder,
        settings,
        num_actors=num_actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
    )
    for row in done:
        on_progress(int(row["num_images"]))
        if row["rejected"]:
            log.warning(
                "%s: processes ended at these photographs, which are left out: %s", row["site_id"], row["rejected"]
            )
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
