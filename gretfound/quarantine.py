"""Quarantine of generators: those that wait for a person, and with them whatever was drawn by or made from them.

`HUB/quarantine/GENERATOR/reason.json` beside the packages' folders says why one was put aside, or that a person has
looked at it and lets it in. That decision stands: what measures again does not put the same generator aside again.
What descends from it has no mark of its own, so nothing has to be found again when the decision changes.
"""

from collections.abc import Collection

from gretfound import lineage, storage
from gretfound.errors import LineageError
from gretfound.lineage import Generator

ASIDE, CLEARED = "QUARANTINED", "CLEARED"


def put_aside(hub_uri: str, generator: Generator, *, code: str, message: str) -> bool:
    """Puts a generator aside, unless that, or a person's decision to let it in, is there already.

    Args:
        hub_uri: The hub.
        generator: A site's generator.
        code: Why, as a word.
        message: Why, in words for a person.

    Returns:
        Whether it is aside now.
    """
    content = {"verdict": ASIDE, "code": code, "message": message, "site_id": generator.site_id}
    uri = _reason_uri(hub_uri, generator.id)
    return storage.create_bytes(uri, lineage.canonical_json(content)) or storage.read_json(uri)["verdict"] == ASIDE


def clear(hub_uri: str, generator_id: str, *, reason: str) -> None:
    """Lets a generator in that was put aside: a person's decision, with the reason in their words.

    Raises:
        LineageError: If it was not put aside.
    """
    uri = _reason_uri(hub_uri, generator_id)
    if not storage.exists(uri):
        raise LineageError(f"{generator_id} was not put aside; HUB/quarantine lists those that were")
    storage.write_json(uri, storage.read_json(uri) | {"verdict": CLEARED, "cleared_because": reason})


def aside_ids(hub_uri: str) -> set[str]:
    """Returns the generators that are aside."""
    names = storage.list_names(storage.join(hub_uri, "quarantine"))
    found = [name for name in names if name.startswith(f"{Generator.kind}-")]
    return {name for name in found if storage.read_json(_reason_uri(hub_uri, name))["verdict"] == ASIDE}


def is_aside(hub_uri: str, record: lineage.Record) -> bool:
    """Tells whether a generator is aside, or a record was drawn by or made from one that is."""
    return descends_from(hub_uri, record, aside_ids(hub_uri))


def descends_from(hub_uri: str, record: lineage.Record, aside: Collection[str]) -> bool:
    """Tells whether a record is, or was made from, one of the generators ``aside``, which `aside_ids` found."""
    waiting, seen = [record.id, *record.parents] if aside else [], set[str]()
    while waiting:
        record_id = waiting.pop()
        if record_id in aside:
            return True
        if record_id not in seen and record_id != record.id:
            seen.add(record_id)
            waiting.extend(storage.read_record(hub_uri, record_id, lineage.kind_of(record_id)).parents)
    return False


def _reason_uri(hub_uri: str, generator_id: str) -> str:
    return storage.join(hub_uri, "quarantine", generator_id, "reason.json")
