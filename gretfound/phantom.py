"""Drawn colour fundus photographs (CFPs) whose truth is known: the demo's sites, the tests' data, a positive control.

An eye is a pure function of (site, patient seed, eye, size). Disease, age and sex leave marks of structure (lesions,
cup, reflexes, distances), not of mean colour: a linear probe on raw pixels fails where an encoder can succeed.

    python -m gretfound.phantom aster folder --num-images 200 --size-px 224 --seed 0
"""

import argparse
import csv
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Eye = Literal["left", "right"]
Sex = Literal["female", "male"]
Floats = npt.NDArray[np.float32]

CHUNK_IMAGES = 32
MIN_CANVAS_PX = 448
POINTS_PER_VESSEL = 22
DR_WORDS = (
    "no diabetic retinopathy",
    "mild diabetic retinopathy",
    "moderate diabetic retinopathy",
    "severe diabetic retinopathy",
    "proliferative diabetic retinopathy",
)
METADATA_COLUMNS = (
    "Image", "Patient", "Eye", "Age", "Sex", "Ethnicity", "Country", "Camera", "FieldOfView", "DR", "Glaucoma", "AMD"
)  # fmt: skip

# Optical density of blood in red, green and blue; green shows vessels best, as in red-free photography.
# Photographs are painted as (3, H, W) planes: numpy is several times faster on them than on (H, W, 3).
ARTERY_DENSITY = np.array([0.22, 0.80, 0.66], np.float32)[:, None, None]
VEIN_DENSITY = np.array([0.46, 1.00, 0.78], np.float32)[:, None, None]
BLOOD_DENSITY = np.array([0.50, 1.15, 0.90], np.float32)[:, None, None]


@dataclass(frozen=True)
class PhantomSite:
    """A site that photographs phantoms: its camera, its people and how often they are ill.

    Args:
        name: Part of every seed: two sites never draw the same patient.
        country: As `Country` is written in the metadata.
        ethnicities: (word, share, pigmentation in [0, 1]) of each group; shares sum to 1.
        camera: As `Camera` is written in the metadata.
        fov_deg: Angle across the field of view.
        colour: Mean RGB of a healthy background, in [0, 1].
        colour_sd: Spread of each channel's gain between photographs, in log units.
        frame_height: Height of the frame over its width; below `fov_fill` the circle is cut at top and bottom.
        fov_fill: Diameter of the field of view over the width of the frame.
        blur_deg: Standard deviation of the camera's point spread.
        noise: Standard deviation of the sensor's noise, in [0, 1] units of intensity.
        vignette: Relative loss of light at the edge of the field.
        jpeg_quality: Of files written by `write_site`.
        disc_centred_share: Share of photographs centred on the disc instead of the macula.
        age_mean: Years.
        age_sd: Years.
        female_share: Share of female patients.
        dr_shares: Share of patients with ICDR grade 0, 1, 2, 3, 4; sums to 1.
        glaucoma_share: Share of patients.
        amd_share: Share of patients at the age of 70; rises with age.
        both_eyes_share: Share of patients of whom both eyes are photographed.
    """

    name: str
    country: str
    ethnicities: tuple[tuple[str, float, float], ...]
    camera: str
    fov_deg: float
    colour: tuple[float, float, float]
    colour_sd: float = 0.10
    frame_height: float = 1.0
    fov_fill: float = 0.96
    blur_deg: float = 0.08
    noise: float = 0.012
    vignette: float = 0.35
    jpeg_quality: int = 92
    disc_centred_share: float = 0.0
    age_mean: float = 60.0
    age_sd: float = 12.0
    female_share: float = 0.5
    dr_shares: tuple[float, float, float, float, float] = (0.60, 0.12, 0.14, 0.08, 0.06)
    glaucoma_share: float = 0.2
    amd_share: float = 0.2
    both_eyes_share: float = 0.7


