"""Latents: photographs and captions as a generator's training reads them, encoded once and kept as Parquet.

A cache is a folder of two files for one shard, the same at a site and at the hub::

    captions.parquet    caption, text       each caption once, "" among them, and its embedding (tokens, width)
    latents.parquet     image_id, caption, latents, mirrored_caption, mirrored_latents      in the order of the shard

`latents` holds a photograph's scaled latents (channels, rows, columns) as they are, `mirrored_latents` those of its
mirror image; numbers are float32. A training lays caches out as files of rows of equal length and reads the rows of a
step from there, so that its memory does not grow with the number of photographs.
"""

import functools
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from gretfound import fundus, lineage, metadata, storage
from gretfound.errors import ConfigError
from gretfound.generator import autoencoding, families, squares
from gretfound.generator.squares import Square

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]
VERSION = 1  # of what a cache holds: raise it when squares, captions or the files change
CAPTIONS_NAME, LATENTS_NAME = "captions.parquet", "latents.parquet"
# Of a pipeline: what its latents and embeddings depend on.
ENCODING_FOLDERS = (
    "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae",
)  # fmt: skip
NUM_VIEWS = 2
ENCODE_BATCH = 16
CAPTION_BATCH = 64
ROW_GROUP = 64


class Rows:
    """Rows of float32 numbers of one shape in a file, read by their number.

    They are read, not mapped: mapped pages count as this process's memory, pages that are read stay the system's.

    Args:
        path: The file.
        shape: Of a row.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self._stream = path.open("rb")
        self._shape, self._num_items = tuple(shape), math.prod(shape)

    def __len__(self) -> int:
        return os.fstat(self._stream.fileno()).st_size // (4 * self._num_items)

    def __getitem__(self, number_B: Tensor) -> Tensor:
        """Returns the rows of these numbers, (B, *shape)."""
        items = np.empty((len(number_B), self._num_items), "<f4")
        for row, number in enumerate(number_B.tolist()):
            os.preadv(self._stream.fileno(), [items[row]], 4 * self._num_items * number)
        return torch.from_numpy(items).view(-1, *self._shape)


@dataclass(frozen=True, kw_only=True)
class EncodedPhotographs:
    """Photographs as the training reads them: view 0 as they are, view 1 mirrored.

    Attributes:
        latents: Of photograph p in view v, the row ``2 p + v``.
        text: Embeddings of ``captions``.
        captions: Each once; the empty one is among them.
        caption_numbers: The places in ``captions`` of each row of ``latents``, (rows, ways): the caption whole, or as
            `metadata.shortened` in each way.
    """

    latents: Rows
    text: Rows
    captions: tuple[str, ...]
    caption_numbers: Tensor

    @property
    def num_images(self) -> int:
        """Photographs, not counting views."""
        return len(self.caption_numbers) // NUM_VIEWS

    @property
    def empty_text(self) -> Tensor:
        """The embedding of the empty caption."""
        return self.text[torch.tensor([self.captions.index("")])][0]


def key_of(
    base_files: Iterable[tuple[str, str]], *, shard_sha256: str, resolution_px: int, cell_dropout: float = 0.0
) -> str:
    """Names a cache by all that its content depends on, so that one that is there is the right one.

    Args:
        base_files: Relative path and SHA-256 of the base pipeline's files.
        shard_sha256: Of the shard.
        resolution_px: Side of the squares.
        cell_dropout: See `encode_squares`.
    """
    encoders = sorted((path, sha256) for path, sha256 in base_files if path.split("/")[0] in ENCODING_FOLDERS)
    shortened = [cell_dropout] if cell_dropout else []
    return lineage.digest_of([VERSION, encoders, shard_sha256, resolution_px, *shortened])


def encoding_files(base_path: Path) -> list[tuple[str, str]]:
    """Lists relative path and SHA-256 of those files of a pipeline's folder that `key_of` looks at."""
    folders = [base_path / name for name in ENCODING_FOLDERS]
    described = [each for folder in folders for each in storage.describe_folder(folder)]
    return [(str(path.relative_to(base_path)), sha256) for path, sha256, _ in described]


