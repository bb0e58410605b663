"""Planted copies: photographs that an eye must find again, so that "no copy found" means something.

They are made by other code than the eyes learn from. A *copy* is what a generator that repeats a photograph draws:
another brightness, a shift, a turn, a JPEG's loss, a crop, maybe mirrored. A *second visit* is another photograph of
the same eye; where the site has none, one is imitated by larger changes of several kinds at once.
"""

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from gretfound.fundus import Photograph

KINDS = ("brightness", "shift", "rotation", "jpeg", "crop")


def plant_copy(square: Photograph, *, kind: str, seed: int) -> Photograph:
    """Returns a perturbed copy of a photograph; every second seed mirrors it.

    Args:
        square: (S, S, 3).
        kind: One of `KINDS`.
        seed: Of the size and direction of the change.

    Raises:
        ValueError: If there is no such kind.
    """
    random = np.random.default_rng([seed, 1])
    image = Image.fromarray(square)
    if seed % 2:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = image.width
    sign = random.choice([-1.0, 1.0])
    match kind:
        case "brightness":
            image = ImageEnhance.Brightness(image).enhance(1 + sign * random.uniform(0.1, 0.25))
        case "shift":
            x, y = random.uniform(0.01, 0.04, 2) * side * random.choice([-1.0, 1.0], 2)
            image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR)
        case "rotation":
            image = image.rotate(sign * random.uniform(2, 7), Image.Resampling.BILINEAR)
        case "jpeg":
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=50)
            image = Image.open(stream)
        case "crop":
            left, top = random.uniform(0.0, 0.06, 2) * side
            kept = side * random.uniform(0.92, 0.94)
            image = image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + kept, top + kept))
        case _:
            raise ValueError(f"found the kind {kind!r}; required one of {', '.join(KINDS)}")
    return np.array(image.convert("RGB"))


def imitate_visit(square: Photograph, *, seed: int) -> Photograph:
    """Returns about what a second photograph of the same eye looks like: turned, moved, nearer, in other light."""
    random = np.random.default_rng([seed, 2])
    image = Image.fromarray(square)
    side = image.width
    angle = random.uniform(-6, 6)
    kept = side / random.uniform(1.0, 1.06)
    middle = (side - kept) / 2
    x, y = middle + random.uniform(-0.04, 0.04, 2) * side
    image = image.rotate(angle, Image.Resampling.BICUBIC)
    image = image.transform(image.size, Image.Transform.EXTENT, (x, y, x + kept, y + kept), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.006) * side))
    levels = np.asarray(image, np.float32) / 255.0
    levels = levels ** random.uniform(0.85, 1.18) * random.uniform(0.9, 1.1, 3)
    line = np.linspace(-1, 1, side, dtype=np.float32)
    levels *= (1 + random.uniform(-0.12, 0.12) * line[:, None] + random.uniform(-0.12, 0.12) * line)[..., None]
    levels += random.normal(0, 0.01, levels.shape)
    return (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)
