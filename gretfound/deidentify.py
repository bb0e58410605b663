"""De-identification of photographs, policy deid/1: pixels in, a bare PNG or JPEG out; nothing else of a file survives.

`answer` decodes, blackens what lies outside of the field of view, searches the rest for text and encodes; it runs in an
isolated process. `rematerialise` has it done and looks into what came back for every token of the source. The result is
pseudonymised, never anonymous: a retina identifies a person.
"""

import datetime
import hashlib
import hmac
import io
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage, spatial

from gretfound import dicom, fundus, identifiers, isolation, lettering
from gretfound.fundus import Photograph, UnreadablePhotograph

POLICY = "deid/1"
# DICOM PS3.16, CID 7050: basic profile, clean pixel data; modified dates; patient characteristics.
METHODS, METHOD_DATES, METHOD_CHARACTERISTICS = ("113100", "113101"), "113107", "113108"
_CHARACTERISTICS = ("age", "sex", "ethnicity")
LIMITS = isolation.Limits(memory_bytes=2 * 2**30, cpu_s=20)
MIN_HULL_SHARE = 0.25
MAX_SHIFT_DAYS = 365
NUM_ENCODINGS = 3
_THUMBNAIL_PX = 512
_LIT_LEVEL = 12  # of 255: black surround with a camera's noise stays below it
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

KEPT_BACK = {
    "TEXT_FOUND": "there seems to be text in the picture itself; look at it, and crop or leave it out",
    "BURNED_IN": "its DICOM header says that text is burned into the picture",
    "SECONDARY_CAPTURE": "it is a DICOM screenshot (secondary capture), not a photograph of the camera",
    "IDENTIFIER_LEFT": "a name or number of the file was found again in what was about to leave",
    "SAME_STUDY": "another photograph of the same study was kept back because a name or number was found in it",
}
REFUSED = {
    "NOT_A_PHOTOGRAPH": "it is no JPEG, PNG, TIFF or DICOM file, whatever its name says",
    "OTHER_KIND": "it is a DICOM file of another kind: tomography, a report, or pixels that no photograph has",
    "TOO_LARGE": "the file is too large",
    "TOO_MANY_PIXELS": "it has more pixels than a photograph",
    "SEVERAL_FRAMES": "it holds several pictures; export them one by one",
    "TRUNCATED": "the file is cut off or damaged; copy it again",
    "DAMAGED_DICOM": "the DICOM file is damaged; export it again",
    "BAD_PROFILE": "its colour profile is damaged; export it again without one",
    "UNSUPPORTED_COMPRESSION": "its DICOM compression is not read; export it uncompressed",
    "BEYOND_LIMITS": "opening it took more memory or time than a photograph needs",
    "DUPLICATE": "another photograph has the same pixels within the field of view; that one leaves, once",
    "CHANGED": "the file changed since it was checked, or it cannot be opened; run the same command again",
}


@dataclass(frozen=True, kw_only=True)
class Rematerialised:
    """What became of one photograph.

    ``code`` is blank where it may leave, otherwise a key of `KEPT_BACK` or `REFUSED`; then ``encoded`` is empty.
    ``study`` and ``taken`` are the site's own, from a DICOM header, and must not leave as they are.
    """

    code: str
    encoded: bytes = field(default=b"", repr=False)
    image_id: str = ""
    study: str = field(default="", repr=False)
    taken: datetime.date | None = field(default=None, repr=False)


def pool(num_processes: int) -> isolation.Pool:
    """Returns isolated processes for `rematerialise`.

    Raises:
        ConfigError: If the networks that find text are not installed.
    """
    lettering.require_networks()
    return isolation.Pool("gretfound.deidentify:answer", num_processes=num_processes, limits=LIMITS)


