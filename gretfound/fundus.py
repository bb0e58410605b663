"""Colour fundus photographs as arrays: decode safely, find the field of view, crop, score, hash, encode.

Every image is HxWx3 uint8 RGB and every coordinate counts pixel centres from 0. The room opens no file and keeps no
name. It does not convert ICC profiles, read DICOM or detect burned-in text.
"""

import hashlib
import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

Photograph = NDArray[np.uint8]
Floats = NDArray[np.float64]

MAX_PIXELS = 64_000_000
MAX_ENCODED_BYTES = 208 * 2**20  # 64 MP of uncompressed 8-bit RGB TIFF, and its header
MIN_SIDE_PX = 16

_MAGICS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)

UNREADABLE_REASONS = {
    "EMPTY": "the file is empty",
    "TOO_MANY_BYTES": f"the file is larger than {MAX_ENCODED_BYTES // 2**20} MiB; export it at a lower resolution",
    "FORMAT": "the content is not JPEG, PNG or TIFF, whatever the file's extension says; export it as one of these",
    "TOO_MANY_PIXELS": f"the photograph has more than {MAX_PIXELS // 10**6} megapixels; export it at a lower resolution",
    "TOO_SMALL": f"the photograph's shorter side is below {MIN_SIDE_PX} pixels",
    "FRAMES": "the file holds several frames or pages; export each photograph as a file of its own",
    "MODE": "the pixel type is neither 8-bit nor 16-bit integer; export it as 8-bit RGB",
    "TRUNCATED": "the file ends before the photograph does; copy it again from its source",
    "DAMAGED": "the file is damaged and does not decode; copy it again from its source",
}


class UnreadablePhotograph(ValueError):
    """A photograph that will not be decoded; the message never holds a file name.

    Args:
        code: A key of `UNREADABLE_REASONS`, stable.
    """

    def __init__(self, code: str) -> None:
        super().__init__(f"{code}: {UNREADABLE_REASONS[code]}")
        self.code = code
        self.reason = UNREADABLE_REASONS[code]

    def __reduce__(self) -> tuple[type["UnreadablePhotograph"], tuple[str]]:
        return type(self), (self.code,)  # Ray carries errors by pickling


