"""Ingest: an order that no worker and no restart changes, and photographs that arrive in it."""

import contextlib
import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from gretfound import corpus, ingest, shard, storage
from gretfound.encoder.crops import View
from gretfound.errors import LineageError
from gretfound.lineage import Corpus, ShardSet
from tests.hubs import assemble, draw_shard_set

VIEWS = {"image": View(size_px=32, scale=(0.2, 1.0))}


def manifest_of(*row_groups: dict[str, Any]) -> pa.Table:
    blank = {"shard_path": "x", "row_group": 0, "site_id": "a", "origin": "real", "weights": [1.0], "excluded": []}
    return pa.Table.from_pylist([blank | each for each in row_groups], corpus.MANIFEST_SCHEMA)


def draws_between(manifest: pa.Table, start: int, end: int, seed: int = 0, **settings: Any) -> list[tuple[int, int]]:
    order = ingest.Order(manifest, seed=seed, **settings)
    windows = order.windows(start, end)
    drawn = [draw for window in windows for draw in order.draws(window)]
    skipped = start - windows.start * order.window_images
    return drawn[skipped : skipped + end - start]


def test_draws__every_image_exactly_once_an_epoch() -> None:
    manifest = manifest_of(*({"num_images": number} for number in (5, 300, 17, 64, 1, 256, 40, 3, 99, 12)))
    num_images = sum(manifest["num_images"].to_pylist())
    everything = {
        (group, row) for group, number in enumerate(manifest["num_images"].to_pylist()) for row in range(number)
    }
    for epoch in range(3):
        drawn = draws_between(manifest, epoch * num_images, (epoch + 1) * num_images)
        assert len(drawn) == num_images and set(drawn) == everything
    assert draws_between(manifest, 0, num_images) != draws_between(manifest, num_images, 2 * num_images)


@pytest.mark.parametrize("start", [0, 1, 99, 100, 101, 799, 1000, 1596])
def test_windows__from_any_position_the_rest_is_the_same(start: int) -> None:
    manifest = manifest_of(*({"num_images": number} for number in (5, 300, 17, 64, 1, 256, 40, 3, 99, 12)))
    assert draws_between(manifest, start, 1700) == draws_between(manifest, 0, 1700)[start:]


def test_draws__windows_mix_row_groups_and_hold_whole_steps() -> None:
    manifest = manifest_of(*({"num_images": 256} for _ in range(40)))
    order = ingest.Order(manifest, seed=0, batch_size=96)
    assert order.window_images == 960 and order.windows(960, 2880) == range(1, 3)
    for window in range(12):
        groups = [group for group, _ in order.draws(window)]
        assert len(groups) == 960 and 4 <= len(set(groups)) <= 6, "an epoch's end adds some"
        assert len(set(groups[:64])) >= 3, "mixed from the first batch on"


def test_segments__cover_every_position_once_in_whole_steps() -> None:
    cut = list(ingest.segments(96, 5 * ingest.SEGMENT_IMAGES, batch_size=96))
    assert cut[0][0] == 96 and cut[-1][1] == 5 * ingest.SEGMENT_IMAGES
    assert all(before[1] == after[0] and after[0] % 96 == 0 for before, after in itertools.pairwise(cut))
    assert max(end - first for first, end in cut) <= ingest.SEGMENT_IMAGES


@pytest.mark.parametrize(("start", "end"), [(0, 9600), (96, 9600), (480, 672), (0, 96)])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 24])
def test_task_bounds__tasks_that_begin_together_end_apart(start: int, end: int, num_tasks: int) -> None:
    order = ingest.Order(manifest_of({"num_images": 256}), seed=0, batch_size=96)
    bounds = ingest.task_bounds(order, start, end, batch_size=96, num_tasks=num_tasks)
    assert bounds[0] == start and bounds[-1] == end
    for first, last in itertools.pairwise(bounds):
        assert first < last and first // 960 == (last - 1) // 960, "a task reads one window's row groups"
        assert (first - start) % 96 == 0, "and gives whole steps"
    if end == 9600:
        lengths = [last - first for first, last in itertools.pairwise(bounds)][:num_tasks]
        assert len(set(lengths)) >= min(num_tasks, 4), "a window has too few steps to tell two dozen apart"


def test_draws__a_last_row_group_without_weight_takes_none() -> None:
    row_groups = [
        {"num_images": 7, "weights": [0.37]},
        {"num_images": 5, "weights": [0.61]},
        {"num_images": 9, "weights": [0.0]},
    ]
    for seed in range(30):
        drawn = draws_between(manifest_of(*row_groups), 0, 60, seed=seed)
        assert len(drawn) == 60 and {group for group, _ in drawn} == {0, 1}


def test_draws__phases_follow_each_other_each_with_its_weights() -> None:
    synthetic = {"num_images": 300, "origin": "synthetic", "weights": [1.0, 0.0]}
    real = {"num_images": 100, "weights": [0.0, 1.0]}
    drawn = draws_between(manifest_of(synthetic, real), 0, 1500, phase_images=(1000, 0))
    assert {group for group, _ in drawn[:1000]} == {0} and {group for group, _ in drawn[1000:]} == {1}
    assert set(Counter(drawn[:900]).values()) == {3} and set(Counter(drawn[1000:]).values()) == {5}
    with pytest.raises(LineageError, match="found 2 weights a row group"):
        ingest.Order(manifest_of(synthetic), seed=0)


