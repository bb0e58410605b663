"""Who is photographed where: drawn sites, their cameras, their patients."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

Eye = Literal["left", "right"]
Sex = Literal["female", "male"]
Floats = npt.NDArray[np.float32]


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


def stream(site: PhantomSite, seed: int, *matter: str) -> np.random.Generator:
    """Opens the random numbers of one matter, so that a change in one (a grade) leaves the others (vessels) alone."""
    return np.random.default_rng([seed, zlib.crc32(site.name.encode()), *(zlib.crc32(m.encode()) for m in matter)])


def clipped_normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    return float(np.clip(rng.normal(mean, sd), low, high))


def draw_patient(site: PhantomSite, *, seed: int) -> PhantomPatient:
    """Draws a patient of the site: a pure function of its arguments."""
    rng = stream(site, seed, "patient")
    age = round(clipped_normal(rng, site.age_mean, site.age_sd, 18, 95))
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
        pigmentation=clipped_normal(rng, pigmentation, 0.12, 0, 1),
        tortuosity=clipped_normal(rng, 0.17 + (0.04 if sex == "female" else 0.0), 0.05, 0.06, 0.40),
        vessel_width=clipped_normal(rng, 1.0, 0.08, 0.75, 1.25),
        artery_vein_ratio=clipped_normal(rng, 0.80 - 0.003 * (age - 60), 0.04, 0.55, 0.95),
        branching_rad=clipped_normal(rng, 0.85, 0.10, 0.55, 1.15),
        tone=(rng.normal(0, 0.04), rng.normal(0, 0.05), rng.normal(0, 0.10)),
    )
