"""The corpus: a manifest over shards, and the one order in which its photographs are streamed.

A manifest has a row for each row group of a shard: where it is, how often its images are drawn, which are excluded. No
image is copied. The order of an epoch is a pure function of (manifest, seed, epoch): row groups are shuffled, gathered
into windows, and shuffled again within a window. A photograph's place in that order is its *position*; everything
random about it (crop, flip, mask) follows from the position, so neither the number of workers nor a restart changes it.
"""

import functools
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from torch import Tensor

from gretfound import shard, storage
from gretfound.encoder.crops import random_crop
from gretfound.errors import ConfigError, LineageError
from gretfound.fundus import FieldOfView
from gretfound.lineage import Corpus, ShardSet

log = logging.getLogger(__name__)
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("shard_path", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("site_id", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("excluded", pa.list_(pa.int32()), nullable=False),
    ]
)
ROW_GROUPS_PER_WINDOW = 8
_IMAGE_COLUMNS = ["image", "image_id", "fov_x_px", "fov_y_px", "fov_radius_px"]


def plan(
    hub_uri: str,
    shard_sets: Sequence[ShardSet],
    *,
    excluded_image_ids: frozenset[str] = frozenset(),
    temperature: float = 1.0,
    real_share: float | None = None,
) -> pa.Table:
    """Makes the manifest of a corpus.

    A site with n images gets n ** ``temperature`` of the draws: 1 leaves sites as they are, 0 makes them equal. Within
    that, ``real_share`` of all draws go to real photographs. Weights are scaled so that an epoch has as many draws as
    there are images; a weight is the expected number of draws of an image in an epoch.

    Args:
        hub_uri: The hub.
        shard_sets: What to include.
        excluded_image_ids: Images that no corpus may hold, such as those of evaluation sets.
        temperature: 0 to 1.
        real_share: 0 to 1, or None to leave the shares as they are.

    Returns:
        A table of `MANIFEST_SCHEMA`.

    Raises:
        ConfigError: If nothing is left, or ``real_share`` asks for an origin that is absent.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for shard_set in sorted(shard_sets, key=lambda each: each.id):
        for part in shard_set.shards:
            with shard.open_shard(storage.join(hub_uri, part.path)) as parquet:
                for index in range(parquet.num_row_groups):
                    image_ids = parquet.read_row_group(index, columns=["image_id"])["image_id"].to_pylist()
                    excluded = []
                    for row, image_id in enumerate(image_ids):
                        if image_id in excluded_image_ids or image_id in seen:
                            excluded.append(row)
                        seen.add(image_id)
                    rows.append(
                        {
                            "shard_path": part.path,
                            "row_group": index,
                            "num_images": len(image_ids),
                            "site_id": shard_set.site_id,
                            "origin": shard_set.origin,
                            "weight": 1.0,
                            "excluded": excluded,
                        }
                    )
    if not any(row["num_images"] > len(row["excluded"]) for row in rows):
        raise ConfigError("found no image for the corpus; contribute, take in or synthesize photographs first")
    _set_weights(rows, temperature=temperature, real_share=real_share)
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def _set_weights(rows: list[dict[str, Any]], *, temperature: float, real_share: float | None) -> None:
    num_images = [row["num_images"] - len(row["excluded"]) for row in rows]
    by_site = _summed([row["site_id"] for row in rows], num_images)
    for row in rows:
        row["weight"] = float(max(by_site[row["site_id"]], 1)) ** (temperature - 1.0)
    if real_share is not None:
        expected = [number * row["weight"] for row, number in zip(rows, num_images, strict=True)]
        draws = _summed([row["origin"] for row in rows], expected)
        shares = {"real": real_share, "synthetic": 1.0 - real_share}
        absent = [origin for origin, share in shares.items() if share > 0 and not draws.get(origin)]
        if absent:
            raise ConfigError(f"real_share={real_share} needs {absent[0]} photographs; found none in the shard sets")
        for row in rows:
            row["weight"] *= shares[row["origin"]] / draws[row["origin"]]
    scale = sum(num_images) / sum(number * row["weight"] for row, number in zip(rows, num_images, strict=True))
    for row in rows:
        row["weight"] *= scale


def _summed(keys: Sequence[str], amounts: Sequence[float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for key, amount in zip(keys, amounts, strict=True):
        sums[key] = sums.get(key, 0.0) + amount
    return sums


def count(manifest: pa.Table) -> dict[str, Any]:
    """Returns what a Corpus record says of its manifest: images in all, excluded, by origin, and the sites."""
    by_origin: dict[str, int] = {}
    num_excluded = 0
    for row in manifest.to_pylist():
        included = row["num_images"] - len(row["excluded"])
        by_origin[row["origin"]] = by_origin.get(row["origin"], 0) + included
        num_excluded += len(row["excluded"])
    return {
        "num_images": sum(by_origin.values()),
        "num_excluded": num_excluded,
        "site_ids": tuple(sorted(set(manifest["site_id"].to_pylist()))),
        "num_images_by_origin": by_origin,
    }


def encode_manifest(manifest: pa.Table) -> bytes:
    """Returns a manifest as Parquet bytes."""
    stream = io.BytesIO()
    pq.write_table(manifest, stream, compression="ZSTD")
    return stream.getvalue()


def read_manifest(hub_uri: str, corpus: Corpus) -> pa.Table:
    """Reads a corpus's manifest."""
    content = storage.read_bytes(storage.join(storage.record_uri(hub_uri, corpus), "manifest.parquet"))
    return pq.read_table(io.BytesIO(content)).cast(MANIFEST_SCHEMA)