def decode_photograph(encoded: bytes) -> Photograph:
    """Decodes one photograph upright to 8-bit RGB, and refuses what it cannot decode whole.

    The format is read from the content, never from a name, and only three decoders may run. 16-bit values are scaled
    by the smallest common depth (8, 10, 12, 14 or 16 bits) that holds them, because files do not say how many bits the
    sensor filled and Pillow would clip them at 255. Transparency is composited onto black, the photograph's surround.
    A flipped bit inside a JPEG usually decodes without complaint: record the file's own digest beside it.

    Source: Pillow's guards as measured in the trust page, section 1.6.

    Raises:
        UnreadablePhotograph: If the content is empty, too large, of another format, has several frames, a pixel type
            other than 8 or 16 bits, or does not decode whole. Size is checked before any pixel is decoded.
    """
    if not encoded:
        raise UnreadablePhotograph("EMPTY")
    if len(encoded) > MAX_ENCODED_BYTES:
        raise UnreadablePhotograph("TOO_MANY_BYTES")
    format = next((name for magic, name in _MAGICS if encoded.startswith(magic)), None)
    if format is None:
        raise UnreadablePhotograph("FORMAT")
    try:
        if format == "PNG":
            _require_whole_png(encoded)
        with Image.open(io.BytesIO(encoded), formats=[format]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadablePhotograph("TOO_MANY_PIXELS")
            if min(image.size) < MIN_SIDE_PX:
                raise UnreadablePhotograph("TOO_SMALL")
            if getattr(image, "n_frames", 1) != 1:
                raise UnreadablePhotograph("FRAMES")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadablePhotograph("TOO_MANY_PIXELS") from error
    except UnreadablePhotograph:
        raise
    except (OSError, EOFError, Warning, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise UnreadablePhotograph("TRUNCATED" if truncated else "DAMAGED") from error
    except (OverflowError, ZeroDivisionError, AssertionError, AttributeError, zlib.error) as error:
        raise UnreadablePhotograph("DAMAGED") from error


def _require_whole_png(encoded: bytes) -> None:
    """Walks the chunks and their checksums, because Pillow draws a PNG whose end is missing or damaged."""
    offset = 8
    while offset + 12 <= len(encoded):
        length, name = struct.unpack(">I4s", encoded[offset : offset + 8])
        end = offset + 12 + length
        if end > len(encoded):
            break
        (checksum,) = struct.unpack(">I", encoded[end - 4 : end])
        if zlib.crc32(memoryview(encoded)[offset + 4 : end - 4]) != checksum:
            raise UnreadablePhotograph("DAMAGED")
        if name == b"IEND":
            return
        offset = end
    raise UnreadablePhotograph("TRUNCATED")


def _rgb(image: Image.Image) -> Photograph:
    match image.mode:
        case "RGB":
            return np.array(image)
        case "L" | "1" | "CMYK" | "YCbCr" | "LAB":
            return np.array(image.convert("RGB"))
        case "P" if "transparency" not in image.info:
            return np.array(image.convert("RGB"))
        case "RGBA" | "LA" | "PA" | "RGBa" | "La" | "P":
            layer = image.convert("RGBA")
            return np.array(Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB"))
        case "I;16" | "I;16B" | "I;16L" | "I;16N" | "I":
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 0xFFFF:
                raise UnreadablePhotograph("MODE")
            depth = next(bits for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)
            grey = np.round(values * (255.0 / (2**depth - 1))).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        case _:
            raise UnreadablePhotograph("MODE")


def _require_photograph(image: NDArray[Any]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"found an array {image.shape} of {image.dtype}; required HxWx3 uint8 RGB")


def encode_jpeg(image: Photograph, quality: int = 95) -> bytes:
    """Encodes with full-resolution colour (4:4:4), because vessels and small haemorrhages are mostly colour.

    Args:
        image: HxWx3 RGB.
        quality: 1 to 100.
    """
    _require_photograph(image)
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=quality, subsampling=0)
    return encoded.getvalue()


def encode_png(image: Photograph) -> bytes:
    """Encodes without loss; the file holds pixels only (IHDR, IDAT, IEND)."""
    _require_photograph(image)
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    return encoded.getvalue()


def pixel_digest(image: Photograph) -> str:
    """Names a photograph by its pixels: the ``image_id``, equal for every file that decodes to these pixels.

    Returns:
        SHA-256 over ``HEIGHTxWIDTHx3:`` and the RGB bytes in rows, 64 hex digits.
    """
    _require_photograph(image)
    digest = hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}x3:".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class FieldOfView:
    """The circle that the camera's mask draws around the retina; it may reach beyond the photograph's frame.

    Args:
        x_px: Centre, columns from the left.
        y_px: Centre, rows from the top.
        radius_px: Radius, above 0.
    """

    x_px: float
    y_px: float
    radius_px: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.x_px) and math.isfinite(self.y_px) and 0 < self.radius_px < math.inf):
            raise ValueError(f"found {self}; required finite coordinates and a radius above 0")


_SEARCH_SIDE_PX = 256  # the circle is searched on a thumbnail: 5 ms, and a tenth of its pixel is half of ours
_NUM_GUESSES = 400
_MIN_ARC = 0.10  # of the full circle inside the frame: four corners of a square crop show about this much
_MIN_SUPPORT = 0.70  # of that arc has retina inside and border outside; tabs, text and dark rims take the rest
_MIN_STEP_LEVELS = 5.0  # grey levels across the edge; a dark photograph has few
_MIN_SHARPNESS = 0.55  # share of the rise from border to retina that happens within 3 % of the radius


def find_field_of_view(image: Photograph) -> FieldOfView | None:
    """Finds the circular edge of the retina, also when the frame cuts it or the border is not black.

    The border's colour is what at least two corners share; where an image departs from it, edge points are collected
    along rows and columns, a circle is fitted robustly (notches, text and dust are outliers), moved to the edge's half
    height along rays, and believed only when a sharp step runs along most of the arc that the frame shows.

    Returns:
        The circle in the image's pixels, or None when there is no evidence of one: a photograph cropped inside the
        retina has no border, and its whole frame is retina. Nothing is assumed in its place.
    """
    _require_photograph(image)
    height, width = image.shape[:2]
    shrink = max(1.0, max(height, width) / _SEARCH_SIDE_PX)
    size = (max(8, round(width / shrink)), max(8, round(height / shrink)))
    thumbnail = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX), dtype=np.float64)
    best: tuple[float, tuple[float, float, float]] | None = None
    for border in _border_colours(thumbnail):
        departure = np.abs(thumbnail - border).max(axis=2)
        found = _circle_in(departure)
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    if best is None:
        return None
    x, y, radius = best[1]
    scale_x, scale_y = width / size[0], height / size[1]
    return FieldOfView(
        (x + 0.5) * scale_x - 0.5, (y + 0.5) * scale_y - 0.5, radius * math.sqrt(scale_x * scale_y)
    )


