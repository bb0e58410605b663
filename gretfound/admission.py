"""Admission: one package's way from the inbox to a verdict, each step written once, and what an admitted one becomes.

    RECEIVED -> DECRYPTED -> SIGNED -> STRUCTURE -> WEIGHTS -> SUMMARY -> PRIVACY -> BEHAVIOUR
             -> ADMITTED | QUARANTINED(code) | REJECTED(code)

A package is its SHA-256. Its history is `HUB/admissions/SHA256/000.json ...`: a step is added only at the end and only
if nobody else has added one there (compare and set), and nothing is added after a verdict. So of any number of workers,
killed at any moment, one gives the verdict; records of an admitted package are written after it, and again until they
are whole. A rejection stands. What is in quarantine waits for a person, who may have it examined again.
"""

import math
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gretfound import (
    confinement,
    contribution,
    disclosure,
    ledger,
    lineage,
    reasons,
    receipt,
    sealing,
    shard,
    signing,
    storage,
    strongbox,
    withdrawal,
)
from gretfound.confinement import Limits, Reply
from gretfound.errors import ContributionRejected, StorageError
from gretfound.gate import canaries
from gretfound.gate import policy as gate_policy
from gretfound.gate import statement as gate_statement
from gretfound.gate.statement import Statement
from gretfound.gate.verdict import Check
from gretfound.generator import adapter
from gretfound.generator.adapter import DENOISER_WEIGHTS
from gretfound.lineage import Contribution, File, Generator, ShardSet, Site
from gretfound.receipt import Receipt
from gretfound.roster import Roster
from gretfound.sealing import Manifest
from gretfound.signing import DocumentT

STATES = ("RECEIVED", "DECRYPTED", "SIGNED", "STRUCTURE", "WEIGHTS", "SUMMARY", "PRIVACY", "BEHAVIOUR")
SCREENED_STATES = ("SIGNED", "STRUCTURE")
VERDICTS = ("ADMITTED", "QUARANTINED", "REJECTED")
EVENTS = {"ADMITTED": "accepted", "QUARANTINED": "quarantined", "REJECTED": "rejected"}
# What a person has to look at: a judgement, or a fault that may be ours. All other codes reject.
QUARANTINE_CODES = (
    *("W4_NORM", "W4_OUTLIER", "W5_ZERO", "W5_ENTROPY", "UNKNOWN_BASE", "CRASHED", "SITE_SUSPENDED"),
    *("LIMIT_MEMORY", "LIMIT_CPU", "LIMIT_FILE_SIZE", "LIMIT_OPEN_FILES", "LIMIT_TIME"),
)
# What the hub or time mends: the package waits, without a verdict.
WAITING_CODES = ("PREVIOUS_MISSING", "ROSTER_EXPIRED", "UNKNOWN_SITE", "UNKNOWN_KEY")
# What arrives is not what its name, SHA256.age, or the store says of it: the way is at fault, or whoever put it there.
CHANGED_ON_THE_WAY = "CHANGED_ON_THE_WAY"
FETCH_ATTEMPTS = 3
_NAMED_BY_DIGEST = re.compile(r"([0-9a-f]{64})\.age")
# What Ray gives to the task that scores canaries.
SCORING: Mapping[str, float] = MappingProxyType({"num_cpus": 1, "num_gpus": 0, "memory": 2 * 2**30})


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a package's history: a state that it passed, or its verdict; ``message`` says what was not judged."""

    number: int
    state: str
    code: str = ""
    message: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    recorded_at: str = ""

    @property
    def is_verdict(self) -> bool:
        """Whether this ends the history."""
        return self.state in VERDICTS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one package; ``code`` is empty where it was admitted, and ids are empty where nothing was made.

    ``number`` is the place of the verdict in the package's history.
    """

    package_sha256: str
    verdict: str
    number: int
    code: str = ""
    message: str = ""
    site_id: str = ""
    form: str = ""
    contribution_id: str = ""
    shard_set_id: str = ""
    generator_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A verified package that lies open, as the confined processes told of it.

    Args:
        path: Where it lies.
        manifest: Its manifest.
        rejected: How many rows of its shards were taken out, by reason.
        statement: What it states of its generator's privacy; None for ``images``, and with a ``statement_code``.
        statement_code: Why that cannot be read.
        weights: What its weights say of themselves, and what they measure; None until they were weighed.
    """

    path: Path
    manifest: Manifest
    rejected: dict[str, int]
    statement: Statement | None = None
    statement_code: str = ""
    weights: tuple[adapter.AdapterTerms, adapter.Measured] | None = None


