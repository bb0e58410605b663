"""A site's veto: the site finds planted copies, the hub takes only lists that it can trust, and corpora obey them."""

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from gretfound import (
    corpus,
    fundus,
    keyring,
    ledger,
    phantom,
    shard,
    signing,
    site,
    storage,
    veto,
)
from gretfound.errors import ContributionRejected, LineageError
from gretfound.keyring import Keyring
from gretfound.lineage import Corpus, ShardSet
from gretfound.veto import Veto
from jobs import assemble_corpus, pretrain_encoder, take_veto
from tests import hubs, parties
from tests.parties import Hub

SIZE_PX = 72
NUM_COPIES, NUM_HONEST = 4, 12


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return parties.hub_at(tmp_path)


@pytest.fixture
def ring(hub: Hub, tmp_path: Path) -> Keyring:
    return hub.join(tmp_path / "aster.keys", "aster")


def _row(image: fundus.Photograph) -> dict[str, Any]:
    encoded = fundus.encode_jpeg(image)
    return shard.row_of(encoded, site_id="aster", origin="synthetic", cells={}, generator_id="generator-0", seed=0)


def _copied(path: Path) -> fundus.Photograph:
    """Slightly cropped, mirrored and compressed again: what a generator that remembers would draw."""
    image = fundus.decode_photograph(path.read_bytes())
    square = fundus.to_square(image, fundus.find_field_of_view(image), SIZE_PX)
    cropped = Image.fromarray(square[1:-1, 1:-1, :]).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.array(cropped)[:, ::-1])


def _list_of(ring: Keyring, image_ids: Sequence[str], shard_sha256: str, **changes: Any) -> bytes:
    made = Veto(
        site_id=ring.site_id,
        shard_sha256=shard_sha256,
        image_ids=tuple(sorted(image_ids)),
        num_compared=9,
        policy="demonstration/1",
        created=parties.today(),
        approvals=(keyring.approval_of(ring, "container"), keyring.approval_of(ring, "steward")),
    )
    keys = [signing.read_private_key(ring.private_path(role)) for role in keyring.ROLES]
    return veto.sign(made.model_copy(update=changes), keys)


def _ids_of(hub_uri: str, shard_set: ShardSet, place: int = 0) -> list[str]:
    uri = storage.join(hub_uri, shard_set.shards[place].path)
    return [row["image_id"] for row in shard.read_rows(uri, columns=["image_id"])]


def _take(hub: Hub, content: bytes, path: Path) -> str:
    path.write_bytes(content)
    return take_veto.main([f"hub_uri={hub.uri}", f"list_uri={path}", f"keys_path={hub.keys_path}"])


