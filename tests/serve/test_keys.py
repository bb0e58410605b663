"""API keys: what is stored, who is let in, and how soon a revoked key is refused."""

import hashlib
import json
from pathlib import Path

import pytest

from gretfound.errors import ConfigError
from serve import keys


@pytest.fixture
def keys_uri(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def test_create_key__is_found_again_with_its_scopes(keys_uri: str) -> None:
    presented = keys.create_key(keys_uri=keys_uri, scopes=["embed", "finetune"], note="group X")
    found = keys.KeyRing(keys_uri).find(presented)
    assert found is not None
    assert presented.startswith(f"gf_{found.id}_")
    assert (found.allows("embed"), found.allows("finetune"), found.allows("admin")) == (True, True, False)
    assert found.owner == found.id


def test_create_key__the_file_holds_only_the_digest_of_the_secret(keys_uri: str) -> None:
    presented = keys.create_key(keys_uri=keys_uri, scopes=["embed"])
    secret = presented.split("_", 2)[2]
    text = Path(keys_uri).read_text()
    assert secret not in text
    assert json.loads(text)["keys"][0]["secret_sha256"] == hashlib.sha256(secret.encode()).hexdigest()


def test_create_key__a_second_key_keeps_the_first(keys_uri: str) -> None:
    first = keys.create_key(keys_uri=keys_uri, scopes=["embed"])
    owner = keys.read_keys(keys_uri)[0].owner
    second = keys.create_key(keys_uri=keys_uri, scopes=["admin"], owner=owner)
    ring = keys.KeyRing(keys_uri)
    found = ring.find(second)
    assert ring.find(first) is not None
    assert found is not None and found.owner == owner and found.allows("finetune")


@pytest.mark.parametrize(
    "wrong",
    [{"scopes": []}, {"scopes": ["root"]}, {"scopes": ["embed"], "days": 0}, {"scopes": ["embed"], "owner": "A/B"}],
)
def test_create_key__refuses_what_makes_no_key(keys_uri: str, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        keys.create_key(keys_uri=keys_uri, **wrong)  # type: ignore[arg-type]
    assert not Path(keys_uri).exists()


def test_find__refuses_other_secrets_unknown_ids_and_malformed_keys(keys_uri: str) -> None:
    presented = keys.create_key(keys_uri=keys_uri, scopes=["embed"])
    ring = keys.KeyRing(keys_uri)
    _, key_id, secret = presented.split("_", 2)
    other = keys.create_key(keys_uri=keys_uri, scopes=["embed"]).split("_", 2)[2]
    for wrong in (
        f"gf_{key_id}_{other}",
        f"gf_{'0' * 12}_{secret}",
        secret,
        presented + "x",
        presented[:-1],
        "",
        "gf__",
    ):
        assert ring.find(wrong) is None


def test_find__refuses_an_expired_key(keys_uri: str) -> None:
    presented = keys.create_key(keys_uri=keys_uri, scopes=["embed"], days=1e-9)
    assert keys.KeyRing(keys_uri).find(presented) is None


def test_refresh__a_revoked_key_is_refused_within_a_minute(keys_uri: str) -> None:
    presented = keys.create_key(keys_uri=keys_uri, scopes=["embed"])
    now_s = [0.0]
    ring = keys.KeyRing(keys_uri, clock_s=lambda: now_s[0])
    keys.revoke_key(keys_uri=keys_uri, key_id=presented.split("_")[1])
    assert ring.find(presented) is not None
    now_s[0] = 59.0
    assert ring.is_due()
    ring.refresh()
    assert ring.find(presented) is None


def test_refresh__keys_that_cannot_be_read_again_become_stale(keys_uri: str) -> None:
    presented = keys.create_key(keys_uri=keys_uri, scopes=["embed"])
    now_s = [0.0]
    ring = keys.KeyRing(keys_uri, clock_s=lambda: now_s[0])
    Path(keys_uri).unlink()
    now_s[0] = 30.0
    ring.refresh()
    assert ring.find(presented) is not None and not ring.is_stale()
    now_s[0] = 61.0
    ring.refresh()
    assert ring.is_stale()


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"keys": [{"id": "x"}]}'])
def test_key_ring__does_not_start_without_a_key_file(keys_uri: str, content: str | None) -> None:
    if content is not None:
        Path(keys_uri).write_text(content)
    with pytest.raises(ConfigError, match="keys_uri"):
        keys.KeyRing(keys_uri)


def test_main__creates_lists_and_revokes(keys_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["create", "--keys-uri", keys_uri, "--scope", "embed", "--note", "lab"]) == 0
    presented = capsys.readouterr().out.strip()
    key_id = presented.split("_")[1]
    assert keys.main(["revoke", "--keys-uri", keys_uri, "--key-id", key_id]) == 0
    assert keys.main(["list", "--keys-uri", keys_uri]) == 0
    listed = capsys.readouterr().out
    assert key_id in listed and "revoked" in listed and presented not in listed
    assert keys.main(["revoke", "--keys-uri", keys_uri, "--key-id", "absent"]) == 2
