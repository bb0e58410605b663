"""The sealed package: what leaves a site, for the hub's eyes alone, with two signatures over everything in it.

A package NAME.age is age over one deterministic tar: ``manifest.dsse.json`` (the signatures), ``manifest.json``
(RFC 8785), then the members that its form allows (`gretfound.contribution.PLACES`), sorted. The signatures are DSSE
over an in-toto statement about the manifest, which holds each member's digest: by the container's key and the human
data steward's, both. Before the steward has signed it is a *draft*, NAME.tar: the same tar with one signature, which
never leaves.

`unseal` decrypts and looks at nothing; `unpack` reads what came of it, without a secret, so the two may run in
processes of their own. Together they accept no byte that `seal` would not have written. They hold a few MiB however
large the package is, and no member is written before the signatures, the roster and the manifest are verified. age says
nothing about who sealed, so the manifest names the recipients: a package that somebody seals anew for another hub is
refused there.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import pyrage
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field, StringConstraints, model_validator
from securesystemslib.dsse import Envelope

from gretfound import archive, contribution, files, signing, storage
from gretfound.contribution import FORMS, PLACES, place_of
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.roster import Approval, Recipient, Roster, Sha256, SiteId, require_approvals, require_current
from gretfound.signing import Document, UnreadableDocument

SCHEMA_VERSION: Final = "gretfound-contribution/2"
PREDICATE_TYPE = "https://gretfound.org/contribution/v2"
STATEMENT_TYPE = "application/vnd.in-toto+json"
SEQUENCE_FOLDER = "sequence"
ENVELOPE_NAME, MANIFEST_NAME = "manifest.dsse.json", "manifest.json"
AGE_MARK = b"age-encryption.org/v1\n"
MAX_AGE_HEADER_BYTES = 16 * 2**10
MAX_MEMBERS = contribution.MAX_MEMBERS
MAX_HEAD_BYTES = 2**20
MAX_TOTAL_BYTES = 64 * 2**30
# A tar's headers and padding, and age's 16 bytes for each 64 KiB, are less than the last two.
MAX_PACKAGE_BYTES = MAX_TOTAL_BYTES + MAX_TOTAL_BYTES // 1024 + 2**24
MAX_DAYS = 90
CHUNK_BYTES = 4 * 2**20
_FIRST_BYTES = {".parquet": (0, b"PAR1"), ".safetensors": (8, b"{"), ".json": (0, b"{"), ".jsonl": (0, b"{")}


def _require_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds a character that cannot be printed")
    return text


class Member(Document):
    """One file of a package beside its manifest and signatures."""

    path: Annotated[str, StringConstraints(max_length=100)]
    size_bytes: int = Field(ge=1, lt=2**33)
    sha256: Sha256
    role: Annotated[str, StringConstraints(max_length=32)]


class Manifest(Document):
    """What a package says about itself.

    ``sequence`` counts the packages of one container key; ``previous_sha256`` is the digest of the one before, empty
    for the first. ``created`` and ``expires`` are days in UTC. ``encrypted_to`` are the age recipients that it was
    sealed for. ``base_sha256`` is the digest of the UNet weights that the training started from, empty for ``images``.
    ``num_patients`` is None where the site has no patient column. ``policy`` names the site policy and its version.
    """

    schema_version: Literal["gretfound-contribution/2"] = SCHEMA_VERSION
    site_id: SiteId
    sequence: int = Field(ge=1, lt=10**8)
    previous_sha256: Sha256 | Literal[""]
    created: date
    expires: date
    encrypted_to: tuple[Recipient, ...] = Field(min_length=2, max_length=8)
    approvals: tuple[Approval, Approval]
    form: Literal["weights", "images", "synthetic"]
    country: Annotated[str, StringConstraints(max_length=64), AfterValidator(_require_printable)]
    policy: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,32}/[0-9]{1,4}$")]
    base_sha256: Sha256 | Literal[""]
    num_images: int = Field(ge=0, lt=10**9)
    num_patients: int | None = Field(ge=0, lt=10**9)
    files: tuple[Member, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        if not timedelta(0) <= self.expires - self.created <= timedelta(days=MAX_DAYS):
            raise ValueError(f"expires must be within {MAX_DAYS} days of created")
        if (self.form == "images") != (self.base_sha256 == ""):
            raise ValueError("base_sha256 is empty for images, and for nothing else")
        if tuple(approval.role for approval in self.approvals) != ("container", "steward"):
            raise ValueError("approvals are the container's and the steward's, in this order")
        if (self.sequence == 1) != (self.previous_sha256 == ""):
            raise ValueError("previous_sha256 is empty for the first package, and for no other")
        return self


@dataclass(frozen=True, kw_only=True)
class Package:
    """A verified package or draft on the local disk."""

    path: Path
    sha256: str
    size_bytes: int
    manifest: Manifest
    num_signatures: int = 2


@dataclass(frozen=True, kw_only=True)
class Label:
    """What is written on a package when it is sealed, beside what it holds.

    Args:
        sequence: The package's number among those of its container key, from 1.
        previous_sha256: The digest of the package before, empty for the first.
        recipients: The hub's age recipients.
        created: Today, in UTC.
        valid_days: How many days the hub may take it in.
    """

    sequence: int
    previous_sha256: str
    recipients: Sequence[str]
    created: date
    valid_days: int = MAX_DAYS


def draft(
    staging_path: Path,
    draft_path: Path,
    *,
    site_id: str,
    form: str,
    country: str,
    policy: str,
    base_sha256: str,
    num_images: int,
    num_patients: int | None,
    label: Label,
    container_key: Ed25519PrivateKey,
    steward_public_key: str,
) -> Package:
    """Writes a folder as a draft, signed by the container.

    Args:
        staging_path: A folder with exactly the members of the form, as `PLACES` lists them.
        draft_path: Where the draft shall lie; it appears whole or not at all.
        site_id: The site's pseudonym: lower-case letters, digits and hyphens.
        form: ``weights``, ``images`` or ``synthetic``.
        country: The site's country, or empty.
        policy: The site policy and its version, for example ``standard/1``.
        base_sha256: The digest of the base generator's UNet weights, empty for ``images``.
        num_images: Photographs that the contribution stands for.
        num_patients: Their patients, None if not known.
        label: Its number, days and recipients as they are now; `seal` renews them.
        container_key: The key of the site's program.
        steward_public_key: The key of the person who will sign it, in hex.

    Raises:
        ContributionRejected: If the hub would reject the package: a member is missing, too large, not allowed in this
            form, or a field is malformed.
    """
    members = []
    for path, sha256, size_bytes in storage.describe_folder(staging_path):
        name = path.relative_to(staging_path).as_posix()
        place = place_of(form, name) if form in FORMS else None
        members.append({"path": name, "size_bytes": size_bytes, "sha256": sha256, "role": place.role if place else ""})
    terms = {
        "schema_version": SCHEMA_VERSION,
        "site_id": site_id,
        "approvals": [
            {"role": "container", "public_key": signing.public_hex(container_key.public_key())},
            {"role": "steward", "public_key": steward_public_key},
        ],
        "form": form,
        "country": country,
        "policy": policy,
        "base_sha256": base_sha256,
        "num_images": num_images,
        "num_patients": num_patients,
        "files": sorted(members, key=lambda member: str(member["path"])),
        **_labelled(label),
    }
    manifest = _parse_manifest(signing.canonical_json(terms))
    with files.whole(draft_path) as partial:
        with partial.open("wb") as stream:
            stream.write(_head(manifest, [container_key]))
            for member in manifest.files:
                stream.write(archive.header(member.path, member.size_bytes))
                with (staging_path / member.path).open("rb") as source:
                    shutil.copyfileobj(source, stream, CHUNK_BYTES)
                stream.write(archive.padding(member.size_bytes))
            stream.write(archive.END)
        read_draft(partial)
    return replace(_described(draft_path, manifest), num_signatures=1)


def read_draft(draft_path: Path) -> Package:
    """Verifies a draft, or a package that was decrypted by other means, from its first to its last byte.

    It tells whether the file is what the keys that it names have signed; whether these are the site's is for the
    reader.

    Raises:
        ContributionRejected: As `unpack`, but for the codes of the roster, the recipients and dates.
    """
    manifest, num_signatures = _verified_draft(draft_path)
    return replace(_described(draft_path, manifest), num_signatures=num_signatures)


def seal(
    draft_path: Path,
    package_path: Path,
    *,
    label: Label,
    container_key: Ed25519PrivateKey,
    steward_key: Ed25519PrivateKey,
) -> Package:
    """Signs a draft with both keys and encrypts it for the hub; the draft stays.

    Number, days and recipients of the draft are renewed: another package may have been sealed since it was made.

    Raises:
        ContributionRejected: If the draft is not what its container signed.
        ConfigError: If the keys are not those that the draft names.
    """
    drafted, _ = _verified_draft(draft_path)
    keys = (container_key, steward_key)
    if [signing.public_hex(key.public_key()) for key in keys] != [each.public_key for each in drafted.approvals]:
        raise ConfigError("the draft names other keys than the site's; run `gretfound-site contribute` again")
    content = {**drafted.model_dump(mode="json"), **_labelled(label)}
    manifest = _parse_manifest(signing.canonical_json(content))
    with files.whole(package_path) as partial, draft_path.open("rb") as members, partial.open("wb") as stream:
        _skip_head(members)
        head = io.BytesIO(_head(manifest, keys))
        recipients = [pyrage.x25519.Recipient.from_str(each) for each in manifest.encrypted_to]
        written = _Hashed(stream)
        pyrage.encrypt_io(_Joined(head, members), written, recipients)
        stream.flush()
        os.fsync(stream.fileno())
    sha256, size_bytes = written.digest.hexdigest(), package_path.stat().st_size
    return Package(path=package_path, sha256=sha256, size_bytes=size_bytes, manifest=manifest)


def unseal(package_path: Path, tar_path: Path, *, identities: Sequence[str]) -> None:
    """Decrypts a package to a tar of which not one byte is looked at here: `unpack` verifies it.

    Args:
        package_path: The package, of any origin.
        tar_path: Where the tar shall lie; it has fewer bytes than the package.
        identities: The hub's age identities, ``AGE-SECRET-KEY-1...``.

    Raises:
        ContributionRejected: ``NOT_SEALED``, ``NOT_FOR_THIS_HUB``, ``TOO_LARGE``, or ``DAMAGED`` (a changed or missing
            byte anywhere in the file). A part of the tar may lie there then.
    """
    _require_size(package_path.stat().st_size, MAX_PACKAGE_BYTES)
    keys = [pyrage.x25519.Identity.from_str(each) for each in identities]
    with package_path.open("rb") as sealed, tar_path.open("wb") as stream:
        head = sealed.read(MAX_AGE_HEADER_BYTES)
        if not head.startswith(AGE_MARK):
            raise ContributionRejected("NOT_SEALED", "it is not sealed with age; send the file that ends in .age")
        if b"\n--- " not in head:  # the library would look for the end of the header in memory
            raise ContributionRejected("DAMAGED", "the package's age header is damaged; send the package again")
        sealed.seek(0)
        plain = _Watched(stream)
        try:
            pyrage.decrypt_io(sealed, plain, keys)
        except (pyrage.DecryptError, OSError) as error:
            if plain.fault is not None:
                raise plain.fault from None
            if getattr(error, "errno", None) is not None:  # pyrage 1.4 gives damage as an OSError without a number
                raise
            if "matching keys" in str(error):
                raise ContributionRejected(
                    "NOT_FOR_THIS_HUB", "it is sealed for somebody else; seal it with the card of this hub"
                ) from None
            raise ContributionRejected(
                "DAMAGED", f"the package was changed or cut after it was sealed ({error}); send it again"
            ) from None


def unpack(
    tar_path: Path,
    into_path: Path | None,
    *,
    own_recipients: Sequence[str],
    roster: Roster,
    today: date,
    on_signed: Callable[[bytes], None] = lambda _: None,
) -> Manifest:
    """Verifies what `unseal` has written, and unpacks its members.

    It needs no network, no hub and no secret, and of the disk no more than the members that the manifest declares, so
    it may run in a confined process. Nothing of a package is executed, unpickled or passed to a library's folder
    loader. Whether it comes in its turn is for `take_number`; whether shards decode and weights fit their base, for the
    job that reads them.

    Args:
        tar_path: The tar, of any origin.
        into_path: The folder to make; it appears whole or not at all. None verifies and writes nothing.
        own_recipients: The age recipients of the hub's identities.
        roster: The hub's roster, verified.
        today: The day in UTC.
        on_signed: Called with the signatures once these, the keys, recipients and days are verified; only then is a
            member written.

    Raises:
        ContributionRejected: With a code of

            - signatures: ``ONE_SIGNATURE``, ``SAME_KEY_TWICE``, ``BAD_SIGNATURE``, ``BAD_ENVELOPE``;
            - roster: ``ROSTER_EXPIRED``, ``UNKNOWN_SITE``, ``SITE_SUSPENDED``, ``UNKNOWN_KEY``, ``KEY_REVOKED``,
              ``KEY_EXPIRED``;
            - manifest: ``BAD_MANIFEST``, ``UNKNOWN_VERSION``, ``PACKAGE_EXPIRED``, ``NOT_FOR_THIS_HUB``,
              ``NOT_ALLOWED``, ``TOO_LARGE``, ``TOO_MANY_MEMBERS``, ``OUT_OF_ORDER``, ``MISSING_MEMBER``;
            - tar: ``TRUNCATED``, ``NOT_CANONICAL``, ``NOT_A_REGULAR_FILE``, ``UNSAFE_NAME``, ``TRAILING_BYTES``,
              ``SIZE_MISMATCH``, ``DIGEST_MISMATCH``, ``WRONG_KIND``.
        ValueError: If ``into_path`` is there already.
    """
    if into_path is not None and into_path.exists():
        raise ValueError(f"{into_path} is there already; required a folder that does not exist yet")

    def judge(manifest: Manifest, envelope: Envelope) -> None:
        _require_signatures(manifest, envelope, may_be_draft=False)
        _require_trust(manifest, own_recipients=own_recipients, roster=roster, today=today)
        on_signed(signing.envelope_to_bytes(envelope))

    with tar_path.open("rb") as stream:
        if into_path is None:
            return _read(stream, None, judge)
        partial = into_path.with_name(f".{into_path.name}.{uuid.uuid4().hex}.partial")
        try:
            manifest = _read(stream, partial, judge)
            partial.replace(into_path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def require_signed(
    manifest: Manifest, signatures: bytes, *, own_recipients: Sequence[str], roster: Roster, today: date
) -> None:
    """Verifies once more what `unpack` says of a package's head, where its process is not trusted.

    Args:
        manifest: The manifest that it returned.
        signatures: What it gave ``on_signed``.
        own_recipients: As for `unpack`.
        roster: As for `unpack`.
        today: As for `unpack`.

    Raises:
        ContributionRejected: With a code of `unpack` about signatures, roster or manifest.
    """
    _require_signatures(manifest, _read_envelope(signatures, manifest.to_bytes()), may_be_draft=False)
    _require_trust(manifest, own_recipients=own_recipients, roster=roster, today=today)


def read_sealed(package_path: Path, *, identities: Sequence[str]) -> Package:
    """Decrypts a package into a temporary folder and verifies it against the keys that it names itself, for a reader.

    Raises:
        ContributionRejected: As `unseal` and `unpack`, but for the codes of the roster and dates.
    """

    def judge(manifest: Manifest, envelope: Envelope) -> None:
        _require_signatures(manifest, envelope, may_be_draft=False)

    with storage.scratch_folder() as folder:
        tar_path = Path(folder) / "package.tar"
        unseal(package_path, tar_path, identities=identities)
        with tar_path.open("rb") as stream:
            manifest = _read(stream, None, judge)
    return _described(package_path, manifest)


def is_sealed(path: Path) -> bool:
    """Tells whether a file begins as age does."""
    with path.open("rb") as stream:
        return stream.read(len(AGE_MARK)) == AGE_MARK


def take_number(
    hub_uri: str,
    *,
    site_id: str,
    container_key_id: str,
    sequence: int,
    previous_sha256: str,
    package_sha256: str,
    may_follow_lost: bool = False,
) -> None:
    """Takes a verified package's number among those of its container key; of two with one number, one gets it.

    ``HUB/sequence/SITE/KEY/NUMBER.json`` is put once and never changed. The same package may take its number again.
    Call it after `unpack`, whatever becomes of the package then: one that did not verify must not take a number.

    Args:
        hub_uri: The hub.
        site_id: The manifest's.
        container_key_id: The id of the key of the manifest's first approval.
        sequence: The manifest's.
        previous_sha256: The manifest's.
        package_sha256: The digest of the package file.
        may_follow_lost: The site and the hub agreed that the packages before this one are lost.

    Raises:
        ContributionRejected: ``REPLAYED`` if the number, or a higher one, belongs to another package;
            ``PREVIOUS_MISSING`` if the package before has not been taken in yet: it may be tried again afterwards.
    """
    folder_uri = storage.join(hub_uri, SEQUENCE_FOLDER, site_id, container_key_id)
    taken = [name for name in storage.list_names(folder_uri) if re.fullmatch(r"[0-9]{8}\.json", name)]
    name = f"{sequence:08d}.json"
    if name not in taken:
        if taken and taken[-1] > name:
            raise ContributionRejected("REPLAYED", "the hub has a later package of this site; contribute again")
        before = storage.read_json(storage.join(folder_uri, taken[-1]))["package_sha256"] if taken else ""
        if before != previous_sha256 and not may_follow_lost:
            raise ContributionRejected(
                "PREVIOUS_MISSING",
                f"it is package {sequence} of its key, and the one before it is not the last that the hub has (number "
                f"{int(taken[-1][:8]) if taken else 0}); send the missing one, or tell the hub that it is lost",
            )
        content = {"package_sha256": package_sha256, "previous_sha256": previous_sha256}
        storage.create_bytes(storage.join(folder_uri, name), signing.canonical_json(content))
    if storage.read_json(storage.join(folder_uri, name))["package_sha256"] != package_sha256:
        raise ContributionRejected("REPLAYED", "the hub has another package of this number; contribute again")


def _labelled(label: Label) -> dict[str, Any]:
    return {
        "sequence": label.sequence,
        "previous_sha256": label.previous_sha256,
        "created": label.created.isoformat(),
        "expires": (label.created + timedelta(days=label.valid_days)).isoformat(),
        "encrypted_to": sorted(label.recipients),
    }


def _described(path: Path, manifest: Manifest) -> Package:
    return Package(path=path, sha256=storage.sha256_of(path), size_bytes=path.stat().st_size, manifest=manifest)


def _head(manifest: Manifest, keys: Sequence[Ed25519PrivateKey]) -> bytes:
    content = manifest.to_bytes()
    parts = ((ENVELOPE_NAME, signing.sign(_statement(content), STATEMENT_TYPE, keys)), (MANIFEST_NAME, content))
    return b"".join(archive.header(name, len(text)) + text + archive.padding(len(text)) for name, text in parts)


def _skip_head(stream: BinaryIO) -> None:
    for _ in (ENVELOPE_NAME, MANIFEST_NAME):
        found = archive.next_member(stream)
        assert found is not None  # the draft was read to its end just now
        stream.seek(found[1] + len(archive.padding(found[1])), io.SEEK_CUR)


def _verified_draft(draft_path: Path) -> tuple[Manifest, int]:
    num_signatures = 0

    def judge(manifest: Manifest, envelope: Envelope) -> None:
        nonlocal num_signatures
        _require_signatures(manifest, envelope, may_be_draft=True)
        num_signatures = len(envelope.signatures)

    with draft_path.open("rb") as stream:
        return _read(stream, None, judge), num_signatures


class _Joined(io.RawIOBase):
    """One stream after another, as `pyrage.encrypt_io` reads them."""

    def __init__(self, *streams: BinaryIO) -> None:
        self._streams = list(streams)

    def read(self, size_bytes: int = -1) -> bytes:
        while self._streams:
            if content := self._streams[0].read(size_bytes):
                return content
            self._streams.pop(0)
        return b""


class _Hashed:
    """Writes to a stream and takes the digest of what it writes, as `pyrage.encrypt_io` writes it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._stream.write(content)

    def flush(self) -> None:
        self._stream.flush()


