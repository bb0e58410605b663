"""Shards: the format that other people's tools read."""

from pathlib import Path

import pyarrow.parquet as pq

from gretfound import shard, storage
from tests.hubs import draw_shard_set


def test_write_shard__format(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    part = draw_shard_set(hub_uri, "birch", num_images=4, origin="synthetic").shards[0]
    _, path = storage.filesystem(storage.join(hub_uri, part.path))
    footer = pq.ParquetFile(path).metadata
    by_name = {
        footer.row_group(0).column(i).path_in_schema: footer.row_group(0).column(i) for i in range(footer.num_columns)
    }
    assert by_name["image"].compression == "UNCOMPRESSED" and by_name["site_id"].compression == "ZSTD"
    row = next(shard.read_rows(storage.join(hub_uri, part.path)))
    assert (
        row["origin"] == "synthetic"
        and row["prompt"].startswith("colour fundus photograph")
        and row["fov_radius_px"] > 20
    )
