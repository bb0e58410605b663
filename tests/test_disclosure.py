"""Disclosure control against an attacker of the tests' own, who shares no code with the room that he attacks."""

import itertools
import json
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linprog, milp

from gretfound import attacker, disclosure, metadata
from gretfound.disclosure import Policy
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.metadata import Cells
from tests.summaries import told_counts

STANDARD = disclosure.read_policy("standard")
# A cycle of pairs over few values, so that an example takes a fraction of a second.
SMALL = replace(
    STANDARD, tables=("sex", "dr", "dr_present", "glaucoma", "eye"), pairs=("dr*sex", "dr*glaucoma", "sex*glaucoma")
)
GRADES = (0, 1, 2, 3, 4, "present", None)
SEXES = ("female", "male", None)
GLAUCOMA = (True, False, None)
KINDS = list(itertools.product(GRADES, SEXES, GLAUCOMA))
# Few tables and no pairs, for what one table is enough to show.
PLAIN = replace(STANDARD, tables=("sex", "camera", "glaucoma", "age_band"), pairs=())
K = 11


def rows_of(counts: Sequence[int]) -> list[Cells]:
    """One photograph a patient: as many patients of each of `KINDS` as ``counts`` says."""
    rows: list[Cells] = []
    for (grade, sex, glaucoma), count in zip(KINDS, counts, strict=True):
        cells: Cells = {} if grade is None else {"dr_present": grade == "present" or grade > 0}
        if isinstance(grade, int):
            cells["dr"] = grade
        if sex:
            cells["sex"] = sex
        if glaucoma is not None:
            cells["glaucoma"] = glaucoma
        rows += [{**cells, "eye": "left", "patient": f"p{len(rows) + place}"} for place in range(count)]
    return rows


microdata = st.lists(
    st.sampled_from([0, 0, 0, 0, 1, 1, 2, 4, 9, 10, 11, 12, 25, 60]), min_size=len(KINDS), max_size=len(KINDS)
)


class Attacker:
    """Knows a summary's JSON and the policy's text; sums up one joint table of all columns with linear programs.

    With ``releases`` of several moments he also knows that patients were only added from each to the next.
    """

    def __init__(self, *releases: dict[str, Any], is_whole: bool = False) -> None:
        self.is_whole = is_whole
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.rows: list[np.ndarray] = []
        self.num = len(releases) * len(KINDS)
        for moment, content in enumerate(releases):
            if content["num_patients"] is not None:
                self._know(self.cell(moment), content["num_patients"], content, least=0)
            for key, table in content["counts"].items():
                for value, count in table.items():
                    if key != "eye":
                        self._know(self.cell(moment, (key, value)), count, content)
            for name, cells in content["pair_counts"].items():
                first, second = name.split("*")
                for value, other, count in cells:
                    self._know(self.cell(moment, (first, value), (second, other)), count, content)

    def cell(self, moment: int, *told: tuple[str, str | None]) -> np.ndarray:
        """The kinds of patients in a cell of the last release's tables: those of its moment and all before."""
        chosen = np.zeros(self.num)
        for place, (grade, sex, glaucoma) in enumerate(KINDS):
            texts = {
                "dr": str(grade) if isinstance(grade, int) else None,
                "dr_present": None if grade is None else "no" if grade == 0 else "yes",
                "sex": sex,
                "glaucoma": {True: "yes", False: "no", None: None}[glaucoma],
            }
            if all(texts[key] == value for key, value in told):
                for earlier in range(moment + 1):
                    chosen[earlier * len(KINDS) + place] = 1
        return chosen

    def _know(self, chosen: np.ndarray, count: int | None, content: dict[str, Any], least: int = K) -> None:
        if count is not None:
            low = count - content["rounding"] // 2
            self.rows.append(chosen)
            self.lows.append(max(least, low))
            self.highs.append(low + content["rounding"] - 1)

    def interval(self, chosen: np.ndarray) -> tuple[int, int]:
        """The least and the greatest number of patients that a cell can have."""
        if not self.rows:
            return 0, 10**9
        matrix, lows, highs = np.array(self.rows), np.array(self.lows), np.array(self.highs)
        ends = []
        for sign in (1.0, -1.0):
            if self.is_whole:
                found = milp(
                    sign * chosen, constraints=LinearConstraint(matrix, lows, highs), integrality=np.ones(self.num)
                )
            else:
                found = linprog(sign * chosen, A_ub=np.vstack([matrix, -matrix]), b_ub=np.concatenate([highs, -lows]))
            assert found.status == 0, found.message
            ends.append(sign * found.fun)
        return int(np.ceil(ends[0] - 1e-6)), int(np.floor(ends[1] + 1e-6))


