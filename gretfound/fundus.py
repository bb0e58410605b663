"""Colour fundus photographs as arrays: safe decoding, the field of view, quality and digests.

Arrays are uint8 RGB of shape (height, width, 3). This room knows no files and no patients.
"""

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

Photograph = npt.NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "TIFF")
MAX_PIXELS = 64_000_000
MAX_ENCODED_BYTES = 50 * 2**20
_THUMBNAIL_PX = 256
_JPEG_START = b"\xff\xd8"
_MIN_RADIUS_SHARE = 0.25  # of the shorter side: a smaller circle is a lesion or a reflex, not a field of view


class UnreadablePhotograph(ValueError):
    """A photograph that cannot be decoded safely.

    Args:
        code: A stable reason code, for example ``TRUNCATED``.
        message: What was found and what is required; never a file name.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code

    def __reduce__(self) -> tuple[type["UnreadablePhotograph"], tuple[str, str]]:
        return type(self), (self.code, str(self).removeprefix(f"{self.code}: "))


@dataclass(frozen=True, kw_only=True)
class FieldOfView:
    """The circle that the camera photographed, in pixels from the top left; parts of it may lie outside the image."""

    x_px: float
    y_px: float
    radius_px: float


def decode_photograph(encoded: bytes) -> Photograph:
    """Decodes a JPEG, PNG or TIFF photograph the right way up.

    Sixteen-bit images are scaled, never clipped; transparency is laid on black; colours are those of the ICC profile
    where there is one, in sRGB.

    Raises:
        UnreadablePhotograph: If the bytes are of another format, too large, truncated, or hold several frames.
    """
    if len(encoded) > MAX_ENCODED_BYTES:
        raise UnreadablePhotograph("TOO_LARGE", f"found {len(encoded):,} bytes; required at most {MAX_ENCODED_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, before anything is decoded
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
                return _decoded(opened)
    except UnidentifiedImageError as error:
        raise UnreadablePhotograph(
            "NOT_A_PHOTOGRAPH", f"the bytes are none of {', '.join(FORMATS)}; required a photograph in one of them"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadablePhotograph("TOO_MANY_PIXELS", f"required at most {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise UnreadablePhotograph("BEYOND_LIMITS", "opening it takes more memory than a photograph needs") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, UnreadablePhotograph):
            raise
        raise UnreadablePhotograph(
            "TRUNCATED", "the photograph is truncated or damaged; required a whole one, so copy it again"
        ) from error


def encoded_size(encoded: bytes) -> tuple[int, int]:
    """Returns the (height, width) of a JPEG or PNG photograph from its header, in pixels.

    Raises:
        UnreadablePhotograph: If the bytes are of another format.
    """
    try:
        if encoded[:2] == _JPEG_START:
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
            return height, width
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as opened:
            return opened.height, opened.width
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadablePhotograph("NOT_A_PHOTOGRAPH", "the bytes are neither JPEG nor PNG") from error


def decode_reduced(encoded: bytes, reduction: float) -> tuple[Photograph, int]:
    """Decodes a shard's photograph at the smallest size that is at least 1 / ``reduction`` of its own.

    A JPEG is reduced by 2, 4 or 8 while it is decoded, from its frequencies: a quarter of the pixels cost about half
    of the time. Shards hold photographs upright and in RGB; `decode_photograph` is for anything else.

    Returns:
        The pixels, and by how much they are reduced: 1, 2, 4 or 8. The last row and column may stand for less.

    Raises:
        UnreadablePhotograph: If the bytes cannot be decoded whole.
    """
    try:
        if encoded[:2] == _JPEG_START:
            height, width, colour_space, _ = simplejpeg.decode_jpeg_header(encoded)
            if colour_space in ("YCbCr", "Gray"):
                factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(1.0, reduction))
                smallest = (-(-height // factor), -(-width // factor))
                pixels = simplejpeg.decode_jpeg(
                    encoded, "RGB", min_height=smallest[0], min_width=smallest[1], min_factor=1
                )
                return np.asarray(pixels), factor
        with Image.open(io.BytesIO(encoded), formats=["JPEG", "PNG"]) as opened:
            return np.array(opened.convert("RGB")), 1
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadablePhotograph("TRUNCATED", "the photograph is truncated or damaged") from error


def _decoded(opened: Image.Image) -> Photograph:
    if opened.width * opened.height > MAX_PIXELS:
        raise UnreadablePhotograph(
            "TOO_MANY_PIXELS",
            f"found {opened.width:,} x {opened.height:,} pixels; required at most {MAX_PIXELS:,}",
        )
    if getattr(opened, "n_frames", 1) != 1:
        raise UnreadablePhotograph("SEVERAL_FRAMES", f"found {opened.n_frames} frames; required one")  # type: ignore[attr-defined]
    opened.load()
    profile = opened.info.get("icc_profile")
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith(("I", "F")):
        levels = np.clip(np.asarray(upright), 0, 65_535).astype(np.uint16)
        # The depth is not stored in the file: cameras write 8, 12 or 16 bits into sixteen.
        top = next(limit for limit in (255, 4095, 65_535) if levels.max() <= limit)
        return np.repeat(to_eight_bits(levels, top)[:, :, None], 3, axis=2)
    if "A" in upright.mode or "transparency" in upright.info:
        with_alpha = upright.convert("RGBA")
        black = Image.new("RGBA", with_alpha.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(black, with_alpha)
    if upright.mode == "CMYK" and profile:
        return np.array(_in_srgb(upright, profile))
    image = np.array(upright.convert("RGB"))
    return to_srgb(image, profile) if profile and upright.mode not in ("L", "LA", "1") else image


def to_eight_bits(levels: npt.NDArray[np.unsignedinteger[Any]], top: int) -> npt.NDArray[np.uint8]:
    """Scales levels of 0 to ``top`` to 0 to 255, rounded; none may be above ``top``, at most 65,535."""
    table: npt.NDArray[np.uint8] = (np.arange(top + 1) * (255.0 / top)).round().astype(np.uint8)
    scaled: npt.NDArray[np.uint8] = table[levels]
    return scaled


def to_srgb(image: Photograph, profile: bytes) -> Photograph:
    """Converts colours that an ICC profile describes to sRGB.

    Raises:
        UnreadablePhotograph: If the profile is damaged or not one of RGB colours.
    """
    if b"sRGB" in profile[:4096]:  # what nearly every camera writes: nothing to convert
        return image
    return np.array(_in_srgb(Image.fromarray(image), profile))


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        described = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, described, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise UnreadablePhotograph(
            "BAD_PROFILE", "its colour profile is damaged or does not fit; export it again without one"
        ) from error
    assert converted is not None  # it is only where the conversion is in place
    return converted


def encode_jpeg(image: Photograph, quality: int = 95) -> bytes:
    """Encodes as JPEG with full colour resolution and without any metadata."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def encode_png(image: Photograph) -> bytes:
    """Encodes as PNG, without loss and without any metadata."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=3)  # a third of the time for a few more bytes
    return stream.getvalue()


def pixel_digest(image: Photograph) -> str:
    """Returns the SHA-256 over the shape and the pixels, in hex: the id of an image, whatever file it came in."""
    digest = hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}x3:".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def find_field_of_view(image: Photograph) -> FieldOfView | None:
    """Finds the photographed circle by fitting one to the border between photograph and black surround.

    Borders that the image's edge cuts off are left out of the fit, so a circle that is cut at the top and bottom is
    found whole. An image without a black surround (already cropped) has no evidence of a circle.

    Returns:
        The circle, or None where there is no such border.
    """
    height, width = image.shape[:2]
    reduction = max(1.0, max(height, width) / _THUMBNAIL_PX)
    size = (max(1, round(width / reduction)), max(1, round(height / reduction)))
    thumbnail = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    brightness = np.asarray(thumbnail, dtype=np.float32).max(axis=2)
    inside = brightness > _surround_level(brightness)
    border = _border_points(inside)
    if len(border) < 12:
        return None
    circle = _fitted_circle(border)
    if circle is None:
        return None
    x, y, radius = circle
    if not _MIN_RADIUS_SHARE * min(size) <= radius <= 1.0 * max(size):
        return None
    x_scale, y_scale = width / size[0], height / size[1]
    return FieldOfView(x_px=(x + 0.5) * x_scale, y_px=(y + 0.5) * y_scale, radius_px=radius * (x_scale + y_scale) / 2)


def _surround_level(brightness: npt.NDArray[np.float32]) -> float:
    """A level between the dark surround and the retina: Otsu's, held low, since dim retina is still retina."""
    counts, edges = np.histogram(brightness, bins=64, range=(0, 256))
    weights = counts / counts.sum()
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(weights)
    mean_below = np.cumsum(weights * centres)
    overall = mean_below[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (overall * below - mean_below) ** 2 / (below * (1 - below))
    otsu = float(centres[int(np.nanargmax(np.where(np.isfinite(between), between, -1.0)))])
    corner = max(2, min(brightness.shape) // 20)
    corners = np.concatenate(
        [
            brightness[rows, columns].ravel()
            for rows in (slice(None, corner), slice(-corner, None))
            for columns in (slice(None, corner), slice(-corner, None))
        ]
    )
    dark = float(np.median(corners))
    return min(otsu, max(10.0, dark + 0.25 * max(otsu - dark, 0.0))) if dark < otsu else otsu


def _border_points(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Outermost inside pixels of each row and column, except where they touch the image's edge."""
    height, width = inside.shape
    points: list[tuple[float, float]] = []
    for row in range(height):
        columns = np.flatnonzero(inside[row])
        if len(columns) > 2:
            if columns[0] > 0:
                points.append((columns[0] - 0.5, row))
            if columns[-1] < width - 1:
                points.append((columns[-1] + 0.5, row))
    for column in range(width):
        rows = np.flatnonzero(inside[:, column])
        if len(rows) > 2:
            if rows[0] > 0:
                points.append((column, rows[0] - 0.5))
            if rows[-1] < height - 1:
                points.append((column, rows[-1] + 0.5))
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _fitted_circle(points: npt.NDArray[np.float64]) -> tuple[float, float, float] | None:
    """Fits a circle by random three-point circles and a least-squares refinement of the best one's inliers.

    Source: Fischler and Bolles, 1981 (RANSAC); Kasa, 1976 (the algebraic fit).
    """
    rng = np.random.default_rng(0)
    best_count, best = 0, np.zeros(len(points), dtype=bool)
    for _ in range(80):
        circle = _algebraic_circle(points[rng.choice(len(points), 3, replace=False)])
        if circle is None:
            continue
        near = np.abs(np.hypot(points[:, 0] - circle[0], points[:, 1] - circle[1]) - circle[2]) < 1.5
        if near.sum() > best_count:
            best_count, best = int(near.sum()), near
    if best_count < 0.4 * len(points):
        return None
    circle = _algebraic_circle(points[best])
    if circle is None:
        return None
    angles = np.arctan2(points[best][:, 1] - circle[1], points[best][:, 0] - circle[0])
    covered = len(np.unique(((angles + math.pi) / (2 * math.pi) * 16).astype(int) % 16))
    return circle if covered >= 4 else None  # a quarter of the way round: less is an edge that merely bends


def _algebraic_circle(points: npt.NDArray[np.float64]) -> tuple[float, float, float] | None:
    system = np.column_stack([points, np.ones(len(points))])
    solution, _, rank, _ = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)
    if rank < 3:
        return None
    x, y = solution[0] / 2, solution[1] / 2
    squared = solution[2] + x * x + y * y
    return (float(x), float(y), math.sqrt(squared)) if squared > 0 else None


def crop_to_field_of_view(image: Photograph, field_of_view: FieldOfView | None) -> Photograph:
    """Cuts the square around the circle, black where it reaches over the photograph; pads to a square without one."""
    height, width = image.shape[:2]
    if field_of_view is None:
        centre_x, centre_y, half = width / 2, height / 2, max(width, height) / 2
    else:
        centre_x, centre_y, half = field_of_view.x_px, field_of_view.y_px, field_of_view.radius_px
    side = max(1, round(2 * half))
    left, top = round(centre_x - half), round(centre_y - half)
    square = np.zeros((side, side, 3), dtype=np.uint8)
    x0, x1, y0, y1 = max(left, 0), min(left + side, width), max(top, 0), min(top + side, height)
    if x0 < x1 and y0 < y1:
        square[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return square


def to_square(image: Photograph, field_of_view: FieldOfView | None, size_px: int) -> Photograph:
    """Crops to the field of view and resizes to ``size_px`` (bicubic with antialiasing)."""
    square = Image.fromarray(crop_to_field_of_view(image, field_of_view))
    return np.array(square.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=3.0))


def inside_mask(shape: tuple[int, ...], field_of_view: FieldOfView) -> npt.NDArray[np.bool_]:
    """Returns which pixels of an image of ``shape`` lie inside the circle."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    squared = (x + 0.5 - field_of_view.x_px) ** 2 + (y + 0.5 - field_of_view.y_px) ** 2
    mask: npt.NDArray[np.bool_] = squared <= field_of_view.radius_px**2
    return mask


def quality_score(image: Photograph, field_of_view: FieldOfView | None) -> float:
    """Scores how usable a photograph is, from 0 to 1: the product of sharpness, exposure and contrast.

    Measured on the green channel of the 256 px square, inside 90% of the field of view. A simple screen that finds
    blank, black, overexposed and badly blurred images; not a grader of clinical quality.
    """
    green = to_square(image, field_of_view, _THUMBNAIL_PX)[:, :, 1].astype(np.float32)
    circle = FieldOfView(x_px=_THUMBNAIL_PX / 2, y_px=_THUMBNAIL_PX / 2, radius_px=0.45 * _THUMBNAIL_PX)
    values = green[inside_mask(green.shape, circle)]
    detail = green[1:-1, 1:-1] * 4 - green[:-2, 1:-1] - green[2:, 1:-1] - green[1:-1, :-2] - green[1:-1, 2:]
    within = inside_mask(green.shape, circle)[1:-1, 1:-1]
    sharpness = min(1.0, float(np.abs(detail[within]).mean()) / 4.0)
    clipped_share = float(((values < 8) | (values > 250)).mean())
    exposure = max(0.0, 1.0 - 2.0 * clipped_share)
    contrast = min(1.0, float(values.std()) / 20.0)
    return float((sharpness * exposure * contrast) ** (1 / 3))
