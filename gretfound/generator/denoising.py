"""The denoising objective of latent diffusion, on latents and captions that were encoded once.

Everything random in a step (time, noise, which captions are dropped) is a function of the seed and an image's position
in the run, so it depends neither on the batch size nor on the number of workers, and a resumed run repeats it.

Shapes: B images, C latent channels, H and W latent rows and columns, N captions, L tokens, D text width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gretfound.generator import families

GOLDEN_RATIO = 0.6180339887498949
_SEED_STRIDE = 1_000_003


class EncodedCaptions(nn.Module):
    """Captions that come as embeddings and stay as they are; here lies the empty one alone.

    Args:
        empty_LD: The empty caption's embedding.
    """

    def __init__(self, empty_LD: Tensor) -> None:
        super().__init__()
        self.empty_LD: Tensor
        self.register_buffer("empty_LD", empty_LD, persistent=False)

    def forward(self, caption_BLD: Tensor, is_dropped_B: Tensor) -> Tensor:
        """Returns the embeddings (B, L, D), the empty caption's where one is dropped."""
        return torch.where(is_dropped_B.view(-1, 1, 1), self.empty_LD.to(caption_BLD), caption_BLD)


class TrainableCaptions(nn.Module):
    """Captions that a text encoder embeds anew in every step, because it learns.

    Args:
        text_encoder: A CLIP text encoder.
        ids_NL: Token ids.
        empty: The number of the empty caption.
    """

    def __init__(self, text_encoder: nn.Module, ids_NL: Tensor, *, empty: int) -> None:
        super().__init__()
        self.text_encoder, self._empty = text_encoder, empty
        self.ids_NL: Tensor
        self.register_buffer("ids_NL", ids_NL, persistent=False)

    def forward(self, caption_B: Tensor, is_dropped_B: Tensor) -> Tensor:
        """Returns the embeddings (B, L, D) of captions by number, the empty caption's where one is dropped."""
        ids_BL = self.ids_NL[torch.where(is_dropped_B, self._empty, caption_B)]
        text_BLD: Tensor = self.text_encoder(ids_BL).last_hidden_state
        return text_BLD