def test_draws__excluded_rows_are_never_drawn() -> None:
    manifest = manifest_of({"num_images": 10, "excluded": [0, 3, 9]}, {"num_images": 4, "excluded": [0, 1, 2, 3]})
    drawn = Counter(draws_between(manifest, 0, 70))
    assert set(drawn) == {(0, row) for row in (1, 2, 4, 5, 6, 7, 8)} and set(drawn.values()) == {10}


def test_draws__weights_hold_on_average() -> None:
    manifest = manifest_of({"num_images": 7, "weights": [0.3]}, {"num_images": 10, "weights": [2.25]})
    drawn = Counter(group for group, _ in draws_between(manifest, 0, 50_000))
    assert drawn[1] / drawn[0] == pytest.approx(22.5 / 2.1, rel=0.03)


@pytest.fixture(scope="module")
def small_hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Corpus]:
    hub_uri = storage.normalised(str(tmp_path_factory.mktemp("hub")))
    shard_sets = [
        draw_shard_set(hub_uri, "aster", num_images=30),
        draw_shard_set(hub_uri, "birch", num_images=21, origin="synthetic"),
    ]
    return hub_uri, assemble(hub_uri, *shard_sets)


def consumed(
    hub_uri: str, record: Corpus, *, start: int, end: int, num_workers: int, step: int
) -> list[list[dict[str, Any]]]:
    iterators = ingest.stream(
        hub_uri,
        record,
        start=start,
        end=end,
        num_workers=num_workers,
        batch_size=step,
        views=VIEWS,
        seed=5,
        data_cpus=1.0,
    )

    @ray.remote(num_cpus=0)
    def consume(iterator: Any) -> list[dict[str, Any]]:
        return [
            {name: value.numpy() for name, value in batch.items()}
            for batch in ingest.torch_batches(iterator, images_per_batch=step // num_workers)
        ]

    found: list[list[dict[str, Any]]] = ray.get([consume.remote(each) for each in iterators])
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_stream__steps_are_the_same_for_one_two_and_three_workers(
    small_hub: tuple[str, Corpus],
) -> None:
    hub_uri, record = small_hub
    (alone,) = consumed(hub_uri, record, start=0, end=96, num_workers=1, step=12)
    assert [batch["position"].tolist() for batch in alone] == [
        list(range(first, first + 12)) for first in range(0, 96, 12)
    ]
    for start, num_workers in ((24, 2), (48, 3)):
        together = consumed(hub_uri, record, start=start, end=96, num_workers=num_workers, step=12)
        for step, batches in enumerate(zip(*together, strict=True)):
            expected = alone[start // 12 + step]
            for name in ("position", "image"):
                np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), expected[name])


@pytest.mark.usefixtures("ray_cluster")
def test_stream__its_coordinator_rests_while_nobody_takes_a_step(small_hub: tuple[str, Corpus]) -> None:
    def used_s() -> dict[int, float]:
        processes = [each.info for each in psutil.process_iter(["pid", "name", "cpu_times"])]
        return {each["pid"]: sum(each["cpu_times"][:2]) for each in processes if "SplitCoord" in (each["name"] or "")}

    others = used_s()
    (iterator,) = ingest.stream(
        *small_hub,
        start=0,
        end=2**18,
        num_workers=1,
        batch_size=16,
        views={"image": View(size_px=512, scale=(0.2, 1.0))},
        seed=0,
        data_cpus=1.0,
    )
    batches: Any = ingest.torch_batches(iterator, images_per_batch=16)
    with contextlib.closing(batches):
        next(batches)
        time.sleep(12)  # until there is no room for another crop
        before = used_s()
        time.sleep(3)
        after = used_s()
    shares = [(after[pid] - spent_s) / 3 for pid, spent_s in before.items() if pid in after and pid not in others]
    assert shares and min(shares) < 0.3, f"shares of a CPU: {shares}"


@pytest.mark.usefixtures("ray_cluster")
def test_stream__one_damaged_image_is_counted_and_its_neighbours_stay(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    whole = draw_shard_set(hub_uri, "cedar", num_images=24)
    uri = storage.join(hub_uri, whole.shards[0].path)
    rows = list(shard.read_rows(uri))
    rows[5]["image"] = rows[5]["image"][:200]
    damaged = shard.write_shard(hub_uri, rows)
    record = assemble(
        hub_uri, ShardSet(site_id="cedar", origin="real", num_images=24, shards=(damaged, whole.shards[1]), rejected={})
    )
    rejected: set[str] = set()
    (iterator,) = ingest.stream(
        hub_uri,
        record,
        start=0,
        end=48,
        num_workers=1,
        batch_size=8,
        views=VIEWS,
        seed=0,
        data_cpus=1.0,
    )
    positions = [
        int(place)
        for batch in ingest.torch_batches(iterator, images_per_batch=8, rejected=rejected)
        for place in batch["position"]
    ]
    assert rejected == {rows[5]["image_id"]}
    missing = set(range(48)) - set(positions)
    assert len(positions) == 46 and len(missing & set(range(24))) == 1, "once in each of two epochs"
