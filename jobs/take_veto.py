"""A site's signed drop list -> vetoed photographs: no corpus assembled from now on holds them.

    python -m jobs.take_veto hub_uri=s3://hub list_uri=s3://inbox/drop_list.json

`gretfound-site veto` writes the list. It must be signed by both keys that the roster has of the site, be of a shard
that this site's generator drew, and name rows of that shard only; else it is refused with a reason and nothing
changes. It is kept at HUB/vetoes, and the ledger says `vetoed`. Taken twice it counts once. The last line is how many
photographs it names. Corpora that were assembled before stay, but no encoder is pretrained on one that holds a vetoed
photograph.
"""

from dataclasses import dataclass
from pathlib import Path

from gretfound.config import load, setting
from jobs import console


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub: a folder, s3://, gs:// or abfs://")
    list_uri: str = setting(help="the site's drop list, a file that `gretfound-site veto` wrote")
    keys_path: str = setting("", "folder of the hub's keys; empty: HUB.keys beside a local hub")


def main(argv: list[str]) -> str:
    """Takes one list in; returns how many photographs it names.

    Raises:
        ContributionRejected: If it is not to be honoured; says why.
        LineageError: If the roster is not what the root keys signed.
    """
    config = load(Config, argv)
    from datetime import UTC, datetime

    from gretfound import roster, storage, strongbox, veto

    hub_uri = storage.normalised(config.hub_uri)
    keys_path = Path(config.keys_path) if config.keys_path else strongbox.default_folder(hub_uri)
    known_sites, _ = roster.read_current(hub_uri, anchor=strongbox.read_anchor(keys_path))
    content = storage.read_bytes(storage.normalised(config.list_uri))
    taken = veto.take(hub_uri, content, known_sites=known_sites, today=datetime.now(UTC).date())
    return str(len(taken.image_ids))


if __name__ == "__main__":
    console.run(Config, main)
