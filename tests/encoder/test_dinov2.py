"""Self-distillation against plain references written from the papers' equations, and on two workers against one."""

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing
from torch import Tensor, nn

from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.dinov2 import ENCODER_PREFIX, SelfDistillation, block_mask, koleo_loss, sinkhorn_knopp
from gretfound.encoder.mae import MaskedAutoencoder
from gretfound.encoder.transform import IMAGENET_MEAN, IMAGENET_STD

SIZES: dict[str, Any] = {"image_size_px": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
BATCH_SIZE = 8


def small(seed: int = 0, sizes: dict[str, Any] | None = None, **changes: Any) -> SelfDistillation:
    torch.manual_seed(seed)
    encoder = build_encoder("vit_tiny_patch16_224", **SIZES | (sizes or {}))
    settings: dict[str, Any] = {
        "num_images": 800,
        "prototypes": 40,
        "hidden": 32,
        "bottleneck": 16,
        "frozen_images": 0,
        "teacher_temperature_warmup_images": 400,
        "mask_seed": 3,
    }
    return SelfDistillation(encoder, **settings | changes)


def crops(first: int = 0, num: int = BATCH_SIZE, num_locals: int = 3) -> dict[str, Tensor]:
    """Crops that depend on their image's position alone."""
    image = {"global_crop": [], "local_crop": []}
    for place in range(first, first + num):
        generator = torch.Generator().manual_seed(place)
        base = torch.rand(3, 4, 4, generator=generator)
        for name, count, size in (("global_crop", 2, 32), ("local_crop", num_locals, 16)):
            noisy = base + 0.2 * torch.rand(count, 3, 4, 4, generator=generator)
            pixels = nn.functional.interpolate(noisy, size=size, mode="bilinear") / 1.2 * 255
            image[name].append(pixels.to(torch.uint8))
    return {name: torch.stack(each) for name, each in image.items()} | {"position": torch.arange(first, first + num)}


def disturb_teacher(objective: SelfDistillation) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in objective.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    objective.mask_token.data.normal_(generator=generator)


def timm_tokens(encoder: Any, sizes: dict[str, Any], image: Tensor) -> Tensor:
    """timm's own forward pass at any size."""
    timm_sizes = {name: value for name, value in sizes.items() if name != "image_size_px"}
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, global_pool="", dynamic_img_size=True,
        **timm_sizes,
    )  # fmt: skip
    return torch.func.functional_call(plain, dict(encoder.named_parameters()), (image,))


