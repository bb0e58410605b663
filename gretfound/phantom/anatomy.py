"""What an eye consists of: landmarks, vessel trees and lesions, in degrees of visual angle.

The fovea is the origin, x runs to the disc, y down; a view places it all on the pixels of a frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gretfound.phantom.population import Eye, Floats, PhantomPatient, PhantomSite, stream

POINTS_PER_VESSEL = 22


@dataclass(frozen=True)
class View:
    """How an eye's degrees (fovea at the origin, x to the disc, y down) fall on the frame's pixels."""

    width_px: int
    height_px: int
    fov_x_px: float
    fov_y_px: float
    fov_radius_px: float
    px_per_deg: float
    mirror: float
    rotation_rad: float
    centre_deg: tuple[float, float]

    def place(self, points_deg: npt.NDArray[np.floating]) -> Floats:
        """Maps (..., 2) degrees to (..., 2) pixels."""
        shifted = points_deg - np.asarray(self.centre_deg)
        x, y = self.mirror * shifted[..., 0] * self.px_per_deg, shifted[..., 1] * self.px_per_deg
        cos, sin = np.cos(self.rotation_rad), np.sin(self.rotation_rad)
        placed = np.stack([self.fov_x_px + cos * x - sin * y, self.fov_y_px + sin * x + cos * y], axis=-1)
        return placed.astype(np.float32)

    def place_blobs(self, blobs_deg: npt.NDArray[np.floating]) -> Floats:
        """Maps (N, 3) x, y, radius in degrees to pixels."""
        radius = (blobs_deg[:, 2:] * self.px_per_deg).astype(np.float32)
        return np.concatenate([self.place(blobs_deg[:, :2]), radius], axis=1)


@dataclass(frozen=True)
class Landmarks:
    """Where disc, cup and fovea lie, x and y in pixels; the disc's vertical half axis, and the cup's share of it."""

    disc: tuple[float, float]
    cup: tuple[float, float]
    fovea: tuple[float, float]
    disc_radius: float
    cup_disc_ratio: float


def view_of(site: PhantomSite, seed: int, eye: Eye, disc_deg: Floats, size_px: int) -> View:
    rng = stream(site, seed, eye, "view")
    width, height = size_px, round(size_px * site.frame_height)
    radius = 0.5 * site.fov_fill * width * rng.uniform(0.985, 1.0)
    is_disc_centred = rng.random() < site.disc_centred_share
    centre = (disc_deg if is_disc_centred else disc_deg * rng.uniform(0.1, 0.4)) + rng.normal(0, 1.6, 2)
    return View(
        width_px=width,
        height_px=height,
        fov_x_px=(width - 1) / 2 + rng.uniform(-0.008, 0.008) * width,
        fov_y_px=(height - 1) / 2 + rng.uniform(-0.008, 0.008) * width,
        fov_radius_px=radius,
        px_per_deg=2 * radius / site.fov_deg * float(np.exp(rng.normal(0, 0.06))),
        mirror=1.0 if eye == "right" else -1.0,
        rotation_rad=rng.normal(0, 0.10),
        centre_deg=(float(centre[0]), float(centre[1])),
    )


@dataclass(frozen=True)
class Vessels:
    """Centre lines in degrees.

    Args:
        points: (num_vessels, POINTS_PER_VESSEL, 2).
        widths: (num_vessels, POINTS_PER_VESSEL).
        headings: (num_vessels, POINTS_PER_VESSEL), radians from the temporal axis towards superior.
        lengths: (num_vessels,).
        is_vein: (num_vessels,).
    """

    points: npt.NDArray[np.float64]
    widths: npt.NDArray[np.float64]
    headings: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.float64]
    is_vein: npt.NDArray[np.bool_]


def grow(
    rng: np.random.Generator,
    starts: npt.NDArray[np.float64],
    first: npt.NDArray[np.float64],
    last: npt.NDArray[np.float64],
    bend_deg: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.float64],
    calibres: npt.NDArray[np.float64],
    is_vein: npt.NDArray[np.bool_],
    tortuosity: float,
) -> Vessels:
    """Integrates headings that relax from `first` to `last` over `bend_deg` degrees, with windings on top."""
    num = len(starts)
    along = lengths[:, None] * np.linspace(0, 1, POINTS_PER_VESSEL)
    amplitude = tortuosity * rng.uniform(0.5, 1.5, (2, num, 1))
    wavelength = np.stack([rng.uniform(2.2, 4.0, (num, 1)), rng.uniform(5.0, 9.0, (num, 1))])
    phase = rng.uniform(0, 2 * np.pi, (2, num, 1))
    winding = (amplitude * np.sin(2 * np.pi * along / wavelength + phase)).sum(0) * np.minimum(1, along / 1.5)
    headings = last[:, None] + (first - last)[:, None] * np.exp(-along / bend_deg[:, None]) + winding
    step = np.diff(along, axis=1)
    middle = (headings[:, 1:] + headings[:, :-1]) / 2
    offsets = np.cumsum(np.stack([-np.cos(middle) * step, -np.sin(middle) * step], axis=-1), axis=1)
    points = starts[:, None] + np.concatenate([np.zeros((num, 1, 2)), offsets], axis=1)
    taper = np.linspace(1.0, 0.5, POINTS_PER_VESSEL)
    return Vessels(points, calibres[:, None] * taper, headings, lengths, is_vein)


def _branch(rng: np.random.Generator, parents: Vessels, num_each: int, patient: PhantomPatient) -> Vessels:
    """Grows `num_each` thinner branches from each vessel, on alternating sides."""
    num = len(parents.lengths)
    low, high = 0.16, 0.88
    slots = np.linspace(low, high, num_each) + rng.uniform(-0.5, 0.5, (num, num_each)) * (high - low) / num_each
    at = np.clip((slots * POINTS_PER_VESSEL).astype(int), 1, POINTS_PER_VESSEL - 2)
    row = np.arange(num)[:, None]
    side = np.where((np.arange(num_each) + rng.integers(0, 2, (num, 1))) % 2 == 0, 1.0, -1.0)
    heading = parents.headings[row, at]
    angle = patient.branching_rad * rng.uniform(0.7, 1.3, (num, num_each))
    lengths = parents.lengths[:, None] * (1 - 0.6 * slots) * rng.uniform(0.35, 0.6, (num, num_each))
    return grow(
        rng,
        parents.points[row, at].reshape(-1, 2),
        (heading + side * angle).ravel(),
        (heading + side * angle * rng.uniform(0.1, 0.9, (num, num_each))).ravel(),
        lengths.ravel() * 0.5,
        lengths.ravel(),
        (parents.widths[row, at] * rng.uniform(0.5, 0.72, (num, num_each))).ravel(),
        np.repeat(parents.is_vein, num_each),
        patient.tortuosity * 1.2,
    )


def draw_tree(rng: np.random.Generator, patient: PhantomPatient, disc_deg: Floats, is_beaded: bool) -> list[Vessels]:
    """Grows arteries and veins, thinnest first, the arcades last: four arcades each, macular and nasal twigs, branches.

    The temporal arcades leave the disc steeply and bend round the fovea; their opening is one mark of sex.
    """
    opening = -0.07 if patient.sex == "female" else 0.07
    # Superior vessels: first and last heading, degrees over which it bends, length, calibre; inferior ones mirrored.
    major = np.array([(1.75, -0.02 + opening, 10.5, 34.0, 0.70), (1.75, 2.55, 6.0, 24.0, 0.52)])
    minor = np.array([(0.75, 0.12, 4.0, 13.0, 0.26), (2.6, 3.0, 5.0, 14.0, 0.28)])
    trunks = []
    for specs in (major, minor):
        both = np.concatenate([specs * [1, 1, 1, 1, 1], specs * [-1, -1, 1, 1, 1]])
        plan = np.concatenate([both, both])
        num = len(plan)
        is_vein = np.arange(num) >= num // 2
        jitter = rng.normal(0, 1, (num, 3))
        # A vein and its artery leave side by side; the vein arches wider.
        first = plan[:, 0] + 0.12 * jitter[:, 0]
        last = plan[:, 1] + 0.10 * jitter[:, 1] + np.sign(plan[:, 1]) * np.where(is_vein, 0.06, -0.06)
        calibre = plan[:, 4] * patient.vessel_width * np.where(is_vein, 1.0, patient.artery_vein_ratio)
        start = disc_deg + rng.normal(0, 0.45, (num, 2)) + [0.35, 0]
        bend = plan[:, 2] * np.exp(0.12 * jitter[:, 2]) * np.where(is_vein, 1.08, 0.94)
        trunks.append(grow(rng, start, first, last, bend, plan[:, 3], calibre, is_vein, patient.tortuosity))
    branches = [_branch(rng, trunks[0], 8, patient), _branch(rng, trunks[1], 3, patient)]
    twigs = [_branch(rng, branches[0], 3, patient)]
    arcades = trunks[0]
    if is_beaded:
        beads = 1 + 0.32 * np.sin(np.arange(POINTS_PER_VESSEL) * 2.1)
        widths = np.where(arcades.is_vein[:, None], arcades.widths * beads * 1.15, arcades.widths)
        arcades = Vessels(arcades.points, widths, arcades.headings, arcades.lengths, arcades.is_vein)
    return [*twigs, *branches, trunks[1], arcades]


@dataclass(frozen=True)
class Lesions:
    """(N, 3) x, y, radius in degrees of each kind."""

    microaneurysms: Floats
    haemorrhages: Floats
    exudates: Floats
    cotton_wool_spots: Floats
    drusen: Floats
    neovascular_tufts: Floats


def _scatter(
    rng: np.random.Generator,
    num: int,
    radius: tuple[float, float],
    place: Callable[[int], npt.NDArray[np.floating]],
    disc_deg: Floats,
    clear_deg: float = 0.0,
) -> Floats:
    """Places lesions off the disc and at least `clear_deg` from the fovea; draws thrice as many places as needed."""
    xy = place(3 * num)
    is_free = np.hypot(*(xy - disc_deg).T) > 4.2
    is_free &= np.hypot(*xy.T) > clear_deg
    xy = xy[is_free][:num]
    # Small lesions outnumber large ones.
    size = radius[0] + (radius[1] - radius[0]) * rng.random(len(xy)) ** 1.5
    return np.column_stack([xy, size]).astype(np.float32)


def draw_lesions(
    site: PhantomSite, seed: int, eye: Eye, *, dr: int, amd: bool, age: int, disc_deg: Floats, view: View
) -> Lesions:
    """Places the lesions of an ICDR grade and of AMD.

    Source: Wilkinson et al., Ophthalmology 2003 (ICDR): 1 microaneurysms only; 2 more than that; 3 many haemorrhages in
    every quadrant or venous beading; 4 new vessels or preretinal haemorrhage.
    """
    rng = stream(site, seed, eye, "retinopathy")
    reach = 0.93 * view.fov_radius_px / view.px_per_deg
    # In the eye's own frame, so that what lies in the photograph doesn't depend on rotation.
    middle = np.asarray(view.centre_deg)

    def everywhere(num: int) -> npt.NDArray[np.floating]:
        angle, distance = rng.uniform(0, 2 * np.pi, num), reach * np.sqrt(rng.random(num))
        return middle + np.column_stack([np.cos(angle), np.sin(angle)]) * distance[:, None]

    def between(low: Sequence[int], high: Sequence[int]) -> int:
        return int(rng.integers(low[dr], high[dr] + 1))

    aneurysms = _scatter(rng, between([0, 4, 8, 15, 10], [0, 11, 20, 35, 30]), (0.20, 0.34), everywhere, disc_deg, 0.5)
    blots = _scatter(rng, between([0, 0, 4, 22, 8], [0, 0, 14, 45, 30]), (0.32, 1.0), everywhere, disc_deg, 0.8)
    clusters = []
    for _ in range(between([0, 0, 0, 1, 0], [0, 0, 2, 3, 3])):
        centre, spread = rng.normal(0, 5.5, 2), rng.uniform(0.9, 2.4)
        ring = rng.random() < 0.5

        def cluster(
            num: int, centre: npt.NDArray[np.floating] = centre, spread: float = spread, ring: bool = ring
        ) -> npt.NDArray[np.floating]:
            angle = rng.uniform(0, 2 * np.pi, num)
            distance = spread * (rng.normal(1, 0.15, num) if ring else np.abs(rng.normal(0, 0.8, num)))
            return centre + np.column_stack([np.cos(angle), np.sin(angle)]) * distance[:, None]

        clusters.append(_scatter(rng, int(rng.integers(8, 26)), (0.13, 0.42), cluster, disc_deg, 0.5))
    wool = _scatter(rng, between([0, 0, 0, 1, 0], [0, 0, 1, 5, 4]), (0.7, 1.3), everywhere, disc_deg, 3.0)
    tufts = _scatter(rng, between([0, 0, 0, 0, 1], [0, 0, 0, 0, 3]), (1.6, 2.8), everywhere, disc_deg, 4.0)
    if dr == 4 and rng.random() < 0.45:
        blots = np.concatenate([blots, _scatter(rng, 1, (1.6, 2.8), everywhere, disc_deg, 4.0)])

    rng = stream(site, seed, eye, "drusen")
    num, radius, spread = (
        (int(rng.integers(28, 80)), (0.26, 0.75), rng.uniform(2.6, 4.2))
        if amd
        else (int(rng.integers(0, 7) * (rng.random() < (age - 30) / 80)), (0.18, 0.30), 5.0)
    )
    drusen = _scatter(rng, num, radius, lambda many: rng.normal(0, spread, (many, 2)), disc_deg)
    none = np.zeros((0, 3), np.float32)
    return Lesions(aneurysms, blots, np.concatenate([none, *clusters]), wool, drusen, tufts)
