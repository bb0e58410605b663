"""Shards: Parquet files of photographs with their metadata, the one format in which images live at the hub.

`image` holds JPEG or PNG bytes and is not compressed again; the other columns are (zstd). Row groups hold 256 images,
or fewer of large ones; files 128 to 512 MiB. Shard files are named by their content, so writing one twice is harmless.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gretfound import fundus, metadata, storage
from gretfound.errors import StorageError
from gretfound.lineage import Shard

log = logging.getLogger(__name__)
IMAGES_PER_ROW_GROUP = 256
MAX_ROW_GROUP_BYTES = 128 * 2**20  # of images: a reader holds a few row groups
SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("site_id", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("generator_id", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("fov_x_px", pa.float32()),
        pa.field("fov_y_px", pa.float32()),
        pa.field("fov_radius_px", pa.float32()),
        pa.field("quality", pa.float32()),
        pa.field("shifted_year", pa.int16()),
        pa.field("deid_methods", pa.string()),
        *metadata.ARROW_FIELDS,
    ]
)


def row_of(
    encoded: bytes,
    *,
    site_id: str,
    origin: str,
    cells: Mapping[str, Any],
    generator_id: str | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    shifted_year: int | None = None,
    deid_methods: str | None = None,
) -> dict[str, Any]:
    """Decodes a photograph, measures it and returns its row.

    Args:
        encoded: JPEG or PNG bytes, stored as they are.
        site_id: The site that the photograph belongs to.
        origin: ``real`` or ``synthetic``.
        cells: Canonical metadata values by column key, as `gretfound.metadata` parses them. A patient's entry must be
            a pseudonym already.
        generator_id: The generator that drew it, for a synthetic one.
        seed: The seed that it was drawn with.
        prompt: The caption that it was drawn for.
        shifted_year: Year of the photograph after the shift of its patient's dates, for a real one.
        deid_methods: How it was de-identified: the policy and DICOM's method codes, for a real one.

    Raises:
        fundus.UnreadablePhotograph: If it cannot be decoded.
    """
    image = fundus.decode_photograph(encoded)
    field_of_view = fundus.find_field_of_view(image)
    row = dict.fromkeys(SCHEMA.names) | metadata.arrow_values(cells)
    return row | {
        "image": encoded,
        "image_id": fundus.pixel_digest(image),
        "site_id": site_id,
        "origin": origin,
        "generator_id": generator_id,
        "seed": seed,
        "prompt": prompt,
        "width_px": image.shape[1],
        "height_px": image.shape[0],
        "fov_x_px": field_of_view.x_px if field_of_view else None,
        "fov_y_px": field_of_view.y_px if field_of_view else None,
        "fov_radius_px": field_of_view.radius_px if field_of_view else None,
        "quality": fundus.quality_score(image, field_of_view),
        "shifted_year": shifted_year,
        "deid_methods": deid_methods,
    }


def write_shard_file(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows to one local Parquet file, a row group at a time; equal rows give equal bytes.

    Returns:
        The number of rows.
    """
    compression = {name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names}
    num_rows = 0
    with pq.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=False) as writer:
        group: list[Mapping[str, Any]] = []
        size_bytes = 0
        for row in rows:
            group.append(row)
            size_bytes += len(row["image"])
            if len(group) == IMAGES_PER_ROW_GROUP or size_bytes >= MAX_ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=IMAGES_PER_ROW_GROUP)
                num_rows, group, size_bytes = num_rows + len(group), [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=IMAGES_PER_ROW_GROUP)
            num_rows += len(group)
    return num_rows


def adopt_shard_file(hub_uri: str, path: Path) -> Shard:
    """Copies a local shard file into the hub under the name of its content.

    Raises:
        StorageError: If the file is not Parquet or has other columns than `SCHEMA`.
    """
    try:
        footer = pq.read_metadata(path)
        found = pq.read_schema(path)
    except pa.ArrowException as error:
        raise StorageError(f"a shard file is not readable Parquet: {error}") from error
    if not found.equals(SCHEMA):
        odd = sorted(set(found.names) ^ set(SCHEMA.names)) or "the same names with other types"
        raise StorageError(f"a shard file's columns are not those of the shard format; they differ in: {odd}")
    sha256 = storage.sha256_of(path)
    shard_path = f"shards/parts/{sha256}.parquet"
    uri = storage.join(hub_uri, shard_path)
    if not storage.exists(uri):
        storage.upload_file(path, uri)
    return Shard(
        path=shard_path,
        sha256=sha256,
        size_bytes=path.stat().st_size,
        row_group_images=tuple(footer.row_group(index).num_rows for index in range(footer.num_row_groups)),
    )


def write_shard(hub_uri: str, rows: Iterable[Mapping[str, Any]]) -> Shard:
    """Writes rows as one shard of the hub."""
    with storage.scratch_folder() as folder:
        path = Path(folder) / "shard.parquet"
        write_shard_file(path, rows)
        return adopt_shard_file(hub_uri, path)


def open_shard(uri: str) -> pq.ParquetFile:
    """Opens a shard for reading row groups; the caller closes it.

    Raises:
        StorageError: If it is absent or not Parquet.
    """
    opened, path = storage.filesystem(uri)
    try:
        return pq.ParquetFile(path, filesystem=opened, pre_buffer=True)
    except FileNotFoundError as error:
        raise StorageError(f"{uri} does not exist") from error
    except pa.ArrowException as error:
        raise StorageError(f"{uri} is not readable Parquet: {error}") from error


def read_rows(uri: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields a shard's rows in order, one row group in memory at a time."""
    with open_shard(uri) as parquet:
        for index in range(parquet.num_row_groups):
            yield from parquet.read_row_group(index, columns=columns).to_pylist()
