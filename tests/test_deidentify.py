"""Nothing but pixels survives, and a pseudonym is what its standard says."""

import hashlib
import hmac
import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gretfound import deidentify, fundus

SECRET = b"MRN 12345 Jane Doe"


def photograph() -> np.ndarray:
    y, x = np.mgrid[0:300, 0:400]
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    image[(x - 200) ** 2 + (y - 150) ** 2 <= 120**2] = (170, 80, 40)
    return image


def chunk_names(png: bytes) -> set[bytes]:
    names, offset = set(), 8
    while offset < len(png):
        length, name = struct.unpack(">I4s", png[offset : offset + 8])
        names.add(name)
        offset += 12 + length
    assert offset == len(png)  # nothing trails
    return names


def carriers() -> dict[str, bytes]:
    image, files = Image.fromarray(photograph()), {}
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", SECRET.decode())
    for name, format, settings in (
        ("jpeg", "JPEG", {"exif": exif, "comment": SECRET, "quality": 95}),
        ("png", "PNG", {"exif": exif, "pnginfo": text}),
        ("tiff", "TIFF", {"description": SECRET.decode()}),
    ):
        stream = io.BytesIO()
        image.save(stream, format, **settings)
        files[name] = stream.getvalue() + SECRET  # and behind the end
    return files


@pytest.mark.parametrize("name", ["jpeg", "png", "tiff"])
def test_rematerialise__only_pixels_survive(name) -> None:
    encoded = carriers()[name]
    assert SECRET in encoded
    png = deidentify.rematerialise(encoded)
    assert SECRET not in png
    assert chunk_names(png) == {b"IHDR", b"IDAT", b"IEND"}


def test_rematerialise__blacks_out_what_is_outside_the_circle() -> None:
    image = photograph()
    image[8:20, 8:60] = 255  # a name printed in the corner
    stripped = fundus.decode_photograph(deidentify.rematerialise(fundus.encode_png(image)))
    assert not stripped[:30, :70].any()
    assert (stripped[150, 200] == (170, 80, 40)).all()
    kept = fundus.decode_photograph(deidentify.rematerialise(fundus.encode_png(image), mask_outside=False))
    assert np.array_equal(kept, image)


def test_rematerialise__unreadable() -> None:
    with pytest.raises(fundus.UnreadablePhotograph):
        deidentify.rematerialise(b"not a photograph")


def test_pseudonym__is_hmac_sha256() -> None:
    key = bytes(range(32))
    assert deidentify.pseudonym(key, "P-7") == hmac.new(key, b"P-7", hashlib.sha256).hexdigest()[:32]
    assert deidentify.pseudonym(key, "P-7") != deidentify.pseudonym(key[::-1], "P-7")


def test_pseudonym__short_key() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        deidentify.pseudonym(b"short", "P-7")
