"""What a contribution may hold: screening of its shards."""

import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gretfound import contribution, deidentify, fundus, phantom, shard
from gretfound.errors import ContributionRejected
from tests import summaries

SIZE_PX = 64


def _rows(num_images: int, *, origin: str = "real") -> list[dict[str, Any]]:
    site = phantom.SITES["aster"]
    images = [phantom.draw_eye(site, seed=seed, size_px=SIZE_PX).image for seed in range(num_images)]
    methods = deidentify.methods_of({}, has_year=False)
    return [
        shard.row_of(fundus.encode_png(image), site_id="aster", origin=origin, cells={}, deid_methods=methods)
        for image in images
    ]


def _screen(path: Path, *, origin: str = "real") -> dict[str, int]:
    summary = summaries.summary_of([{"sex": "female"}] * 4)
    return contribution.screen_shard_file(path, site_id="aster", origin=origin, summary=summary)


def test_screen_shard_file__takes_out_a_damaged_row_and_keeps_its_neighbours(tmp_path: Path) -> None:
    rows = _rows(5)
    rows[1]["image"] = rows[1]["image"][: len(rows[1]["image"]) // 2]
    rows[3]["image"] = rows[4]["image"]
    shard.write_shard_file(tmp_path / "part.parquet", rows)
    rejected = _screen(tmp_path / "part.parquet")
    assert rejected == {"not_the_named_photograph": 1, "unreadable": 1}
    kept = pq.read_table(tmp_path / "part.parquet")["image_id"].to_pylist()
    assert kept == [rows[index]["image_id"] for index in (0, 2, 4)]


def test_screen_shard_file__leaves_a_sound_shard_untouched(tmp_path: Path) -> None:
    shard.write_shard_file(tmp_path / "part.parquet", _rows(2))
    before = (tmp_path / "part.parquet").read_bytes()
    assert _screen(tmp_path / "part.parquet") == {}
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
        _screen(tmp_path / "part.parquet", origin=origin)
    assert caught.value.code == code


def _with_words(encoded: bytes, kind: str) -> bytes:
    """Hides words in an image that decodes to the same pixels."""
    words = b"Comment\0MRN 12345"
    match kind:
        case "PNG chunk":
            chunk = b"tEXt" + words
            end = len(encoded) - 12
            return (
                encoded[:end]
                + struct.pack(">I", len(words))
                + chunk
                + struct.pack(">I", zlib.crc32(chunk))
                + encoded[end:]
            )
        case "behind":
            return encoded + words
        case "JPEG comment":
            return encoded[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(words)) + words + encoded[2:]
        case _:  # behind the header's own fields, where a thumbnail may lie
            length = int.from_bytes(encoded[4:6], "big")
            return (
                encoded[:4]
                + struct.pack(">H", length + len(words))
                + encoded[6 : 4 + length]
                + words
                + encoded[4 + length :]
            )


@pytest.mark.parametrize("kind", ["", "PNG chunk", "behind", "JPEG comment", "JPEG header"])
def test_screen_shard_file__rejects_an_image_with_more_than_its_pixels(tmp_path: Path, kind: str) -> None:
    (row,) = _rows(1)
    image = fundus.decode_photograph(row["image"])
    encoded = fundus.encode_jpeg(image) if kind.startswith("JPEG") else row["image"]
    hidden = _with_words(encoded, kind) if kind else encoded
    (made,) = [shard.row_of(hidden, site_id="aster", origin="real", cells={}, deid_methods=row["deid_methods"])]
    shard.write_shard_file(tmp_path / "part.parquet", [made])
    if not kind:
        assert _screen(tmp_path / "part.parquet") == {}
        return
    with pytest.raises(ContributionRejected) as caught:
        _screen(tmp_path / "part.parquet")
    assert caught.value.code == "IMAGE_NOT_BARE"
