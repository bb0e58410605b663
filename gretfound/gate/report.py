"""The gate's report: the figures that go with a package, and how a hub reads them. No photograph, no patient."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, StringConstraints

from gretfound import signing
from gretfound.errors import ContributionRejected
from gretfound.gate.verdict import Check, Verdict, overall
from gretfound.signing import Document

PATH = "privacy/gate_report.json"
LEAVES = ("PASS", "WARN")
REQUIRED_CHECKS = ("G0", "G1", "G2", "G3", "G4", "G6", "G7")
_Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_]{1,64}$")]
_Words = Annotated[str, StringConstraints(max_length=500)]


class ReportedCheck(Document):
    """One check, as it leaves; see `verdict.Check`."""

    name: Annotated[str, StringConstraints(pattern=r"^G[0-9]$")]
    verdict: Verdict
    measured: dict[_Name, int | FiniteFloat | _Words] = Field(max_length=64)
    required: _Words
    reason: _Words


class Report(Document):
    """What the gate found of one generator.

    ``policy`` is the variant and its version, which a demonstration thus stamps itself into. ``weights_sha256`` is the
    digest of the adapter that was on trial, empty where it came to none.
    """

    schema_version: Literal["gretfound-gate/1"] = "gretfound-gate/1"
    policy: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,32}/[0-9]{1,4}$")]
    verdict: Verdict
    weights_sha256: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
    checks: tuple[ReportedCheck, ...] = Field(max_length=16)


def make(checks: Sequence[Check], *, policy_stamp: str, weights_sha256: str = "") -> Report:
    """Makes the report of a trial."""
    return Report(
        policy=policy_stamp,
        verdict=overall(checks),
        weights_sha256=weights_sha256,
        checks=tuple(
            ReportedCheck(
                name=check.name,
                verdict=check.verdict,
                measured=dict(check.measured),
                required=check.required,
                reason=check.reason,
            )
            for check in checks
        ),
    )


def to_text(report: Report) -> str:
    """Says for the data manager what passed, what did not, and what to do."""
    lines = [f"The privacy gate gate/1 ({report.policy}): {report.verdict}"]
    for check in report.checks:
        lines.append(f"  {check.name} {check.verdict:<12} {check.reason}")
        if check.verdict != "PASS":
            found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in check.measured.items())
            lines.append(f"     found {found or 'nothing'}; required {check.required}")
    return "\n".join(lines) + "\n"


def require(content: bytes, *, policies: Mapping[str, str], weights_sha256: str | None) -> Report:
    """Reads a stranger's report and holds it against what a hub takes.

    Args:
        content: The member of a package.
        policies: The stamps that the hub takes, by variant.
        weights_sha256: Of the package's weights, where it has some.

    Raises:
        ContributionRejected: ``GATE_MALFORMED`` if it is no report of this version, ``GATE_POLICY`` if it was made by
            another policy, ``GATE_VERDICT`` if it is not PASS or WARN, or its checks say otherwise, or one is missing,
            ``GATE_WEIGHTS`` if it is of other weights.
    """
    try:
        report = signing.parse_document(content, Report)
    except signing.UnreadableDocument as error:
        raise ContributionRejected(
            "GATE_MALFORMED", f"the gate's report: {error}; update gretfound-site and contribute again"
        ) from error
    if report.policy not in policies.values():
        raise ContributionRejected(
            "GATE_POLICY",
            f"the gate's report is of the policy {report.policy}; this hub takes {', '.join(policies.values())}: "
            "contribute again",
        )
    names = [check.name for check in report.checks]
    missing = sorted(set(REQUIRED_CHECKS) - set(names))
    found = overall(Check(**check.model_dump()) for check in report.checks)
    if missing or len(names) != len(set(names)) or found != report.verdict or found not in LEAVES:
        raise ContributionRejected(
            "GATE_VERDICT",
            f"the gate's report says {report.verdict}, its checks {found}, missing {missing}; required PASS or WARN of "
            "all: nothing else may leave a site",
        )
    if weights_sha256 is not None and report.weights_sha256 != weights_sha256:
        raise ContributionRejected("GATE_WEIGHTS", "the gate's report is of other weights; contribute again")
    return report