class _Watched:
    """Writes to a stream, as `pyrage.decrypt_io` writes to it, and remembers the stream's own error as ``fault``.

    pyrage 1.4 passes that error on without its number, just as it does with damage in what it reads.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.fault: OSError | None = None

    def write(self, content: bytes) -> int:
        with self._watched():
            return self._stream.write(content)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = error
            raise


def _statement(manifest_content: bytes) -> bytes:
    """Returns what is signed. Source: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md"""
    digest = {"sha256": hashlib.sha256(manifest_content).hexdigest()}
    return signing.canonical_json(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": MANIFEST_NAME, "digest": digest}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {},
        }
    )


def _read(stream: BinaryIO, into_path: Path | None, judge: Callable[[Manifest, Envelope], None]) -> Manifest:
    head = [_read_head(stream, name) for name in (ENVELOPE_NAME, MANIFEST_NAME)]
    manifest = _parse_manifest(head[1])
    judge(manifest, _read_envelope(head[0], head[1]))
    declared = {member.path: member for member in manifest.files}
    names: list[str] = []
    while (found := archive.next_member(stream)) is not None:
        name, size_bytes = found
        if names and name <= names[-1]:
            raise ContributionRejected("OUT_OF_ORDER", "members are required in order, each once; seal it again")
        _require_member(name in declared, "a member is not in the manifest")
        names.append(name)
        _copy_member(stream, declared[name], size_bytes, into_path)
    archive.require_end(stream)
    if missing := len(declared) - len(names):
        raise ContributionRejected("MISSING_MEMBER", f"{missing} declared member(s) are not there; seal it again")
    return manifest


def _read_head(stream: BinaryIO, required_name: str) -> bytes:
    found = archive.next_member(stream)
    _require_member(
        found is not None and found[0] == required_name, f"it does not begin with {ENVELOPE_NAME} and {MANIFEST_NAME}"
    )
    assert found is not None
    _require_size(found[1], MAX_HEAD_BYTES)
    content = archive.exactly(stream, found[1])
    archive.skip_padding(stream, found[1])
    return content


def _read_envelope(content: bytes, manifest_content: bytes) -> Envelope:
    try:
        envelope = signing.read_envelope(content, STATEMENT_TYPE)
    except UnreadableDocument as error:
        code = error.code if error.code == "SAME_KEY_TWICE" else "BAD_ENVELOPE"
        raise ContributionRejected(code, f"the signatures cannot be read: {error}; seal the package again") from error
    if envelope.payload != _statement(manifest_content):
        raise ContributionRejected("BAD_SIGNATURE", "the signatures are over another manifest; seal the package again")
    return envelope


def _require_signatures(manifest: Manifest, envelope: Envelope, *, may_be_draft: bool) -> None:
    """Requires the container's signature and, unless it may be a draft, the steward's: two keys, and no third."""
    ids = {approval.role: approval.key_id for approval in manifest.approvals}
    if ids["container"] == ids["steward"]:
        raise ContributionRejected("SAME_KEY_TWICE", "the container and the steward need keys of their own")
    signed = set(envelope.signatures)
    if len(signed) < 2 and not may_be_draft:
        raise ContributionRejected("ONE_SIGNATURE", "it needs the container's and the steward's signature: sign it")
    allowed = [set(ids.values()), *([{ids["container"]}] if may_be_draft else [])]
    verified = signing.verified_key_ids(
        envelope, [signing.public_from_hex(approval.public_key) for approval in manifest.approvals]
    )
    if signed not in allowed or verified != signed:
        raise ContributionRejected(
            "BAD_SIGNATURE", "a signature is not of the keys that the manifest names; seal it again"
        )


def _require_trust(manifest: Manifest, *, own_recipients: Sequence[str], roster: Roster, today: date) -> None:
    require_current(roster, today)
    require_approvals(roster, manifest.site_id, manifest.approvals, today)
    named = set(manifest.encrypted_to)
    if not named <= set(roster.recipients) or not named & set(own_recipients):
        raise ContributionRejected(
            "NOT_FOR_THIS_HUB",
            "the site sealed it for other recipients than this hub's; seal it with the card of this hub",
        )
    if not manifest.created - timedelta(days=1) <= today <= manifest.expires:
        raise ContributionRejected(
            "PACKAGE_EXPIRED",
            f"it may be taken in from {manifest.created} to {manifest.expires}; check the site's clock, seal it again",
        )


def _copy_member(stream: BinaryIO, member: Member, size_bytes: int, into_path: Path | None) -> None:
    if size_bytes != member.size_bytes:
        raise ContributionRejected("SIZE_MISMATCH", f"a {member.role} member is not as long as the manifest says")
    offset, magic = _FIRST_BYTES[Path(member.path).suffix]
    target = None
    digest = hashlib.sha256()
    if into_path is not None:
        path = into_path / member.path
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.open("xb")
    try:
        remaining = size_bytes
        while remaining:
            chunk = archive.exactly(stream, min(CHUNK_BYTES, remaining))
            if remaining == size_bytes and not chunk.startswith(magic, offset):
                raise ContributionRejected("WRONG_KIND", f"a {member.role} member is not of the kind its name says")
            digest.update(chunk)
            if target is not None:
                target.write(chunk)
            remaining -= len(chunk)
    finally:
        if target is not None:
            target.close()
    if digest.hexdigest() != member.sha256:
        raise ContributionRejected(
            "DIGEST_MISMATCH", f"a {member.role} member is not what the manifest says; send the package again"
        )
    archive.skip_padding(stream, size_bytes)


def _require_member(is_right: bool, found: str) -> None:
    if not is_right:
        raise ContributionRejected("NOT_ALLOWED", f"{found}; seal the package again with gretfound-site")


def _require_size(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ContributionRejected("TOO_LARGE", f"found {size_bytes} bytes where at most {max_bytes} may be")


def _parse_manifest(content: bytes) -> Manifest:
    """Reads a manifest strictly: canonical bytes, the known fields and no other, the members that its form allows."""
    try:
        manifest = signing.parse_document(content, Manifest)
    except UnreadableDocument as error:
        code = error.code if error.code == "UNKNOWN_VERSION" else "BAD_MANIFEST"
        raise ContributionRejected(code, f"the manifest: {error}; update gretfound-site and seal it again") from error
    _require_places(manifest.form, manifest.files)
    return manifest


def _require_places(form: str, members: Sequence[Member]) -> None:
    names = [member.path for member in members]
    if names != sorted(set(names)):
        raise ContributionRejected("OUT_OF_ORDER", "the manifest's members are required in order, each once")
    if len(names) > MAX_MEMBERS - 2:
        raise ContributionRejected("TOO_MANY_MEMBERS", f"found {len(names)} members; at most {MAX_MEMBERS - 2} may be")
    filled = set()
    for member in members:
        place = place_of(form, member.path)
        if place is None or place.role != member.role:
            raise ContributionRejected("NOT_ALLOWED", f"a member may not be in a package of the form {form!r}")
        _require_size(member.size_bytes, place.max_bytes)
        filled.add(place.pattern)
    _require_size(sum(member.size_bytes for member in members), MAX_TOTAL_BYTES)
    missing = [place.role for place in PLACES[form] if place.is_required and place.pattern not in filled]
    if missing:
        raise ContributionRejected("MISSING_MEMBER", f"a package of the form {form!r} also needs: {', '.join(missing)}")
