"""Each check of the gate has the verdict that its numbers ask for."""

from dataclasses import replace

import numpy as np
import pytest

from gretfound.errors import ConfigError
from gretfound.evaluation.metrics import Interval
from gretfound.gate import checks, policy
from gretfound.gate.checks import Control
from gretfound.gate.comparison import Copies, Told

STANDARD = policy.read_policy("standard")


def _interval(value: float, half_width: float = 0.01) -> Interval:
    return Interval(value=value, low=value - half_width, high=value + half_width, num_resamples=9)


def _copies(
    *, num_flagged: int = 0, p: float = 1.0, excess: float = 0.0, patients: float = 0.0, num: int = 2000
) -> Copies:
    return Copies(
        is_flagged=np.arange(num) < num_flagged,
        p=p,
        excess=excess,
        num_controls=0,
        patient_excess=patients,
        patient_p=0.001,
        num_patients=num_flagged,
    )


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "PASS"),
        ({"num_patients": 999}, "FAIL"),
        ({"num_patients": 200, "epsilon": 8.0}, "PASS"),
        ({"num_patients": 199, "epsilon": 8.0}, "FAIL"),
        ({"num_patients": 999, "epsilon": 9.0}, "FAIL"),
        ({"num_held_out_images": 299}, "FAIL"),
        ({"num_held_out_patients": 149}, "FAIL"),
    ],
)
def test_preconditions__ask_for_patients(changes: dict[str, float], verdict: str) -> None:
    enough = {"num_held_out_images": 300, "num_held_out_patients": 150, "num_patients": 1000}
    assert checks.preconditions(STANDARD, **enough | changes).verdict == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vessels", "verdict"),
    [
        ({"copies_found": 0.95, "visits_found": 0.9, "false_flags": 0.005}, "PASS"),
        ({"copies_found": 0.94, "visits_found": 0.9}, "INCONCLUSIVE"),
        ({"copies_found": 0.95, "visits_found": 0.89}, "INCONCLUSIVE"),
        ({"copies_found": 1.0, "visits_found": 1.0, "false_flags": 0.006}, "INCONCLUSIVE"),
        ({"blind": "too few pixels"}, "INCONCLUSIVE"),
    ],
)
def test_controls__every_required_eye_has_to_see(vessels: dict[str, float], verdict: str) -> None:
    found = [Control(eye="details", copies_found=1.0, visits_found=1.0), Control(eye="vessels", **vessels)]  # type: ignore[arg-type]
    assert checks.controls(found, STANDARD, num_real_visits=0).verdict == verdict
    lenient = replace(STANDARD, required_eyes=("details",))
    assert checks.controls(found, lenient, num_real_visits=0).verdict == "PASS"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (_copies(), "PASS"),
        (_copies(excess=0.003), "WARN"),
        (_copies(excess=0.01), "FAIL"),
        (_copies(p=0.009), "FAIL"),
        (_copies(patients=0.011), "FAIL"),
        (_copies(num=1999), "INCONCLUSIVE"),
        (None, "INCONCLUSIVE"),
    ],
)
def test_copies__fails_by_chance_or_by_share(found: Copies | None, verdict: str) -> None:
    assert checks.copies(found, STANDARD).verdict == verdict


@pytest.mark.parametrize(
    ("auc", "tpr", "blind", "verdict"),
    [
        (_interval(0.5), _interval(0.01), 0.5, "PASS"),
        (_interval(0.66), _interval(0.01), 0.5, "FAIL"),
        (_interval(0.5), _interval(0.06), 0.5, "FAIL"),
        (_interval(0.58, 0.03), _interval(0.01), 0.5, "INCONCLUSIVE"),
        (_interval(0.5), _interval(0.02, 0.04), 0.5, "INCONCLUSIVE"),
        (_interval(0.99), _interval(0.9), 0.56, "INCONCLUSIVE"),  # the split itself is biased
    ],
)
def test_membership__needs_sides_that_are_alike(auc: Interval, tpr: Interval, blind: float, verdict: str) -> None:
    assert checks.membership(Told(auc=auc, tpr=tpr), blind_auc=blind, policy=STANDARD).verdict == verdict


def test_captions__of_few_patients_fail() -> None:
    assert checks.captions({"a": 11, "b": 500}, {"a": 0.1, "b": 0.2}, STANDARD).verdict == "PASS"
    failed = checks.captions({"a": 10, "b": 500}, {"a": 0.1, "b": 0.2}, STANDARD)
    assert failed.verdict == "FAIL" and "a" not in failed.measured


def test_extraction__a_group_alone_warns_and_a_hit_fails() -> None:
    def verdict(hits: int, confirmed: int, groups: int, is_seen: bool = True) -> str:
        return checks.extraction(hits, confirmed, groups, num_drawn=9, is_seen=is_seen, policy=STANDARD).verdict

    assert [verdict(0, 0, 0), verdict(0, 0, 2), verdict(1, 0, 0), verdict(0, 1, 1)] == ["PASS", "WARN", "FAIL", "FAIL"]
    assert verdict(0, 0, 0, is_seen=False) == "INCONCLUSIVE"


def test_usefulness__blocks_what_is_safe_because_it_is_broken() -> None:
    assert checks.usefulness(_interval(STANDARD.max_kid + 1), STANDARD).verdict == "FAIL"
    assert checks.usefulness(_interval(0.0), STANDARD).verdict == "PASS"


def test_read_policy__says_what_is_wrong(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="restore the file"):
        policy.read_policy("absent")
    with pytest.raises(ValueError, match="max_auc_upper, num_samples"):
        replace(STANDARD, max_auc_upper=1.5, num_samples=0)
    assert policy.read_policy("demonstration").stamp == "demonstration/1"
