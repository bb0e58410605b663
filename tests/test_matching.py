"""Matching: what is drawn has the counts of the released tables, also where disclosure control left cells out."""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from gretfound import disclosure, matching, metadata
from gretfound.metadata import Cells, MetadataSummary
from tests import summaries
from tests.summaries import policy_of, told_counts

NUM_DRAWN = 20_000


@cache
def summary_of_people(num: int, *, min_patients: int = 1) -> MetadataSummary:
    """Exact counts of `people`; with 11 patients a count, complementary suppression takes seconds."""
    return summaries.summary_of(people(num), min_patients=min_patients)


def people(num: int) -> list[Cells]:
    """One photograph a person: grade depends on age, sex on grade and on age, glaucoma on age; some cells are blank."""
    rng = np.random.default_rng(0)
    rows: list[Cells] = []
    for person in range(num):
        age = float(rng.integers(25, 95))
        cells: Cells = {"patient": f"p{person}", "age": age, "glaucoma": rng.random() < (0.3 if age > 65 else 0.05)}
        if rng.random() < 0.9:
            grade = int(rng.choice(5, p=(0.2, 0.2, 0.2, 0.2, 0.2) if age > 60 else (0.7, 0.15, 0.1, 0.03, 0.02)))
            cells |= {"dr": grade, "dr_present": grade > 0}
        elif rng.random() < 0.5:
            cells["dr_present"] = True
        if rng.random() < 0.95:
            is_woman = rng.random() < (0.3 if cells.get("dr", 0) > 1 else 0.6) + (0.2 if age > 75 else 0)
            cells["sex"] = "female" if is_woman else "male"
        if rng.random() < 0.1:
            del cells["age"]
        cells["camera"] = "Topcon" if person % 3 else f"Rare {person % 200}"
        rows.append(cells)
    return rows


def table(groups: list[matching.Group], *keys: str) -> dict[Any, float]:
    """The shares of one column's values, or of two columns' pairs, in the groups' joint tables."""
    (group,) = (each for each in groups if set(keys) <= set(each.keys))
    found: Counter[Any] = Counter()
    axes = [group.keys.index(key) for key in keys]
    for entry in np.ndindex(group.shares.shape):
        values = tuple(group.values[axis][entry[axis]] for axis in axes)
        found[values if len(keys) > 1 else values[0]] += float(group.shares[entry])
    return found


@pytest.mark.parametrize("min_patients", [1, 11])
def test_fit_groups__agrees_with_every_released_table(min_patients: int) -> None:
    summary = summary_of_people(1500, min_patients=min_patients)
    told = told_counts(summary)
    num_pairs = sum(len(told[name]) for name in summary.pair_counts)
    assert (num_pairs < 125) == (min_patients > 1), "the second case has pairs left out, the first none"
    groups = matching.fit_groups(summary, balance={})
    assert [group.keys for group in groups] == [("age_band", "dr", "dr_present", "glaucoma", "sex"), ("camera",)]
    assert len(summary.pair_counts) == 4
    for name, counts in told.items():
        shares = table(groups, *name.split("*"))
        assert all(shares[value] == pytest.approx(count / 1500, abs=1e-5) for value, count in counts.items()), name


@pytest.mark.parametrize("min_patients", [1, 11])
def test_draw_cells__marginals_and_pairs_are_those_of_the_tables(min_patients: int) -> None:
    summary = summary_of_people(1500, min_patients=min_patients)
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=NUM_DRAWN, seed=1)
    found = told_counts(summaries.summary_of(drawn))
    for name, counts in told_counts(summary).items():
        if name in summary.counts:
            assert set(found[name]) == set(counts), "nothing is drawn that is not released"
        assert_same(counts, found[name])