def contained_image_ids(hub_uri: str, corpus: Corpus, image_ids: Iterable[str]) -> set[str]:
    """Returns those of ``image_ids`` that the corpus holds and does not exclude."""
    wanted, found = set(image_ids), set()
    for row in read_manifest(hub_uri, corpus).to_pylist():
        with shard.open_shard(storage.join(hub_uri, row["shard_path"])) as parquet:
            held = parquet.read_row_group(row["row_group"], columns=["image_id"])["image_id"].to_pylist()
        excluded = set(row["excluded"])
        found |= {image_id for place, image_id in enumerate(held) if place not in excluded} & wanted
    return found


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of an epoch that is read together: row groups by their index in the manifest, and how often each."""

    epoch: int
    index: int
    row_groups: tuple[int, ...]
    first_position: int
    num_draws: int


class EpochOrder:
    """The order of draws over all epochs of a run, as a pure function of (manifest, seed).

    Args:
        manifest: A table of `MANIFEST_SCHEMA`.
        seed: The run's seed.
    """

    def __init__(self, manifest: pa.Table, *, seed: int) -> None:
        self._seed = seed
        self._excluded = manifest["excluded"].to_pylist()
        self._num_images = manifest["num_images"].to_numpy()
        self._weight = manifest["weight"].to_numpy()
        self._num_eligible = self._num_images - np.array([len(rows) for rows in self._excluded], dtype=np.int64)

    def windows(self, start: int, end: int) -> Iterator[Window]:
        """Yields the windows that hold the positions from ``start`` up to ``end``."""
        first_position, epoch = 0, 0
        while first_position < end:
            num_draws = self._num_draws(epoch)
            if not num_draws.sum():
                raise ConfigError("every image of the corpus is excluded or has no weight")
            order = np.random.default_rng([self._seed, epoch, 0]).permutation(len(num_draws))
            for index in range(0, len(order), ROW_GROUPS_PER_WINDOW):
                row_groups = order[index : index + ROW_GROUPS_PER_WINDOW]
                window_draws = int(num_draws[row_groups].sum())
                if first_position + window_draws > start and first_position < end and window_draws:
                    yield Window(
                        epoch=epoch,
                        index=index // ROW_GROUPS_PER_WINDOW,
                        row_groups=tuple(row_groups.tolist()),
                        first_position=first_position,
                        num_draws=window_draws,
                    )
                first_position += window_draws
            epoch += 1

    def draws(self, window: Window) -> list[tuple[int, int]]:
        """Returns the window's draws in order, as (row group, row in it)."""
        num_draws = self._num_draws(window.epoch)
        draws: list[tuple[int, int]] = []
        for row_group in window.row_groups:
            excluded = set(self._excluded[row_group])
            eligible = [row for row in range(self._num_images[row_group]) if row not in excluded]
            if not eligible:
                continue
            whole, extra = divmod(int(num_draws[row_group]), len(eligible))
            chosen = np.random.default_rng([self._seed, window.epoch, 1, row_group]).permutation(len(eligible))[:extra]
            draws.extend((row_group, row) for row in eligible * whole)
            draws.extend((row_group, eligible[place]) for place in chosen)
        order = np.random.default_rng([self._seed, window.epoch, 2, window.index]).permutation(len(draws))
        return [draws[place] for place in order]

    def _num_draws(self, epoch: int) -> np.ndarray:
        """Rounds each row group's expected draws up or down by chance, so that they are right on average."""
        expected = self._weight * self._num_eligible
        rounded = np.round(expected)
        is_whole = np.abs(expected - rounded) < 1e-6
        chance = np.random.default_rng([self._seed, epoch, 3]).random(len(expected))
        draws: np.ndarray = np.where(is_whole, rounded, np.floor(expected + chance)).astype(np.int64)
        return draws


