"""Sealed packages: what `seal` writes, `unseal` and `unpack` open; all else they refuse, leaving nothing behind."""

import base64
import errno
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyrage
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gretfound import keyring, sealing, signing
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.keyring import Keyring
from gretfound.sealing import Package
from tests import parties
from tests.conftest import ROOT
from tests.parties import Hub

Content = dict[str, Any]


class Known:
    """One hub, two sites, a package of the first, and its plain tar."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = parties.hub_at(folder)
        self.ring = self.hub.join(folder / "aster", "aster")
        self.other_ring = self.hub.join(folder / "birch", "birch")
        self.roster = self.hub.roster
        self.staging = folder / "staging"
        write_staging(self.staging)
        self.package = parties.seal(self.ring, self.staging, folder / "aster.age")
        self.plain = pyrage.decrypt(self.package.path.read_bytes(), [_identity(self.hub)])
        self.members = members_of(self.plain)

    def keys(self, ring: Keyring | None = None) -> list[Ed25519PrivateKey]:
        """The private keys of a site: the container's, the steward's."""
        return [signing.read_private_key((ring or self.ring).private_path(role)) for role in keyring.ROLES]

    def sealed(self, plain: bytes, path: Path) -> Path:
        """Encrypts any bytes for the hub, as anybody can."""
        recipients = [pyrage.x25519.Recipient.from_str(each) for each in self.roster.recipients]
        path.write_bytes(pyrage.encrypt(plain, recipients))
        return path

    def code_of(self, path: Path, **changes: Any) -> str:
        """Returns why the hub refuses a package; fails if it does not, or leaves anything behind."""
        before = {each: each.stat().st_mtime_ns for each in path.parent.rglob("*")}
        with pytest.raises(ContributionRejected) as caught:
            self.hub.open(path, path.parent / "opened", **({"roster": self.roster} | changes))
        after = {each: each.stat().st_mtime_ns for each in path.parent.rglob("*")}
        assert after == before, "a refused package left something behind"
        return caught.value.code

    def plain_code_of(self, plain: bytes, folder: Path, **changes: Any) -> str:
        """The same for a tar that somebody encrypted for the hub."""
        return self.code_of(self.sealed(plain, folder / "package.age"), **changes)


def write_staging(path: Path, *, size_bytes: int = 900) -> None:
    (path / "shards").mkdir(parents=True)
    (path / "summary").mkdir()
    (path / "shards" / "part-00000.parquet").write_bytes(b"PAR1" + random.Random(0).randbytes(size_bytes))
    (path / "summary" / "metadata_summary.json").write_text('{"num_images":3}')
    (path / "summary" / "disclosure_report.json").write_text("{}")


def _identity(hub: Hub) -> pyrage.x25519.Identity:
    return pyrage.x25519.Identity.from_str(hub.identities[0])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known(tmp_path_factory.mktemp("known"))


def members_of(plain: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        return [(each, archive.extractfile(each).read()) for each in archive.getmembers()]  # type: ignore[union-attr]


def member(name: str, content: bytes = b"{x", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    described = tarfile.TarInfo(name)
    described.size = len(content)
    for key, value in changes.items():
        setattr(described, key, value)
    return described, content


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar with exactly these members, as `tarfile` writes it, with the end mark of two blocks."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for described, content in members:
            archive.addfile(described, io.BytesIO(content))
        end = archive.offset
    return target.getvalue()[:end] + bytes(1024)


def envelope_of(manifest: bytes, keys: list[Ed25519PrivateKey]) -> Content:
    """DSSE over an in-toto statement, written out from the two standards."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "manifest.json", "digest": {"sha256": hashlib.sha256(manifest).hexdigest()}}],
        "predicateType": "https://gretfound.org/contribution/v2",
        "predicate": {},
    }
    payload, kind = rfc8785.dumps(statement), b"application/vnd.in-toto+json"
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signatures = [
        {"keyid": signing.key_id(key.public_key()), "sig": base64.b64encode(key.sign(encoded)).decode()} for key in keys
    ]
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind.decode(),
        "signatures": sorted(signatures, key=lambda each: each["keyid"]),
    }


