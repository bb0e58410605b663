"""The attacker: what can be computed of the counts that a summary withholds.

He holds the summary and nothing else, so that the hub can send him after what it takes in. He solves linear programs
over all tables at once, and knows the policy: from how many patients on counts are told and how they are rounded. What
he does not know is whether a count is suppressed because it is small, or for another one's sake. Source: Hundepool et
al., Statistical Disclosure Control, 2012, chapter 4 (secondary suppression, the attacker's problem).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linprog

from gretfound import metadata
from gretfound.metadata import MetadataSummary

Places = npt.NDArray[np.int64]  # of variables of the linear program
Cell = tuple[str, str | None] | tuple[str, str | None, str | None]  # a table and one value or two; None: untold
PEOPLE: Cell = ("num_patients", None)
_FUZZ = 1e-6  # the solver's feasibility tolerance is 1e-7
_NUM_PROBES = 8


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What an attacker can compute of a cell; ``is_suppressed`` is False for patients whose value is untold."""

    cell: Cell
    low: int
    high: int
    is_suppressed: bool


class Infeasible(Exception):
    """No counts of patients agree with a summary's tables."""


class Attacker:
    """All that a summary says of the cells, as one polytope: a variable for each cell, bounds for each shown count.

    Columns that pair tables connect in a cycle share one joint table; a column that hangs on one pair has a table of
    its own with its neighbour, which allows the same counts, since two tables with one column in common always have a
    joint table. `dr` and `dr_present` are two readings of one column.
    """

    def __init__(self, values_by_key: Mapping[str, Sequence[str]], pairs: Sequence[str]) -> None:
        self.cells: dict[Cell, int] = {PEOPLE: 0}
        self._num_variables = 1
        self._entries: list[tuple[int, int, float]] = []  # row, variable, coefficient
        self._num_rows = 0
        self._readings = {key: _reading(key, values_by_key) for key in values_by_key}
        axes = {axis: size for axis, size, _ in self._readings.values()}
        joined = [tuple(self._readings[key][0] for key in pair.split("*")) for pair in pairs]
        core = [axis for axis in axes if sum(axis in pair for pair in joined) > 1]
        blocks = ([tuple(core)] if core else []) + [pair for pair in joined if not set(pair) <= set(core)]
        margins = {axis: self._variables((size,)) for axis, size in axes.items()}
        for margin in margins.values():
            self._equate([0], margin.ravel())
        arrays = {axes_of: self._variables(tuple(axes[axis] for axis in axes_of)) for axes_of in blocks}
        for axes_of, block in arrays.items():
            for place, axis in enumerate(axes_of):
                for position in range(axes[axis]):
                    self._equate([margins[axis][position]], np.take(block, position, axis=place).ravel())
        for key, (axis, _, positions) in self._readings.items():
            for value, chosen in positions.items():
                self._name((key, value), margins[axis][list(chosen)])
        for pair, (first_axis, second_axis) in zip(pairs, joined, strict=True):
            first, second = pair.split("*")
            axes_of = next(each for each in arrays if {first_axis, second_axis} <= set(each))
            block = np.moveaxis(arrays[axes_of], [axes_of.index(first_axis), axes_of.index(second_axis)], [0, 1])
            for value, rows in self._readings[first][2].items():
                for other, columns in self._readings[second][2].items():
                    self._name((pair, value, other), block[np.ix_(list(rows), list(columns))].ravel())
        rows_, columns_, coefficients = np.array(self._entries).reshape(-1, 3).T
        self._matrix = sparse.csc_array(
            (coefficients, (rows_.astype(int), columns_.astype(int))), shape=(self._num_rows, self._num_variables)
        )
        self.bounds = np.tile([0.0, np.inf], (self._num_variables, 1))
        self._least = np.full(self._num_variables, np.inf)  # of each variable among the solutions that were met
        self._greatest = np.full(self._num_variables, -np.inf)

    def _variables(self, shape: tuple[int, ...]) -> Places:
        first, self._num_variables = self._num_variables, self._num_variables + int(np.prod(shape))
        return np.arange(first, self._num_variables).reshape(shape)

    def _equate(self, one_side: Sequence[int], other_side: Sequence[int] | Places) -> None:
        self._entries += [(self._num_rows, int(variable), 1.0) for variable in one_side]
        self._entries += [(self._num_rows, int(variable), -1.0) for variable in other_side]
        self._num_rows += 1

    def _name(self, cell: Cell, variables: Places) -> None:
        (self.cells[cell],) = self._variables((1,)).tolist()
        self._equate([self.cells[cell]], variables)

    def show(self, cell: Cell, low: int, high: int) -> None:
        """Tells the attacker a count."""
        self.bounds[self.cells[cell]] = low, high
        self._least, self._greatest = (np.full(self._num_variables, end) for end in (np.inf, -np.inf))

    def hide(self, cell: Cell) -> None:
        """Takes a count back. Solutions that were met stay solutions."""
        self.bounds[self.cells[cell]] = 0, np.inf

    def solve(self, objective: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns the counts that agree with everything told and minimise the objective.

        Raises:
            Infeasible: If no counts do.
        """
        found = linprog(
            objective,
            A_eq=self._matrix,
            b_eq=np.zeros(self._num_rows),
            bounds=self.bounds,
            method="highs-ds",
        )
        if found.status == 2:
            raise Infeasible
        if found.status != 0:
            raise RuntimeError(f"the linear program ended with status {found.status}: {found.message}")
        solution: npt.NDArray[np.float64] = found.x
        return solution

    def hidden_cells(self) -> list[Cell]:
        """Returns the cells of which he was told nothing."""
        return [cell for cell, variable in self.cells.items() if np.isinf(self.bounds[variable, 1])]

    def find_exposed(self, cells: Sequence[Cell], *, min_patients: int) -> dict[Cell, tuple[int, int]]:
        """Returns which of the cells are not protected, with what he knows of each; empty is good.

        A suppressed cell is protected if its interval is ``min_patients`` wide. Of patients with an untold value
        nothing is told but the number; it is protected unless it is sure to be 1 to ``min_patients`` - 1.
        """

        def is_enough(cell: Cell, low: int, high: int) -> bool:
            if is_suppressed(cell):
                return high - low >= min_patients
            return low <= 0 or high >= min_patients

        return self.find_intervals(cells, is_enough)

    def find_intervals(
        self, cells: Sequence[Cell], is_enough: Callable[[Cell, int, int], bool] | None = None
    ) -> dict[Cell, tuple[int, int]]:
        """Computes the least and the greatest whole count of each cell.

        Args:
            cells: Which.
            is_enough: Ends the work on a cell as soon as two solutions that were met prove its interval wide enough;
                such a cell is left out of the result.

        Raises:
            Infeasible: If no counts agree with everything told.
        """

        def is_open(cell: Cell) -> bool:
            return is_enough is None or not is_enough(cell, *self._met(cell))

        random = np.random.default_rng(0)
        for _ in range(_NUM_PROBES):
            places = [self.cells[cell] for cell in cells if is_open(cell)]
            self._meet(dict(zip(places, random.standard_normal(len(places)), strict=True)))
        found = {}
        for cell in cells:
            for sign in (-1.0, 1.0):
                if is_open(cell):
                    self._meet({self.cells[cell]: sign})
            if is_open(cell):
                found[cell] = self._met(cell)
        return found

    def _met(self, cell: Cell) -> tuple[int, int]:
        """Returns the least and the greatest whole count of a cell among the solutions that were met."""
        place = self.cells[cell]
        low, high = self._least[place], self._greatest[place]
        return (1, 0) if low > high else (int(np.ceil(low - _FUZZ)), int(np.floor(high + _FUZZ)))

    def _meet(self, weights: Mapping[int, float]) -> None:
        objective = np.zeros(self._num_variables)
        objective[list(weights)] = list(weights.values())
        solution = self.solve(objective)
        np.minimum(self._least, solution, out=self._least)
        np.maximum(self._greatest, solution, out=self._greatest)


def _reading(
    key: str, values_by_key: Mapping[str, Sequence[str]]
) -> tuple[str, int, dict[str | None, tuple[int, ...]]]:
    """Returns the column that a table reads, its number of values, and which of them each value of the table is."""
    values = values_by_key[key]
    if key not in ("dr", "dr_present") or not {"dr", "dr_present"} <= set(values_by_key):
        return key, len(values) + 1, {value: (place,) for place, value in enumerate((*values, None))}
    grades = values_by_key["dr"]
    ungraded, untold = len(grades), len(grades) + 1
    if key == "dr":
        positions: dict[str | None, tuple[int, ...]] = {grade: (place,) for place, grade in enumerate(grades)}
        return "dr", len(grades) + 2, positions | {None: (ungraded, untold)}
    present = [place for place, grade in enumerate(grades) if metadata.cells_of("dr", grade)["dr_present"]]
    absent = [place for place in range(len(grades)) if place not in present]
    return "dr", len(grades) + 2, {"yes": (*present, ungraded), "no": tuple(absent), None: (untold,)}


def bounds_of(count: int, *, min_patients: int, rounding: int) -> tuple[int, int]:
    """Returns the least and the greatest truth that is shown as ``count``."""
    low = count - rounding // 2
    return max(min_patients, low), low + rounding - 1


def listed_cells(summary: MetadataSummary) -> Iterator[tuple[Cell, int | None]]:
    """Yields each listed cell with its count; None where it is suppressed."""
    if summary.num_patients is not None:
        yield PEOPLE, summary.num_patients
    for key, table in summary.counts.items():
        yield from (((key, value), count) for value, count in table.items())
    for name, rows in summary.pair_counts.items():
        yield from (((name, value, other), count) for value, other, count in rows)


def told_cells(summary: MetadataSummary) -> list[Cell]:
    return [cell for cell, count in listed_cells(summary) if count is not None]


def bounds_told(summary: MetadataSummary) -> Iterator[tuple[Cell, tuple[int, int]]]:
    """Yields what an attacker knows at once: between which truths each told count lies."""
    for cell, count in listed_cells(summary):
        if count is not None:
            least = 0 if cell == PEOPLE else summary.min_patients
            yield cell, bounds_of(count, min_patients=least, rounding=summary.rounding)


def attacker_told(told: Mapping[Cell, tuple[int, int]]) -> Attacker:
    """Returns the attacker who knows between which truths each of these counts lies."""
    words: dict[str, dict[str, None]] = {}
    for cell in told:
        if cell != PEOPLE:
            for key, value in zip(cell[0].split("*"), cell[1:], strict=True):
                assert value is not None  # of untold values nothing is told
                words.setdefault(key, {})[value] = None
    attacker = Attacker(
        {key: metadata.values_of(key) or tuple(values) for key, values in words.items()},
        sorted({cell[0] for cell in told if len(cell) == 3}),
    )
    for cell, bounds in told.items():
        attacker.show(cell, *bounds)
    return attacker


def audit(summary: MetadataSummary) -> list[Interval]:
    """Computes what an attacker can know of every cell that a summary does not tell.

    He solves two linear programs for each cell (HiGHS) over all tables jointly, knowing how counts are rounded and from
    how many patients on they are told.

    Raises:
        Infeasible: If no patients could have these counts.
    """
    if summary.num_patients is None:
        return []
    attacker = attacker_told(dict(bounds_told(summary)))
    found = attacker.find_intervals(attacker.hidden_cells())
    return [
        Interval(cell=cell, low=low, high=high, is_suppressed=is_suppressed(cell))
        for cell, (low, high) in found.items()
    ]


def find_exposed(summary: MetadataSummary) -> dict[Cell, tuple[int, int]]:
    """Returns the cells that a summary does not protect, with what an attacker can know of each; empty is good.

    The same as `audit` for a yes or no, several times faster.

    Raises:
        Infeasible: If no patients could have these counts.
    """
    if summary.num_patients is None:
        return {}
    attacker = attacker_told(dict(bounds_told(summary)))
    return attacker.find_exposed(attacker.hidden_cells(), min_patients=summary.min_patients)


def is_suppressed(cell: Cell) -> bool:
    """Tells whether a cell that is not told has values; the others are of patients whose value is untold."""
    return None not in cell[1:]