class History:
    """The steps of one package, as far as they are known here.

    Args:
        hub_uri: The hub.
        package_sha256: The package.
    """

    def __init__(self, hub_uri: str, package_sha256: str) -> None:
        self._folder_uri = storage.join(hub_uri, "admissions", package_sha256)
        self.steps: list[Step] = []
        self._read()

    @property
    def verdict(self) -> Step | None:
        """The verdict, if there is one."""
        return self.steps[-1] if self.steps and self.steps[-1].is_verdict else None

    def add(self, state: str, *, code: str = "", message: str = "", measured: dict[str, Any] | None = None) -> None:
        """Adds one step at the end, unless it is there, or a verdict is.

        Afterwards ``verdict`` is what stands: another worker may have been first.
        """
        while not (self.verdict or state in [step.state for step in self._current()]):
            step = Step(
                number=len(self.steps),
                state=state,
                code=code,
                message=message,
                measured=measured or {},
                recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            if storage.create_bytes(self._uri(step.number), lineage.canonical_json(asdict(step))):
                self.steps.append(step)
                return
            self._read()

    def reopen(self) -> None:
        """Begins anew behind a quarantine; does nothing behind any other step."""
        if self.verdict and self.verdict.state == "QUARANTINED":
            step = Step(number=len(self.steps), state="RECEIVED", message="to be examined again")
            storage.create_bytes(self._uri(step.number), lineage.canonical_json(asdict(step)))
            self._read()

    def _current(self) -> list[Step]:
        begun = max((step.number for step in self.steps if step.state == "RECEIVED"), default=0)
        return self.steps[begun:]

    def _uri(self, number: int) -> str:
        return storage.join(self._folder_uri, f"{number:03d}.json")

    def _read(self) -> None:
        while storage.exists(self._uri(len(self.steps))):
            self.steps.append(Step(**storage.read_json(self._uri(len(self.steps)))))


def admit(
    hub_uri: str,
    package_uri: str,
    *,
    policy: str,
    keys_path: Path,
    roster: Roster,
    follows_lost: Sequence[str] = (),
    limits: Limits,
    cpu_s_per_mib: float,
    max_package_bytes: int = sealing.MAX_PACKAGE_BYTES,
    is_reopened: bool = False,
    scoring: Mapping[str, float] = SCORING,
) -> Outcome:
    """Gives one package its verdict and makes an admitted one's records; runs on a worker.

    Args:
        hub_uri: The hub.
        package_uri: The package.
        policy: ``standard``, or ``demonstration`` to admit contributions made under that policy too.
        keys_path: The folder of the hub's age identity on this node.
        roster: The hub's roster, verified.
        follows_lost: Digests of packages that may come though the one before them is lost.
        limits: Of the confined process, for an empty package.
        cpu_s_per_mib: CPU seconds more for each MiB of the package, and ten times as many of waiting.
        max_package_bytes: Of a larger package not a byte is read.
        is_reopened: Whether a package in quarantine is examined again.
        scoring: What Ray gives to the task that scores canaries.

    Returns:
        What became of it. There is no verdict, and a code of `WAITING_CODES`, where it may be tried again; without a
        digest, too, and nothing is written of it, with the codes ``CHANGED_ON_THE_WAY``, to be tried again, and
        ``TOO_LARGE``, where it was not read.

    Raises:
        ConfigError: If this node cannot confine as the policy requires, or the hub's keys cannot be read.
        StorageError: If the hub or the scratch folder fails, so that there is no verdict.
    """
    if storage.size_of(package_uri) > max_package_bytes:
        return Outcome(
            package_sha256="",
            verdict="",
            number=-1,
            code="TOO_LARGE",
            message=f"it has more than {max_package_bytes >> 20} MiB and was not read; remove it, or allow more",
        )
    with storage.scratch_folder() as folder:
        package_path = Path(folder) / "package"
        package_sha256 = _fetch(package_uri, package_path)
        if not package_sha256:
            return Outcome(
                package_sha256="",
                verdict="",
                number=-1,
                code=CHANGED_ON_THE_WAY,
                message=f"what arrived, {FETCH_ATTEMPTS} times, is not what its name or the store says of it; nothing "
                "was judged. Run the command again; if it stays so, ask for the same file once more",
            )
        history = History(hub_uri, package_sha256)
        history.add("RECEIVED")
        if is_reopened:
            history.reopen()
        recipe = lineage.recipe_id("intake", {"package_sha256": package_sha256}, [])
        finished = storage.finished_record(hub_uri, recipe, Contribution)
        if finished is not None:
            return made_by(hub_uri, finished)
        more_s = cpu_s_per_mib * package_path.stat().st_size / 2**20
        case = _Case(
            hub_uri=hub_uri,
            folder_path=Path(folder),
            package_sha256=package_sha256,
            policy=policy,
            follows_lost=follows_lost,
            identities=strongbox.read_identities(keys_path / strongbox.IDENTITY_NAME),
            roster=roster,
            limits=replace(limits, cpu_s=limits.cpu_s + math.ceil(more_s), wall_s=limits.wall_s + 10 * more_s),
            history=history,
            scoring=scoring,
        )
        try:
            opened = _judge(case) if history.verdict is None else None
        except _TooEarly as error:
            message = str(error).removeprefix(f"{error.code}: ")
            return Outcome(package_sha256=package_sha256, verdict="", number=-1, code=error.code, message=message)
        verdict = history.verdict
        assert verdict is not None  # `_judge` ends in one, or in an error of ours
        outcome = Outcome(
            package_sha256=package_sha256,
            verdict=verdict.state,
            number=verdict.number,
            code=verdict.code,
            message=verdict.message,
            site_id=verdict.measured.get("site_id", ""),
        )
        if verdict.state != "ADMITTED":
            aside_uri = storage.join(_quarantine_uri(hub_uri, package_sha256), "package.age")
            if not storage.exists(aside_uri):
                storage.upload_file(package_path, aside_uri)
            _explain(hub_uri, outcome)
            return outcome
        is_whole = opened is not None and (opened.manifest.form != "weights" or opened.weights is not None)
        return _publish(case, opened if opened and is_whole else _open_again(case), outcome, recipe)


def _fetch(package_uri: str, package_path: Path) -> str:
    """Downloads a package; returns its SHA-256, or nothing where it never is what its name or the store promises."""
    named = _NAMED_BY_DIGEST.fullmatch(package_uri.rpartition("/")[2])
    for _ in range(FETCH_ATTEMPTS):
        storage.download_file(package_uri, package_path)
        found = storage.sha256_of(package_path)
        if (named is None or named[1] == found) and storage.is_as_stored(package_uri, package_path):
            return found
    return ""


@dataclass(frozen=True, kw_only=True)
class _Case:
    hub_uri: str
    folder_path: Path
    package_sha256: str
    policy: str
    follows_lost: Sequence[str]
    identities: tuple[str, ...] = field(repr=False)
    roster: Roster
    limits: Limits
    history: History
    scoring: Mapping[str, float]


class _TooEarly(ContributionRejected):
    """The package before this one, or the hub's roster, is not there yet: no verdict."""


def _judge(case: _Case) -> Opened | None:
    """Takes a package through all states to its verdict; returns what was opened, None where it was refused."""
    opened = None
    try:
        opened = _open(case)
        manifest = opened.manifest
        if manifest.policy.partition("/")[0] not in ("standard", case.policy):
            raise ContributionRejected(
                "POLICY",
                f"it was made under the policy {manifest.policy!r}; this hub requires standard: contribute again",
            )
        if manifest.site_id in withdrawal.withdrawn_site_ids(case.hub_uri):
            raise ContributionRejected(
                "SITE_WITHDRAWN", "the site has withdrawn; it has to join again under a new name"
            )
        if manifest.form == "weights":
            opened = _judge_weights(case, opened)
        else:
            case.history.add("WEIGHTS", message="passed without a judgement: this form has none")
        case.history.add("SUMMARY")
        _judge_privacy(case, opened)
        case.history.add(
            "BEHAVIOUR", message="passed without a judgement: jobs.probe_generators looks at what is drawn"
        )
        case.history.add("ADMITTED", measured={"site_id": manifest.site_id})
    except _TooEarly:
        raise
    except ContributionRejected as error:
        state = "QUARANTINED" if error.code in QUARANTINE_CODES else "REJECTED"
        message = str(error).removeprefix(f"{error.code}: ")
        site = {"site_id": opened.manifest.site_id} if opened else {}
        case.history.add(state, code=error.code, message=message, measured=site)
    return opened


def _confined(
    case: _Case, request: dict[str, Any], *, folder_name: str, readable_paths: Sequence[Path], **limits: int
) -> Reply:
    """Has one task of `opening` done in a folder of its own.

    Raises:
        ContributionRejected: ``CRASHED`` if it leaves anything but plain files.
    """
    folder_path = case.folder_path / folder_name
    folder_path.mkdir(exist_ok=True)
    reply = confinement.run(
        "gretfound.opening",
        request,
        folder_path=folder_path,
        readable_paths=readable_paths,
        limits=replace(case.limits, **limits),
        is_strict=case.policy == "standard",
    )
    for path in folder_path.rglob("*"):
        found = path.lstat()
        if not (stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)):
            raise _refusal("CRASHED")
    return reply