def resigned(
    known: Known,
    change: Callable[[Content], Any] = lambda manifest: None,
    *,
    keys: list[Ed25519PrivateKey] | None = None,
    more: list[tuple[tarfile.TarInfo, bytes]] | None = None,
) -> bytes:
    """The package's tar with another manifest, signed with all right: what a hostile site can make."""
    manifest = json.loads(known.members[1][1])
    change(manifest)
    content = rfc8785.dumps(manifest)
    envelope = rfc8785.dumps(envelope_of(content, known.keys() if keys is None else keys))
    head = [member("manifest.dsse.json", envelope), member("manifest.json", content)]
    return tar_of([*head, *(known.members[2:] if more is None else more)])


def test_unpack__gives_back_what_was_sealed(known: Known, tmp_path: Path) -> None:
    seen: list[tuple[bytes, list[Path]]] = []
    manifest = known.hub.open(
        known.package.path,
        tmp_path / "opened",
        on_signed=lambda signatures: seen.append((signatures, list(tmp_path.iterdir()))),
    )
    assert seen == [(known.members[0][1], [])], "a member was written before it was known who signed"
    assert manifest == known.package.manifest
    for each in manifest.files:
        assert (tmp_path / "opened" / each.path).read_bytes() == (known.staging / each.path).read_bytes()
    found = {path.relative_to(tmp_path / "opened").as_posix() for path in (tmp_path / "opened").rglob("*.*")}
    assert found == {
        "shards/part-00000.parquet",
        "summary/disclosure_report.json",
        "summary/metadata_summary.json",
    }
    with pytest.raises(ValueError, match="there already"):
        known.hub.open(known.package.path, tmp_path / "opened")


def test_unseal__decrypts_and_looks_at_nothing(known: Known, tmp_path: Path) -> None:
    sealed_path = known.sealed(b"no tar at all", tmp_path / "any.age")
    sealing.unseal(sealed_path, tmp_path / "any.tar", identities=known.hub.identities)
    assert (tmp_path / "any.tar").read_bytes() == b"no tar at all"


def test_unseal__a_full_disk_is_no_damage(known: Known) -> None:
    with pytest.raises(OSError) as caught:
        sealing.unseal(known.package.path, Path("/dev/full"), identities=known.hub.identities)
    assert caught.value.errno == errno.ENOSPC


def test_unseal__refuses_more_than_a_package_may_hold(known: Known, tmp_path: Path) -> None:
    with (tmp_path / "large.age").open("wb") as stream:
        stream.write(known.package.path.read_bytes())
        stream.truncate(sealing.MAX_PACKAGE_BYTES + 1)
    assert known.code_of(tmp_path / "large.age") == "TOO_LARGE"


def test_unpack__verifies_without_writing(known: Known, tmp_path: Path) -> None:
    assert known.hub.open(known.package.path, None) == known.package.manifest


def test_seal__holds_a_deterministic_tar_that_any_tool_reads(known: Known, tmp_path: Path) -> None:
    label = sealing.Label(sequence=1, previous_sha256="", recipients=known.roster.recipients, created=parties.today())
    drafts = [parties.draft(known.ring, known.staging, tmp_path / name, label=label) for name in ("one.tar", "two.tar")]
    assert drafts[0].path.read_bytes() == drafts[1].path.read_bytes()
    assert [each.name for each, _ in known.members] == sorted(each.name for each, _ in known.members)
    assert all((m.isreg(), m.mode, m.mtime, m.uid, m.gid) == (True, 0o644, 0, 0, 0) for m, _ in known.members)
    assert resigned(known) == known.plain, "signatures and manifest are what the standards say"
    assert known.package.manifest.files == drafts[0].manifest.files


def test_seal__opens_with_the_recovery_identity_too(known: Known) -> None:
    text = (known.hub.keys_path / "recovery.txt").read_text().splitlines()[-1]
    assert known.hub.open(known.package.path, None, identities=(text,)) == known.package.manifest


