"""The training loop: schedules, resuming, and ZeRO on two workers against plain PyTorch in one process."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gretfound import fit, storage
from gretfound.checkpoints import LocalCheckpoints
from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.mae import MaskedAutoencoder
from gretfound.errors import ConfigError, NonFiniteLoss

BATCH_SIZE, NUM_IMAGES = 8, 96


def autoencoder() -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", image_size_px=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    return MaskedAutoencoder(encoder, decoder_width=32, decoder_depth=1, decoder_num_heads=4)


def image_at(position: int) -> Tensor:
    generator = torch.Generator().manual_seed(position % 16)
    coarse = torch.rand(3, 4, 4, generator=generator)
    return (nn.functional.interpolate(coarse[None], size=32, mode="bilinear")[0] * 255).to(torch.uint8)


def batches_of(rank: int, num_workers: int, micro_batch: int) -> Callable[[int], Iterator[dict[str, Tensor]]]:
    """Deals positions as `gretfound.ingest.stream` does: of each step a stretch to each worker, in micro-batches."""
    share = BATCH_SIZE // num_workers

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        for first in range(start, NUM_IMAGES, BATCH_SIZE):
            for offset in range(rank * share, (rank + 1) * share, micro_batch):
                positions = [first + offset + place for place in range(micro_batch)]
                yield {
                    "image": torch.stack([image_at(each) for each in positions]),
                    "position": torch.tensor(positions),
                }

    return batches


SETTINGS: dict[str, Any] = {
    "num_images": NUM_IMAGES,
    "batch_size": BATCH_SIZE,
    "peak_lr": 3e-3,
    "warmup_images": 16,
    "clip_norm": 1.0,
    "progress_every_s": -1.0,
}


def plain_losses() -> list[float]:
    losses: list[float] = []
    fit.train(autoencoder(), batches_of(0, 1, 8), on_progress=lambda each: losses.append(each.loss), **SETTINGS)
    return losses


def test_train__is_what_a_loop_written_by_hand_does() -> None:
    objective = autoencoder()
    matrices = [each for each in objective.parameters() if each.requires_grad and each.ndim > 1]
    vectors = [each for each in objective.parameters() if each.requires_grad and each.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    expected = []
    for step, batch in enumerate(batches_of(0, 1, 8)(0)):
        seen = step * BATCH_SIZE
        rate = 3e-3 * seen / 16 if seen < 16 else 3e-3 * 0.5 * (1 + math.cos(math.pi * (seen - 16) / (NUM_IMAGES - 16)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = objective(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert plain_losses() == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < 0.98 * expected[0]


def test_train__accumulation_gives_the_same_losses() -> None:
    losses: list[float] = []
    fit.train(
        autoencoder(),
        batches_of(0, 1, 2),
        accumulation=4,
        on_progress=lambda each: losses.append(each.loss),
        **SETTINGS,
    )
    assert losses == pytest.approx(plain_losses(), rel=1e-4)


class Interrupted(Exception):
    """Stands for a killed process."""


def test_train__resumed_equals_undisturbed(tmp_path: Path) -> None:
    undisturbed = fit.train(autoencoder(), batches_of(0, 1, 8), **SETTINGS)

    def interrupt_at(images_seen: int) -> Callable[[fit.Progress], None]:
        def stop(progress: fit.Progress) -> None:
            if progress.images_seen == images_seen:
                raise Interrupted

        return stop

    stops = sorted(np.random.default_rng(0).choice(np.arange(8, NUM_IMAGES, 8), size=10, replace=False).tolist())
    for stop_at in stops:  # ten kills at random; each attempt gets past the one before
        with pytest.raises(Interrupted):
            fit.train(
                autoencoder(),
                batches_of(0, 1, 8),
                checkpoints=LocalCheckpoints(tmp_path),
                checkpoint_every_images=8,
                on_progress=interrupt_at(stop_at),
                **SETTINGS,
            )
    resumed = fit.train(autoencoder(), batches_of(0, 1, 8), checkpoints=LocalCheckpoints(tmp_path), **SETTINGS)
    assert resumed.final_loss == undisturbed.final_loss
    assert resumed.weights.keys() == undisturbed.weights.keys()
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, undisturbed.weights[name]), name
    assert len(list(tmp_path.iterdir())) == 1, "older checkpoints are removed"


class Diverging(nn.Module):
    """An objective whose loss becomes infinite at the fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor, position: Tensor) -> Tensor:
        return self.weight.sum() * (torch.inf if position.max() >= 24 else 1.0)


