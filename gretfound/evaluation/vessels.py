"""Vessel statistics of a fundus photograph: density, fractal dimension and tortuosity, from a classical segmentation.

No network is asked, so the figures can be repeated anywhere and favour no generator. They are for comparing the
distributions of many photographs, not for a patient. On 15 drawn eyes of five sites, the same that its thresholds were
chosen on, the rank correlation with the drawn truth was 0.6 for density, 0.7 for tortuosity (0.01 too high on average)
and about 0 for the fractal dimension; `tests/evaluation/test_vessels.py` tests the first two on other eyes. All depend
on sharpness, on haze (a veiled vessel is not found) and on the size that photographs are measured at: measure real and
generated ones at one size, which neither is enlarged to.
"""

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage, sparse

from gretfound import fundus
from gretfound.evaluation import distances, metrics
from gretfound.evaluation.distances import MIN_PHOTOGRAPHS, NUM_RESAMPLES, Bools, Features, Floats, Ints
from gretfound.evaluation.fidelity import Sample, TrainedOn, require_held_out
from gretfound.evaluation.metrics import Interval
from gretfound.fundus import FieldOfView, Photograph

# Legend of array suffixes: H rows, W columns, P points, N photographs, R resamples.
STATISTICS = ("density", "fractal_dimension", "tortuosity")
SIZE_PX = 512
MIN_SIZE_PX = 256
FIELD_SHARE = 0.94  # of the field's radius: its border is no vessel
LIT_LEVEL = 12
# All lengths are shares of the size that the field of view is brought to: of the background's blur, of the filters
# across and (times the elongation) along a vessel, of the shortest line kept, of tortuosity's pieces and smoothing.
BACKGROUND = 0.05
WIDTHS = (0.003, 0.0045)
ELONGATION = 3.0
NUM_ORIENTATIONS = 12
MIN_EXTENT = 0.06
PIECE = 0.06
SMOOTHING = 0.005
# Answers of the filters in units of optical density, chosen by overlap with drawn vessels.
LOW, HIGH = 0.04, 0.07


