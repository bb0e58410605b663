"""Ledger -> its last entry: verifies the hub's hash-chained record of acceptances, rejections and withdrawals.

    python -m jobs.ledger verify hub_uri=file:///hub

The last line is the SHA-256 of the newest entry. A chain cannot show that its end was cut off: note that digest
elsewhere, and compare. The first bad entry is named and ends the command with an error.
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

    hub_uri: str = setting(help="the hub whose ledger is verified: a folder, s3://, gs:// or abfs://")


def main(argv: list[str]) -> str:
    """Verifies the ledger.

    Returns:
        The SHA-256 of the newest entry.

    Raises:
        ConfigError: If the first argument is not ``verify``, or the ledger is empty.
        LineageError: If an entry is missing, out of order or changed; names the first.
    """
    if argv[:1] != ["verify"]:
        raise ConfigError(f"found {argv[:1]}; required: python -m jobs.ledger verify hub_uri=...")
    loaded = config.load(Config, argv[1:])

    from gretfound import lineage, storage

    newest = None
    num_entries = 0
    for entry in storage.read_ledger(storage.normalised(loaded.hub_uri)):
        newest, num_entries = entry, num_entries + 1
    if newest is None:
        raise ConfigError(f"there is no ledger entry in {loaded.hub_uri}; is it the right hub?")
    print(f"{num_entries} entries, each continues the one before", file=sys.stderr)
    return lineage.digest_of(newest)


if __name__ == "__main__":
    console.run(Config, main)
