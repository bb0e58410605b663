"""The ledger: the hub's append-only, hash-chained record of every acceptance, rejection, withdrawal and release.

`HUB/ledger/00000000.json ...`, one entry an object. An entry holds its own digest and the digest of the one before, so
an edited, deleted, inserted or moved entry is found, and which is the first bad one. A chain cannot show that its end
was cut off: an *anchor* (index and digest of an entry, kept where the hub's writers cannot change it; every receipt
that a site holds is one) shows that.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from gretfound import lineage, signing, storage
from gretfound.errors import LineageError, StorageError

log = logging.getLogger(__name__)
RECEIPT_TYPE = "application/vnd.gretfound.receipt+json"


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """What somebody saw at one place of the ledger."""

    index: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry; ``sha256`` is the digest of all other fields, and ``recorded_at`` the writer's clock, in UTC."""

    index: int
    previous_sha256: str
    event: str
    subject: str
    details: dict[str, Any]
    recorded_at: str
    sha256: str

    @property
    def anchor(self) -> Anchor:
        """What shows later that this entry was there."""
        return Anchor(index=self.index, sha256=self.sha256)


class Ledger:
    """A hub's ledger, read as far as it has grown since the last look.

    Args:
        hub_uri: The hub.
    """

    def __init__(self, hub_uri: str) -> None:
        self._folder_uri = storage.join(hub_uri, "ledger")
        self._entries: list[Entry] = []

    def read(self) -> list[Entry]:
        """Reads what is new, verifies that it continues the chain, and returns all entries.

        Raises:
            LineageError: Naming the first entry that is missing, out of order or changed.
        """
        names = [name for name in storage.list_names(self._folder_uri) if name.endswith(".json")]
        for name in names[len(self._entries) :]:
            index = len(self._entries)
            previous = self._entries[-1].sha256 if self._entries else ""
            entry = _parsed(storage.read_bytes(storage.join(self._folder_uri, name)))
            if entry is None or (name, entry.index, entry.previous_sha256) != (_name(index), index, previous):
                raise _first_bad(index, "it is missing, changed, or does not continue the one before")
            self._entries.append(entry)
        return list(self._entries)

    def enter(self, *, event: str, subject: str, details: dict[str, Any] | None = None) -> Entry:
        """Appends one entry, unless the same was entered before; safe with many writers.

        Args:
            event: What happened, for example ``accepted``, ``rejected``, ``withdrawn`` or ``released``.
            subject: The id that it happened to.
            details: Further plain JSON-able values, without patient data.

        Returns:
            The entry, new or old.

        Raises:
            LineageError: If the ledger is damaged: nothing is appended to a broken chain.
        """
        while True:
            entries = self.read()
            content: dict[str, Any] = {"event": event, "subject": subject, "details": details or {}}
            for entry in entries:
                if {name: getattr(entry, name) for name in content} == content:
                    return entry
            content |= {
                "index": len(entries),
                "previous_sha256": entries[-1].sha256 if entries else "",
                "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            content["sha256"] = lineage.digest_of(content)
            # Whoever takes this place first has it; the other reads that entry and tries the next place.
            if storage.create_bytes(
                storage.join(self._folder_uri, _name(len(entries))), lineage.canonical_json(content)
            ):
                return Entry(**content)
            log.info("another writer was first at ledger entry %d; trying the next", len(entries))


def append(hub_uri: str, *, event: str, subject: str, details: dict[str, Any] | None = None) -> Entry:
    """Appends one entry to a hub's ledger, unless the same is there; see `Ledger.enter`."""
    return Ledger(hub_uri).enter(event=event, subject=subject, details=details)


def read(hub_uri: str) -> list[Entry]:
    """Reads and verifies a hub's ledger; see `Ledger.read`."""
    return Ledger(hub_uri).read()


def verify(hub_uri: str, *, anchors: Iterable[Anchor] = ()) -> list[Entry]:
    """Reads the ledger, verifies its chain, and that it holds what the anchors saw.

    Raises:
        LineageError: Naming the first bad entry; for a ledger whose end was cut off, the first that is missing.
    """
    entries = read(hub_uri)
    for anchor in sorted(anchors, key=lambda each: each.index):
        if anchor.index >= len(entries):
            raise _first_bad(len(entries), f"the end is cut off: an anchor saw entry {anchor.index}")
        if entries[anchor.index].sha256 != anchor.sha256:
            raise _first_bad(anchor.index, "an anchor saw another entry there: from here on it was written anew")
    return entries


def write_anchor(anchor_uri: str, anchor: Anchor) -> None:
    """Keeps an anchor in a folder that only grows, for example a bucket with object lock; an earlier one stays."""
    name = f"anchor-{anchor.index:08d}-{anchor.sha256}.json"
    storage.create_bytes(storage.join(anchor_uri, name), lineage.canonical_json(asdict(anchor)))


def read_anchors(anchor_uri: str) -> list[Anchor]:
    """Reads the anchors of a folder; receipts of packages are anchors too.

    Raises:
        StorageError: If there is none, or one is not readable.
    """
    uris = [uri for uri in storage.list_uris(anchor_uri) if uri.endswith(".json")]
    if not uris:
        raise StorageError(f"there is no anchor in {anchor_uri}; `python -m jobs.ledger anchor` writes one")
    anchors = []
    for uri in uris:
        try:
            found = storage.read_json(uri)
            if "payload" in found:  # whether the hub signed it is for `gretfound.receipt`
                found = json.loads(signing.read_envelope(storage.read_bytes(uri), RECEIPT_TYPE).payload)["ledger"]
            anchors.append(Anchor(index=int(found["index"]), sha256=str(found["sha256"])))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{uri} is neither an anchor nor a receipt; remove it or restore it") from error
    return anchors


def _name(index: int) -> str:
    return f"{index:08d}.json"


def _parsed(text: bytes) -> Entry | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or set(content) != {field.name for field in fields(Entry)}:
        return None
    digest = content.pop("sha256")
    if lineage.digest_of(content) != digest or lineage.canonical_json(content | {"sha256": digest}) != text:
        return None
    return Entry(**content, sha256=digest)


def _first_bad(index: int, reason: str) -> LineageError:
    return LineageError(f"ledger entry {index} is the first bad one: {reason}; restore it from the bucket's versions")
