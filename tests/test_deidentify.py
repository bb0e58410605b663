"""Nothing but pixels survives: hidden words at every place of a file, bombs, text in the picture, pseudonyms."""

import datetime
import hashlib
import hmac
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, TiffImagePlugin

from gretfound import deidentify, fundus, identifiers, isolation, phantom
from tests import dicoms
from tests.conftest import ROOT
from tests.test_dicom import SAMPLE_PHOTOGRAPHS, SAMPLES

SECRET = "MRN1234567"
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def processes() -> Iterator[isolation.Pool]:
    with deidentify.pool(1) as pool:
        yield pool


def photograph() -> np.ndarray:
    y, x = np.mgrid[0:300, 0:400]
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    image[(x - 200) ** 2 + (y - 150) ** 2 <= 120**2] = (170, 80, 40)
    return image


def saved(image: Image.Image, format: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def carriers() -> dict[str, bytes]:
    """Files with the secret in every place that their format has for words, and behind their end."""
    image = Image.fromarray(photograph())
    exif = Image.Exif()
    exif[0x010E], exif[0x9C9C] = SECRET, SECRET.encode("utf-16-le")
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + SECRET.encode()
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", SECRET)
    text.add_text("Packed", SECRET, zip=True)
    text.add_itxt("XML:com.adobe.xmp", f"<x>{SECRET}</x>", zip=True)
    text.add(b"prVt", SECRET.encode())
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = tags[315] = tags[33432] = SECRET
    tags[700] = tags[33723] = SECRET.encode()
    tags.tagtype[700] = tags.tagtype[33723] = 1
    jpeg = saved(image, "JPEG", exif=exif, comment=SECRET.encode(), xmp=f"<x>{SECRET}</x>".encode(), quality=95)
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0f\x1c\x02\x05\0\x0a" + SECRET.encode()
    thumbnail = saved(image.resize((20, 15)), "JPEG", comment=SECRET.encode())
    for marker, content in ((b"\xff\xed", iptc), (b"\xff\xe5", thumbnail)):
        jpeg = jpeg[:2] + marker + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]
    files = {
        "jpeg": jpeg,
        "png": saved(image, "PNG", exif=exif, pnginfo=text),
        "tiff": saved(image, "TIFF", tiffinfo=tags),
    }
    return {name: content + SECRET.encode() for name, content in files.items()}


@pytest.mark.parametrize("name", ["jpeg", "png", "tiff"])
@pytest.mark.parametrize("jpeg_quality", [0, 90])
def test_rematerialise__only_pixels_survive(processes: isolation.Pool, name: str, jpeg_quality: int) -> None:
    encoded = carriers()[name]
    assert SECRET.encode() in encoded
    made = deidentify.rematerialise(processes, encoded, jpeg_quality=jpeg_quality)
    assert made.code == ""
    assert not identifiers.found_in(made.encoded, identifiers.encoded({SECRET, SECRET[:6], "Patient", "adobe"}))
    deidentify.require_bare(made.encoded)
    image = fundus.decode_photograph(made.encoded)
    assert made.image_id == fundus.pixel_digest(image)
    if name != "jpeg" and not jpeg_quality:
        expected = photograph()
        lit = image.any(axis=2)
        assert np.array_equal(image[lit], expected[lit]) and lit.sum() > 0.98 * expected.any(axis=2).sum()


@pytest.mark.parametrize("name", ["jpeg", "png", "tiff"])
def test_read_source__the_scan_knows_what_to_look_for(name: str) -> None:
    assert SECRET in deidentify.read_source(carriers()[name])[1].tokens


def test_rematerialise__dicom_with_identifiers_at_every_depth(processes: isolation.Pool) -> None:
    pixels = dicoms.photograph()
    pixels[2:14, 2:60] = 255  # printed outside of the field of view
    encoded = dicoms.encoded(dicoms.ophthalmic(pixels))
    words = [*dicoms.PLACES.values(), "31337", "77001", "20190311", "Topcon"]
    for word in words:
        assert word.encode() in encoded, word
    made = deidentify.rematerialise(processes, encoded)
    assert made.code == ""
    assert (made.study, made.taken) == ("1.2.826.0.1.3680043.8.498.31337", datetime.date(2019, 3, 11))
    assert not [word for word in words if identifiers.found_in(made.encoded, identifiers.encoded({word}))]
    assert not [word for word in words if word[:4].encode() in made.encoded]
    image = fundus.decode_photograph(made.encoded)
    assert not image[:16, :60].any()
    inside = image.any(axis=2)
    assert np.array_equal(image[inside], pixels[inside])
    assert inside.sum() >= 0.98 * dicoms.photograph().any(axis=2).sum()


