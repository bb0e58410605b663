"""The consistency objective against diffusers' schedulers, and the property that it is named for."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch import Tensor, nn

from gretfound.generator.consistency import ConsistencyObjective, few_step_scheduler, frozen_copy
from gretfound.generator.denoising import draw_noise

POSITIONS = torch.arange(6)


class _Linear(nn.Module):
    """Predicts a multiple of what it is shown, more with a caption."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, noised: Tensor, time: Tensor, encoder_hidden_states: Tensor, **_: bool) -> tuple[Tensor]:
        share = (1 + time.view(-1, 1, 1, 1) / 1000) * (1 + encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1))
        return (self.factor * share * noised,)


def _objective(prediction: str, student: nn.Module, teacher: nn.Module, guidance_scale: float) -> ConsistencyObjective:
    return ConsistencyObjective(
        denoiser=student, teacher=teacher, scheduler=DDPMScheduler(prediction_type=prediction),
        empty_LD=torch.zeros(2, 4), guidance_scale=guidance_scale, seed=7,
    )  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_consistency__is_the_distance_that_diffusers_schedulers_give(prediction: str) -> None:
    student, teacher = _Linear(0.3), _Linear(0.2)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.rand(6, 2, 4, generator=torch.Generator().manual_seed(1))
    loss = _objective(prediction, student, teacher, 3.0)(latents, text, POSITIONS)
    ddim = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    ddim.set_timesteps(50)
    lcm = LCMScheduler(
        prediction_type=prediction, clip_sample=False, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    lcm.set_timesteps(50)
    shares, _, noise = draw_noise(7, POSITIONS, (4, 8, 8))
    expected = []
    for row, share in enumerate(shares.tolist()):
        start = torch.tensor([int(share * 50) * 20 + 19])
        end = (start - 20).clamp(min=0)
        here = slice(row, row + 1)
        noised = ddim.add_noise(latents[here], noise[here], start)
        guided, free = teacher(noised, start, text[here])[0], teacher(noised, start, text[here] * 0)[0]
        # DDIM's own stride leads from `start` to `start - 20`; its last step would end before time 0.
        ddim.final_alpha_cumprod = ddim.alphas_cumprod[0]
        moved = ddim.step(free + 3.0 * (guided - free), int(start), noised).prev_sample
        landings = []
        for time, place in ((start, noised), (end, moved)):
            lcm._step_index = None
            if int(time) == 0:
                landings.append(place)
                continue
            # `denoised` of a step is where the student lands.
            landings.append(lcm.step(student(place, time, text[here])[0], int(time), place).denoised)
        expected.append(((landings[0] - landings[1]).square() + 1e-6).sqrt().mean() - 1e-3)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_consistency__the_teacher_is_neither_trained_nor_saved() -> None:
    student = _Linear(0.3)
    objective = _objective("epsilon", student, frozen_copy(student), 2.0)
    objective(torch.ones(6, 4, 8, 8), torch.ones(6, 2, 4), POSITIONS).backward()
    assert list(objective.state_dict()) == ["denoiser.factor"]
    assert student.factor.grad is not None
    assert objective._teacher[0].factor.grad is None
    with pytest.raises(ValueError, match="guidance_scale=0"):
        _objective("epsilon", student, student, 0.5)


def test_consistency__a_perfect_student_loses_nothing() -> None:
    # All latents are 0: the exact velocity of a point is sqrt(1 - a)'s share of it, which leads every point to 0.
    alphas = DDPMScheduler().alphas_cumprod

    class _Exact(nn.Module):
        def forward(self, noised: Tensor, time: Tensor, encoder_hidden_states: Tensor, **_: bool) -> tuple[Tensor]:
            return (noised * (alphas[time] / (1 - alphas[time])).sqrt().view(-1, 1, 1, 1),)

    objective = _objective("v_prediction", _Exact(), _Exact(), 1.0)
    shares, _, _ = draw_noise(7, torch.arange(12), (1,))
    # At time 0 a student lands where it is, which is a hundredth of the noise away.
    positions = torch.arange(12)[shares > 1 / 50][:6]
    loss = objective(torch.zeros(6, 4, 8, 8), torch.zeros(6, 2, 4), positions)
    assert float(loss) == pytest.approx(0.0, abs=1e-4)


def test_few_step_scheduler__keeps_the_teachers_noise() -> None:
    teacher = DDPMScheduler(beta_schedule="linear", beta_end=0.02, prediction_type="v_prediction")
    scheduler = few_step_scheduler(teacher)
    assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
