"""What a package states of its privacy: the pages are read strictly, and a hub takes no report that says otherwise."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gretfound import disclosure, signing
from gretfound.errors import ContributionRejected
from gretfound.gate import canaries, policy, report, statement
from gretfound.gate.statement import Statement
from gretfound.gate.verdict import Check, Verdict
from gretfound.generator.spending import Ledger

STANDARD = policy.read_policy("standard")
STAMPS = {"standard": STANDARD.stamp}
SECRET = "5" * 64
REVEAL = canaries.Reveal(canary_seed=7, num_canaries=20, coin_secret=SECRET)
COMMITMENT = canaries.Commitment(commitment=canaries.commitment_to(SECRET))
LEDGER = Ledger(
    claimed_epsilon=2.0, epsilon=1.9, delta=1e-4, tier="strong", clip_norm=0.01, history=((1.5, 0.05, 400),)
)


def _report(**changes: object) -> bytes:
    passed = [
        Check(name=name, verdict="PASS", measured={"found": 3}, required="Jane Doe", reason="Jane Doe")
        for name in report.REQUIRED_CHECKS
    ]
    made = report.make(passed, policy_stamp=STANDARD.stamp, weights_sha256="a" * 64)
    return made.model_copy(update=changes).to_bytes()


def _read(folder_path: Path, pages: Mapping[str, bytes]) -> Statement:
    (folder_path / "privacy").mkdir()
    for name, content in ({"gate_report": _report()} | dict(pages)).items():
        (folder_path / "privacy" / f"{name}.json").write_bytes(content)
    return statement.read(folder_path, num_patients=1400)


def test_read__says_what_the_pages_say_and_none_of_their_words(tmp_path: Path) -> None:
    pages = {
        "canary_reveal": REVEAL.to_bytes(),
        "canary_commitment": COMMITMENT.to_bytes(),
        "dp_ledger": LEDGER.to_bytes(),
    }
    found = _read(tmp_path, pages)
    assert (found.reveal, found.commitment, found.ledger) == (REVEAL, COMMITMENT, LEDGER)
    assert found.verdicts == tuple((name, "PASS") for name in report.REQUIRED_CHECKS)
    assert b"Jane" not in found.to_bytes() and signing.parse_document(found.to_bytes(), Statement) == found


def test_read__a_report_alone_is_enough(tmp_path: Path) -> None:
    found = _read(tmp_path, {})
    assert (found.reveal, found.commitment, found.ledger) == (None, None, None)


@pytest.mark.parametrize(
    ("pages", "code"),
    [
        ({"gate_report": b"{}"}, "GATE_MALFORMED"),
        ({"gate_report": _report()[:-1]}, "GATE_MALFORMED"),
        ({"gate_report": _report().replace(b"3}", b"3" + b"0" * 30 + b"}")}, "GATE_MALFORMED"),
        ({"gate_report": b"[" * 10**5}, "GATE_MALFORMED"),
        ({"canary_reveal": REVEAL.to_bytes()}, "CANARY_MISSING"),
        ({"canary_reveal": REVEAL.to_bytes(), "canary_commitment": b"{}"}, "CANARY_REVEAL"),
        ({"dp_ledger": LEDGER.to_bytes().replace(b",400]", b",4" + b"0" * 30 + b"]")}, "DP_LEDGER"),
        ({"dp_ledger": LEDGER.model_copy(update={"history": ((0.06, 1.0, 100_000),)}).to_bytes()}, "DP_LEDGER"),
        ({"dp_ledger": LEDGER.model_copy(update={"history": ((5.0, 1e-4, 200_000),) * 2}).to_bytes()}, "DP_LEDGER"),
    ],
)
def test_read__refuses_pages_that_are_not_of_this_version(
    tmp_path: Path, pages: Mapping[str, bytes], code: str
) -> None:
    with pytest.raises(ContributionRejected) as caught:
        _read(tmp_path, pages)
    assert caught.value.code == code


def test_read__requires_a_report(tmp_path: Path) -> None:
    with pytest.raises(ContributionRejected, match="GATE_MISSING"):
        statement.read(tmp_path, num_patients=1400)


def _statement(verdict: Verdict = "PASS", **changes: object) -> Statement:
    passed = tuple((name, verdict) for name in report.REQUIRED_CHECKS)
    found = Statement(
        num_patients=1400,
        policy=STANDARD.stamp,
        verdict=verdict,
        weights_sha256="a" * 64,
        verdicts=passed,
        reveal=None,
        commitment=None,
        ledger=None,
    )
    return found.model_copy(update=changes)


def test_require_gate__takes_what_passed() -> None:
    statement.require_gate(_statement(), policies=STAMPS, weights_sha256="a" * 64)
    statement.require_gate(_statement(), policies=STAMPS, weights_sha256=None)
    statement.require_gate(_statement("WARN"), policies=STAMPS, weights_sha256="a" * 64)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (_statement(policy="demonstration/1"), "GATE_POLICY"),
        (_statement(policy="standard/9"), "GATE_POLICY"),
        (_statement(verdict="INCONCLUSIVE"), "GATE_VERDICT"),
        (_statement("FAIL"), "GATE_VERDICT"),
        (_statement(verdicts=_statement("WARN").verdicts), "GATE_VERDICT"),  # not what its checks come to
        (_statement(verdicts=_statement("FAIL").verdicts), "GATE_VERDICT"),
        (_statement(verdicts=()), "GATE_VERDICT"),
        (_statement(verdicts=_statement().verdicts[1:]), "GATE_VERDICT"),
        (
            _statement(verdicts=(("G0", "FAIL"), *_statement().verdicts)),
            "GATE_VERDICT",
        ),  # the second of a name hides it
        (_statement(weights_sha256="b" * 64), "GATE_WEIGHTS"),
    ],
)
def test_require_gate__refuses_the_rest_with_a_stable_code(found: Statement, code: str) -> None:
    with pytest.raises(ContributionRejected) as caught:
        statement.require_gate(found, policies=STAMPS, weights_sha256="a" * 64)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("num_patients", "ledger", "is_enough"),
    [
        (1400, None, True),
        (1320, None, True),  # of 1,334, ten of whom are too few to tell, and then rounding
        (1315, None, False),
        (1000, None, False),
        (None, None, False),
        (1000, LEDGER, True),
        (255, LEDGER, True),
        (250, LEDGER, False),
        (None, LEDGER, False),
        (1000, LEDGER.model_copy(update={"claimed_epsilon": 8.0}), True),
        (1000, LEDGER.model_copy(update={"claimed_epsilon": 8.1}), False),
        (1000, LEDGER.model_copy(update={"delta": 0.5}), False),  # is no privacy
        (1400, LEDGER.model_copy(update={"claimed_epsilon": 10.0}), True),
    ],
)
def test_require_patients__few_need_a_ledger(num_patients: int | None, ledger: Ledger | None, is_enough: bool) -> None:
    found = _statement(num_patients=num_patients, ledger=ledger)
    told_by = disclosure.read_policy("standard")
    if is_enough:
        statement.require_patients(found, rules=STANDARD, told_by=told_by)
        return
    with pytest.raises(
        ContributionRejected, match=r"FEW_PATIENTS.*required (1334|267), or 267 with --dp-epsilon 8 or less"
    ):
        statement.require_patients(found, rules=STANDARD, told_by=told_by)


@pytest.mark.parametrize("num_trained_on", [1000, 200])
def test_require_patients__takes_every_site_that_the_gate_takes(num_trained_on: int) -> None:
    told_by = disclosure.read_policy("standard")
    ledger = LEDGER.model_copy(update={"delta": 1 / (10 * num_trained_on)}) if num_trained_on == 200 else None
    needed = STANDARD.num_patients_for(8.0 if ledger else None)
    told = disclosure.release(
        [{"patient": f"p{place}"} for place in range(needed)], policy=told_by
    ).summary.num_patients
    found = _statement(num_patients=told, ledger=ledger)
    statement.require_patients(found, rules=STANDARD, told_by=told_by)


def test_most_patients__of_photographs_without_codes_is_few() -> None:
    told_by = disclosure.read_policy("standard")
    told = disclosure.release([{"sex": "female"}] * 5000, policy=told_by).summary.num_patients
    assert statement.most_patients(told, told_by=told_by) < 267


def test_to_text__says_fail_where_a_check_failed() -> None:
    failed = [Check(name=n, verdict="FAIL", measured={}, required="", reason="") for n in report.REQUIRED_CHECKS]
    made = report.make(failed, policy_stamp=STANDARD.stamp, weights_sha256="a" * 64)
    assert made.verdict == "FAIL" and "FAIL" in report.to_text(made)
