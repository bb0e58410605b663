"""The one room that opens buckets: bytes, folders and records under a hub URI.

`file://` (or a plain path), `s3://`, `gs://` and `abfs://` are opened through pyarrow; the one operation that pyarrow
lacks, put-if-absent, goes through fsspec. Credentials and endpoints come from each cloud's usual environment variables
(`AWS_ENDPOINT_URL` for S3-compatible servers), never from configuration.

Layout::

    HUB/<records>/<record id>/record.json     a finished record, its files beside it
    HUB/runs/<recipe id>/                     a job's working state; record.json in it, written last, means finished
    HUB/shards/parts/<sha256>.parquet         shard files, named by their content
"""

import base64
import hashlib
import json
import logging
import os
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow
from pyarrow import fs as arrow_fs

from gretfound import files, lineage
from gretfound.errors import LineageError, StorageError
from gretfound.lineage import File, RecordT

log = logging.getLogger(__name__)
SCHEMES = ("file", "s3", "gs", "abfs")
CHUNK_BYTES = 8 * 2**20
UPLOAD_ATTEMPTS, UPLOAD_PAUSE_S = 5, 1.0  # the pause doubles: half a minute in all


def filesystem(uri: str) -> tuple[arrow_fs.FileSystem, str]:
    """Opens the file system that ``uri`` lies on.

    Returns:
        The pyarrow file system and the path within it.

    Raises:
        StorageError: If the scheme is none of `SCHEMES`.
    """
    scheme, _, rest = uri.partition("://")
    if not rest:
        return arrow_fs.LocalFileSystem(), str(Path(uri).absolute())
    match scheme:
        case "file":
            return arrow_fs.LocalFileSystem(), "/" + urllib.parse.unquote(rest).lstrip("/")
        case "s3":
            return arrow_fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL")), rest.rstrip("/")
        case "gs" | "abfs":
            opened, path = arrow_fs.FileSystem.from_uri(uri)
            return opened, cast(str, path)
        case _:
            raise StorageError(f"found the scheme {scheme!r} in a URI; required one of {', '.join(SCHEMES)}")


def normalised(uri: str) -> str:
    """Returns ``uri`` with a scheme and without a trailing slash, so that two spellings of one place are equal."""
    if "://" in uri:
        return uri.rstrip("/")
    return "file://" + str(Path(uri).absolute())


def join(uri: str, *parts: str) -> str:
    """Appends path segments to a URI or a plain path."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(uri: str) -> Path | None:
    """Returns the path of a local ``uri``, or None where it lies in a bucket."""
    opened, path = filesystem(uri)
    return Path(path) if isinstance(opened, arrow_fs.LocalFileSystem) else None


def exists(uri: str) -> bool:
    """Tells whether an object or a folder is there."""
    opened, path = filesystem(uri)
    return bool(opened.get_file_info(path).type != arrow_fs.FileType.NotFound)


def list_uris(uri: str) -> list[str]:
    """Lists the objects below ``uri``, recursively and sorted; an absent folder has none."""
    _, path = filesystem(uri)
    found = [entry.path for entry in _listed(uri, recursive=True) if entry.type == arrow_fs.FileType.File]
    return sorted(join(uri, entry.removeprefix(path)) for entry in found)


def list_names(uri: str) -> list[str]:
    """Lists the names directly below ``uri``, sorted; an absent folder has none."""
    return sorted(entry.base_name for entry in _listed(uri, recursive=False))


def _listed(uri: str, *, recursive: bool) -> list[arrow_fs.FileInfo]:
    opened, path = filesystem(uri)
    selector = arrow_fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    try:
        return list(opened.get_file_info(selector))
    except FileNotFoundError:  # pyarrow 26 looks twice for an absent folder, and it was made between the two
        return list(opened.get_file_info(selector))


def read_bytes(uri: str) -> bytes:
    """Reads one object whole.

    Raises:
        StorageError: If it is absent or unreadable.
    """
    opened, path = filesystem(uri)
    try:
        with opened.open_input_file(path) as stream:
            return cast(bytes, stream.read())
    except FileNotFoundError as error:
        raise StorageError(f"{uri} does not exist") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise StorageError(f"{uri} could not be read: {error}") from error


def write_bytes(uri: str, content: bytes) -> None:
    """Writes one object whole or not at all; an earlier one is replaced.

    Raises:
        StorageError: If a bucket refuses it again and again.
    """
    opened, path = filesystem(uri)
    if isinstance(opened, arrow_fs.LocalFileSystem):
        files.write(Path(path), content)
        return
    for attempt in range(1, UPLOAD_ATTEMPTS + 1):
        try:
            with opened.open_output_stream(path) as stream:  # a bucket shows an object only when it is closed
                stream.write(content)
            break
        except OSError as error:
            _wait_or_give_up(uri, attempt, error)


def create_bytes(uri: str, content: bytes) -> bool:
    """Writes one object unless there is one already; of several writers exactly one wins.

    Returns:
        Whether this call wrote it. False does not say that another did: the answer to this call's own first attempt may
        have been lost. Read what stands there.

    Raises:
        StorageError: If a bucket refuses it again and again.
    """
    opened, path = filesystem(uri)
    if isinstance(opened, arrow_fs.LocalFileSystem):
        return files.create(Path(path), content)
    remote, remote_path = fsspec.core.url_to_fs(uri)
    for attempt in range(1, UPLOAD_ATTEMPTS + 1):
        try:
            remote.pipe_file(remote_path, content, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as error:  # also S3's 409: another conditional write was under way
            _wait_or_give_up(uri, attempt, error)
    raise AssertionError("the last attempt gives up")


def _wait_or_give_up(uri: str, attempt: int, error: OSError) -> None:
    if attempt == UPLOAD_ATTEMPTS:
        raise StorageError(f"{uri} could not be written in {attempt} attempts: {error}") from error
    log.warning("%s was not written (attempt %d of %d): %s", uri, attempt, UPLOAD_ATTEMPTS, error)
    time.sleep(UPLOAD_PAUSE_S * 2 ** (attempt - 1))


def read_json(uri: str) -> Any:
    """Reads one JSON object.

    Raises:
        StorageError: If it is absent or not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri} is not JSON: {error}") from error


