"""The denoising objective of latent diffusion, on latents and captions that were encoded once.

Everything random in a step (time, noise, which captions are dropped) is a function of the seed and an image's position
in the run, so it depends neither on the batch size nor on the number of workers, and a resumed run repeats it.

Shapes: B images, C latent channels, H and W latent rows and columns, N captions, L tokens, D text width.
"""

from typing import Any

import torch
from torch import Tensor, nn

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
    """Mean squared error of the UNet's prediction of the noise (or the velocity) in noised latents.

    Source: Ho et al. 2020, eq. 14; velocity: Salimans and Ho 2022, appendix D; weights: Hang et al. 2023 (min-SNR),
    eq. 8; dropped captions: Ho and Salimans 2022, algorithm 1.

    Args:
        unet: Denoiser; called as diffusers calls a `UNet2DConditionModel`.
        scheduler: Holds `alphas_cumprod` and whether noise (``epsilon``) or velocity (``v_prediction``) is predicted.
        captions: `EncodedCaptions` or `TrainableCaptions`.
        caption_dropout: Share of images that see the empty caption, for classifier-free guidance.
        min_snr_gamma: Largest signal-to-noise ratio that weighs as such; None weighs all times alike.
        seed: Seeds times, noise and dropped captions.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        scheduler: Any,
        captions: EncodedCaptions | TrainableCaptions,
        caption_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"found caption_dropout={caption_dropout}; required 0 to below 1")
        self.unet, self.captions = unet, captions
        self._prediction = str(scheduler.config.prediction_type)
        if self._prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"found a scheduler that predicts {self._prediction!r}; required epsilon or v_prediction")
        self._caption_dropout, self._min_snr_gamma, self._seed = caption_dropout, min_snr_gamma, seed
        self.alphas_T: Tensor
        self.register_buffer("alphas_T", scheduler.alphas_cumprod.clone().float(), persistent=False)

    def forward(self, latents_BCHW: Tensor, caption: Tensor, position_B: Tensor) -> Tensor:
        """Returns the loss.

        Args:
            latents_BCHW: Scaled clean latents.
            caption: Of each image, as ``captions`` reads it.
            position_B: Each image's position in the run, from 0.
        """
        share_B, kept_B, noise_BCHW = draw_noise(self._seed, position_B, latents_BCHW.shape[1:])
        num_times = len(self.alphas_T)
        time_B = (share_B * num_times).long().clamp(max=num_times - 1).to(latents_BCHW.device)
        noise_BCHW = noise_BCHW.to(latents_BCHW)
        text_BLD = self.captions(caption, (kept_B < self._caption_dropout).to(caption.device))
        error_B = self.errors(latents_BCHW, text_BLD, time_B, noise_BCHW)
        if self._min_snr_gamma is not None:
            alpha_B = self.alphas_T[time_B]
            snr_B = alpha_B / (1 - alpha_B)
            is_velocity = self._prediction == "v_prediction"
            error_B = error_B * snr_B.clamp(max=self._min_snr_gamma) / (snr_B + 1 if is_velocity else snr_B)
        loss: Tensor = error_B.mean()
        return loss

    def errors(self, latents_BCHW: Tensor, text_BLD: Tensor, time_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Returns each image's mean squared error at given times and noise, without weights, shape (B,).

        Args:
            latents_BCHW: Scaled clean latents.
            text_BLD: Embeddings of the captions.
            time_B: Steps of the scheduler, integers from 0.
            noise_BCHW: Standard normal.
        """
        alpha_B111 = self.alphas_T[time_B].view(-1, 1, 1, 1)
        noised_BCHW = alpha_B111.sqrt() * latents_BCHW + (1 - alpha_B111).sqrt() * noise_BCHW
        is_velocity = self._prediction == "v_prediction"
        target_BCHW = (
            alpha_B111.sqrt() * noise_BCHW - (1 - alpha_B111).sqrt() * latents_BCHW if is_velocity else noise_BCHW
        )
        dtype = next(self.unet.parameters()).dtype
        predicted_BCHW = self.unet(
            noised_BCHW.to(dtype), time_B, encoder_hidden_states=text_BLD.to(dtype), return_dict=False
        )[0]
        error_B: Tensor = (predicted_BCHW.float() - target_BCHW.float()).square().mean(dim=(1, 2, 3))
        return error_B


def draw_noise(seed: int, position_B: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Draws each image's randomness from the seed and its position alone.

    Times are an additive recurrence, which covers [0, 1) more evenly than independent draws.

    Source: the low-discrepancy times of Kingma et al. 2021 (variational diffusion models), appendix I.1.

    Returns:
        Shares of the time axis in [0, 1), shape (B,); uniform draws in [0, 1), shape (B,); normal noise (B, *shape).
    """
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    noise, uniform = [], []
    positions = position_B.tolist()
    for position in positions:
        generator = torch.Generator().manual_seed((seed * _SEED_STRIDE + position + 1) % 2**63)
        uniform.append(torch.rand((), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    share_B = torch.tensor([(offset + position * GOLDEN_RATIO) % 1.0 for position in positions])
    return share_B, torch.stack(uniform), torch.stack(noise)
