"""DICOM photographs of the eye: which files are taken, their pixels as 8-bit sRGB, and what their header says.

Only pixels and allow-listed attributes are ever copied; overlays, icons, presentation states, private and nested
elements are not. What else the header holds comes back as tokens, for the exit scan alone.
"""

import datetime
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydicom
import pydicom.config
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from gretfound import fundus, identifiers, metadata
from gretfound.fundus import Photograph, UnreadablePhotograph

MAX_ENCODED_BYTES = 200 * 2**20
SUFFIXES = (".dcm", ".dicom")
_STORAGE = "1.2.840.10008.5.1.4.1.1."
# DICOM PS3.4, Annex B.5. Screenshots of any kind are kept back: what they show is under nobody's control.
TAKEN_CLASSES = frozenset(_STORAGE + end for end in ("77.1.5.1", "77.1.5.2", "77.1.5.5", "77.1.4"))
SECONDARY_CAPTURES = frozenset(_STORAGE + end for end in ("7", "7.1", "7.2", "7.3", "7.4"))
_PATIENT_ID, _SEX, _AGE, _BIRTH_DATE = "PatientID", "PatientSex", "PatientAge", "PatientBirthDate"
_DATES = ("AcquisitionDateTime", "AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate")
_NAMING = ("PatientID", "OtherPatientIDs", "PatientBirthDate", "AccessionNumber", "DeviceSerialNumber")
# Everything that pydicom 3.0 was seen to raise on damaged files, beside its own error.
_DAMAGE = (
    InvalidDicomError, BytesLengthException, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError,
    EOFError, RuntimeError, OverflowError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of the photograph beside its pixels; other formats than DICOM have tokens alone.

    ``cells`` are canonical metadata cells; the patient's code is still the site's own. ``naming`` are the tokens of
    names and numbers of people, ``tokens`` those of the whole file outside of its pixels. ``study`` and ``taken`` are
    blank or None where the header does not say.
    """

    tokens: frozenset[str]
    naming: frozenset[str] = frozenset()
    cells: dict[str, Any] = field(default_factory=dict)
    study: str = ""
    taken: datetime.date | None = None


def is_dicom(encoded: bytes) -> bool:
    """Tells whether bytes begin as a DICOM file does: a preamble of 128 bytes, then ``DICM``."""
    return encoded[128:132] == b"DICM"


def read_photograph(encoded: bytes) -> tuple[Photograph, Header]:
    """Reads a DICOM photograph.

    Returns:
        Pixels of shape (height, width, 3), uint8 sRGB, and what the header says.

    Raises:
        UnreadablePhotograph: If the file is of another kind, a screenshot, said to have text burned in, too large, of
            several frames, damaged, or compressed in a way that is not read.
    """
    if len(encoded) > MAX_ENCODED_BYTES:
        raise UnreadablePhotograph("TOO_LARGE", f"found {len(encoded):,} bytes; required at most {MAX_ENCODED_BYTES:,}")
    # pydicom's warnings and messages quote values: none is shown, and none is passed on.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(encoded))
            _require_kind(dataset)
            header = _header(dataset, encoded)
            return _pixels(dataset), header
    except UnreadablePhotograph:
        raise
    except _DAMAGE as error:
        raise UnreadablePhotograph(
            "DAMAGED_DICOM", "the file is damaged; required a whole one, so export it again"
        ) from error


def _require_kind(dataset: Dataset) -> None:
    sop_class = str(dataset.get("SOPClassUID", ""))
    if sop_class in SECONDARY_CAPTURES:
        raise UnreadablePhotograph(
            "SECONDARY_CAPTURE", "it is a screenshot (secondary capture); required a photograph of the camera"
        )
    if sop_class not in TAKEN_CLASSES:
        raise UnreadablePhotograph(
            "OTHER_KIND", "it is no ophthalmic or visible-light photograph (tomography, report or other); leave it out"
        )
    if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        raise UnreadablePhotograph("BURNED_IN", "its header says that text is burned into the picture")
    if not _is_read(dataset.file_meta.TransferSyntaxUID):
        raise UnreadablePhotograph("UNSUPPORTED_COMPRESSION", "its compression is not read; export it uncompressed")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise UnreadablePhotograph("SEVERAL_FRAMES", f"found {int(dataset.NumberOfFrames)} frames; required one")
    height, width = int(dataset.Rows), int(dataset.Columns)
    if height * width > fundus.MAX_PIXELS:
        raise UnreadablePhotograph(
            "TOO_MANY_PIXELS", f"found {width:,} x {height:,} pixels; required at most {fundus.MAX_PIXELS:,}"
        )
    if (
        dataset.SamplesPerPixel not in (1, 3)
        or dataset.BitsAllocated not in (8, 16)
        or dataset.PixelRepresentation != 0
    ):
        raise UnreadablePhotograph("OTHER_KIND", "required unsigned pixels of 8 or 16 bits, in grey or colour")
    if not 1 <= dataset.BitsStored <= dataset.BitsAllocated or dataset.HighBit != dataset.BitsStored - 1:
        raise UnreadablePhotograph("DAMAGED_DICOM", "the bits of a pixel are described in a way that cannot be")


def _is_read(syntax: UID) -> bool:
    try:
        return bool(syntax != DeflatedExplicitVRLittleEndian and get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _pixels(dataset: Dataset) -> Photograph:
    levels = pixel_array(dataset)  # without the unused high bits, which held overlays once
    top = (1 << int(dataset.BitsStored)) - 1
    match dataset.PhotometricInterpretation:
        case "PALETTE COLOR":
            levels = apply_color_lut(levels, dataset)[..., :3]
            top = 255 if levels.dtype.itemsize == 1 else 65_535
        case "MONOCHROME1":
            levels = top - levels
    image = fundus.to_eight_bits(levels, top)
    image = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
    profile = dataset.get("ICCProfile")
    return fundus.to_srgb(image, bytes(profile)) if profile else np.ascontiguousarray(image)


def _header(dataset: Dataset, encoded: bytes) -> Header:
    tokens = _tokens_around_pixels(dataset, encoded)
    naming: set[str] = set()
    for element in _elements(dataset):
        found = {token for text in _texts_of(element) for token in identifiers.tokens_of(text)}
        tokens |= found
        if element.VR == "PN" or element.keyword in _NAMING:
            naming |= found
    return Header(
        cells=_cells(dataset),
        study=str(dataset.get("StudyInstanceUID", "")),
        taken=_date_taken(dataset),
        naming=frozenset(naming),
        tokens=frozenset(tokens),
    )


def _elements(dataset: Dataset) -> Iterator[DataElement]:
    """Yields every element at every depth but the pixels themselves."""
    yield from dataset.file_meta
    for tag in dataset.keys():  # noqa: SIM118 (iterating a dataset reads its values, the pixels' too)
        if tag != (0x7FE0, 0x0010):
            yield from _nested(dataset[tag])


def _nested(element: DataElement) -> Iterator[DataElement]:
    yield element
    for item in element.value if element.VR == "SQ" and element.value else ():
        for deeper in item:
            yield from _nested(deeper)


def _texts_of(element: DataElement) -> Iterator[str | bytes]:
    if element.VR == "SQ" or element.value is None:
        return
    values = element.value if element.VM > 1 else [element.value]
    for value in values:
        if isinstance(value, bytes):
            yield value
        else:
            text = str(value)
            if not text.startswith("1.2.840.10008."):  # the standard's own numbers identify nobody
                yield text


def _tokens_around_pixels(dataset: Dataset, encoded: bytes) -> set[str]:
    """The tokens of every byte before and behind the pixels: whatever the parser made of them."""
    pixels = dataset.get_item("PixelData")
    if not isinstance(pixels, RawDataElement) or pixels.value is None:
        return identifiers.tokens_of(encoded[:132])
    begin, end = pixels.value_tell, pixels.value_tell + len(pixels.value)
    return identifiers.tokens_of(encoded[:begin]) | identifiers.tokens_of(encoded[end:])


def _cells(dataset: Dataset) -> dict[str, Any]:
    maker = " ".join(str(dataset.get(name) or "") for name in ("Manufacturer", "ManufacturerModelName"))
    texts = {
        "patient": str(dataset.get(_PATIENT_ID) or ""),
        "eye": str(dataset.get("ImageLaterality") or dataset.get("Laterality") or ""),
        "sex": str(dataset.get(_SEX) or ""),
        "camera": " ".join(maker.split()),
        "field_of_view": str(dataset.get("HorizontalFieldOfView") or ""),
        "age": _age(dataset),
    }
    cells = {}
    for key, text in texts.items():
        try:
            value = metadata.parse_cell(metadata.BY_KEY[key], text)
        except ValueError:
            continue  # as a blank: the header was not written for us
        if value is not None:
            cells[key] = value
    return cells


def _age(dataset: Dataset) -> str:
    text = str(dataset.get(_AGE) or "")
    if len(text) == 4 and text[:3].isdigit():
        days = int(text[:3]) * {"D": 1.0, "W": 7.0, "M": 365.25 / 12, "Y": 365.25}.get(text[3], 0.0)
        return f"{int(days / 365.25 + 1e-9)}" if days else ""
    born, taken = _date_of(str(dataset.get(_BIRTH_DATE) or "")), _date_taken(dataset)
    if born is None or taken is None:
        return ""
    return f"{taken.year - born.year - ((taken.month, taken.day) < (born.month, born.day))}"


def _date_taken(dataset: Dataset) -> datetime.date | None:
    dates = (_date_of(str(dataset.get(name) or "")) for name in _DATES)
    return next((date for date in dates if date is not None), None)


def _date_of(text: str) -> datetime.date | None:
    try:
        return datetime.datetime.strptime(text[:8], "%Y%m%d").date()
    except ValueError:
        return None
