"""DICOM: which files are taken, pixels against what was written, header facts, and pydicom's own test files."""

import contextlib
import datetime
import io
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import pixel_array

from gretfound import dicom, fundus
from tests import dicoms

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"


def read(dataset: pydicom.FileDataset) -> np.ndarray:
    return dicom.read_photograph(dicoms.encoded(dataset))[0]


def code_of(encoded: bytes) -> str:
    with pytest.raises(fundus.UnreadablePhotograph) as caught:
        dicom.read_photograph(encoded)
    message = str(caught.value)
    assert not any(word in message for word in dicoms.PLACES.values()), "a message named a patient"
    return caught.value.code


def test_read_photograph__pixels_and_header() -> None:
    pixels = dicoms.photograph()
    image, header = dicom.read_photograph(dicoms.encoded(dicoms.ophthalmic(pixels)))
    assert np.array_equal(image, pixels)
    assert header.cells == {
        "patient": dicoms.PLACES["id"],
        "eye": "right",
        "sex": "female",
        "camera": "Topcon TRC-NW8",
        "field_of_view": 45.0,
        "age": 60.0,
    }
    assert header.taken == datetime.date(2019, 3, 11)
    assert header.study == "1.2.826.0.1.3680043.8.498.31337"
    missing = {place for place, word in dicoms.PLACES.items() if not has_token(header.tokens, word)}
    assert not missing, f"the exit scan would not look for: {missing}"
    assert {dicoms.PLACES[place] for place in ("name", "id", "deepest", "private_nested", "serial")} <= header.naming
    assert "Topcon" not in header.naming


def has_token(tokens: frozenset[str], word: str) -> bool:
    return word in tokens or word.encode().decode("latin-1") in tokens


@pytest.mark.parametrize("bits_stored", [10, 12, 16])
def test_read_photograph__sixteen_bit_is_scaled_by_its_stored_bits(bits_stored: int) -> None:
    top = 2**bits_stored - 1
    levels = dicoms.photograph(top=top, channels=1)
    image = read(dicoms.ophthalmic(levels, bits_stored=bits_stored))
    assert np.abs(image[:, :, 0] - levels * (255 / top)).max() <= 0.5
    assert (image[:, :, 0] == image[:, :, 2]).all()
    inverted = read(dicoms.ophthalmic(levels, bits_stored=bits_stored, PhotometricInterpretation="MONOCHROME1"))
    assert np.abs(inverted.astype(int) + image - 255).max() <= 1
    if bits_stored < 16:  # an overlay in the unused high bits
        assert np.array_equal(read(dicoms.ophthalmic(levels | 0x8000, bits_stored=bits_stored)), image)


def test_read_photograph__icc_profile_to_srgb() -> None:
    pixels = dicoms.photograph()
    image = read(dicoms.ophthalmic(pixels, ICCProfile=dicoms.linear_profile()))
    assert np.abs(image - dicoms.srgb_of_linear(pixels)).max() <= 1.5
    assert code_of(dicoms.encoded(dicoms.ophthalmic(pixels, ICCProfile=b"no profile"))) == "BAD_PROFILE"


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "SECONDARY_CAPTURE"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"}, "SECONDARY_CAPTURE"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.5.4"}, "OTHER_KIND"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "OTHER_KIND"),
        ({"BurnedInAnnotation": "YES"}, "BURNED_IN"),
        ({"NumberOfFrames": 2}, "SEVERAL_FRAMES"),
        ({"Rows": 20_000, "Columns": 20_000}, "TOO_MANY_PIXELS"),
        ({"Rows": 2_000, "Columns": 2_000}, "DAMAGED_DICOM"),
        ({"PixelRepresentation": 1}, "OTHER_KIND"),
        ({"BitsStored": 9}, "DAMAGED_DICOM"),
    ],
)
def test_read_photograph__refuses(attributes: dict[str, object], code: str) -> None:
    assert code_of(dicoms.encoded(dicoms.ophthalmic(dicoms.photograph(), **attributes))) == code


def test_read_photograph__takes_the_other_kinds_of_photographs() -> None:
    for sop_class in sorted(dicom.TAKEN_CLASSES):
        assert read(dicoms.ophthalmic(dicoms.photograph(), SOPClassUID=sop_class, BurnedInAnnotation="NO")).any()


def test_read_photograph__damaged() -> None:
    whole = dicoms.encoded(dicoms.ophthalmic(dicoms.photograph()))
    for cut in (140, 400, len(whole) // 2):
        assert code_of(whole[:cut]) in ("DAMAGED_DICOM", "OTHER_KIND")
    rng = np.random.default_rng(0)
    for _ in range(200):  # no other error than ours, whatever byte is hit
        damaged = bytearray(whole[: rng.integers(200, len(whole))])
        for place in rng.integers(0, min(3000, len(damaged)), 8):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(fundus.UnreadablePhotograph):
            dicom.read_photograph(bytes(damaged))


def test_read_photograph__pydicom_own_files_are_judged_by_their_kind() -> None:
    codes = {}
    for path in sorted(SAMPLES.glob("*.dcm")):
        try:
            dicom.read_photograph(path.read_bytes())
            codes[path.name] = ""
        except fundus.UnreadablePhotograph as error:
            codes[path.name] = error.code
    assert len(codes) > 60
    assert "" not in codes.values(), "none of them is a photograph of an eye"
    assert codes["CT_small.dcm"] == "OTHER_KIND" and codes["SC_rgb_rle.dcm"] == "SECONDARY_CAPTURE"


SAMPLE_PHOTOGRAPHS = (
    "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm", "SC_rgb_rle.dcm", "SC_rgb_jpeg_dcmtk.dcm",
"SC_ybr_full_422_uncompressed.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "examples_rgb_color.dcm",
    "examples_palette.dcm", "examples_jpeg2k.dcm", "SC_rgb_rle_16bit.dcm",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE_PHOTOGRAPHS)
def test_read_photograph__pixels_of_pydicom_own_files(name: str) -> None:
    dataset = pydicom.dcmread(SAMPLES / name)
    dataset.SOPClassUID = dicoms.EIGHT_BIT
    dataset.PixelRepresentation = 0
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset)
    image, _ = dicom.read_photograph(stream.getvalue())
    expected = pixel_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        table = np.frombuffer(dataset.RedPaletteColorLookupTableData, "<u2")
        assert np.abs(image[:, :, 0] - table[expected] / 257).max() <= 0.5
        return
    expected = expected * (255 / (2**dataset.BitsStored - 1))
    assert np.abs(image - (expected if expected.ndim == 3 else expected[:, :, None])).max() <= 0.5


def test_is_dicom__by_content() -> None:
    assert dicom.is_dicom(dicoms.encoded(dicoms.ophthalmic(dicoms.photograph())))
    assert not dicom.is_dicom(b"\xff\xd8" + os.urandom(300))
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    assert not dicom.is_dicom(stream.getvalue())