def _border_colours(thumbnail: Floats) -> list[Floats]:
    """Returns the colours that at least two corners share, the most shared first."""
    height, width = thumbnail.shape[:2]
    side = max(2, min(height, width) // 40)
    corners = [
        np.median(thumbnail[rows, columns].reshape(-1, 3), axis=0)
        for rows in (slice(0, side), slice(height - side, height))
        for columns in (slice(0, side), slice(width - side, width))
    ]
    groups: list[list[Floats]] = []
    for corner in corners:
        near = [group for group in groups if np.abs(group[0] - corner).max() <= 20]
        if near:
            near[0].append(corner)
        else:
            groups.append([corner])
    groups.sort(key=len, reverse=True)
    return [np.median(np.stack(group), axis=0) for group in groups if len(group) >= 2]


def _circle_in(departure: Floats) -> tuple[float, tuple[float, float, float]] | None:
    """Fits the circle on a map of departures from the border's colour; returns its support and (x, y, radius)."""
    retina = float(np.percentile(departure, 75))
    best: tuple[float, tuple[float, float, float]] | None = None
    for share in (0.12, 0.25, 0.45):
        level = max(3.0, share * retina)
        points = _edge_points(departure, level)
        circle = _robust_circle(points, departure.shape)
        for _ in range(2):
            circle = circle and _moved_to_half_height(circle, departure)
        support = circle and _support(circle, departure)
        if circle and support and (best is None or support > best[0]):
            best = (support, circle)
    return best


def _edge_points(departure: Floats, level: float) -> Floats:
    """Returns the outermost crossings of ``level`` along rows and columns, Nx2 (x, y), none on the frame."""
    mask = Image.fromarray(np.where(departure > level, 255, 0).astype(np.uint8)).filter(ImageFilter.MedianFilter(5))
    inside = np.asarray(mask) > 0
    points = []
    for along, values, is_row in ((inside, departure, True), (inside.T, departure.T, False)):
        lines = np.flatnonzero(along.any(axis=1))
        last = along.shape[1] - 1
        first_in = along.argmax(axis=1)[lines]
        last_in = last - along[:, ::-1].argmax(axis=1)[lines]
        for edge, step in ((first_in, -1), (last_in, 1)):
            kept = (edge > 0) & (edge < last)
            line, position = lines[kept], edge[kept]
            here, beyond = values[line, position], values[line, position + step]
            rise = np.maximum(here - beyond, 1e-6)
            crossing = position + step * np.clip((here - level) / rise, 0.0, 1.0)
            pair = (crossing, line.astype(np.float64))
            points.append(np.stack(pair if is_row else pair[::-1], axis=1))
    return np.concatenate(points)


def _robust_circle(points: Floats, shape: tuple[int, ...]) -> tuple[float, float, float] | None:
    """Returns the circle that most points lie on (RANSAC with fixed seeds, then least squares on its points).

    Source: Fischler and Bolles, 1981; the fit is Kasa's.
    """
    if len(points) < 12:
        return None
    triples = points[np.random.default_rng(0).integers(0, len(points), (_NUM_GUESSES, 3))]
    a, b, c = triples[:, 0], triples[:, 1], triples[:, 2]
    ab, ac = b - a, c - a
    twice_area = 2.0 * (ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0])
    solvable = np.abs(twice_area) > 1.0
    a, ab, ac, twice_area = a[solvable], ab[solvable], ac[solvable], twice_area[solvable]
    ab2, ac2 = (ab**2).sum(axis=1), (ac**2).sum(axis=1)
    offset = np.stack([ac[:, 1] * ab2 - ab[:, 1] * ac2, ab[:, 0] * ac2 - ac[:, 0] * ab2], axis=1) / twice_area[:, None]
    centres, radii = a + offset, np.hypot(offset[:, 0], offset[:, 1])
    plausible = (radii > 0.2 * min(shape)) & (radii < 1.2 * max(shape))
    centres, radii = centres[plausible], radii[plausible]
    if not len(radii):
        return None
    distances = np.hypot(*(points[None] - centres[:, None]).transpose(2, 0, 1))
    winner = int((np.abs(distances - radii[:, None]) < 1.5).sum(axis=1).argmax())
    (x, y), radius = centres[winner], radii[winner]
    for tolerance in (2.0, 1.5, 1.5):
        near = np.abs(np.hypot(points[:, 0] - x, points[:, 1] - y) - radius) < tolerance
        fitted = _least_squares_circle(points[near])
        if fitted is None:
            return None
        x, y, radius = fitted
    if not (0.2 * min(shape) < radius < 1.2 * max(shape)):
        return None
    return float(x), float(y), float(radius)


