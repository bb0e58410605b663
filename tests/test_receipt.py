"""Receipts: the hub's word, which nobody else can give and nobody can change."""

import json
from pathlib import Path

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gretfound import ledger, receipt, signing, site, storage, strongbox
from gretfound.errors import ConfigError, StorageError
from gretfound.receipt import Receipt
from tests import parties
from tests.parties import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return parties.hub_at(tmp_path)


def _receipt(package_sha256: str = "a" * 64) -> Receipt:
    return Receipt(
        package_sha256=package_sha256,
        verdict="REJECTED",
        codes=("W3_NOT_FINITE",),
        message="the weights hold numbers that are not finite; train again",
        contribution_id="",
        ledger=receipt.Place(index=7, sha256="b" * 64),
    )


def test_read__gives_back_what_the_hub_signed_and_nothing_else(hub: Hub) -> None:
    key, public_key = strongbox.read_receipt_key(hub.keys_path), hub.roster.receipt_key
    content = receipt.sign(_receipt(), key)
    assert receipt.sign(_receipt(), key) == content
    assert receipt.read(content, receipt_key=public_key) == _receipt()
    envelope = json.loads(content)
    changed = signing.sign(_receipt("c" * 64).to_bytes(), ledger.RECEIPT_TYPE, [Ed25519PrivateKey.generate()])
    other = json.loads(changed)["payload"]
    root_key = signing.read_private_key(strongbox.root_paths(hub.keys_path)[0])
    for wrong in (
        rfc8785.dumps(envelope | {"payload": other}),
        changed,
        receipt.sign(_receipt(), root_key),
        signing.sign(_receipt().to_bytes(), "application/other", [key]),
        signing.sign(b"{}", ledger.RECEIPT_TYPE, [key]),
        content[:-1],
        b"{}",
    ):
        with pytest.raises(ConfigError, match="receipt"):
            receipt.read(wrong, receipt_key=public_key)


def test_read_anchors__a_receipt_is_an_anchor(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "receipts" / "one.json"
    storage.write_bytes(str(path), receipt.sign(_receipt(), strongbox.read_receipt_key(hub.keys_path)))
    assert ledger.read_anchors(str(path.parent)) == [ledger.Anchor(index=7, sha256="b" * 64)]
    storage.write_bytes(str(path), b'{"payload":1}')
    with pytest.raises(StorageError, match="neither an anchor nor a receipt"):
        ledger.read_anchors(str(path.parent))


def test_inspect__verifies_a_receipt_against_the_hubs_card(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package_path, path = tmp_path / "package.age", tmp_path / "receipt.json"
    package_path.write_bytes(b"any package")
    content = receipt.sign(_receipt(storage.sha256_of(package_path)), strongbox.read_receipt_key(hub.keys_path))
    path.write_bytes(content)
    command = ["inspect", str(package_path), "--receipt", str(path), "--hub", str(hub.keys_path / "hub.json")]
    assert site.main(command) == site.EXIT_FIT
    words = capsys.readouterr().out
    assert "rejected, W3_NOT_FINITE" in words and "train again" in words and "Entry     7" in words
    assert site.main(["inspect", "--receipt", str(path), "--keys", str(hub.keys_path)]) == site.EXIT_FIT

    package_path.write_bytes(b"another package")
    assert site.main(command) == site.EXIT_USAGE
    assert "receipt of another package" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    stranger = parties.hub_at(tmp_path / "other")
    assert site.main(["inspect", "--receipt", str(path), "--keys", str(stranger.keys_path)]) == site.EXIT_USAGE
    assert "not signed by the key on the hub's card" in capsys.readouterr().err
    assert site.main(["inspect", "--receipt", str(path)]) == site.EXIT_USAGE
    assert site.main(["inspect"]) == site.EXIT_USAGE


def test_renew__a_new_key_for_receipts_is_on_the_card(hub: Hub, tmp_path: Path) -> None:
    key = signing.make_private_key(tmp_path / "new.pem")
    hub.change_roster("renew", f"receipt_public_path={tmp_path / 'new.pem.pub'}")
    assert hub.roster.hub_card.receipt_key == signing.public_hex(key.public_key())
