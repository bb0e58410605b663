"""The gate's report: the figures that go with a package. No photograph, no patient.

A hub reads it with `gretfound.gate.statement`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, StringConstraints

from gretfound.gate.verdict import Check, Verdict, overall
from gretfound.signing import Document

PATH = "privacy/gate_report.json"
LEAVES = ("PASS", "WARN")
REQUIRED_CHECKS = ("G0", "G1", "G2", "G3", "G4", "G6", "G7")
Stamp = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,32}/[0-9]{1,4}$")]
CheckName = Annotated[str, StringConstraints(pattern=r"^G[0-9]$")]
WeightsSha256 = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_]{1,64}$")]
_Words = Annotated[str, StringConstraints(max_length=500)]


class ReportedCheck(Document):
    """One check, as it leaves; see `verdict.Check`."""

    name: CheckName
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
    policy: Stamp
    verdict: Verdict
    weights_sha256: WeightsSha256
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