def _least_squares_circle(points: Floats) -> tuple[float, float, float] | None:
    if len(points) < 12:
        return None
    middle = points.mean(axis=0)
    x, y = (points - middle).T
    terms = np.stack([x, y, np.ones_like(x)], axis=1)
    (p, q, r), _, rank, _ = np.linalg.lstsq(terms, x**2 + y**2, rcond=None)
    square = r + (p**2 + q**2) / 4.0
    if rank < 3 or square <= 0:
        return None
    return float(p / 2.0 + middle[0]), float(q / 2.0 + middle[1]), float(math.sqrt(square))


def _along_rays(circle: tuple[float, float, float], departure: Floats, reach: Floats) -> tuple[Floats, Floats]:
    """Samples ``departure`` at radii ``radius * reach`` along 360 rays.

    Returns:
        Values 360xR, NaN outside the frame, and the rays' unit vectors 360x2.
    """
    height, width = departure.shape
    angles = np.deg2rad(np.arange(360.0))
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    x = circle[0] + circle[2] * rays[:, :1] * reach
    y = circle[1] + circle[2] * rays[:, 1:] * reach
    framed = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    left, top = np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001)
    column, row = left.astype(int), top.astype(int)
    right, down = left - column, top - row
    values = (departure[row, column] * (1 - right) + departure[row, column + 1] * right) * (1 - down) + (
        departure[row + 1, column] * (1 - right) + departure[row + 1, column + 1] * right
    ) * down
    return np.where(framed, values, np.nan), rays


def _moved_to_half_height(
    circle: tuple[float, float, float], departure: Floats
) -> tuple[float, float, float] | None:
    """Refits the circle to where each ray crosses half of the rise from border to retina."""
    reach = np.linspace(0.93, 1.06, 53)
    values, rays = _along_rays(circle, departure, reach)
    framed = np.isfinite(values[:, reach <= 1.03]).all(axis=1)
    values, rays = np.nan_to_num(values[framed]), rays[framed]
    if len(rays) < 12:
        return circle
    half = (np.median(values[:, reach < 0.96], axis=1) + np.median(values[:, reach > 1.03], axis=1)) / 2.0
    below = values < half[:, None]
    crossing = below.argmax(axis=1)
    kept = (crossing > 0) & (half > _MIN_STEP_LEVELS / 2)
    radii = circle[2] * reach[crossing[kept]]
    points = np.array(circle[:2]) + rays[kept] * radii[:, None]
    steady = np.abs(radii - np.median(radii)) < 2.0
    return _least_squares_circle(points[steady]) or circle


def _support(circle: tuple[float, float, float], departure: Floats) -> float | None:
    """Returns the share of the visible arc that is a sharp step from border to retina, or None below the bounds."""
    values, _ = _along_rays(circle, departure, np.array([0.85, 0.95, 0.97, 1.03, 1.05]))
    values = values[np.isfinite(values[:, 3])]
    if len(values) < _MIN_ARC * 360:
        return None
    deep, inside = np.nanmax(values[:, :2], axis=1), values[:, 2]
    outside = np.nanmin(values[:, 3:], axis=1)
    step = inside - outside
    supported = (step > _MIN_STEP_LEVELS) & (step > _MIN_SHARPNESS * np.maximum(deep - outside, inside))
    support = float(supported.mean())
    return support if support >= _MIN_SUPPORT else None


def mask_outside(image: Photograph, fov: FieldOfView) -> Photograph:
    """Returns a copy that is black outside the circle, half a pixel of tolerance included."""
    _require_photograph(image)
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    inside = (x - fov.x_px) ** 2 + (y - fov.y_px) ** 2 <= (fov.radius_px + 0.5) ** 2
    return image * inside[:, :, None].astype(np.uint8)