@dataclass(frozen=True, kw_only=True)
class VesselStatistics:
    """The vessels of one photograph.

    Args:
        density: Share of the field of view that vessels cover, 0 to 1.
        fractal_dimension: Box-counting dimension of their centre lines, 0 to 2: 1 for one line, 2 for a full plane;
            NaN where no vessel is found.
        tortuosity: Arc over chord of pieces of centre lines, 1 and up: 1 is straight; NaN where no piece is found.
    """

    density: float
    fractal_dimension: float
    tortuosity: float


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far generated vessels are from real ones in one statistic.

    Args:
        difference: Mean of generated less mean of real photographs, in the statistic's unit; 0 is best.
        real_mean: Mean of the real ones.
        real_sd: Standard deviation between the real ones.
        num_undefined: Real and generated photographs without a value, which are left out.
    """

    difference: Interval
    real_mean: float
    real_sd: float
    num_undefined: tuple[int, int]


def vessel_space(photographs: Sequence[Photograph], *, size_px: int = SIZE_PX) -> Features:
    """Returns `STATISTICS` of photographs as features, (B, 3), NaN where undefined: for `fidelity.describe`."""
    rows = [astuple(measure(image, size_px=size_px)) for image in photographs]
    return np.array(rows, dtype=np.float32).reshape(-1, len(STATISTICS))


def compare(
    real: Sample,
    generated: Sample,
    *,
    trained_on: TrainedOn,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Gap]:
    """Compares the vessels of generated photographs with those of held-out real ones.

    Args:
        real: Held-out photographs in `vessel_space`.
        generated: Generated ones in it.
        trained_on: As in `fidelity.require_held_out`.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the resamples.

    Returns:
        By statistic, the difference with its 95% interval.

    Raises:
        LineageError: If the generator was trained on a photograph of ``real``.
        ValueError: If a statistic is defined for fewer than 20 photographs of a side.
    """
    require_held_out(real.image_ids, trained_on)
    seed_N, seed_M = distances.two_seeds(seed)
    gaps: dict[str, Gap] = {}
    for index, name in enumerate(STATISTICS):
        defined, drawn = (side.where(np.isfinite(side.features[:, index])) for side in (real, generated))
        num_real, num_generated = len(defined.features), len(drawn.features)
        if min(num_real, num_generated) < MIN_PHOTOGRAPHS:
            raise ValueError(
                f"found a {name} of {num_real:,} real and {num_generated:,} generated photographs; required "
                f"{MIN_PHOTOGRAPHS} of each with vessels"
            )
        real_N, drawn_M = (side.features[:, index].astype(np.float64) for side in (defined, drawn))
        resampled_R = distances.resampled_mean(drawn_M, drawn.patient_numbers, num_resamples, seed_M)
        resampled_R -= distances.resampled_mean(real_N, defined.patient_numbers, num_resamples, seed_N)
        gaps[name] = Gap(
            difference=metrics.interval(float(drawn_M.mean() - real_N.mean()), resampled_R),
            real_mean=float(real_N.mean()),
            real_sd=float(real_N.std(ddof=1)),
            num_undefined=(len(real.features) - num_real, len(generated.features) - num_generated),
        )
    return gaps


def measure(image: Photograph, *, size_px: int = SIZE_PX) -> VesselStatistics:
    """Measures the vessels of one photograph.

    Args:
        image: (H, W, 3) uint8 RGB.
        size_px: Diameter that the field of view is brought to.

    Raises:
        ValueError: If ``size_px`` is under 256 or the field of view is smaller than it: enlarging draws no vessels.
    """
    is_vessel_HW, is_seen_HW = segment(image, size_px=size_px)
    centre_HW = thin(is_vessel_HW)
    return VesselStatistics(
        density=float(is_vessel_HW.sum() / max(1, is_seen_HW.sum())),
        fractal_dimension=fractal_dimension(centre_HW),
        tortuosity=tortuosity(trace(centre_HW), piece_px=PIECE * size_px, smoothing_px=SMOOTHING * size_px),
    )


def segment(image: Photograph, *, size_px: int = SIZE_PX) -> tuple[Bools, Bools]:
    """Finds the vessels: lines of `line_strength` above a threshold, and what hangs on to them above a lower one.

    They have to be long enough. Thresholds are absolute: relative to a photograph's own noise, the density
    would follow the noise.

    Source: hysteresis: Canny 1986 (IEEE TPAMI 8:679).

    Args:
        image: (H, W, 3) uint8 RGB.
        size_px: Diameter that the field of view is brought to.

    Returns:
        Which pixels of the field's square, (size_px, size_px), are vessel, and which are in the field.

    Raises:
        ValueError: As in `measure`.
    """
    answer_HW, is_seen_HW = line_strength(image, size_px=size_px)
    label_HW, num_labels = ndimage.label(is_seen_HW & (answer_HW > LOW), np.ones((3, 3)))
    is_kept = np.zeros(num_labels + 1, dtype=bool)
    if num_labels:
        is_kept[1:] = ndimage.maximum(answer_HW, label_HW, np.arange(1, num_labels + 1)) > HIGH
        extents = [np.hypot(*(side.stop - side.start for side in box)) for box in ndimage.find_objects(label_HW)]
        is_kept[1:] &= np.array(extents) >= MIN_EXTENT * size_px
    return is_kept[label_HW], is_seen_HW


def line_strength(image: Photograph, *, size_px: int = SIZE_PX) -> tuple[npt.NDArray[np.float32], Bools]:
    """Returns how strongly each pixel lies on a dark ridge in green, as an oriented filter tells.

    Green is taken relative to its surroundings as an optical density, so that light and pigment divide out. Elongated
    second derivatives of Gaussians at twelve orientations answer to dark lines; the strongest orientation counts, and
    the mean over two widths.

    Source: the matched filter of Chaudhuri et al. 1989 (IEEE TMI 8:263), sections III and IV, on two widths, each
    normalised by its scale as in Lindeberg 1998 (IJCV 30:117).

    Args:
        image: (H, W, 3) uint8 RGB.
        size_px: Diameter that the field of view is brought to.

    Returns:
        The strength in optical density, (size_px, size_px), and which pixels are in the field.

    Raises:
        ValueError: As in `measure`.
    """
    field = fundus.find_field_of_view(image)
    diameter_px = 2 * field.radius_px if field else max(image.shape[:2])
    if not MIN_SIZE_PX <= size_px <= diameter_px + 1:
        raise ValueError(
            f"found size_px={size_px} for a field of view of {diameter_px:.0f} px; required at least {MIN_SIZE_PX} and "
            "no enlargement"
        )
    square = fundus.to_square(image, field, size_px)
    circle = FieldOfView(x_px=size_px / 2, y_px=size_px / 2, radius_px=FIELD_SHARE * size_px / 2)
    is_lit_HW = ndimage.binary_erosion(
        square.max(axis=2) > LIT_LEVEL, iterations=round((1 - FIELD_SHARE) / 2 * size_px)
    )
    is_seen_HW = fundus.inside_mask(square.shape, circle) & is_lit_HW
    depth_HW = _optical_density(square[..., 1].astype(np.float32), is_seen_HW, BACKGROUND * size_px)
    return _line_answer(depth_HW, size_px), is_seen_HW


def thin(is_vessel_HW: Bools) -> Bools:
    """Thins a mask to centre lines of one pixel.

    Source: Zhang and Suen 1984 (Communications of the ACM 27:236).
    """
    image = np.pad(is_vessel_HW, 1).astype(np.uint8)
    while True:
        num_before = int(image.sum())
        for removable in _REMOVABLE:
            image[1:-1, 1:-1] &= ~removable[_neighbour_codes(image)]
        if int(image.sum()) == num_before:
            centre_HW: Bools = image[1:-1, 1:-1].astype(bool)
            return centre_HW


def trace(centre_HW: Bools) -> list[Floats]:
    """Returns centre lines as paths of points, (P, 2) of x and y in pixels; they end at branchings and crossings."""
    codes_HW = _neighbour_codes(np.pad(centre_HW, 1).astype(np.uint8))
    is_branching_HW = centre_HW & (_CROSSINGS[codes_HW] >= 3)
    rows, columns = np.nonzero(centre_HW & ~ndimage.binary_dilation(is_branching_HW, np.ones((3, 3))))
    if not len(rows):
        return []
    graph = _pixel_graph(rows, columns, centre_HW.shape)
    num_parts, part_P = sparse.csgraph.connected_components(graph, directed=False)
    # The two ends of a part are farthest from each other: found from anywhere in it, then from there.
    end_of = _farthest(np.zeros(len(rows)), part_P, num_parts)
    for _ in range(2):
        distance_P, before_P, _ = sparse.csgraph.dijkstra(
            graph, directed=False, indices=end_of, return_predecessors=True, min_only=True
        )
        end_of = _farthest(distance_P, part_P, num_parts)
    paths: list[Floats] = []
    for end in end_of.tolist():
        path = [end]
        while before_P[path[-1]] >= 0:
            path.append(int(before_P[path[-1]]))
        paths.append(np.stack([columns[path], rows[path]], axis=1).astype(np.float64))
    return paths


def tortuosity(paths: Sequence[Floats], *, piece_px: float, smoothing_px: float) -> float:
    """Returns the arc over the chord of pieces of paths, by length: 1 and up, 1 is straight; NaN without a piece.

    Pieces of about equal length make it independent of how often vessels are cut by branchings; a longer piece sees
    slower windings, and the arch of the arcades.

    Source: arc over chord: Hart et al. 1999 (Int. J. Medical Informatics 53:239), measure 1.

    Args:
        paths: (P, 2) points each, in pixels.
        piece_px: Pieces are this long, up to twice; shorter paths are left out.
        smoothing_px: Standard deviation of the Gaussian that takes the pixel grid's steps out of paths; ends stay.
    """
    arcs = chords = 0.0
    for path_P2 in paths:
        reach = min(len(path_P2) - 1, round(4 * smoothing_px))
        if reach > 0:
            padded = np.pad(path_P2, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
            path_P2 = ndimage.gaussian_filter1d(padded, smoothing_px, axis=0, mode="nearest")[reach:-reach]
        travelled_P = np.r_[0.0, np.cumsum(np.hypot(*np.diff(path_P2, axis=0).T))]
        num_pieces = int(travelled_P[-1] // piece_px)
        if num_pieces:
            cuts = np.searchsorted(travelled_P, np.linspace(0.0, travelled_P[-1], num_pieces + 1) - 1e-9)
            arcs += float(np.diff(travelled_P[cuts]).sum())
            chords += float(np.hypot(*np.diff(path_P2[cuts], axis=0).T).sum())
    return arcs / chords if chords else float("nan")


def fractal_dimension(mask_HW: Bools) -> float:
    """Returns the box-counting dimension of a mask: 1 for a line, 2 for a filled square, NaN where it is empty.

    The slope of log(number of boxes that hold something) over -log(side), by least squares, for boxes of 2, 4, 8 ...
    pixels up to an eighth of the shorter side.

    Source: Mainster 1990 (Eye 4:235), for retinal vessels.

    Raises:
        ValueError: If the shorter side is under 32 pixels, which leaves no two sizes of boxes.
    """
    if min(mask_HW.shape) < 32:
        raise ValueError(f"found a mask of {mask_HW.shape}; required 32 pixels on each side")
    if not mask_HW.any():
        return float("nan")
    sides = 2 ** np.arange(1, int(np.log2(min(mask_HW.shape) / 8)) + 1)
    padding = [(0, -length % int(sides[-1])) for length in mask_HW.shape]
    padded = np.pad(mask_HW, padding)
    counts = [
        padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side).any(axis=(1, 3)).sum()
        for side in sides.tolist()
    ]
    return float(-np.polyfit(np.log(sides), np.log(counts), 1)[0])


def _optical_density(green_HW: npt.NDArray[np.float32], is_seen_HW: Bools, sigma_px: float) -> npt.NDArray[np.float32]:
    """Returns how much darker each pixel is than its surroundings, as a natural logarithm; 0 outside the field."""
    weight_HW = ndimage.gaussian_filter(is_seen_HW.astype(np.float32), sigma_px)
    surround_HW = ndimage.gaussian_filter(green_HW * is_seen_HW, sigma_px) / np.maximum(weight_HW, 1e-6)
    return np.where(is_seen_HW, np.log((surround_HW + 1.0) / (green_HW + 1.0)), 0.0).astype(np.float32)


def _line_answer(depth_HW: npt.NDArray[np.float32], size_px: int) -> npt.NDArray[np.float32]:
    """Returns the answer to a dark line: of the strongest orientation, averaged over widths."""
    spectrum = fft.rfft2(depth_HW)
    answer_HW = np.zeros_like(depth_HW)
    for width in WIDTHS:
        strongest_HW = np.full_like(depth_HW, -np.inf)
        for filter_HW in _line_filters(size_px, width):
            np.maximum(strongest_HW, fft.irfft2(spectrum * filter_HW, s=depth_HW.shape), out=strongest_HW)
        answer_HW += strongest_HW / len(WIDTHS)
    return answer_HW


@functools.cache
def _line_filters(size_px: int, width: float) -> npt.NDArray[np.float32]:
    """Returns second derivatives of elongated Gaussians across twelve orientations, for `fft.rfft2`'s frequencies."""
    y, x = 2 * np.pi * fft.fftfreq(size_px)[:, None], 2 * np.pi * fft.rfftfreq(size_px)[None]
    sigma_px = width * size_px
    filters = []
    for angle in np.pi * np.arange(NUM_ORIENTATIONS) / NUM_ORIENTATIONS:
        across, along = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        envelope = np.exp(-0.5 * sigma_px**2 * (across**2 + (ELONGATION * along) ** 2))
        filters.append(sigma_px**2 * across**2 * envelope)
    return np.stack(filters).astype(np.float32)


