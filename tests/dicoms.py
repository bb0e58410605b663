"""Made-up ophthalmic DICOM files that carry identifiers at every place where a file can hold one."""

import io
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

EIGHT_BIT = "1.2.840.10008.5.1.4.1.1.77.1.5.1"
SIXTEEN_BIT = "1.2.840.10008.5.1.4.1.1.77.1.5.2"
# One word for each hiding place, so that a leak names its own.
PLACES = {
    "name": "Quillfeather", "id": "MRN5551234", "birth": "19580412", "other_ids": "ALTID77881",
    "institution": "Saltmarsh", "station": "STATION0042", "comments": "Wrenfield", "address": "Pennywhistle",
    "nested": "Oakenshaw",
    "deeper": "Thistlewood", "deepest": "Brackenbury", "private": "Marrowgate", "private_nested": "Hollowmere",
    "unknown": "Fennimore", "unknown_nested": "Larkspurne", "meta": "Underhill", "preamble": "Ravenscroft",
    "overlay": "Nightingale", "overlay_words": "Featherstone", "icon": "Candlewick", "trailing": "Ambleforth",
    "serial": "SN8847301", "accession": "ACC9090909", "utf8": "Zo\u00ebmann\u00e9", "physician": "Goldsworthy",
    "behind": "Windermerey",
}  # fmt: skip


def photograph(height_px: int = 160, width_px: int = 200, *, top: int = 255, channels: int = 3) -> np.ndarray:
    """A disc of smooth colour on black, of shape (height, width[, 3]), values up to ``top``."""
    y, x = np.mgrid[:height_px, :width_px]
    inside = (x - width_px / 2) ** 2 + (y - height_px / 2) ** 2 <= (0.45 * height_px) ** 2
    shade = np.stack([0.8 - 0.2 * x / width_px, 0.45 + 0.1 * y / height_px, 0.2 + 0 * x], axis=2)[:, :, :channels]
    image = np.where(inside[:, :, None], shade * top, 0).round()
    return (image[:, :, 0] if channels == 1 else image).astype(np.uint8 if top == 255 else np.uint16)


def ophthalmic(pixels: np.ndarray, *, bits_stored: int = 8, **attributes: Any) -> FileDataset:
    """A dataset with the pixels and an identifier at every place of `PLACES`; ``attributes`` are set last."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = EIGHT_BIT
    meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.77001"
    meta.ImplementationVersionName = PLACES["meta"]
    dataset = FileDataset("", {}, file_meta=meta, preamble=PLACES["preamble"].encode().ljust(128, b"\0"))
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = EIGHT_BIT if pixels.dtype == np.uint8 else SIXTEEN_BIT
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.31337"
    dataset.StudyDate = dataset.AcquisitionDate = "20190311"
    dataset.AccessionNumber = PLACES["accession"]
    dataset.Modality = "OP"
    dataset.Manufacturer, dataset.ManufacturerModelName = "Topcon", "TRC-NW8"
    dataset.InstitutionName, dataset.StationName = PLACES["institution"], PLACES["station"]
    dataset.ReferringPhysicianName = PLACES["physician"] + "^Ada"
    dataset.PatientName = f"{PLACES['name']}^{PLACES['utf8']}"
    dataset.PatientID, dataset.OtherPatientIDs = PLACES["id"], PLACES["other_ids"]
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = PLACES["birth"], "F", "060Y"
    dataset.PatientAddress, dataset.PatientComments = PLACES["address"], PLACES["comments"]
    dataset.DeviceSerialNumber = PLACES["serial"]
    dataset.ImageLaterality = "R"
    dataset.HorizontalFieldOfView = 45.0
    deepest, deeper, nested = Dataset(), Dataset(), Dataset()
    deepest.PatientName = PLACES["deepest"]
    deeper.TextValue, deeper.ContentSequence = PLACES["deeper"], Sequence([deepest])
    nested.PatientComments, nested.ContentSequence = PLACES["nested"], Sequence([deeper])
    dataset.RequestAttributesSequence = Sequence([nested])
    private = dataset.private_block(0x0011, "MADE UP", create=True)
    private.add_new(0x01, "LO", PLACES["private"])
    held = Dataset()
    held.PatientName = PLACES["private_nested"]
    private.add_new(0x02, "SQ", Sequence([held]))
    private.add_new(0x03, "UN", b"\x01\x02" + PLACES["unknown"].encode() + b"\x03")
    private.add_new(0x04, "UN", _implicit_sequence(PLACES["unknown_nested"]))
    overlay: tuple[tuple[int, str, Any], ...] = (
        (0x10, "US", 8), (0x11, "US", 80), (0x22, "LO", PLACES["overlay_words"]), (0x40, "CS", "G"),
        (0x50, "SS", [1, 1]), (0x100, "US", 1), (0x102, "US", 0),
        (0x3000, "OW", PLACES["overlay"].encode().ljust(80, b"\0")),
    )  # fmt: skip
    for element, kind, value in overlay:
        dataset.add_new((0x6000, element), kind, value)
    icon = Dataset()
    icon.Rows = icon.Columns = 4
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.BitsAllocated, icon.BitsStored, icon.HighBit, icon.PixelRepresentation = 8, 8, 7, 0
    icon.PixelData = PLACES["icon"].encode().ljust(16, b"\0")
    dataset.IconImageSequence = Sequence([icon])
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits_stored, bits_stored - 1, 0
    dataset.PixelData = pixels.tobytes()
    dataset.DataSetTrailingPadding = PLACES["trailing"].encode() + b"\0" * 2
    for name, value in attributes.items():
        setattr(dataset, name, value)
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    return dataset


def encoded(dataset: FileDataset) -> bytes:
    """The file's bytes, with one more identifier behind its end."""
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue() + PLACES["behind"].encode()


def _implicit_sequence(text: str) -> bytes:
    """A sequence of one item with a patient's name, as a writer that does not know its element leaves it: in UN."""
    value = text.encode() + b" " * (len(text) % 2)
    element = b"\x10\x00\x10\x00" + len(value).to_bytes(4, "little") + value
    return b"\xfe\xff\x00\xe0" + len(element).to_bytes(4, "little") + element


def linear_profile() -> bytes:
    """An ICC profile of sRGB's primaries (adapted to D50) whose values are proportional to light."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)

    curve = b"curv\0\0\0\0\0\0\0\0"  # of no entries: the identity
    text = b"desc\0\0\0\0\0\0\0\x07linear\0" + bytes(78)
    tags = {
        b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body, offset = len(tags).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += name + (offset + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content
    size = (128 + len(table) + len(body)).to_bytes(4, "big")
    head = size + b"\0\0\0\0\x02\x40\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + body


def srgb_of_linear(pixels: np.ndarray) -> np.ndarray:
    """What 8-bit values proportional to light are in sRGB. Source: IEC 61966-2-1."""
    light = pixels / 255.0
    return 255.0 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
