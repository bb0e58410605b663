"""Random crops for pretraining: photograph bytes in, augmented pixels out, as a pure function of a seed."""

import io
import math

import numpy as np
from PIL import Image

from gretfound.fundus import FieldOfView

CROP_ATTEMPTS = 10


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


def random_crop(
    encoded: bytes,
    *,
    field_of_view: FieldOfView | None,
    size_px: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Decodes a photograph and takes one random resized crop of its field of view, flipped half of the time.

    Crop and resize are one operation, so a photograph is never resampled twice.

    Returns:
        uint8 pixels of shape (3, size_px, size_px).

    Raises:
        OSError: If the bytes cannot be decoded.
    """
    with Image.open(io.BytesIO(encoded), formats=["JPEG", "PNG"]) as opened:
        photograph = opened.convert("RGB")
    left, top, right, bottom = 0.0, 0.0, float(photograph.width), float(photograph.height)
    if field_of_view is not None:
        left, right = _clipped(field_of_view.x_px, field_of_view.radius_px, photograph.width)
        top, bottom = _clipped(field_of_view.y_px, field_of_view.radius_px, photograph.height)
    box = draw_crop(right - left, bottom - top, scale=scale, ratio=(3 / 4, 4 / 3), rng=rng)
    box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
    crop = photograph.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    pixels = np.asarray(crop).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[:, :, ::-1] if rng.random() < 0.5 else pixels)


def _clipped(centre_px: float, radius_px: float, side_px: int) -> tuple[float, float]:
    return max(0.0, centre_px - radius_px), min(float(side_px), centre_px + radius_px)