# Neighbours of a pixel clockwise from the one above it: bit i of a code is neighbour i.
_NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1
_CROSSINGS = ((_BITS == 0) & (np.roll(_BITS, -1, axis=1) == 1)).sum(axis=1)


def _removable(first: tuple[int, int, int], second: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Marks the codes of pixels that a sub-iteration of Zhang and Suen removes; their p2, p4, p6, p8 are 0, 2, 4, 6."""
    is_border = (_BITS.sum(axis=1) >= 2) & (_BITS.sum(axis=1) <= 6) & (_CROSSINGS == 1)
    is_side = (_BITS[:, first].prod(axis=1) == 0) & (_BITS[:, second].prod(axis=1) == 0)
    table: npt.NDArray[np.uint8] = (is_border & is_side).astype(np.uint8)
    return table


_REMOVABLE = (_removable((0, 2, 4), (2, 4, 6)), _removable((0, 2, 6), (0, 4, 6)))


def _neighbour_codes(padded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns the code of each pixel's neighbours, for an image with a border of one pixel that is not returned."""
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    codes_HW = np.zeros((height, width), dtype=np.uint8)
    for bit, (down, right) in enumerate(_NEIGHBOURS):
        codes_HW |= padded[1 + down : 1 + down + height, 1 + right : 1 + right + width] << bit
    return codes_HW


def _pixel_graph(rows_P: Ints, columns_P: Ints, shape: tuple[int, ...]) -> sparse.csr_matrix:
    """Joins neighbouring pixels with their distance."""
    place_HW = np.full((shape[0] + 2, shape[1] + 2), -1)
    place_HW[rows_P + 1, columns_P + 1] = np.arange(len(rows_P))
    starts, ends, lengths = [], [], []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        neighbour_P = place_HW[rows_P + 1 + down, columns_P + 1 + right]
        found = np.flatnonzero(neighbour_P >= 0)
        starts.append(found)
        ends.append(neighbour_P[found])
        lengths.append(np.full(len(found), np.hypot(down, right)))
    cells = (np.concatenate(lengths), (np.concatenate(starts), np.concatenate(ends)))
    return sparse.csr_matrix(cells, shape=(len(rows_P), len(rows_P)))


def _farthest(distance_P: Floats, part_P: Ints, num_parts: int) -> Ints:
    """Returns the point of each part with the largest distance."""
    order = np.lexsort((distance_P, part_P))
    last: Ints = order[np.searchsorted(part_P[order], np.arange(num_parts), side="right") - 1]
    return last