def write_json(uri: str, content: Any) -> None:
    """Writes ``content`` as indented JSON."""
    write_bytes(uri, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a local file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_folder(folder_path: Path) -> list[tuple[Path, str, int]]:
    """Lists a local folder's files, sorted, as (path, SHA-256, bytes)."""
    files = sorted(path for path in folder_path.rglob("*") if path.is_file())
    return [(path, sha256_of(path), path.stat().st_size) for path in files]


def upload_file(path: Path, uri: str) -> None:
    """Copies one local file to ``uri``; nothing half-written can be seen under that name.

    Raises:
        StorageError: If a bucket refuses it again and again.
    """
    opened, target = filesystem(uri)
    if isinstance(opened, arrow_fs.LocalFileSystem):
        with files.whole(Path(target)) as partial:
            arrow_fs.copy_files(str(path), str(partial), source_filesystem=opened, destination_filesystem=opened)
        return
    local = arrow_fs.LocalFileSystem()
    for attempt in range(1, UPLOAD_ATTEMPTS + 1):
        try:
            arrow_fs.copy_files(str(path), target, source_filesystem=local, destination_filesystem=opened)
            break
        except OSError as error:  # S3, Google Cloud Storage and Azure alike: pyarrow tells their faults apart in words
            _wait_or_give_up(uri, attempt, error)


def download_file(uri: str, path: Path, *, sha256: str | None = None) -> None:
    """Copies one object to a local path, verifying its digest where one is given.

    Raises:
        StorageError: If the object is absent, or not what its digest says.
    """
    content_digest = hashlib.sha256()
    opened, source = filesystem(uri)
    try:
        with files.whole(path) as partial:
            with opened.open_input_stream(source) as stream, partial.open("wb") as target:
                while chunk := stream.read(CHUNK_BYTES):
                    content_digest.update(chunk)
                    target.write(chunk)
            if sha256 is not None and content_digest.hexdigest() != sha256:
                raise StorageError(
                    f"{uri} is not what its record says: found SHA-256 {content_digest.hexdigest()}, required "
                    f"{sha256}; restore the object or make the record again"
                )
    except FileNotFoundError as error:
        raise StorageError(f"{uri} does not exist") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise StorageError(f"{uri} could not be copied to this machine: {error}; run the command again") from error


def is_as_stored(uri: str, path: Path) -> bool:
    """Tells whether a downloaded copy is what the store says of the object now: its size, and the digest it keeps.

    S3 keeps the SHA-256 that an uploader had it check, and else the MD5 as ETag, of an object that was sent in one part
    and is not encrypted with KMS. Of all other objects the size alone is compared.

    Raises:
        StorageError: If the object is absent.
    """
    if size_of(uri) != path.stat().st_size:
        return False
    name, digest = _digest_kept_of(uri)
    if not name:
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(name, usedforsecurity=False)).digest() == digest


def _digest_kept_of(uri: str) -> tuple[str, bytes]:
    """Returns a digest's name and value; both empty where the store keeps none of a kind that is known here."""
    if not uri.startswith("s3://"):
        return "", b""
    remote, remote_path = fsspec.core.url_to_fs(uri)
    bucket, _, key = remote_path.partition("/")
    try:
        facts = remote.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except FileNotFoundError as error:
        raise StorageError(f"{uri} does not exist") from error
    except OSError as error:
        raise StorageError(f"{uri} could not be read: {error}") from error
    if facts.get("ChecksumType") == "FULL_OBJECT" and "ChecksumSHA256" in facts:
        return "sha256", base64.b64decode(facts["ChecksumSHA256"])
    etag = facts.get("ETag", "").strip('"')
    is_md5 = len(etag) == 32 and "kms" not in facts.get("ServerSideEncryption", "")
    return ("md5", bytes.fromhex(etag)) if is_md5 else ("", b"")


