"""Random crops for pretraining: photograph bytes in, augmented pixels out, as a pure function of a seed.

A JPEG is decoded at the smallest scale that still holds every crop at its full resolution, and crop and resize are one
operation, so no pixel is computed that no crop needs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gretfound import fundus
from gretfound.fundus import FieldOfView

# Legend of tensor suffixes: C colour channels, H rows, W columns.

CROP_ATTEMPTS = 10
ASPECT_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class View:
    """One kind of crop that an objective takes.

    Args:
        size_px: Side of the square crop.
        scale: Smallest and largest share of the field of view's square that it covers.
        number: Crops of this kind a photograph; None gives one without an axis of its own.
        colour: Strength of the colour jitter, greying and blur, 0 to 1.
    """

    size_px: int
    scale: tuple[float, float]
    number: int | None = None
    colour: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(number, 3, size_px, size_px), or (3, size_px, size_px) without a number; a view of no crops has one, too."""
        return (*([] if self.number is None else [self.number]), 3, self.size_px, self.size_px)


def draw_views(
    encoded: bytes,
    *,
    field_of_view: FieldOfView | None,
    views: Mapping[str, View],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Decodes a photograph once and takes random resized crops of its field of view, each flipped half of the time.

    Returns:
        For each view uint8 pixels of its `View.shape`.

    Raises:
        fundus.UnreadablePhotograph: If the bytes cannot be decoded.
    """
    height, width = fundus.encoded_size(encoded)
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if field_of_view is not None:
        left, right = _clipped(field_of_view.x_px, field_of_view.radius_px, width)
        top, bottom = _clipped(field_of_view.y_px, field_of_view.radius_px, height)
    drawn: list[tuple[str, tuple[float, float, float, float], bool]] = []
    for name, view in views.items():
        for _ in range(1 if view.number is None else view.number):
            x0, y0, x1, y1 = draw_crop(right - left, bottom - top, scale=view.scale, ratio=ASPECT_RATIO, rng=rng)
            drawn.append((name, (x0 + left, y0 + top, x1 + left, y1 + top), rng.random() < 0.5))
    smallest = min(min(x1 - x0, y1 - y0) / views[name].size_px for name, (x0, y0, x1, y1), _ in drawn)
    photograph, factor = fundus.decode_reduced(encoded, smallest)
    pixels_CHW = torch.from_numpy(photograph).permute(2, 0, 1)
    crops: dict[str, list[Tensor]] = {name: [] for name in views}
    for name, (x0, y0, x1, y1), is_flipped in drawn:
        columns = _whole(x0 / factor, x1 / factor, photograph.shape[1])
        rows = _whole(y0 / factor, y1 / factor, photograph.shape[0])
        crop = F.interpolate(
            pixels_CHW[None, :, rows, columns], size=(views[name].size_px,) * 2, mode="bicubic", antialias=True
        )[0]
        crops[name].append(_recoloured(crop.flip(-1) if is_flipped else crop, views[name].colour, rng))
    taken = {name: np.empty(view.shape, np.uint8) for name, view in views.items()}
    for name, of_view in crops.items():
        for place, crop in enumerate(of_view):
            taken[name][... if views[name].number is None else place] = crop
    return taken


def draw_crop(
    width: float, height: float, *, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draws a box of random area and aspect inside a rectangle.

    Source: RandomResizedCrop (Szegedy et al., 2015), as torchvision draws it.

    Args:
        width: Of the rectangle, in pixels.
        height: Of the rectangle, in pixels.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest aspect.
        rng: The source of chance.

    Returns:
        The box as left, top, right, bottom, in pixels.
    """
    log_ratio = np.log(ratio)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left = rng.uniform(0, width - crop_width)
            top = rng.uniform(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _recoloured(crop_CHW: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Jitters brightness, contrast, saturation and hue in 8 of 10 crops, greys 2 of 10, blurs half.

    Source: DINOv2's `DataAugmentationDINO` at strength 1, without solarising and with one chance of blur.
    """
    if not strength:
        return crop_CHW
    from torchvision.transforms.v2 import functional as adjust  # seconds to import, and of no use without colour

    if rng.random() < 0.8:
        brightness, contrast, saturation = (1 + strength * spread * rng.uniform(-1, 1) for spread in (0.4, 0.4, 0.2))
        crop_CHW = adjust.adjust_brightness(crop_CHW, brightness)
        crop_CHW = adjust.adjust_contrast(crop_CHW, contrast)
        crop_CHW = adjust.adjust_saturation(crop_CHW, saturation)
        crop_CHW = adjust.adjust_hue(crop_CHW, 0.1 * strength * rng.uniform(-1, 1))
    if rng.random() < 0.2 * strength:
        crop_CHW = adjust.rgb_to_grayscale(crop_CHW, num_output_channels=3)
    if rng.random() < 0.5 * strength:
        deviation_px = rng.uniform(0.1, 2.0) * crop_CHW.shape[-1] / 224
        crop_CHW = adjust.gaussian_blur(
            crop_CHW, kernel_size=[2 * math.ceil(2 * deviation_px) + 1] * 2, sigma=[deviation_px] * 2
        )
    return crop_CHW


def _whole(start: float, end: float, side_px: int) -> slice:
    """Rounds to whole pixels, as torchvision's own crops are: a twentieth of a percent of a photograph."""
    first = min(round(start), side_px - 1)
    return slice(first, max(first + 1, min(round(end), side_px)))


def _clipped(centre_px: float, radius_px: float, side_px: int) -> tuple[float, float]:
    return max(0.0, centre_px - radius_px), min(float(side_px), centre_px + radius_px)