def test_veto__planted_copies_are_on_the_list_and_honest_drawings_are_not(
    ring: Keyring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aster = phantom.SITES["aster"]
    folder_path = phantom.write_site(aster, tmp_path / "aster", num_images=84, seed=0, size_px=SIZE_PX)
    photographs = sorted((folder_path / "traindata").rglob("*.jpg"))
    copies = [_row(_copied(path)) for path in photographs[:: len(photographs) // NUM_COPIES][:NUM_COPIES]]
    honest = [_row(phantom.draw_eye(aster, seed=2**33 + n, size_px=SIZE_PX).image) for n in range(NUM_HONEST)]
    drawn_path, list_path = tmp_path / "drawn.parquet", tmp_path / "drop_list.json"
    shard.write_shard_file(drawn_path, [*honest[:5], *copies, *honest[5:]])
    arguments = ["veto", str(folder_path), "--site-id", "aster", "--out", str(list_path), "--policy", "demonstration"]
    arguments += ["--keys", str(ring.folder_path), "--drawn"]
    assert site.main([*arguments, str(drawn_path)]) == site.EXIT_FIT
    made = veto.read(list_path.read_bytes())
    flagged = set(made.image_ids)
    assert {row["image_id"] for row in copies} <= flagged
    # The limit is what one held-out photograph of 21 exceeds: of 12 drawings more than 4 are flagged once in 10,000.
    assert len(flagged & {row["image_id"] for row in honest}) <= 4
    assert (made.shard_sha256, made.num_compared) == (storage.sha256_of(drawn_path), NUM_COPIES + NUM_HONEST)
    assert f"{len(flagged)} of {NUM_COPIES + NUM_HONEST}" in capsys.readouterr().out
    lying_path = tmp_path / "lying.parquet"
    shard.write_shard_file(lying_path, [honest[0] | {"image_id": honest[1]["image_id"]}])
    assert site.main([*arguments, str(lying_path)]) == site.EXIT_USAGE
    assert "is not what its id says" in capsys.readouterr().err


def test_veto__too_few_photographs_make_no_list(ring: Keyring, tmp_path: Path) -> None:
    aster = phantom.SITES["aster"]
    folder_path = phantom.write_site(aster, tmp_path / "aster", num_images=6, seed=0, size_px=SIZE_PX)
    drawn_path, list_path = tmp_path / "drawn.parquet", tmp_path / "drop_list.json"
    shard.write_shard_file(drawn_path, [_row(phantom.draw_eye(aster, seed=2**33, size_px=SIZE_PX).image)])
    arguments = ["veto", str(folder_path), "--site-id", "aster", "--out", str(list_path), "--policy", "demonstration"]
    assert site.main([*arguments, "--keys", str(ring.folder_path), "--drawn", str(drawn_path)]) == site.EXIT_USAGE
    assert not list_path.exists()


def test_take_veto__what_cannot_be_trusted_is_refused_and_changes_nothing(
    hub: Hub, ring: Keyring, tmp_path: Path
) -> None:
    own = hubs.draw_shard_set(hub.uri, "aster", num_images=8, origin="synthetic")
    real = hubs.draw_shard_set(hub.uri, "aster", num_images=4)
    foreign = hubs.draw_shard_set(hub.uri, "birch", num_images=4, origin="synthetic")
    ids, sha256 = _ids_of(hub.uri, own), own.shards[0].sha256
    stranger = keyring.make(tmp_path / "stranger.keys", "aster")
    good, steward = _list_of(ring, ids[:1], sha256), signing.read_private_key(ring.private_path("steward"))
    half = veto.sign(veto.read(good), [steward])
    old = parties.today() - timedelta(days=veto.MAX_DAYS + 1)
    refused: dict[str, tuple[bytes, str]] = {
        "another's keys": (_list_of(stranger, ids[:1], sha256), "UNKNOWN_KEY"),
        "one signature": (half, "BAD_SIGNATURE"),
        "another name": (_list_of(ring, ids[:1], sha256, site_id="birch"), "UNKNOWN_SITE"),
        "forged": (_forged(ring, stranger, ids[:1], sha256), "BAD_SIGNATURE"),
        "no list": (b"{}", "BAD_FIELD"),
        "a shard of nobody": (_list_of(ring, ids[:1], "0" * 64), "UNKNOWN_SHARD"),
        "another's shard": (_list_of(ring, ids[:1], foreign.shards[0].sha256), "FOREIGN_SHARD"),
        "a real shard": (_list_of(ring, ids[:1], real.shards[0].sha256), "FOREIGN_SHARD"),
        "of another shard": (_list_of(ring, _ids_of(hub.uri, own, 1)[:1], sha256), "UNKNOWN_IMAGE"),
        "twice the same": (_list_of(ring, [ids[0], ids[0]], sha256), "BAD_FIELD"),
        "old": (_list_of(ring, ids[:1], sha256, created=old), "VETO_EXPIRED"),
        "of tomorrow": (_list_of(ring, ids[:1], sha256, created=parties.today() + timedelta(days=2)), "VETO_EXPIRED"),
    }
    num_entries = len(ledger.read(hub.uri))
    for what, (content, code) in refused.items():
        with pytest.raises(ContributionRejected) as error:
            _take(hub, content, tmp_path / "list.json")
        assert error.value.code == code, what
    years_later = parties.today() + timedelta(days=30 * 365)
    for day, code in ((years_later, "ROSTER_EXPIRED"), (date(2020, 1, 1), "ROSTER_EXPIRED")):
        with pytest.raises(ContributionRejected, match=code):
            veto.take(hub.uri, good, known_sites=hub.roster, today=day)
    hub.change_roster("revoke", f"key_id={keyring.approval_of(ring, 'steward').key_id}")
    with pytest.raises(ContributionRejected, match="KEY_REVOKED"):
        _take(hub, good, tmp_path / "list.json")
    hub.change_roster("suspend", "site_id=aster")
    with pytest.raises(ContributionRejected, match="SITE_SUSPENDED"):
        _take(hub, good, tmp_path / "list.json")
    assert veto.vetoed_image_ids(hub.uri) == []
    assert [entry.event for entry in ledger.read(hub.uri)[num_entries:]] == ["roster", "roster"]


def _forged(ring: Keyring, stranger: Keyring, image_ids: Sequence[str], shard_sha256: str) -> bytes:
    """Names the site's keys, and is signed by others."""
    named = veto.read(_list_of(ring, image_ids, shard_sha256))
    return veto.sign(named, [signing.read_private_key(stranger.private_path(role)) for role in keyring.ROLES])


def test_corpus__lacks_exactly_what_was_vetoed(hub: Hub, ring: Keyring, tmp_path: Path, ray_cluster: None) -> None:
    drawn = hubs.draw_shard_set(hub.uri, "aster", num_images=8, origin="synthetic")
    hubs.draw_shard_set(hub.uri, "birch", num_images=6)
    arguments = [f"hub_uri={hub.uri}", "has_near_duplicates_removed=false"]
    before_id = assemble_corpus.main(arguments)
    ids = _ids_of(hub.uri, drawn)
    vetoed = sorted(ids[1:3])
    content = _list_of(ring, vetoed, drawn.shards[0].sha256)
    for _ in range(2):
        assert _take(hub, content, tmp_path / "list.json") == "2"
    entries = [entry for entry in ledger.read(hub.uri) if entry.event == veto.EVENT]
    assert [entry.details["num_images"] for entry in entries] == [2]
    assert veto.vetoed_image_ids(hub.uri) == vetoed
    after_id = assemble_corpus.main(arguments)
    assert after_id != before_id and assemble_corpus.main(arguments) == after_id
    before, after = (storage.read_record(hub.uri, each, Corpus) for each in (before_id, after_id))
    assert (before.num_images, after.num_images, after.num_excluded) == (14, 12, 2)
    exclusions = corpus.read_exclusions(hub.uri, after)
    assert exclusions["reason"].to_pylist() == ["vetoed", "vetoed"]
    assert _excluded_ids(hub.uri, exclusions) == vetoed
    corpus.check_unvetoed(hub.uri, after, vetoed)
    with pytest.raises(LineageError, match="holds 2 drawn photographs"):
        pretrain_encoder.main([f"hub_uri={hub.uri}", f"corpus_id={before_id}"])


def _excluded_ids(hub_uri: str, exclusions: pa.Table) -> list[str]:
    found = []
    for row in exclusions.to_pylist():
        with shard.open_shard(storage.join(hub_uri, row["shard_path"])) as parquet:
            found.append(parquet.read_row_group(row["row_group"])["image_id"][row["row"]].as_py())
    return sorted(found)


def test_vetoed_image_ids__a_list_changed_at_the_hub_is_seen(hub: Hub, ring: Keyring, tmp_path: Path) -> None:
    drawn = hubs.draw_shard_set(hub.uri, "aster", num_images=4, origin="synthetic")
    ids, sha256 = _ids_of(hub.uri, drawn), drawn.shards[0].sha256
    _take(hub, _list_of(ring, ids[:1], sha256), tmp_path / "list.json")
    (uri,) = storage.list_uris(storage.join(hub.uri, veto.FOLDER))
    storage.write_bytes(uri, _list_of(ring, [], sha256))
    with pytest.raises(LineageError, match="not what a site signed"):
        veto.vetoed_image_ids(hub.uri)