def _refusal(code: str) -> ContributionRejected:
    """Puts into this hub's words what a confined process answered; a code that none should give is a crash."""
    code = code if code in reasons.WORDS else "CRASHED"
    return (_TooEarly if code in WAITING_CODES else ContributionRejected)(code, reasons.WORDS[code])


def _open(case: _Case) -> Opened:
    tar_path, path = case.folder_path / "unsealed" / "package.tar", case.folder_path / "work" / "opened"
    for earlier in (tar_path.parent, path):
        shutil.rmtree(earlier, ignore_errors=True)
    package_path = case.folder_path / "package"
    request: dict[str, Any] = {"task": "unseal", "package_path": str(package_path), "tar_path": str(tar_path)}
    request |= {"identities": case.identities}
    # What is decrypted is shorter than the package; the reply is a file, too.
    file_bytes = max(confinement.MAX_REPLY_BYTES, package_path.stat().st_size)
    reply = _confined(case, request, folder_name="unsealed", readable_paths=[package_path], file_bytes=file_bytes)
    if reply.code:
        raise _refusal(reply.code)
    case.history.add("DECRYPTED")
    today, own_recipients = datetime.now(UTC).date(), strongbox.recipients_of(case.identities)
    request = {
        "task": "screen",
        "tar_path": str(tar_path),
        "into_path": str(path),
        "own_recipients": own_recipients,
        "roster": case.roster.to_bytes().decode(),
        "policy": case.policy,
        "today": today.isoformat(),
    }
    reply = _confined(case, request, folder_name="work", readable_paths=[tar_path])
    tar_path.unlink(missing_ok=True)
    for line in reply.reports:
        if line.get("state") in SCREENED_STATES:
            case.history.add(line["state"])
    said = {name: str(line[name]) for line in reply.reports for name in ("signatures", "manifest") if name in line}
    manifest = _parsed(said["manifest"], Manifest) if "manifest" in said else None
    if manifest is not None:
        # Whoever took the process over may have any manifest written, and no signature of another site.
        try:
            sealing.require_signed(
                manifest,
                said.get("signatures", "").encode(),
                own_recipients=own_recipients,
                roster=case.roster,
                today=today,
            )
        except ContributionRejected as error:
            raise _refusal("CRASHED") from error
        _take_number(case, manifest)  # it is the site's, whatever is the matter with its content
    if reply.code:
        raise _refusal(reply.code)
    last = reply.reports[-1]
    rejected = last.get("rejected")
    if (
        manifest is None
        or not isinstance(rejected, dict)
        or not all(reason in contribution.TAKEN_OUT and type(count) is int for reason, count in rejected.items())
    ):
        raise _refusal("CRASHED")
    opened = Opened(path=path, manifest=manifest, rejected=rejected)
    if manifest.form == "images":
        return opened
    if "statement" in last:
        return replace(opened, statement=_parsed(str(last["statement"]), Statement))
    return replace(opened, statement_code=str(last.get("statement_code", "CRASHED")))