def assert_same(released: dict[Any, int], drawn: dict[Any, int]) -> None:
    """Chi-square at 0.001, and total variation below 2.5 times what sqrt(values / (2 pi draws)) leads one to expect."""
    expected = np.array([*released.values(), 1500 - sum(released.values())]) * NUM_DRAWN / 1500
    observed = np.array([drawn.get(value, 0) for value in released])
    observed = np.append(observed, NUM_DRAWN - observed.sum())
    is_there = expected > 0
    assert observed[~is_there].sum() <= 1
    assert chisquare(observed[is_there], expected[is_there] * observed[is_there].sum() / expected.sum()).pvalue > 1e-3
    variation = np.abs(observed - expected).sum() / 2 / NUM_DRAWN
    assert variation < 2.5 * np.sqrt(len(expected) / (2 * np.pi * NUM_DRAWN))


def test_fit_groups__is_the_closed_form_where_pairs_make_a_chain() -> None:
    summary = summary_of_people(1500)
    chain = {name: summary.pair_counts[name] for name in ("dr*age_band", "glaucoma*age_band")}
    groups = matching.fit_groups(replace(summary, pair_counts=chain), balance={})
    (group,) = (each for each in groups if "dr" in each.keys)
    band, dr, present, glaucoma = group.keys
    assert (band, dr, present, glaucoma) == ("age_band", "dr", "dr_present", "glaucoma")
    # p(band, dr, glaucoma) = p(band, dr) p(band, glaucoma) / p(band): independent, given what they share
    told, shares = told_counts(summary), group.shares.sum(axis=2)
    num_told = 0
    for (grade, age), count in told["dr*age_band"].items():
        for has in ("yes", "no"):
            place = tuple(values.index(value) for values, value in
                          ((group.values[0], age), (group.values[1], grade), (group.values[3], has)))  # fmt: skip
            of_glaucoma = told["glaucoma*age_band"].get((has, age))
            if of_glaucoma is not None:
                num_told += 1
                assert shares[place] == pytest.approx(count * of_glaucoma / told["age_band"][age] / 1500, abs=1e-6)
    assert num_told > 100


def test_fit_groups__one_way_tables_win_over_pairs_that_contradict_them() -> None:
    summary = summary_of_people(1500, min_patients=11)
    rounded = {
        name: [(first, second, None if count is None else round(count, -1) + 10) for first, second, count in pairs]
        for name, pairs in summary.pair_counts.items()
    }
    groups = matching.fit_groups(replace(summary, pair_counts=rounded), balance={})
    told = told_counts(summary)
    for key in summary.counts:
        shares = table(groups, key)
        assert all(shares[value] == pytest.approx(count / 1500, abs=1e-6) for value, count in told[key].items()), key
    women = told["dr*sex"]["0", "female"]
    assert table(groups, "dr", "sex")["0", "female"] == pytest.approx(women / 1500, rel=0.1)


def test_draw_cells__what_is_not_released_is_left_blank() -> None:
    summary = summary_of_people(1500, min_patients=11)
    assert set(summary.counts["camera"]) == {"Topcon"}
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=3000, seed=2)
    share = np.mean([row.get("camera") == "Topcon" for row in drawn])
    assert share == pytest.approx(2 / 3, abs=4 * (2 / 9 / 3000) ** 0.5)
    assert {row["camera"] for row in drawn if "camera" in row} == {"Topcon"}


def test_draw_cells__presence_follows_from_the_grade() -> None:
    summary = summary_of_people(1500, min_patients=11)
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=3000, seed=2)
    assert all(row["dr_present"] == (row["dr"] > 0) for row in drawn if "dr" in row)
    ungraded = Counter(row.get("dr_present") for row in drawn if "dr" not in row)
    assert set(ungraded) == {True, None} and abs(ungraded[True] - ungraded[None]) < 4 * 300**0.5


def test_draw_cells__captions_are_of_the_kind_that_generators_are_trained_with() -> None:
    rows, summary = people(1500), summary_of_people(1500, min_patients=11)
    told = disclosure.told_rows(rows, summary, policy=policy_of(11))
    trained = {metadata.caption({"age": row["age"]}) for row in told if "age" in row}
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=2000, seed=0)
    assert {metadata.caption({"age": row["age"]}) for row in drawn if "age" in row} <= trained