VALUES = {"sex": SEXES, "dr": ("0", "1", "2", "3", "4", None), "dr_present": ("yes", "no", None),
          "glaucoma": ("yes", "no", None)}  # fmt: skip
CELLS = [((key, value),) for key, values in VALUES.items() for value in values]
CELLS += [
    ((first, value), (second, other))
    for first, second in (pair.split("*") for pair in SMALL.pairs)
    for value in VALUES[first]
    for other in VALUES[second]
]


def is_told(content: dict[str, Any], cell: tuple[tuple[str, str | None], ...]) -> bool:
    if len(cell) == 1:
        ((key, value),) = cell
        return content["counts"].get(key, {}).get(value) is not None
    (first, value), (second, other) = cell
    rows = content["pair_counts"].get(f"{first}*{second}", [])
    return any([value, other] == row[:2] and row[2] is not None for row in rows)


def true_count(counts: Sequence[int], cell: tuple[tuple[str, str | None], ...]) -> int:
    return int(Attacker({"num_patients": None, "counts": {}, "pair_counts": {}}).cell(0, *cell) @ np.array(counts))


def find_disclosed(counts: Sequence[int], content: dict[str, Any], *, is_whole: bool = False) -> list[Any]:
    """What the attacker learns that he must not: cells surely of 1 to 10, and suppressed ones known too closely."""
    attack = Attacker(content, is_whole=is_whole)
    learned = []
    for cell in CELLS:
        if is_told(content, cell):
            continue
        low, high = attack.interval(attack.cell(0, *cell))
        assert low <= true_count(counts, cell) <= high, "the attacker's own sums are wrong"
        is_close = all(value is not None for _, value in cell) and any(key in content["counts"] for key, _ in cell)
        if (low >= 1 and high < K) or (is_close and high - low < K):
            learned.append((cell, low, high))
    return learned


def content_of(rows: Sequence[Cells], policy: Policy) -> dict[str, Any]:
    made = disclosure.release(rows, policy=policy)
    content: dict[str, Any] = json.loads(metadata.to_bytes(made.summary))
    return content


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(counts=microdata, share=st.sampled_from([0.05, 1.0]), rounding=st.sampled_from([5, 5, 1]))
def test_release__an_attacker_with_linear_programs_determines_no_small_count(
    counts: list[int], share: float, rounding: int
) -> None:
    assume(sum(counts) >= 50)
    policy = replace(SMALL, max_image_share=share, rounding=rounding)
    content = content_of(rows_of(counts), policy)
    assert find_disclosed(counts, content) == []
    assert abs(content["num_patients"] - sum(counts)) <= rounding // 2
    for cell in CELLS:
        if is_told(content, cell):
            truth = true_count(counts, cell)
            told = (
                content["counts"][cell[0][0]][cell[0][1]]
                if len(cell) == 1
                else next(
                    count
                    for value, other, count in content["pair_counts"][f"{cell[0][0]}*{cell[1][0]}"]
                    if (value, other) == (cell[0][1], cell[1][1])
                )
            )
            assert truth >= K and told % rounding == 0 and abs(told - truth) <= rounding // 2


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(counts=microdata)
def test_release__an_attacker_who_knows_that_patients_are_whole_determines_no_small_count(counts: list[int]) -> None:
    assume(sum(counts) >= 50)
    content = content_of(rows_of(counts), replace(SMALL, max_image_share=1.0))
    learned = find_disclosed(counts, content, is_whole=True)
    assert [each for each in learned if each[1] >= 1 and each[2] < K] == []