def _parsed(text: str, expected: type[DocumentT]) -> DocumentT:
    try:
        return signing.parse_document(text.encode(), expected)
    except signing.UnreadableDocument as error:
        raise _refusal("CRASHED") from error


def _take_number(case: _Case, manifest: Manifest) -> None:
    try:
        sealing.take_number(
            case.hub_uri,
            site_id=manifest.site_id,
            container_key_id=manifest.approvals[0].key_id,
            sequence=manifest.sequence,
            previous_sha256=manifest.previous_sha256,
            package_sha256=case.package_sha256,
            may_follow_lost=case.package_sha256 in case.follows_lost,
        )
    except ContributionRejected as error:
        if error.code not in WAITING_CODES:
            raise
        raise _TooEarly(error.code, str(error).removeprefix(f"{error.code}: ")) from error


def _judge_weights(case: _Case, opened: Opened) -> Opened:
    terms, measured = _weigh(case, opened)
    if terms.base_sha256 != opened.manifest.base_sha256:
        raise ContributionRejected("BASE_MISMATCH", "the weights name another base than the manifest; contribute again")
    if terms.method == "full" and case.policy == "standard":
        raise ContributionRejected("W2_METHOD", "found a whole UNet; the standard policy admits low-rank factors only")
    code, words = adapter.judge(measured, _cohort(case.hub_uri, opened))
    if code:
        raise ContributionRejected(code, words)
    case.history.add("WEIGHTS", measured=asdict(measured))
    return replace(opened, weights=(terms, measured))