def read_window(
    hub_uri: str,
    manifest: pa.Table,
    order: EpochOrder,
    window: Window,
    *,
    start: int,
    end: int,
    size_px: int,
    crop_scale: tuple[float, float],
    seed: int,
    images_per_block: int = 64,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads, decodes and augments one window's photographs from ``start`` up to ``end``.

    A photograph that cannot be decoded keeps its place, as a black image with ``is_readable`` false, so that nothing
    after it moves; the run leaves it out of the loss, counts it and lists its id.

    Yields:
        Blocks with ``image`` uint8 (B, 3, size_px, size_px), ``position`` int64 (B,), ``is_readable`` bool (B,),
        ``image_id`` and ``origin``.
    """
    columns: dict[int, dict[str, list[Any]]] = {}
    origins = manifest["origin"]
    block: list[dict[str, Any]] = []
    for offset, (row_group, row) in enumerate(order.draws(window)):
        position = window.first_position + offset
        if not start <= position < end:
            continue
        if row_group not in columns:
            columns[row_group] = _read_row_group(hub_uri, manifest, row_group)
        held = columns[row_group]
        rng = np.random.default_rng([seed, position])
        try:
            pixels = random_crop(
                held["image"][row],
                field_of_view=_field_of_view(held, row),
                size_px=size_px,
                scale=crop_scale,
                rng=rng,
            )
            is_readable = True
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for bytes that are no whole image
            pixels, is_readable = np.zeros((3, size_px, size_px), dtype=np.uint8), False
        block.append(
            {
                "image": pixels,
                "position": position,
                "is_readable": is_readable,
                "image_id": held["image_id"][row],
                "origin": origins[row_group].as_py(),
            }
        )
        if len(block) == images_per_block:
            yield _stacked(block)
            block = []
    if block:
        yield _stacked(block)


def stream(
    hub_uri: str,
    corpus: Corpus,
    *,
    start: int,
    end: int,
    num_workers: int,
    images_per_worker_step: int,
    size_px: int,
    crop_scale: tuple[float, float],
    seed: int,
    data_cpus: float,
) -> list[ray.data.DataIterator]:
    """Streams a corpus through Ray Data: one iterator a worker, which together give the positions in order.

    Of each step's images the first worker gets the first ``images_per_worker_step``, the second the next, and so on:
    blocks of exactly that many rows are dealt in turn.

    Args:
        hub_uri: The hub.
        corpus: What to stream.
        start: First position; the number of images already seen.
        end: Position to stop before.
        num_workers: Iterators to return.
        images_per_worker_step: Images that each takes a step.
        size_px: Side of a crop.
        crop_scale: Smallest and largest share of the field of view that a crop covers.
        seed: The run's seed.
        data_cpus: CPUs that Ray Data may use, so that it and Ray Train never wait for each other.
    """
    corpus_id, manifest = corpus.id, read_manifest(hub_uri, corpus)
    num_windows = sum(1 for _ in EpochOrder(manifest, seed=seed).windows(start, end))

    def read(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        held, order, windows = _windows_of(hub_uri, corpus_id, seed, start, end)
        for place in batch["id"].tolist():
            yield from read_window(
                hub_uri,
                held,
                order,
                windows[place],
                start=start,
                end=end,
                size_px=size_px,
                crop_scale=crop_scale,
                seed=seed,
            )

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=max(1.0, data_cpus))
    context.enable_progress_bars = False
    windows = ray.data.range(num_windows, override_num_blocks=num_windows)
    crops = windows.map_batches(read, batch_size=1, num_cpus=min(1.0, data_cpus))
    blocks = crops.repartition(target_num_rows_per_block=images_per_worker_step, strict=True)
    iterators: list[ray.data.DataIterator] = blocks.streaming_split(num_workers, equal=True)
    return iterators


def torch_batches(
    iterator: ray.data.DataIterator, *, images_per_batch: int, rejected: dict[int, str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields one worker's batches of `stream`, with what a training objective takes: ``image`` and ``position``.

    Args:
        iterator: This worker's iterator.
        images_per_batch: Images a batch; the last one of a stream is full too.
        rejected: Receives the position and id of each photograph that could not be decoded; it is in no batch.
    """
    for batch in iterator.iter_batches(batch_size=images_per_batch, batch_format="numpy", prefetch_batches=2):
        readable = batch["is_readable"]
        if rejected is not None:
            for place in np.flatnonzero(~readable):
                rejected[int(batch["position"][place])] = str(batch["image_id"][place])
        if not readable.any():
            raise LineageError(
                f"none of {len(readable)} photographs in a row could be decoded; verify the shards' digests"
            )
        if not readable.all():
            batch = {name: values[readable] for name, values in batch.items()}
        yield {
            "image": torch.from_numpy(np.array(batch["image"])),
            "position": torch.from_numpy(np.array(batch["position"])),
        }


@functools.lru_cache(maxsize=2)
def _windows_of(
    hub_uri: str, corpus_id: str, seed: int, start: int, end: int
) -> tuple[pa.Table, EpochOrder, list[Window]]:
    """Each Ray Data worker plans for itself, once: the plan is a pure function and smaller to make than to send."""
    manifest = read_manifest(hub_uri, storage.read_record(hub_uri, corpus_id, Corpus))
    order = EpochOrder(manifest, seed=seed)
    return manifest, order, list(order.windows(start, end))


def _read_row_group(hub_uri: str, manifest: pa.Table, row_group: int) -> dict[str, list[Any]]:
    path = manifest["shard_path"][row_group].as_py()
    with shard.open_shard(storage.join(hub_uri, path)) as parquet:
        table = parquet.read_row_group(manifest["row_group"][row_group].as_py(), columns=_IMAGE_COLUMNS)
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


def _field_of_view(columns: Mapping[str, list[Any]], row: int) -> FieldOfView | None:
    if columns["fov_radius_px"][row] is None:
        return None
    return FieldOfView(
        x_px=columns["fov_x_px"][row], y_px=columns["fov_y_px"][row], radius_px=columns["fov_radius_px"][row]
    )


def _stacked(block: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in block]) for name in block[0]}