def test_seal__refuses_a_draft_that_was_changed_or_is_another_sites(known: Known, tmp_path: Path) -> None:
    drafted = parties.draft(known.ring, known.staging, tmp_path / "aster.tar")
    assert drafted.num_signatures == 1
    with pytest.raises(ConfigError, match="other keys"):
        keyring.seal(known.other_ring, drafted.path, tmp_path / "birch.age", today=parties.today())
    content = bytearray(drafted.path.read_bytes())
    content[-1200] ^= 1
    drafted.path.write_bytes(content)
    with pytest.raises(ContributionRejected):
        keyring.seal(known.ring, drafted.path, tmp_path / "aster.age", today=parties.today())
    assert {path.name for path in tmp_path.iterdir()} == {"aster.tar"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"site_id": "../aster"}, "BAD_MANIFEST"),
        ({"site_id": "Aster Hospital"}, "BAD_MANIFEST"),
        ({"form": "pictures"}, "BAD_MANIFEST"),
        ({"form": "weights", "base_sha256": "0" * 64}, "NOT_ALLOWED"),
        ({"base_sha256": "0" * 64}, "BAD_MANIFEST"),
        ({"num_images": -1}, "BAD_MANIFEST"),
        ({"num_images": True}, "BAD_MANIFEST"),
        ({"policy": "own"}, "BAD_MANIFEST"),
        ({"country": "India\n"}, "BAD_MANIFEST"),
    ],
)
def test_draft__refuses_what_the_hub_would_reject(
    known: Known, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(ContributionRejected) as caught:
        parties.draft(known.ring, known.staging, tmp_path / "draft.tar", **changes)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_draft__refuses_a_pickle_named_safetensors(known: Known, tmp_path: Path) -> None:
    for name, content in {
        "weights/adapter.safetensors": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os",
        "weights/adapter_config.json": b"{}",
        "privacy/gate_report.json": b"{}",
        "summary/disclosure_report.json": b"{}",
        "summary/metadata_summary.json": b"{}",
        "training/config.json": b"{}",
        "training/metrics.jsonl": b"{}",
    }.items():
        (tmp_path / "staging" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "staging" / name).write_bytes(content)
    with pytest.raises(ContributionRejected) as caught:
        parties.draft(known.ring, tmp_path / "staging", tmp_path / "x.tar", form="weights", base_sha256="0" * 64)
    assert caught.value.code == "WRONG_KIND"


# Case 13: one byte flipped anywhere, 2,000 times. What is inside is encrypted anew by the attacker, who needs no key.
REGIONS: dict[str, tuple[str, set[str]]] = {
    "age": ("", {"NOT_SEALED", "NOT_FOR_THIS_HUB", "DAMAGED"}),
    "signatures": ("manifest.dsse.json", {"BAD_ENVELOPE", "BAD_SIGNATURE"}),
    "manifest": ("manifest.json", {"BAD_MANIFEST", "BAD_SIGNATURE"}),
    "member": ("shards/part-00000.parquet", {"DIGEST_MISMATCH", "NOT_CANONICAL"}),
}


@pytest.mark.parametrize("region", REGIONS)
def test_unpack__accepts_no_flipped_byte(known: Known, tmp_path: Path, region: str) -> None:
    name, expected = REGIONS[region]
    rng = random.Random(region)
    if name:
        described = next(each for each, _ in known.members if each.name == name)
        content, places = known.plain, range(described.offset, described.offset_data + described.size)
    else:
        content = known.package.path.read_bytes()
        header = list(range(500))
        places = [*header * (len(content) // len(header)), *range(len(content))]  # as often in the header as behind it
    codes = set()
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.choice(places)] ^= rng.randrange(1, 256)
        if name:
            codes.add(known.plain_code_of(bytes(damaged), tmp_path))
        else:
            (tmp_path / "damaged.age").write_bytes(damaged)
            codes.add(known.code_of(tmp_path / "damaged.age"))
    assert expected <= codes


@pytest.mark.parametrize("num_bytes", [0, 1, 21, 22, 100, 600, -1, -16, -17])
def test_unpack__refuses_a_cut_package(known: Known, tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "cut.age").write_bytes(known.package.path.read_bytes()[:num_bytes])
    assert known.code_of(tmp_path / "cut.age") == ("DAMAGED" if num_bytes not in (0, 1, 21) else "NOT_SEALED")


def test_unpack__refuses_bytes_before_after_and_instead(known: Known, tmp_path: Path) -> None:
    content = known.package.path.read_bytes()
    for altered, code in (
        (content + b"\0", "DAMAGED"),
        (b"\n" + content, "NOT_SEALED"),
        (known.plain, "NOT_SEALED"),
        (b"age-encryption.org/v1\n" + b"-> X25519 x\n" * 100_000, "DAMAGED"),
    ):
        (tmp_path / "altered.age").write_bytes(altered)
        assert known.code_of(tmp_path / "altered.age") == code
    for plain, code in (
        (known.plain + bytes(512), "TRAILING_BYTES"),
        (known.plain[:-512], "TRUNCATED"),
        (known.plain[:-1024], "TRUNCATED"),
        (known.plain[:700], "TRUNCATED"),
        (b"", "TRUNCATED"),
        (bytes(1024), "NOT_ALLOWED"),
    ):
        assert known.plain_code_of(plain, tmp_path) == code


# Case 10. Each stands behind right signatures, as far as a reader gets; at the beginning the code may differ.
HOSTILE: dict[str, tuple[tuple[tarfile.TarInfo, bytes], str]] = {
    "parent": (member("../x"), "UNSAFE_NAME"),
    "absolute": (member("/tmp/x"), "UNSAFE_NAME"),
    "dotted": (member("shards/./x"), "UNSAFE_NAME"),
    "symlink": (member("z", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "NOT_A_REGULAR_FILE"),
    "hardlink": (member("z", b"", type=tarfile.LNKTYPE, linkname="manifest.json"), "NOT_A_REGULAR_FILE"),
    "device": (member("z", b"", type=tarfile.CHRTYPE), "NOT_A_REGULAR_FILE"),
    "folder": (member("z", b"", type=tarfile.DIRTYPE), "NOT_A_REGULAR_FILE"),
    "sparse": (member("z", b"", type=tarfile.GNUTYPE_SPARSE), "NOT_A_REGULAR_FILE"),
    "undeclared": (member("zzz.json"), "NOT_ALLOWED"),
    "executable": (member("zzz.json", mode=0o755), "NOT_CANONICAL"),
    "owned": (member("zzz.json", uid=1000), "NOT_CANONICAL"),
    "duplicate": (member("shards/part-00000.parquet"), "OUT_OF_ORDER"),
    "second manifest": (member("manifest.json"), "OUT_OF_ORDER"),
}


@pytest.mark.parametrize("place", ["behind", "first"])
@pytest.mark.parametrize("case", HOSTILE)
def test_unpack__refuses_hostile_members(known: Known, tmp_path: Path, case: str, place: str) -> None:
    hostile, code = HOSTILE[case]
    first = [hostile, *known.members]
    plain = tar_of([*known.members, hostile] if place == "behind" else first)
    found = known.plain_code_of(plain, tmp_path)
    assert found == code or (place == "first" and found == "NOT_ALLOWED")


def test_unpack__refuses_a_sparse_terabyte_and_a_hundred_thousand_members_at_once(known: Known, tmp_path: Path) -> None:
    huge = member("shards/part-00001.parquet", size=2**40)[0].tobuf(tarfile.GNU_FORMAT)
    octal = member("shards/part-00001.parquet", size=8**11 - 1)[0].tobuf(tarfile.USTAR_FORMAT)
    end = len(known.plain) - 1024
    began_s = time.monotonic()
    assert known.plain_code_of(known.plain[:end] + huge, tmp_path) == "NOT_CANONICAL"
    assert known.plain_code_of(known.plain[:end] + octal, tmp_path) == "OUT_OF_ORDER"
    one = member("z/x.json", b"")[0].tobuf(tarfile.USTAR_FORMAT)
    assert known.plain_code_of(known.plain[:end] + one * 100_000, tmp_path) == "NOT_ALLOWED"
    assert known.plain_code_of(one * 100_000, tmp_path) == "NOT_ALLOWED"
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda manifest: manifest.update(schema_version="gretfound-contribution/3"), "UNKNOWN_VERSION"),
        (lambda manifest: manifest.update(schema_version="gretfound-contribution/2.1"), "UNKNOWN_VERSION"),
        (lambda manifest: manifest.update(extra=1), "BAD_MANIFEST"),
        (lambda manifest: manifest["files"][0].update(mode=0o755), "BAD_MANIFEST"),
        (lambda manifest: manifest.pop("site_id"), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(num_images=True), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(num_images="3"), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(num_images=3.5), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(sequence=0), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(sequence=2), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(expires=str(parties.today() + timedelta(days=91))), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(encrypted_to=["age1me", "age1you"]), "BAD_MANIFEST"),
        (lambda manifest: manifest["approvals"].reverse(), "BAD_MANIFEST"),
        (lambda manifest: manifest["files"][0].update(sha256="0" * 64), "DIGEST_MISMATCH"),
        (lambda manifest: manifest["files"][0].update(size_bytes=7), "SIZE_MISMATCH"),
        (lambda manifest: manifest["files"][0].update(size_bytes=2**32), "TOO_LARGE"),
        (lambda manifest: manifest["files"][0].update(path="shards/../x"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"][0].update(path="shards/code.py"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"][0].update(path="shards/part-00000.bin"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"][0].update(role="weights"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"].pop(), "MISSING_MEMBER"),
        (lambda manifest: manifest["files"].reverse(), "OUT_OF_ORDER"),
        (lambda manifest: manifest["files"].insert(0, manifest["files"][0]), "OUT_OF_ORDER"),
        (lambda manifest: manifest.update(created=str(parties.today() + timedelta(days=2))), "PACKAGE_EXPIRED"),
        (
            lambda manifest: manifest.update(
                created=str(parties.today() - timedelta(days=9)), expires=str(parties.today() - timedelta(days=1))
            ),
            "PACKAGE_EXPIRED",
        ),
    ],
)
def test_unpack__refuses_a_dishonest_manifest_that_is_signed(
    known: Known, tmp_path: Path, change: Callable[[Content], Any], code: str
) -> None:
    assert known.plain_code_of(resigned(known, change), tmp_path) == code


