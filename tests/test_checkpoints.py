"""Checkpoints on a cluster: kills, damage and other numbers of workers change nothing that is learned."""

import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from torch import Tensor

from gretfound import fit, ingest, shard, storage
from gretfound.checkpoints import RayCheckpoints
from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.crops import View
from gretfound.encoder.dinov2 import SelfDistillation
from gretfound.lineage import Corpus
from tests.hubs import assemble, draw_shard_set
from tests.test_fit import assert_same_weights, autoencoder

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
    batches = functools.partial(
        ingest.worker_batches,
        settings["hub_uri"],
        storage.read_record(settings["hub_uri"], settings["corpus_id"], Corpus),
        end=NUM_IMAGES,
        batch_size=BATCH_SIZE,
        views=VIEWS,
        seed=1,
        data_cpus=0.5,
    )

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
    if ray.train.get_context().get_world_rank() == 0:
        torch.save(summary.weights, f"{settings['run_uri']}/weights.pt")


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
    assert_same_weights(torch.load(f"{run.uri}/weights.pt", weights_only=True), weights)


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
    assert [each.name[:22] for each in kept] == ["images_000000000000024", "images_000000000000036"]
    largest = max(kept[-1].rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ray.train.TrainingFailedError):
        run.attempt(1, num_workers=1, dies_at=54)
    assert min(run.positions_by_attempt()[1]) == 24, "the older one is whole"
    kept = sorted(Path(storage.local_path(fit.train_uri(run.uri, "kills")) or "").glob("images_*"))
    assert [each.name[:22] for each in kept] == ["images_000000000000036", "images_000000000000048"], "36 anew"
    for path in [path for folder in kept for path in folder.rglob("*.pt")]:
        path.unlink()
    with pytest.raises(ray.train.WorkerGroupError) as caught:
        run.attempt(2, num_workers=1, dies_at=0)
    causes = [str(cause) for cause in caught.value.worker_failures.values()]
    assert any("none of this run's 2 checkpoints is whole" in cause for cause in causes)


def teach(settings: dict[str, Any]) -> None:
    """Runs on each worker: self-distils as far as it is asked, from what there is, and keeps the weights."""
    context = ray.train.get_context()
    share = 8 // context.get_world_size()

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(context.get_world_rank())
        for first in range(start, 16, 8):
            yield {
                "global_crop": torch.randint(0, 256, (share, 2, 3, 32, 32), dtype=torch.uint8, generator=generator),
                "local_crop": torch.zeros(share, 0, 3, 16, 16, dtype=torch.uint8),
                "position": first + context.get_world_rank() * share + torch.arange(share),
            }

    torch.manual_seed(settings["seed"])
    encoder = build_encoder("vit_tiny_patch16_224", image_size_px=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    objective = SelfDistillation(
        encoder, num_images=64, prototypes=32, hidden=32, bottleneck=16, momentum=0.5, frozen_images=0
    )
    summary = fit.train(
        objective,
        batches,
        num_images=16,
        batch_size=8,
        peak_lr=1e-2,
        zero_stage=settings["zero_stage"],
        checkpoints=RayCheckpoints(fit.train_uri(settings["run_uri"], "teacher")),
    )
    if context.get_world_rank() == 0:
        torch.save(summary.weights, f"{settings['run_uri']}/{context.get_world_size()}.pt")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "zero_stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_restore__the_teacher_survives_another_number_of_workers(tmp_path: Path, zero_stage: int) -> None:
    run_uri = str(tmp_path)
    for num_workers in (2, 1):  # the second run has nothing left to learn: it ends with what it has restored
        settings = {"run_uri": run_uri, "zero_stage": zero_stage, "seed": num_workers}
        fit.run(
            teach,
            settings,
            run_uri=run_uri,
            name="teacher",
            num_workers=num_workers,
            cpus_per_worker=0.4,
            max_failures=0,
        )
    saved, restored = (torch.load(tmp_path / f"{num_workers}.pt", weights_only=True) for num_workers in (2, 1))
    assert saved.keys() == restored.keys() and int(restored["images_seen"]) == 16
    for name, weight in saved.items():
        torch.testing.assert_close(restored[name], weight, rtol=0, atol=0, msg=name)