def size_of(uri: str) -> int:
    """Returns how many bytes an object has.

    Raises:
        StorageError: If it is absent.
    """
    opened, path = filesystem(uri)
    found = opened.get_file_info(path)
    if found.type != arrow_fs.FileType.File:
        raise StorageError(f"{uri} does not exist")
    return int(found.size)


def publish_folder(hub_uri: str, folder_path: Path, record: RecordT) -> RecordT:
    """Uploads a local folder as the artefact of ``record``, then the record itself.

    Args:
        hub_uri: The hub.
        folder_path: A finished local folder; every file in it becomes part of the record.
        record: The record without its files.

    Returns:
        The record with its ``files``, as it was written. Its id, and so its folder, follow from its content: the paths
        in it are relative to that folder.
    """
    described = describe_folder(folder_path)
    files = tuple(
        File(path=str(path.relative_to(folder_path)), sha256=sha256, size_bytes=size_bytes)
        for path, sha256, size_bytes in described
    )
    complete = lineage.with_files(record, files)
    for path, _, _ in described:
        upload_file(path, join(record_uri(hub_uri, complete), str(path.relative_to(folder_path))))
    write_record(hub_uri, complete)
    return complete


def fetch_folder(hub_uri: str, record: lineage.Record, folder_path: Path) -> Path:
    """Copies a record's files into ``folder_path``, verifying every digest; files already there are kept.

    Raises:
        StorageError: If an object is absent, or not what its digest says.
    """
    for file in record.files:
        path = folder_path / file.path
        if not (path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256):
            download_file(join(record_uri(hub_uri, record), file.path), path, sha256=file.sha256)
    return folder_path


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Returns a temporary folder that is removed when its ``with`` block ends."""
    return tempfile.TemporaryDirectory(prefix="gretfound-")


def record_uri(hub_uri: str, record: lineage.Record) -> str:
    """Returns the folder of a record and its files."""
    return join(hub_uri, record.folder, record.id)


def run_uri(hub_uri: str, recipe_id: str) -> str:
    """Returns the folder of a job's working state."""
    return join(hub_uri, "runs", recipe_id)


def latents_uri(hub_uri: str, site_id: str) -> str:
    """Returns the folder of the latents of a site's photographs, one folder a shard and base."""
    return join(hub_uri, "latents", site_id)


def write_record(hub_uri: str, record: lineage.Record) -> None:
    """Writes a record beside its artefact and, where it was made by a recipe, as the end mark of that run."""
    content = {**lineage.to_json(record), "id": record.id}
    write_json(join(record_uri(hub_uri, record), "record.json"), content)
    if record.recipe_id:
        write_json(join(run_uri(hub_uri, record.recipe_id), "record.json"), content)


def read_record(hub_uri: str, record_id: str, expected: type[RecordT]) -> RecordT:
    """Reads a record and verifies that its content is what its id says.

    Raises:
        LineageError: If there is no such record, it is of another kind, or its content was changed.
    """
    found = lineage.kind_of(record_id)
    if found is not expected:
        raise LineageError(f"found the {found.kind} id {record_id!r}; required the id of a {expected.kind} record")
    uri = join(hub_uri, expected.folder, record_id, "record.json")
    if not exists(uri):
        raise LineageError(f"there is no record {record_id} in this hub; `python -m jobs.NAME` prints ids as last line")
    return _verified(read_json(uri), record_id, expected)


def finished_record(hub_uri: str, recipe_id: str, expected: type[RecordT]) -> RecordT | None:
    """Returns the record that an earlier run of the same recipe finished with, if there is one."""
    uri = join(run_uri(hub_uri, recipe_id), "record.json")
    if not exists(uri):
        return None
    content = read_json(uri)
    return _verified(content, content.get("id", ""), expected)


def read_parents(hub_uri: str, record: lineage.Record, expected: type[RecordT]) -> list[RecordT]:
    """Reads those of a record's parents that are of one kind."""
    found = [parent_id for parent_id in record.parents if lineage.kind_of(parent_id) is expected]
    return [read_record(hub_uri, parent_id, expected) for parent_id in found]


def read_records(hub_uri: str, expected: type[RecordT]) -> Iterator[RecordT]:
    """Reads every record of one kind, sorted by id."""
    for record_id in list_names(join(hub_uri, expected.folder)):
        if record_id.startswith(f"{expected.kind}-") and exists(
            join(hub_uri, expected.folder, record_id, "record.json")
        ):
            yield read_record(hub_uri, record_id, expected)


def _verified(content: dict[str, Any], record_id: str, expected: type[RecordT]) -> RecordT:
    record = lineage.from_json({name: value for name, value in content.items() if name != "id"}, expected)
    if record.id != record_id:
        raise LineageError(
            f"the record {record_id} was changed after it was written: its content has the id {record.id}"
        )
    return record