def _judge_privacy(case: _Case, opened: Opened) -> None:
    """Holds what a package states of its generator's privacy against this hub's policy, and against itself."""
    if opened.manifest.form == "images":
        case.history.add("PRIVACY", message="passed without a judgement: this form has no generator")
        return
    stated = opened.statement
    if stated is None:
        raise _refusal(opened.statement_code)
    weights = (file.sha256 for file in opened.manifest.files if file.path == "weights/adapter.safetensors")
    gate_statement.require_gate(
        stated,
        policies={name: gate_policy.read_policy(name).stamp for name in ("standard", case.policy)},
        weights_sha256=next(weights, None),
    )
    if case.policy == "standard":
        rules, told_by = gate_policy.read_policy("standard"), disclosure.read_policy("standard")
        gate_statement.require_patients(stated, rules=rules, told_by=told_by)
    if stated.ledger is not None:
        from gretfound.generator import private  # Opacus

        private.require_ledger_adds_up(stated.ledger)
    canaried = _judge_canaries(case, opened, stated)
    case.history.add("PRIVACY", measured={"policy": stated.policy, "verdict": stated.verdict} | canaried)


def _judge_canaries(case: _Case, opened: Opened, stated: Statement) -> dict[str, Any]:
    """Has a node with torch measure what delivered weights know of the canaries.

    Returns:
        What was measured; nothing where no generator is delivered, or a demonstration has no canaries.
    """
    if opened.manifest.form != "weights" or (case.policy != "standard" and stated.reveal is None):
        return {}
    if stated.reveal is None or stated.commitment is None:
        raise _refusal("CANARY_MISSING")
    policy = opened.manifest.policy.partition("/")[0]
    canary_seed = case.roster.hub_card.canary_seed
    canaries.require_reveal(stated.reveal, stated.commitment, canary_seed=canary_seed, policy=policy)

    import ray

    task = ray.remote(canaries.score).options(**case.scoring)
    try:
        found: Check = ray.get(
            task.remote(
                case.hub_uri,
                _base_of(case.hub_uri, opened.manifest.base_sha256),
                {each.name: each.read_bytes() for each in sorted((opened.path / "weights").iterdir())},
                reveal=stated.reveal,
                policy=policy,
                ledger=stated.ledger,
                device="cuda" if case.scoring["num_gpus"] else "cpu",
            )
        )
    except ray.exceptions.RayTaskError as error:  # its own words are a traceback of the other node
        raise error.cause from None
    if found.verdict == "FAIL":
        code = "DP_BUG" if stated.ledger else "CANARY_REMEMBERED"
        raise ContributionRejected(code, f"{found.reason} (found {found.measured}, required {found.required})")
    return dict(found.measured)


