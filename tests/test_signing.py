"""Keys and signed documents: one text a content, one file mode a secret, strict envelopes."""

import json
import os
import stat
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gretfound import signing
from gretfound.errors import ConfigError
from gretfound.signing import Document, UnreadableDocument

KIND = "application/vnd.gretfound.test+json"


class Card(Document):
    schema_version: Literal["card/1"] = "card/1"
    number: int
    share: float
    day: date
    names: tuple[str, ...]


CARD = {"schema_version": "card/1", "number": 3, "share": 0.5, "day": "2026-11-22", "names": ["a"]}


def _code_of(content: bytes) -> str:
    with pytest.raises(UnreadableDocument) as caught:
        signing.parse_document(content, Card)
    return caught.value.code


def test_parse_document__reads_what_it_wrote() -> None:
    card = signing.parse_document(rfc8785.dumps(CARD), Card)
    assert card == Card(number=3, share=0.5, day=date(2026, 11, 22), names=("a",))
    assert card.to_bytes() == rfc8785.dumps(CARD)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"schema_version": "card/2"}, "UNKNOWN_VERSION"),
        ({"more": 1}, "BAD_FIELD"),
        ({"number": "3"}, "BAD_FIELD"),
        ({"number": True}, "BAD_FIELD"),
        ({"number": None}, "BAD_FIELD"),
        ({"names": "a"}, "BAD_FIELD"),
        ({"day": "2026-11-22T10:00:00"}, "BAD_FIELD"),
        ({"day": "22.11.2026"}, "BAD_FIELD"),
        ({"day": 1763769600}, "BAD_FIELD"),
    ],
)
def test_parse_document__refuses_other_fields_and_types(changes: dict[str, Any], code: str) -> None:
    assert _code_of(rfc8785.dumps(CARD | changes)) == code


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"\xff",
        b'{"a":1,"a":1}',
        b'{"b":{"a":1,"a":2}}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
    ],
)
def test_parse_json__refuses_what_readers_understand_differently(content: bytes) -> None:
    with pytest.raises(UnreadableDocument) as caught:
        signing.parse_json(content)
    assert caught.value.code == ("KEY_TWICE" if content.count(b'"a"') == 2 else "BAD_JSON")


def test_parse_document__names_no_unknown_field_and_no_value() -> None:
    with pytest.raises(UnreadableDocument) as caught:
        signing.parse_document(rfc8785.dumps(CARD | {"Jane Doe": 1, "number": "MRN 12345"}), Card)
    assert "Jane" not in str(caught.value) and "12345" not in str(caught.value) and "number" in str(caught.value)


def test_parse_document__refuses_another_spelling() -> None:
    text = rfc8785.dumps(CARD)
    assert _code_of(text + b"\n") == _code_of(json.dumps(CARD).encode()) == "NOT_CANONICAL"
    assert _code_of(text.replace(b"0.5", b"0.50")) == "NOT_CANONICAL"


def test_read_envelope__counts_each_key_once_and_knows_no_second_spelling() -> None:
    keys = [Ed25519PrivateKey.generate() for _ in range(3)]
    content = signing.sign(b"payload", KIND, keys[:2])
    envelope = signing.read_envelope(content, KIND)
    assert envelope.payload == b"payload"
    public = [key.public_key() for key in keys]
    assert signing.verified_key_ids(envelope, [*public, *public]) == {signing.key_id(key) for key in public[:2]}
    found = json.loads(content)
    one, two = found["signatures"]

    def code_of(changes: dict[str, Any], kind: str = KIND) -> str:
        with pytest.raises(UnreadableDocument) as caught:
            signing.read_envelope(rfc8785.dumps(found | changes), kind)
        return caught.value.code

    assert code_of({"signatures": [one, one]}) == "SAME_KEY_TWICE"
    assert code_of({"signatures": [one, two | {"keyid": one["keyid"]}]}) == "SAME_KEY_TWICE"
    assert code_of({"signatures": [two, one]}) == "NOT_CANONICAL"
    assert code_of({"signatures": []}) == code_of({}, "application/other") == "BAD_FIELD"
    assert code_of({"signatures": [one | {"cert": ""}, two]}) == code_of({"payload": "a"}) == "BAD_FIELD"
    assert code_of({"payload": found["payload"].rstrip("=")}) == "BAD_FIELD"
    assert found["payload"] == "cGF5bG9hZA=="
    assert code_of({"payload": "cGF5bG9hZB=="}) == "NOT_CANONICAL", "the last letter has four bits too many"


def test_verified_key_ids__binds_the_type_and_the_payload() -> None:
    key = Ed25519PrivateKey.generate()
    envelope = signing.read_envelope(signing.sign(b"payload", KIND, [key]), KIND)
    for name, value in (("payload", b"payloae"), ("payload_type", "application/other")):
        changed = signing.read_envelope(signing.sign(b"payload", KIND, [key]), KIND)
        setattr(changed, name, value)
        assert signing.verified_key_ids(changed, [key.public_key()]) == frozenset()
    assert signing.verified_key_ids(envelope, [key.public_key()]) == {signing.key_id(key.public_key())}


def test_make_private_key__is_its_owners_alone_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "a.pem"
    key = signing.make_private_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    published = signing.read_public_key(path.with_name("a.pem.pub"))
    assert signing.public_hex(published) == signing.public_hex(key.public_key())
    assert signing.key_id(signing.public_from_hex(signing.public_hex(published))) == signing.key_id(published)
    with pytest.raises(ConfigError, match="already"):
        signing.make_private_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing.read_private_key(path)


def test_write_secret__is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)  # before the bytes are sure to be on the disk
        signing.write_secret(tmp_path / "secret", b"secret")
    assert list(tmp_path.iterdir()) == []
    signing.write_secret(tmp_path / "secret", b"secret")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="already"):
        signing.write_secret(tmp_path / "secret", b"other")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_read_private_key__a_locked_key_needs_its_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "a.pem"
    key = signing.make_private_key(path, passphrase="open sesame")
    assert signing.is_locked(path)
    assert signing.read_private_key(path, passphrase="open sesame").sign(b"x") == key.sign(b"x")
    for passphrase in ("", "open says me"):
        with pytest.raises(ConfigError, match="passphrase"):
            signing.read_private_key(path, passphrase=passphrase)