def plain_sinkhorn(score: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """SwAV, appendix A.1, in float64: Q is prototypes by images."""
    q = np.exp(score.astype(np.float64).T / temperature)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def reference_loss(objective: SelfDistillation, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every pair, every image and every patch on its own, as the papers write them.

    Nothing of the class is called but its weights, its schedules' values and its drawn masks.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    global_crop, local_crop = ((batch[name].float() / 255 - mean) / std for name in ("global_crop", "local_crop"))
    num_images, num_locals = local_crop.shape[:2]
    mask = objective.masks(batch["position"], grid_size=(4, 4))
    student, teacher = objective.student, objective.teacher
    temperature = 0.04 + 0.03 * 200 / 400

    def score(branch: Any, token: Tensor, is_patch: bool) -> Tensor:
        head = branch.patch_head if is_patch and branch.patch_head is not None else branch.class_head
        value = token
        for index in (0, 2, 4):
            value = value @ head.project[index].weight.T + head.project[index].bias
            value = 0.5 * value * (1 + torch.erf(value / math.sqrt(2))) if index < 4 else value
        prototype = head.prototypes / head.prototypes.norm(dim=1, keepdim=True)
        return prototype @ (value / value.norm())

    def masked_tokens(image: Tensor, hidden: Tensor) -> Tensor:
        encoder = student.encoder
        rows = []
        for index in range(16):
            top, left = index // 4 * 8, index % 4 * 8
            patch = image[:, top : top + 8, left : left + 8]
            embedded = (encoder.patch_embed.proj.weight * patch).sum((1, 2, 3)) + encoder.patch_embed.proj.bias
            rows.append(objective.mask_token[0, 0] if hidden[index] else embedded)
        token = torch.cat([encoder.cls_token[0], torch.stack(rows)]) + encoder.pos_embed[0]
        for block in encoder.blocks:
            token = block(token[None])[0]
        return encoder.norm(token)

    with torch.no_grad():
        teacher_tokens = [timm_tokens(teacher.encoder, SIZES, global_crop[:, crop]) for crop in (0, 1)]
        class_scores = torch.stack([score(teacher, t[i, 0], False) for t in teacher_tokens for i in range(num_images)])
        class_target = torch.from_numpy(plain_sinkhorn(class_scores.numpy(), temperature)).view(2, num_images, -1)
        hidden_places = [
            (crop, i, patch)
            for crop in (0, 1)
            for i in range(num_images)
            for patch in range(16)
            if mask[i, crop, patch]
        ]
        patch_scores = torch.stack([score(teacher, teacher_tokens[c][i, 1 + p], True) for c, i, p in hidden_places])
        patch_target = torch.from_numpy(plain_sinkhorn(patch_scores.numpy(), temperature))

    def cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
        return -(target * torch.log_softmax(scores.double() / 0.1, dim=0)).sum()

    student_tokens = [
        torch.stack([masked_tokens(global_crop[i, crop], mask[i, crop]) for i in range(num_images)]) for crop in (0, 1)
    ]
    local_tokens = [timm_tokens(student.encoder, SIZES, local_crop[:, crop]) for crop in range(num_locals)]
    global_pairs, local_pairs, koleo = [], [], []
    for i in range(num_images):
        for theirs in (0, 1):
            global_pairs.append(
                cross_entropy(class_target[theirs, i], score(student, student_tokens[1 - theirs][i, 0], False))
            )
            local_pairs += [
                cross_entropy(class_target[theirs, i], score(student, local_tokens[crop][i, 0], False))
                for crop in range(num_locals)
            ]
    for tokens in student_tokens:
        unit = tokens[:, 0] / tokens[:, 0].norm(dim=1, keepdim=True)
        distance = [[(unit[i] - unit[j]).norm() for j in range(num_images) if j != i] for i in range(num_images)]
        koleo.append(-torch.stack([torch.stack(each).min().log() for each in distance]).mean())
    ibot = torch.zeros((), dtype=torch.float64)
    for index, (crop, i, patch) in enumerate(hidden_places):
        found = cross_entropy(patch_target[index], score(student, student_tokens[crop][i, 1 + patch], True))
        ibot = ibot + found / mask[i, crop].sum() / (2 * num_images)
    figures = {
        "dino_global": torch.stack(global_pairs).mean(),
        "dino_local": torch.stack(local_pairs).mean(),
        "ibot": ibot,
        "koleo": torch.stack(koleo).mean().double(),
    }
    dino = torch.stack(global_pairs + local_pairs).mean()
    return figures | {"loss": dino + ibot + 0.1 * torch.stack(koleo).sum()}


@pytest.mark.parametrize("shared_head", [True, False])
def test_forward__same_losses_and_gradients_as_the_papers(shared_head: bool) -> None:
    objective, batch = small(shared_head=shared_head), crops(num=4)
    disturb_teacher(objective)
    objective.images_seen.fill_(200)
    loss = objective(**batch)
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in objective.named_parameters() if each.grad is not None}
    assert gradients.keys() == {name for name, each in objective.named_parameters() if each.requires_grad}
    objective.zero_grad()
    expected = reference_loss(objective, batch)
    expected["loss"].backward()
    torch.testing.assert_close(loss.double(), expected["loss"], rtol=1e-5, atol=1e-5)
    for name in ("dino_global", "dino_local", "ibot", "koleo"):
        torch.testing.assert_close(
            objective.last_figures[name].double(), expected[name].detach(), rtol=1e-4, atol=1e-5, msg=name
        )
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("sizes", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}], ids=str)
@pytest.mark.parametrize("size_px", [32, 16, 40])
def test_branch__encodes_as_timm_does_at_any_size(sizes: dict[str, Any], size_px: int) -> None:
    objective = small(sizes=sizes)
    image = torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        objective.student(image),
        timm_tokens(objective.student.encoder, SIZES | sizes, image),
        rtol=1e-4,
        atol=1e-5,
    )


