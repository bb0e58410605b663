"""Ingest: a corpus's photographs, decoded and augmented by Ray Data, in the one order in which they are streamed.

The order of an epoch is a pure function of (manifest, seed, epoch): row groups are shuffled, and the photographs are
shuffled within each window of about a thousand. A photograph's place in that order is its *position*; everything random
about it (crop, flip, mask) follows from the position, so neither the number of workers nor a restart changes it.
"""

import functools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.train
import ray.train.collective
import torch
from ray.data._internal.execution.execution_callback import ExecutionCallback
from torch import Tensor

from gretfound import corpus, shard, storage
from gretfound.encoder.crops import View, draw_views
from gretfound.errors import ConfigError, LineageError
from gretfound.fundus import FieldOfView, UnreadablePhotograph
from gretfound.lineage import Corpus

WINDOW_IMAGES = 1024  # at least four row groups: enough to mix sites, few enough to hold as crops
SEGMENT_IMAGES = 2**23  # images of one Ray Data execution: 8,192 small tasks; its plan must not grow with the run
PAUSE_S = 0.01  # short beside a window, which takes a second and more to decode; long beside a turn of 1 to 2 ms
TASKS_PER_CPU = 1.5  # while one task hands its window out, which waits for Ray Data's loop, another decodes
AHEAD_BYTES = 192 * 2**20  # that a task hands out before Ray Data's loop, which comes by ten times a second, takes them
STORE_SHARE = 0.75  # of Ray's object store that the stream may fill; with Ray Data's half, tasks wait for room
MAX_UNREADABLE = 256  # in a row: that is no damaged photograph but a damaged shard
_IMAGE_COLUMNS = ["image", "image_id", "fov_x_px", "fov_y_px", "fov_radius_px", "dr"]


class Pause(ExecutionCallback):
    """Lets Ray Data's scheduling loop sleep a little after each of its steps.

    Ray Data 2.60 waits for "all tasks or 0.1 s"; a task whose output nobody has room for counts as ready, so while a
    training step is slower than the decoding, which is the usual case, the loop turns without rest and takes a CPU.
    `ExecutionCallback` is one of Ray's internals, which `DataContext.custom_execution_callback_classes` asks for. To be
    removed when the loop rests by itself.
    """

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002
        """Called after each step of the loop; a step hands out all that is ready, so nothing waits longer than this."""
        time.sleep(PAUSE_S)


