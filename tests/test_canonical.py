"""Canonical JSON: no id of a record in a hub and no signed byte may ever change."""

import hashlib
import json
import math
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gretfound import canonical, lineage, signing
from gretfound.lineage import (
    Contribution,
    Corpus,
    Encoder,
    File,
    Generator,
    Record,
    Release,
    Report,
    Shard,
    ShardSet,
    Site,
)

# As they were before one room wrote both texts (2026-11-22).
IDS: list[tuple[str, Record]] = [
    ("site-7a920c88be7d2b95822a", Site(site_id="aster", country="C\u00f4te d'Ivoire", form="weights")),
    (
        "contribution-a9dd79f930f709a896b4",
        Contribution(
            parents=("site-0",),
            recipe_id="intake-1",
            site_id="aster",
            form="weights",
            package_sha256="a" * 64,
            num_images=12,
            files=(File(path="summary/x.json", sha256="b" * 64, size_bytes=2**40),),
        ),
    ),
    (
        "generator-d58d8994c5662738200e",
        Generator(
            parents=("x",),
            site_id="aster",
            base_id="y",
            method="lora",
            resolution_px=64,
            num_images=3,
            images_seen=10**12,
            final_loss=1e-07,
        ),
    ),
    (
        "generator-4379a0f2d69f2e05ae16",
        Generator(site_id="", resolution_px=64, num_images=0, images_seen=0, final_loss=1.0),
    ),
    (
        "shards-abec6959c50bc500f851",
        ShardSet(
            site_id="aster",
            origin="real",
            num_images=2,
            shards=(Shard(path="p", sha256="c" * 64, size_bytes=5, row_group_images=(2,)),),
            rejected={"unreadable": 1},
        ),
    ),
    (
        "corpus-06f7c483a3e8ec178e58",
        Corpus(num_images=3, num_excluded=1, site_ids=("aster", "birch"), num_images_by_origin={"real": 3}),
    ),
    (
        "encoder-276e7bca912230a134e7",
        Encoder(architecture="vit", objective="mae", image_size_px=224, images_seen=7, final_loss=123456789012345680.0),
    ),
    ("report-f28d8eda8541609a1867", Report(evaluation_sets=("IDRiD \u2013 test",), num_images=4)),
    ("release-b08c2c127f3b0a75d4b1", Release(name="\U0001f441 first", licence="CC BY-NC 4.0")),
]
CONTENT = {
    "b": [1.0, 1e-07, 1e21, 0.1, -0.0, True, None],
    "a": "C\u00f4te \u2028 \U0001f441\x7f\n",
    "\U0001f441": 1,
    "\ufb33": 2,
}


def test_id__of_each_kind_is_as_it_was() -> None:
    assert {record.kind for _, record in IDS} == {kind.kind for kind in lineage.KINDS}
    assert [record.id for _, record in IDS] == [record_id for record_id, _ in IDS]
    assert lineage.recipe_id("intake", {"share": 0.1, "package_sha256": "a" * 64}, ["b", "a"]) == (
        "intake-97d45c1f169eea9994bc"
    )


def test_canonical_json__of_records_and_of_what_is_signed_are_as_they_were() -> None:
    assert hashlib.sha256(lineage.canonical_json(CONTENT)).hexdigest() == (
        "204b5d142ff1895556b71f3d32967a455672cc0f41d5a730264d29e109910181"
    )
    assert (
        signing.canonical_json(CONTENT)
        == (
            '{"a":"C\u00f4te \u2028 \U0001f441\x7f\\n","b":[1,1e-7,1e+21,0.1,0,true,null],"\U0001f441":1,"\ufb33":2}'
        ).encode()
    )


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text(st.characters(codec="ascii", exclude_characters="\x7f")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="ascii", exclude_characters="\x7f")), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLAIN)
def test_to_bytes__the_two_spellings_agree_on_plain_content(content: Any) -> None:
    assert canonical.to_bytes(content, spelling="record") == canonical.to_bytes(content, spelling="standard")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JSON)
def test_to_bytes__is_what_the_two_functions_wrote_before(content: Any) -> None:
    earlier = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    assert lineage.canonical_json(content) == earlier and json.loads(earlier) == content
    assert signing.canonical_json(content) == rfc8785.dumps(content)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_to_bytes__refuses_what_json_has_not(number: float) -> None:
    for write in (lineage.canonical_json, signing.canonical_json):
        with pytest.raises(ValueError):
            write({"x": number})
