"""What a contribution may hold: screening of its shards."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gretfound import contribution, fundus, phantom, shard
from gretfound.errors import ContributionRejected

SIZE_PX = 64


def _rows(num_images: int, *, origin: str = "real") -> list[dict[str, Any]]:
    site = phantom.SITES["aster"]
    images = [phantom.draw_eye(site, seed=seed, size_px=SIZE_PX).image for seed in range(num_images)]
    return [shard.row_of(fundus.encode_png(image), site_id="aster", origin=origin, cells={}) for image in images]


def test_screen_shard_file__takes_out_a_damaged_row_and_keeps_its_neighbours(tmp_path: Path) -> None:
    rows = _rows(5)
    rows[1]["image"] = rows[1]["image"][: len(rows[1]["image"]) // 2]
    rows[3]["image"] = rows[4]["image"]
    shard.write_shard_file(tmp_path / "part.parquet", rows)
    rejected = contribution.screen_shard_file(tmp_path / "part.parquet", site_id="aster", origin="real")
    assert rejected == {"not_the_named_photograph": 1, "unreadable": 1}
    kept = pq.read_table(tmp_path / "part.parquet")["image_id"].to_pylist()
    assert kept == [rows[index]["image_id"] for index in (0, 2, 4)]


def test_screen_shard_file__leaves_a_sound_shard_untouched(tmp_path: Path) -> None:
    shard.write_shard_file(tmp_path / "part.parquet", _rows(2))
    before = (tmp_path / "part.parquet").read_bytes()
    assert contribution.screen_shard_file(tmp_path / "part.parquet", site_id="aster", origin="real") == {}
    assert (tmp_path / "part.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "origin", "code"),
    [
        ({"site_id": "birch"}, "real", "SITE_MISMATCH"),
        ({"origin": "synthetic"}, "real", "SITE_MISMATCH"),
        ({"origin": "synthetic", "patient": "p1"}, "synthetic", "PATIENT_IN_SYNTHETIC"),
    ],
)
def test_screen_shard_file__rejects_rows_of_others(
    tmp_path: Path, changes: dict[str, str], origin: str, code: str
) -> None:
    shard.write_shard_file(tmp_path / "part.parquet", [row | changes for row in _rows(1)])
    with pytest.raises(ContributionRejected) as caught:
        contribution.screen_shard_file(tmp_path / "part.parquet", site_id="aster", origin=origin)
    assert caught.value.code == code