@pytest.mark.parametrize("name", SAMPLE_PHOTOGRAPHS)
def test_rematerialise__pydicom_own_files(processes: isolation.Pool, name: str) -> None:
    dataset = pydicom.dcmread(SAMPLES / name)
    dataset.SOPClassUID, dataset.PixelRepresentation = dicoms.EIGHT_BIT, 0
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset)
    made = deidentify.rematerialise(processes, stream.getvalue())
    assert made.code in ("", "TEXT_FOUND")  # some of them do show letters
    if made.code:
        return
    read, header = deidentify.read_source(stream.getvalue())
    assert header.tokens
    assert not identifiers.found_in(made.encoded, identifiers.encoded(header.tokens))
    image = fundus.decode_photograph(made.encoded)
    kept = image.any(axis=2)
    assert np.array_equal(image[kept], read[kept])


def test_rematerialise__a_secondary_capture_and_text_burned_in_are_kept_back(processes: isolation.Pool) -> None:
    for attributes, code in (
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "SECONDARY_CAPTURE"),
        ({"BurnedInAnnotation": "YES"}, "BURNED_IN"),
    ):
        encoded = dicoms.encoded(dicoms.ophthalmic(dicoms.photograph(), **attributes))
        assert deidentify.rematerialise(processes, encoded) == deidentify.Rematerialised(code=code)


def test_rematerialise__an_identifier_among_the_values_keeps_it_back(processes: isolation.Pool) -> None:
    encoded = dicoms.encoded(dicoms.ophthalmic(dicoms.photograph()))
    leaked = deidentify.rematerialise(processes, encoded, texts=["Topcon", f"{dicoms.PLACES['name'].upper()} room"])
    assert leaked.code == "IDENTIFIER_LEFT" and not leaked.encoded
    assert deidentify.rematerialise(processes, encoded, texts=["Topcon TRC-NW8"]).code == ""


def test_rematerialise__a_token_in_the_bytes_keeps_it_back_but_chance_does_not(processes: isolation.Pool) -> None:
    encoded = fundus.encode_png(photograph())
    made = deidentify.rematerialise(processes, encoded).encoded
    struck = made[60:64].decode("latin-1")  # four bytes of the compressed pixels: another encoding has others
    again = deidentify.rematerialise(processes, encoded, tokens=[struck])
    assert again.code == "" and again.encoded != made and struck.encode("latin-1") not in again.encoded
    assert np.array_equal(fundus.decode_photograph(again.encoded), fundus.decode_photograph(made))
    assert deidentify.rematerialise(processes, encoded, tokens=["IHDR"]).code == "", "a word of the format"
    width = made[16:20].decode("latin-1")  # it stands in every encoding
    assert deidentify.rematerialise(processes, encoded, tokens=[width]).code == "IDENTIFIER_LEFT"


