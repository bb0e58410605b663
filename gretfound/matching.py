"""Matching: the cells that captions are made of, drawn from a site's released summary alone.

Columns that released pair tables connect form a *group* with one joint table; groups are independent of each other.
Of all joint tables that agree with the released ones a group takes the one closest to independence, found by iterative
proportional fitting (Deming and Stephan, Ann. Math. Statist. 11, 1940; that it is the closest: Csiszar, Ann. Probab. 3,
1975). A dependence tree (Chow and Liu, IEEE Trans. Inf. Theory 14, 1968) would scale to more columns, but loses the
pairs that close a cycle, as grade, age and sex do; with these few columns a joint table has some thousand entries.

What disclosure control left out, and what does not agree:

- Patients whose value of a column is blank, or not told, are *untold* there: a value of its own, drawn as often, that
  becomes a blank, as it does in the captions that a generator is trained with (`disclosure.caption_rows`).
- Pairs that a pair table does not tell share what the one-way tables leave to their row and their column.
- Counts are rounded one by one, so a table may hold a little more than all patients; then its own sum is the whole.
- One-way tables win: a row or column of a pair table with more than its one-way count is scaled down to it, and the
  last fit is to the one-way tables. Pairs are then as close as that allows.
- `dr_present` follows from the grade where there is one; without a grade it has what its own table leaves.

*Balance* oversamples on request: of a column's told values with shares p each gets a share in proportion to
p^(1 - balance), so 0 leaves them as they are and 1 makes them equal. Blanks keep their share; what goes with each value
stays as it is at the site (with several balanced columns: the joint table closest to the site's).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gretfound.metadata import BLANK, SUMMARY_KEYS, Cells, MetadataSummary, cells_of

# Legend of array suffixes: R rows, G groups.
Shares = npt.NDArray[np.float64]
Value = str | None  # None: untold
Table = dict[Value, float]
Constraint = tuple[npt.NDArray[np.int64], Shares]  # the block of each entry of a flat joint table; each block's share
_MAX_ENTRIES = 2**20
_MAX_SWEEPS = 1000
_TOLERANCE = 1e-7  # of the shares' total change in a sweep
_LEAST_SHARE = 1e-9  # of unlisted pairs: never 0, so that one-way tables can be fitted whatever the pairs say


@dataclass(frozen=True, kw_only=True)
class Group:
    """Columns that depend on each other.

    ``values`` holds each column's values as text, ``""`` for blank and None for untold; ``shares`` has an axis for each
    column and sums to 1.
    """

    keys: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    shares: Shares


def fit_groups(summary: MetadataSummary, *, balance: Mapping[str, float]) -> list[Group]:
    """Fits the joint distribution of all released columns.

    Args:
        summary: What the site released.
        balance: 0 to 1 by column key; a column that the site did not release is passed over.

    Raises:
        ValueError: If ``balance`` is wrong, or if the released values of a group have over a million combinations.
    """
    check_balance(balance)
    tables, pairs = _tables_of(summary)
    return [
        _fit_group({key: tables[key] for key in keys}, pairs, balance) for keys in _connected(list(tables), list(pairs))
    ]


def check_balance(balance: Mapping[str, float]) -> None:
    """Checks what was asked for.

    Raises:
        ValueError: If a column is no summary's, a number is out of range, or both `dr` and `dr_present` are there.
    """
    if odd := sorted(set(balance) - set(SUMMARY_KEYS)):
        raise ValueError(f"balance names {odd}; required columns of a summary: {', '.join(SUMMARY_KEYS)}")
    if not all(0 <= each <= 1 for each in balance.values()):
        raise ValueError(f"balance is {dict(balance)}; required 0 (as at the site) to 1 (all values alike)")
    if {"dr", "dr_present"} <= set(balance):
        raise ValueError("balance has dr and dr_present; required one of them: the second follows from the first")


def draw_cells(groups: Sequence[Group], *, num: int, seed: int) -> list[Cells]:
    """Draws the cells of photographs; row i does not depend on ``num``."""
    uniform_RG = np.random.default_rng(seed).random((num, len(groups)))
    rows: list[Cells] = [{} for _ in range(num)]
    for group, uniform_R in zip(groups, uniform_RG.T, strict=True):
        upper = np.cumsum(group.shares)
        entries_R = np.searchsorted(upper / upper[-1], uniform_R, side="right")
        cells_by_entry = {entry: _cells_at(group, entry) for entry in np.unique(entries_R).tolist()}
        for row, entry in zip(rows, entries_R.tolist(), strict=True):
            row.update(cells_by_entry[entry])
    return rows


def _cells_at(group: Group, entry: int) -> Cells:
    """Returns the cells that one entry of a joint table stands for."""
    places = np.unravel_index(entry, group.shares.shape)
    cells: Cells = {}
    for key, values, place in zip(group.keys, group.values, places, strict=True):
        cells |= cells_of(key, values[place] or BLANK)
    return cells


def describe(summary: MetadataSummary, *, balance: Mapping[str, float]) -> dict[str, Any]:
    """Returns what was asked for, JSON-able: each value's share at the site, and its target, the share that is drawn.

    What is untold counts as blank.
    """
    site, target = (_column_shares(fit_groups(summary, balance=each)) for each in ({}, balance))
    columns = {
        key: {value: {"site": share, "target": target[key][value]} for value, share in table.items()}
        for key, table in site.items()
    }
    return {"balance": dict(balance), "columns": columns}


def _column_shares(groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        for axis, (key, values) in enumerate(zip(group.keys, group.values, strict=True)):
            shares = group.shares.sum(axis=tuple(other for other in range(len(group.keys)) if other != axis))
            found[key] = {}
            for value, share in zip(values, shares.tolist(), strict=True):
                found[key][value or BLANK] = round(found[key].get(value or BLANK, 0.0) + share, 6)
    return found


def _tables_of(summary: MetadataSummary) -> tuple[dict[str, Table], dict[tuple[str, str], Shares]]:
    """Returns each column's shares by value, and each pair's shares as a table with NaN where it tells nothing.

    Shares are of all patients, so that what a column's counts leave is untold.
    """
    counts = {
        key: {value: count for value, count in sorted(table.items()) if count}
        for key, table in sorted(summary.counts.items())
        if key in SUMMARY_KEYS and any(table.values())
    }
    presence = {}
    if {"dr", "dr_present"} <= set(counts):
        grades = [grade for grade in counts["dr"] if grade != BLANK]
        presence = {grade: "yes" if cells_of("dr", grade)["dr_present"] else "no" for grade in grades}
        implied: Counter[str] = Counter()
        for grade in grades:
            implied[presence[grade]] += counts["dr"][grade]
        counts["dr_present"] = dict(sorted((implied | Counter(counts["dr_present"])).items()))  # | is the larger count
    total = max([summary.num_patients or 0, *(sum(table.values()) for table in counts.values())])
    tables: dict[str, Table] = {}
    for key, table in counts.items():
        tables[key] = {value: count / total for value, count in table.items()}
        if untold := total - sum(table.values()):
            tables[key][None] = untold / total
    pairs: dict[tuple[str, str], Shares] = {}
    for name, rows in sorted(summary.pair_counts.items()):
        first, _, second = name.partition("*")
        if first in tables and second in tables:
            listed: dict[tuple[Value, Value], float] = {
                (value, other): count / total for value, other, count in rows if count is not None
            }
            pairs[first, second] = _pair_table(tables[first], tables[second], listed)
    if presence:
        dr, dr_present = tables["dr"], tables["dr_present"]
        listed = {(grade, each): dr[grade] * (each == word) for grade, word in presence.items() for each in dr_present}
        pairs["dr", "dr_present"] = _pair_table(dr, dr_present, listed)
    return tables, pairs


def _pair_table(first: Table, second: Table, listed: Mapping[tuple[Value, Value], float]) -> Shares:
    """Returns the listed pairs' shares, scaled down where a row or a column has more than its one-way share."""
    table = np.array([[listed.get((value, other), np.nan) for other in second] for value in first])
    for axis, one_way in ((1, first), (0, second)):
        found = np.nansum(table, axis=axis, keepdims=True)
        limit = np.expand_dims(np.array(list(one_way.values())), axis)
        table = table * np.divide(limit, found, out=np.ones_like(found), where=found > limit)
    return table


