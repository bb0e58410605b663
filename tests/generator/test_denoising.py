"""The denoising objective against diffusers' schedulers and closed forms."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from gretfound.generator.denoising import DenoisingObjective, EncodedCaptions, TrainableCaptions, draw_noise


def _text(*values: int) -> Tensor:
    """Returns embeddings (B, 2, 4) that hold one value each; the empty caption's holds 2."""
    return torch.tensor(values).float().view(-1, 1, 1).expand(-1, 2, 4)


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
    captions = EncodedCaptions(torch.full((2, 4), 2.0))
    return DenoisingObjective(denoiser=_Recorder(), scheduler=scheduler, captions=captions, seed=7, **settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoising__noises_and_aims_as_diffusers_does(prediction: str) -> None:
    objective = _objective(prediction, caption_dropout=0.0)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20, 25)
    loss = objective(latents, _text(0, 1, 0, 1, 0), positions)
    _, _, noise = draw_noise(7, positions, (4, 8, 8))
    unet, scheduler = objective.denoiser, DDPMScheduler(num_train_timesteps=50)
    torch.testing.assert_close(unet.noised, scheduler.add_noise(latents, noise, unet.time))
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, unet.time)
    torch.testing.assert_close(loss, target.square().mean())
    assert unet.text[:, 0, 0].tolist() == [0, 1, 0, 1, 0]


def test_denoising__does_not_depend_on_the_batch_size() -> None:
    objective = _objective()
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions, positions = _text(0, 1, 0, 1, 0, 1), torch.arange(6)
    whole = objective(latents, captions, positions)
    halves = [objective(latents[half], captions[half], positions[half]) for half in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_denoising__drops_captions_at_the_rate_that_was_asked_for() -> None:
    objective = _objective(caption_dropout=0.25)
    positions = torch.arange(2000)
    objective(torch.zeros(2000, 1, 1, 1), _text(0).expand(2000, -1, -1), positions)
    dropped = float((objective.denoiser.text[:, 0, 0] == 2).float().mean())
    assert dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


def test_denoising__min_snr_weighs_as_the_paper_says() -> None:
    latents, positions = torch.zeros(1, 4, 8, 8), torch.tensor([3])
    plain, weighed = _objective(caption_dropout=0.0), _objective(caption_dropout=0.0, min_snr_gamma=5.0)
    loss, weighed_loss = (each(latents, _text(0), positions) for each in (plain, weighed))
    alpha = DDPMScheduler(num_train_timesteps=50).alphas_cumprod[plain.denoiser.time]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weighed_loss, loss * (torch.minimum(snr, torch.tensor(5.0)) / snr).squeeze())


def test_draw_noise__an_offset_shifts_whole_channels() -> None:
    positions = torch.arange(500)
    times, uniform, plain = draw_noise(3, positions, (2, 4, 4))
    same_times, same_uniform, shifted = draw_noise(3, positions, (2, 4, 4), offset=0.5)
    assert torch.equal(times, same_times) and torch.equal(uniform, same_uniform)
    shift = shifted - plain
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert shift[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


def test_draw_noise__times_cover_the_axis_evenly() -> None:
    share, uniform, noise = draw_noise(0, torch.arange(1000), (2, 2))
    counts = torch.histc(share, bins=10, min=0, max=1)
    assert counts.min() >= 98
    assert counts.max() <= 102
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(noise.std()) == pytest.approx(1, abs=0.04)
    assert torch.equal(noise[5], draw_noise(0, torch.tensor([5]), (2, 2))[2][0])


def test_trainable_captions__drop_to_the_empty_one() -> None:
    ids = torch.tensor([[5, 6], [7, 8], [0, 1]])
    captions = TrainableCaptions(_Embedder(), ids, empty=1)
    text = captions(torch.tensor([0, 2, 2]), torch.tensor([False, True, False]))
    assert text[..., 0].tolist() == [[5, 6], [7, 8], [0, 1]]


class _Embedder(nn.Module):
    """Embeds a token as its own number."""

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=ids.unsqueeze(-1))
