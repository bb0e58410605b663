"""Inspection: drawn photographs pass, and each fault is named, whatever the size in pixels."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from gretfound import fundus, inspection, phantom
from gretfound.fundus import Photograph


def drawn(seed: int = 0, *, site_id: str = "aster", size_px: int = 128) -> Photograph:
    image: Photograph = phantom.draw_eye(phantom.SITES[site_id], seed=seed, size_px=size_px).image
    return image


def judge(image: Photograph) -> str | None:
    return inspection.Inspector(num_images=1).judge(image)


def blurred(image: Photograph, share: float) -> Photograph:
    planes = [ndimage.gaussian_filter(image[:, :, place], share * image.shape[1]) for place in range(3)]
    return np.stack(planes, axis=-1)


def scaled(image: Photograph, factor: float) -> Photograph:
    return np.clip(image * factor, 0, 255).astype(np.uint8)


def flattened(image: Photograph, factor: float) -> Photograph:
    field_of_view = fundus.find_field_of_view(image)
    assert field_of_view is not None
    within = fundus.inside_mask(image.shape, field_of_view)
    flat, mean = image.astype(np.float32), image[within].mean(axis=0)
    flat[within] = mean + factor * (flat[within] - mean)
    return flat.astype(np.uint8)


def grainy(image: Photograph) -> Photograph:
    noise = np.random.default_rng(0).normal(0, 40, image.shape) * (image.max(axis=2, keepdims=True) > 20)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def shaded(image: Photograph) -> Photograph:
    return np.ascontiguousarray(np.broadcast_to(np.linspace(40, 220, len(image))[:, None, None], image.shape), np.uint8)


@pytest.mark.parametrize("site_id", phantom.SITES)
@pytest.mark.parametrize("size_px", [64, 256])
def test_judge__drawn_photographs_of_every_site_pass(site_id: str, size_px: int) -> None:
    inspector = inspection.Inspector(num_images=4)
    assert [inspector.judge(drawn(seed, site_id=site_id, size_px=size_px)) for seed in range(4)] == [None] * 4


@pytest.mark.parametrize("size_px", [64, 256])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda image: blurred(image, 0.1), "blurred"),
        (lambda image: flattened(image, 0.1), "low contrast"),
        (lambda image: scaled(image, 0.15), "underexposed"),
        (lambda image: scaled(image, 6.0), "overexposed"),
        (grainy, "noisy"),
        (shaded, "no field of view"),
        (lambda image: np.full_like(image, 90), "blank"),
    ],
)  # fmt: skip
def test_judge__names_the_fault(spoil: Callable[[Photograph], Photograph], reason: str, size_px: int) -> None:
    image = drawn(1, size_px=size_px)
    assert judge(image) is None
    assert judge(spoil(image)) == reason


def test_measure_quality__of_a_disc_is_the_closed_form() -> None:
    y, x = np.mgrid[:201, :201] - 100.0
    stripes = np.where(x.astype(int) % 2 == 0, 110, 90)
    image = np.where((np.hypot(y, x) < 95)[..., None], np.stack([stripes * 2, stripes, stripes], -1), 0).astype(
        np.uint8
    )
    field_of_view = fundus.FieldOfView(x_px=100.5, y_px=100.5, radius_px=100.5)
    found = inspection.measure_quality(image, field_of_view)
    assert found.sharpness == pytest.approx(40, abs=0.5)  # |4 * 110 - 2 * 110 - 2 * 90|
    assert found.contrast == pytest.approx(0.1, abs=0.005)  # 10 / 100
    assert found.brightness == pytest.approx(200, abs=1)
    assert found.white_share == 0


def test_judge__the_first_of_near_duplicates_stays() -> None:
    first, other = drawn(1), drawn(2)
    inspector = inspection.Inspector(num_images=6)
    photographs = [first, other, first, scaled(first, 0.9), np.ascontiguousarray(other[:, ::-1]), drawn(3)]
    assert [inspector.judge(each) for each in photographs] == [
        None, None, "near-duplicate", "near-duplicate", "near-duplicate", None,
    ]  # fmt: skip
    assert judge(first) is None, "another part has its own"