def two_by_two(policy: Policy) -> tuple[list[int], list[Cells]]:
    """Patients of whom 3 and 7 are in two cells of a table of two columns without blanks."""
    wanted = {("female", True): 3, ("female", False): 47, ("male", True): 40, ("male", False): 7}
    counts = [wanted.get((sex, glaucoma), 0) if grade == 0 else 0 for grade, sex, glaucoma in KINDS]
    return counts, rows_of(counts)


def test_release__primary_suppression_alone_is_broken_and_both_attackers_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = replace(SMALL, rounding=1, max_image_share=1.0, pairs=("sex*glaucoma",))
    counts, rows = two_by_two(exact)
    with monkeypatch.context() as patched:
        patched.setattr(disclosure, "_suppress_complements", lambda *_: None)
        with pytest.raises(RuntimeError, match="does not protect"):
            disclosure.release(rows, policy=exact)
        broken = disclosure._release_afresh(rows, exact).summary
    content = json.loads(metadata.to_bytes(broken))
    attack = Attacker(content)
    assert attack.interval(attack.cell(0, ("sex", "female"), ("glaucoma", "yes"))) == (3, 3)
    assert attack.interval(attack.cell(0, ("sex", "male"), ("glaucoma", "no"))) == (7, 7)
    assert find_disclosed(counts, content)
    exposed = attacker.find_exposed(broken)
    assert exposed["sex*glaucoma", "female", "yes"] == (3, 3) and exposed["sex*glaucoma", "male", "no"] == (7, 7)
    with pytest.raises(ContributionRejected, match="can be computed"):
        disclosure.check(broken, policies=[exact])

    sound = disclosure.release(rows, policy=replace(exact, rounding=5)).summary
    assert find_disclosed(counts, json.loads(metadata.to_bytes(sound))) == []
    disclosure.check(sound, policies=[replace(exact, rounding=5)])


def test_audit__agrees_with_the_attacker_of_the_tests() -> None:
    random = np.random.default_rng(5)
    counts = random.choice([0, 1, 3, 8, 12, 30, 60], size=len(KINDS)).tolist()
    made = disclosure.release(rows_of(counts), policy=SMALL)
    attack = Attacker(json.loads(metadata.to_bytes(made.summary)))
    intervals = attacker.audit(made.summary)
    assert len(intervals) > 20
    for each in intervals:
        if each.cell[0] != "eye":
            told = list(zip(each.cell[0].split("*"), each.cell[1:], strict=True))
            assert (each.low, each.high) == attack.interval(attack.cell(0, *told)), each.cell


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(counts=microdata, kind=st.integers(0, len(KINDS) - 1), is_added=st.booleans())
def test_release__one_patient_more_or_fewer_changes_nothing(counts: list[int], kind: int, is_added: bool) -> None:
    assume(sum(counts) >= 51 and (is_added or counts[kind]))
    other = [count + (1 if is_added else -1) * (place == kind) for place, count in enumerate(counts)]
    policy = replace(SMALL, max_image_share=1.0)
    first = disclosure.release(rows_of(counts), policy=policy)
    second = disclosure.release(rows_of(other), policy=policy, earlier=[first])
    assert second.summary == first.summary and second.decision == "kept"


def test_release__without_the_ledger_one_patient_shows() -> None:
    counts = [0 if kind[0] == 2 else 60 for kind in KINDS]
    counts[KINDS.index((2, "female", True))] = 10
    other = list(counts)
    other[KINDS.index((2, "female", True))] = 11
    policy = replace(SMALL, max_image_share=1.0)
    first, second = (content_of(rows_of(each), policy) for each in (counts, other))
    assert first["counts"]["dr"]["2"] is None and second["counts"]["dr"]["2"] == 10, "told as 10, and known to be 11"


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    counts=microdata,
    added=st.lists(st.sampled_from([0, 0, 0, 0, 0, 11, 12, 30, 60]), min_size=len(KINDS), max_size=len(KINDS)),
)
def test_release__two_releases_together_determine_no_small_count(counts: list[int], added: list[int]) -> None:
    assume(sum(counts) >= 50 and sum(added))
    policy = replace(SMALL, max_image_share=1.0)
    first = disclosure.release(rows_of(counts), policy=policy)
    later = [count + more for count, more in zip(counts, added, strict=True)]
    second = disclosure.release(rows_of(later), policy=policy, earlier=[first])
    contents = [json.loads(metadata.to_bytes(each.summary)) for each in (first, second)]
    if second.decision == "kept":
        assert contents[0] == contents[1]
        return
    attack = Attacker(*contents)
    for moment, truth in enumerate((counts, later)):
        for cell in CELLS:
            low, high = attack.interval(attack.cell(moment, *cell))
            assert low <= true_count(truth, cell) <= high
            assert not (low >= 1 and high < K), (moment, cell, low, high)


