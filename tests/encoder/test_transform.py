import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional

from gretfound.encoder.transform import IMAGENET_MEAN, IMAGENET_STD, Transform


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def circle(height: int, width: int, x_px: int, y_px: int, radius_px: int) -> np.ndarray:
    image = Image.new("RGB", (width, height))
    box = (x_px - radius_px, y_px - radius_px, x_px + radius_px, y_px + radius_px)
    ImageDraw.Draw(image).ellipse(box, fill=(180, 90, 40))
    return np.asarray(image)


def test_apply__equals_torchvision_without_a_field_of_view():
    image = noise(90, 90)
    transform = Transform(image_size_px=32, crop_to_field_of_view=False)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
    reduced = functional.resize(pixels, [32, 32], interpolation=functional.InterpolationMode.BICUBIC, antialias=True)
    expected = functional.normalize(reduced.clamp(0, 1), list(IMAGENET_MEAN), list(IMAGENET_STD))
    found = transform.apply(image)
    assert found.shape == (3, 32, 32) and found.dtype == torch.float32
    # PIL rounds to whole grey levels after each of two passes: at most one level, over the smallest deviation.
    assert (found - expected).abs().max() < 1.01 / 255 / min(IMAGENET_STD)


def test_square__crops_to_the_circle():
    image = circle(200, 360, 170, 100, 80)
    found = Transform(image_size_px=64).square(image)
    assert found.shape == (64, 64, 3)
    inside = (found.sum(axis=2) > 150).mean()
    assert inside == pytest.approx(np.pi / 4, abs=0.05)  # the circle touches all four sides


def test_square__pads_with_black_in_the_middle():
    image = np.full((40, 80, 3), 200, np.uint8)
    found = Transform(image_size_px=80, crop_to_field_of_view=False).square(image)
    assert (found[:18] == 0).all() and (found[62:] == 0).all() and (found[22:58] == 200).all()


def test_square__wrong_array_is_an_error():
    with pytest.raises(ValueError, match="HxWx3 uint8"):
        Transform(image_size_px=8).square(np.zeros((4, 4, 3), np.float32))


def test_apply_batch__does_not_depend_on_the_batch():
    images = [noise(50, 60, 1), circle(120, 160, 80, 60, 50), noise(33, 20, 2)]
    transform = Transform(image_size_px=24)
    together = transform.apply_batch(images)
    assert together.shape == (3, 3, 24, 24)
    assert all(torch.equal(one, transform.apply(image)) for one, image in zip(together, images, strict=True))
    assert transform.apply_batch([]).shape == (0, 3, 24, 24)


def test_denormalise__is_the_inverse():
    image = noise(16, 16)
    transform = Transform(image_size_px=16, crop_to_field_of_view=False)
    assert np.array_equal(transform.denormalise(transform.apply(image)[None])[0], image)


def test_from_json__restores_and_is_strict():
    transform = Transform(image_size_px=48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), crop_to_field_of_view=False)
    assert Transform.from_json(transform.to_json()) == transform
    for change in ({"image_size": 3}, {"interpolation": "bilinear"}):
        with pytest.raises(ValueError, match="transform settings"):
            Transform.from_json(transform.to_json() | change)
    with pytest.raises(ValueError, match="every std above 0"):
        Transform(image_size_px=8, std=(0.0, 1.0, 1.0))
