"""How well a generator knows given photographs: the error of its denoiser on them, at fixed times and noise.

Shapes: N photographs, C latent channels, H and W latent rows and columns.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gretfound import fundus, storage
from gretfound.generator import denoising, families, finetune, latents, pipeline
from gretfound.generator.squares import Square

# A thousandth of the noising each; where membership shows most, by trust.md, section 3 (G4).
TIMES_PER_MILLE = (50, 100, 200, 300, 400)
NOISES_PER_TIME = 4
Floats = npt.NDArray[np.float64]


def gains(
    base_path: Path,
    adapter_path: Path,
    photographs: Iterable[fundus.Photograph],
    *,
    caption: str,
    seed: int = 0,
    device: str = "cpu",
) -> Floats:
    """Measures how much better an adapter makes its base know each photograph.

    What is hard or easy about a photograph by itself is in both errors and drops out of their difference.

    Source: Watson et al. 2022, "On the importance of difficulty calibration in membership inference attacks"
    (arXiv:2111.08440), eq. 2; the denoiser's error as the score: Carlini et al. 2023 (arXiv:2301.13188), section 5.

    Args:
        base_path: A trusted diffusers folder.
        adapter_path: An adapter of it whose tensors were checked.
        photographs: Squares of any size; they are resized to the base's own.
        caption: What all of them are captioned with.
        seed: Of the noise.
        device: ``cpu`` or ``cuda``.

    Returns:
        The base's error less the adapted one's, shape (N,); higher is known better.

    Raises:
        ContributionRejected: If the adapter does not fit the base.
        LineageError: If it was trained from another.
    """
    squares = [Square(pixels=pixels, caption=caption, mirrored_caption=caption) for pixels in photographs]
    before = _errors(base_path, None, squares, seed=seed, device=device)
    return before - _errors(base_path, adapter_path, squares, seed=seed, device=device)


@torch.inference_mode()
def _errors(base_path: Path, adapter_path: Path | None, squares: list[Square], *, seed: int, device: str) -> Floats:
    generator = pipeline.load_pipeline(base_path, adapter_path=adapter_path, device=device)
    with storage.scratch_folder() as folder:
        named = zip(
            map(str, range(len(squares))), finetune.resized(squares, families.native_px(generator)), strict=True
        )
        latents.encode_squares(named, Path(folder) / "cache", base=generator)
        encoded = latents.lay_out([Path(folder) / "cache"], Path(folder) / "rows")
        row_N = latents.NUM_VIEWS * torch.arange(len(squares))
        latents_NCHW = encoded.latents[row_N].to(device)
        text_NLD = encoded.text[encoded.caption_numbers[row_N, 0]].to(device)
        captions = denoising.EncodedCaptions(encoded.empty_text)
    objective = denoising.DenoisingObjective(
        denoiser=families.denoiser_of(generator), scheduler=generator.scheduler, captions=captions
    ).to(device)
    total_N = torch.zeros(len(squares), dtype=torch.float64)
    for time, noise_CHW in _trials(objective.num_times, latents_NCHW.shape[1:], seed=seed):
        errors = [
            objective.errors(
                latents_BCHW,
                text_BLD,
                torch.full((len(latents_BCHW),), time, device=device),
                noise_CHW.to(device).expand_as(latents_BCHW),
            )
            for latents_BCHW, text_BLD in zip(
                torch.split(latents_NCHW, latents.ENCODE_BATCH),
                torch.split(text_NLD, latents.ENCODE_BATCH),
                strict=True,
            )
        ]
        total_N += torch.cat(errors).double().cpu()
    means: Floats = (total_N / (len(TIMES_PER_MILLE) * NOISES_PER_TIME)).numpy()
    return means


def _trials(num_times: int, shape: torch.Size, *, seed: int) -> Iterator[tuple[int, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    for per_mille, _ in itertools.product(TIMES_PER_MILLE, range(NOISES_PER_TIME)):
        yield num_times * per_mille // 1000, torch.randn(shape, generator=random)