def rematerialise(
    processes: isolation.Pool,
    encoded: bytes,
    *,
    tokens: Collection[str] = (),
    texts: Collection[str] = (),
    jpeg_quality: int = 0,
) -> Rematerialised:
    """Makes a photograph anew in an isolated process and scans the result.

    A short token may stand in compressed pixels by chance: the picture is then encoded in another way, where chance
    does not strike again and a true leak stays. Words of the format itself, as JFIF is, do not count.

    Args:
        processes: From `pool`.
        encoded: JPEG, PNG, TIFF or DICOM bytes.
        tokens: Of the file's name and the site's own codes for the patient, beside those of the header.
        texts: The metadata values that would leave with it.
        jpeg_quality: 0 gives PNG, without loss; 1 to 100 JPEG.
    """
    for encoding in range(NUM_ENCODINGS):
        request = {"jpeg_quality": jpeg_quality, "encoding": encoding}
        try:
            facts, made = processes.run(request, encoded)
        except isolation.BeyondLimits:
            return Rematerialised(code="BEYOND_LIMITS")
        if facts["code"]:
            return Rematerialised(code=str(facts["code"]))
        require_bare(made)
        said = {token.casefold() for text in texts for token in identifiers.tokens_of(text)}
        if said & {str(token).casefold() for token in facts["naming"]}:
            break
        needles = identifiers.encoded({*map(str, facts["tokens"]), *tokens})
        blank = _encoded(np.zeros((8, 8, 3), dtype=np.uint8), **request)
        if not identifiers.found_in(made, needles) - identifiers.found_in(blank, needles):
            return Rematerialised(
                code="",
                encoded=made,
                image_id=str(facts["image_id"]),
                study=str(facts["study"]),
                taken=datetime.date.fromisoformat(facts["taken"]) if facts["taken"] else None,
            )
    return Rematerialised(code="IDENTIFIER_LEFT", study=str(facts["study"]))


def answer(request: dict[str, Any], encoded: bytes) -> isolation.Answer:
    """The work of the isolated process: one photograph made anew, or the code of why not.

    Args:
        request: ``jpeg_quality`` and ``encoding``, the number of the way to encode it.
        encoded: The source's bytes.
    """
    Image.MAX_IMAGE_PIXELS = fundus.MAX_PIXELS
    try:
        image, header = read_source(encoded)
    except UnreadablePhotograph as error:
        return {"code": error.code}, b""
    image = mask_surround(image)
    if request["encoding"] == 0 and lettering.has_text(image):
        return {"code": "TEXT_FOUND"}, b""
    made = _encoded(image, jpeg_quality=request["jpeg_quality"], encoding=request["encoding"])
    return {
        "code": "",
        "image_id": fundus.pixel_digest(fundus.decode_photograph(made) if request["jpeg_quality"] else image),
        "study": header.study,
        "taken": header.taken.isoformat() if header.taken else "",
        "naming": sorted(header.naming),
        "tokens": sorted(header.tokens),
    }, made


def read_source(encoded: bytes) -> tuple[Photograph, dicom.Header]:
    """Decodes a photograph of any accepted format and gathers what its file says beside the pixels.

    Raises:
        UnreadablePhotograph: With a code of `REFUSED` or `KEPT_BACK`.
    """
    if dicom.is_dicom(encoded):
        return dicom.read_photograph(encoded)
    image = fundus.decode_photograph(encoded)
    tokens = {token for part in _parts_around_pixels(encoded) for token in identifiers.tokens_of(part)}
    return image, dicom.Header(tokens=frozenset(tokens))


def mask_surround(image: Photograph) -> Photograph:
    """Sets everything outside of the field of view, where cameras print names and dates, to zero.

    The field of view is the fitted circle. Without one it is the convex hull of the largest lit part, if that is a
    quarter of the picture at least; otherwise, as in a photograph cropped to the retina, everything stays.
    """
    field_of_view = fundus.find_field_of_view(image)
    inside = fundus.inside_mask(image.shape, field_of_view) if field_of_view else _hull_mask(image)
    if inside is None:
        return image
    masked: Photograph = image.copy()
    masked[~inside] = 0
    return masked


