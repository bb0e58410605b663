"""The denoising objective against diffusers' schedulers and closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from gretfound.generator.denoising import DenoisingObjective, EncodedCaptions, draw_noise


class _Recorder(nn.Module):
    """Predicts zero and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, noised: Tensor, time: Tensor, encoder_hidden_states: Tensor, **_: bool) -> tuple[Tensor]:
        self.noised, self.time, self.text = noised, time, encoder_hidden_states
        return (self.scale * noised,)


def _objective(prediction: str = "epsilon", **settings: float | None) -> DenoisingObjective:
    scheduler = DDPMScheduler(num_train_timesteps=50, prediction_type=prediction)
    captions = EncodedCaptions(torch.arange(3.0).view(3, 1, 1).expand(3, 2, 4).clone())
    return DenoisingObjective(unet=_Recorder(), scheduler=scheduler, captions=captions, seed=7, **settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoising__noises_and_aims_as_diffusers_does(prediction: str) -> None:
    objective = _objective(prediction, caption_dropout=0.0)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20, 25)
    loss = objective(latents, torch.tensor([0, 1, 0, 1, 0]), positions)
    _, _, noise = draw_noise(7, positions, (4, 8, 8))
    unet, scheduler = objective.unet, DDPMScheduler(num_train_timesteps=50)
    torch.testing.assert_close(unet.noised, scheduler.add_noise(latents, noise, unet.time))
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, unet.time)
    torch.testing.assert_close(loss, target.square().mean())
    assert unet.text[:, 0, 0].tolist() == [0, 1, 0, 1, 0]


def test_denoising__does_not_depend_on_the_batch_size() -> None:
    objective = _objective()
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions, positions = torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6)
    whole = objective(latents, captions, positions)
    halves = [objective(latents[half], captions[half], positions[half]) for half in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_denoising__drops_captions_at_the_rate_that_was_asked_for() -> None:
    objective = _objective(caption_dropout=0.25)
    positions = torch.arange(2000)
    objective(torch.zeros(2000, 1, 1, 1), torch.zeros(2000, dtype=torch.long), positions)
    dropped = float((objective.unet.text[:, 0, 0] == 2).float().mean())
    assert dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


def test_denoising__min_snr_weighs_as_the_paper_says() -> None:
    latents, positions = torch.zeros(1, 4, 8, 8), torch.tensor([3])
    plain, weighed = _objective(caption_dropout=0.0), _objective(caption_dropout=0.0, min_snr_gamma=5.0)
    loss, weighed_loss = (each(latents, torch.tensor([0]), positions) for each in (plain, weighed))
    alpha = DDPMScheduler(num_train_timesteps=50).alphas_cumprod[plain.unet.time]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weighed_loss, loss * (torch.minimum(snr, torch.tensor(5.0)) / snr).squeeze())


def test_draw_noise__times_cover_the_axis_evenly() -> None:
    share, uniform, noise = draw_noise(0, torch.arange(1000), (2, 2))
    counts = torch.histc(share, bins=10, min=0, max=1)
    assert counts.min() >= 98
    assert counts.max() <= 102
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(noise.std()) == pytest.approx(1, abs=0.04)
    assert torch.equal(noise[5], draw_noise(0, torch.tensor([5]), (2, 2))[2][0])
