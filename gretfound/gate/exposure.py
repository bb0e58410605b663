"""What a generator's denoiser gives away: its loss by photograph, and how strongly it answers to captions.

Noise and times are the same for every photograph, so that losses differ by the photograph alone.

Legend of tensor suffixes: N photographs, C latent channels, H rows, W columns, K captions, L tokens, D text width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gretfound.fundus import Photograph
from gretfound.generator import autoencoding, denoising, families, latents
from gretfound.generator.squares import as_tensor

Floats = npt.NDArray[np.float64]
_BATCH = 32
_TRAINING_TIMES = 1000


@torch.inference_mode()
def losses(
    pipeline: Any,
    squares: Sequence[Photograph],
    captions: Sequence[str],
    *,
    times: Sequence[int],
    num_noises: int,
    seed: int = 0,
) -> Floats:
    """Returns each photograph's loss, standardised at each time and noise over all photographs, then averaged.

    Source: the loss-based attack on diffusion models (Matsumoto et al. 2023, arXiv:2302.03262, section III), at several
    times with fixed noise.

    Args:
        pipeline: The fine-tuned generator; it is not changed.
        squares: Of the generator's side, each.
        captions: What each was, or would have been, trained with.
        times: Of 1,000.
        num_noises: At each time.
        seed: Of the noises.

    Returns:
        (N,), lower for what the generator knows.
    """
    encoded = [
        autoencoding.encode_photographs(pipeline.vae, as_tensor(squares[first : first + _BATCH]))
        for first in range(0, len(squares), _BATCH)
    ]
    latents_NCHW = torch.cat(encoded)
    distinct = sorted(set(captions))
    text_KLD = latents.embed_captions(pipeline, [*distinct, ""])
    number_N = torch.tensor([distinct.index(caption) for caption in captions])
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(latents_NCHW.shape[1:], generator=generator) for _ in range(num_noises)]
    objective, device = _objective(pipeline, text_KLD[-1])
    total_N = torch.zeros(len(squares), dtype=torch.float64)
    for time in times:
        step = time * objective.num_times // _TRAINING_TIMES
        for noise_CHW in noises:
            parts = []
            for latents_BCHW, number_B in zip(
                torch.split(latents_NCHW, _BATCH), torch.split(number_N, _BATCH), strict=True
            ):
                error_B = objective.errors(
                    latents_BCHW.to(device),
                    text_KLD[number_B].to(device),
                    torch.full((len(number_B),), step, device=device),
                    noise_CHW.to(device).expand_as(latents_BCHW),
                )
                parts.append(error_B.cpu())
            loss_N = torch.cat(parts).double()
            total_N += (loss_N - loss_N.mean()) / (loss_N.std() + 1e-12)
    mean_N: Floats = (total_N / (len(times) * num_noises)).numpy()
    return mean_N


@torch.inference_mode()
def caption_scores(pipeline: Any, captions: Sequence[str], *, num_noises: int, seed: int = 0) -> dict[str, float]:
    """Returns how much each caption changes what the denoiser makes of pure noise: the root mean square.

    Captions whose pictures are memorised pull harder than others.

    Source: Wen et al. 2024 (ICLR, "Detecting, explaining, and mitigating memorization in diffusion models"), eq. 4, at
    the first step.
    """
    text_KLD = latents.embed_captions(pipeline, [*captions, ""])
    objective, device = _objective(pipeline, text_KLD[-1])
    config = families.denoiser_of(pipeline).config
    generator = torch.Generator().manual_seed(seed)

    def predict(noise_CHW: Tensor, text_BLD: Tensor) -> Tensor:
        last_B = torch.full((len(text_BLD),), objective.num_times - 1, device=device)
        noise_BCHW = noise_CHW.to(device).expand(len(text_BLD), -1, -1, -1)
        return objective.predict(noise_BCHW, last_B, text_BLD.to(device)).cpu()

    total_K = torch.zeros(len(captions))
    for _ in range(num_noises):
        noise_CHW = torch.randn((config.in_channels, config.sample_size, config.sample_size), generator=generator)
        empty_CHW = predict(noise_CHW, text_KLD[-1:])[0]
        answers = [predict(noise_CHW, text) for text in torch.split(text_KLD[:-1], _BATCH)]
        total_K += (torch.cat(answers) - empty_CHW).square().mean(dim=(1, 2, 3)).sqrt()
    return dict(zip(captions, (total_K / num_noises).tolist(), strict=True))


def _objective(pipeline: Any, empty_LD: Tensor) -> tuple[denoising.DenoisingObjective, torch.device]:
    denoiser = families.denoiser_of(pipeline)
    objective = denoising.DenoisingObjective(
        denoiser=denoiser, scheduler=pipeline.scheduler, captions=denoising.EncodedCaptions(empty_LD)
    )
    return objective.to(denoiser.device), denoiser.device
