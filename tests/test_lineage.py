"""Records: their id is their content, and they survive the way through JSON."""

import dataclasses
import hashlib
import json

import pytest

from gretfound import lineage
from gretfound.errors import LineageError
from gretfound.lineage import Encoder, File, Shard, ShardSet

RECORD = ShardSet(
    parents=("contribution-0", "generator-1"),
    site_id="aster",
    origin="real",
    num_images=3,
    shards=(Shard(path="shards/parts/a.parquet", sha256="a", size_bytes=1, row_group_images=(3,)),),
    rejected={"TRUNCATED": 1},
    files=(File(path="x/y", sha256="b", size_bytes=2),),
)


def test_id__is_the_digest_of_the_canonical_content() -> None:
    content = {"kind": "shards", **dataclasses.asdict(RECORD)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert RECORD.id == "shards-" + hashlib.sha256(text.encode()).hexdigest()[:20]


def test_from_json__gives_the_record_back() -> None:
    assert lineage.from_json(json.loads(json.dumps(lineage.to_json(RECORD))), ShardSet) == RECORD


@pytest.mark.parametrize("change", [{"kind": "encoder"}, {"surplus": 1}])
def test_from_json__other_content_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(LineageError):
        lineage.from_json(lineage.to_json(RECORD) | change, ShardSet)


def test_kind_of__by_id() -> None:
    assert lineage.kind_of("encoder-0123") is Encoder
    with pytest.raises(LineageError, match="no record id"):
        lineage.kind_of("banana-0123")


def test_recipe_id__follows_settings_and_parents_in_any_order() -> None:
    first = lineage.recipe_id("job", {"a": 1, "b": [2]}, ["x", "y"])
    assert first == lineage.recipe_id("job", {"b": [2], "a": 1}, ["y", "x"])
    assert first != lineage.recipe_id("job", {"b": [2], "a": 2}, ["y", "x"])
    assert first != lineage.recipe_id("job", {"b": [2], "a": 1}, ["y"])


def test_canonical_json__refuses_nan() -> None:
    with pytest.raises(ValueError):
        lineage.canonical_json({"x": float("nan")})
