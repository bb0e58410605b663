"""Squares: photographs as a generator sees them, cropped to the field of view, of one size, each with its caption."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gretfound import fundus, metadata
from gretfound.errors import ConfigError

log = logging.getLogger(__name__)
Pixels = npt.NDArray[np.uint8]
READ_BATCH = 16
_OTHER_EYE = {"left": "right", "right": "left"}


@dataclass(frozen=True, kw_only=True)
class Square:
    """A photograph as a square, with its caption and that of its mirror image, where a right eye is a left one."""

    pixels: Pixels
    caption: str
    mirrored_caption: str


def square_of(encoded: bytes, cells: Mapping[str, Any], *, resolution_px: int) -> Square:
    """Decodes one photograph, crops it to its field of view and resizes it.

    Args:
        encoded: The image's bytes.
        cells: Its metadata.
        resolution_px: Side of the square.

    Raises:
        fundus.UnreadablePhotograph: If it cannot be decoded.
    """
    image = fundus.decode_photograph(encoded)
    mirrored = {**cells, "eye": _OTHER_EYE[cells["eye"]]} if cells.get("eye") in _OTHER_EYE else cells
    return Square(
        pixels=fundus.to_square(image, fundus.find_field_of_view(image), resolution_px),
        caption=metadata.caption(cells),
        mirrored_caption=metadata.caption(mirrored),
    )


def squares_of(photographs: Iterable[tuple[bytes, Mapping[str, Any]]], *, resolution_px: int) -> Iterator[Square]:
    """Makes squares of photographs; the unreadable ones are counted and left out.

    Args:
        photographs: Encoded image and metadata cells of each.
        resolution_px: Side of the squares.

    Raises:
        ConfigError: If none is readable.
    """
    num_readable = num_unreadable = 0
    for encoded, cells in photographs:
        try:
            square = square_of(encoded, cells, resolution_px=resolution_px)
        except fundus.UnreadablePhotograph:
            num_unreadable += 1
            continue
        num_readable += 1
        yield square
    if num_unreadable:
        log.warning("%d photograph(s) could not be read and are left out", num_unreadable)
    if not num_readable:
        raise ConfigError(f"found no readable photograph ({num_unreadable} unreadable); required at least one")


def read_photographs(shard_path: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yields the image id, the image's bytes and the known metadata cells of the rows of a local Parquet shard."""
    names = [field.name for field in metadata.ARROW_FIELDS]
    with pq.ParquetFile(shard_path) as parquet:
        for block in parquet.iter_batches(batch_size=READ_BATCH, columns=["image", "image_id", *names]):
            for row in block.to_pylist():
                yield row["image_id"], row["image"], {name: row[name] for name in names if row[name] is not None}


def as_tensor(photographs: Sequence[Pixels]) -> Tensor:
    """Returns photographs of one size as RGB in [-1, 1], shape (B, 3, H, W)."""
    return torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).float() / 127.5 - 1