class Order:
    """The order of draws over all phases and epochs of a run, as a pure function of (manifest, phases, seed, batch).

    Positions are cut into windows of whole steps. Within an epoch the row groups come in a random order, one after the
    other; a window's photographs are shuffled, those of two epochs apart from each other. So every epoch is exact, a
    window reads few row groups, and any window is found without a count of those before it.

    Args:
        manifest: A table of `corpus.MANIFEST_SCHEMA`.
        seed: The run's seed.
        batch_size: Images a step: a window holds a whole number of them.
        phase_images: Images of each phase, in order; the last phase lasts as long as the run, whatever its number.

    Attributes:
        groups: The (site, origin) pairs of the corpus, sorted.
        group_codes: For each row group, its pair's index in ``groups``.
        window_images: Images of a window.
    """

    def __init__(
        self, manifest: pa.Table, *, seed: int, batch_size: int = 1, phase_images: tuple[int, ...] = (0,)
    ) -> None:
        self._seed = seed
        self.window_images = max(1, WINDOW_IMAGES // batch_size) * batch_size
        self._excluded = manifest["excluded"].combine_chunks()
        self._num_images = manifest["num_images"].to_numpy()
        num_eligible = self._num_images - pc.list_value_length(self._excluded).to_numpy(zero_copy_only=False)
        weights = manifest["weights"].combine_chunks().flatten().to_numpy().reshape(len(manifest), -1)
        if weights.shape[1] != len(phase_images):
            raise LineageError(
                f"found {weights.shape[1]} weights a row group in the manifest and {len(phase_images)} phases in the "
                "corpus's record; required as many; assemble the corpus again"
            )
        expected = weights * num_eligible[:, None]
        whole = np.round(expected)
        self._expected = np.where(np.abs(expected - whole) < 1e-6, whole, expected)
        self._epoch_draws = [round(float(total)) for total in self._expected.sum(axis=0)]
        if not all(self._epoch_draws):
            raise ConfigError("every image of the corpus, or of one of its phases, is excluded or has no weight")
        self._phase_ends = [*np.cumsum(phase_images[:-1]).tolist(), None]
        self._layout_of = functools.lru_cache(maxsize=4)(self._layout)
        pairs = list(zip(manifest["site_id"].to_pylist(), manifest["origin"].to_pylist(), strict=True))
        self.groups = sorted(set(pairs))
        codes = {pair: code for code, pair in enumerate(self.groups)}
        self.group_codes = [codes[pair] for pair in pairs]

    @property
    def group_names(self) -> list[str]:
        """``SITE/ORIGIN`` of each of ``groups``."""
        return [f"{site_id}/{origin}" for site_id, origin in self.groups]

    def windows(self, start: int, end: int) -> range:
        """Returns the windows that hold the positions from ``start`` up to ``end``."""
        return range(start // self.window_images, -(-end // self.window_images))

    def draws(self, window: int) -> list[tuple[int, int]]:
        """Returns a window's draws in order, as (row group, row in it)."""
        draws: list[tuple[int, int]] = []
        for phase, epoch, first, last in self._parts(window * self.window_images, (window + 1) * self.window_images):
            row_groups, num_draws, ends = self._layout_of(phase, epoch)
            part: list[tuple[int, int]] = []
            for place in range(int(np.searchsorted(ends, first, side="right")), len(row_groups)):
                begin = int(ends[place] - num_draws[place])
                if begin >= last:
                    break
                row_group = int(row_groups[place])
                rows = self._rows(phase, epoch, row_group, int(num_draws[place]))
                part.extend((row_group, row) for row in rows[max(0, first - begin) : last - begin])
            shuffled = self._rng(phase, epoch, 2, first).permutation(len(part))
            draws.extend(part[place] for place in shuffled)
        return draws

    def _parts(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """Cuts positions by epoch: yields (phase, epoch of it, first and last place in that epoch)."""
        phase_start = 0
        for phase, phase_end in enumerate(self._phase_ends):
            at, end = max(first, phase_start), last if phase_end is None else min(last, phase_end)
            epoch_draws = self._epoch_draws[phase]
            while at < end:
                epoch, place = divmod(at - phase_start, epoch_draws)
                stop = min(end, at - place + epoch_draws)
                yield phase, epoch, place, place + stop - at
                at = stop
            phase_start = phase_end or 0

    def _rows(self, phase: int, epoch: int, row_group: int, num_draws: int) -> list[int]:
        """Returns a row group's draws in an epoch: each eligible row as often as the others, or once more."""
        excluded = self._excluded[row_group].values.to_numpy()
        eligible = np.setdiff1d(np.arange(self._num_images[row_group]), excluded)
        whole, extra = divmod(num_draws, len(eligible))
        rng = self._rng(phase, epoch, 1, row_group)
        drawn = np.concatenate([np.tile(eligible, whole), rng.permutation(eligible)[:extra]])
        rows: list[int] = rng.permutation(drawn).tolist()
        return rows

    def _layout(self, phase: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns an epoch's row groups in order, the draws of each, and the place in the epoch at which each ends.

        Expected draws are rounded by systematic sampling (Madow, 1949): right on average for each row group, whole
        numbers stay as they are, and the sum is the same in every epoch, so positions can be found without a count.
        """
        sums = np.concatenate([[0.0], np.cumsum(self._expected[:, phase])])
        last_drawn = int(np.flatnonzero(self._expected[:, phase])[-1])
        sums = np.minimum(sums, self._epoch_draws[phase])
        sums[last_drawn + 1 :] = self._epoch_draws[phase]
        num_draws = np.diff(np.floor(sums + self._rng(phase, epoch, 3).random())).astype(np.int64)
        drawn = np.flatnonzero(num_draws)
        row_groups = drawn[self._rng(phase, epoch, 0).permutation(len(drawn))]
        return row_groups, num_draws[row_groups], np.cumsum(num_draws[row_groups])

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *place])


def read_window(
    hub_uri: str,
    manifest: pa.Table,
    order: Order,
    window: int,
    *,
    start: int,
    end: int,
    views: Mapping[str, View],
    seed: int,
    images_per_block: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads, decodes and augments one window's photographs from ``start`` up to ``end``.

    One row group's bytes are held at a time, beside the window's crops: memory depends on neither the corpus nor the
    size of its photographs. A photograph that cannot be decoded keeps its place, as a black one with ``is_readable``
    false, so that nothing after it moves; the run leaves it out of the loss, counts it and lists its id.

    Yields:
        Blocks of photographs in order, with the crops of `draw_views` by the views' names (uint8), ``position`` int64,
        ``group`` int64 (an index of `Order.groups`), ``label`` int64 (the ICDR grade, -1 where it is not known: for
        watching a run, never for its loss), ``is_readable`` and ``image_id``, each (B, ...).
    """
    window_start = window * order.window_images
    first = max(0, start - window_start)
    draws = list(enumerate(order.draws(window)))[first : end - window_start]
    by_row_group: dict[int, list[tuple[int, int]]] = {}
    for offset, (row_group, row) in draws:
        by_row_group.setdefault(row_group, []).append((offset - first, row))
    taken: dict[str, np.ndarray] = {
        **{name: np.empty((len(draws), *view.shape), np.uint8) for name, view in views.items()},
        "position": np.arange(window_start + first, window_start + first + len(draws)),
        "group": np.zeros(len(draws), np.int64),
        "label": np.full(len(draws), -1, np.int64),
        "is_readable": np.ones(len(draws), np.bool_),
        "image_id": np.zeros(len(draws), "U64"),
    }
    for row_group, places in by_row_group.items():
        held = _read_row_group(hub_uri, manifest, row_group)
        for place, row in places:
            taken["group"][place] = order.group_codes[row_group]
            taken["image_id"][place] = held["image_id"][row]
            if held["dr"][row] is not None:
                taken["label"][place] = held["dr"][row]
            try:
                crops = draw_views(
                    held["image"][row],
                    field_of_view=_field_of_view(held, row),
                    views=views,
                    rng=np.random.default_rng([seed, taken["position"][place]]),
                )
            except UnreadablePhotograph:
                taken["is_readable"][place] = False
                for name in views:
                    taken[name][place] = 0
                continue
            for name, crop in crops.items():
                taken[name][place] = crop
    for place in range(0, len(draws), images_per_block):
        yield {name: values[place : place + images_per_block] for name, values in taken.items()}


def segments(start: int, end: int, *, batch_size: int) -> Iterator[tuple[int, int]]:
    """Cuts the positions from ``start`` to ``end`` into stretches of whole steps, each one Ray Data execution."""
    length = max(1, SEGMENT_IMAGES // batch_size) * batch_size
    for first in range(start, end, length):
        yield first, min(first + length, end)


def stream(
    hub_uri: str,
    record: Corpus,
    *,
    start: int,
    end: int,
    num_workers: int,
    batch_size: int,
    views: Mapping[str, View],
    seed: int,
    data_cpus: float,
) -> list[ray.data.DataIterator]:
    """Streams a corpus through Ray Data: one iterator a worker, which together give the positions in order.

    Of each step's images the first worker gets the first ``batch_size / num_workers``, the second the next, and so on:
    blocks of exactly that many rows are dealt in turn.

    Args:
        hub_uri: The hub.
        record: The corpus to stream.
        start: First position; the number of images already seen, in whole steps.
        end: Position to stop before, in whole steps, at most `SEGMENT_IMAGES` later for a plan of bounded size.
        num_workers: Iterators to return.
        batch_size: Images a step, over all workers.
        views: The crops to draw of each photograph, by the names that the objective takes.
        seed: The run's seed.
        data_cpus: CPUs that Ray Data may use, so that it and Ray Train never wait for each other.
    """
    if start % batch_size or end % batch_size or batch_size % num_workers:
        raise ValueError(
            f"found positions {start} to {end} and {num_workers} workers; required multiples, and a divisor, of "
            f"batch_size={batch_size}"
        )
    corpus_id, images_per_block = record.id, batch_size // num_workers
    num_tasks = max(1, math.ceil(TASKS_PER_CPU * data_cpus))
    order = plan_of(hub_uri, corpus_id, seed, batch_size)[1]
    bounds = task_bounds(order, start, end, batch_size=batch_size, num_tasks=num_tasks)
    windows = [first // order.window_images for first in bounds[:-1]]

    def read(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        manifest, order = plan_of(hub_uri, corpus_id, seed, batch_size)
        for place in batch["id"].tolist():
            yield from read_window(
                hub_uri,
                manifest,
                order,
                windows[place],
                start=bounds[place],
                end=bounds[place + 1],
                views=views,
                seed=seed,
                images_per_block=images_per_block,
            )

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=max(1.0, data_cpus))
    context.enable_progress_bars = False
    block_bytes = images_per_block * _row_bytes(views)
    context._max_num_blocks_in_streaming_gen_buffer = max(2, AHEAD_BYTES // block_bytes)  # no public name in Ray 2.60
    context.override_object_store_memory_limit_fraction = STORE_SHARE
    if Pause not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pause)
    # What `read` yields stays a block as it is: it is larger than this, and smaller than the 1.5 times at which Ray
    # Data 2.60 cuts. A repartition would join and cut, and so copy, every photograph several times more.
    context.target_max_block_size = int(0.75 * block_bytes)
    places = ray.data.range(len(windows), override_num_blocks=len(windows))
    cpus_per_task = math.floor(1e4 * data_cpus / num_tasks) / 1e4  # Ray counts CPUs in ten thousandths
    crops = places.map_batches(read, batch_size=1, num_cpus=cpus_per_task)
    iterators: list[ray.data.DataIterator] = crops.streaming_split(num_workers, equal=True)
    return iterators


def task_bounds(order: Order, start: int, end: int, *, batch_size: int, num_tasks: int) -> list[int]:
    """Cuts the positions from ``start`` to ``end`` into what each task of `stream` reads: a window, or a part of one.

    A task decodes its window and then hands it out, which is waiting for the most part. Tasks that begin together would
    end together and leave the CPUs idle then; so the first windows are cut in two, each at another place.

    Args:
        order: The order of the positions.
        start: First position, in whole steps.
        end: Position to stop before, in whole steps.
        batch_size: Images a step, as ``order`` has it: each part is a whole number of steps.
        num_tasks: Tasks at a time.

    Returns:
        Positions that ascend from ``start`` to ``end``: a task reads from one of them up to the next.
    """
    num_parts = num_tasks | 1  # odd: no window is cut into equal halves
    firsts = [window * order.window_images for window in order.windows(start, end)]
    cuts = [
        first + round(order.window_images * part / num_parts / batch_size) * batch_size
        for part, first in enumerate(firsts[: num_parts // 2], start=1)
    ]
    return sorted({start, end, *(bound for bound in firsts + cuts if start < bound < end)})


def _row_bytes(views: Mapping[str, View]) -> int:
    """Returns the bytes of a photograph in `stream`: its crops, three integers, a bit and an id of 64 letters."""
    return sum(math.prod(view.shape) for view in views.values()) + 92


def torch_batches(
    iterator: ray.data.DataIterator, *, images_per_batch: int, rejected: set[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields one worker's batches of `stream` as tensors: the views, ``position``, ``group``, ``label``, and a key.

    ``photograph_key`` int64 is the start of the photograph's id: equal for two draws of one photograph.

    Args:
        iterator: This worker's iterator.
        images_per_batch: Images a batch; the last one of a stream is full too.
        rejected: Receives the id of each photograph that could not be decoded. It is in no batch, but for a batch of
            nothing else: that is passed on black, so that every worker takes each step.

    Raises:
        LineageError: If `MAX_UNREADABLE` photographs in a row cannot be decoded.
    """
    num_unreadable = 0
    for batch in iterator.iter_batches(batch_size=images_per_batch, batch_format="numpy", prefetch_batches=2):
        readable = batch["is_readable"]
        if rejected is not None:
            rejected.update(str(image_id) for image_id in batch["image_id"][~readable])
        num_unreadable = 0 if readable.any() else num_unreadable + len(readable)
        if num_unreadable >= MAX_UNREADABLE:
            raise LineageError(
                f"none of {num_unreadable} photographs in a row could be decoded; verify the shards' digests"
            )
        if readable.any() and not readable.all():
            batch = {name: values[readable] for name, values in batch.items()}
        photograph_key = np.array([int(image_id[:15], 16) for image_id in batch["image_id"]])
        yield {
            name: torch.from_numpy(np.array(values))
            for name, values in (batch | {"photograph_key": photograph_key}).items()
            if name not in ("is_readable", "image_id")
        }


def worker_batches(
    hub_uri: str,
    record: Corpus,
    start: int,
    *,
    end: int,
    batch_size: int,
    accumulation: int = 1,
    views: Mapping[str, View],
    seed: int,
    data_cpus: float,
    rejected: set[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yields this Ray Train worker's part of each step of `stream`, as `torch_batches` does; for `fit.train`.

    All workers have to take it together: the first one starts the stream and deals the iterators out.

    Args:
        hub_uri: The hub.
        record: The corpus to stream.
        start: First position; the number of images already seen, in whole steps.
        end: Position to stop before, in whole steps, however much later.
        batch_size: Images a step, over all workers and micro-batches.
        accumulation: Micro-batches a step.
        views: The crops to draw of each photograph, by the names that the objective takes.
        seed: The run's seed.
        data_cpus: CPUs that Ray Data may use.
        rejected: Receives the id of each photograph that could not be decoded.
    """
    worker = ray.train.get_context()
    rank, num_workers = worker.get_world_rank(), worker.get_world_size()
    for first, last in segments(start, end, batch_size=batch_size):
        iterators = None
        if rank == 0:
            iterators = stream(
                hub_uri,
                record,
                start=first,
                end=last,
                num_workers=num_workers,
                batch_size=batch_size,
                views=views,
                seed=seed,
                data_cpus=data_cpus,
            )
        iterator = ray.train.collective.broadcast_from_rank_zero(iterators)[rank]
        yield from torch_batches(
            iterator, images_per_batch=batch_size // (num_workers * accumulation), rejected=rejected
        )


@functools.lru_cache(maxsize=2)
def plan_of(hub_uri: str, corpus_id: str, seed: int, batch_size: int) -> tuple[pa.Table, Order]:
    """Returns a corpus's manifest and order; each process makes its own, once: that is less than sending it."""
    record = storage.read_record(hub_uri, corpus_id, Corpus)
    manifest = corpus.read_manifest(hub_uri, record)
    return manifest, Order(manifest, seed=seed, batch_size=batch_size, phase_images=record.phase_images)


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