def people(num: int, *, seed: int = 0) -> list[Cells]:
    """Two photographs a patient, of a hospital: rare cameras, a rare disease, blanks, few of the young."""
    random = np.random.default_rng(seed)
    rows: list[Cells] = []
    for person in range(num):
        age = float(np.clip(random.normal(62, 14), 5, 99))
        cells: Cells = {"patient": f"p{person}", "age": age, "country": "Kenya", "hba1c": 7.3, "visit": f"v{person}"}
        if random.random() < 0.9:
            grade = int(random.choice(5, p=(0.6, 0.15, 0.15, 0.06, 0.04)))
            cells |= {"dr": grade, "dr_present": grade > 0}
        if random.random() < 0.97:
            cells["sex"] = "female" if random.random() < 0.55 else "male"
        cells["glaucoma"] = bool(random.random() < (0.2 if age > 70 else 0.03))
        cells["diabetes"] = bool(random.random() < 0.7)
        cells["dementia"] = bool(random.random() < 0.01)
        cells["camera"] = "Topcon" if random.random() < 0.8 else "Zeiss" if random.random() < 0.9 else f"Own {person}"
        rows += [{**cells, "eye": eye} for eye in ("left", "right")]
    return rows


@pytest.fixture(scope="module")
def hospital() -> tuple[list[Cells], disclosure.Release]:
    rows = people(800)
    return rows, disclosure.release(rows, policy=STANDARD)


def test_release__of_a_hospital_is_useful_and_passes_the_hub(
    hospital: tuple[list[Cells], disclosure.Release],
) -> None:
    rows, made = hospital
    arrived = metadata.summary_from_json(json.loads(metadata.to_bytes(made.summary)))
    disclosure.check(arrived, policies=[STANDARD])
    told = told_counts(made.summary)
    assert {"sex", "dr", "age_band", "camera", "country", "eye", "diabetes", "dr*sex", "dr*age_band"} <= set(told)
    assert set(told["camera"]) == {"Topcon", "Zeiss"} and made.summary.country == "Kenya"
    assert "dementia" not in told, "its few patients could be had from the others"
    text = metadata.to_bytes(made.summary).decode()
    assert not any(word in text for word in ("p17", "v17", "Own", "7.3")), "no code, visit, rare word or measurement"
    truth = Counter(row["sex"] for row in rows if "sex" in row and row["eye"] == "left")
    assert all(abs(told["sex"][value] - count) <= 2 for value, count in truth.items())


def test_release__a_patient_counts_once_and_none_dominates() -> None:
    rows: list[Cells] = [{"patient": f"p{place}", "sex": "female", "camera": "Topcon"} for place in range(400)]
    rows += [{"patient": f"q{place}", "sex": "male", "camera": "Zeiss"} for place in range(60)]
    rows += [{"patient": "q0", "sex": "male", "camera": "Zeiss"}] * 500
    made = disclosure.release(rows, policy=replace(PLAIN, max_image_share=1.0))
    assert (made.summary.num_patients, made.summary.num_images) == (460, 960)
    assert made.summary.counts["camera"] == {"Topcon": 400, "Zeiss": 60}
    made = disclosure.release(rows, policy=PLAIN)
    assert made.summary.counts["camera"] == {"Topcon": 400}, "one patient has 501 of 560 photographs"
    assert disclosure.Suppression(table="camera", values=("Zeiss",), rule="dominance") in made.suppressions


