"""The image room against circles of known truth, damaged files and real photographs."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageFilter

from gretfound import fundus, phantom
from tests.conftest import REAL_PHOTOGRAPHS

RETINA = (170, 80, 40)


def draw(
    height: int,
    width: int,
    circle: tuple[float, float, float],
    *,
    border: tuple[int, int, int] = (0, 0, 0),
    retina: tuple[int, int, int] = RETINA,
    noise: float = 4.0,
) -> fundus.Photograph:
    """Draws an antialiased disc whose centre and radius are the truth."""
    fine = 4
    y, x = np.mgrid[0 : height * fine, 0 : width * fine] / fine
    inside = (x - circle[0]) ** 2 + (y - circle[1]) ** 2 <= circle[2] ** 2
    share = inside.reshape(height, fine, width, fine).mean(axis=(1, 3))[:, :, None]
    speckle = np.random.default_rng(0).normal(0, noise, (height, width, 3)) * (share > 0.5)
    return np.clip(np.array(border) * (1 - share) + np.array(retina) * share + speckle, 0, 255).round().astype(np.uint8)


def encode(image: Image.Image, format: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


WHOLE = draw(200, 250, (120, 102, 90))


@pytest.mark.parametrize(
    ("size", "circle", "colours"),
    [
        ((400, 500), (240, 205, 180), {}),
        ((400, 600), (300, 200, 260), {}),  # cut at the top and bottom
        ((400, 400), (200, 200, 235), {}),  # cut on four sides
        ((400, 500), (240, 205, 180), {"retina": (24, 11, 6), "noise": 1.0}),
        ((400, 500), (240, 205, 180), {"border": (20, 40, 160)}),
        ((400, 500), (240, 205, 180), {"border": (90, 90, 90)}),
    ],
    ids=["whole", "cut-two", "cut-four", "dark", "blue-border", "grey-border"],
)
def test_find_field_of_view__drawn_circle(size, circle, colours) -> None:
    found = fundus.find_field_of_view(draw(*size, circle, **colours))
    assert found is not None
    assert (found.x_px, found.y_px, found.radius_px) == pytest.approx(circle, abs=1.5)


def test_find_field_of_view__no_border() -> None:
    borderless = np.random.default_rng(1).normal(RETINA, 6, (200, 240, 3)).clip(0, 255).astype(np.uint8)
    assert fundus.find_field_of_view(borderless) is None
    assert fundus.find_field_of_view(np.zeros((200, 240, 3), dtype=np.uint8)) is None


@pytest.mark.skipif(not REAL_PHOTOGRAPHS.is_dir(), reason="the real photographs are not on this machine")
@pytest.mark.parametrize(("site", "radius_px"), [("chasedb1", 341), ("hrf", 497), ("idrid", 427), ("idrid_test", 427)])
def test_find_field_of_view__real_photographs(site, radius_px) -> None:
    paths = sorted((REAL_PHOTOGRAPHS / site / "traindata").iterdir())[:60]
    circles = [fundus.find_field_of_view(fundus.decode_photograph(path.read_bytes())) for path in paths]
    radii = np.array([circle.radius_px for circle in circles if circle is not None])
    assert len(radii) >= 0.97 * len(paths)
    assert (
        np.abs(radii / radius_px - 1) < 0.04
    ).all()  # one camera, one mask; the size was checked by eye on an overlay


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"a text that was renamed to .jpg",
        encode(Image.fromarray(WHOLE).convert("P"), "GIF"),
        encode(Image.fromarray(WHOLE), "JPEG")[:-400],
        encode(Image.fromarray(WHOLE), "PNG")[:-400],
        encode(Image.fromarray(WHOLE), "TIFF")[:60_000],
        encode(Image.fromarray(WHOLE), "TIFF", save_all=True, append_images=[Image.fromarray(WHOLE)]),
    ],
    ids=["empty", "text", "gif", "cut-jpeg", "cut-png", "cut-tiff", "two-pages"],
)
def test_decode_photograph__refuses(encoded) -> None:
    with pytest.raises(fundus.UnreadablePhotograph) as refusal:
        fundus.decode_photograph(encoded)
    assert refusal.value.code.isupper()
    assert pickle.loads(pickle.dumps(refusal.value)).code == refusal.value.code  # Ray carries it


@pytest.mark.parametrize("size", [(10_000, 7_000), (12_000, 10_000), (20_000, 20_000)])
def test_decode_photograph__refuses_a_bomb_before_decoding(size, monkeypatch) -> None:
    encoded = encode(Image.new("1", size), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(fundus.UnreadablePhotograph) as refusal:
        fundus.decode_photograph(encoded)
    assert refusal.value.code == "TOO_MANY_PIXELS"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_decode_photograph__lossless(format) -> None:
    assert np.array_equal(fundus.decode_photograph(encode(Image.fromarray(WHOLE), format)), WHOLE)


def test_decode_photograph__sixteen_bits_are_scaled() -> None:
    levels = np.tile(np.linspace(0, 65_535, 200).astype(np.uint16), (100, 1))
    decoded = fundus.decode_photograph(encode(Image.fromarray(levels), "PNG"))
    assert np.abs(decoded[:, :, 0] - levels / 257.0).max() <= 0.5


def test_decode_photograph__orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(Image.fromarray(WHOLE), "PNG", exif=exif)
    assert np.array_equal(fundus.decode_photograph(encoded), np.rot90(WHOLE, -1))


def test_decode_photograph__transparency_lies_on_black() -> None:
    clear = Image.new("RGBA", (40, 40), (200, 100, 50, 0))
    assert not fundus.decode_photograph(encode(clear, "PNG")).any()


def test_decode_photograph__cmyk() -> None:
    decoded = fundus.decode_photograph(encode(Image.new("CMYK", (40, 40), (0, 128, 255, 0)), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - (255, 127, 0)).max() <= 6


def test_encode_jpeg__close() -> None:
    decoded = fundus.decode_photograph(fundus.encode_jpeg(WHOLE))
    assert np.abs(decoded.astype(int) - WHOLE).mean() < 3


def test_pixel_digest__names_pixels_and_shape() -> None:
    assert fundus.pixel_digest(fundus.decode_photograph(fundus.encode_png(WHOLE))) == fundus.pixel_digest(WHOLE)
    assert fundus.pixel_digest(WHOLE) != fundus.pixel_digest(WHOLE.reshape(250, 200, 3))
    changed = WHOLE.copy()
    changed[100, 100, 1] ^= 1
    assert fundus.pixel_digest(changed) != fundus.pixel_digest(WHOLE)


def test_crop_to_field_of_view__pads_what_the_frame_cut() -> None:
    image = np.full((100, 200, 3), 90, dtype=np.uint8)
    square = fundus.crop_to_field_of_view(image, fundus.FieldOfView(x_px=100, y_px=50, radius_px=80))
    assert square.shape == (160, 160, 3)
    assert not square[:29].any() and not square[-29:].any()
    assert (square[80, 80] == 90).all()


@pytest.mark.parametrize("size_px", [32, 224])
def test_to_square__without_a_circle_keeps_the_whole_frame(size_px) -> None:
    square = fundus.to_square(np.full((100, 200, 3), 90, dtype=np.uint8), None, size_px)
    assert square.shape == (size_px, size_px, 3)
    assert (square[size_px // 2] == 90).all() and not square[0].any()


@pytest.mark.skipif(not REAL_PHOTOGRAPHS.is_dir(), reason="the real photographs are not on this machine")
def test_quality_score__falls_with_blur_and_darkness() -> None:
    path = sorted((REAL_PHOTOGRAPHS / "idrid" / "traindata").iterdir())[0]
    image = fundus.decode_photograph(path.read_bytes())
    circle = fundus.find_field_of_view(image)
    blurred = np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(12)))
    dark = (image * 0.1).astype(np.uint8)
    good, *spoilt = (fundus.quality_score(each, circle) for each in (image, blurred, dark))
    assert all(0 <= score < good <= 1 for score in spoilt)


@pytest.mark.parametrize(
    ("reduction", "factor"), [(0.4, 1), (1.0, 1), (1.99, 1), (2.0, 2), (3.9, 2), (4.0, 4), (50.0, 8)]
)
def test_decode_reduced__is_as_small_as_asked_and_no_smaller(reduction: float, factor: int) -> None:
    image = phantom.draw_eye(phantom.SITES["aster"], seed=1, size_px=250, eye="left").image[:, :201]
    encoded = fundus.encode_jpeg(image)
    found, found_factor = fundus.decode_reduced(encoded, reduction)
    assert found_factor == factor and found.shape == (-(-250 // factor), -(-201 // factor), 3)
    assert fundus.encoded_size(encoded) == (250, 201)
    rows, columns = 250 // factor, 201 // factor
    whole = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))[: rows * factor, : columns * factor]
    blocks = whole.reshape(rows, factor, columns, factor, 3).mean(axis=(1, 3))
    assert np.abs(found[:rows, :columns] - blocks).mean() < 1


def test_decode_reduced__grey_and_four_colour_jpegs() -> None:
    grey = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    for mode in ("L", "CMYK"):
        stream = io.BytesIO()
        Image.fromarray(grey).convert("RGB").convert(mode).save(stream, "JPEG", quality=95)
        found, _ = fundus.decode_reduced(stream.getvalue(), 2.0)
        assert found.shape[2] == 3 and np.abs(found.mean(axis=2)[0] - grey[0, :: 256 // found.shape[1]]).mean() < 6
