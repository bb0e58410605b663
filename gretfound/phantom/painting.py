"""How an eye looks on a photograph: background, disc, vessels and lesions as layers, then the camera.

Photographs are painted as (3, H, W) planes: numpy is several times faster on them than on (H, W, 3).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from gretfound.phantom.anatomy import Landmarks, Vessels, View, grow
from gretfound.phantom.population import Floats, PhantomSite

MIN_CANVAS_PX = 448
# Optical density of blood in red, green and blue; green shows vessels best, as in red-free photography.
ARTERY_DENSITY = np.array([0.22, 0.80, 0.66], np.float32)[:, None, None]
VEIN_DENSITY = np.array([0.46, 1.00, 0.78], np.float32)[:, None, None]
BLOOD_DENSITY = np.array([0.50, 1.15, 0.90], np.float32)[:, None, None]


def _ribbons(points_px: Floats, widths_px: Floats) -> Floats:
    """Outlines each centre line: (N, P, 2) and (N, P) to polygons (N, 2 P, 2)."""
    tangent = np.gradient(points_px, axis=1)
    tangent /= np.maximum(np.hypot(tangent[..., :1], tangent[..., 1:]), 1e-6)
    normal = np.stack([-tangent[..., 1], tangent[..., 0]], axis=-1) * (widths_px[..., None] / 2)
    return np.concatenate([points_px + normal, (points_px - normal)[:, ::-1]], axis=1)


class _Canvas:
    """A supersampled single-channel drawing, reduced to the frame with a box filter."""

    def __init__(self, view: View) -> None:
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


def _cloud(rng: np.random.Generator, view: View, num_x: int, num_y: int) -> Floats:
    """Draws smooth noise, (H, W) of unit variance, with `num_x` by `num_y` cells over the square round the frame."""
    cells = rng.standard_normal((num_y + 1, num_x + 1), np.float32)
    margin = (1 - view.height_px / view.width_px) / 2 * num_y
    box = (0.5, 0.5 + margin, num_x + 0.5, num_y + 0.5 - margin)
    return np.asarray(
        Image.fromarray(cells).resize((view.width_px, view.height_px), Image.Resampling.BICUBIC, box), np.float32
    )


def _glow(view: View, x_px: float, y_px: float, sd_px: float) -> Floats:
    """A round Gaussian of height 1, (H, W)."""
    across = np.exp(-0.5 * ((np.arange(view.width_px, dtype=np.float32) - x_px) / sd_px) ** 2)
    down = np.exp(-0.5 * ((np.arange(view.height_px, dtype=np.float32) - y_px) / sd_px) ** 2)
    return np.outer(down, across).astype(np.float32)


def paint_disc(rng: np.random.Generator, fundus: Floats, view: View, eye_px: Landmarks) -> None:
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


def paint_background(rng: np.random.Generator, colour: Floats, view: View, eye_px: Landmarks, age: int) -> Floats:
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


def paint_vessels(
    rng: np.random.Generator, fundus: Floats, view: View, eye_px: Landmarks, tree: list[Vessels], age: int
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


def paint_lesions(
    rng: np.random.Generator, fundus: Floats, view: View, colour: Floats, blobs_px: Mapping[str, Floats], amd: bool
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
            tangle = grow(
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


def expose(
    site: PhantomSite, rng: np.random.Generator, fundus: Floats, view: View, colour: Floats, age: int
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