def test_unpack__requires_the_members_to_be_those_of_the_manifest_both_ways(known: Known, tmp_path: Path) -> None:
    more = [*known.members[2:], member("training/config.json")]
    assert known.plain_code_of(resigned(known, more=more), tmp_path) == "NOT_ALLOWED"
    assert known.plain_code_of(resigned(known, more=known.members[2:3]), tmp_path) == "MISSING_MEMBER"

    def add(manifest: Content) -> None:
        part = manifest["files"][0]
        manifest["files"] = [part, part | {"path": "shards/part-00001.parquet"}, *manifest["files"][1:]]

    assert known.plain_code_of(resigned(known, add), tmp_path) == "MISSING_MEMBER"


def test_unpack__refuses_a_manifest_of_too_many_members(known: Known, tmp_path: Path) -> None:
    def change(manifest: Content) -> None:
        part = manifest["files"][0]
        more = [part | {"path": f"shards/part-{index:05d}.parquet"} for index in range(100)]
        manifest["files"] = [*more, manifest["files"][1]]

    assert known.plain_code_of(resigned(known, change), tmp_path) == "TOO_MANY_MEMBERS"


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        (b'"base_sha256":""', b'"base_sha256":"","base_sha256":""'),
        (b'"num_images":3', b'"num_images":NaN'),
        (b'"num_images":3', b'"num_images":1e999'),
        (b'"num_images":3', b'"num_images": 3'),
        (b'"num_images":3', b'"num_images":' + b"[" * 100_000),
        (b'"India"', b'"\\u0049ndia"'),
        (b'"India"', b'"\xff"'),
    ],
)
def test_unpack__refuses_json_that_is_not_the_one_text(
    known: Known, tmp_path: Path, found: bytes, instead: bytes
) -> None:
    content = known.members[1][1].replace(found, instead)
    assert content != known.members[1][1]
    envelope = rfc8785.dumps(envelope_of(content, known.keys()))
    head = [member("manifest.dsse.json", envelope), member("manifest.json", content)]
    assert known.plain_code_of(tar_of([*head, *known.members[2:]]), tmp_path) == "BAD_MANIFEST"


