"""The package in which a site's contribution travels: sealed at the site, verified and opened at the hub.

A package is one deterministic tar: equal content gives equal bytes, and `open_package` accepts no byte that `seal`
would not have written, so the file can be read with any tar tool and a changed byte is always found.
"""

import hashlib
import json
import logging
import re
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gretfound import fundus, lineage, shard, storage
from gretfound.errors import ContributionRejected, StorageError

# Where the issue on contributions plugs in. Encryption: `seal` would write the tar through age, and `open_package`
# would decrypt to a temporary file before its first line. Signatures: manifest.sha256 proves only that the manifest is
# undamaged, not who wrote it; a DSSE envelope over the same bytes takes its place as the second member. The privacy
# gate and disclosure control add their reports to PLACES, and seal refuses to write without them.

log = logging.getLogger(__name__)
SCHEMA_VERSION = "gretfound-contribution/1"
FORMS = ("weights", "images", "synthetic")
MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.sha256"
MAX_MEMBERS = 64
MAX_SHARDS = MAX_MEMBERS - 6
MAX_MANIFEST_BYTES = 2**20
MAX_JSON_BYTES = 16 * 2**20
MAX_WEIGHTS_BYTES = 4 * 2**30
MAX_SHARD_BYTES = 2 * 2**30
MAX_ROWS_PER_GROUP = 1024
BLOCK_BYTES = tarfile.BLOCKSIZE
CHUNK_BYTES = 4 * 2**20
SITE_ID_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
POLICY_PATTERN = re.compile(r"[a-z]{1,32}/[0-9]{1,4}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What may stand at one place of a package: the only names that `seal` writes and `open_package` accepts."""

    pattern: str
    role: str
    contains: str
    max_bytes: int
    is_required: bool = True


_SUMMARY = Place(
    pattern=r"summary/metadata_summary\.json",
    role="summary",
    contains="counts of patients by age band, sex, disease and camera; no rows, no names, no dates",
    max_bytes=MAX_JSON_BYTES,
)
_TRAINING = (
    Place(
        pattern=r"training/config\.json",
        role="training",
        contains="the settings of the training at the site",
        max_bytes=MAX_JSON_BYTES,
    ),
    Place(
        pattern=r"training/metrics\.jsonl",
        role="training",
        contains="the loss over the course of the training",
        max_bytes=MAX_JSON_BYTES,
    ),
)
PLACES: dict[str, tuple[Place, ...]] = {
    "weights": (
        Place(
            pattern=r"weights/adapter\.safetensors",
            role="weights",
            contains="what the generator learned at this site, as numbers; no photograph",
            max_bytes=MAX_WEIGHTS_BYTES,
        ),
        Place(
            pattern=r"weights/adapter_config\.json",
            role="weights",
            contains="the size and position of those numbers within the generator",
            max_bytes=MAX_JSON_BYTES,
        ),
        _SUMMARY,
        *_TRAINING,
    ),
    "images": (
        Place(
            pattern=r"shards/part-[0-9]{5}\.parquet",
            role="shard",
            contains="real photographs, de-identified, with their metadata under pseudonyms",
            max_bytes=MAX_SHARD_BYTES,
        ),
        _SUMMARY,
    ),
    "synthetic": (
        Place(
            pattern=r"shards/part-[0-9]{5}\.parquet",
            role="shard",
            contains="photographs drawn by the site's generator, with the captions they were drawn for; no patient",
            max_bytes=MAX_SHARD_BYTES,
        ),
        _SUMMARY,
        *_TRAINING,
    ),
}
_FIRST_BYTES = {".parquet": (0, b"PAR1"), ".safetensors": (8, b"{"), ".json": (0, b"{"), ".jsonl": (0, b"{")}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a package beside its manifest."""

    path: str
    size_bytes: int
    sha256: str
    role: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a package says about itself.

    ``base_sha256`` is the digest of the UNet weights that the training started from, empty for ``images``.
    ``num_patients`` is None where the site has no patient column. ``policy`` names the site policy and its version.
    """

    schema_version: str
    site_id: str
    form: str
    country: str
    policy: str
    base_sha256: str
    num_images: int
    num_patients: int | None
    files: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A verified package on the local disk."""

    path: Path
    sha256: str
    size_bytes: int
    manifest: Manifest


def place_of(form: str, path: str) -> Place | None:
    """Returns the place that a member's name stands at in a package of ``form``, or None if it may not be there."""
    return next((place for place in PLACES[form] if re.fullmatch(place.pattern, path)), None)


def seal(
    staging_path: Path,
    package_path: Path,
    *,
    site_id: str,
    form: str,
    country: str,
    policy: str,
    base_sha256: str,
    num_images: int,
    num_patients: int | None,
) -> Package:
    """Writes a folder as one package.

    Args:
        staging_path: A folder with exactly the members of the form, as `PLACES` lists them.
        package_path: Where the package shall lie; it appears whole or not at all.
        site_id: The site's pseudonym: lower-case letters, digits and hyphens.
        form: One of `FORMS`.
        country: The site's country, or empty.
        policy: The site policy and its version, for example ``standard/1``.
        base_sha256: The digest of the base generator's UNet weights, empty for ``images``.
        num_images: Photographs that the contribution stands for.
        num_patients: Their patients, None if not known.

    Raises:
        ContributionRejected: If the hub would reject the package: a member is missing, too large, not allowed in this
            form, or a field is malformed.
    """
    members = []
    for path, sha256, size_bytes in storage.describe_folder(staging_path):
        name = path.relative_to(staging_path).as_posix()
        place = place_of(form, name) if form in FORMS else None
        role = place.role if place else ""
        members.append(Member(path=name, size_bytes=size_bytes, sha256=sha256, role=role))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        site_id=site_id,
        form=form,
        country=country,
        policy=policy,
        base_sha256=base_sha256,
        num_images=num_images,
        num_patients=num_patients,
        files=tuple(sorted(members, key=lambda member: member.path)),
    )
    content = lineage.canonical_json(asdict(manifest))
    _parse_manifest(content)
    package_path.parent.mkdir(parents=True, exist_ok=True)
    partial = package_path.with_name(f".{package_path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            for name, text in ((MANIFEST_NAME, content), (CHECKSUM_NAME, _checksum(content))):
                stream.write(_header(name, len(text)) + text + _padding(len(text)))
            for member in manifest.files:
                stream.write(_header(member.path, member.size_bytes))
                with (staging_path / member.path).open("rb") as source:
                    shutil.copyfileobj(source, stream, CHUNK_BYTES)
                stream.write(_padding(member.size_bytes))
            stream.write(bytes(2 * BLOCK_BYTES))
        package = read_package(partial)
        partial.replace(package_path)
    finally:
        partial.unlink(missing_ok=True)
    return Package(path=package_path, sha256=package.sha256, size_bytes=package.size_bytes, manifest=manifest)


def read_package(package_path: Path) -> Package:
    """Verifies a package from its first to its last byte and writes nothing.

    Raises:
        ContributionRejected: As `open_package`.
    """
    manifest = _read(package_path, None)
    sha256 = storage.sha256_of(package_path)
    return Package(path=package_path, sha256=sha256, size_bytes=package_path.stat().st_size, manifest=manifest)


def open_package(package_path: Path, into_path: Path) -> Manifest:
    """Verifies a package and unpacks its members.

    Nothing of a package is executed, unpickled or passed to a library's folder loader here. Whether shards decode and
    weights fit their base is for the job that reads them.

    Args:
        package_path: The package, of any origin.
        into_path: The folder to make; it appears whole or not at all.

    Raises:
        ContributionRejected: With a code of: ``TRUNCATED``, ``NOT_CANONICAL``, ``NOT_A_REGULAR_FILE``,
            ``UNSAFE_NAME``, ``TOO_MANY_MEMBERS``, ``OUT_OF_ORDER``, ``BAD_MANIFEST``, ``UNKNOWN_VERSION``,
            ``NOT_ALLOWED``, ``TOO_LARGE``, ``MISSING_MEMBER``, ``SIZE_MISMATCH``, ``DIGEST_MISMATCH``,
            ``WRONG_KIND``, ``TRAILING_BYTES``.
        ValueError: If ``into_path`` is there already.
    """
    if into_path.exists():
        raise ValueError(f"{into_path} is there already; required a folder that does not exist yet")
    partial = into_path.with_name(f".{into_path.name}.{uuid.uuid4().hex}.partial")
    try:
        manifest = _read(package_path, partial)
        partial.replace(into_path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _read(package_path: Path, into_path: Path | None) -> Manifest:
    names: list[str] = []
    manifest: Manifest | None = None
    content = b""
    declared: dict[str, Member] = {}
    with package_path.open("rb") as stream:
        while (header := _next_header(stream)) is not None:
            name, size_bytes = header
            if len(names) == MAX_MEMBERS:
                raise ContributionRejected("TOO_MANY_MEMBERS", f"found more than {MAX_MEMBERS} members; seal it again")
            if names and name <= names[-1]:
                raise ContributionRejected("OUT_OF_ORDER", "members are required in order, each once; seal it again")
            names.append(name)
            if len(names) == 1:
                _require_member(name == MANIFEST_NAME, "the first member is not the manifest")
                _require_size(size_bytes, MAX_MANIFEST_BYTES)
                content = _exactly(stream, size_bytes)
                _skip_padding(stream, size_bytes)
                manifest = _parse_manifest(content)
                declared = {member.path: member for member in manifest.files}
            elif len(names) == 2:
                _require_member(name == CHECKSUM_NAME, "the second member is not the manifest's checksum")
                _require_size(size_bytes, len(_checksum(b"")))
                if _exactly(stream, size_bytes) != _checksum(content):
                    raise ContributionRejected("DIGEST_MISMATCH", "the manifest is damaged; send the package again")
                _skip_padding(stream, size_bytes)
            else:
                _require_member(name in declared, f"member {len(names)} is not in the manifest")
                _copy_member(stream, declared[name], size_bytes, into_path)
        if stream.read(1):
            raise ContributionRejected("TRAILING_BYTES", "bytes follow the end of the archive; send the package again")
    if manifest is None or len(names) < 2 or set(names[2:]) != set(declared):
        missing = len(declared) - len(names[2:]) if manifest else 1
        raise ContributionRejected("MISSING_MEMBER", f"{missing} declared member(s) are not there; seal it again")
    return manifest


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
            chunk = _exactly(stream, min(CHUNK_BYTES, remaining))
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
    _skip_padding(stream, size_bytes)


def _header(name: str, size_bytes: int) -> bytes:
    described = tarfile.TarInfo(name)
    described.size = size_bytes
    return described.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _next_header(stream: BinaryIO) -> tuple[str, int] | None:
    header = _exactly(stream, BLOCK_BYTES)
    if header == bytes(BLOCK_BYTES):
        if _exactly(stream, BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ContributionRejected("NOT_CANONICAL", "the archive's end mark is damaged; send the package again")
        return None
    if header[156:157] != tarfile.REGTYPE:
        raise ContributionRejected("NOT_A_REGULAR_FILE", "found a link, device, folder or extension; seal it again")
    raw_name = header[:100].rstrip(b"\0")
    if not re.fullmatch(rb"[a-z0-9_-]+(?:[./][a-z0-9_-]+)*", raw_name):
        raise ContributionRejected("UNSAFE_NAME", "a member's name is not a plain relative path; seal it again")
    try:
        name, size_bytes = raw_name.decode("ascii"), int(header[124:135], 8)
    except ValueError:
        raise ContributionRejected("NOT_CANONICAL", "a member's header is damaged; send the package again") from None
    # One comparison instead of a rule for each field: owner, mode, time, checksum, extensions.
    if size_bytes < 0 or header != _header(name, size_bytes):
        raise ContributionRejected("NOT_CANONICAL", "a member's header is not as `seal` writes it; seal it again")
    return name, size_bytes


def _exactly(stream: BinaryIO, size_bytes: int) -> bytes:
    content = stream.read(size_bytes)
    if len(content) != size_bytes:
        raise ContributionRejected("TRUNCATED", "the package ends too early; send it again")
    return content


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % BLOCK_BYTES)


def _skip_padding(stream: BinaryIO, size_bytes: int) -> None:
    if any(_exactly(stream, -size_bytes % BLOCK_BYTES)):
        raise ContributionRejected("NOT_CANONICAL", "bytes are hidden between two members; seal it again")


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _require_member(is_right: bool, found: str) -> None:
    if not is_right:
        raise ContributionRejected("NOT_ALLOWED", f"{found}; seal the package again with gretfound-site")


def _require_size(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ContributionRejected("TOO_LARGE", f"found a member of {size_bytes} bytes; at most {max_bytes} may be")


def _parse_manifest(content: bytes) -> Manifest:
    """Reads a manifest strictly: canonical bytes, the known fields and no other, the members that its form allows."""
    try:
        found = json.loads(content)
        is_canonical = isinstance(found, dict) and lineage.canonical_json(found) == content
    except (ValueError, RecursionError):
        is_canonical = False
    if not is_canonical:
        raise ContributionRejected("BAD_MANIFEST", "the manifest is not canonical JSON; seal the package again")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise ContributionRejected(
            "UNKNOWN_VERSION", f"the package is of another version; required {SCHEMA_VERSION}: update gretfound-site"
        )
    odd = set(found) ^ {field.name for field in fields(Manifest)}
    faults = [f"it has {len(odd)} missing or unknown field(s)"] if odd else _manifest_faults(found)
    if faults:
        raise ContributionRejected("BAD_MANIFEST", f"{'; '.join(faults)}; seal the package again")
    members = tuple(Member(**file) for file in found["files"])
    _require_places(found["form"], members)
    return Manifest(**{**found, "files": members})


def _manifest_faults(found: dict[str, Any]) -> list[str]:
    def is_text(value: Any, pattern: re.Pattern[str]) -> bool:
        return isinstance(value, str) and pattern.fullmatch(value) is not None

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 10**9

    files = found["files"] if isinstance(found["files"], list) else []
    names = {field.name for field in fields(Member)}
    country = found["country"]
    base_sha256 = found["base_sha256"]
    checks = {
        "site_id is not of lower-case letters, digits and hyphens": is_text(found["site_id"], SITE_ID_PATTERN),
        f"form is none of {', '.join(FORMS)}": found["form"] in FORMS,
        "country is not a short text": isinstance(country, str) and len(country) <= 64 and country.isprintable(),
        "policy is not of the form name/version": is_text(found["policy"], POLICY_PATTERN),
        "base_sha256 is not a digest, or is one where the form has no base": base_sha256 == ""
        if found["form"] == "images"
        else is_text(base_sha256, SHA256_PATTERN),
        "num_images is not a count": is_count(found["num_images"]),
        "num_patients is not a count": found["num_patients"] is None or is_count(found["num_patients"]),
        "files are not members": bool(files)
        and all(
            isinstance(file, dict)
            and set(file) == names
            and isinstance(file["path"], str)
            and isinstance(file["role"], str)
            and type(file["size_bytes"]) is int
            and file["size_bytes"] > 0
            and is_text(file["sha256"], SHA256_PATTERN)
            for file in files
        ),
    }
    return [fault for fault, is_right in checks.items() if not is_right]


def _require_places(form: str, members: tuple[Member, ...]) -> None:
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
    missing = [place.role for place in PLACES[form] if place.is_required and place.pattern not in filled]
    if missing:
        raise ContributionRejected("MISSING_MEMBER", f"a package of the form {form!r} also needs: {', '.join(missing)}")


def screen_shard_file(shard_path: Path, *, site_id: str, origin: str) -> dict[str, int]:
    """Takes out the rows of an opened shard whose photograph is damaged; their neighbours stay.

    The file is written anew only where a row is taken out.

    Args:
        shard_path: A shard file of an opened package.
        site_id: The site that every row must name.
        origin: ``real`` or ``synthetic``, which every row must name.

    Returns:
        How many rows were taken out, by reason.

    Raises:
        ContributionRejected: ``SHARD_FORMAT`` if the file is not of the shard format, ``SITE_MISMATCH`` if a row
            belongs to another site or origin, ``PATIENT_IN_SYNTHETIC`` if a drawn photograph names a patient.
    """
    _require_shard_format(shard_path)
    rejected: Counter[str] = Counter()
    sound_path = shard_path.with_suffix(".sound")
    try:
        shard.write_shard_file(sound_path, _sound_rows(shard_path, site_id, origin, rejected))
        if rejected:
            sound_path.replace(shard_path)
    finally:
        sound_path.unlink(missing_ok=True)
    return dict(sorted(rejected.items()))


def _require_shard_format(shard_path: Path) -> None:
    try:
        footer = pq.read_metadata(shard_path)
        is_right = pq.read_schema(shard_path).equals(shard.SCHEMA)
    except (pa.ArrowException, OSError):
        is_right = False
    if not is_right:
        raise ContributionRejected(
            "SHARD_FORMAT", "a shard has other columns than this version; seal the package again"
        )
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if group.num_rows > MAX_ROWS_PER_GROUP or group.total_byte_size > MAX_SHARD_BYTES:
            raise ContributionRejected(
                "SHARD_FORMAT", f"a row group is too large; at most {MAX_ROWS_PER_GROUP} rows may be: seal it again"
            )


def _sound_rows(shard_path: Path, site_id: str, origin: str, rejected: Counter[str]) -> Iterator[dict[str, Any]]:
    try:
        for row in shard.read_rows(str(shard_path)):
            if row["site_id"] != site_id or row["origin"] != origin:
                raise ContributionRejected("SITE_MISMATCH", "a row names another site or origin than the manifest")
            if origin == "synthetic" and row["patient"] is not None:
                raise ContributionRejected("PATIENT_IN_SYNTHETIC", "a drawn photograph names a patient; seal it again")
            try:
                image = fundus.decode_photograph(row["image"])
            except fundus.UnreadablePhotograph:
                rejected["unreadable"] += 1
                continue
            if fundus.pixel_digest(image) != row["image_id"]:
                rejected["not_the_named_photograph"] += 1
                continue
            yield row
    except (StorageError, pa.ArrowException) as error:
        raise ContributionRejected("SHARD_FORMAT", "a shard is not readable Parquet; seal the package again") from error