def test_branch__patches_are_counted_after_every_prefix_token() -> None:
    branch = small(sizes={"reg_tokens": 2}).student
    token = torch.arange(2 * 19, dtype=torch.float32).view(2, 19, 1)  # class, two registers, 16 patches
    assert branch.patches(token, torch.tensor([0, 15, 16])).flatten().tolist() == [3, 18, 22]


def test_forward__a_masked_patch_cannot_be_seen_by_the_student() -> None:
    objective, image = small(), torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = image.clone()
    changed[:, :, 8:16, 8:16] += 1.0
    masked = [objective.student(each, mask, objective.mask_token) for each in (image, changed)]
    torch.testing.assert_close(masked[0], masked[1])
    assert not torch.allclose(objective.student(image), objective.student(changed))


@pytest.mark.parametrize("shared_head", [True, False])
def test_forward__only_masked_patches_go_through_a_head(shared_head: bool) -> None:
    objective, batch = small(shared_head=shared_head), crops()
    num_masked = int(objective.masks(batch["position"], grid_size=(4, 4)).sum())
    assert 0 < num_masked < 2 * BATCH_SIZE * 16 // 2
    rows: dict[str, int] = {}
    for branch in ("student", "teacher"):
        for name, head in getattr(objective, branch).named_children():
            if name != "encoder" and head is not None:
                head.register_forward_pre_hook(
                    lambda _, inputs, key=f"{branch}.{name}": rows.__setitem__(key, len(inputs[0]))
                )
    objective(**batch)
    num_class = {"student": 5 * BATCH_SIZE, "teacher": 2 * BATCH_SIZE}
    if shared_head:
        assert rows == {f"{name}.class_head": num + num_masked for name, num in num_class.items()}
    else:
        assert rows == {f"{name}.class_head": num for name, num in num_class.items()} | {
            f"{name}.patch_head": num_masked for name in num_class
        }


def test_forward__without_local_crops_or_masks_is_the_global_loss() -> None:
    objective = small(mask_probability=0.0, koleo_weight=0.0)
    loss = objective(**crops(num_locals=0))
    torch.testing.assert_close(loss, objective.last_figures["dino_global"])
    assert objective.last_figures["ibot"] == 0 and objective.last_figures["dino_local"] == 0
    loss.backward()
    assert objective.mask_token.grad is not None, "ZeRO needs a gradient of every parameter on every worker"


def test_forward__bfloat16_follows_float32() -> None:
    objective, batch = small(), crops()
    disturb_teacher(objective)
    expected = objective(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(**batch)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_init__teacher_starts_as_the_student_and_is_what_is_released() -> None:
    objective = small()
    weights = dict(objective.named_parameters())
    assert objective.encoder is objective.teacher.encoder
    for name, weight in objective.encoder.state_dict().items():
        assert torch.equal(weight, weights[ENCODER_PREFIX + name])
        assert torch.equal(weight, weights[f"student.encoder.{name}"])
        assert not weights[ENCODER_PREFIX + name].requires_grad
    objective.train()
    assert objective.student.training and not objective.teacher.training


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "class token"),
        ({"pos_embed": "none"}, "position embedding"),
        ({"final_norm": False}, "final norm"),
    ],
)
def test_init__refuses_an_encoder_it_cannot_train(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfDistillation(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, **sizes), num_images=1)


def test_sinkhorn_knopp__equals_the_float64_reference() -> None:
    score = torch.rand(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    found = sinkhorn_knopp(score, temperature=0.05, iterations=3)
    np.testing.assert_allclose(found.numpy(), plain_sinkhorn(score.numpy(), 0.05), rtol=1e-10)
    single = sinkhorn_knopp(score.float(), temperature=0.05, iterations=3)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), found.numpy(), rtol=1e-4, atol=1e-7)