def _connected(keys: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    groups = [[key] for key in keys]
    for first, second in pairs:
        joined = [group for group in groups if first in group or second in group]
        groups = [group for group in groups if group not in joined] + [sorted(key for group in joined for key in group)]
    return sorted(groups)


def _fit_group(
    tables: Mapping[str, Table], pairs: Mapping[tuple[str, str], Shares], balance: Mapping[str, float]
) -> Group:
    shape = tuple(len(table) for table in tables.values())
    size = math.prod(shape)
    if size > _MAX_ENTRIES:
        raise ValueError(f"{', '.join(tables)} have {size:,} combinations of values; required at most {_MAX_ENTRIES:,}")
    blocks = dict(zip(tables, np.unravel_index(np.arange(size), shape), strict=True))
    targets = {key: np.array(list(table.values())) for key, table in tables.items()}
    one_way = [(blocks[key], targets[key]) for key in tables]
    two_way = [
        (block_ids[blocks[first], blocks[second]], block_shares)
        for (first, second), table in pairs.items()
        if first in tables
        for block_ids, block_shares in _pair_blocks(table, targets[first], targets[second])
    ]
    balanced = [(blocks[key], _balanced(tables[key], balance[key])) for key in tables if key in balance]
    independent = np.prod([shares[of_entry] for of_entry, shares in one_way], axis=0)
    shares = _fitted(_fitted(_fitted(independent, [*two_way, *one_way]), one_way), balanced)
    return Group(
        keys=tuple(tables), values=tuple(tuple(table) for table in tables.values()), shares=shares.reshape(shape)
    )


def _pair_blocks(table: Shares, first: Shares, second: Shares) -> list[Constraint]:
    """Returns a pair table as two constraints: each listed pair is a block, and what is left of each row or column."""
    is_listed = ~np.isnan(table)
    pair_ids = np.arange(table.size).reshape(table.shape)
    constraints = []
    for axis, one_way in ((1, first), (0, second)):
        left = np.maximum(one_way - np.nansum(table, axis=axis), _LEAST_SHARE)
        left_ids = np.expand_dims(table.size + np.arange(len(one_way)), axis)
        constraints.append(
            (np.where(is_listed, pair_ids, left_ids), np.concatenate([np.nan_to_num(table).ravel(), left]))
        )
    return constraints


def _balanced(table: Table, balance: float) -> Shares:
    shares = np.array(list(table.values()))
    is_told = np.array([bool(value) for value in table])
    raised = np.where(is_told, shares ** (1 - balance), 0.0)
    return np.where(is_told, raised * shares[is_told].sum() / max(raised.sum(), _LEAST_SHARE), shares)


def _fitted(shares: Shares, constraints: Sequence[Constraint]) -> Shares:
    """Scales the entries of a joint table, block by block, until each block of each constraint has its share."""
    for _ in range(_MAX_SWEEPS):
        before = shares
        for blocks, targets in constraints:
            found = np.bincount(blocks, weights=shares, minlength=len(targets))
            shares = shares * np.divide(targets, found, out=np.zeros_like(targets), where=found > 0)[blocks]
        if np.abs(shares - before).sum() < _TOLERANCE:
            break
    return shares