SITES: Mapping[str, PhantomSite] = MappingProxyType(
    {
        site.name: site
        for site in (
            PhantomSite(
                name="aster", country="United Kingdom", camera="Topcon TRC-NW8", fov_deg=45.0,
                colour=(0.70, 0.33, 0.15),
                ethnicities=(("White", 0.75, 0.15), ("South Asian", 0.15, 0.55), ("Black", 0.10, 0.85)),
                age_mean=62.0, dr_shares=(0.62, 0.14, 0.12, 0.07, 0.05), glaucoma_share=0.15, amd_share=0.30,
            ),
            PhantomSite(
                name="birch", country="India", camera="Kowa VX-10alpha", fov_deg=50.0, colour=(0.66, 0.36, 0.10),
                ethnicities=(("South Asian", 1.0, 0.55),), frame_height=0.8, fov_fill=0.9, blur_deg=0.11, noise=0.016,
                age_mean=54.0, female_share=0.4, dr_shares=(0.35, 0.12, 0.25, 0.16, 0.12), glaucoma_share=0.15,
                amd_share=0.12,
            ),
            PhantomSite(
                name="cedar", country="Nigeria", camera="Nidek AFC-330", fov_deg=40.0, colour=(0.58, 0.24, 0.12),
                ethnicities=(("Black", 1.0, 0.85),), vignette=0.45, noise=0.02, jpeg_quality=88,
                disc_centred_share=0.25, age_mean=56.0, female_share=0.55, dr_shares=(0.66, 0.10, 0.12, 0.07, 0.05),
                glaucoma_share=0.40, amd_share=0.10,
            ),
            PhantomSite(
                name="dune", country="Spain", camera="Zeiss Visucam 500", fov_deg=45.0, colour=(0.76, 0.42, 0.26),
                ethnicities=(("White", 0.6, 0.2), ("Hispanic", 0.4, 0.45)), fov_fill=0.92, blur_deg=0.09, noise=0.010,
                vignette=0.25, age_mean=63.0, age_sd=11.0, dr_shares=(0.30, 0.20, 0.20, 0.15, 0.15),
                glaucoma_share=0.5, amd_share=0.5,
            ),
            PhantomSite(
                name="public", country="Portugal", camera="mixed", fov_deg=45.0, colour=(0.68, 0.34, 0.17),
                ethnicities=(("White", 0.4, 0.2), ("East Asian", 0.3, 0.4), ("South Asian", 0.2, 0.55),
                             ("Black", 0.1, 0.85)), colour_sd=0.16, disc_centred_share=0.1, noise=0.014, vignette=0.4,
                age_mean=58.0, age_sd=15.0, dr_shares=(0.5, 0.13, 0.15, 0.12, 0.10), glaucoma_share=0.25,
                amd_share=0.25,
            ),
        )
    }
)  # fmt: skip


@dataclass(frozen=True)
class PhantomPatient:
    """What two eyes of one patient share.

    Args:
        age: Whole years.
        dr: The worse eye's ICDR grade, as drawn from the site's shares.
        pigmentation: Of the background, in [0, 1].
        tortuosity: Amplitude of the vessels' windings, in radians.
        vessel_width: Relative calibre of all vessels, near 1.
        artery_vein_ratio: Arterial over venous calibre.
        branching_rad: Mean branching angle.
        tone: Log gain of the patient's fundus in R, G, B.
    """

    age: int
    sex: Sex
    ethnicity: str
    dr: int
    glaucoma: bool
    amd: bool
    pigmentation: float
    tortuosity: float
    vessel_width: float
    artery_vein_ratio: float
    branching_rad: float
    tone: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class PhantomTruth:
    """Everything that was drawn. Pixels: x to the right, y down, the centre of the first pixel is (0, 0).

    Args:
        seed: The patient's seed.
        age: Whole years.
        dr: ICDR grade 0-4 of this eye.
        fov_radius_px: Of the whole circle, also where the frame cuts it.
        px_per_deg: Pixels in a degree of visual angle.
        rotation_rad: Of the camera, clockwise on the image.
        disc_radius_px: Vertical half axis of the disc, along the eye's own vertical; the horizontal one is 0.92 of it.
        cup_disc_ratio: Vertical cup-to-disc ratio in (0, 1).
        cup_x_px: Centre of the cup.
        arteries: (num_vessels, points, 3): x, y and width in pixels along each centre line, from the disc outwards.
        veins: As `arteries`.
        microaneurysms: (num, 3): x, y, radius in pixels; so are the lesions below.
        haemorrhages: Dot, blot and, in grade 4, preretinal ones.
        exudates: Hard exudates.
        cotton_wool_spots: Soft, pale, at most a few.
        drusen: Soft large ones in AMD; few small ones in some healthy eyes.
        neovascular_tufts: Tangles of new vessels, grade 4 only; the radius holds the tangle.
    """

    site: str
    seed: int
    eye: Eye
    age: int
    sex: Sex
    ethnicity: str
    dr: int
    glaucoma: bool
    amd: bool
    width_px: int
    height_px: int
    fov_x_px: float
    fov_y_px: float
    fov_radius_px: float
    px_per_deg: float
    rotation_rad: float
    disc_x_px: float
    disc_y_px: float
    disc_radius_px: float
    cup_x_px: float
    cup_y_px: float
    cup_disc_ratio: float
    fovea_x_px: float
    fovea_y_px: float
    arteries: Floats = field(repr=False)
    veins: Floats = field(repr=False)
    microaneurysms: Floats = field(repr=False)
    haemorrhages: Floats = field(repr=False)
    exudates: Floats = field(repr=False)
    cotton_wool_spots: Floats = field(repr=False)
    drusen: Floats = field(repr=False)
    neovascular_tufts: Floats = field(repr=False)


@dataclass(frozen=True, eq=False)
class Phantom:
    """A drawn photograph, (H, W, 3) uint8 RGB, and its truth."""

    image: npt.NDArray[np.uint8]
    truth: PhantomTruth


def _stream(site: PhantomSite, seed: int, *matter: str) -> np.random.Generator:
    """Opens the random numbers of one matter, so that a change in one (a grade) leaves the others (vessels) alone."""
    return np.random.default_rng([seed, zlib.crc32(site.name.encode()), *(zlib.crc32(m.encode()) for m in matter)])


def _clipped_normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    return float(np.clip(rng.normal(mean, sd), low, high))


