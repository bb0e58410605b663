"""Ingest: an order that no worker and no restart changes, and photographs that arrive in it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from gretfound import corpus, ingest, shard, storage
from gretfound.encoder.crops import View
from gretfound.lineage import Corpus, ShardSet
from tests.hubs import assemble, draw_shard_set

VIEWS = {"image": View(size_px=32, scale=(0.2, 1.0))}


def manifest_of(*row_groups: dict[str, Any]) -> pa.Table:
    blank = {"shard_path": "x", "row_group": 0, "site_id": "a", "origin": "real", "weights": [1.0], "excluded": []}
    return pa.Table.from_pylist([blank | each for each in row_groups], corpus.MANIFEST_SCHEMA)


def draws_between(manifest: pa.Table, start: int, end: int, seed: int = 0) -> list[tuple[int, int]]:
    order = ingest.Order(manifest, seed=seed)
    drawn: list[tuple[int, int]] = []
    for window in order.windows(start, end):
        for offset, draw in enumerate(order.draws(window)):
            if start <= window.first_position + offset < end:
                drawn.append(draw)
    return drawn


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
        images_per_worker_step=step // num_workers,
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
    rejected: dict[int, str] = {}
    (iterator,) = ingest.stream(
        hub_uri,
        record,
        start=0,
        end=48,
        num_workers=1,
        images_per_worker_step=8,
        views=VIEWS,
        seed=0,
        data_cpus=1.0,
    )
    positions = [
        int(place)
        for batch in ingest.torch_batches(iterator, images_per_batch=8, rejected=rejected)
        for place in batch["position"]
    ]
    assert set(rejected.values()) == {rows[5]["image_id"]} and len(rejected) == 2, "once in each of two epochs"
    assert sorted(positions + list(rejected)) == list(range(48))
