"""Package -> contribution, with its shard set or generator: verifies what sites sent and opens it into the hub.

    python -m jobs.intake hub_uri=file:///hub package_uris=[/media/usb/aster-images-1f0c.age]
    python -m jobs.intake hub_uri=s3://hub keys_path=/etc/gretfound/hub.keys policy=demonstration

A package must be signed by keys of the hub's roster (`python -m jobs.roster`), and each come after the one before it.
Without package_uris everything in HUB/inbox is taken. Each package is opened in a confined process (no network,
limits) and gets one verdict: ADMITTED, QUARANTINED (a person has to look at it; is_reopened=true examines it again) or
REJECTED. A package is known by its SHA-256: running the command again, also after it was killed, judges nothing twice.
What is not admitted is copied to HUB/quarantine/SHA256 beside a reason.json; every package gets a receipt in
HUB/receipts.
The last line is the id of the contribution, or, of several packages, an id over all that were admitted
(`intake-HEX`; HUB/runs/intake-HEX/outcomes.json lists them). It fails only if no package was admitted.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gretfound import config
from gretfound.config import setting
from gretfound.errors import ConfigError, ContributionRejected, GretfoundError
from jobs import console

if TYPE_CHECKING:
    from gretfound.admission import Outcome

POLICIES = ("standard", "demonstration")


@dataclass(frozen=True)
class LimitsConfig:
    """What the confined process of one package may use."""

    memory_gib: float = setting(
        2.0, "address space; Ray gives as much memory to each package, so few are opened at once"
    )
    package_gib: float = setting(66.0, "of a larger package nothing is read; a node needs three times as much disk")
    file_gib: float = setting(4.0, "largest file that it may write")
    cpu_s: int = setting(60, "CPU seconds, for an empty package")
    cpu_s_per_mib: float = setting(2.0, "CPU seconds more for each MiB of the package")
    wall_s: float = setting(600.0, "seconds of waiting, for an empty package")


@dataclass(frozen=True)
class ScoringConfig:
    """What the Ray task gets that measures what delivered weights know of the canaries."""

    num_cpus: float = setting(1.0, "processors")
    num_gpus: float = setting(0.0, "graphics processors; 0 computes on the CPU: hours for Stable Diffusion")
    memory_gib: float = setting(2.0, "memory; the base generator has to fit, 10 for Stable Diffusion")


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub: a folder, s3://, gs:// or abfs://")
    package_uris: list[str] = setting([], "packages to take in; empty: everything in HUB/inbox")
    policy: str = setting("standard", "demonstration also admits contributions made under the demonstration policy")
    keys_path: str = setting("", "folder of the hub's identity, on every node; empty: HUB.keys beside a local hub")
    follows_lost: list[str] = setting([], "SHA-256 of packages that may come though the one before them is lost")
    is_reopened: bool = setting(False, "whether packages in quarantine are examined again")
    limits: LimitsConfig = setting(LimitsConfig())
    scoring: ScoringConfig = setting(ScoringConfig())

    def __post_init__(self) -> None:
        """Checks what the types cannot say."""
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r} is unknown; required one of {', '.join(POLICIES)}")
        if min(asdict(self.limits).values()) <= 0:
            raise ConfigError("limits: all are above 0")
        if min(asdict(self.scoring).values()) < 0:
            raise ConfigError("scoring: none is below 0")


def main(argv: list[str]) -> str:
    """Takes in packages.

    Returns:
        The id of the contribution, or of the whole intake where there were several packages.

    Raises:
        ConfigError: If there is no package, the hub's keys cannot be read, or the nodes cannot confine as the standard
            policy requires.
        ContributionRejected: If no package was admitted.
        LineageError: If the roster is not what the root keys signed.
    """
    loaded = config.load(Config, argv)

    from gretfound import admission, ledger, storage, strongbox

    hub_uri = storage.normalised(loaded.hub_uri)
    inbox_uri = storage.join(hub_uri, "inbox")
    uris = [storage.normalised(uri) for uri in loaded.package_uris] or storage.list_uris(inbox_uri)
    if not uris:
        raise ConfigError(f"found no package in {inbox_uri}; put some there or give package_uris")
    keys_path = Path(loaded.keys_path) if loaded.keys_path else strongbox.default_folder(hub_uri)
    receipt_key = strongbox.read_receipt_key(keys_path)
    book = ledger.Ledger(hub_uri)
    outcomes: dict[str, Outcome] = {}
    for uri, outcome in admitted_as_they_end(hub_uri, uris, keys_path, loaded):
        if outcome.verdict:
            admission.enter(book, hub_uri, outcome, receipt_key=receipt_key)
        print(_in_words(outcome), file=sys.stderr)
        outcomes[uri] = outcome
    return _id_over(hub_uri, [outcomes[uri] for uri in dict.fromkeys(uris)])


def admitted_as_they_end(
    hub_uri: str, uris: list[str], keys_path: Path, loaded: Config
) -> "Iterator[tuple[str, Outcome]]":
    """Admits packages in parallel, one Ray task each, and yields each outcome as soon as there is one.

    A site's packages may come in any order: one whose predecessor is missing is tried again while others are admitted,
    and yielded without a verdict in the end.

    Raises:
        GretfoundError: Last, if there was no verdict on a package, for a reason of ours.
    """
    from gretfound import admission, confinement, roster, strongbox

    known_sites, _ = roster.read_current(hub_uri, anchor=strongbox.read_anchor(keys_path))
    console.start_ray()

    import ray

    limits = confinement.Limits(
        memory_bytes=int(loaded.limits.memory_gib * 2**30),
        cpu_s=loaded.limits.cpu_s,
        file_bytes=int(loaded.limits.file_gib * 2**30),
        wall_s=loaded.limits.wall_s,
    )
    task = ray.remote(num_cpus=1, memory=limits.memory_bytes)(admission.admit)
    terms = {
        "policy": loaded.policy,
        "keys_path": keys_path,
        "roster": known_sites,
        "follows_lost": loaded.follows_lost,
        "limits": limits,
        "cpu_s_per_mib": loaded.limits.cpu_s_per_mib,
        "max_package_bytes": int(loaded.limits.package_gib * 2**30),
        "is_reopened": loaded.is_reopened,
        "scoring": {
            "num_cpus": loaded.scoring.num_cpus,
            "num_gpus": loaded.scoring.num_gpus,
            "memory": int(loaded.scoring.memory_gib * 2**30),
        },
    }
    failures: list[GretfoundError] = []
    early: dict[str, Outcome] = {}
    turn = list(dict.fromkeys(uris))
    while turn:
        early = {}
        waiting = {task.remote(hub_uri, uri, **terms): uri for uri in turn}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            uri = waiting.pop(done)
            try:
                outcome = ray.get(done)
            except GretfoundError as error:  # the others are not kept waiting
                failures.append(error)
                continue
            if outcome.verdict:
                yield uri, outcome
            else:
                early[uri] = outcome
        turn = list(early) if len(early) < len(turn) else []
    yield from early.items()
    if failures:
        raise failures[0]


def _in_words(outcome: "Outcome") -> str:
    if outcome.code:
        name = outcome.package_sha256[:12] or "not read"
        return f"{outcome.verdict.lower() or 'waits'}  {name}  {outcome.code}: {outcome.message}"
    made = outcome.shard_set_id or outcome.generator_id
    return (
        f"accepted  {outcome.package_sha256[:12]}  {outcome.site_id} ({outcome.form}): {outcome.contribution_id} {made}"
    )


def _id_over(hub_uri: str, outcomes: "list[Outcome]") -> str:
    from gretfound import lineage, storage

    admitted = sorted({outcome.contribution_id for outcome in outcomes if not outcome.code})
    if not admitted:
        first = outcomes[0]
        raise ContributionRejected(first.code, f"{first.message} ({len(outcomes)} package(s), none was admitted)")
    if len(outcomes) == 1:
        return admitted[0]
    intake_id = f"intake-{lineage.digest_of(admitted)[: lineage.ID_HEX_DIGITS]}"
    storage.write_json(
        storage.join(storage.run_uri(hub_uri, intake_id), "outcomes.json"), [asdict(outcome) for outcome in outcomes]
    )
    return intake_id


if __name__ == "__main__":
    console.run(Config, main)