def draw_patient(site: PhantomSite, *, seed: int) -> PhantomPatient:
    """Draws a patient of the site: a pure function of its arguments."""
    rng = _stream(site, seed, "patient")
    age = round(_clipped_normal(rng, site.age_mean, site.age_sd, 18, 95))
    sex: Sex = "female" if rng.random() < site.female_share else "male"
    shares = np.array([share for _, share, _ in site.ethnicities])
    ethnicity, _, pigmentation = site.ethnicities[int(np.searchsorted(np.cumsum(shares), rng.random() * 0.999999))]
    dr = int(np.searchsorted(np.cumsum(site.dr_shares), rng.random() * 0.999999))
    amd_odds = site.amd_share / max(1e-9, 1 - site.amd_share) * np.exp(0.04 * (age - 70))
    return PhantomPatient(
        age=age,
        sex=sex,
        ethnicity=ethnicity,
        dr=dr,
        glaucoma=bool(rng.random() < site.glaucoma_share),
        amd=bool(rng.random() < amd_odds / (1 + amd_odds)),
        pigmentation=_clipped_normal(rng, pigmentation, 0.12, 0, 1),
        tortuosity=_clipped_normal(rng, 0.17 + (0.04 if sex == "female" else 0.0), 0.05, 0.06, 0.40),
        vessel_width=_clipped_normal(rng, 1.0, 0.08, 0.75, 1.25),
        artery_vein_ratio=_clipped_normal(rng, 0.80 - 0.003 * (age - 60), 0.04, 0.55, 0.95),
        branching_rad=_clipped_normal(rng, 0.85, 0.10, 0.55, 1.15),
        tone=(rng.normal(0, 0.04), rng.normal(0, 0.05), rng.normal(0, 0.10)),
    )


@dataclass(frozen=True)
class _View:
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
class _Landmarks:
    """Where disc, cup and fovea lie, x and y in pixels; the disc's vertical half axis, and the cup's share of it."""

    disc: tuple[float, float]
    cup: tuple[float, float]
    fovea: tuple[float, float]
    disc_radius: float
    cup_disc_ratio: float


def _view(site: PhantomSite, seed: int, eye: Eye, disc_deg: Floats, size_px: int) -> _View:
    rng = _stream(site, seed, eye, "view")
    width, height = size_px, round(size_px * site.frame_height)
    radius = 0.5 * site.fov_fill * width * rng.uniform(0.985, 1.0)
    is_disc_centred = rng.random() < site.disc_centred_share
    centre = (disc_deg if is_disc_centred else disc_deg * rng.uniform(0.1, 0.4)) + rng.normal(0, 1.6, 2)
    return _View(
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
class _Vessels:
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


def _grow(
    rng: np.random.Generator,
    starts: npt.NDArray[np.float64],
    first: npt.NDArray[np.float64],
    last: npt.NDArray[np.float64],
    bend_deg: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.float64],
    calibres: npt.NDArray[np.float64],
    is_vein: npt.NDArray[np.bool_],
    tortuosity: float,
) -> _Vessels:
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
    return _Vessels(points, calibres[:, None] * taper, headings, lengths, is_vein)


