"""Lettering in photographs: names, dates and numbers that a camera or a person wrote into the picture itself.

It finds lines of text and reads them only to tell letters from vessels; what is read leaves this room as a count. The
networks are PP-OCRv6's small detector and recogniser (Apache-2.0), two ONNX files of the package rapidocr, whose code
is not imported.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from gretfound.errors import ConfigError
from gretfound.fundus import Photograph

if TYPE_CHECKING:
    import onnxruntime

DETECTOR_NAME = "PP-OCRv6_det_small.onnx"
RECOGNISER_NAME = "PP-OCRv6_rec_small.onnx"
NETWORK_DIGESTS = {  # SHA-256 of rapidocr 3.10.0's files: what is taken for text below was measured with these
    DETECTOR_NAME: "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    RECOGNISER_NAME: "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
}
# Every photograph is reduced a little before it is searched, since noise hides small letters from the detector: of 16
# lines of 8 px it found 16 at 0.66, 0.8 and 0.9, 15 at 1.03, none at 2. Large ones are reduced more: time and memory
# grow with the pixels.
MAX_SCALE = 0.8
MAX_SIDE_PX = 1536
GRID_PX = 32  # the detector's input is a multiple of it
LINE_HEIGHT_PX = 48  # of the recogniser's input
MIN_LINE_PX, MAX_LINE_PX = 64, 24 * LINE_HEIGHT_PX
TEXT_LEVEL = 0.25
MIN_CANDIDATE_PROBABILITY = 0.4
MIN_CANDIDATE_PIXELS = 12
MAX_CANDIDATES = 40
UNCLIP_RATIO = 1.6  # the detector marks the heart of a line: Liao et al., arXiv:1911.08947, section 3.4
# What is text. Chosen on 74 photographs without text and 250 planted lines; docs/privacy.md has the figures on others.
MIN_CHARACTERS, MIN_CONFIDENCE = 3, 0.6
MIN_PROBABILITY, MIN_ASPECT, MAX_HEIGHT_SHARE = 0.55, 1.3, 0.12
_Corners = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A place that may hold a line of text.

    ``length_px`` and ``height_px`` are in pixels of the photograph, ``height_share`` is of its shorter side.
    ``probability`` is the detector's mean over it, ``confidence`` the recogniser's over the ``num_characters`` that it
    read.
    """

    length_px: float
    height_px: float
    height_share: float
    probability: float
    num_characters: int
    confidence: float

    @property
    def is_shaped_as_text(self) -> bool:
        """Whether the detector alone is sure: no vessel, lesion or disc of 324 photographs was seen to be so.

        This is what finds writing that the recogniser cannot read.
        """
        is_line = self.length_px >= MIN_ASPECT * self.height_px and self.height_share <= MAX_HEIGHT_SHARE
        return is_line and self.probability >= MIN_PROBABILITY

    @property
    def is_text(self) -> bool:
        """Whether it is to be taken for text."""
        is_read = self.num_characters >= MIN_CHARACTERS and self.confidence >= MIN_CONFIDENCE
        return is_read or self.is_shaped_as_text


def has_text(image: Photograph) -> bool:
    """Tells whether a photograph shows text of three or more characters.

    Raises:
        ConfigError: If the networks are not installed.
    """
    return any(line.is_text for line in find_lines(image))


def find_lines(image: Photograph) -> Iterator[Line]:
    """Yields places that may be text, the detector's surest first, in any direction; most are not text.

    Args:
        image: RGB of shape (height, width, 3). Black surround is cut away first.

    Raises:
        ConfigError: If the networks are not installed.
    """
    lit = image.max(axis=2) > 0
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return
    image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = image.shape[:2]
    scale = min(MAX_SCALE, MAX_SIDE_PX / max(height, width))
    size = (_on_grid(width * scale), _on_grid(height * scale))
    photograph = Image.fromarray(image)
    picture = photograph.resize(size, Image.Resampling.BICUBIC)
    (detected,) = _network(DETECTOR_NAME).run(None, {"x": _input_of(picture)})
    to_photograph = np.array([width / size[0], height / size[1]])
    for probability, found in _candidates(detected[0, 0]):
        corners = found * to_photograph
        line = Line(
            length_px=float(np.linalg.norm(corners[3] - corners[0])),
            height_px=(height_px := float(np.linalg.norm(corners[1] - corners[0]))),
            height_share=height_px / min(height, width),
            probability=probability,
            num_characters=0,
            confidence=0.0,
        )
        if line.is_shaped_as_text:
            yield line  # reading it would change nothing
            continue
        readings = (_read(photograph, turned) for turned in (corners, np.roll(corners, 2, axis=0)))
        num_characters, confidence = max(readings, key=lambda reading: reading[1])
        yield replace(line, num_characters=num_characters, confidence=confidence)


