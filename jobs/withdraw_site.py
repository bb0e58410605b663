"""Site -> withdrawal: lists every artefact that descends from a site and enters the withdrawal into the ledger.

    python -m jobs.withdraw_site hub_uri=file:///hub site_id=aster

Nothing is deleted. The successor corpus is made by `python -m jobs.assemble_corpus` without the site's shard sets; the
artefacts listed here, from shard sets to releases, are those that its successors replace. The last line is the
withdrawal's id.
"""

import sys
from dataclasses import dataclass

from gretfound import config
from gretfound.config import setting
from gretfound.errors import ConfigError
from jobs import console


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub: a folder, s3://, gs:// or abfs://")
    site_id: str = setting(help="the site that withdraws, as its contributions name it")


def main(argv: list[str]) -> str:
    """Lists what descends from the site and writes one ledger entry about it, once.

    Returns:
        The withdrawal's id: a digest over the site and what descends from it.

    Raises:
        ConfigError: If the hub holds nothing of that site.
    """
    loaded = config.load(Config, argv)

    from gretfound import lineage, storage

    hub_uri = storage.normalised(loaded.hub_uri)
    record_ids = descendants(hub_uri, site_id=loaded.site_id)
    if not record_ids:
        raise ConfigError(f"the hub holds nothing of a site {loaded.site_id!r}; `ls HUB/sites` lists the sites")
    for record_id in record_ids:
        print(record_id, file=sys.stderr)
    digest = lineage.digest_of({"site_id": loaded.site_id, "records": record_ids})
    withdrawal_id = f"withdrawal-{digest[: lineage.ID_HEX_DIGITS]}"
    if not any(entry["subject"] == withdrawal_id for entry in storage.read_ledger(hub_uri)):
        details = {"site_id": loaded.site_id, "records": record_ids}
        storage.append_to_ledger(hub_uri, event="withdrawn", subject=withdrawal_id, details=details)
    return withdrawal_id


def descendants(hub_uri: str, *, site_id: str) -> list[str]:
    """Returns the ids of a site's records and of every record that was made from one of them, in order of the chain."""
    from gretfound import lineage, storage

    records = [record for kind in lineage.KINDS for record in storage.read_records(hub_uri, kind)]
    found = {record.id for record in records if getattr(record, "site_id", None) == site_id}
    num_found = -1
    while num_found < len(found):  # an encoder may descend from another encoder, so one pass is not enough
        num_found = len(found)
        found |= {record.id for record in records if found & set(record.parents)}
    return [record.id for record in records if record.id in found]


if __name__ == "__main__":
    console.run(Config, main)