# Case 14: who signed, for whom, and in which order.
def test_unpack__requires_both_signatures(known: Known, tmp_path: Path) -> None:
    container, steward = known.keys()
    stranger = Ed25519PrivateKey.generate()
    for keys, code in (
        ([container], "ONE_SIGNATURE"),
        ([steward], "ONE_SIGNATURE"),
        ([container, container], "SAME_KEY_TWICE"),
        ([container, stranger], "BAD_SIGNATURE"),
        ([container, steward, stranger], "BAD_SIGNATURE"),
        (known.keys(known.other_ring), "BAD_SIGNATURE"),
        ([], "BAD_ENVELOPE"),
    ):
        assert known.plain_code_of(resigned(known, keys=keys), tmp_path) == code


def test_unpack__refuses_signatures_under_the_name_of_another_key(known: Known, tmp_path: Path) -> None:
    container, steward = known.keys()
    envelope = envelope_of(known.members[1][1], [container, steward])
    by_id = {each["keyid"]: each for each in envelope["signatures"]}
    by_id[signing.key_id(steward.public_key())]["sig"] = by_id[signing.key_id(container.public_key())]["sig"]
    head = [member("manifest.dsse.json", rfc8785.dumps(envelope)), known.members[1]]
    assert known.plain_code_of(tar_of([*head, *known.members[2:]]), tmp_path) == "BAD_SIGNATURE"


