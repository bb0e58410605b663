"""Spaces of features in which photographs are compared: a fixed one without learning, and those of networks in folders.

`scattering_space` and `thumbnail_space` need no file and no random number, so any reader can repeat them.
`encoder_space` is one of our own encoders; `timm_space` any network that timm reads from a local folder, such as an
Inception v3 with ImageNet weights. Nothing is downloaded.

Legend of tensor suffixes: B photographs, C channels, H rows, W columns, L orientations, D features.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from gretfound import fundus
from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import StorageError
from gretfound.evaluation.distances import Features
from gretfound.evaluation.fidelity import Space
from gretfound.fundus import Photograph

SIZE_PX = 128
THUMBNAIL_PX = 6
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


def thumbnail_space(photographs: Sequence[Photograph]) -> Features:
    """Returns each photograph's field of view at 6 x 6 px in RGB on -1 to 1, (B, 108): colour and light by place alone.

    A second opinion that shares nothing with `scattering_space`, for where there is no encoder.
    """
    cells = [fundus.to_square(image, fundus.find_field_of_view(image), THUMBNAIL_PX) for image in photographs]
    return np.stack(cells).reshape(len(cells), -1).astype(np.float32) / 127.5 - 1.0


def encoder_space(path: Path, *, device: str = "cpu") -> Space:
    """Returns the space of an encoder folder: the features that probes and releases see, preprocessed the same way.

    Args:
        path: As `gretfound.encoder.folder` writes it.
        device: Where it runs.

    Raises:
        StorageError: If the folder is not whole.
    """
    encoder, transform = folder.read_encoder_folder(path)
    encoder.to(device)
    return lambda photographs: folder.embed(encoder, transform.apply_batch(photographs))


def timm_space(path: Path, *, device: str = "cpu") -> Space:
    """Returns the space of a network in a folder that ``timm.create_model("local-dir:PATH")`` reads.

    A folder of timm's ``inception_v3`` with ImageNet weights gives 2,048 features. They are not those of the network
    that published FIDs use (a port of TensorFlow's, resized another way): compare figures within this space only.

    Args:
        path: Holds ``config.json`` and ``model.safetensors``.
        device: Where it runs.

    Raises:
        StorageError: If a file is absent or they do not fit each other.
    """
    for name in (folder.CONFIG_NAME, folder.WEIGHTS_NAME):
        if not (path / name).is_file():
            raise StorageError(f"found no {name} in the folder of a network; required timm's config and safetensors")
    try:
        network = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval().to(device)
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StorageError(f"timm could not read the folder of a network: {error}") from error
    settings = timm.data.resolve_model_data_config(network)
    transform = Transform(
        image_size_px=settings["input_size"][-1], mean=tuple(settings["mean"]), std=tuple(settings["std"])
    )

    @torch.inference_mode()
    def embedded(photographs: Sequence[Photograph]) -> Features:
        return cast(Features, network(transform.apply_batch(photographs).to(device)).float().cpu().numpy())

    return embedded


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
