"""Matching: what is drawn has the counts of the released tables, also where disclosure control left cells out."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from gretfound import matching, metadata
from gretfound.metadata import Cells, MetadataSummary

NUM_DRAWN = 20_000


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
    summary = metadata.summarise(people(1500), min_patients=min_patients)
    num_pairs = sum(len(pairs) for pairs in summary.pair_counts.values())
    assert (num_pairs < 150) == (min_patients > 1), "the second case has pairs left out, the first none"
    groups = matching.fit_groups(summary, balance={})
    assert [group.keys for group in groups] == [("age_band", "dr", "dr_present", "glaucoma", "sex"), ("camera",)]
    for key, counts in summary.counts.items():
        shares = table(groups, key)
        assert all(shares[value] == pytest.approx(count / 1500, abs=1e-6) for value, count in counts.items()), key
    assert len(summary.pair_counts) == len(metadata.PAIRS)
    for name, pairs in summary.pair_counts.items():
        shares = table(groups, *name.split("*"))
        assert all(shares[first, second] == pytest.approx(count / 1500, abs=1e-5) for first, second, count in pairs)


@pytest.mark.parametrize("min_patients", [1, 11])
def test_draw_cells__marginals_and_pairs_are_those_of_the_tables(min_patients: int) -> None:
    summary = metadata.summarise(people(1500), min_patients=min_patients)
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=NUM_DRAWN, seed=1)
    found = metadata.summarise(drawn, min_patients=1)
    for key, counts in summary.counts.items():
        told = {value: count for value, count in counts.items() if value}
        assert set(found.counts[key]) - {""} == set(told), "nothing is drawn that is not released"
        assert_same(told, found.counts[key])
    for name, pairs in summary.pair_counts.items():
        told_pairs = {(first, second): count for first, second, count in pairs if first and second}
        assert_same(told_pairs, {(first, second): count for first, second, count in found.pair_counts[name]})


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
    summary = metadata.summarise(people(1500), min_patients=1)
    chain = {name: summary.pair_counts[name] for name in ("dr*age_band", "glaucoma*age_band")}
    groups = matching.fit_groups(replace(summary, pair_counts=chain), balance={})
    (group,) = (each for each in groups if "dr" in each.keys)
    band, dr, present, glaucoma = group.keys
    assert (band, dr, present, glaucoma) == ("age_band", "dr", "dr_present", "glaucoma")
    # p(band, dr, glaucoma) = p(band, dr) p(band, glaucoma) / p(band): independent, given what they share
    expected = np.zeros(group.shares.sum(axis=2).shape)
    of_dr = {(first, second): count for first, second, count in chain["dr*age_band"]}
    of_glaucoma = {(first, second): count for first, second, count in chain["glaucoma*age_band"]}
    for b, d, g in np.ndindex(expected.shape):
        age, grade, has = group.values[0][b], group.values[1][d], group.values[3][g]
        ages = summary.counts["age_band"][str(age)]
        expected[b, d, g] = of_dr.get((grade, age), 0) * of_glaucoma.get((has, age), 0) / ages / 1500
    assert np.abs(group.shares.sum(axis=2) - expected).sum() < 1e-5


def test_fit_groups__one_way_tables_win_over_pairs_that_contradict_them() -> None:
    summary = metadata.summarise(people(1500))
    rounded = {
        name: [(first, second, round(count, -1) + 10) for first, second, count in pairs]
        for name, pairs in summary.pair_counts.items()
    }
    groups = matching.fit_groups(replace(summary, pair_counts=rounded), balance={})
    for key, counts in summary.counts.items():
        shares = table(groups, key)
        assert all(shares[value] == pytest.approx(count / 1500, abs=1e-6) for value, count in counts.items()), key
    women = sum(count for first, second, count in summary.pair_counts["dr*sex"] if (first, second) == ("0", "female"))
    assert table(groups, "dr", "sex")["0", "female"] == pytest.approx(women / 1500, rel=0.1)


def test_draw_cells__what_is_not_released_is_left_blank() -> None:
    summary = metadata.summarise(people(1500))
    assert set(summary.counts["camera"]) == {"Topcon"}
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=3000, seed=2)
    share = np.mean([row.get("camera") == "Topcon" for row in drawn])
    assert share == pytest.approx(2 / 3, abs=4 * (2 / 9 / 3000) ** 0.5)
    assert {row["camera"] for row in drawn if "camera" in row} == {"Topcon"}


def test_draw_cells__presence_follows_from_the_grade() -> None:
    drawn = matching.draw_cells(matching.fit_groups(metadata.summarise(people(1500)), balance={}), num=3000, seed=2)
    assert all(row["dr_present"] == (row["dr"] > 0) for row in drawn if "dr" in row)
    ungraded = Counter(row.get("dr_present") for row in drawn if "dr" not in row)
    assert set(ungraded) == {True, None} and abs(ungraded[True] - ungraded[None]) < 4 * 300**0.5


def test_draw_cells__captions_are_of_the_kind_that_generators_are_trained_with() -> None:
    rows = people(1500)
    summary = metadata.summarise(rows)
    trained = {metadata.caption(metadata.released_cells(summary, {"age": row["age"]})) for row in rows if "age" in row}
    drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=2000, seed=0)
    assert {metadata.caption({"age": row["age"]}) for row in drawn if "age" in row} <= trained


def test_draw_cells__row_depends_on_summary_seed_and_place_alone() -> None:
    summary = metadata.summarise(people(400))
    groups = matching.fit_groups(summary, balance={})
    again = matching.fit_groups(metadata.summary_from_json(metadata.summary_to_json(summary)), balance={})
    assert matching.draw_cells(groups, num=40, seed=3)[:15] == matching.draw_cells(again, num=15, seed=3)
    assert matching.draw_cells(groups, num=15, seed=3) != matching.draw_cells(groups, num=15, seed=4)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_fit_groups__balance_reaches_its_target_and_leaves_the_rest(balance: float) -> None:
    summary = metadata.summarise(people(1500))
    site, balanced = (matching.fit_groups(summary, balance=each) for each in ({}, {"dr": balance}))
    before, after = table(site, "dr"), table(balanced, "dr")
    assert after[""] == pytest.approx(before[""], abs=1e-6)
    weights = {grade: before[grade] ** (1 - balance) for grade in "01234"}
    for grade in "01234":
        assert after[grade] == pytest.approx(weights[grade] / sum(weights.values()) * (1 - before[""]), abs=1e-6)
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
    summary = metadata.summarise(people(1500))
    groups = matching.fit_groups(summary, balance={"dr_present": 1, "sex": 1, "camera": 1})
    presence, sex = table(groups, "dr_present"), table(groups, "sex")
    assert presence["yes"] == pytest.approx(presence["no"], abs=1e-5)
    assert sex["female"] == pytest.approx(sex["male"], abs=1e-5)
    assert table(groups, "camera") == pytest.approx({"Topcon": 2 / 3, None: 1 / 3})


@pytest.mark.parametrize("balance", [{"shoe_size": 1.0}, {"dr": 1.5}, {"dr": 0.5, "dr_present": 0.5}, {"age": 0.5}])
def test_fit_groups__says_what_balance_is_required(balance: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="required"):
        matching.fit_groups(metadata.summarise(people(50), min_patients=1), balance=balance)


def test_draw_cells__of_a_site_without_metadata() -> None:
    empty = MetadataSummary(num_images=30, num_patients=None, min_patients=11, counts={}, pair_counts={})
    assert matching.draw_cells(matching.fit_groups(empty, balance={"dr": 1.0}), num=3, seed=0) == [{}, {}, {}]
