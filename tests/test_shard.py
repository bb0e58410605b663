"""Shards: the format that other people's tools read."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

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


def test_write_shard_file__large_images_make_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    part = draw_shard_set(hub_uri, "birch", num_images=10).shards[0]
    rows = list(shard.read_rows(storage.join(hub_uri, part.path)))
    monkeypatch.setattr(shard, "MAX_ROW_GROUP_BYTES", len(rows[0]["image"]) + len(rows[1]["image"]))
    assert shard.write_shard_file(tmp_path / "part.parquet", rows) == len(rows) == 5
    footer = pq.read_metadata(tmp_path / "part.parquet")
    assert footer.row_group(0).num_rows == 2
    assert list(shard.read_rows(str(tmp_path / "part.parquet"))) == rows
