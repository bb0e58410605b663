"""Random crops against torchvision's resize of the same boxes, decoded whole by Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from gretfound import fundus, phantom
from gretfound.encoder.crops import ASPECT_RATIO, View, draw_crop, draw_views
from gretfound.fundus import FieldOfView

SIDE_PX = 509  # no multiple of 8: a reduced row or column stands for part of a block
FIELD_OF_VIEW = FieldOfView(x_px=SIDE_PX / 2, y_px=SIDE_PX / 2, radius_px=SIDE_PX / 2)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return phantom.draw_eye(phantom.SITES["aster"], seed=3, size_px=SIDE_PX, eye="right").image


def encoded(photograph: np.ndarray, format_name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photograph).save(stream, format_name, **({"quality": 95} if format_name == "JPEG" else {}))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("size_px", "format_name"), [(224, "JPEG"), (64, "JPEG"), (32, "JPEG"), (96, "PNG")]
)  # at several reductions
def test_draw_views__is_the_crop_that_torchvision_would_resize(
    photograph: np.ndarray, size_px: int, format_name: str
) -> None:
    content = encoded(photograph, format_name)
    with Image.open(io.BytesIO(content)) as opened:
        whole = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    views = {"image": View(size_px=size_px, scale=(0.2, 1.0))}
    for seed in range(8):
        found = draw_views(content, field_of_view=FIELD_OF_VIEW, views=views, rng=np.random.default_rng(seed))["image"]
        rng = np.random.default_rng(seed)
        x0, y0, x1, y1 = draw_crop(SIDE_PX, SIDE_PX, scale=(0.2, 1.0), ratio=ASPECT_RATIO, rng=rng)
        expected = reference.resized_crop(
            whole,
            *(round(y0), round(x0), round(y1) - round(y0), round(x1) - round(x0)),
            size=[size_px, size_px],
            interpolation=reference.InterpolationMode.BICUBIC,
            antialias=True,
        )
        expected = expected.flip(-1) if rng.random() < 0.5 else expected
        error = np.abs(found.astype(float) - expected.numpy())
        assert error.mean() < (2.0 if format_name == "JPEG" else 0.1), seed
        assert abs(found.mean() - expected.float().mean()) < 1 and abs(found.std() - expected.float().std()) < 1


def test_draw_views__many_crops_of_one_decode(photograph: np.ndarray) -> None:
    content = encoded(photograph, "JPEG")
    views = {
        "global_crop": View(size_px=64, scale=(0.32, 1.0), number=2, colour=1.0),
        "local_crop": View(size_px=32, scale=(0.05, 0.32), number=3, colour=1.0),
    }
    crops = draw_views(content, field_of_view=FIELD_OF_VIEW, views=views, rng=np.random.default_rng(0))
    again = draw_views(content, field_of_view=FIELD_OF_VIEW, views=views, rng=np.random.default_rng(0))
    assert {name: crop.shape for name, crop in crops.items()} == {
        "global_crop": (2, 3, 64, 64),
        "local_crop": (3, 3, 32, 32),
    }
    assert {name: view.shape for name, view in views.items()} == {name: crop.shape for name, crop in crops.items()}
    for name, crop in crops.items():
        assert crop.dtype == np.uint8
        np.testing.assert_array_equal(crop, again[name])
        assert len({crop[place].tobytes() for place in range(len(crop))}) == len(crop), "each crop is drawn anew"
    plain = {name: View(size_px=view.size_px, scale=view.scale, number=view.number) for name, view in views.items()}
    grey = draw_views(content, field_of_view=FIELD_OF_VIEW, views=plain, rng=np.random.default_rng(0))
    assert not np.array_equal(grey["global_crop"], crops["global_crop"]), "colours change with the strength"


def test_draw_views__a_view_of_no_crops(photograph: np.ndarray) -> None:
    views = {
        "global_crop": View(size_px=64, scale=(0.32, 1.0), number=2),
        "local_crop": View(size_px=32, scale=(0.05, 0.32), number=0),
    }
    crops = draw_views(encoded(photograph, "JPEG"), field_of_view=None, views=views, rng=np.random.default_rng(0))
    assert crops["global_crop"].shape == (2, 3, 64, 64) and crops["local_crop"].shape == (0, 3, 32, 32)


def test_draw_views__nothing_outside_the_field_of_view(photograph: np.ndarray) -> None:
    wide = np.full((SIDE_PX, 2 * SIDE_PX, 3), 255, dtype=np.uint8)
    wide[:, SIDE_PX // 2 : SIDE_PX // 2 + SIDE_PX] = 40
    place = FieldOfView(x_px=float(SIDE_PX), y_px=SIDE_PX / 2, radius_px=SIDE_PX / 2)
    for seed in range(20):
        crop = draw_views(
            encoded(wide, "PNG"),
            field_of_view=place,
            views={"image": View(size_px=48, scale=(0.2, 1.0))},
            rng=np.random.default_rng(seed),
        )["image"]
        assert crop.max() <= 41


@pytest.mark.parametrize("cut", [0, 3, 200, 0.5, 0.98])
def test_draw_views__damaged_bytes_are_an_error(photograph: np.ndarray, cut: float) -> None:
    content = encoded(photograph, "JPEG")
    content = content[: int(cut * len(content)) if isinstance(cut, float) else cut]
    with pytest.raises(fundus.UnreadablePhotograph):
        draw_views(
            content,
            field_of_view=None,
            views={"image": View(size_px=48, scale=(0.2, 1.0))},
            rng=np.random.default_rng(0),
        )