def test_release__a_small_group_that_is_all_alike_is_not_told() -> None:
    policy = replace(PLAIN, max_image_share=1.0, pairs=("glaucoma*age_band",))
    rows: list[Cells] = [{"patient": f"p{place}", "age": 62.0, "glaucoma": place % 2 == 0} for place in range(300)]
    rows += [{"patient": f"q{place}", "age": 42.0, "glaucoma": True} for place in range(25)]
    made = disclosure.release(rows, policy=policy)
    assert disclosure.Suppression(table="glaucoma*age_band", values=("yes", "40-44"), rule="group") in made.suppressions
    assert ("yes", "40-44") not in told_counts(made.summary).get("glaucoma*age_band", {})
    rows += [{"patient": f"r{place}", "age": 42.0, "glaucoma": True} for place in range(5)]
    made = disclosure.release(rows, policy=policy)
    assert not [each for each in made.suppressions if each.rule == "group"], "30 patients are enough"


def test_release__of_few_patients_only_the_band_is_told() -> None:
    made = disclosure.release(people(49), policy=STANDARD)
    assert (made.summary.num_patients, made.summary.patients_below, made.summary.counts) == (None, 50, {})
    assert (made.summary.num_images, made.summary.country, made.summary.pair_counts) == (0, "", {})
    disclosure.check(made.summary, policies=[STANDARD])
    assert "Fewer than 50 patients" in disclosure.to_text(made, policy=STANDARD)
    assert disclosure.told_rows(people(49), made.summary, policy=STANDARD) == [{}] * 98


def test_release__photographs_without_a_patient_are_one_patient_together() -> None:
    rows = [*people(100), *({"sex": "male"} for _ in range(500))]
    assert disclosure.release(rows, policy=PLAIN).truth['["num_patients", null]'] == 101


def test_release__of_no_metadata_at_all() -> None:
    made = disclosure.release([{"patient": f"p{place}"} for place in range(60)], policy=STANDARD)
    assert (made.summary.num_patients, made.summary.counts, made.summary.pair_counts) == (60, {}, {})
    disclosure.check(made.summary, policies=[STANDARD])


def test_release__the_same_patients_again_give_the_same_numbers(
    hospital: tuple[list[Cells], disclosure.Release],
) -> None:
    rows, made = hospital
    again = disclosure.release(rows[::-1], policy=STANDARD, earlier=[made])
    assert (again.summary, again.decision) == (made.summary, "same")
    grown = disclosure.release([*rows, *people(4)], policy=STANDARD, earlier=[made])
    assert grown.summary == made.summary


def test_release__is_compared_with_every_earlier_one() -> None:
    def rows(num_women: int) -> list[Cells]:
        return [{"patient": f"p{n}", "sex": "female" if n < num_women else "male"} for n in range(300 + num_women)]

    first = disclosure.release(rows(100), policy=PLAIN)
    second = disclosure.release(rows(160), policy=PLAIN, earlier=[first])
    assert (second.decision, second.summary.counts["sex"]) == ("new", {"female": 160, "male": 300})
    third = disclosure.release(rows(103), policy=PLAIN, earlier=[first, second])
    assert (third.decision, third.summary) == ("kept", second.summary), "3 women more than in the first"


def test_release__what_another_release_withheld_is_not_pieced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(STANDARD, rounding=1, max_image_share=1.0, tables=("dr",), pairs=())
    grades = {0: 300, 1: 60, 2: 60, 3: 60, 4: 3}
    rows: list[Cells] = [
        {"patient": f"p{grade}-{n}", "dr": grade} for grade, count in grades.items() for n in range(count)
    ]
    first = disclosure.release(rows, policy=policy)
    assert first.summary.counts["dr"] == {"0": 300, "1": None, "2": 60, "3": 60, "4": None}
    counts: dict[str, dict[str, int | None]] = {"dr": {"0": 300, "1": 60, "2": 60, "3": None, "4": None}}
    other = replace(first, summary=replace(first.summary, counts=counts, min_patients=12))
    assert attacker.find_exposed(other.summary) == {}, "alone, it is as good"
    monkeypatch.setattr(disclosure, "_release_afresh", lambda *_: other)
    again = disclosure.release(rows, policy=policy.raised_to(12), earlier=[first])
    assert (again.decision, again.summary) == ("kept", first.summary), "together they tell that 3 have grade 4"


