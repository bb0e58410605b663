"""Site -> withdrawal: marks every artefact that descends from a site, and makes the corpora that do without it.

    python -m jobs.withdraw_site hub_uri=file:///hub site_id=aster

Nothing is deleted. The site and everything from its records to releases is marked (`withdrawn.json` beside the
record, and in each folder of HUB/latents/SITE, where its photographs are cached): intake refuses the site's packages,
no new corpus takes its shards, and no encoder is pretrained on or released from what is marked. For every corpus with
the site in it the same recipe makes a successor without it. One ledger entry names all. Run again, also after being
killed, it goes on; what it finds only then is marked too, and named by a second entry. The last line is the
withdrawal's id.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gretfound import config
from gretfound.config import setting
from gretfound.errors import ConfigError
from jobs import assemble_corpus, console

if TYPE_CHECKING:
    from gretfound.lineage import Corpus


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub: a folder, s3://, gs:// or abfs://")
    site_id: str = setting(help="the site that withdraws, as its contributions name it")


def main(argv: list[str]) -> str:
    """Marks what descends from the site, makes the successor corpora and writes one ledger entry about all it found.

    Returns:
        The withdrawal's id: a digest over the site and what descends from it.

    Raises:
        ConfigError: If the hub holds nothing of that site.
    """
    loaded = config.load(Config, argv)

    from gretfound import ledger, lineage, storage, withdrawal
    from gretfound.lineage import Corpus

    hub_uri = storage.normalised(loaded.hub_uri)
    records = withdrawal.descendants(hub_uri, site_id=loaded.site_id)
    if not records:
        raise ConfigError(f"the hub holds nothing of a site {loaded.site_id!r}; `ls HUB/sites` lists the sites")
    record_ids = [record.id for record in records]
    digest = lineage.digest_of({"site_id": loaded.site_id, "records": record_ids})
    withdrawal_id = f"withdrawal-{digest[: lineage.ID_HEX_DIGITS]}"
    withdrawal.mark(hub_uri, records, site_id=loaded.site_id, withdrawal_id=withdrawal_id)
    successors = {each.id: succeed(hub_uri, each) for each in records if isinstance(each, Corpus)}
    for record_id in record_ids:
        print(f"withdrawn  {record_id}  {successors.get(record_id, '')}".rstrip(), file=sys.stderr)
    cached = withdrawal.latents(hub_uri, site_id=loaded.site_id)
    for key in cached:
        print(f"withdrawn  latents/{loaded.site_id}/{key}", file=sys.stderr)
    details = {"site_id": loaded.site_id, "records": record_ids, "successors": successors, "latents": cached}
    ledger.append(hub_uri, event="withdrawn", subject=withdrawal_id, details=details)
    return withdrawal_id


def succeed(hub_uri: str, corpus: "Corpus") -> str:
    """Makes a corpus again, by the configuration beside it, from those of its shard sets that are not marked.

    Returns:
        The successor's id; empty where nothing is left.
    """
    from gretfound import quarantine, storage, withdrawal
    from gretfound.lineage import ShardSet

    shard_sets = storage.read_parents(hub_uri, corpus, ShardSet)
    unmarked = [each for each in shard_sets if not withdrawal.is_marked(hub_uri, each)]
    aside = quarantine.aside_ids(hub_uri)
    left = [each.id for each in unmarked if not quarantine.descends_from(hub_uri, each, aside)]
    if not left:
        return ""
    with storage.scratch_folder() as folder:
        layer_path = Path(folder) / "config.yaml"
        storage.download_file(storage.join(storage.run_uri(hub_uri, corpus.recipe_id), "config.yaml"), layer_path)
        # Its evaluation sets are registered at the hub, so their folders need not be there any more.
        changes = [f"hub_uri={hub_uri}", f"shard_set_ids=[{','.join(left)}]", "evaluation_uris=[]"]
        return assemble_corpus.main([str(layer_path), *changes])


if __name__ == "__main__":
    console.run(Config, main)
