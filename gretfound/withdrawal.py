"""Withdrawal: what descends from a site, the mark on each such artefact, and which sites have withdrawn.

Nothing is deleted. `HUB/withdrawals/SITE.json` says that a site has withdrawn: from then on intake refuses its packages
and no new corpus takes its shards. `withdrawn.json` beside a record says that the artefact descends from the site, and
beside latents of its photographs, which are no records, that they do.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from gretfound import lineage, quarantine, storage
from gretfound.errors import LineageError
from gretfound.lineage import RecordT

MARK_NAME = "withdrawn.json"


def descendants(hub_uri: str, *, site_id: str) -> list[lineage.Record]:
    """Returns a site's records and every record that was made from one of them, in order of the chain."""
    records = [record for kind in lineage.KINDS for record in storage.read_records(hub_uri, kind)]
    found = {record.id for record in records if getattr(record, "site_id", None) == site_id}
    num_found = -1
    while num_found < len(found):  # an encoder may descend from another encoder, so one pass is not enough
        num_found = len(found)
        found |= {record.id for record in records if found & set(record.parents)}
    return [record for record in records if record.id in found]


def latents(hub_uri: str, *, site_id: str) -> list[str]:
    """Returns the keys of what is cached of a site's photographs and their captions (`storage.latents_uri`)."""
    return storage.list_names(storage.latents_uri(hub_uri, site_id))


def mark(hub_uri: str, records: list[lineage.Record], *, site_id: str, withdrawal_id: str) -> None:
    """Marks the site first, then each of its artefacts and its latents; done again, it changes nothing."""
    content: dict[str, Any] = {"site_id": site_id, "withdrawal_id": withdrawal_id}
    storage.create_bytes(_site_uri(hub_uri, site_id), lineage.canonical_json(content))
    caches = [storage.join(storage.latents_uri(hub_uri, site_id), key) for key in latents(hub_uri, site_id=site_id)]
    for folder_uri in [*(storage.record_uri(hub_uri, record) for record in records), *caches]:
        uri = storage.join(folder_uri, MARK_NAME)
        if not storage.create_bytes(uri, lineage.canonical_json([content])):
            marks = storage.read_json(uri)
            if content not in marks:
                storage.write_bytes(uri, lineage.canonical_json([*marks, content]))


def withdrawn_site_ids(hub_uri: str) -> set[str]:
    """Returns the sites that have withdrawn."""
    names = storage.list_names(storage.join(hub_uri, "withdrawals"))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def is_marked(hub_uri: str, record: lineage.Record) -> bool:
    """Tells whether an artefact is of a site that has withdrawn, or descends from one."""
    # By the site as well: what was being made while the site withdrew has no mark.
    if getattr(record, "site_id", None) in withdrawn_site_ids(hub_uri):
        return True
    return storage.exists(storage.join(storage.record_uri(hub_uri, record), MARK_NAME))


def read_remaining(hub_uri: str, expected: type[RecordT], *, includes_aside: bool = False) -> Iterator[RecordT]:
    """Reads every record of one kind that descends from no site that has withdrawn, sorted by id.

    Args:
        hub_uri: The hub.
        expected: The kind.
        includes_aside: Whether generators in quarantine, and what was made from them, are among them.
    """
    aside = set() if includes_aside else quarantine.aside_ids(hub_uri)
    for record in storage.read_records(hub_uri, expected):
        if not is_marked(hub_uri, record) and not quarantine.descends_from(hub_uri, record, aside):
            yield record


def require_unmarked(hub_uri: str, record: lineage.Record, *, allows_aside: bool = False) -> None:
    """Refuses an artefact that descends from a site that has withdrawn or, unless allowed, a generator in quarantine.

    Raises:
        LineageError: If it does.
    """
    if not allows_aside and quarantine.is_aside(hub_uri, record):
        raise LineageError(
            f"{record.id} is, or was made from, a generator that was put aside; HUB/quarantine/GENERATOR/reason.json "
            "says why, and `python -m jobs.probe_generators` with cleared_because lets it in once a person has looked"
        )
    if is_marked(hub_uri, record):
        raise LineageError(
            f"{record.id} descends from a site that has withdrawn; take its successor, which "
            "`python -m jobs.withdraw_site` names"
        )


def require_unmarked_files(hub_uri: str, digests: Iterable[str]) -> None:
    """Refuses files that are, byte for byte, those of an artefact that descends from a site that has withdrawn.

    Args:
        hub_uri: The hub.
        digests: SHA-256 of each file, wherever it lies.

    Raises:
        LineageError: If one is of a marked artefact.
    """
    known = set(digests)
    for kind in lineage.KINDS:
        for record in storage.read_records(hub_uri, kind):
            if any(file.sha256 in known for file in record.files):
                require_unmarked(hub_uri, record)


def _site_uri(hub_uri: str, site_id: str) -> str:
    return storage.join(hub_uri, "withdrawals", f"{site_id}.json")