def test_raised_to__a_site_may_ask_for_more_patients_and_never_for_fewer() -> None:
    rows = people(600)
    made = disclosure.release(rows, policy=STANDARD.raised_to(40))
    assert min(count for table in told_counts(made.summary).values() for count in table.values()) >= 40
    disclosure.check(made.summary, policies=[STANDARD])
    few = disclosure.release(people(60), policy=STANDARD.raised_to(100)).summary
    assert (few.patients_below, few.counts) == (100, {})
    disclosure.check(few, policies=[STANDARD])
    with pytest.raises(ConfigError, match="11 or more"):
        STANDARD.raised_to(10)


@settings(max_examples=15, deadline=None)
@given(counts=microdata, seed=st.integers(0, 9))
def test_caption_rows__every_caption_is_that_of_many_patients(counts: list[int], seed: int) -> None:
    assume(sum(counts) >= 50)
    rows = rows_of(counts)
    random = np.random.default_rng(seed)
    for row in rows:
        row |= {"patient": f"p{random.integers(len(rows))}", "age": float(random.integers(20, 80)), "visit": "v1"}
        row |= {"stroke": bool(random.random() < 0.1), "hba1c": float(random.normal(7, 1)), "camera": "Topcon"}
    policy = replace(STANDARD, max_image_share=1.0, pairs=SMALL.pairs)
    summary = disclosure.release(rows, policy=policy).summary
    captioned = disclosure.caption_rows(rows, summary, policy=policy)
    patients: dict[str, set[str]] = defaultdict(set)
    for row, cells in zip(rows, captioned, strict=True):
        patients[metadata.caption(cells)].add(row["patient"])
        assert all(cells[key] == row[key] or key == "age" for key in cells)
    num_patients = len({row["patient"] for row in rows})
    assert all(len(each) >= min(K, num_patients) for each in patients.values())


def test_caption_rows__say_what_they_may(hospital: tuple[list[Cells], disclosure.Release]) -> None:
    rows, made = hospital
    captioned = disclosure.caption_rows(rows, made.summary, policy=STANDARD)
    captions = Counter(metadata.caption(cells) for cells in captioned)
    assert len(captions) > 20, "they still differ"
    assert np.mean(["dr" in cells for cells in captioned]) > 0.8, "the grade comes first"
    assert not any("Own" in caption for caption in captions)


def test_told_rows__a_value_that_lost_its_patients_is_not_told_from_old_numbers() -> None:
    rows: list[Cells] = [{"patient": f"p{n}", "camera": "Topcon" if n >= 20 else "Zeiss"} for n in range(300)]
    made = disclosure.release(rows, policy=replace(PLAIN, max_image_share=1.0))
    assert made.summary.counts["camera"]["Zeiss"] == 20
    later = [row for row in rows if row["patient"] not in {f"p{n}" for n in range(10)}]
    again = disclosure.release(later, policy=replace(PLAIN, max_image_share=1.0), earlier=[made])
    assert again.decision == "kept"
    told = disclosure.told_rows(later, again.summary, policy=PLAIN)
    assert {row.get("camera") for row in told} == {"Topcon", None}, "ten patients are left with the other one"


def test_check__a_hub_of_the_standard_policy_refuses_the_demonstration() -> None:
    demonstration = disclosure.read_policy("demonstration")
    summary = disclosure.release(people(60), policy=demonstration).summary
    disclosure.check(summary, policies=[STANDARD, demonstration])
    for policies in ([STANDARD], [replace(demonstration, version=2)]):
        with pytest.raises(ContributionRejected) as caught:
            disclosure.check(summary, policies=policies)
        assert caught.value.code == "POLICY"


