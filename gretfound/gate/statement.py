"""A package's statement of its generator's privacy: what its pages say, reduced to a few values of known kinds.

`read` parses a stranger's pages, so it runs in a confined process (`gretfound.opening`). The hub judges the values that
come of it, which hold no free text, and believes none of them: they are the site's word.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from gretfound import disclosure, signing
from gretfound.errors import ContributionRejected
from gretfound.gate import canaries
from gretfound.gate.canaries import Commitment, Reveal
from gretfound.gate.policy import Policy
from gretfound.gate.report import LEAVES, PATH, REQUIRED_CHECKS, CheckName, Report, Stamp, WeightsSha256
from gretfound.gate.verdict import WORST_FIRST, Verdict
from gretfound.generator import spending
from gretfound.generator.spending import Ledger
from gretfound.signing import Document


class Statement(Document):
    """What a package states.

    ``num_patients`` is the summary's, rounded; None where they are too few to tell. ``verdicts`` are those of the
    report's checks. ``reveal`` and ``commitment`` are None together, where the training had no canaries; ``ledger`` is
    None where no differential privacy is claimed.
    """

    num_patients: int | None = Field(ge=0, lt=10**9)
    policy: Stamp
    verdict: Verdict
    weights_sha256: WeightsSha256
    verdicts: tuple[tuple[CheckName, Verdict], ...] = Field(max_length=16)
    reveal: Reveal | None
    commitment: Commitment | None
    ledger: Ledger | None


def read(folder_path: Path, *, num_patients: int | None) -> Statement:
    """Reads the pages of an opened contribution.

    Args:
        folder_path: The opened contribution.
        num_patients: Of its summary.

    Raises:
        ContributionRejected: ``GATE_MISSING`` without a report, ``GATE_MALFORMED``, ``CANARY_REVEAL`` or ``DP_LEDGER``
            if a page is not of this version, ``CANARY_MISSING`` if one of the canaries' two is there without the other.
    """
    path, privacy_path = folder_path / PATH, folder_path / "privacy"
    if not path.is_file():
        raise ContributionRejected("GATE_MISSING", "the package holds no report of the privacy gate; contribute again")
    try:
        report = signing.parse_document(path.read_bytes(), Report)
    except signing.UnreadableDocument as error:
        raise ContributionRejected(
            "GATE_MALFORMED", f"the gate's report: {error}; update gretfound-site and contribute again"
        ) from error
    reveal, commitment = None, None
    pages = [privacy_path / name for name in (canaries.REVEAL_NAME, canaries.COMMITMENT_NAME)]
    if any(page.is_file() for page in pages):
        if not all(page.is_file() for page in pages):
            raise ContributionRejected("CANARY_MISSING", "the canaries' coins or their digest are missing")
        reveal, commitment = canaries.read_reveal(*(page.read_bytes() for page in pages))
    ledger_path = privacy_path / spending.LEDGER_NAME
    return Statement(
        num_patients=num_patients,
        policy=report.policy,
        verdict=report.verdict,
        weights_sha256=report.weights_sha256,
        verdicts=tuple((check.name, check.verdict) for check in report.checks),
        reveal=reveal,
        commitment=commitment,
        ledger=spending.read_ledger(ledger_path.read_bytes()) if ledger_path.is_file() else None,
    )


def require_gate(statement: Statement, *, policies: Mapping[str, str], weights_sha256: str | None) -> None:
    """Holds what a report says against what a hub takes.

    Args:
        statement: A package's.
        policies: The stamps that the hub takes, by variant.
        weights_sha256: Of the package's weights, where it has some.

    Raises:
        ContributionRejected: ``GATE_POLICY`` if the report was made by another policy, ``GATE_VERDICT`` if it is not
            PASS or WARN, or its checks say otherwise, or one is missing, ``GATE_WEIGHTS`` if it is of other weights.
    """
    if statement.policy not in policies.values():
        raise ContributionRejected(
            "GATE_POLICY",
            f"the gate's report is of the policy {statement.policy}; this hub takes {', '.join(policies.values())}: "
            "contribute again",
        )
    verdict_of = dict(statement.verdicts)
    missing = sorted(set(REQUIRED_CHECKS) - set(verdict_of))
    found = next((verdict for verdict in WORST_FIRST if verdict in verdict_of.values()), "INCONCLUSIVE")
    is_each_once = len(verdict_of) == len(statement.verdicts)
    if missing or not is_each_once or found != statement.verdict or found not in LEAVES:
        raise ContributionRejected(
            "GATE_VERDICT",
            f"the gate's report says {statement.verdict}, its checks {found}, missing {missing}; required PASS or WARN "
            "of all: nothing else may leave a site",
        )
    if weights_sha256 is not None and statement.weights_sha256 != weights_sha256:
        raise ContributionRejected("GATE_WEIGHTS", "the gate's report is of other weights; contribute again")


def most_patients(num_patients: int | None, *, told_by: disclosure.Policy) -> int:
    """Returns the largest number of patients that a summary may stand for.

    It tells them rounded, and of a site that grew by too few to tell, the number of before.

    Args:
        num_patients: The summary's; None where they are too few to tell, or have no codes.
        told_by: The disclosure policy that it was made by.
    """
    told = told_by.min_patients - 1 if num_patients is None else num_patients
    return told + told_by.rounding - 1 + told_by.min_patients_per_cell - 1


def require_patients(statement: Statement, *, rules: Policy, told_by: disclosure.Policy) -> None:
    """Requires as many patients as G0 does, from the counts of the package itself, whatever its report says.

    A ledger lowers the number where it claims an epsilon that the policy takes, with a delta that the smallest site
    which may do so would have. Whether it adds up is for `private.require_ledger_adds_up`.

    Args:
        statement: A package's.
        rules: The gate's policy of this hub.
        told_by: The disclosure policy of its summary.

    Raises:
        ContributionRejected: ``FEW_PATIENTS``.
    """
    most, ledger = most_patients(statement.num_patients, told_by=told_by), statement.ledger
    is_private = ledger is not None and ledger.delta <= 1 / (10 * rules.min_patients_private)
    required = rules.num_patients_for(ledger.claimed_epsilon if ledger is not None and is_private else None)
    if most < required:
        raise ContributionRejected(
            "FEW_PATIENTS",
            f"the package tells of {most} patients at most, those held out included; required {required}, or "
            f"{rules.num_patients_for(rules.max_epsilon)} with --dp-epsilon {rules.max_epsilon:g} or less: train so, "
            "send photographs (--form images), or pool with other sites",
        )