def test_unpack__refuses_signatures_over_another_manifest(known: Known, tmp_path: Path) -> None:
    other = members_of(resigned(known, lambda manifest: manifest.update(num_images=4)))
    assert known.plain_code_of(tar_of([other[0], *known.members[1:]]), tmp_path) == "BAD_SIGNATURE"


def test_read_draft__needs_the_containers_signature(known: Known, tmp_path: Path) -> None:
    container, steward = known.keys()
    (tmp_path / "draft.tar").write_bytes(resigned(known, keys=[container]))
    assert sealing.read_draft(tmp_path / "draft.tar").num_signatures == 1
    for keys in ([steward], [Ed25519PrivateKey.generate()]):
        (tmp_path / "draft.tar").write_bytes(resigned(known, keys=keys))
        with pytest.raises(ContributionRejected, match="BAD_SIGNATURE"):
            sealing.read_draft(tmp_path / "draft.tar")


def approved_by(keys: list[Ed25519PrivateKey], site_id: str = "aster") -> Callable[[Content], None]:
    def change(manifest: Content) -> None:
        for approval, key in zip(manifest["approvals"], keys, strict=True):
            approval["public_key"] = signing.public_hex(key.public_key())
        manifest["site_id"] = site_id

    return change


def test_unpack__requires_keys_of_the_site_and_the_role(known: Known, tmp_path: Path) -> None:
    container, steward = known.keys()
    others = known.keys(known.other_ring)
    for keys, site_id, code in (
        (others, "aster", "UNKNOWN_KEY"),
        ([container, others[1]], "aster", "UNKNOWN_KEY"),
        ([steward, container], "aster", "UNKNOWN_KEY"),
        ([container, Ed25519PrivateKey.generate()], "aster", "UNKNOWN_KEY"),
        ([container, steward], "cedar", "UNKNOWN_SITE"),
        ([container, container], "aster", "SAME_KEY_TWICE"),
    ):
        signers = list({signing.key_id(key.public_key()): key for key in keys}.values())
        plain = resigned(known, approved_by(keys, site_id), keys=signers)
        assert known.plain_code_of(plain, tmp_path) == code
    assert known.plain_code_of(resigned(known, keys=others), tmp_path) == "BAD_SIGNATURE"


def test_unpack__requires_a_roster_in_force_and_keys_that_are_valid(tmp_path: Path) -> None:
    hub = parties.hub_at(tmp_path)
    ring = hub.join(tmp_path / "aster", "aster")
    write_staging(tmp_path / "staging")
    package = parties.seal(ring, tmp_path / "staging", tmp_path / "packages" / "aster.age")

    def code_of(**changes: Any) -> str:
        with pytest.raises(ContributionRejected) as caught:
            hub.open(package.path, None, **changes)
        return caught.value.code

    hub.open(package.path, None)
    assert code_of(today=parties.today() + timedelta(days=91)) == "ROSTER_EXPIRED"
    site = hub.roster.sites[0]
    old = site.model_copy(
        update={
            "keys": tuple(
                key.model_copy(update={"valid_until": parties.today() - timedelta(days=1)}) for key in site.keys
            )
        }
    )
    assert code_of(roster=hub.roster.model_copy(update={"sites": (old,)})) == "KEY_EXPIRED"
    hub.change_roster("suspend", "site_id=aster")
    assert code_of() == "SITE_SUSPENDED"
    hub.change_roster("admit", f"card_path={ring.card_path}")
    hub.open(package.path, None)
    hub.change_roster("revoke", f"key_id={keyring.approval_of(ring, 'steward').key_id}")
    assert code_of() == "KEY_REVOKED"


def test_unpack__refuses_what_was_sealed_for_another_hub(known: Known, tmp_path: Path) -> None:
    other = parties.hub_at(tmp_path)
    other.change_roster("admit", f"card_path={known.ring.card_path}")
    (tmp_path / "packages").mkdir()

    def code_of(path: Path) -> str:
        with pytest.raises(ContributionRejected) as caught:
            other.open(path, None)
        return caught.value.code

    assert code_of(known.package.path) == "NOT_FOR_THIS_HUB"
    anew = tmp_path / "packages" / "anew.age"  # the first hub passes on what it could read
    recipients = [pyrage.x25519.Recipient.from_str(each) for each in other.roster.recipients]
    anew.write_bytes(pyrage.encrypt(known.plain, recipients))
    assert code_of(anew) == "NOT_FOR_THIS_HUB"


