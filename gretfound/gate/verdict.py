"""What a check of the privacy gate found, and what the checks of a generator come to together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "INCONCLUSIVE", "FAIL"]
WORST_FIRST: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE", "WARN", "PASS")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of the gate.

    Args:
        name: ``G0`` to ``G7``.
        verdict: INCONCLUSIVE if the check could not have found what it looks for.
        measured: The figures, by name; no value of a patient.
        required: What they are held against, in words.
        reason: What it means and what the site can do, in a sentence.
    """

    name: str
    verdict: Verdict
    measured: Mapping[str, float | int | str]
    required: str
    reason: str


def overall(checks: Iterable[Check]) -> Verdict:
    """Returns the worst verdict of a generator's checks; without any, INCONCLUSIVE. Only PASS and WARN may leave."""
    found = {check.verdict for check in checks}
    return next((verdict for verdict in WORST_FIRST if verdict in found), "INCONCLUSIVE")
