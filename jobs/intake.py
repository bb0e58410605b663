"""Package -> contribution, with its shard set or generator: verifies what sites sent and opens it into the hub.

    python -m jobs.intake hub_uri=file:///hub package_uris=[/media/usb/aster-images-1f0c.age]
    python -m jobs.intake hub_uri=s3://hub keys_path=/etc/gretfound/hub.keys policy=demonstration

A package must be signed by keys of the hub's roster (`python -m jobs.roster`), and each come after the one before it.
Without package_uris everything in HUB/inbox is taken. A package is known by its SHA-256: running the command again
neither admits nor rejects anything twice. A rejected package is copied to HUB/quarantine/SHA256 beside a reason.json.
The last line is the id of the contribution, or, of several packages, an id over all that were admitted
(`intake-HEX`; HUB/runs/intake-HEX/outcomes.json lists them). It fails only if no package was admitted.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gretfound import config
from gretfound.config import setting
from gretfound.errors import ConfigError, ContributionRejected
from jobs import console

if TYPE_CHECKING:
    from gretfound.lineage import Contribution, File, Generator, ShardSet
    from gretfound.roster import Roster
    from gretfound.sealing import Manifest

POLICIES = ("standard", "demonstration")
PREVIOUS_MISSING = "PREVIOUS_MISSING"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub: a folder, s3://, gs:// or abfs://")
    package_uris: list[str] = setting([], "packages to take in; empty: everything in HUB/inbox")
    policy: str = setting("standard", "demonstration also admits contributions made under the demonstration policy")
    keys_path: str = setting("", "folder of the hub's identity, on every node; empty: HUB.keys beside a local hub")
    follows_lost: list[str] = setting([], "SHA-256 of packages that may come though the one before them is lost")

    def __post_init__(self) -> None:
        """Checks what the types cannot say."""
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r} is unknown; required one of {', '.join(POLICIES)}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one package; ``code`` is empty where it was admitted, and ids are empty where nothing was made."""

    package_sha256: str
    code: str = ""
    message: str = ""
    site_id: str = ""
    form: str = ""
    contribution_id: str = ""
    shard_set_id: str = ""
    generator_id: str = ""


def main(argv: list[str]) -> str:
    """Takes in packages.

    Returns:
        The id of the contribution, or of the whole intake where there were several packages.

    Raises:
        ConfigError: If there is no package.
        ContributionRejected: If no package was admitted.
    """
    loaded = config.load(Config, argv)

    from gretfound import storage, strongbox

    hub_uri = storage.normalised(loaded.hub_uri)
    package_uris = [storage.normalised(uri) for uri in loaded.package_uris]
    keys_path = Path(loaded.keys_path) if loaded.keys_path else strongbox.default_folder(hub_uri)
    outcomes = take_in(
        hub_uri, package_uris, policy=loaded.policy, keys_path=keys_path, follows_lost=loaded.follows_lost
    )
    for outcome in outcomes:
        print(_in_words(outcome), file=sys.stderr)
    return _id_over(hub_uri, outcomes)


def take_in(
    hub_uri: str, package_uris: list[str], *, policy: str, keys_path: Path, follows_lost: list[str]
) -> list[Outcome]:
    """Takes in packages in parallel, one Ray task each, and enters every outcome into the ledger once.

    A site's packages may come in any order: one whose predecessor is missing is tried again while others are admitted.

    Args:
        hub_uri: The hub.
        package_uris: The packages; none takes everything in the inbox.
        policy: ``standard``, or ``demonstration`` to admit contributions made under that policy too.
        keys_path: The folder of the hub's age identity and anchor, here and on every worker.
        follows_lost: Digests of packages that may come though the one before them is lost.

    Returns:
        An outcome for each package, in order.

    Raises:
        ConfigError: If there is no package, or the hub's keys cannot be read.
        LineageError: If the roster is not what the root keys signed.
    """
    from gretfound import roster, storage, strongbox

    uris = package_uris or storage.list_uris(storage.join(hub_uri, "inbox"))
    if not uris:
        raise ConfigError(f"found no package in {storage.join(hub_uri, 'inbox')}; put some there or give package_uris")
    known_sites, _ = roster.read_current(hub_uri, anchor=strongbox.read_anchor(keys_path))
    console.start_ray()

    import ray

    task = ray.remote(num_cpus=1)(admit)
    outcomes: dict[str, Outcome] = {}
    waiting = uris
    while waiting:
        tasks = [task.remote(hub_uri, uri, policy, keys_path, known_sites, follows_lost) for uri in waiting]
        outcomes |= dict(zip(waiting, ray.get(tasks), strict=True))
        num_before = len(waiting)
        waiting = [uri for uri in waiting if outcomes[uri].code == PREVIOUS_MISSING]
        if len(waiting) == num_before:
            break
    _enter_into_ledger(hub_uri, [outcome for outcome in outcomes.values() if outcome.code != PREVIOUS_MISSING])
    return [outcomes[uri] for uri in uris]


