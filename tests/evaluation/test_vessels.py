"""Vessel statistics against shapes whose figures are known, and against the drawn vessels of phantoms."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.stats import spearmanr

from gretfound.errors import LineageError
from gretfound.evaluation import fidelity, vessels
from gretfound.phantom import SITES, PhantomTruth, draw_eye, draw_patient

MIN_WIDTH_PX = 1.2  # a thinner vessel is not seen


def drawn_path(points: npt.NDArray[np.floating], *, size_px: int = 256, width_px: int = 1) -> npt.NDArray[np.bool_]:
    picture = Image.new("1", (size_px, size_px))
    ImageDraw.Draw(picture).line([(x, y) for x, y in points.tolist()], fill=1, width=width_px)
    return np.asarray(picture)


def arc(radius_px: float, turn_rad: float) -> npt.NDArray[np.floating]:
    angle = np.linspace(0.2, 0.2 + turn_rad, 400)
    return 128 + radius_px * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_fractal_dimension__line_square_and_sierpinski_triangle():
    line = np.zeros((512, 512), dtype=bool)
    line[100] = True
    assert vessels.fractal_dimension(line) == pytest.approx(1.0, abs=1e-9)
    assert vessels.fractal_dimension(drawn_path(np.array([(0, 0), (511, 511)]), size_px=512)) == pytest.approx(
        1.0, abs=1e-9
    )
    assert vessels.fractal_dimension(np.ones((512, 512), dtype=bool)) == pytest.approx(2.0, abs=1e-9)
    row, column = np.ogrid[:512, :512]
    assert vessels.fractal_dimension((row & column) == 0) == pytest.approx(np.log(3) / np.log(2), abs=1e-9)
    assert np.isnan(vessels.fractal_dimension(np.zeros((64, 64), dtype=bool)))
    with pytest.raises(ValueError, match="32 pixels"):
        vessels.fractal_dimension(np.ones((64, 16), dtype=bool))


@pytest.mark.parametrize("slope_deg", [0.0, 11.0, 30.0, 45.0, 77.0])
def test_tortuosity__straight_line_is_one(slope_deg):
    way = np.array([np.cos(np.radians(slope_deg)), np.sin(np.radians(slope_deg))])
    centre = drawn_path(np.stack([20 + 0 * way, 20 + 200 * way]))
    (path,) = vessels.trace(centre)
    assert vessels.tortuosity([path], piece_px=30.0, smoothing_px=2.5) == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize("turn_rad", [np.pi / 2, np.pi])
def test_tortuosity__arc_over_its_chord(turn_rad):
    (path,) = vessels.trace(vessels.thin(drawn_path(arc(90.0, turn_rad), width_px=5)))
    length = 90.0 * turn_rad  # thinning takes two of its 141 or 283 pixels off each end
    whole = vessels.tortuosity([path], piece_px=0.9 * length, smoothing_px=2.5)
    assert whole == pytest.approx(turn_rad / (2 * np.sin(turn_rad / 2)), rel=0.02)
    # Pieces of a third: the same arc over a chord of a third of the turn.
    pieces = vessels.tortuosity([path], piece_px=0.3 * length, smoothing_px=2.5)
    assert pieces == pytest.approx(turn_rad / 3 / (2 * np.sin(turn_rad / 6)), rel=0.02)


def test_tortuosity__longer_paths_weigh_more_and_short_ones_do_not_count():
    straight = np.stack([np.arange(301.0), np.zeros(301)], axis=1)
    bent = np.concatenate([straight[:51], 50 * np.array([[1, 0]]) + np.arange(1, 51)[:, None] * [[0, 1]]])
    expected = (300 + 100) / (300 + 50 * np.sqrt(2))
    assert vessels.tortuosity([straight, bent], piece_px=80.0, smoothing_px=0.0) == pytest.approx(expected, abs=1e-3)
    assert np.isnan(vessels.tortuosity([straight[:20]], piece_px=80.0, smoothing_px=2.0))
    assert np.isnan(vessels.tortuosity([], piece_px=80.0, smoothing_px=2.0))


def test_thin__is_one_pixel_wide_and_keeps_parts_and_holes():
    random = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(random.normal(0, 1, (160, 160)), 3) > 0.03
    blobs[[0, -1]] = blobs[:, [0, -1]] = False  # what thinning takes off the border joins backgrounds there
    thinned = vessels.thin(blobs)
    eight = np.ones((3, 3))
    assert not (thinned & ~blobs).any()
    assert ndimage.label(thinned, eight)[1] == ndimage.label(blobs, eight)[1] > 5
    assert ndimage.label(~thinned)[1] == ndimage.label(~blobs)[1]
    squares = thinned[:-1, :-1] & thinned[1:, :-1] & thinned[:-1, 1:] & thinned[1:, 1:]
    assert squares.sum() < 0.01 * thinned.sum()
    bar = np.zeros((40, 80), dtype=bool)
    bar[15:22, 10:70] = True
    rows, _ = np.nonzero(vessels.thin(bar))
    assert np.abs(np.median(rows) - 18) <= 0.5


def test_trace__paths_end_at_branchings():
    cross = np.zeros((64, 64), dtype=bool)
    cross[32, 4:60] = cross[4:60, 30] = True
    paths = vessels.trace(cross)
    assert len(paths) == 4
    assert sorted(len(path) for path in paths) == [25, 26, 27, 28]
    ends = sorted(tuple(path[i]) for path in paths for i in (0, -1))
    assert {(4.0, 32.0), (59.0, 32.0), (30.0, 4.0), (30.0, 59.0)} <= set(ends)
    assert vessels.trace(np.zeros((64, 64), dtype=bool)) == []


def true_density(truth: PhantomTruth) -> float:
    """The share of the field that the drawn ribbons cover, drawn again at four times the size."""
    factor = 4
    picture = Image.new("1", (truth.width_px * factor, truth.height_px * factor))
    pen = ImageDraw.Draw(picture)
    for line in np.concatenate([truth.arteries, truth.veins]):
        centre, half = (line[:, :2] + 0.5) * factor, line[:, 2:] * factor / 2
        along = np.gradient(centre, axis=0)
        normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
        outline = np.concatenate([centre + normal * half, (centre - normal * half)[::-1]])
        pen.polygon([(x, y) for x, y in outline.tolist()], fill=1)
    return float(np.asarray(picture)[in_field(truth, factor)].mean())


def in_field(truth: PhantomTruth, factor: int) -> npt.NDArray[np.bool_]:
    y, x = np.ogrid[: truth.height_px * factor, : truth.width_px * factor]
    centre_x, centre_y = (truth.fov_x_px + 0.5) * factor, (truth.fov_y_px + 0.5) * factor
    inside: npt.NDArray[np.bool_] = (
        np.hypot(x + 0.5 - centre_x, y + 0.5 - centre_y) < vessels.FIELD_SHARE * truth.fov_radius_px * factor
    )
    return inside


def true_tortuosity(truth: PhantomTruth) -> float:
    """Arc over chord of equal pieces of the drawn centre lines in the field that are wide enough to be seen."""
    piece_px = vessels.PIECE * 2 * truth.fov_radius_px
    arcs = chords = 0.0
    for line in np.concatenate([truth.arteries, truth.veins]):
        places = CubicSpline(np.arange(len(line)), line)(np.linspace(0, len(line) - 1, 400))
        away = np.hypot(places[:, 0] - truth.fov_x_px, places[:, 1] - truth.fov_y_px)
        seen = places[(away < vessels.FIELD_SHARE * truth.fov_radius_px) & (places[:, 2] > MIN_WIDTH_PX), :2]
        travelled = np.r_[0.0, np.hypot(*np.diff(seen, axis=0).T).cumsum()] if len(seen) > 1 else np.zeros(1)
        num_pieces = int(travelled[-1] / piece_px)
        for piece in range(num_pieces):
            first, last = np.searchsorted(travelled, travelled[-1] / num_pieces * np.array([piece, piece + 1 - 1e-9]))
            last = min(last, len(seen) - 1)
            arcs += travelled[last] - travelled[first]
            chords += float(np.hypot(*(seen[last] - seen[first])))
    return arcs / chords


LEVELS = ((0.75, 0.06), (1.0, 0.17), (1.25, 0.40))  # the population's extremes and mean: calibre, windings


@pytest.fixture(scope="module")
def measured() -> list[list[tuple[vessels.VesselStatistics, float, float]]]:
    """Eyes of two sites, each drawn with narrow straight, usual and wide winding vessels: found, and the truth."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name, seed in ((name, seed) for name in ("aster", "dune") for seed in (1, 2)):
            drawn = []
            for width, winding in LEVELS:
                patient = replace(draw_patient(SITES[name], seed=seed), vessel_width=width, tortuosity=winding)
                patch.setattr("gretfound.phantom.eye.draw_patient", lambda site, *, seed, patient=patient: patient)
                eye = draw_eye(SITES[name], seed=seed, size_px=576)
                drawn.append((vessels.measure(eye.image), true_density(eye.truth), true_tortuosity(eye.truth)))
            found.append(drawn)
    return found