class DenoisingObjective(nn.Module):
    """Mean squared error of a denoiser's prediction of the noise, the velocity or the flow in noised latents.

    Source: Ho et al. 2020, eq. 14; velocity: Salimans and Ho 2022, appendix D; flow: Esser et al. 2024 (Stable
    Diffusion 3), eq. 13 and 14, its times by the logit-normal law of section 3.1; weights: Hang et al. 2023 (min-SNR),
    eq. 8, which is min(SNR, gamma) times the squared error of the clean latents, so that flows have it too;
    dropped captions: Ho and Salimans 2022, algorithm 1; offset: N. Guttenberg 2023, "Diffusion with offset noise".

    Args:
        denoiser: Called as `families.predict` calls it.
        scheduler: Holds `alphas_cumprod` and whether noise (``epsilon``) or velocity (``v_prediction``) is predicted;
            or the `sigmas` of a flow.
        captions: `EncodedCaptions` or `TrainableCaptions`.
        caption_dropout: Share of images that see the empty caption, for classifier-free guidance.
        min_snr_gamma: Largest signal-to-noise ratio that weighs as such; None weighs all times alike.
        offset_noise: Deviation of a shift of each channel's noise as a whole; 0 is none.
        seed: Seeds times, noise and dropped captions.
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        scheduler: Any,
        captions: EncodedCaptions | TrainableCaptions,
        caption_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"found caption_dropout={caption_dropout}; required 0 to below 1")
        self.denoiser, self.captions = denoiser, captions
        self._prediction = "flow" if is_flow(scheduler) else str(scheduler.config.prediction_type)
        if self._prediction not in ("flow", "epsilon", "v_prediction"):
            raise ValueError(f"found a scheduler that predicts {self._prediction!r}; required epsilon or v_prediction")
        self._caption_dropout, self._min_snr_gamma = caption_dropout, min_snr_gamma
        self._offset_noise, self._seed = offset_noise, seed
        self.signal_T: Tensor
        self.noise_T: Tensor
        self.told_T: Tensor
        self.snr_T: Tensor
        self.share_T: Tensor
        if self._prediction == "flow":
            noise_T = type(scheduler).from_config(scheduler.config).sigmas.flip(0).float()  # set_timesteps changes them
            signal_T, told_T = 1 - noise_T, noise_T * scheduler.config.num_train_timesteps
            snr_T, share_T = (signal_T / noise_T).square(), 1 / noise_T.square()
        else:
            alphas_T = scheduler.alphas_cumprod.clone().float()
            signal_T, noise_T, told_T = alphas_T.sqrt(), (1 - alphas_T).sqrt(), torch.arange(len(alphas_T))
            snr_T = alphas_T / (1 - alphas_T)
            share_T = snr_T if self._prediction == "epsilon" else snr_T + 1
        # share_T is a prediction's squared error over that of the clean latents, of which min-SNR weights are.
        for name, values_T in (
            ("signal_T", signal_T), ("noise_T", noise_T), ("told_T", told_T), ("snr_T", snr_T), ("share_T", share_T),
        ):  # fmt: skip
            self.register_buffer(name, values_T, persistent=False)

    @property
    def num_times(self) -> int:
        """How many degrees of noise there are."""
        return len(self.told_T)

    def forward(self, latents_BCHW: Tensor, caption: Tensor, position_B: Tensor) -> Tensor:
        """Returns the loss.

        Args:
            latents_BCHW: Scaled clean latents.
            caption: Of each image, as ``captions`` reads it.
            position_B: Each image's position in the run, from 0.
        """
        share_B, kept_B, noise_BCHW = draw_noise(
            self._seed, position_B, latents_BCHW.shape[1:], offset=self._offset_noise
        )
        if self._prediction == "flow":
            share_B = torch.special.ndtri(share_B.double()).sigmoid()
        time_B = (share_B * self.num_times).long().clamp(max=self.num_times - 1).to(latents_BCHW.device)
        noise_BCHW = noise_BCHW.to(latents_BCHW)
        text_BLD = self.captions(caption, (kept_B < self._caption_dropout).to(caption.device))
        error_B = self.errors(latents_BCHW, text_BLD, time_B, noise_BCHW)
        if self._min_snr_gamma is not None:
            error_B = error_B * self.snr_T[time_B].clamp(max=self._min_snr_gamma) / self.share_T[time_B]
        loss: Tensor = error_B.mean()
        return loss

    def predict(self, noised_BCHW: Tensor, time_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Returns the denoiser's prediction for latents that are noised to the degree ``time_B``, as float32."""
        dtype = next(self.denoiser.parameters()).dtype
        return families.predict(self.denoiser, noised_BCHW.to(dtype), self.told_T[time_B], text_BLD.to(dtype)).float()

    def errors(self, latents_BCHW: Tensor, text_BLD: Tensor, time_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Returns each image's mean squared error at given degrees of noise, without weights, shape (B,).

        Args:
            latents_BCHW: Scaled clean latents.
            text_BLD: Embeddings of the captions.
            time_B: Degrees of noise, integers from 0 to below `num_times`.
            noise_BCHW: Standard normal.
        """
        signal_B111, noise_B111 = (each_T[time_B].view(-1, 1, 1, 1) for each_T in (self.signal_T, self.noise_T))
        noised_BCHW = signal_B111 * latents_BCHW + noise_B111 * noise_BCHW
        match self._prediction:
            case "epsilon":
                target_BCHW = noise_BCHW
            case "v_prediction":
                target_BCHW = signal_B111 * noise_BCHW - noise_B111 * latents_BCHW
            case _:
                target_BCHW = noise_BCHW - latents_BCHW
        predicted_BCHW = self.predict(noised_BCHW, time_B, text_BLD)
        error_B: Tensor = (predicted_BCHW - target_BCHW.float()).square().mean(dim=(1, 2, 3))
        return error_B


def is_flow(scheduler: Any) -> bool:
    """Tells whether a pipeline's scheduler follows a flow, and not a diffusion."""
    return not hasattr(scheduler, "alphas_cumprod")


def draw_noise(
    seed: int, position_B: Tensor, shape: tuple[int, ...], *, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws each image's randomness from the seed and its position alone; ``offset`` shifts the noise of each channel.

    Times are an additive recurrence, which covers [0, 1) more evenly than independent draws.

    Source: the low-discrepancy times of Kingma et al. 2021 (variational diffusion models), appendix I.1.

    Returns:
        Shares of the time axis in [0, 1), shape (B,); uniform draws in [0, 1), shape (B,); normal noise (B, *shape).
    """
    first = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    noise, uniform = [], []
    positions = position_B.tolist()
    for position in positions:
        generator = torch.Generator().manual_seed((seed * _SEED_STRIDE + position + 1) % 2**63)
        uniform.append(torch.rand((), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        if offset:
            noise[-1] += offset * torch.randn((shape[0], *(1,) * (len(shape) - 1)), generator=generator)
    share_B = torch.tensor([(first + position * GOLDEN_RATIO) % 1.0 for position in positions])
    return share_B, torch.stack(uniform), torch.stack(noise)