def encode_shard(
    shard_path: Path,
    cache_path: Path,
    *,
    base: DiffusionPipeline,
    resolution_px: int,
    cell_dropout: float = 0.0,
    left_out: Collection[str] = (),
    on_decoding: Callable[[str], object] = lambda _: None,
) -> int:
    """Encodes the photographs and captions of a shard into a cache; photographs that cannot be read are left out.

    Args:
        shard_path: The shard.
        cache_path: The cache's folder; an earlier one is replaced.
        base: The pipeline whose autoencoder and text encoder are used.
        resolution_px: Side of the squares.
        cell_dropout: See `encode_squares`.
        left_out: Image ids of photographs that are not touched.
        on_decoding: Told the image id of each photograph before it is decoded, and ``""`` after.

    Returns:
        The number of photographs in the cache.

    Raises:
        ConfigError: If the side does not fit the networks.
    """
    num_unreadable = 0

    def readable() -> Iterator[tuple[str, Square]]:
        nonlocal num_unreadable
        for image_id, encoded, cells in squares.read_photographs(shard_path):
            if image_id in left_out:
                continue
            on_decoding(image_id)
            try:
                square = squares.square_of(encoded, cells, resolution_px=resolution_px)
            except fundus.UnreadablePhotograph:
                num_unreadable += 1
                continue
            finally:
                on_decoding("")
            yield image_id, square

    num_images = encode_squares(readable(), cache_path, base=base, cell_dropout=cell_dropout)
    if num_unreadable:
        log.warning("%d photograph(s) could not be read and are left out", num_unreadable)
    return num_images