def test_train__non_finite_loss_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="images_000000000000016"):
        fit.train(
            Diverging(),
            batches_of(0, 1, 8),
            checkpoints=LocalCheckpoints(tmp_path),
            checkpoint_every_images=16,
            **SETTINGS,
        )


def test_train__a_stream_that_ends_early_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ended after 0 images"):
        fit.train(autoencoder(), lambda start: iter(()), **SETTINGS)


def test_train__bfloat16_follows_float32() -> None:
    losses: list[float] = []
    fit.train(
        autoencoder(),
        batches_of(0, 1, 8),
        precision="bfloat16",
        on_progress=lambda each: losses.append(each.loss),
        **SETTINGS,
    )
    assert losses == pytest.approx(plain_losses(), rel=0.03)


class AttentionTypes(TorchDispatchMode):
    """Writes down in which type attention is computed, recomputed and differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "attention" in str(func):
            self.found.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_train__attention_of_bfloat16_on_a_cpu_is_float32_also_when_recomputed() -> None:
    with AttentionTypes() as types:
        fit.train(autoencoder(), batches_of(0, 1, 8), precision="bfloat16", recomputes_activations=True, **SETTINGS)
    assert set(types.found) == {torch.float32}
    assert len(types.found) >= 3 * SETTINGS["num_images"] / SETTINGS["batch_size"]


class Watched(nn.Module):
    """An objective with every optional part of the protocol; its loss is the image's number."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        self.image_losses = torch.zeros(0)
        self.steps: list[int] = []

    def forward(self, position: Tensor) -> Tensor:
        self.image_losses = position.float()
        return self.image_losses.mean() + 0 * (self.slow.sum() + self.fast.sum())

    def after_step(self, images_seen: int) -> None:
        self.steps.append(images_seen)

    def learning_rate_scale(self, name: str) -> float:
        return {"slow": 0.5, "fast": 1.0}[name]


def test_train__protocol_of_an_objective() -> None:
    objective, told, taken = Watched(), [], []
    fit.train(
        objective,
        lambda start: (
            {"position": torch.arange(first, first + 4), "group": torch.tensor([0, 0, 2, 2])}
            for first in range(start, 40, 4)
        ),
        num_images=40,
        batch_size=4,
        peak_lr=0.1,
        weight_decay=1.0,
        on_batch=lambda batch: taken.append(batch["group"].tolist()),
        on_progress=told.append,
        progress_every_s=-1.0,
    )
    assert objective.steps == list(range(4, 44, 4)) and taken == [[0, 0, 2, 2]] * 10
    assert told[1].loss_by_group == {0: 4.5, 2: 6.5} and told[1].flops_per_s > 0
    assert told[1].figures(["a", "b", "c"])["loss/c"] == 6.5
    # Without a gradient AdamW only decays: each step multiplies by one minus the rate, here half as fast.
    rates = [fit.learning_rate_at(seen, num_images=40, peak_lr=0.1, warmup_images=0) for seen in range(0, 40, 4)]
    assert float(objective.fast.detach().mean()) == pytest.approx(math.prod(1 - rate for rate in rates), rel=1e-5)
    assert float(objective.slow.detach().mean()) == pytest.approx(math.prod(1 - rate / 2 for rate in rates), rel=1e-5)


def test_train__weight_decay_follows_its_cosine() -> None:
    objective = Watched()
    fit.train(
        objective,
        lambda start: ({"position": torch.arange(4)} for _ in range(start, 40, 4)),
        num_images=40,
        batch_size=4,
        peak_lr=0.1,
        weight_decay=1.0,
        final_weight_decay=3.0,
    )
    expected = 1.0
    for seen in range(0, 40, 4):
        decay = 3.0 - 2.0 * 0.5 * (1 + math.cos(math.pi * seen / 40))
        expected *= 1 - decay * fit.learning_rate_at(seen, num_images=40, peak_lr=0.1, warmup_images=0)
    assert float(objective.fast.detach().mean()) == pytest.approx(expected, rel=1e-5)