def bombs() -> dict[str, tuple[bytes, str]]:
    """Files that claim, or are, more than a photograph, and what they are refused as."""

    def png_of(width_px: int, height_px: int, rows: int) -> bytes:
        def chunk(name: bytes, content: bytes) -> bytes:
            return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

        packed = zlib.compressobj(9)
        pixels = b"".join(packed.compress(bytes(1 + 3 * width_px)) for _ in range(rows)) + packed.flush()
        head = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    small = Image.fromarray(photograph())
    frames = [Image.new("L", (4, 4), value % 255) for value in range(1000)]
    tiff = bytearray(saved(small, "TIFF"))
    for tag in (256, 257):  # width and height, as 32-bit numbers: 2 GB of pixels
        place = tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8
        tiff[place : place + 4] = struct.pack("<I", 26_000)
    psd = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(4 + 4 + 4 + 2 + 192)
    fits = b"".join(
        card.ljust(80) for card in (b"SIMPLE  =                    T", b"BITPIX  =                    8",
                                    b"NAXIS   =                    2", b"NAXIS1  =                    8",
                                    b"NAXIS2  =                    8", b"END")
    ).ljust(2880) + bytes(2880)  # fmt: skip
    return {
        "png_120_mp": (png_of(12_000, 10_000, 64), "TOO_MANY_PIXELS"),
        "png_20k_square": (png_of(20_000, 20_000, 1), "TOO_MANY_PIXELS"),
        "tiff_2_gb": (bytes(tiff), "TOO_MANY_PIXELS"),
        "tiff_1000_frames": (saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "SEVERAL_FRAMES"),
        "gif": (saved(small, "GIF"), "NOT_A_PHOTOGRAPH"),
        "bmp": (saved(small, "BMP"), "NOT_A_PHOTOGRAPH"),
        "psd": (psd, "NOT_A_PHOTOGRAPH"),
        "fits": (fits, "NOT_A_PHOTOGRAPH"),
        "empty": (b"", "NOT_A_PHOTOGRAPH"),
        "cut": (saved(small, "JPEG")[:-400], "TRUNCATED"),
        "large": (b"\xff\xd8" + bytes(51 * 2**20), "TOO_LARGE"),
    }


def test_rematerialise__bombs_are_refused_and_the_process_lives(processes: isolation.Pool) -> None:
    for name, (encoded, code) in bombs().items():
        assert deidentify.rematerialise(processes, encoded).code == code, name
    assert deidentify.rematerialise(processes, carriers()["jpeg"]).code == ""


def test_rematerialise__what_needs_too_much_memory_ends_its_process_alone() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), dtype=np.uint8))
    limits = isolation.Limits(memory_bytes=440 * 2**20)
    with isolation.Pool("gretfound.deidentify:answer", num_processes=1, limits=limits) as pool:
        made = deidentify.rematerialise(pool, saved(noise, "TIFF"))
        assert made == deidentify.Rematerialised(code="BEYOND_LIMITS")
        assert deidentify.rematerialise(pool, bombs()["gif"][0]).code == "NOT_A_PHOTOGRAPH"


@pytest.mark.slow
def test_rematerialise__the_largest_photograph_fits(processes: isolation.Pool) -> None:
    encoded = saved(Image.new("RGB", (8000, 7990), (120, 60, 30)), "JPEG")
    assert deidentify.rematerialise(processes, encoded).code == ""


def test_decode__sixteen_bit_orientation_cmyk_and_profile() -> None:
    levels = (np.arange(300 * 400).reshape(300, 400) % 4096).astype(np.uint16)
    image, _ = deidentify.read_source(saved(Image.fromarray(levels), "PNG"))
    assert np.abs(image[:, :, 0] - levels * (255 / 4095)).max() <= 0.5, "16 bits are scaled, not clipped"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    turned, _ = deidentify.read_source(saved(Image.fromarray(photograph()), "TIFF", exif=exif))
    assert np.array_equal(turned, np.rot90(photograph(), -1))
    cmyk, _ = deidentify.read_source(saved(Image.fromarray(photograph()).convert("CMYK"), "TIFF"))
    assert np.abs(cmyk.astype(int) - photograph()).max() <= 2
    linear, _ = deidentify.read_source(saved(Image.fromarray(photograph()), "PNG", icc_profile=dicoms.linear_profile()))
    assert np.abs(linear - dicoms.srgb_of_linear(photograph())).max() <= 1.5
    clear = np.dstack([photograph(), np.full((300, 400), 128, np.uint8)])
    laid, _ = deidentify.read_source(saved(Image.fromarray(clear), "PNG"))
    assert np.abs(laid - photograph() * (128 / 255)).max() <= 1


def test_mask_surround__circle_hull_and_neither() -> None:
    image = photograph()
    image[8:20, 8:60] = 255  # a name printed in the corner
    masked = deidentify.mask_surround(image)
    assert not masked[:30, :70].any()
    inside = np.hypot(*(np.mgrid[0:300, 0:400] - np.array([149.5, 199.5])[:, None, None])) <= 118
    assert np.array_equal(masked[inside], image[inside])
    y, x = np.mgrid[0:300, 0:400]
    octagon = (np.abs(x - 200) < 150) & (np.abs(y - 150) < 130) & (np.abs(x - 200) + np.abs(y - 150) < 200)
    square = np.where(octagon[:, :, None], np.uint8(90), np.uint8(0)) * np.ones(3, np.uint8)
    lettered = square.copy()
    lettered[4:16, 4:40] = 255
    masked = deidentify.mask_surround(lettered)
    assert not masked[:20, :44].any() and np.array_equal(masked[octagon], lettered[octagon])
    full = np.full((50, 60, 3), 90, np.uint8)
    assert np.array_equal(deidentify.mask_surround(full), full)


