"""Inspection: what a drawn photograph must be before it becomes a row of a shard; each rejection names its reason.

It looks at pixels alone: whether there is a field of view, whether that is sharp, shows structure and is lit, and
whether the same part holds it already. A site's released summary says nothing of these, so the limits are constants,
well beyond every real and drawn photograph that they were measured on (docs/log.md). Whether a photograph shows what
its caption says is for `gretfound.grading`; whether it copies a patient's is not for this room either. Near-duplicates
in other parts, of other sites and of real photographs are found where they meet, in a corpus (`gretfound.duplicates`).
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from gretfound import duplicates, fundus
from gretfound.fundus import FieldOfView, Photograph

# Half the spread of a dark photograph's grey levels; a collapsed sample has next to none.
MIN_SPREAD = 4.0
# About six tenths of the least that was measured on real and drawn photographs, or 1.6 times the most.
MIN_SHARPNESS, MAX_SHARPNESS = 1.3, 70.0
MIN_CONTRAST = 0.025
MIN_BRIGHTNESS = 41.0
MAX_WHITE_SHARE = 0.1  # five times the most
_SIDE_PX = 256
_RADIUS_SHARE = 0.9  # of the field of view: its rim is the camera's mask
_LOCAL_SHARE = 1 / 16  # of the side: the standard deviation of a local mean


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What the eye asks of a photograph, within nine tenths of its field of view, scaled down to 256 px if it is wider.

    Between 64 and 512 px ``sharpness`` and ``contrast`` hardly depend on the size, and ``contrast`` not on the light.

    Attributes:
        sharpness: Mean absolute Laplacian of green, in grey levels: 1 is blurred, over 100 noise.
        contrast: Standard deviation of green less its local mean, over the mean of green (root mean square contrast:
            Peli, J. Opt. Soc. Am. A 7, 1990): vessels, disc and lesions; 0 to about 0.3.
        brightness: Mean of the brightest channel, 0 to 255.
        white_share: Share of pixels whose green is above 250, where nothing is left to see.
    """

    sharpness: float
    contrast: float
    brightness: float
    white_share: float


def measure_quality(image: Photograph, field_of_view: FieldOfView) -> Quality:
    """Measures a photograph on the scale of `Quality`."""
    side = max(8, min(_SIDE_PX, round(2 * field_of_view.radius_px)))
    square = fundus.to_square(image, field_of_view, side).astype(np.float32)
    photographed = fundus.to_square(np.full_like(image, 255), field_of_view, side)[:, :, 1] > 250
    circle = FieldOfView(x_px=side / 2, y_px=side / 2, radius_px=_RADIUS_SHARE * side / 2)
    within = fundus.inside_mask(square.shape, circle) & photographed
    green, weight = square[:, :, 1], within.astype(np.float32)
    spread_px = _LOCAL_SHARE * side
    local = ndimage.gaussian_filter(green * weight, spread_px) / np.maximum(
        ndimage.gaussian_filter(weight, spread_px), 1e-3
    )
    laplacian = np.abs(ndimage.laplace(green))
    return Quality(
        sharpness=float(laplacian[ndimage.binary_erosion(within, iterations=2)].mean()),
        contrast=float((green - local)[within].std() / max(1.0, float(green[within].mean()))),
        brightness=float(square.max(axis=2)[within].mean()),
        white_share=float((green[within] > 250).mean()),
    )


class Inspector:
    """Judges the photographs of one part in their order, so that of near-duplicates the first stays.

    Args:
        num_images: How many it will judge at most.
    """

    def __init__(self, *, num_images: int) -> None:
        self._hashes_NW = np.zeros((num_images, 8), np.uint64)
        self._num_kept = 0

    def judge(self, image: Photograph) -> str | None:
        """Returns why a photograph is left out, or None if it stays."""
        if float(image.std()) < MIN_SPREAD:
            return "blank"
        field_of_view = fundus.find_field_of_view(image)
        if field_of_view is None:
            return "no field of view"
        return _fault_of(measure_quality(image, field_of_view)) or self._repetition(image, field_of_view)

    def _repetition(self, image: Photograph, field_of_view: FieldOfView) -> str | None:
        words_W = duplicates.hash_photograph(image, field_of_view)
        if not words_W.any():  # no structure: like no other
            return None
        if (duplicates.distance(self._hashes_NW[: self._num_kept], words_W) <= duplicates.THRESHOLD_BITS).any():
            return "near-duplicate"
        self._hashes_NW[self._num_kept] = words_W
        self._num_kept += 1
        return None


def _fault_of(quality: Quality) -> str | None:
    if quality.brightness < MIN_BRIGHTNESS:
        return "underexposed"
    if quality.white_share > MAX_WHITE_SHARE:
        return "overexposed"
    if quality.contrast < MIN_CONTRAST:
        return "low contrast"
    if quality.sharpness < MIN_SHARPNESS:
        return "blurred"
    return "noisy" if quality.sharpness > MAX_SHARPNESS else None