def test_sinkhorn_knopp__rows_sum_to_one_and_prototypes_are_used_equally() -> None:
    score = torch.rand(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    target = sinkhorn_knopp(score, temperature=0.2, iterations=100)
    torch.testing.assert_close(target.sum(1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(target.sum(0), torch.full((6,), 5.0, dtype=torch.float64))
    three = sinkhorn_knopp(score, temperature=0.2, iterations=3)
    torch.testing.assert_close(three.sum(1), torch.ones(30, dtype=torch.float64))
    spread = three.sum(0).std()
    assert spread < 0.5 * sinkhorn_knopp(score, temperature=0.2, iterations=0).sum(0).std()


def test_sinkhorn_knopp__large_scores_and_no_rows() -> None:
    assert torch.isfinite(sinkhorn_knopp(torch.full((3, 4), 500.0), temperature=0.04, iterations=3)).all()
    assert sinkhorn_knopp(torch.zeros(0, 4), temperature=0.04, iterations=3).shape == (0, 4)


def test_koleo_loss__equals_brute_force() -> None:
    feature = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    unit = (feature / feature.norm(dim=1, keepdim=True)).double().numpy()
    nearest = [min(np.linalg.norm(unit[i] - unit[j]) for j in range(9) if j != i) for i in range(9)]
    assert float(koleo_loss(feature)) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-5)


def test_koleo_loss__finite_for_equal_images_and_for_one() -> None:
    feature = torch.ones(3, 5, requires_grad=True)
    loss = koleo_loss(feature)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(feature.grad).all()
    assert koleo_loss(torch.ones(1, 5)) == 0


def test_masks__follow_the_position_alone() -> None:
    objective = small()
    together = objective.masks(torch.tensor([5, 9, 2**40]), grid_size=(8, 8))
    apart = [objective.masks(torch.tensor([place]), grid_size=(8, 8)) for place in (5, 9, 2**40)]
    assert torch.equal(together, torch.cat(apart))
    other = small(mask_seed=4).masks(torch.arange(20), grid_size=(8, 8))
    assert not torch.equal(other, objective.masks(torch.arange(20), grid_size=(8, 8)))


def test_masks__half_of_the_crops_at_a_tenth_to_a_half() -> None:
    mask = small().masks(torch.arange(500), grid_size=(16, 16)).flatten(0, 1)
    share = mask.float().mean(1)
    masked = share[share > 0]
    assert len(masked) == pytest.approx(500, abs=60), "3.8 standard deviations of a fair coin"
    assert masked.max() <= 0.5 and masked.min() >= 0.06
    assert masked.mean() == pytest.approx(0.3, abs=0.03)


def test_block_mask__hides_blocks_and_never_too_many() -> None:
    for seed in range(50):
        mask = block_mask((14, 14), 60, rng=np.random.default_rng(seed))
        assert 40 <= mask.sum() <= 60
        neighbours = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
        assert neighbours > 1.2 * mask.sum(), "scattered patches would share 0.6 borders each"
    assert not block_mask((14, 14), 0, rng=np.random.default_rng(0)).any()


def test_after_step__is_the_closed_form() -> None:
    objective = small(momentum=0.9, final_momentum=0.9)
    start = {name: each.detach().clone() for name, each in objective.teacher.named_parameters()}
    for parameter in objective.student.parameters():
        parameter.data += 1.0
    for step in range(10):
        objective.after_step(8 * (step + 1))
    assert int(objective.images_seen) == 80
    for name, parameter in objective.teacher.named_parameters():
        torch.testing.assert_close(parameter, start[name] + (1 - 0.9**10), rtol=1e-5, atol=1e-5)
    assert torch.equal(objective.mask_token, torch.zeros_like(objective.mask_token))


def test_schedules__momentum_and_temperature() -> None:
    objective = small()
    assert [objective.momentum_at(seen) for seen in (0, 400, 800, 900)] == pytest.approx([0.992, 0.996, 1.0, 1.0])
    assert [objective.teacher_temperature_at(seen) for seen in (0, 200, 400, 900)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )
    assert small(teacher_temperature_warmup_images=0).teacher_temperature_at(0) == 0.07


def test_forward__prototypes_are_frozen_at_first() -> None:
    objective, batch = small(frozen_images=16, shared_head=False), crops()
    losses, gradients = [], []
    for images_seen in (8, 16):
        objective.images_seen.fill_(images_seen)
        objective.zero_grad()
        loss = objective(**batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([objective.student.class_head.prototypes.grad, objective.student.patch_head.prototypes.grad])
    assert all(each.abs().max() == 0 for each in gradients[0])
    assert all(each.abs().max() > 0 for each in gradients[1])
    assert objective.student.class_head.project[0].weight.grad.abs().max() > 0
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)  # the temperature moved on by eight images


def test_learning_rate_scale__decays_by_layer() -> None:
    objective = small(sizes={"depth": 3}, shared_head=False)
    expected = {
        "student.encoder.patch_embed.proj.weight": 0.9**4 * 0.2,
        "student.encoder.cls_token": 0.9**4,
        "student.encoder.pos_embed": 0.9**4,
        "mask_token": 0.9**4,
        "student.encoder.blocks.0.attn.qkv.weight": 0.9**3,
        "student.encoder.blocks.2.mlp.fc2.bias": 0.9,
        "student.encoder.norm.weight": 1.0,
        "student.class_head.project.0.weight": 1.0,
        "student.patch_head.prototypes": 1.0,
    }
    assert expected.keys() <= dict(objective.named_parameters()).keys()
    for name, scale in expected.items():
        assert objective.learning_rate_scale(name) == pytest.approx(scale), name
    even = small(layer_decay=1.0, patch_embed_lr_scale=1.0)
    assert {even.learning_rate_scale(name) for name, _ in even.named_parameters()} == {1.0}


def optimise(objective: SelfDistillation, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[float]:
    for step in steps:
        loss = objective(**crops(step * BATCH_SIZE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step((step + 1) * BATCH_SIZE)
        yield float(loss.detach())


def optimizer_of(objective: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for each in objective.parameters() if each.requires_grad], lr=1e-3, weight_decay=0.1)


def test_state_dict__resumed_equals_undisturbed(tmp_path: Path) -> None:
    objective = small(frozen_images=16)
    optimizer = optimizer_of(objective)
    list(optimise(objective, optimizer, range(3)))
    torch.save({"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    undisturbed = list(optimise(objective, optimizer, range(3, 6)))

    resumed = small(seed=1, frozen_images=16)
    resumed_optimizer = optimizer_of(resumed)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["objective"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert int(resumed.images_seen) == 24
    assert list(optimise(resumed, resumed_optimizer, range(3, 6))) == undisturbed
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, dict(objective.named_parameters())[name]), name


def test_init__frozen_positions_of_another_objective_stay_frozen() -> None:
    encoder = MaskedAutoencoder(build_encoder("vit_tiny_patch16_224", **SIZES), decoder_depth=1).encoder
    objective = SelfDistillation(encoder, num_images=8, prototypes=8, hidden=8, bottleneck=8)
    objective(**crops(num=2)).backward()
    assert encoder.pos_embed.grad is None


# ---- Two workers ----


def on_two_workers(rank: int, folder: str) -> None:
    """Runs in each of two processes: Sinkhorn-Knopp, then the same training under each ZeRO stage."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    scores, cuts = sinkhorn_scores()
    found: dict[str, Any] = {}
    for cut in cuts:
        part = scores[:cut] if rank == 0 else scores[cut:]
        found[f"sinkhorn {cut}"] = sinkhorn_knopp(part, temperature=0.05, iterations=3)
    import deepspeed
    import deepspeed.ops

    # Gloo needs none of DeepSpeed's own kernels, which would be compiled for a minute.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    for stage in (0, 1, 2, 3):
        found[f"stage {stage}"] = zero_run(deepspeed, stage, rank, f"{folder}/checkpoint{stage}")
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def zero_run(deepspeed: Any, stage: int, rank: int, folder: str) -> dict[str, Any]:
    """Trains for four steps; again with a restart after the second; returns losses and the teacher's weights."""

    def start() -> Any:
        objective = small(koleo_weight=0.0, frozen_images=16, shared_head=stage % 2 == 0, momentum=0.9)
        settings = {
            "train_micro_batch_size_per_gpu": BATCH_SIZE // 2,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
            # Only some parameters are below this size, so both kinds of partition are seen.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 500},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        }
        trainable = [each for each in objective.parameters() if each.requires_grad]
        return deepspeed.initialize(model=objective, model_parameters=trainable, config=settings)[0]

    def steps(engine: Any, numbers: range) -> list[float]:
        losses = []
        for step in numbers:
            loss = engine(**crops(step * BATCH_SIZE + rank * BATCH_SIZE // 2, BATCH_SIZE // 2))
            engine.backward(loss)
            engine.step()
            engine.module.after_step((step + 1) * BATCH_SIZE)
            value = loss.detach().float().clone()
            torch.distributed.all_reduce(value)
            losses.append(float(value) / 2)
        return losses

    def teacher(engine: Any) -> dict[str, Tensor]:
        parameters = dict(engine.module.teacher.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
            return {name: each.detach().float().clone() for name, each in parameters.items()}

    engine = start()
    losses = steps(engine, range(2))
    engine.save_checkpoint(folder, tag="state")
    losses += steps(engine, range(2, 4))
    found = {"losses": losses, "teacher": teacher(engine)}
    if stage < 2:  # as without DeepSpeed: the state is `state_dict()`
        return found
    resumed = start()
    resumed.load_checkpoint(folder)
    return found | {"resumed_losses": steps(resumed, range(2, 4)), "resumed_teacher": teacher(resumed)}


def sinkhorn_scores() -> tuple[Tensor, tuple[int, ...]]:
    return torch.rand(11, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64), (5, 11)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(on_two_workers, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_sinkhorn_knopp__two_workers_equal_one(two_workers: list[dict[str, Any]]) -> None:
    scores, cuts = sinkhorn_scores()
    expected = sinkhorn_knopp(scores, temperature=0.05, iterations=3)
    for cut in cuts:
        parts = [each[f"sinkhorn {cut}"] for each in two_workers]
        assert [len(part) for part in parts] == [cut, 11 - cut], "one worker may have no masked patch"
        torch.testing.assert_close(torch.cat(parts), expected)


@functools.cache
def plain_run(shared_head: bool) -> tuple[list[float], dict[str, Tensor]]:
    objective = small(koleo_weight=0.0, frozen_images=16, shared_head=shared_head, momentum=0.9)
    losses = list(optimise(objective, optimizer_of(objective), range(4)))
    return losses, {name: each.detach() for name, each in objective.teacher.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_train__zero_on_two_workers_equals_plain_pytorch(two_workers: list[dict[str, Any]], stage: int) -> None:
    losses, weights = plain_run(stage % 2 == 0)
    for found in (each[f"stage {stage}"] for each in two_workers):
        assert found["losses"] == pytest.approx(losses, rel=2e-4)
        if stage >= 2:
            assert found["resumed_losses"] == pytest.approx(found["losses"][2:], rel=1e-6)
        for name, weight in weights.items():
            # A key's bias has no effect and so a gradient of rounding errors, which Adam brings to full size.
            rows = slice(0, 48) if name.endswith("attn.qkv.bias") else slice(None)
            torch.testing.assert_close(found["teacher"][name][rows], weight[rows], rtol=1e-3, atol=2e-5, msg=name)
            if stage >= 2:
                torch.testing.assert_close(found["resumed_teacher"][name], found["teacher"][name], msg=name)