def crop_to_field_of_view(image: Photograph, fov: FieldOfView | None) -> Photograph:
    """Cuts the square around the circle; outside the circle and outside the frame it is black.

    The circle keeps its true shape: where the frame cut it at the top and bottom, black bars stand. Without a circle
    the whole frame is centred on a black square, so nothing of the retina is lost.

    Returns:
        SxSx3, S being the circle's diameter, or the frame's longer side.
    """
    _require_photograph(image)
    height, width = image.shape[:2]
    if fov is None:
        side = max(height, width)
        left, top = -((side - width) // 2), -((side - height) // 2)
    else:
        image = mask_outside(image, fov)
        side = max(1, round(2 * fov.radius_px + 1))
        left, top = round(fov.x_px - (side - 1) / 2), round(fov.y_px - (side - 1) / 2)
    square = np.zeros((side, side, 3), dtype=np.uint8)
    rows = slice(max(0, top), max(0, min(height, top + side)))
    columns = slice(max(0, left), max(0, min(width, left + side)))
    part = image[rows, columns]
    square[rows.start - top : rows.start - top + part.shape[0], columns.start - left :][:, : part.shape[1]] = part
    return square


def to_square(image: Photograph, fov: FieldOfView | None, size_px: int) -> Photograph:
    """Crops to the field of view and resizes: the one way in which photographs meet a network of fixed size.

    Bicubic with antialiasing (Pillow widens its kernel when it shrinks); large reductions average whole blocks first.

    Returns:
        ``size_px`` x ``size_px`` x 3.
    """
    if size_px < 1:
        raise ValueError(f"found size_px {size_px}; required 1 or more")
    square = Image.fromarray(crop_to_field_of_view(image, fov))
    if square.width == size_px:
        return np.array(square)
    return np.array(square.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=3.0))


def quality_score(image: Photograph, fov: FieldOfView | None) -> float:
    """Scores how well a photograph can be read, from 0 to 1, independent of its size and shape.

    The geometric mean of three parts, each 0 to 1, measured on the green channel (where vessels contrast most) of the
    inner 90 % of the field at 256 px: sharpness, the fine detail relative to brightness; illumination, the share of
    pixels that are neither dark nor burnt out; contrast, the spread between dark and bright. A heuristic for sorting
    and for finding spoilt photographs; it is not calibrated against graders and must not exclude patients by itself.
    """
    square = to_square(image, fov, 256)
    radius = math.inf if fov is None else 0.9 * 128
    y, x = np.ogrid[:256, :256]
    field = (x - 127.5) ** 2 + (y - 127.5) ** 2 <= radius**2
    field = field & (square.max(axis=2) > 0)  # bars where the frame cut the circle say nothing about quality
    if field.sum() < 256:
        return 0.0
    green = square[:, :, 1]
    blurred = np.asarray(Image.fromarray(green).filter(ImageFilter.GaussianBlur(2.0)), dtype=np.float64)
    inner = np.asarray(Image.fromarray(field).filter(ImageFilter.MinFilter(9))) > 0
    detail = np.abs(green - blurred)[inner] / (blurred[inner] + 16.0)
    fine = float(detail.mean()) if inner.any() else 0.0
    sharpness = fine / (fine + 0.02)
    brightest = square.max(axis=2)[field]
    lit = (brightest > 40) & (square.min(axis=2)[field] < 235)
    low, high = np.percentile(green[field], [5, 95])
    contrast = min(1.0, float(high - low) / 80.0)
    return float(np.clip((sharpness * float(lit.mean()) * contrast) ** (1.0 / 3.0), 0.0, 1.0))


def perceptual_hash(image: Photograph, fov: FieldOfView | None = None) -> int:
    """Returns a 64-bit difference hash of the retina: near-duplicates differ in few bits.

    Taken on the square inside the circle, because the black surround would spend bits on the camera's mask.

    Returns:
        An unsigned 64-bit integer; compare with ``(a ^ b).bit_count()``.
    """
    if fov is not None:
        half = fov.radius_px / math.sqrt(2.0)
        rows = slice(max(0, round(fov.y_px - half)), max(0, round(fov.y_px + half)) + 1)
        columns = slice(max(0, round(fov.x_px - half)), max(0, round(fov.x_px + half)) + 1)
        part = image[rows, columns]
        image = part if part.size else image
    _require_photograph(image)
    grey = Image.fromarray(np.ascontiguousarray(image)).convert("L")
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