def _weigh(case: _Case, opened: Opened) -> tuple[adapter.AdapterTerms, adapter.Measured]:
    """Has weights measured; what they say of themselves is then written anew from its fields, by this process."""
    base_sha256 = opened.manifest.base_sha256
    base = _base_of(case.hub_uri, base_sha256)
    name = next(each.path for each in base.files if each.path in DENOISER_WEIGHTS and each.sha256 == base_sha256)
    base_path = case.folder_path / "base" / name
    uri = storage.join(storage.record_uri(case.hub_uri, base), name)
    storage.download_file(uri, base_path, sha256=base_sha256)
    adapter_path = opened.path / "weights"
    request = {"task": "weigh", "adapter_path": str(adapter_path), "base_weights_path": str(base_path)}
    reply = _confined(case, request, folder_name="work", readable_paths=[base_path])
    if reply.code:
        raise _refusal(reply.code)
    found = reply.reports[-1].get("measured")
    if not isinstance(found, dict):
        raise _refusal("CRASHED")
    terms = adapter.terms_from_json(reply.reports[-1].get("terms"))
    adapter.write_terms(adapter_path, terms)
    return terms, adapter.measured_from_json(found)


def _cohort(hub_uri: str, opened: Opened) -> list[adapter.Measured]:
    """Returns what other sites' first admitted adapter of the same base measured; a withdrawn site counts no more."""
    folder_uri = storage.join(hub_uri, "cohorts", opened.manifest.base_sha256)
    left_out = {opened.manifest.site_id, *withdrawal.withdrawn_site_ids(hub_uri)}
    names = [name for name in storage.list_names(folder_uri) if name.removesuffix(".json") not in left_out]
    return [adapter.measured_from_json(storage.read_json(storage.join(folder_uri, name))) for name in names]


def _open_again(case: _Case) -> Opened:
    """Opens a package that was admitted, and whose records are not whole: nothing is judged a second time."""
    try:
        opened = _open(case)
        return replace(opened, weights=_weigh(case, opened)) if opened.manifest.form == "weights" else opened
    except ContributionRejected as error:
        raise StorageError(
            f"a package was admitted and cannot be opened again ({error.code}) to write its records; give it more "
            "memory and time and run the command again"
        ) from error


def _publish(case: _Case, opened: Opened, outcome: Outcome, recipe: str) -> Outcome:
    """Writes an admitted package's records, the contribution last; done again, it gives the same ids."""
    manifest = opened.manifest
    site = Site(site_id=manifest.site_id, country=manifest.country, form=manifest.form)
    kept_path = case.folder_path / "kept"
    kept_path.mkdir()
    for name in ("summary", "training", "weights", "privacy"):
        if (opened.path / name).is_dir():
            (opened.path / name).rename(kept_path / name)
    record = Contribution(
        parents=(site.id,),
        recipe_id=recipe,
        site_id=manifest.site_id,
        form=manifest.form,
        package_sha256=outcome.package_sha256,
        num_images=manifest.num_images,
        num_patients=manifest.num_patients,
    )
    contributed = lineage.with_files(record, _files_of(kept_path))
    outcome = replace(outcome, form=manifest.form, contribution_id=contributed.id)
    if manifest.form == "weights":
        outcome = replace(outcome, generator_id=_publish_generator(case, opened, kept_path / "weights", contributed))
    else:
        outcome = replace(outcome, shard_set_id=_publish_shards(case.hub_uri, opened, contributed))
    storage.write_record(case.hub_uri, site)
    storage.write_json(_outcome_uri(case.hub_uri, recipe), asdict(outcome))
    if storage.exists(_quarantine_uri(case.hub_uri, outcome.package_sha256)):
        _explain(case.hub_uri, outcome)
    storage.publish_folder(case.hub_uri, kept_path, record)
    return outcome


def made_by(hub_uri: str, contributed: Contribution) -> Outcome:
    """Tells which records a contribution gave rise to at intake."""
    return Outcome(**storage.read_json(_outcome_uri(hub_uri, contributed.recipe_id)))