def _hull_mask(image: Photograph) -> npt.NDArray[np.bool_] | None:
    height, width = image.shape[:2]
    reduction = max(1.0, max(height, width) / _THUMBNAIL_PX)
    size = (max(1, round(width / reduction)), max(1, round(height / reduction)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).max(axis=2)
    labels, num_parts = ndimage.label(small > _LIT_LEVEL)
    if not num_parts:
        return None
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    rows, columns = np.nonzero(largest)
    corners = np.concatenate([np.stack([columns + x, rows + y], axis=1) for x in (0, 1) for y in (0, 1)])
    hull = spatial.ConvexHull(corners)
    if hull.volume < MIN_HULL_SHARE * size[0] * size[1]:  # `volume` is the area in two dimensions
        return None
    y, x = np.ogrid[: size[1], : size[0]]
    inside = np.ones((size[1], size[0]), dtype=bool)
    for across, down, offset in np.unique(hull.equations.round(9), axis=0):
        inside &= across * (x + 0.5) + down * (y + 0.5) + offset <= 0
    return np.asarray(Image.fromarray(inside).resize((width, height), Image.Resampling.NEAREST))


def _encoded(image: Photograph, *, jpeg_quality: int, encoding: int) -> bytes:
    stream = io.BytesIO()
    if jpeg_quality:
        ways: tuple[dict[str, bool], ...] = ({}, {"optimize": True}, {"progressive": True})
        Image.fromarray(image).save(stream, "JPEG", quality=jpeg_quality, subsampling=0, **ways[encoding])
    else:
        Image.fromarray(image).save(stream, "PNG", compress_level=(3, 5, 9)[encoding])
    return stream.getvalue()


def require_bare(encoded: bytes) -> None:
    """Holds a picture that is about to leave to its format's least: a PNG of IHDR, IDAT and IEND, or a JPEG of tables.

    Raises:
        ValueError: If there is anything else in it, or behind it.
    """
    if encoded.startswith(_PNG_SIGNATURE):
        names = [name for name, _ in _png_chunks(encoded)]
        if names[:1] != [b"IHDR"] or names[-1:] != [b"IEND"] or set(names[1:-1]) != {b"IDAT"}:
            raise ValueError("found a PNG with other chunks than IHDR, IDAT and IEND; required no others")
        return
    kinds, end = _jpeg_segments(encoded)
    # JFIF header without a thumbnail, quantisation, frame, Huffman tables, scan: no other segment and no comment
    is_right = kinds[:1] == [0xE0] and encoded[4:11] == b"\0\x10JFIF\0"
    if not is_right or not set(kinds[1:]) <= {0xDB, 0xC0, 0xC2, 0xC4, 0xDA} or end != len(encoded):
        raise ValueError("found a JPEG with a comment, an application's segment or bytes behind it; required none")


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (name, content) of each chunk, and the bytes behind the end under the name ``behind``."""
    offset = len(_PNG_SIGNATURE)
    while offset + 12 <= len(encoded):
        length, name = struct.unpack_from(">I4s", encoded, offset)
        yield name, encoded[offset + 8 : offset + 8 + length]
        offset += 12 + length
        if name == b"IEND":
            break
    if offset < len(encoded):
        yield b"behind", encoded[offset:]


def _jpeg_segments(encoded: bytes) -> tuple[list[int], int]:
    """Returns the marker of each segment of a JPEG, and where its end-of-image marker ends."""
    kinds: list[int] = []
    offset = 2
    while offset + 4 <= len(encoded) and encoded[offset] == 0xFF and encoded[offset + 1] != 0xD9:
        kinds.append(encoded[offset + 1])
        offset += 2 + int.from_bytes(encoded[offset + 2 : offset + 4], "big")
        if kinds[-1] == 0xDA:
            offset = _end_of_scan(encoded, offset)
    return kinds, offset + 2


def _end_of_scan(encoded: bytes, offset: int) -> int:
    """In a scan 0xFF is followed by 0 or by a restart marker; anything else is the next segment."""
    while (offset := encoded.find(b"\xff", offset)) >= 0 and offset + 1 < len(encoded):
        if encoded[offset + 1] and not 0xD0 <= encoded[offset + 1] <= 0xD7:
            return offset
        offset += 2
    return len(encoded)


def _parts_around_pixels(encoded: bytes) -> Iterator[bytes]:
    """Yields what a JPEG, PNG or TIFF file holds beside its compressed pixels, compressed texts inflated."""
    if encoded.startswith(_PNG_SIGNATURE):
        for name, content in _png_chunks(encoded):
            if name != b"IDAT":
                yield content
            if name in (b"zTXt", b"iTXt"):
                yield from _inflated(content)
    elif encoded.startswith(b"\xff\xd8"):
        offset = 2
        while offset + 4 <= len(encoded) and encoded[offset] == 0xFF and encoded[offset + 1] not in (0xD9, 0xDA):
            length = int.from_bytes(encoded[offset + 2 : offset + 4], "big")
            if encoded[offset + 1] >= 0xE0:  # application segments and comments; the others are tables of numbers
                yield encoded[offset + 4 : offset + 2 + length]
            offset += 2 + length
        yield encoded[_jpeg_segments(encoded)[1] :]
    else:
        with Image.open(io.BytesIO(encoded), formats=["TIFF"]) as opened:
            tags = opened.tag_v2  # type: ignore[attr-defined]
            starts = tags.get(273) or tags.get(324) or ()
            lengths = tags.get(279) or tags.get(325) or ()
        offset = 0
        for start, length in sorted(zip(starts, lengths, strict=False)):
            yield encoded[offset:start]
            offset = start + length
        yield encoded[offset:]


def _inflated(content: bytes) -> Iterator[bytes]:
    for offset in range(len(content) - 1):
        if content[offset] == 0x78:  # a zlib stream begins with it
            try:
                yield zlib.decompressobj().decompress(content[offset:], 2**20)
            except zlib.error:
                continue
            return


def pseudonym(site_key: bytes, patient: str) -> str:
    """Returns a patient's pseudonym: a keyed digest that only the holder of the site's key can make again.

    Args:
        site_key: At least 16 secret bytes that never leave the site.
        patient: The site's own code for the person.

    Returns:
        32 hex digits: the first 16 bytes of HMAC-SHA256.

    Raises:
        ValueError: If the key is too short.
    """
    return _keyed(site_key, patient)[:16].hex()


def uid_pseudonym(site_key: bytes, uid: str) -> str:
    """Returns the UID that stands for one of the site's: 2.25 and 128 bits of HMAC-SHA256 as a decimal number.

    Source: DICOM PS3.5, section B.2.

    Raises:
        ValueError: If the key is too short.
    """
    return f"2.25.{int.from_bytes(_keyed(site_key, f'uid/{uid}')[:16], 'big')}"


def shifted_date(site_key: bytes, patient: str, date: datetime.date) -> datetime.date:
    """Moves a date by the patient's own number of days, 1 to 365 back or forth, so that intervals stay what they are.

    Raises:
        ValueError: If the key is too short.
    """
    place = int.from_bytes(_keyed(site_key, f"date/{patient}")[:8], "big") % (2 * MAX_SHIFT_DAYS)
    days = place - MAX_SHIFT_DAYS if place < MAX_SHIFT_DAYS else place - MAX_SHIFT_DAYS + 1
    return date + datetime.timedelta(days=days)


def is_pseudonym(text: str) -> bool:
    """Tells whether a text has the form of `pseudonym`."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def is_uid_pseudonym(text: str) -> bool:
    """Tells whether a text has the form of `uid_pseudonym`."""
    number = re.fullmatch(r"2\.25\.(0|[1-9][0-9]{0,38})", text)
    return number is not None and int(number[1]) < 2**128


def _keyed(site_key: bytes, text: str) -> bytes:
    if len(site_key) < 16:
        raise ValueError(f"found a site key of {len(site_key)} bytes; required at least 16")
    return hmac.new(site_key, text.encode(), hashlib.sha256).digest()


def methods_of(cells: Mapping[str, Any], *, has_year: bool) -> str:
    """Returns what was done, for a row: the policy and DICOM's codes of the methods, separated by blanks.

    Args:
        cells: The values that leave with the photograph; blanks are absent.
        has_year: Whether its moved year leaves.
    """
    codes = [
        *METHODS,
        *([METHOD_DATES] if has_year else []),
        *([METHOD_CHARACTERISTICS] if any(name in cells for name in _CHARACTERISTICS) else []),
    ]
    return " ".join([POLICY, *codes])