def test_measure__density_follows_the_drawn_vessels(measured):
    found, truth = np.array([[(each.density, drawn) for each, drawn, _ in eye] for eye in measured]).transpose(2, 0, 1)
    assert (found[:, 2] > found[:, 0]).all(), "in each eye, wider vessels cover more"
    assert spearmanr(found.ravel(), truth.ravel())[0] > 0.6
    assert np.abs(found - truth).mean() < 0.04


def test_measure__tortuosity_follows_the_drawn_vessels(measured):
    # A straight tree is found at 1.01 to 1.02, with other lines than vessels up to 1.06.
    found, truth = np.array([[(each.tortuosity, drawn) for each, _, drawn in eye] for eye in measured]).transpose(
        2, 0, 1
    )
    assert (found[:, 2] > found[:, 0] + 0.02).all(), "in each eye, the most winding vessels are found more winding"
    assert spearmanr(found.ravel(), truth.ravel())[0] > 0.5
    assert np.abs(found - truth).mean() < 0.03


def test_segment__finds_the_drawn_vessels_and_only_in_the_field():
    drawn = draw_eye(SITES["birch"], seed=1, size_px=640)  # its circle is cut at the top and the bottom
    is_vessel_HW, is_seen_HW = vessels.segment(drawn.image, size_px=512)
    assert not (is_vessel_HW & ~is_seen_HW).any()
    assert not is_seen_HW[:20].any() and not is_seen_HW[-20:].any() and is_seen_HW[256, 20:-20].all()
    truth = drawn.truth
    scale = 512 / (2 * truth.fov_radius_px)
    lines = np.concatenate([truth.arteries, truth.veins])
    places = (
        lines[lines[:, :, 2].mean(axis=1) * scale > 4.0][..., :2] - [truth.fov_x_px, truth.fov_y_px]
    ) * scale + 256
    columns, rows = np.clip(places.reshape(-1, 2).round().astype(int), 0, 511).T
    is_in = is_seen_HW[rows, columns]
    near_HW = ndimage.binary_dilation(is_vessel_HW, np.ones((3, 3)))
    assert is_in.sum() > 50
    assert near_HW[rows, columns][is_in].mean() > 0.8 > 2 * near_HW[is_seen_HW].mean()


