"""The fixed space of features without learning: the wavelet scattering of a photograph; it needs torch alone.

Legend of tensor suffixes: B photographs, C channels, H rows, W columns, L orientations, D features.
"""

import functools
import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gretfound import fundus
from gretfound.evaluation.distances import Features
from gretfound.fundus import Photograph

SIZE_PX = 128
NUM_SCALES = 5
NUM_ORIENTATIONS = 6
NUM_CELLS = 3
CHANNELS = ("green", "red less green", "green less blue")
NUM_SCATTERING_FEATURES = len(CHANNELS) * (NUM_CELLS**2 + NUM_SCALES) + math.comb(NUM_SCALES, 2) * (
    NUM_ORIENTATIONS // 2 + 1
)
FLOOR = 1e-4  # a grey level in forty: where there is no detail at all, its logarithm stays finite
USUAL_DETAIL = 1e-2  # centres the logarithms, so that no feature outweighs the others in a kernel


def scattering_space(photographs: Sequence[Photograph]) -> Features:
    """Returns the wavelet scattering of photographs: colours by place, how much detail of each size, and its pattern.

    The field of view is brought to 128 px, so cameras' frames don't matter. Channels are green, red - green and
    green - blue, on 0 to 1. Per photograph, 82 numbers:

    - 27: each channel's mean in each cell of a 3 x 3 grid, on -1 to 1;
    - 15: for each channel and each of five scales (wavelengths of 2.7, 5.3, 11, 21 and 43 px) the natural logarithm of
      the mean modulus of the Morlet wavelet coefficients, over all places and six orientations, relative to 0.01;
    - 40: in green, for each pair of a finer and a coarser scale and each angle between their orientations (0, 30, 60
      and 90 degrees, either way), the logarithm of the mean modulus of the second-order coefficients relative to the
      first-order ones of the finer scale: how detail is arranged, which tells branching vessels from noise of equal
      spectrum.

    Averages over places and orientations leave out what differs between two eyes of equal condition; mirrored and, at
    multiples of 30 degrees, turned photographs get about the same details.

    Source: Bruna and Mallat 2013 (IEEE TPAMI 35:1872), sections 2 and 3.2 (normalised coefficients); averages over
    relative orientations as in Sifre and Mallat 2013 (CVPR). Wavelets as in Kymatio (Andreux et al. 2020, JMLR 21:60).

    Args:
        photographs: (H, W, 3) uint8 RGB of any sizes.

    Returns:
        (B, 82).
    """
    pixels = [fundus.to_square(image, fundus.find_field_of_view(image), SIZE_PX) for image in photographs]
    red_BHW, green_BHW, blue_BHW = (torch.from_numpy(np.stack(pixels)).float() / 255.0).unbind(dim=3)
    x_BCHW = torch.stack([green_BHW, red_BHW - green_BHW, green_BHW - blue_BHW], dim=1)
    cells_BC33 = torch.nn.functional.adaptive_avg_pool2d(x_BCHW, NUM_CELLS)
    parts = [cells_BC33.flatten(1)]
    spectrum_BCHW = torch.fft.fft2(x_BCHW)
    for scale in range(NUM_SCALES):
        modulus_BCLHW = _modulus(spectrum_BCHW, scale)
        first_BCL = modulus_BCLHW.mean(dim=(-2, -1))
        parts.append(torch.log((first_BCL.mean(dim=2) + FLOOR) / USUAL_DETAIL))
        green_BLHW = torch.fft.fft2(modulus_BCLHW[:, 0])
        for coarser in range(scale + 1, NUM_SCALES):
            second_BLL = _modulus(green_BLHW, coarser).mean(dim=(-2, -1))
            parts.append(torch.log(_by_angle(second_BLL + FLOOR) / (first_BCL[:, 0].mean(dim=1) + FLOOR)[:, None]))
    return cast(Features, torch.cat(parts, dim=1).numpy())


def _modulus(spectrum_BCHW: Tensor, scale: int) -> Tensor:
    """Returns the modulus of the wavelet coefficients, (B, C, L, h, w), on a grid as coarse as the scale allows."""
    size = min(spectrum_BCHW.shape[-1], SIZE_PX >> max(0, scale - 1))
    kept = torch.fft.fftfreq(size, 1.0 / size).long()
    cropped_BCHW = spectrum_BCHW[..., kept[:, None], kept]
    filters_LHW = torch.from_numpy(_wavelets(scale, size))
    share = (size / spectrum_BCHW.shape[-1]) ** 2
    coefficients_BCLHW = torch.fft.ifft2(cropped_BCHW[:, :, None] * filters_LHW)
    return cast(Tensor, coefficients_BCLHW.abs() * share)


def _by_angle(second_BLL: Tensor) -> Tensor:
    """Averages over pairs of orientations with the same angle between them: (B, L / 2 + 1)."""
    index = torch.arange(NUM_ORIENTATIONS)
    turn_LL = (index[:, None] - index) % NUM_ORIENTATIONS
    angle_LL = torch.minimum(turn_LL, NUM_ORIENTATIONS - turn_LL)
    return torch.stack([second_BLL[:, angle_LL == angle].mean(dim=1) for angle in range(NUM_ORIENTATIONS // 2 + 1)], 1)


@functools.cache
def _wavelets(scale: int, size: int) -> npt.NDArray[np.float32]:
    """Returns Morlet wavelets of one scale in the Fourier domain of a grid of 128 px cropped to ``size``: (L, h, w).

    A Gaussian (0.8 x 2^scale px wide, half as wide again along the wave's crests by the slant 4 / L) times a wave of
    3 / 4 pi / 2^scale radians a pixel, less the Gaussian that makes its mean 0; frequencies beyond a grid's are folded.
    """
    frequency = 2.0 * np.pi * np.fft.fftfreq(size, 1.0 / size) / SIZE_PX
    sigma, slant, centre = 0.8 * 2**scale, 4.0 / NUM_ORIENTATIONS, 0.75 * np.pi / 2**scale
    filters_LHW = np.zeros((NUM_ORIENTATIONS, size, size))
    for index in range(NUM_ORIENTATIONS):
        cos, sin = math.cos(math.pi * index / NUM_ORIENTATIONS), math.sin(math.pi * index / NUM_ORIENTATIONS)
        wave, envelope = np.zeros((size, size)), np.zeros((size, size))
        for fold_y in (-1, 0, 1):
            for fold_x in (-1, 0, 1):
                x = frequency[None, :] + 2.0 * np.pi * fold_x
                y = frequency[:, None] + 2.0 * np.pi * fold_y
                along, across = cos * x + sin * y, cos * y - sin * x
                wave += np.exp(-0.5 * sigma**2 * ((along - centre) ** 2 + (across / slant) ** 2))
                envelope += np.exp(-0.5 * sigma**2 * (along**2 + (across / slant) ** 2))
        filters_LHW[index] = wave - envelope * (wave[0, 0] / envelope[0, 0])
    return filters_LHW.astype(np.float32)
