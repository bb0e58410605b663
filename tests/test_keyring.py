"""A site's keyring: packages in their turn, whatever is interrupted, and keys that change."""

from pathlib import Path

import pytest

from gretfound import keyring, sealing, signing, storage
from gretfound.errors import ConfigError
from gretfound.keyring import Keyring
from tests import parties
from tests.test_sealing import write_staging


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    write_staging(tmp_path / "staging")
    return parties.hub_at(tmp_path).join(tmp_path / "aster", "aster")


def test_seal__goes_on_after_being_killed_between_any_two_steps(ring: Keyring, tmp_path: Path) -> None:
    draft_path, package_path = tmp_path / "aster.tar", tmp_path / "aster.age"
    drafted = parties.draft(ring, tmp_path / "staging", draft_path)
    content = draft_path.read_bytes()
    package = keyring.seal(ring, draft_path, package_path, today=parties.today())
    assert not draft_path.exists() and keyring.find(ring.folder_path, package_path) == package
    assert package.manifest == drafted.manifest

    package_path.rename(tmp_path / ".aster.age.sealed")  # killed before the package got its name
    draft_path.write_bytes(content)
    assert keyring.seal(ring, draft_path, package_path, today=parties.today()).sha256 == package.sha256
    assert keyring.label(ring, today=parties.today()).sequence == 2

    (tmp_path / ".aster.age.sealed").write_bytes(b"half of it")  # killed before it was remembered
    package_path.unlink()
    draft_path.write_bytes(content)
    again = keyring.seal(ring, draft_path, package_path, today=parties.today())
    assert (again.manifest.sequence, again.manifest.previous_sha256) == (2, package.sha256)
    assert {path.name for path in tmp_path.iterdir()} == {"aster", "aster.age", "hub", "hub.keys", "staging"}


def test_seal__an_interrupted_package_keeps_its_number_when_another_is_sealed(
    ring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        parties.draft(ring, tmp_path / "staging", tmp_path / f"{name}.tar").path for name in ("first", "second")
    )
    original = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.suffix == ".sealed":
            raise KeyboardInterrupt
        return original(path, target)

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        keyring.seal(ring, first, tmp_path / "out" / "first.age", today=parties.today())
    assert not (tmp_path / "out" / "first.age").exists()

    (tmp_path / "out").rename(tmp_path / "unplugged")
    with pytest.raises(ConfigError, match="its folder is not there now"):
        keyring.seal(ring, second, tmp_path / "second.age", today=parties.today())
    (tmp_path / "unplugged").rename(tmp_path / "out")
    package = keyring.seal(ring, second, tmp_path / "second.age", today=parties.today())
    found = keyring.find(ring.folder_path, tmp_path / "out" / "first.age")
    assert found is not None and found.manifest.sequence == 1
    assert (package.manifest.sequence, package.manifest.previous_sha256) == (2, found.sha256)
    assert list((ring.folder_path / "sealed").glob("*.waiting")) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.age"]


def test_seal__two_at_the_same_time_get_no_common_number(
    ring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (parties.draft(ring, tmp_path / "staging", tmp_path / f"{n}.tar").path for n in (1, 2))
    original = sealing.seal

    def overtaken(*arguments, **terms):
        monkeypatch.setattr(sealing, "seal", original)
        keyring.seal(ring, second, tmp_path / "2.age", today=parties.today())
        return original(*arguments, **terms)

    monkeypatch.setattr(sealing, "seal", overtaken)
    with pytest.raises(ConfigError, match="at the same time"):
        keyring.seal(ring, first, tmp_path / "1.age", today=parties.today())
    assert keyring.seal(ring, first, tmp_path / "1.age", today=parties.today()).manifest.sequence == 2


def test_read__says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no keys"):
        keyring.read(tmp_path / "aster", "aster")
    keyring.make(tmp_path / "aster", "aster")
    with pytest.raises(ConfigError, match="for whom to seal"):
        keyring.read(tmp_path / "aster", "aster")
    (tmp_path / "aster" / "hub.json").write_text("{}")
    with pytest.raises(ConfigError, match="no hub's card"):
        keyring.label(keyring.read(tmp_path / "aster", "aster"), today=parties.today())


def test_make__keeps_what_is_there(ring: Keyring) -> None:
    before = {path: path.read_bytes() for path in ring.folder_path.rglob("*") if path.is_file()}
    keyring.make(ring.folder_path, "aster")
    assert {path: path.read_bytes() for path in ring.folder_path.rglob("*") if path.is_file()} == before


def test_make__a_key_that_is_kept_elsewhere_is_not_made_anew(ring: Keyring, tmp_path: Path) -> None:
    ring.private_path("steward").rename(tmp_path / "stick.pem")
    keyring.make(ring.folder_path, "aster")
    assert not ring.private_path("steward").exists() and not keyring.is_steward_ready(ring)
    drafted = parties.draft(ring, tmp_path / "staging", tmp_path / "aster.tar")
    with pytest.raises(ConfigError, match="cannot be read"):
        keyring.seal(ring, drafted.path, tmp_path / "aster.age", today=parties.today())
    package = keyring.seal(
        ring, drafted.path, tmp_path / "aster.age", today=parties.today(), steward_path=tmp_path / "stick.pem"
    )
    assert package.manifest.sequence == 1


def test_replace__makes_a_new_card_and_keeps_the_old_key(ring: Keyring, tmp_path: Path) -> None:
    old = {role: keyring.approval_of(ring, role) for role in keyring.ROLES}
    keyring.replace(ring, "steward", passphrase="new")
    assert keyring.approval_of(ring, "container") == old["container"]
    assert keyring.approval_of(ring, "steward") != old["steward"]
    kept = ring.folder_path / f"steward-{old['steward'].key_id[:16]}.pem"
    assert signing.public_hex(signing.read_private_key(kept).public_key()) == old["steward"].public_key
    with pytest.raises(ConfigError, match="passphrase"):
        keyring.replace(ring, "container")
    assert keyring.approval_of(ring, "container") == old["container"], "nothing changed"
    card = keyring.read_site_card(ring.card_path.read_bytes())
    assert card.keys == tuple(keyring.approval_of(ring, role) for role in keyring.ROLES)


def test_find__knows_only_what_this_site_sealed(ring: Keyring, tmp_path: Path) -> None:
    package = parties.seal(ring, tmp_path / "staging", tmp_path / "aster.age")
    assert keyring.find(ring.folder_path, package.path) == package
    (tmp_path / "other.age").write_bytes(package.path.read_bytes()[:-1])
    assert keyring.find(ring.folder_path, tmp_path / "other.age") is None
    (path,) = (ring.folder_path / "sealed").iterdir()
    storage.write_bytes(str(path), path.read_bytes().replace(b'"India"', b'"China" '))
    with pytest.raises(ConfigError, match="was changed"):
        keyring.find(ring.folder_path, package.path)