def encode_squares(
    photographs: Iterable[tuple[str, Square]], cache_path: Path, *, base: DiffusionPipeline, cell_dropout: float = 0.0
) -> int:
    """Encodes photographs, their mirror images and their captions into a cache; one that is cut short is never seen.

    Args:
        photographs: Image id and square of each.
        cache_path: The cache's folder; an earlier one is replaced.
        base: The pipeline whose autoencoder and text encoder are used.
        cell_dropout: Captions are also encoded as `metadata.shortened` makes them of this share; 0: whole only.

    Returns:
        The number of photographs.

    Raises:
        ConfigError: If their side does not fit the networks.
    """
    partial = cache_path.with_name(f".{cache_path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    captions: dict[str, None] = {}
    remaining = iter(photographs)
    num_images = 0
    with _Writer(partial / LATENTS_NAME, ("image_id", "caption", "mirrored_caption")) as writer:
        while block := list(itertools.islice(remaining, ENCODE_BATCH)):
            written = [square for _, square in block]
            latents_VBChw = _encode_views(base, written)
            for each in written:
                for caption in (each.caption, each.mirrored_caption):
                    captions.update(dict.fromkeys(_ways(caption, cell_dropout)))
            words = {
                "image_id": [image_id for image_id, _ in block],
                "caption": [each.caption for each in written],
                "mirrored_caption": [each.mirrored_caption for each in written],
            }
            writer.write(words, {"latents": latents_VBChw[0], "mirrored_latents": latents_VBChw[1]})
            num_images += len(block)
    with _Writer(partial / CAPTIONS_NAME, ("caption",)) as writer:
        every = [*captions, ""]
        for first in range(0, len(every), CAPTION_BATCH):
            listed = every[first : first + CAPTION_BATCH]
            writer.write({"caption": listed}, {"text": embed_captions(base, listed)})
    shutil.rmtree(cache_path, ignore_errors=True)
    partial.rename(cache_path)
    return num_images


def _ways(caption: str, cell_dropout: float) -> list[str]:
    """Returns the captions that a training draws from in the place of one."""
    if not cell_dropout:
        return [caption]
    return [metadata.shortened(caption, way, cell_dropout=cell_dropout) for way in range(metadata.NUM_SHORTENED)]


def _encode_views(base: DiffusionPipeline, photographs: Sequence[Square]) -> Tensor:
    """Returns the latents (view, B, C, h, w) of photographs and their mirror images."""
    pixels_BCHW = squares.as_tensor([each.pixels for each in photographs])
    deepest = families.side_step_px(base)
    if pixels_BCHW.shape[-1] % deepest:
        raise ConfigError(f"resolution_px={pixels_BCHW.shape[-1]} must be a multiple of {deepest} for this base")
    # Blocks of one length: a photograph's latents must not depend on how many others there are.
    missing = torch.zeros(ENCODE_BATCH - len(pixels_BCHW), *pixels_BCHW.shape[1:])
    whole_BCHW = torch.cat([pixels_BCHW, missing])
    views = [autoencoding.encode_photographs(base.vae, each) for each in (whole_BCHW, whole_BCHW.flip(-1))]
    return torch.stack(views)[:, : len(photographs)]


@torch.inference_mode()
def embed_captions(base: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Returns the embeddings (B, L, D) of captions, on the CPU; one does not depend on how many others there are."""
    blocks = []
    for first in range(0, len(captions), CAPTION_BATCH):
        listed = list(captions[first : first + CAPTION_BATCH])
        text_NLD = families.embed(base, [*listed, *[""] * (CAPTION_BATCH - len(listed))])
        blocks.append(text_NLD[: len(listed)].float().cpu())
    return torch.cat(blocks)


class _Writer:
    """Writes columns of words and columns of tensors to a Parquet file, whose schema holds the tensors' shape."""

    def __init__(self, path: Path, word_columns: Sequence[str]) -> None:
        self._path, self._word_columns = path, word_columns
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._parquet is None:  # no row was written
            self._open({})
        if self._parquet is not None:
            self._parquet.close()

    def _open(self, shapes: dict[str, tuple[int, ...]]) -> None:
        words = [pa.field(name, pa.string()) for name in self._word_columns]
        items = [pa.field(name, pa.binary(4 * math.prod(shape))) for name, shape in shapes.items()]
        shape = next(iter(shapes.values()), ())
        schema = pa.schema([*words, *items], metadata={"shape": json.dumps(shape)})
        compression = dict.fromkeys(self._word_columns, "ZSTD") | dict.fromkeys(shapes, "NONE")
        self._parquet = pq.ParquetWriter(self._path, schema, compression=compression, use_dictionary=False)

    def write(self, words: dict[str, list[str]], tensors: dict[str, Tensor]) -> None:
        if self._parquet is None:
            self._open({name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()})
        assert self._parquet is not None
        columns = [pa.array(words[name], pa.string()) for name in self._word_columns]
        for tensor in tensors.values():
            items = np.ascontiguousarray(tensor.flatten(1).numpy(), "<f4")
            kind = pa.binary(items.shape[1] * 4)
            columns.append(pa.FixedSizeBinaryArray.from_buffers(kind, len(items), [None, pa.py_buffer(items)]))
        self._parquet.write_table(pa.Table.from_arrays(columns, schema=self._parquet.schema), row_group_size=ROW_GROUP)


def lay_out(
    cache_paths: Sequence[Path], rows_path: Path, *, left_out: Collection[str] = (), cell_dropout: float = 0.0
) -> EncodedPhotographs:
    """Lays caches out as rows that can be read in any order.

    Args:
        cache_paths: Caches of one base and size, in the order of their shards.
        rows_path: A folder for the rows; what an earlier call left there is replaced.
        left_out: Image ids of photographs that are not to be read (`gretfound.holdout`).
        cell_dropout: That of the caches.

    Raises:
        ConfigError: If no photograph is left.
    """
    rows_path.mkdir(parents=True, exist_ok=True)
    unwanted = frozenset(left_out)
    numbers: dict[str, int] = {}
    caption_numbers: list[list[int]] = []
    ways_of = functools.cache(lambda caption: [numbers[each] for each in _ways(caption, cell_dropout)])
    text_shape: tuple[int, ...] = ()
    latents_shape: tuple[int, ...] = ()
    with (rows_path / "text").open("wb") as text, (rows_path / "latents").open("wb") as rows:
        for cache_path in cache_paths:
            for shape, block in _read_blocks(cache_path / CAPTIONS_NAME):
                text_shape = shape
                for caption, embedding in zip(block["caption"].to_pylist(), _numbers(block["text"]), strict=True):
                    if caption not in numbers:
                        numbers[caption] = len(numbers)
                        text.write(embedding.tobytes())
            for shape, block in _read_blocks(cache_path / LATENTS_NAME):
                latents_shape = shape
                views = np.stack([_numbers(block["latents"]), _numbers(block["mirrored_latents"])], axis=1)
                captions = zip(block["caption"].to_pylist(), block["mirrored_caption"].to_pylist(), strict=True)
                for image_id, pair, view_VI in zip(block["image_id"].to_pylist(), captions, views, strict=True):
                    if image_id not in unwanted:
                        caption_numbers.extend(ways_of(caption) for caption in pair)
                        rows.write(view_VI.tobytes())
    if not caption_numbers:
        raise ConfigError("found no readable photograph that is not left out; required at least one")
    return EncodedPhotographs(
        latents=Rows(rows_path / "latents", latents_shape),
        text=Rows(rows_path / "text", text_shape),
        captions=tuple(numbers),
        caption_numbers=torch.tensor(caption_numbers),
    )


def _read_blocks(path: Path) -> Iterator[tuple[tuple[int, ...], pa.RecordBatch]]:
    with pq.ParquetFile(path) as parquet:
        shape = tuple(json.loads(parquet.schema_arrow.metadata[b"shape"]))
        for block in parquet.iter_batches(batch_size=ROW_GROUP):
            yield shape, block


def _numbers(column: Any) -> Floats:
    """Returns a column of float32 rows as a matrix."""
    width = column.type.byte_width
    items = np.frombuffer(column.buffers()[1], "<f4", len(column) * width // 4, column.offset * width)
    return items.reshape(len(column), -1)


def latent_batches(
    photographs: EncodedPhotographs, *, batch_size: int, seed: int, accumulation: int = 1, has_text: bool = True
) -> Callable[[int], Iterator[dict[str, Tensor]]]:
    """Returns a stream of batches that is a pure function of the position in the run.

    Every epoch is a permutation, each image is mirrored or not by a fair coin of its position, and its caption is whole
    or shortened by another draw; with several workers each takes every n-th image of a step.

    Args:
        photographs: What to read.
        batch_size: Photographs a step, over all workers.
        seed: Decides order, views and captions.
        accumulation: Batches that a step is given in.
        has_text: Whether ``caption`` is the captions' embeddings (B, L, D); else it is their numbers (B).
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    worker, num_workers = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed else (0, 1)
    )

    num_ways = photographs.caption_numbers.shape[1]

    def stream(images_seen: int) -> Iterator[dict[str, Tensor]]:
        for first in itertools.count(images_seen, batch_size):
            step_B = torch.arange(first + worker, first + batch_size, num_workers)
            for position_B in step_B.chunk(accumulation):
                photograph_B, view_B = order_at(position_B, num_images=photographs.num_images, seed=seed)
                row_B = NUM_VIEWS * photograph_B + view_B
                caption_B = photographs.caption_numbers[row_B, way_at(position_B, num_ways=num_ways, seed=seed)]
                yield {
                    "latents_BCHW": photographs.latents[row_B],
                    "caption": photographs.text[caption_B] if has_text else caption_B,
                    "position_B": position_B,
                }

    return stream


def order_at(position_B: Tensor, *, num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns which photograph, and which view of it, stands at each position of a run."""
    photographs, views = [], []
    epoch_order: dict[int, npt.NDArray[np.int64]] = {}
    for position in position_B.tolist():
        epoch, index = divmod(position, num_images)
        if epoch not in epoch_order:
            epoch_order[epoch] = np.random.default_rng([seed, 1, epoch]).permutation(num_images)
        photographs.append(int(epoch_order[epoch][index]))
        views.append(int(np.random.default_rng([seed, 2, position]).integers(NUM_VIEWS)))
    return torch.tensor(photographs), torch.tensor(views)


def way_at(position_B: Tensor, *, num_ways: int, seed: int) -> Tensor:
    """Returns in which of the ways the caption at each position of a run is shortened."""
    if num_ways == 1:
        return torch.zeros_like(position_B)
    drawn = [np.random.default_rng([seed, 3, position]).integers(num_ways) for position in position_B.tolist()]
    return torch.tensor(drawn)