def test_train__gradient_norm_is_told_and_activations_can_be_recomputed() -> None:
    told: list[list[fit.Progress]] = [[], []]
    for recomputes, points in zip((False, True), told, strict=True):
        fit.train(
            autoencoder(), batches_of(0, 1, 8), recomputes_activations=recomputes, on_progress=points.append, **SETTINGS
        )
    kept, recomputed = ([(each.loss, each.gradient_norm) for each in points] for points in told)
    np.testing.assert_allclose(recomputed, kept, rtol=1e-5)
    objective = autoencoder()
    objective(**next(batches_of(0, 1, 8)(0))).backward()
    squares = [each.grad.pow(2).sum() for each in objective.parameters() if each.grad is not None]
    assert kept[0][1] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-4)


def test_peak_lr_for__linear_and_square_root() -> None:
    assert fit.peak_lr_for(1792, base_lr=1.5e-4) == pytest.approx(1.05e-3)
    assert fit.peak_lr_for(4096, base_lr=2e-4, scaling="sqrt") == pytest.approx(4e-4)
    with pytest.raises(ValueError, match="linear or sqrt"):
        fit.peak_lr_for(1, base_lr=1.0, scaling="none")


def test_learning_rate_at__warms_up_and_decays() -> None:
    settings: dict[str, Any] = {"num_images": 1000, "peak_lr": 2.0, "warmup_images": 100, "final_lr": 0.5}
    rates = [fit.learning_rate_at(seen, **settings) for seen in (0, 50, 100, 550, 1000)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.25, 0.5])


def every_zero_stage(settings: dict[str, Any]) -> None:
    """Runs on each of two Ray Train workers: the same training under each ZeRO stage, losses into the run's folder."""
    rank = ray.train.get_context().get_world_rank()
    for stage in (0, 1, 2, 3):
        losses: list[float] = []
        summary = fit.train(
            autoencoder(),
            batches_of(rank, 2, 2),
            accumulation=2,
            zero_stage=stage,
            on_progress=lambda each, losses=losses: losses.append(each.loss),  # type: ignore[misc]
            **SETTINGS,
        )
        if rank == 0:
            storage.write_json(f"{settings['folder']}/{stage}.json", losses)
            torch.save(summary.weights, f"{settings['folder']}/{stage}.pt")


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares every weight but the biases of keys: they change no output, so that theirs is a gradient of rounding."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        rows = slice(0, len(weight) // 3) if name.endswith("attn.qkv.bias") else slice(None)
        torch.testing.assert_close(
            found[name][rows], weight[rows], rtol=1e-2, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.usefixtures("ray_cluster")
def test_run__zero_0_1_2_3_on_two_workers_equal_plain_pytorch(tmp_path: Path) -> None:
    fit.run(
        every_zero_stage,
        {"folder": str(tmp_path / "losses")},
        run_uri=str(tmp_path),
        name="zero",
        num_workers=2,
        cpus_per_worker=0.9,
        max_failures=0,
    )
    summary = fit.train(autoencoder(), batches_of(0, 1, 8), **SETTINGS)
    expected = plain_losses()
    for stage in (0, 1, 2, 3):
        losses = storage.read_json(str(tmp_path / "losses" / f"{stage}.json"))
        np.testing.assert_allclose(losses, expected, rtol=2e-4, err_msg=f"ZeRO stage {stage}")
        weights = torch.load(tmp_path / "losses" / f"{stage}.pt", weights_only=True)
        assert_same_weights(weights, summary.weights)


def diverge(settings: dict[str, Any]) -> None:
    """Runs on a Ray Train worker: says that it was started, then diverges."""
    with Path(settings["folder"], "started").open("a") as started:
        started.write("once\n")
    fit.train(Diverging(), batches_of(0, 1, 8), **SETTINGS)


@pytest.mark.usefixtures("ray_cluster")
def test_run__a_run_that_diverged_is_not_started_again(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="after 24 images"):
        fit.run(
            diverge,
            {"folder": str(tmp_path)},
            run_uri=str(tmp_path),
            name="diverged",
            cpus_per_worker=0.4,
            max_failures=3,
        )
    assert (tmp_path / "started").read_text() == "once\n"


@pytest.mark.usefixtures("ray_cluster")
def test_check_resources__refuses_what_the_cluster_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"required 400 for 100 worker"):
        fit.check_resources(num_workers=100, cpus_per_worker=4.0)
