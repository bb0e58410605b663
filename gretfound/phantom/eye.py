"""A drawn photograph and everything that is true of it."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gretfound.phantom.anatomy import Landmarks, draw_lesions, draw_tree, view_of
from gretfound.phantom.painting import expose, paint_background, paint_disc, paint_lesions, paint_vessels
from gretfound.phantom.population import Eye, Floats, PhantomSite, Sex, clipped_normal, draw_patient, stream


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
    rng = stream(site, seed, eye, "condition")
    # The fellow eye mostly agrees.
    is_milder, follows = rng.random() < 0.2, (rng.random(2) < 0.9).tolist()
    dr = patient.dr - 1 if patient.dr > 1 and is_milder else patient.dr
    glaucoma, amd = patient.glaucoma and follows[0], patient.amd and follows[1]

    rng = stream(site, seed, eye, "anatomy")
    # The distance from fovea to disc is the other mark of sex.
    distance = rng.normal(14.9 if patient.sex == "female" else 15.9, 0.5)
    disc_deg = np.array([distance, rng.normal(-1.6, 0.7)], np.float32)
    disc_radius = clipped_normal(rng, 3.2, 0.2, 2.6, 3.8)
    cup_normal = rng.normal()
    ratio = float(np.clip(0.74 + 0.07 * cup_normal if glaucoma else 0.40 + 0.09 * cup_normal, 0.12, 0.92))
    cup_deg = disc_deg + np.clip(rng.normal(0, 0.12, 2), -0.3, 0.3) * disc_radius * (1 - ratio)
    view = view_of(site, seed, eye, disc_deg, size_px)
    disc, cup, fovea = ((float(x), float(y)) for x, y in view.place(np.stack([disc_deg, cup_deg, np.zeros(2)])))
    eye_px = Landmarks(disc, cup, fovea, disc_radius * view.px_per_deg, ratio)

    rng = stream(site, seed, eye, "background")
    gain = np.exp(rng.normal(0, site.colour_sd, 3) * [0.7, 0.7, 1.3] + patient.tone + rng.normal(0, 0.14))
    melanin = np.exp(-(patient.pigmentation - 0.4) * np.array([0.25, 0.40, 0.30]))
    colour = (np.array(site.colour) * gain * melanin).astype(np.float32)
    fundus = paint_background(rng, colour, view, eye_px, patient.age)
    paint_disc(stream(site, seed, eye, "disc"), fundus, view, eye_px)
    rng = stream(site, seed, eye, "vessels")
    tree = draw_tree(rng, patient, disc_deg, is_beaded=dr >= 3)
    arteries, veins = paint_vessels(rng, fundus, view, eye_px, tree, patient.age)
    lesions = draw_lesions(site, seed, eye, dr=dr, amd=amd, age=patient.age, disc_deg=disc_deg, view=view)
    blobs_px = {kind: view.place_blobs(blobs) for kind, blobs in vars(lesions).items()}
    if any(len(blobs) for blobs in blobs_px.values()):
        fundus = paint_lesions(stream(site, seed, eye, "lesions"), fundus, view, colour, blobs_px, amd)
    image = expose(site, stream(site, seed, eye, "camera"), fundus, view, colour, patient.age)
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