def admit(
    hub_uri: str, package_uri: str, policy: str, keys_path: Path, roster: "Roster", follows_lost: list[str]
) -> Outcome:
    """Verifies and opens one package into the hub, or puts it into quarantine; runs on a worker.

    The contribution's record is written last: an interrupted admission is simply done again, under the same ids.
    """
    from gretfound import lineage, sealing, storage, strongbox
    from gretfound.lineage import Contribution

    identities = strongbox.read_identities(keys_path / strongbox.IDENTITY_NAME)
    with storage.scratch_folder() as folder:
        package_path, opened_path = Path(folder) / "package.age", Path(folder) / "opened"
        storage.download_file(package_uri, package_path)
        package_sha256 = storage.sha256_of(package_path)
        recipe = lineage.recipe_id("intake", {"package_sha256": package_sha256}, [])
        finished = storage.finished_record(hub_uri, recipe, Contribution)
        if finished is not None:
            return made_by(hub_uri, finished)
        try:
            manifest = sealing.open_sealed(
                package_path, opened_path, identities=identities, roster=roster, today=datetime.now(UTC).date()
            )
            sealing.take_number(
                hub_uri,
                site_id=manifest.site_id,
                container_key_id=manifest.approvals[0].key_id,
                sequence=manifest.sequence,
                previous_sha256=manifest.previous_sha256,
                package_sha256=package_sha256,
                may_follow_lost=package_sha256 in follows_lost,
            )
            _require_policy(manifest, policy)
            contribution = _publish(hub_uri, opened_path, manifest, package_sha256, recipe)
        except ContributionRejected as error:
            message = str(error).removeprefix(f"{error.code}: ")
            if error.code == PREVIOUS_MISSING:  # it waits, and is no outcome
                return Outcome(package_sha256=package_sha256, code=error.code, message=message)
            _quarantine(hub_uri, package_path, package_sha256, error.code, message)
            return Outcome(package_sha256=package_sha256, code=error.code, message=message)
        return made_by(hub_uri, contribution)


def made_by(hub_uri: str, contribution: "Contribution") -> Outcome:
    """Tells which records a contribution gave rise to at intake."""
    from gretfound import storage
    from gretfound.lineage import Generator, ShardSet

    def child_id(kind: "type[Generator] | type[ShardSet]") -> str:
        children = (record for record in storage.read_records(hub_uri, kind) if contribution.id in record.parents)
        return next((record.id for record in children), "")

    return Outcome(
        package_sha256=contribution.package_sha256,
        site_id=contribution.site_id,
        form=contribution.form,
        contribution_id=contribution.id,
        shard_set_id=child_id(ShardSet) if contribution.form in ("images", "synthetic") else "",
        generator_id=child_id(Generator) if contribution.form == "weights" else "",
    )


def _require_policy(manifest: "Manifest", policy: str) -> None:
    found = manifest.policy.partition("/")[0]
    if found not in ("standard", policy):
        raise ContributionRejected(
            "POLICY", f"it was made under the policy {manifest.policy!r}; this hub requires standard: contribute again"
        )


def _publish(hub_uri: str, opened_path: Path, manifest: "Manifest", package_sha256: str, recipe: str) -> "Contribution":
    from gretfound import lineage, storage
    from gretfound.lineage import Contribution, Site

    site = Site(site_id=manifest.site_id, country=manifest.country, form=manifest.form)
    shard_paths = sorted(opened_path.glob("shards/*.parquet"))
    kept_path = opened_path.with_name("kept")
    kept_path.mkdir()
    for name in ("summary", "training", "weights"):
        if (opened_path / name).is_dir():
            (opened_path / name).rename(kept_path / name)
    record = Contribution(
        parents=(site.id,),
        recipe_id=recipe,
        site_id=manifest.site_id,
        form=manifest.form,
        package_sha256=package_sha256,
        num_images=manifest.num_images,
        num_patients=manifest.num_patients,
    )
    contribution = lineage.with_files(record, _files_of(kept_path))
    _require_summary(kept_path / "summary" / "metadata_summary.json")
    if shard_paths:
        _publish_shards(hub_uri, shard_paths, contribution)
    else:
        _publish_generator(hub_uri, kept_path / "weights", manifest, contribution)
    storage.write_record(hub_uri, site)
    return storage.publish_folder(hub_uri, kept_path, record)


