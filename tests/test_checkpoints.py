"""Checkpoints on a cluster: kills, damage and other numbers of workers change nothing that is learned."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import ray.train.collective
import torch
from torch import Tensor

from gretfound import fit, ingest, shard, storage
from gretfound.checkpoints import RayCheckpoints
from gretfound.encoder.crops import View
from gretfound.lineage import Corpus
from tests.hubs import assemble, draw_shard_set
from tests.test_fit import autoencoder

VIEWS = {"image": View(size_px=32, scale=(0.2, 1.0))}
NUM_IMAGES, BATCH_SIZE = 96, 6  # two epochs of 48 photographs
SETTINGS: dict[str, Any] = {
    "num_images": NUM_IMAGES,
    "batch_size": BATCH_SIZE,
    "peak_lr": 3e-3,
    "warmup_images": 16,
    "clip_norm": 1.0,
    "checkpoint_every_images": 12,
    "progress_every_s": -1.0,
}


def train_and_record(settings: dict[str, Any]) -> None:
    """Streams a corpus into ZeRO; notes each step's photographs and loss; dies where it is told to."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    record = storage.read_record(settings["hub_uri"], settings["corpus_id"], Corpus)

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        iterators = None
        if rank == 0:
            iterators = ingest.stream(
                settings["hub_uri"],
                record,
                start=start,
                end=NUM_IMAGES,
                num_workers=num_workers,
                batch_size=BATCH_SIZE,
                views=VIEWS,
                seed=1,
                data_cpus=0.5,
            )
        iterator = ray.train.collective.broadcast_from_rank_zero(iterators)[rank]
        yield from ingest.torch_batches(iterator, images_per_batch=BATCH_SIZE // num_workers)

    def note(batch: dict[str, Tensor]) -> None:
        positions = batch["position"].tolist()
        storage.write_json(f"{settings['notes']}/{min(positions):04d}-{settings['attempt']}.json", positions)

    def die(progress: fit.Progress) -> None:
        storage.write_json(f"{settings['losses']}/{progress.images_seen:04d}.json", progress.loss)
        if progress.images_seen == settings["dies_at"]:
            os._exit(1)

    summary = fit.train(
        autoencoder(),
        batches,
        zero_stage=settings["zero_stage"],
        checkpoints=RayCheckpoints(fit.train_uri(settings["run_uri"], "kills")),
        on_batch=note,
        on_progress=die,
        **SETTINGS,
    )
    if rank == 0:
        norms = {name: float(weight.norm()) for name, weight in summary.weights.items()}
        storage.write_json(f"{settings['run_uri']}/norms.json", norms)


class Run:
    """One corpus, one run, attempts with any number of workers."""

    def __init__(self, root: Path, *, zero_stage: int) -> None:
        hub_uri = storage.normalised(str(root / "hub"))
        shard_sets = [draw_shard_set(hub_uri, name, num_images=24) for name in ("aster", "birch")]
        self.image_ids = [
            row["image_id"]
            for shard_set in shard_sets
            for part in shard_set.shards
            for row in shard.read_rows(storage.join(hub_uri, part.path), ["image_id"])
        ]
        self.uri = str(root / "run")
        self.settings: dict[str, Any] = {
            "hub_uri": hub_uri,
            "corpus_id": assemble(hub_uri, *shard_sets).id,
            "run_uri": self.uri,
            "notes": str(root / "notes"),
            "losses": str(root / "losses"),
            "zero_stage": zero_stage,
        }

    def attempt(self, number: int, *, num_workers: int, dies_at: int) -> None:
        fit.run(
            train_and_record,
            self.settings | {"attempt": number, "dies_at": dies_at},
            run_uri=self.uri,
            name="kills",
            num_workers=num_workers,
            cpus_per_worker=0.4,
            data_cpus=0.5,
            max_failures=0,
        )

    def losses(self) -> list[float]:
        folder = Path(self.settings["losses"])
        return [storage.read_json(str(path)) for path in sorted(folder.iterdir())]

    def positions_by_attempt(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for path in sorted(Path(self.settings["notes"]).iterdir()):
            found.setdefault(int(path.stem.rpartition("-")[2]), []).extend(storage.read_json(str(path)))
        return found


@pytest.mark.usefixtures("ray_cluster")
def test_restore__two_workers_then_one_then_three_see_every_image_once_an_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path, zero_stage=1)
    for number, (num_workers, dies_at) in enumerate([(2, 30), (1, 66)]):
        with pytest.raises(ray.train.TrainingFailedError):
            run.attempt(number, num_workers=num_workers, dies_at=dies_at)
    run.attempt(2, num_workers=3, dies_at=0)
    seen = run.positions_by_attempt()
    assert [min(seen[number]) for number in (0, 1, 2)] == [0, 24, 60], "each goes on from its last checkpoint"
    kept = seen[2] + [place for place in seen[1] if place < 60] + [place for place in seen[0] if place < 24]
    assert Counter(kept) == Counter(range(NUM_IMAGES))
    order = ingest.plan_of(run.settings["hub_uri"], run.settings["corpus_id"], 1, BATCH_SIZE)[1]
    drawn = [draw for window in order.windows(0, NUM_IMAGES) for draw in order.draws(window)][:NUM_IMAGES]
    assert Counter(drawn[:48]) == Counter(drawn[48:]) and len(set(drawn)) == len(run.image_ids)

    losses, weights = plain_run(run)
    np.testing.assert_allclose(run.losses(), losses, rtol=2e-4)
    for name, norm in storage.read_json(f"{run.uri}/norms.json").items():
        assert norm == pytest.approx(float(weights[name].norm()), rel=1e-3), name


def plain_run(run: Run) -> tuple[list[float], dict[str, Tensor]]:
    """The same training undisturbed, in this process, without Ray and DeepSpeed."""
    manifest, order = ingest.plan_of(run.settings["hub_uri"], run.settings["corpus_id"], 1, BATCH_SIZE)

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        for window in order.windows(start, NUM_IMAGES):
            for block in ingest.read_window(
                run.settings["hub_uri"],
                manifest,
                order,
                window,
                start=start,
                end=NUM_IMAGES,
                views=VIEWS,
                seed=1,
                images_per_block=BATCH_SIZE,
            ):
                yield {name: torch.from_numpy(block[name]) for name in ("image", "position")}

    losses: list[float] = []
    settings = SETTINGS | {"checkpoint_every_images": 0}
    summary = fit.train(autoencoder(), batches, on_progress=lambda each: losses.append(each.loss), **settings)
    return losses, summary.weights


@pytest.mark.usefixtures("ray_cluster")
def test_restore__a_damaged_checkpoint_is_passed_over_and_none_left_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, zero_stage=0)
    with pytest.raises(ray.train.TrainingFailedError):
        run.attempt(0, num_workers=1, dies_at=42)
    kept = sorted(Path(storage.local_path(fit.train_uri(run.uri, "kills")) or "").glob("images_*"))
    assert [each.name for each in kept] == ["images_000000000000024", "images_000000000000036"]
    largest = max(kept[-1].rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ray.train.TrainingFailedError):
        run.attempt(1, num_workers=1, dies_at=30)
    assert min(run.positions_by_attempt()[1]) == 24, "the older one is whole"
    for path in kept[0].rglob("*.pt"):
        path.unlink()
    with pytest.raises(ray.train.WorkerGroupError) as caught:
        run.attempt(2, num_workers=1, dies_at=0)
    causes = [str(cause) for cause in caught.value.worker_failures.values()]
    assert any("none of this run's 2 checkpoints is whole" in cause for cause in causes)