def test_draw_cells__row_depends_on_summary_seed_and_place_alone() -> None:
    summary = summary_of_people(400)
    groups = matching.fit_groups(summary, balance={})
    again = matching.fit_groups(metadata.summary_from_json(metadata.summary_to_json(summary)), balance={})
    assert matching.draw_cells(groups, num=40, seed=3)[:15] == matching.draw_cells(again, num=15, seed=3)
    assert matching.draw_cells(groups, num=15, seed=3) != matching.draw_cells(groups, num=15, seed=4)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_fit_groups__balance_reaches_its_target_and_leaves_the_rest(balance: float) -> None:
    summary = summary_of_people(1500, min_patients=11)
    site, balanced = (matching.fit_groups(summary, balance=each) for each in ({}, {"dr": balance}))
    before, after = table(site, "dr"), table(balanced, "dr")
    assert after[None] == pytest.approx(before[None], abs=1e-6)
    weights = {grade: before[grade] ** (1 - balance) for grade in "01234"}
    for grade in "01234":
        assert after[grade] == pytest.approx(weights[grade] / sum(weights.values()) * (1 - before[None]), abs=1e-6)
    women, women_before = table(balanced, "dr", "sex"), table(site, "dr", "sex")
    for grade in "01234":
        share = women_before[grade, "female"] / before[grade]
        assert women[grade, "female"] / after[grade] == pytest.approx(share, abs=1e-5)
    target = matching.describe(summary, balance={"dr": balance})
    assert target["balance"] == {"dr": balance}
    drawn = matching.draw_cells(balanced, num=NUM_DRAWN, seed=1)
    for grade in "01234":
        asked = target["columns"]["dr"][grade]
        assert asked == {
            "site": pytest.approx(before[grade], abs=1e-6),
            "target": pytest.approx(after[grade], abs=1e-6),
        }
        spread = (after[grade] / NUM_DRAWN) ** 0.5
        assert np.mean([row.get("dr") == int(grade) for row in drawn]) == pytest.approx(after[grade], abs=4 * spread)


def test_fit_groups__several_balanced_columns_reach_their_targets_together() -> None:
    summary = summary_of_people(1500, min_patients=11)
    groups = matching.fit_groups(summary, balance={"dr_present": 1, "sex": 1, "camera": 1})
    presence, sex = table(groups, "dr_present"), table(groups, "sex")
    assert presence["yes"] == pytest.approx(presence["no"], abs=1e-5)
    assert sex["female"] == pytest.approx(sex["male"], abs=1e-5)
    assert table(groups, "camera") == pytest.approx({"Topcon": 2 / 3, None: 1 / 3})


@pytest.mark.parametrize("balance", [{"shoe_size": 1.0}, {"dr": 1.5}, {"dr": 0.5, "dr_present": 0.5}, {"age": 0.5}])
def test_fit_groups__says_what_balance_is_required(balance: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="required"):
        matching.fit_groups(summary_of_people(50), balance=balance)


def test_draw_cells__of_a_site_without_metadata() -> None:
    empty = summaries.summary_of([{}] * 30, min_patients=11)
    assert (empty.counts, empty.num_patients) == ({}, 30)
    assert matching.draw_cells(matching.fit_groups(empty, balance={"dr": 1.0}), num=3, seed=0) == [{}, {}, {}]


def test_fit_groups__standard_release_of_a_site_stays_close_to_its_patients() -> None:
    rows = people(3000)
    summary = disclosure.release(rows, policy=disclosure.read_policy("standard")).summary
    groups = matching.fit_groups(summary, balance={})
    truth, told = told_counts(summaries.summary_of(rows)), told_counts(summary)
    assert len(told["dr*age_band"]) < len(truth["dr*age_band"]), "some pairs are suppressed"
    for name, counts in told.items():
        shares = table(groups, *name.split("*"))
        for value in counts:
            # 2 of rounding; pairs give way to their two one-way counts where rounding makes them disagree
            allowed = 3 if name in summary.counts else max(10, 0.1 * truth[name][value])
            assert abs(shares[value] * 3000 - truth[name][value]) <= allowed, (name, value)