def test_unpack__refuses_what_was_sealed_for_a_stranger_too(known: Known, tmp_path: Path) -> None:
    stranger = str(pyrage.x25519.Identity.generate().to_public())
    online, recovery = known.roster.recipients
    for names in ([online, stranger], [online, recovery, stranger], [stranger, stranger], [recovery, recovery]):
        plain = resigned(known, lambda manifest, names=names: manifest.update(encrypted_to=names))
        assert known.plain_code_of(plain, tmp_path) == "NOT_FOR_THIS_HUB"


def test_unpack__notices_a_cut_behind_the_end_of_the_tar(known: Known, tmp_path: Path) -> None:
    write_staging(tmp_path / "staging")
    for size_bytes in (900, 900 + 2**16 - len(known.plain) % 2**16):  # the second fills age's chunks of 64 KiB
        content = b"PAR1" + random.Random(1).randbytes(size_bytes)
        (tmp_path / "staging" / "shards" / "part-00000.parquet").write_bytes(content)
        package = parties.seal(known.ring, tmp_path / "staging", tmp_path / "long.age")
    plain = pyrage.decrypt(package.path.read_bytes(), [_identity(known.hub)])
    assert len(plain) % 2**16 == 0
    path = known.sealed(plain + b"more", tmp_path / "cut.age")
    path.write_bytes(path.read_bytes()[: -(4 + 16)])
    assert known.code_of(path) == "DAMAGED"


def test_take_number__each_package_in_its_turn_and_none_twice(known: Known, tmp_path: Path) -> None:
    hub = parties.hub_at(tmp_path)
    ring = hub.join(tmp_path / "aster", "aster")
    packages = [parties.seal(ring, known.staging, tmp_path / f"{n}.age") for n in range(1, 5)]
    assert [each.manifest.sequence for each in packages] == [1, 2, 3, 4]
    assert [each.manifest.previous_sha256 for each in packages] == ["", *(each.sha256 for each in packages[:-1])]

    def code_of(package: Package, sha256: str = "", **changes: Any) -> str:
        try:
            parties.take_number(hub, package.manifest, sha256 or package.sha256, **changes)
        except ContributionRejected as error:
            return error.code
        return ""

    first, second, third, fourth = packages
    assert code_of(second) == "PREVIOUS_MISSING"
    assert [code_of(each) for each in (first, first, second)] == ["", "", ""]
    assert code_of(second, sha256="f" * 64) == "REPLAYED", "the same content, encrypted anew"
    assert code_of(first) == "", "a package that has its number may be looked at again"
    assert code_of(fourth) == "PREVIOUS_MISSING"
    assert code_of(fourth, may_follow_lost=True) == ""
    assert code_of(third) == "REPLAYED", "a lower number than the last"
    anew = keyring.replace(ring, "container")
    hub.change_roster("admit", f"card_path={anew.card_path}")
    package = parties.seal(anew, known.staging, tmp_path / "5.age")
    assert (package.manifest.sequence, package.manifest.previous_sha256) == (1, ""), "a new container key counts anew"
    hub.open(package.path, None)
    assert code_of(package) == ""


MEMORY = """
import resource, sys
from pathlib import Path
from tests import parties
folder = Path(sys.argv[1])
hub = parties.hub_at(folder)
ring = hub.join(folder / "aster", "aster")
for size in (2**20, 160 * 2**20):
    staging = folder / f"staging-{size}"
    (staging / "shards").mkdir(parents=True)
    (staging / "summary").mkdir()
    (staging / "summary" / "metadata_summary.json").write_text("{}")
    (staging / "summary" / "disclosure_report.json").write_text("{}")
    with (staging / "shards" / "part-00000.parquet").open("wb") as stream:
        stream.write(b"PAR1")
        stream.truncate(size)
    parties.seal(ring, staging, folder / f"{size}.age")
    hub.open(folder / f"{size}.age", folder / f"opened-{size}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_seal_and_open__memory_does_not_grow_with_the_package(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    small_mib, large_mib = map(int, answer.stdout.split())
    assert large_mib - small_mib < 48, "a package of 160 MiB"


def test_unpack__opens_on_the_last_day(known: Known) -> None:
    last = min(known.package.manifest.expires, known.roster.expires)
    assert known.hub.open(known.package.path, None, today=last) == known.package.manifest