def _branch(rng: np.random.Generator, parents: _Vessels, num_each: int, patient: PhantomPatient) -> _Vessels:
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
    return _grow(
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


def _draw_tree(rng: np.random.Generator, patient: PhantomPatient, disc_deg: Floats, is_beaded: bool) -> list[_Vessels]:
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
        trunks.append(_grow(rng, start, first, last, bend, plan[:, 3], calibre, is_vein, patient.tortuosity))
    branches = [_branch(rng, trunks[0], 8, patient), _branch(rng, trunks[1], 3, patient)]
    twigs = [_branch(rng, branches[0], 3, patient)]
    arcades = trunks[0]
    if is_beaded:
        beads = 1 + 0.32 * np.sin(np.arange(POINTS_PER_VESSEL) * 2.1)
        widths = np.where(arcades.is_vein[:, None], arcades.widths * beads * 1.15, arcades.widths)
        arcades = _Vessels(arcades.points, widths, arcades.headings, arcades.lengths, arcades.is_vein)
    return [*twigs, *branches, trunks[1], arcades]


def _ribbons(points_px: Floats, widths_px: Floats) -> Floats:
    """Outlines each centre line: (N, P, 2) and (N, P) to polygons (N, 2 P, 2)."""
    tangent = np.gradient(points_px, axis=1)
    tangent /= np.maximum(np.hypot(tangent[..., :1], tangent[..., 1:]), 1e-6)
    normal = np.stack([-tangent[..., 1], tangent[..., 0]], axis=-1) * (widths_px[..., None] / 2)
    return np.concatenate([points_px + normal, (points_px - normal)[:, ::-1]], axis=1)


@dataclass(frozen=True)
class _Lesions:
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


def _draw_lesions(
    site: PhantomSite, seed: int, eye: Eye, *, dr: int, amd: bool, age: int, disc_deg: Floats, view: _View
) -> _Lesions:
    """Places the lesions of an ICDR grade and of AMD.

    Source: Wilkinson et al., Ophthalmology 2003 (ICDR): 1 microaneurysms only; 2 more than that; 3 many haemorrhages in
    every quadrant or venous beading; 4 new vessels or preretinal haemorrhage.
    """
    rng = _stream(site, seed, eye, "retinopathy")
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

    rng = _stream(site, seed, eye, "drusen")
    num, radius, spread = (
        (int(rng.integers(28, 80)), (0.26, 0.75), rng.uniform(2.6, 4.2))
        if amd
        else (int(rng.integers(0, 7) * (rng.random() < (age - 30) / 80)), (0.18, 0.30), 5.0)
    )
    drusen = _scatter(rng, num, radius, lambda many: rng.normal(0, spread, (many, 2)), disc_deg)
    none = np.zeros((0, 3), np.float32)
    return _Lesions(aneurysms, blots, np.concatenate([none, *clusters]), wool, drusen, tufts)


class _Canvas:
    """A supersampled single-channel drawing, reduced to the frame with a box filter."""

    def __init__(self, view: _View) -> None:
        self.factor = max(2 if view.width_px <= 1024 else 1, -(-MIN_CANVAS_PX // view.width_px))
        self.picture = Image.new("L", (view.width_px * self.factor, view.height_px * self.factor))
        self.pen = ImageDraw.Draw(self.picture)

    def place(self, points_px: Floats) -> Floats:
        return (points_px + 0.5) * self.factor - 0.5

    def vessels(self, points_px: Floats, widths_px: Floats, strength: float = 1.0) -> None:
        """Draws ribbons; one thinner than a canvas pixel is drawn a pixel wide and fainter."""
        points, widths = self.place(points_px), widths_px * self.factor
        width, height = self.picture.size
        low, high = points.min(1), points.max(1)
        is_inside = (low[:, 0] < width) & (low[:, 1] < height) & (high[:, 0] > 0) & (high[:, 1] > 0)
        points, widths = points[is_inside], widths[is_inside]
        # Pillow's polygons cover their border pixels: about one pixel wider than asked.
        outlines = _ribbons(points, np.maximum(widths - 0.8, 0.1))
        fills = 255 * strength * np.clip(widths.mean(1) / 1.3, 0.25, 1.0)
        self._fill(outlines, fills)

    def blobs(self, rng: np.random.Generator, blobs_px: Floats, roughness: float, strength: float = 1.0) -> None:
        """Draws irregular blobs (N, 3); the random numbers don't depend on the size of the frame."""
        num_corners = 16
        turn = np.linspace(0, 2 * np.pi, num_corners, endpoint=False)
        shape = 1 + roughness * rng.uniform(-1, 1, (len(blobs_px), num_corners))
        stretch = rng.uniform(0.85, 1.15, (len(blobs_px), 1))
        radius = np.maximum(blobs_px[:, 2:] * self.factor, 0.7)
        fills = 255 * strength * np.minimum(1, (blobs_px[:, 2:] * self.factor / radius) ** 2)
        corners = self.place(blobs_px[:, None, :2]) + np.stack(
            [radius * shape * np.cos(turn) * stretch, radius * shape * np.sin(turn) / stretch], axis=-1
        )
        self._fill(corners, fills)

    def _fill(self, outlines: npt.NDArray[np.floating], fills: npt.NDArray[np.floating]) -> None:
        num, corners, _ = outlines.shape
        for outline, fill in zip(outlines.reshape(num, 2 * corners).tolist(), fills.ravel().tolist(), strict=True):
            self.pen.polygon(outline, fill=int(fill))

    def density(self, blur_px: float = 0.0) -> Floats:
        """Returns what was drawn, (H, W) in [0, 1], blurred by `blur_px` pixels of the frame."""
        picture = self.picture.reduce(self.factor)
        if blur_px > 0:
            picture = picture.filter(ImageFilter.GaussianBlur(blur_px))
        return np.asarray(picture, np.float32) * np.float32(1 / 255)


def _cloud(rng: np.random.Generator, view: _View, num_x: int, num_y: int) -> Floats:
    """Draws smooth noise, (H, W) of unit variance, with `num_x` by `num_y` cells over the square round the frame."""
    cells = rng.standard_normal((num_y + 1, num_x + 1), np.float32)
    margin = (1 - view.height_px / view.width_px) / 2 * num_y
    box = (0.5, 0.5 + margin, num_x + 0.5, num_y + 0.5 - margin)
    return np.asarray(
        Image.fromarray(cells).resize((view.width_px, view.height_px), Image.Resampling.BICUBIC, box), np.float32
    )


def _glow(view: _View, x_px: float, y_px: float, sd_px: float) -> Floats:
    """A round Gaussian of height 1, (H, W)."""
    across = np.exp(-0.5 * ((np.arange(view.width_px, dtype=np.float32) - x_px) / sd_px) ** 2)
    down = np.exp(-0.5 * ((np.arange(view.height_px, dtype=np.float32) - y_px) / sd_px) ** 2)
    return np.outer(down, across).astype(np.float32)


def _paint_disc(rng: np.random.Generator, fundus: Floats, view: _View, eye_px: _Landmarks) -> None:
    """Paints disc and cup into `fundus` (3, H, W) in place; most of what a cup adds to the mean is taken off again."""
    (disc_x, disc_y), radius, ratio = eye_px.disc, eye_px.disc_radius, eye_px.cup_disc_ratio
    left, top = max(0, int(disc_x - 1.6 * radius)), max(0, int(disc_y - 1.6 * radius))
    patch = fundus[:, top : max(0, int(disc_y + 1.6 * radius) + 2), left : max(0, int(disc_x + 1.6 * radius) + 2)]
    pallor, redness = rng.normal(0, 0.10), rng.normal(0, 0.05)
    side = rng.normal(0, 0.06)
    if patch.size == 0:
        return
    y, x = np.mgrid[top : top + patch.shape[1], left : left + patch.shape[2]].astype(np.float32)
    cos, sin = np.cos(view.rotation_rad), np.sin(view.rotation_rad)

    def inside(centre_x: float, centre_y: float, half_x: float, half_y: float, edge_px: float) -> Floats:
        across, down = cos * (x - centre_x) + sin * (y - centre_y), cos * (y - centre_y) - sin * (x - centre_x)
        distance = (np.hypot(across / half_x, down / half_y) - 1) * half_y
        return np.asarray(1 / (1 + np.exp(np.clip(distance / edge_px, -30, 30))), np.float32)

    disc = inside(disc_x, disc_y, 0.92 * radius, radius, max(0.25, 0.05 * radius))
    cup = inside(*eye_px.cup, 0.95 * ratio * radius, ratio * radius, max(0.25, 0.07 * radius))
    crescent = inside(disc_x - view.mirror * 0.2 * radius, disc_y, 1.05 * radius, 1.05 * radius, 0.12 * radius)
    cup -= 0.6 * (cup * disc).sum() / disc.sum()
    base = fundus.mean((1, 2))
    rim = _planes(base * [1.22 + redness, 1.55 + pallor, 1.35 + pallor] + [0.03, 0.05, 0.03])
    paler = _planes(np.array([0.10, 0.32, 0.38]) * (base.mean() / 0.4))
    tilt = 1 + np.float32(side / radius) * (x - disc_x)
    patch *= 1 + 0.18 * crescent * (1 - disc)
    patch += disc * ((rim + cup * paler) * tilt - patch)


def _planes(colour: npt.ArrayLike) -> Floats:
    """Shapes one value a channel so that it multiplies (3, H, W) planes."""
    return np.asarray(colour, np.float32)[:, None, None]


def _level(change: Floats) -> Floats:
    """Takes the slow part out of what lesions changed, (3, H, W), so that no mean colour tells of disease."""
    height, width = change.shape[1:]
    cell = max(1, width // 8)
    for plane in change:
        coarse = Image.fromarray(plane).resize((-(-width // cell), -(-height // cell)), Image.Resampling.BOX)
        plane -= np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return change


def _paint_background(rng: np.random.Generator, colour: Floats, view: _View, eye_px: _Landmarks, age: int) -> Floats:
    """Paints pigment, choroid (its tessellation grows with age), macula and foveal reflex: (3, H, W)."""
    scale = view.px_per_deg
    cloud = 0.05 * _cloud(rng, view, 5, 5) + 0.025 * _cloud(rng, view, 22, 22) + 0.02 * _cloud(rng, view, 70, 70)
    ridges = np.abs(_cloud(rng, view, 30, 16)) + np.abs(_cloud(rng, view, 16, 30))
    tessellation = float(np.clip(0.055 + 0.035 * (age - 60) / 15 + rng.normal(0, 0.015), 0.0, 0.2))
    choroid = tessellation * (ridges - 1.6) * (1 - 0.7 * _glow(view, *eye_px.fovea, 5 * scale))
    macula = rng.uniform(0.16, 0.28) * _glow(view, *eye_px.fovea, 3.4 * scale)
    macula += rng.uniform(0.25, 0.42) * _glow(view, *eye_px.fovea, 1.15 * scale)
    sheen = rng.uniform(0.06, 0.2) * _glow(view, *eye_px.disc, rng.uniform(5.0, 8.0) * scale)
    pigments = np.array([0.55, 1.0, 1.15])
    shade = (cloud - macula + sheen) * _planes(0.5 + 0.5 * pigments) - choroid * _planes(pigments)
    fundus: Floats = _planes(colour) * np.clip(1 + shade, 0.1, 3)
    if age < 45:
        fundus += (0.10 * (45 - age) / 25) * _glow(view, *eye_px.fovea, 0.22 * scale)
    return fundus


def _paint_vessels(
    rng: np.random.Generator, fundus: Floats, view: _View, eye_px: _Landmarks, tree: list[_Vessels], age: int
) -> tuple[Floats, Floats]:
    """Paints the vessels, thinnest first, into `fundus` in place; returns centre lines of arteries and of veins.

    Stiffer arteries of the old have a broader reflex. The fovea has no vessels.
    """
    centre_lines: dict[bool, list[Floats]] = {False: [], True: []}
    canvases = {False: _Canvas(view), True: _Canvas(view)}
    for vessels in tree:
        points, widths = view.place(vessels.points), (vessels.widths * view.px_per_deg).astype(np.float32)
        for is_vein, canvas in canvases.items():
            chosen = vessels.is_vein == is_vein
            canvas.vessels(points[chosen], widths[chosen], 1.0 if vessels is tree[-1] else 0.85)
            centre_lines[is_vein].append(np.concatenate([points[chosen], widths[chosen, :, None]], axis=2))
    years = (age - 60) / 15
    stiffness = float(np.clip(0.26 + 0.09 * years, 0.1, 0.5))
    arcades = centre_lines[False][-1]
    reflex = _Canvas(view)
    reflex.vessels(arcades[..., :2], arcades[..., 2] * stiffness)
    contrast = float(np.clip(rng.normal(0.78, 0.07), 0.55, 1.0))
    vascular = contrast * (1 - _glow(view, *eye_px.fovea, 1.3 * view.px_per_deg))
    artery = 0.82 * canvases[False].density() * vascular - 0.30 * (1 + 0.3 * years) * reflex.density()
    fundus *= np.exp(-artery * ARTERY_DENSITY - canvases[True].density() * vascular * VEIN_DENSITY)
    return np.concatenate(centre_lines[False]), np.concatenate(centre_lines[True])


def _paint_lesions(
    rng: np.random.Generator, fundus: Floats, view: _View, colour: Floats, blobs_px: Mapping[str, Floats], amd: bool
) -> Floats:
    """Returns `fundus` with lesions, levelled: dark ones absorb like blood, bright ones cover."""
    scale, glare = view.px_per_deg, float(colour.mean()) / 0.4
    painted = fundus.copy()

    def cover(density: Floats, tint: tuple[float, float, float], shine: float) -> None:
        nonlocal painted
        painted += density * (_planes(colour * tint + shine * glare) - painted)

    if len(blobs_px["drusen"]):
        canvas = _Canvas(view)
        canvas.blobs(rng, blobs_px["drusen"], 0.15, 0.62 if amd else 0.5)
        cover(canvas.density(0.14 * scale), (1.12, 1.5, 1.35), 0.03)
    if any(len(blobs_px[kind]) for kind in ("microaneurysms", "haemorrhages", "neovascular_tufts")):
        canvas = _Canvas(view)
        for *centre, radius in blobs_px["neovascular_tufts"].tolist():
            num, turn = 14, rng.uniform(0, 2 * np.pi, 14)
            tangle = _grow(
                rng, rng.normal(0, 0.25, (num, 2)), turn, turn + rng.normal(0, 1.5, num), np.full(num, 0.8),
                rng.uniform(0.6, 1.2, num), np.full(num, 0.11), np.zeros(num, bool), 0.9,
            )  # fmt: skip
            points = (tangle.points * radius + centre).astype(np.float32)
            canvas.vessels(points, (tangle.widths * radius).astype(np.float32), 0.75)
        canvas.blobs(rng, blobs_px["microaneurysms"], 0.1, 0.95)
        canvas.blobs(rng, blobs_px["haemorrhages"], 0.2, 0.85)
        painted *= np.exp(-canvas.density(0.06 * scale) * BLOOD_DENSITY)
    if len(blobs_px["cotton_wool_spots"]):
        canvas = _Canvas(view)
        canvas.blobs(rng, blobs_px["cotton_wool_spots"], 0.3, 0.7)
        cover(canvas.density(0.3 * scale), (1.15, 1.65, 1.9), 0.06)
    if len(blobs_px["exudates"]):
        canvas = _Canvas(view)
        canvas.blobs(rng, blobs_px["exudates"], 0.25)
        cover(canvas.density(), (1.3, 2.0, 1.4), 0.08)
    return fundus + _level(painted - fundus)


def _expose(
    site: PhantomSite, rng: np.random.Generator, fundus: Floats, view: _View, colour: Floats, age: int
) -> npt.NDArray[np.uint8]:
    """Photographs the fundus: light, haze of the media (grows with age), point spread, noise, the field's edge."""
    years = (age - 60) / 15
    x = (np.arange(view.width_px, dtype=np.float32) - view.fov_x_px) / view.fov_radius_px
    y = (np.arange(view.height_px, dtype=np.float32) - view.fov_y_px)[:, None] / view.fov_radius_px
    off_x, off_y = rng.normal(0, 0.22, 2).tolist()
    slope_x, slope_y = rng.normal(0, 0.10, 2).tolist()
    loss = site.vignette * rng.uniform(0.6, 1.4)
    light = 1 + slope_x * x + slope_y * y - loss * ((x - off_x) ** 2 + (y - off_y) ** 2)
    light += 0.06 * _cloud(rng, view, 3, 3)
    fundus = fundus * np.maximum(light, 0.08)
    haze = float(np.clip(0.10 + 0.07 * years + rng.normal(0, 0.04), 0, 0.4))
    fundus += haze * (_planes(colour * (1 - 0.4 * site.vignette)) - fundus)
    picture = Image.fromarray((np.clip(fundus, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    blur_px = site.blur_deg * view.px_per_deg * float(np.exp(rng.normal(0.15 * years, 0.2)))
    exposed = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur_px)), np.float32)
    edge = np.clip((1 - np.sqrt(x * x + y * y)) * view.fov_radius_px + 0.5, 0, 1, dtype=np.float32)[..., None]
    # Noise is the sensor's: the one thing drawn per pixel of the frame, so it does depend on the size.
    grain = rng.standard_normal(exposed.shape, np.float32) * np.float32(site.noise * 255)
    exposed = (exposed + grain) * edge + np.abs(grain) * (0.3 * (1 - edge))
    image: npt.NDArray[np.uint8] = np.clip(exposed + 0.5, 0, 255).astype(np.uint8)
    return image


def draw_eye(site: PhantomSite, *, seed: int, size_px: int, eye: Eye = "right") -> Phantom:
    """Draws one eye of a patient: a pure function of its arguments.

    The same eye at another size is the same eye: geometry doesn't depend on `size_px`. The same seed at a site that
    differs in prevalence only (`dataclasses.replace`) is the same eye with another disease. No compression is applied;
    `write_site` compresses once, with the site's quality.

    Args:
        site: Camera, people and prevalence.
        seed: The patient's seed, at least 0; both eyes share it.
        size_px: Width of the frame, at least 32; the height is `site.frame_height` of it.
        eye: Which eye; the left one is mirrored.

    Raises:
        ValueError: If `seed`, `size_px` or `eye` is out of range.
    """
    if seed < 0 or size_px < 32 or eye not in ("left", "right"):
        raise ValueError(
            f"found seed={seed}, size_px={size_px}, eye={eye!r}; required a seed of at least 0, at least 32 px, and "
            "left or right"
        )
    patient = draw_patient(site, seed=seed)
    rng = _stream(site, seed, eye, "condition")
    # The fellow eye mostly agrees.
    is_milder, follows = rng.random() < 0.2, (rng.random(2) < 0.9).tolist()
    dr = patient.dr - 1 if patient.dr > 1 and is_milder else patient.dr
    glaucoma, amd = patient.glaucoma and follows[0], patient.amd and follows[1]

    rng = _stream(site, seed, eye, "anatomy")
    # The distance from fovea to disc is the other mark of sex.
    distance = rng.normal(14.9 if patient.sex == "female" else 15.9, 0.5)
    disc_deg = np.array([distance, rng.normal(-1.6, 0.7)], np.float32)
    disc_radius = _clipped_normal(rng, 3.2, 0.2, 2.6, 3.8)
    cup_normal = rng.normal()
    ratio = float(np.clip(0.74 + 0.07 * cup_normal if glaucoma else 0.40 + 0.09 * cup_normal, 0.12, 0.92))
    cup_deg = disc_deg + np.clip(rng.normal(0, 0.12, 2), -0.3, 0.3) * disc_radius * (1 - ratio)
    view = _view(site, seed, eye, disc_deg, size_px)
    disc, cup, fovea = ((float(x), float(y)) for x, y in view.place(np.stack([disc_deg, cup_deg, np.zeros(2)])))
    eye_px = _Landmarks(disc, cup, fovea, disc_radius * view.px_per_deg, ratio)

    rng = _stream(site, seed, eye, "background")
    gain = np.exp(rng.normal(0, site.colour_sd, 3) * [0.7, 0.7, 1.3] + patient.tone + rng.normal(0, 0.14))
    melanin = np.exp(-(patient.pigmentation - 0.4) * np.array([0.25, 0.40, 0.30]))
    colour = (np.array(site.colour) * gain * melanin).astype(np.float32)
    fundus = _paint_background(rng, colour, view, eye_px, patient.age)
    _paint_disc(_stream(site, seed, eye, "disc"), fundus, view, eye_px)
    rng = _stream(site, seed, eye, "vessels")
    tree = _draw_tree(rng, patient, disc_deg, is_beaded=dr >= 3)
    arteries, veins = _paint_vessels(rng, fundus, view, eye_px, tree, patient.age)
    lesions = _draw_lesions(site, seed, eye, dr=dr, amd=amd, age=patient.age, disc_deg=disc_deg, view=view)
    blobs_px = {kind: view.place_blobs(blobs) for kind, blobs in vars(lesions).items()}
    if any(len(blobs) for blobs in blobs_px.values()):
        fundus = _paint_lesions(_stream(site, seed, eye, "lesions"), fundus, view, colour, blobs_px, amd)
    image = _expose(site, _stream(site, seed, eye, "camera"), fundus, view, colour, patient.age)
    truth = PhantomTruth(
        site=site.name,
        seed=seed,
        eye=eye,
        age=patient.age,
        sex=patient.sex,
        ethnicity=patient.ethnicity,
        dr=dr,
        glaucoma=glaucoma,
        amd=amd,
        width_px=view.width_px,
        height_px=view.height_px,
        fov_x_px=view.fov_x_px,
        fov_y_px=view.fov_y_px,
        fov_radius_px=view.fov_radius_px,
        px_per_deg=view.px_per_deg,
        rotation_rad=view.rotation_rad,
        disc_x_px=eye_px.disc[0],
        disc_y_px=eye_px.disc[1],
        disc_radius_px=eye_px.disc_radius,
        cup_x_px=eye_px.cup[0],
        cup_y_px=eye_px.cup[1],
        cup_disc_ratio=ratio,
        fovea_x_px=eye_px.fovea[0],
        fovea_y_px=eye_px.fovea[1],
        arteries=arteries,
        veins=veins,
        **blobs_px,
    )
    return Phantom(image, truth)


def list_eyes(site: PhantomSite, *, num_images: int, seed: int) -> list[tuple[int, Eye]]:
    """Lists the photographs of a site: (patient's seed, eye), at most one of each eye of a patient.

    A longer list begins with the shorter one; the patients of two seeds differ.
    """
    photographs: list[tuple[int, Eye]] = []
    for index in count():
        patient_seed = seed * 2**32 + index
        rng = _stream(site, patient_seed, "visit")
        eyes: tuple[Eye, Eye] = ("right", "left") if rng.random() < 0.5 else ("left", "right")
        photographs.extend((patient_seed, eye) for eye in (eyes if rng.random() < site.both_eyes_share else eyes[:1]))
        if len(photographs) >= num_images:
            break
    return photographs[:num_images]


def _write_file(path: Path, content: bytes) -> None:
    """Writes through a temporary file beside it, so that no reader sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as partial:
        partial.write(content)
    Path(partial.name).replace(path)


def _write_eyes(
    site: PhantomSite, folder_path: Path, photographs: list[tuple[int, Eye]], size_px: int, image_format: str
) -> list[list[str]]:
    """Draws and writes some photographs; returns their rows of the metadata."""
    rows = []
    for patient_seed, eye in photographs:
        drawn = draw_eye(site, seed=patient_seed, size_px=size_px, eye=eye)
        truth, patient = drawn.truth, f"{site.name}-{patient_seed:05d}"
        side = "OD" if eye == "right" else "OS"
        name = f"{patient}_{side}.{image_format}"
        encoded = io.BytesIO()
        if image_format == "jpg":
            Image.fromarray(drawn.image).save(encoded, "JPEG", quality=site.jpeg_quality, subsampling=0)
        else:
            Image.fromarray(drawn.image).save(encoded, "PNG")
        _write_file(folder_path / "traindata" / name, encoded.getvalue())
        rows.append([
            name, patient, side, str(truth.age), truth.sex, truth.ethnicity, site.country, site.camera,
            f"{site.fov_deg:g}", DR_WORDS[truth.dr], "glaucoma" if truth.glaucoma else "no glaucoma",
            "age-related macular degeneration" if truth.amd else "no age-related macular degeneration",
        ])  # fmt: skip
    return rows


def write_site(
    site: PhantomSite,
    folder_path: Path,
    *,
    num_images: int,
    seed: int,
    size_px: int,
    image_format: Literal["jpg", "png"] = "jpg",
    num_workers: int | None = None,
) -> Path:
    """Writes a site's folder, `traindata/` and `metadata.csv`, as a data manager would prepare it.

    Equal arguments give equal bytes, whatever the number of workers. The metadata is written last.

    Args:
        folder_path: Made if absent.
        num_workers: Processes; by default one for each core this process may use. Fewer than 64 photographs take none.

    Returns:
        `folder_path`.

    Raises:
        ValueError: If an argument is out of range.
    """
    if image_format not in ("jpg", "png") or num_images < 1 or seed < 0:
        raise ValueError(
            f"found image_format={image_format!r}, num_images={num_images}, seed={seed}; "
            "required jpg or png, at least 1 image and a seed of at least 0"
        )
    folder_path = Path(folder_path)
    (folder_path / "traindata").mkdir(parents=True, exist_ok=True)
    photographs = list_eyes(site, num_images=num_images, seed=seed)
    chunks = [photographs[i : i + CHUNK_IMAGES] for i in range(0, num_images, CHUNK_IMAGES)]
    num_chunks = len(chunks)
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), num_chunks // 2)
    shared = ([site] * num_chunks, [folder_path] * num_chunks, chunks, [size_px] * num_chunks)
    formats = [image_format] * num_chunks
    if num_workers > 1:
        # Spawned, not forked: the caller may hold threads (torch, Ray) that a fork would deadlock.
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            rows = list(chain.from_iterable(pool.map(_write_eyes, *shared, formats)))
    else:
        rows = list(chain.from_iterable(map(_write_eyes, *shared, formats)))
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([METADATA_COLUMNS, *rows])
    _write_file(folder_path / "metadata.csv", table.getvalue().encode())
    return folder_path


def main() -> None:
    """Writes one site's folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m gretfound.phantom", description="Draws a site's CFPs.")
    parser.add_argument("site", choices=sorted(SITES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-format", choices=("jpg", "png"), default="jpg")
    chosen = parser.parse_args()
    write_site(
        SITES[chosen.site],
        chosen.folder,
        num_images=chosen.num_images,
        seed=chosen.seed,
        size_px=chosen.size_px,
        image_format=chosen.image_format,
    )


if __name__ == "__main__":
    main()
