"""The tar of a package: regular files alone, nothing about their owner or time, each byte the one that `header` writes.

It is read from a stream in order, without seeking: no more than a block is held, and what follows a refused member is
never looked at. Any tar tool reads it.
"""

import re
import tarfile
from typing import BinaryIO

from gretfound.errors import ContributionRejected

BLOCK_BYTES = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK_BYTES)


def header(name: str, size_bytes: int) -> bytes:
    """Returns a member's header: USTAR, mode 0644, owner and time 0."""
    described = tarfile.TarInfo(name)
    described.size = size_bytes
    return described.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padding(size_bytes: int) -> bytes:
    """Returns the zeros that fill a member's last block."""
    return bytes(-size_bytes % BLOCK_BYTES)


def next_member(stream: BinaryIO) -> tuple[str, int] | None:
    """Reads the next header.

    Returns:
        The member's name and size in bytes, or None at the archive's end mark.

    Raises:
        ContributionRejected: ``TRUNCATED``, ``NOT_A_REGULAR_FILE``, ``UNSAFE_NAME`` or ``NOT_CANONICAL``.
    """
    found = exactly(stream, BLOCK_BYTES)
    if found == bytes(BLOCK_BYTES):
        if exactly(stream, BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ContributionRejected("NOT_CANONICAL", "the archive's end mark is damaged; send the package again")
        return None
    if found[156:157] != tarfile.REGTYPE:
        raise ContributionRejected("NOT_A_REGULAR_FILE", "found a link, device, folder or extension; seal it again")
    raw_name = found[:100].rstrip(b"\0")
    if not re.fullmatch(rb"[a-z0-9_-]+(?:[./][a-z0-9_-]+)*", raw_name):
        raise ContributionRejected("UNSAFE_NAME", "a member's name is not a plain relative path; seal it again")
    try:
        name, size_bytes = raw_name.decode("ascii"), int(found[124:135], 8)
    except ValueError:
        raise ContributionRejected("NOT_CANONICAL", "a member's header is damaged; send the package again") from None
    # One comparison instead of a rule for each field: owner, mode, time, checksum, extensions.
    if size_bytes < 0 or found != header(name, size_bytes):
        raise ContributionRejected("NOT_CANONICAL", "a member's header is not as `seal` writes it; seal it again")
    return name, size_bytes


def exactly(stream: BinaryIO, size_bytes: int) -> bytes:
    """Reads that many bytes.

    Raises:
        ContributionRejected: ``TRUNCATED`` if there are fewer.
    """
    content = stream.read(size_bytes)
    if len(content) != size_bytes:
        raise ContributionRejected("TRUNCATED", "the package ends too early; send it again")
    return content


def skip_padding(stream: BinaryIO, size_bytes: int) -> None:
    """Reads the zeros behind a member of ``size_bytes``.

    Raises:
        ContributionRejected: ``TRUNCATED``, or ``NOT_CANONICAL`` if they are not zeros.
    """
    if any(exactly(stream, -size_bytes % BLOCK_BYTES)):
        raise ContributionRejected("NOT_CANONICAL", "bytes are hidden between two members; seal it again")


def require_end(stream: BinaryIO) -> None:
    """Requires that nothing follows the end mark.

    Raises:
        ContributionRejected: ``TRAILING_BYTES``.
    """
    if stream.read(1):
        raise ContributionRejected("TRAILING_BYTES", "bytes follow the end of the archive; send the package again")