@pytest.mark.parametrize(
    "changed",
    [
        lambda summary: {"min_patients": 5},
        lambda summary: {"rounding": 1},
        lambda summary: {"num_patients": 801},
        lambda summary: {"num_patients": 40},
        lambda summary: {"num_patients": None},
        lambda summary: {"patients_below": 50},
        lambda summary: {"counts": summary.counts | {"sex": {"female": 440, "male": 5}}},
        lambda summary: {"counts": summary.counts | {"shoe_size": {"43": 100}}},
        lambda summary: {"counts": summary.counts | {"sex": {"female": 440}}},
        lambda summary: {"counts": summary.counts | {"camera": {"Topcon": 600, "Own 17": None}}},
        lambda summary: {"counts": summary.counts | {"sex": {"female": 700, "male": 600}}},
        lambda summary: {"pair_counts": summary.pair_counts | {"dr*camera": []}},
        lambda summary: {"pair_counts": summary.pair_counts | {"dr*sex": summary.pair_counts["dr*sex"][1:]}},
        lambda summary: {"counts": summary.counts | {"stroke": {"yes": None, "no": 800}}},
    ],
)
def test_check__refuses_what_does_not_keep_the_policy(
    hospital: tuple[list[Cells], disclosure.Release], changed: Any
) -> None:
    summary = hospital[1].summary
    with pytest.raises(ContributionRejected) as caught:
        disclosure.check(replace(summary, **changed(summary)), policies=[STANDARD])
    assert caught.value.code == "DISCLOSURE"
    assert not any(word in str(caught.value) for word in ("Own", "Topcon", "stroke")), "no value in a message"


def test_describe__lists_every_suppression_with_its_reason(hospital: tuple[list[Cells], disclosure.Release]) -> None:
    _, made = hospital
    account = json.loads(json.dumps(disclosure.describe(made, policy=STANDARD)))
    listed = {(each["table"], *each["values"]) for each in account["suppressions"]}
    missing = [cell for cell, count in attacker.listed_cells(made.summary) if count is None]
    assert missing and set(missing) <= listed
    assert ("dementia",) in listed and account["stays_at_the_site"]
    words = disclosure.to_text(made, policy=STANDARD)
    for rule in {each.rule for each in made.suppressions}:
        assert disclosure.RULES[rule].partition("{")[0] in words
    assert all(" and ".join(each.values) in words for each in made.suppressions)
    packed = json.dumps(disclosure.describe_for_hub(made.summary, policy=STANDARD))
    assert "complementary" not in packed and "dominance" not in packed and "kept" not in packed
    assert {tuple(cell) for cell in json.loads(packed)["suppressed"]} == set(missing)


def test_ledger__gives_back_what_was_entered(tmp_path: Path, hospital: tuple[list[Cells], disclosure.Release]) -> None:
    _, made = hospital
    path = tmp_path / "keys" / "aster.releases.json"
    assert disclosure.read_ledger(path) == []
    disclosure.enter(path, made, after=[])
    assert disclosure.read_ledger(path) == [made] and stat.S_IMODE(path.stat().st_mode) == 0o600
    disclosure.enter(path, replace(made, decision="same"), after=[made])
    assert disclosure.read_ledger(path) == [made]
    other = disclosure.release(people(300, seed=1), policy=PLAIN)
    with pytest.raises(ConfigError, match="run the same command again"):
        disclosure.enter(path, other, after=[])
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ConfigError, match="backup"):
        disclosure.read_ledger(path)


def test_read_policy__says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (disclosure.POLICY_FOLDER / "standard.yaml").read_text()
    monkeypatch.setattr(disclosure, "POLICY_FOLDER", tmp_path)
    for damaged in (
        text.replace("version: 1", ""),
        text + "more: 1\n",
        text.replace("[eye,", "[visit,"),
        text.replace("dr*sex", "dr*visit"),
        text.replace("name: standard", "name: other"),
        "- 1\n",
    ):
        (tmp_path / "standard.yaml").write_text(damaged)
        with pytest.raises(ConfigError, match="disclosure policy"):
            disclosure.read_policy("standard")


@pytest.mark.slow
def test_release__of_200_000_photographs_takes_seconds() -> None:
    rows = people(100_000)
    began_s = time.monotonic()
    summary = disclosure.release(rows, policy=STANDARD).summary
    disclosure.caption_rows(rows, summary, policy=STANDARD)
    assert time.monotonic() - began_s < 60, "measured: 6 s on an idle core"
