"""Ledger -> its last entry: verifies the hub's hash-chained record of acceptances, rejections and withdrawals.

    python -m jobs.ledger verify hub_uri=file:///hub
    python -m jobs.ledger anchor hub_uri=s3://hub anchor_uri=s3://audit/anchors
    python -m jobs.ledger verify hub_uri=s3://hub anchor_uri=s3://audit/anchors

The first bad entry is named and ends the command with an error. That the end was cut off is seen by anchors alone:
`anchor` keeps the newest entry's index and digest in another place, best a bucket with object lock; run it daily. A
folder of receipts that sites hold is a folder of anchors too. The last line is the SHA-256 of the newest entry.
"""

import sys
from dataclasses import dataclass

from gretfound import config
from gretfound.config import setting
from gretfound.errors import ConfigError
from jobs import console

VERBS = ("verify", "anchor")


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub whose ledger is verified: a folder, s3://, gs:// or abfs://")
    anchor_uri: str = setting("", "folder of anchors, or of receipts; where the hub's writers cannot delete")


def main(argv: list[str]) -> str:
    """Verifies the ledger, and keeps an anchor of it if asked.

    Returns:
        The SHA-256 of the newest entry.

    Raises:
        ConfigError: If the first argument is no verb, or the ledger is empty and nothing says that it should not be.
        LineageError: If an entry is missing, out of order or changed; names the first.
    """
    verb = argv[0] if argv else ""
    if verb not in VERBS:
        raise ConfigError(f"found {argv[:1]}; required: python -m jobs.ledger {'|'.join(VERBS)} hub_uri=...")
    loaded = config.load(Config, argv[1:])
    if verb == "anchor" and not loaded.anchor_uri:
        raise ConfigError("anchor_uri: required; give the folder that keeps anchors")

    from gretfound import ledger, storage

    hub_uri, anchor_uri = (
        storage.normalised(loaded.hub_uri),
        loaded.anchor_uri and storage.normalised(loaded.anchor_uri),
    )
    has_anchors = bool(anchor_uri) and (verb == "verify" or storage.list_names(anchor_uri))
    anchors = ledger.read_anchors(anchor_uri) if has_anchors else []
    entries = ledger.verify(hub_uri, anchors=anchors)
    if not entries:
        raise ConfigError(f"there is no ledger entry in {loaded.hub_uri}; is it the right hub?")
    if verb == "anchor":
        ledger.write_anchor(anchor_uri, entries[-1].anchor)
    print(f"{len(entries)} entries, each continues the one before; {len(anchors)} anchors agree", file=sys.stderr)
    return entries[-1].sha256


if __name__ == "__main__":
    console.run(Config, main)