def test_measure__blank_photograph_has_no_vessels():
    found = vessels.measure(np.full((300, 300, 3), 120, dtype=np.uint8), size_px=256)
    assert found.density == 0.0 and np.isnan(found.fractal_dimension) and np.isnan(found.tortuosity)


def test_measure__enlargement_is_an_error():
    image = draw_eye(SITES["aster"], seed=0, size_px=300).image
    with pytest.raises(ValueError, match=r"found size_px=512 for a field of view of 28\d px; .* no enlargement"):
        vessels.measure(image)
    with pytest.raises(ValueError, match="at least 256"):
        vessels.measure(image, size_px=128)
    assert vessels.vessel_space([image, image], size_px=256).shape == (2, 3)


def table(name: str, num: int, means: tuple[float, float, float], seed: int) -> fidelity.Sample:
    features = np.random.default_rng(seed).normal(means, [0.02, 0.03, 0.01], (num, 3)).astype(np.float32)
    return fidelity.Sample(features=features, image_ids=tuple(f"{name}-{row}" for row in range(num)))


def test_compare__difference_of_means_with_its_interval_and_the_undefined():
    real, generated = table("real", 60, (0.15, 1.30, 1.03), 0), table("generated", 80, (0.10, 1.30, 1.03), 1)
    generated.features[3:6, 2] = np.nan
    found = vessels.compare(real, generated, trained_on=["another"])
    assert tuple(found) == vessels.STATISTICS
    density = found["density"]
    expected = generated.features[:, 0].mean(dtype=np.float64) - real.features[:, 0].mean(dtype=np.float64)
    assert density.difference.value == pytest.approx(expected, abs=1e-12)
    assert density.difference.high < 0.0
    # Two means of independent photographs: the textbook's standard error.
    error = np.sqrt(0.02**2 / 60 + 0.02**2 / 80)
    assert density.difference.high - density.difference.low == pytest.approx(2 * 1.96 * error, rel=0.3)
    assert found["fractal_dimension"].difference.low < 0.0 < found["fractal_dimension"].difference.high
    assert [gap.num_undefined for gap in found.values()] == [(0, 0), (0, 0), (0, 3)]


def test_compare__training_photographs_and_too_few_are_refused():
    real, generated = table("real", 60, (0.1, 1.3, 1.0), 0), table("generated", 19, (0.1, 1.3, 1.0), 1)
    with pytest.raises(LineageError, match="found 1 of 60"):
        vessels.compare(real, generated, trained_on=["real-7"])
    with pytest.raises(ValueError, match="found a density of 60 real and 19 generated photographs; required 20"):
        vessels.compare(real, generated, trained_on=["another"])