def _require_summary(path: Path) -> None:
    from gretfound import metadata

    try:
        metadata.summary_from_json(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ContributionRejected(
            "BAD_SUMMARY", "the metadata summary is not of this version; update gretfound-site and contribute again"
        ) from error


def _files_of(folder_path: Path) -> "tuple[File, ...]":
    from gretfound import storage
    from gretfound.lineage import File

    return tuple(
        File(path=str(path.relative_to(folder_path)), sha256=sha256, size_bytes=size_bytes)
        for path, sha256, size_bytes in storage.describe_folder(folder_path)
    )


def _publish_shards(hub_uri: str, shard_paths: list[Path], contribution: "Contribution") -> None:
    from gretfound import shard, storage
    from gretfound.contribution import screen_shard_file
    from gretfound.lineage import ShardSet

    origin = "real" if contribution.form == "images" else "synthetic"
    rejected: dict[str, int] = {}
    shards = []
    for path in shard_paths:
        for reason, count in screen_shard_file(path, site_id=contribution.site_id, origin=origin).items():
            rejected[reason] = rejected.get(reason, 0) + count
        shards.append(shard.adopt_shard_file(hub_uri, path))
    num_images = sum(each.num_images for each in shards)
    if num_images == 0:
        raise ContributionRejected("NO_READABLE_IMAGES", "no photograph of the package is readable; contribute again")
    shard_set = ShardSet(
        parents=(contribution.id,),
        site_id=contribution.site_id,
        origin=origin,
        num_images=num_images,
        shards=tuple(each for each in shards if each.num_images),
        rejected=rejected,
    )
    storage.write_record(hub_uri, shard_set)


def _publish_generator(hub_uri: str, adapter_path: Path, manifest: "Manifest", contribution: "Contribution") -> None:
    from gretfound import storage
    from gretfound.generator import pipeline
    from gretfound.lineage import Generator

    base = _base_of(hub_uri, manifest.base_sha256)
    terms = pipeline.read_adapter_terms(adapter_path)
    if terms.base_sha256 != manifest.base_sha256:
        raise ContributionRejected("BASE_MISMATCH", "the weights name another base than the manifest; contribute again")
    if type(terms.images_seen) is not int or not math.isfinite(terms.final_loss):
        raise ContributionRejected("ADAPTER_TERMS", "the weights' terms hold no finite numbers; contribute again")
    with storage.scratch_folder() as folder:
        base_path = storage.fetch_folder(hub_uri, base, Path(folder) / "base")
        generator_path = pipeline.install_adapter(base_path, adapter_path, Path(folder) / "generator")
        record = Generator(
            parents=(contribution.id, base.id),
            site_id=contribution.site_id,
            base_id=base.id,
            method=terms.method,
            resolution_px=base.resolution_px,
            num_images=contribution.num_images,
            images_seen=terms.images_seen,
            final_loss=terms.final_loss,
        )
        storage.publish_folder(hub_uri, generator_path, record)


def _base_of(hub_uri: str, base_sha256: str) -> "Generator":
    from gretfound import storage
    from gretfound.lineage import Generator

    for record in storage.read_records(hub_uri, Generator):
        is_base = not record.site_id and any(
            file.path == UNET_WEIGHTS and file.sha256 == base_sha256 for file in record.files
        )
        if is_base:
            return record
    raise ContributionRejected(
        "UNKNOWN_BASE", "the hub knows no base generator with the digest that the package names; send it the base first"
    )


def _quarantine(hub_uri: str, package_path: Path, package_sha256: str, code: str, message: str) -> None:
    from gretfound import storage

    folder_uri = storage.join(hub_uri, "quarantine", package_sha256)
    storage.upload_file(package_path, storage.join(folder_uri, "package.age"))
    storage.write_json(storage.join(folder_uri, "reason.json"), {"code": code, "message": message})


def _enter_into_ledger(hub_uri: str, outcomes: Iterable[Outcome]) -> None:
    from gretfound import storage

    entered = {(entry["event"], entry["subject"]) for entry in storage.read_ledger(hub_uri)}
    for outcome in outcomes:
        event, subject = ("rejected", outcome.package_sha256) if outcome.code else ("accepted", outcome.contribution_id)
        if (event, subject) not in entered:
            details = {"package_sha256": outcome.package_sha256, "site_id": outcome.site_id, "code": outcome.code}
            storage.append_to_ledger(hub_uri, event=event, subject=subject, details=details)
            entered.add((event, subject))


def _in_words(outcome: Outcome) -> str:
    if outcome.code:
        what = "waiting " if outcome.code == PREVIOUS_MISSING else "rejected"
        return f"{what}  {outcome.package_sha256[:12]}  {outcome.code}: {outcome.message}"
    made = outcome.shard_set_id or outcome.generator_id
    return (
        f"accepted  {outcome.package_sha256[:12]}  {outcome.site_id} ({outcome.form}): {outcome.contribution_id} {made}"
    )


def _id_over(hub_uri: str, outcomes: list[Outcome]) -> str:
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
