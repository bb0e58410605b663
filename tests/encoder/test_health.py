"""Signs of collapse: provoked collapses are named, a healthy run is not, and the effective rank is RankMe's."""

import math

import pytest
import torch
from torch import Tensor, nn

from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.dinov2 import SelfDistillation
from gretfound.encoder.health import collapse, rank_me, referable_probe

NUM_PROTOTYPES, BATCH_SIZE = 64, 16


def crops(first: int) -> dict[str, Tensor]:
    """Two global and two local crops of each of 64 smooth pictures that recur."""
    global_crop, local_crop = [], []
    for place in range(first, first + BATCH_SIZE):
        picture = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(place % 64))
        picture = nn.functional.interpolate(picture, size=48, mode="bilinear")
        chance = torch.Generator().manual_seed(1000 + place)
        for found, sides, size in ((global_crop, (32, 48), 32), (local_crop, (12, 24), 16)):
            for _ in range(2):
                side = int(torch.randint(*sides, (), generator=chance))
                top, left = torch.randint(0, 49 - side, (2,), generator=chance).tolist()
                cut = picture[:, :, top : top + side, left : left + side]
                found.append(nn.functional.interpolate(cut, size=size, mode="bilinear")[0] * 255)
    return {
        "global_crop": torch.stack(global_crop).to(torch.uint8).unflatten(0, (BATCH_SIZE, 2)),
        "local_crop": torch.stack(local_crop).to(torch.uint8).unflatten(0, (BATCH_SIZE, 2)),
        "position": torch.arange(first, first + BATCH_SIZE),
    }


def trained(*, lr: float, num_steps: int = 30, **changes: float) -> SelfDistillation:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", image_size_px=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    settings = {"hidden": 64, "bottleneck": 32, "frozen_images": 0, "teacher_temperature_warmup_images": 0} | changes
    objective = SelfDistillation(encoder, num_images=960, prototypes=NUM_PROTOTYPES, **settings)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([each for each in objective.parameters() if each.requires_grad], lr=lr)
    for step in range(num_steps):
        loss = objective(**crops(step * BATCH_SIZE))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
        optimizer.step()
        objective.after_step((step + 1) * BATCH_SIZE)
    return objective


def diagnosis(objective: SelfDistillation) -> str | None:
    rank = rank_me(objective.features)
    return collapse(objective.last_figures, num_prototypes=NUM_PROTOTYPES, embedding_rank=rank)


UNSTABLE = {"sinkhorn_iterations": 0, "momentum": 0.0, "final_momentum": 0.0, "koleo_weight": 0.0}


def test_collapse__a_healthy_run_is_not_accused() -> None:
    objective = trained(lr=1e-3)
    assert diagnosis(objective) is None
    assert rank_me(objective.features) > 4


def test_collapse__sharp_targets_without_centring_end_in_one_prototype() -> None:
    objective = trained(lr=1e-2, **UNSTABLE)
    assert objective.last_figures["dino_global"] < 0.2, "the loss looks excellent"
    assert "collapse to one prototype" in str(diagnosis(objective))


def test_collapse__flat_targets_without_centring_end_uniform() -> None:
    objective = trained(lr=1e-2, teacher_temperature=1.0, final_teacher_temperature=1.0, **UNSTABLE)
    assert "collapse to uniform" in str(diagnosis(objective))


@pytest.mark.parametrize(
    ("entropy", "usage", "rank", "named"),
    [
        (0.001, 0.002, 20.0, "one prototype"),
        (math.log(64) - 0.001, math.log(64), 20.0, "uniform"),
        (2.0, 2.001, 20.0, "constant"),
        (2.0, 3.0, 1.05, "dimensions"),
        (2.0, 3.0, 20.0, None),
        (0.01, 4.0, 20.0, None),  # sure of each image and different between images: what training is for
        (2.0, 3.0, None, None),
    ],
)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_collapse__names_the_kind(
    name: str, entropy: float, usage: float, rank: float | None, named: str | None
) -> None:
    figures = {f"{each}_{kind}": value for each in ("student", "teacher") for kind, value in
               (("entropy", 2.0), ("usage_entropy", 3.0))}  # fmt: skip
    figures |= {f"{name}_entropy": entropy, f"{name}_usage_entropy": usage}
    found = collapse(figures, num_prototypes=64, embedding_rank=rank)
    assert (named is None and found is None) or (named is not None and named in str(found))
    assert found is None or named == "dimensions" or name in found


def test_rank_me__is_the_papers_formula() -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    eigenvalue = torch.linalg.eigvalsh(features.double().T @ features.double()).sqrt()
    share = eigenvalue / eigenvalue.sum()
    assert rank_me(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.tolist())), rel=1e-6)


def test_rank_me__closed_forms() -> None:
    assert rank_me(torch.eye(6)) == pytest.approx(6.0)
    assert rank_me(torch.ones(5, 3)) == pytest.approx(1.0, abs=1e-5)
    assert rank_me(torch.zeros(5, 3)) == 1.0
    assert rank_me(torch.eye(6)[[0, 1, 0, 1]] * 7) == pytest.approx(2.0)


@pytest.mark.parametrize("features", [torch.ones(4), torch.zeros(0, 3), torch.tensor([[1.0, math.nan]])], ids=str)
def test_rank_me__refuses_what_is_no_matrix_of_numbers(features: Tensor) -> None:
    with pytest.raises(ValueError, match="required finite ones"):
        rank_me(features)


def test_referable_probe__knows_neighbours_and_never_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (300,), generator=generator)
    told_apart = torch.randn(300, 8, generator=generator)
    told_apart[:, 0] += 6.0 * (label >= 2)
    key = torch.arange(300)
    assert (referable_probe(told_apart, label, key) or 0) > 0.95
    noise = torch.randn(150, 8, generator=generator).repeat(2, 1)  # two draws of each photograph
    twice = label[:150].repeat(2)
    assert abs((referable_probe(noise, twice, key[:150].repeat(2)) or 0) - 0.5) < 0.12
    assert (referable_probe(noise, twice, key) or 0) > 0.9, "that is what the keys are for"
    assert referable_probe(noise, torch.full((300,), -1), key) is None
    assert referable_probe(noise, torch.zeros(300), key) is None