def _on_grid(side: float) -> int:
    return max(GRID_PX, round(side / GRID_PX) * GRID_PX)


def _candidates(probability: npt.NDArray[np.float32]) -> list[tuple[float, _Corners]]:
    """Returns (mean probability, four corners as x and y) of each connected part, surest first.

    The corners run from the top left down and around; the first and the last span the direction of the text.
    """
    labels, _ = ndimage.label(probability > TEXT_LEVEL, np.ones((3, 3)))
    found = []
    for index, place in enumerate(ndimage.find_objects(labels), start=1):
        y, x = np.nonzero(labels[place] == index)
        mean = float(probability[place][y, x].mean())
        if len(x) < MIN_CANDIDATE_PIXELS or mean < MIN_CANDIDATE_PROBABILITY:
            continue
        points = np.stack([x + place[1].start + 0.5, y + place[0].start + 0.5], axis=1)
        found.append((mean, _corners_around(points)))
    return sorted(found, key=lambda each: -each[0])[:MAX_CANDIDATES]


def _corners_around(points: npt.NDArray[np.float64]) -> _Corners:
    """Returns the rectangle along the points' main axis, widened by what the detector leaves out at each side."""
    axis = np.linalg.eigh(np.cov(points.T))[1][:, 1]
    axis = axis if axis[0] >= 0 else -axis
    across = np.array([-axis[1], axis[0]])
    along, aside = points @ axis, points @ across
    length, height = np.ptp(along) + 1, np.ptp(aside) + 1
    margin = 0.5 + UNCLIP_RATIO * length * height / (2 * (length + height))
    start, end = along.min() - margin, along.max() + margin
    top, bottom = aside.min() - margin, aside.max() + margin
    return np.array([start * axis + top * across, start * axis + bottom * across,
                     end * axis + bottom * across, end * axis + top * across])  # fmt: skip


def _read(photograph: Image.Image, corners: _Corners) -> tuple[int, float]:
    """Returns how many characters the recogniser sees within the corners, and its mean confidence in them."""
    length, height = (float(np.linalg.norm(corners[end] - corners[0])) for end in (3, 1))
    width = int(np.clip(LINE_HEIGHT_PX * length / max(height, 1.0), MIN_LINE_PX // 4, MAX_LINE_PX))
    line = photograph.transform(
        (width, LINE_HEIGHT_PX), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC
    )
    padding = np.zeros((1, 3, LINE_HEIGHT_PX, max(0, MIN_LINE_PX - width)), dtype=np.float32)
    (read,) = _network(RECOGNISER_NAME).run(None, {"x": np.concatenate([_input_of(line), padding], axis=3)})
    classes, certainty = read[0].argmax(axis=1), read[0].max(axis=1)
    is_character = (classes > 0) & np.append(True, classes[1:] != classes[:-1])  # 0 is the blank between characters
    count = int(is_character.sum())
    return count, float(certainty[is_character].mean()) if count else 0.0


def _input_of(picture: Image.Image) -> npt.NDArray[np.float32]:
    """Returns a picture as the networks take it: shape (1, 3, height, width), BGR, -1 to 1."""
    bgr = np.asarray(picture)[:, :, ::-1].astype(np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(bgr.transpose(2, 0, 1))[None]


@functools.cache
def _network(name: str) -> "onnxruntime.InferenceSession":
    import onnxruntime  # here: rooms that only decode need none of it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # one photograph's memory is not kept for the next
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(_network_path(name), options, providers=["CPUExecutionProvider"])


def require_networks() -> None:
    """Looks whether photographs can be searched here, with the networks that the figures are of.

    Raises:
        ConfigError: If the networks are not installed, or are others.
    """
    for name, required in NETWORK_DIGESTS.items():
        found = hashlib.sha256(_network_path(name).read_bytes()).hexdigest()
        if found != required:
            raise ConfigError(f"found {name} of SHA-256 {found}; required {required}: install rapidocr 3.10.0")


def _network_path(name: str) -> Path:
    found = importlib.util.find_spec("rapidocr")  # this does not import it
    places: Sequence[str] = (found.submodule_search_locations or []) if found else []
    path = next((path for place in places if (path := Path(place) / "models" / name).is_file()), None)
    if path is None:
        raise ConfigError(f"the package rapidocr with {name} is required to search photographs for text; install it")
    return path