def _outcome_uri(hub_uri: str, recipe: str) -> str:
    return storage.join(storage.run_uri(hub_uri, recipe), "outcome.json")


def _quarantine_uri(hub_uri: str, package_sha256: str) -> str:
    return storage.join(hub_uri, "quarantine", package_sha256)


def _explain(hub_uri: str, outcome: Outcome) -> None:
    words = {"verdict": outcome.verdict, "code": outcome.code, "message": outcome.message}
    storage.write_json(storage.join(_quarantine_uri(hub_uri, outcome.package_sha256), "reason.json"), words)


def _files_of(folder_path: Path) -> tuple[File, ...]:
    return tuple(
        File(path=str(path.relative_to(folder_path)), sha256=sha256, size_bytes=size_bytes)
        for path, sha256, size_bytes in storage.describe_folder(folder_path)
    )


def _publish_shards(hub_uri: str, opened: Opened, contributed: Contribution) -> str:
    shards = [shard.adopt_shard_file(hub_uri, path) for path in sorted(opened.path.glob("shards/*.parquet"))]
    shard_set = ShardSet(
        parents=(contributed.id,),
        site_id=opened.manifest.site_id,
        origin="real" if opened.manifest.form == "images" else "synthetic",
        num_images=sum(each.num_images for each in shards),
        shards=tuple(each for each in shards if each.num_images),
        rejected=opened.rejected,
    )
    storage.write_record(hub_uri, shard_set)
    return shard_set.id


def _publish_generator(case: _Case, opened: Opened, adapter_path: Path, contributed: Contribution) -> str:
    from gretfound.generator import pipeline  # torch: only an admitted adapter needs it

    assert opened.weights is not None  # weighed on both ways here
    terms, measured = opened.weights
    base = _base_of(case.hub_uri, opened.manifest.base_sha256)
    base_path = storage.fetch_folder(case.hub_uri, base, case.folder_path / "base")
    generator_path = pipeline.install_adapter(base_path, adapter_path, case.folder_path / "generator")
    record = Generator(
        parents=(contributed.id, base.id),
        site_id=opened.manifest.site_id,
        base_id=base.id,
        method=terms.method,
        resolution_px=base.resolution_px,
        num_images=opened.manifest.num_images,
        images_seen=terms.images_seen,
        final_loss=terms.final_loss,
    )
    generator = storage.publish_folder(case.hub_uri, generator_path, record)
    uri = storage.join(case.hub_uri, "cohorts", opened.manifest.base_sha256, f"{opened.manifest.site_id}.json")
    storage.create_bytes(uri, lineage.canonical_json(asdict(measured)))  # the site's first one stays
    return generator.id


def _base_of(hub_uri: str, base_sha256: str) -> Generator:
    for record in storage.read_records(hub_uri, Generator):
        is_base = not record.site_id and any(
            file.path in DENOISER_WEIGHTS and file.sha256 == base_sha256 for file in record.files
        )
        if is_base:
            return record
    raise ContributionRejected(
        "UNKNOWN_BASE", "the hub knows no base generator with the digest that the package names; send it the base first"
    )


def enter(book: ledger.Ledger, hub_uri: str, outcome: Outcome, *, receipt_key: Ed25519PrivateKey) -> None:
    """Enters a verdict into the ledger and writes the site's receipt, signed, each once."""
    entry = book.enter(
        event=EVENTS[outcome.verdict],
        subject=outcome.contribution_id or outcome.package_sha256,
        details={
            "package_sha256": outcome.package_sha256,
            "site_id": outcome.site_id,
            "code": outcome.code,
            "number": outcome.number,
        },
    )
    found = Receipt(
        package_sha256=outcome.package_sha256,
        verdict=cast(Any, outcome.verdict),  # the document refuses what is none of `VERDICTS`
        codes=(outcome.code,) if outcome.code else (),
        message=outcome.message,
        contribution_id=outcome.contribution_id,
        ledger=receipt.Place(index=entry.index, sha256=entry.sha256),
    )
    name = f"{outcome.package_sha256}-{outcome.number:03d}.json"
    storage.create_bytes(storage.join(hub_uri, "receipts", name), receipt.sign(found, receipt_key))