def test_rematerialise__text_in_the_corner_is_removed_and_on_the_retina_kept_back(processes: isolation.Pool) -> None:
    image = Image.fromarray(phantom.draw_eye(phantom.SITES["aster"], seed=0, size_px=640).image)
    font = ImageFont.truetype(str(font_path()), 24)
    assert deidentify.rematerialise(processes, saved(image, "PNG")).code == ""
    corner = image.copy()
    ImageDraw.Draw(corner).text((4, 4), "DOE JANE", fill="white", font=font)
    made = deidentify.rematerialise(processes, saved(corner, "PNG"))
    assert made.code == "" and not fundus.decode_photograph(made.encoded)[:34, :130].any()
    for fill in ("white", "black"):
        on_retina = image.copy()
        ImageDraw.Draw(on_retina).text((230, 300), "DOE JANE 4711", fill=fill, font=font)
        assert deidentify.rematerialise(processes, saved(on_retina, "PNG")).code == "TEXT_FOUND", fill


def font_path() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def test_require_bare__refuses_anything_else() -> None:
    image = Image.fromarray(photograph())
    for good in (saved(image, "PNG"), saved(image, "JPEG"), saved(image, "JPEG", progressive=True)):
        deidentify.require_bare(good)
        with pytest.raises(ValueError, match="required no"):
            deidentify.require_bare(good + b"x")
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    with pytest.raises(ValueError, match="PNG"):
        deidentify.require_bare(saved(image, "PNG", pnginfo=text))
    with pytest.raises(ValueError, match="JPEG"):
        deidentify.require_bare(saved(image, "JPEG", comment=b"x"))


def test_every_code_has_words() -> None:
    source = "".join(path.read_text() for path in (ROOT / "gretfound").glob("*.py") if path.stem in ("fundus", "dicom"))
    words = deidentify.KEPT_BACK | deidentify.REFUSED
    for code in re.findall(r'UnreadablePhotograph\(\s*"([A-Z_]+)"', source):
        assert code in words, code


def test_pseudonym__is_hmac_sha256() -> None:
    assert deidentify.pseudonym(KEY, "P-7") == hmac.new(KEY, b"P-7", hashlib.sha256).hexdigest()[:32]
    assert deidentify.pseudonym(KEY, "P-7") != deidentify.pseudonym(KEY[::-1], "P-7")
    with pytest.raises(ValueError, match="at least 16"):
        deidentify.pseudonym(b"short", "P-7")


def test_uid_pseudonym__is_a_valid_uid() -> None:
    uid = deidentify.uid_pseudonym(KEY, "1.2.3")
    assert pydicom.uid.UID(uid).is_valid and uid.startswith("2.25.") and len(uid) <= 44
    assert int(uid[5:]) == int.from_bytes(hmac.new(KEY, b"uid/1.2.3", hashlib.sha256).digest()[:16], "big")


def test_shifted_date__keeps_intervals_and_moves_everybody_differently() -> None:
    first, second = datetime.date(2019, 3, 11), datetime.date(2020, 2, 29)
    moved = [deidentify.shifted_date(KEY, f"P-{number}", first) for number in range(4000)]
    assert (deidentify.shifted_date(KEY, "P-7", second) - deidentify.shifted_date(KEY, "P-7", first)).days == 355
    days = np.array([(date - first).days for date in moved])
    assert np.abs(days).min() >= 1 and np.abs(days).max() == 365
    assert len(set(days.tolist())) > 700 and abs(days.mean()) < 15


def test_methods__name_what_was_done() -> None:
    assert deidentify.methods_of({"dr": 1}, has_year=False) == "deid/1 113100 113101"
    assert deidentify.methods_of({"sex": "female"}, has_year=True) == "deid/1 113100 113101 113107 113108"
