"""Disclosure control: what a site tells about its patients, by the policy sdc/1 of `conf/disclosure/`.

`release` turns a site's rows into the summary that leaves and the account that stays. `attacker.find_exposed` attacks a
summary with linear programs over all of its tables at once, and needs nothing but the summary, so `check` has the hub
attack what it takes in.
A ledger at the site keeps two releases from telling by their difference what neither tells alone. `told_rows` and
`caption_rows` are the only cells of patients that may go on to shards and to captions.

A table counts each patient once, by one of the patient's photographs, so that its cells add up to the patients. What an
attacker knows is the summary, the policy and this code; what he does not know is whether a suppressed cell is small, or
large and suppressed for another one's sake. Source: Hundepool et al., Statistical Disclosure Control, 2012, ch. 4
(primary and secondary suppression, the attacker's problem); the numbers: CMS cell size suppression policy.
"""

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from gretfound import attacker, files, metadata
from gretfound.attacker import PEOPLE, Attacker, Cell
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.metadata import Cells, MetadataSummary

# Legend of array suffixes: I photographs, P patients, G groups of photographs with one caption so far, V values.
Codes = npt.NDArray[np.int64]  # the number of each photograph's value; the last number is "untold"
Row = Mapping[str, Any]
POLICY_FOLDER = Path(__file__).parents[1] / "conf" / "disclosure"
LEDGER_SCHEMA = "gretfound-releases/1"
REPORT_SCHEMA = "gretfound-disclosure-report/1"
_MAX_WORDS = 10_000  # that a hub lets a site name in a column, so that its audit stays short
# Columns by which a neighbour would know somebody; the others are what he would learn.
_IDENTIFYING = ("age_band", "sex", "eye", "ethnicity", "country", "camera", "quality_grade")
# The most telling first: where a caption is too rare, it is the later ones that it leaves out.
_CAPTION_ORDER = (
    "dr", "dr_present", "dme", "glaucoma", "amd", "pathologic_myopia", "cataract", "age_band", "sex", "diabetes",
    "hypertension", "camera", "eye", "country", "ethnicity", "mi", "stroke", "heart_failure", "ckd", "parkinsons",
    "dementia",
)  # fmt: skip
_SAID_IF_PRESENT = (
    "dr_present", "diabetes", "hypertension", "mi", "stroke", "heart_failure", "ckd", "parkinsons", "dementia",
)  # fmt: skip
RULES = {
    "few": "fewer than {k} patients, possibly none",
    "dominance": "one patient has more than {share:.0%} of its photographs",
    "group": "fewer than {group} patients, nearly all of them alike: it would tell about each of them",
    "complementary": "withheld so that a suppressed count cannot be computed from it",
    "margin": "one of its two values has no count of its own",
    "rare": "words of fewer than {k} patients each; they count as blank",
    "column": "no value of the column has a count that may be told",
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers of disclosure control; `conf/disclosure/` explains each."""

    name: str
    version: int
    min_patients_per_cell: int
    rounding: int
    min_patients: int
    max_image_share: float
    min_group_patients: int
    max_group_share: float
    counts_unnamed_apart: bool
    tables: tuple[str, ...]
    pairs: tuple[str, ...]

    @property
    def stamp(self) -> str:
        """The policy and its version, as a summary names them."""
        return f"sdc/{self.version}"

    def raised_to(self, min_patients_per_cell: int) -> "Policy":
        """Returns the same policy for a site that asks for more patients, per count and thus in all.

        Raises:
            ConfigError: If it asks for fewer.
        """
        if min_patients_per_cell < self.min_patients_per_cell:
            raise ConfigError(
                f"found {min_patients_per_cell} patients per cell; the policy {self.name} requires "
                f"{self.min_patients_per_cell} or more, and a site may only raise it"
            )
        min_patients = max(self.min_patients, min_patients_per_cell)
        return replace(self, min_patients_per_cell=min_patients_per_cell, min_patients=min_patients)


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """A count that is not told, and by which rule; ``values`` are its one or two values, empty for a whole column."""

    table: str
    values: tuple[str, ...]
    rule: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """A summary, and what stays at the site: the true counts and why each suppressed one is so."""

    summary: MetadataSummary
    truth: dict[str, int]
    suppressions: tuple[Suppression, ...]
    decision: str


def read_policy(name: str) -> Policy:
    """Reads a variant of the policy from `conf/disclosure/`.

    Raises:
        ConfigError: If the file is not a policy.
    """
    path = POLICY_FOLDER / f"{name}.yaml"
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text())
        policy = Policy(**content | {key: tuple(content[key]) for key in ("tables", "pairs")})
        odd = set(policy.tables) - set(metadata.SUMMARY_KEYS)
        odd |= {pair for pair in policy.pairs if not set(pair.split("*")) <= set(policy.tables)}
        is_right = policy.name == name and min(policy.min_patients_per_cell, policy.rounding) >= 1 and not odd
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a disclosure policy: {type(error).__name__}; restore the file") from error
    if not is_right:
        raise ConfigError(f"{path} is not the disclosure policy {name}; found wrong: {sorted(odd) or 'its numbers'}")
    return policy


# Counting.


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One table at the site. The last place of each axis is "untold", which is never shown."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    counts: Codes
    is_shown: npt.NDArray[np.bool_]
    rules: dict[tuple[int, ...], str]

    @property
    def name(self) -> str:
        return "*".join(self.keys)

    def lines(self, axis: int) -> Iterator[list[tuple[int, ...]]]:
        """Yields the places with values that differ in this axis alone."""
        lines: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for place in np.ndindex(*(len(values) for values in self.values)):
            lines.setdefault(place[:axis] + place[axis + 1 :], []).append(place)
        yield from lines.values()

    def hide(self, place: tuple[int, ...], rule: str) -> None:
        if self.is_shown[place]:
            self.is_shown[place] = False
            self.rules[place] = rule

    def cell(self, place: Sequence[int]) -> Cell:
        told = [values[i] if i < len(values) else None for values, i in zip(self.values, place, strict=True)]
        return (self.name, told[0]) if len(told) == 1 else (self.name, told[0], told[1])

    def place(self, cell: Cell) -> tuple[int, ...]:
        told = zip(self.values, cell[1:], strict=True)
        return tuple(len(values) if value is None else values.index(value) for values, value in told)


@dataclass(frozen=True, kw_only=True)
class _People:
    """Who is on which photograph, and the one photograph that a patient is counted by."""

    patients: Codes
    chosen: Codes

    @property
    def num(self) -> int:
        return len(self.chosen)


def _people(rows: Sequence[Row], *, counts_unnamed_apart: bool) -> _People:
    """Numbers the patients and chooses a photograph of each by a digest of its code, so that others do not matter."""
    numbers: dict[Hashable, int] = {}
    places: list[list[int]] = []
    patients = np.empty(len(rows), np.int64)
    for place, row in enumerate(rows):
        code: Hashable = row.get("patient")
        if code is None and counts_unnamed_apart:
            code = place
        number = numbers.setdefault(code, len(numbers))
        if number == len(places):
            places.append([])
        places[number].append(place)
        patients[place] = number
    chosen = [
        own[int.from_bytes(hashlib.sha256(str(code).encode()).digest()[:8], "big") % len(own)]
        for code, own in zip(numbers, places, strict=True)
    ]
    return _People(patients=patients, chosen=np.array(chosen, np.int64))


def _columns(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, tuple[tuple[str, ...], Codes]]:
    """Returns each column's possible values, and the number of each photograph's; the number after the last: blank."""
    texts_by_key: dict[str, list[str | None]] = {key: [] for key in keys}
    for row in rows:
        texts = metadata.summary_texts(row)
        for key in keys:
            texts_by_key[key].append(texts.get(key))
    columns = {}
    for key, texts_I in texts_by_key.items():
        fixed = metadata.values_of(key)
        values = fixed or tuple(sorted({text for text in texts_I if text is not None and text.isprintable()}))
        numbers: dict[str | None, int] = {value: number for number, value in enumerate(values)}
        codes = np.fromiter((numbers.get(text, len(values)) for text in texts_I), np.int64, len(rows))
        columns[key] = values, codes
    return columns


def _table(
    keys: tuple[str, ...], columns: Mapping[str, tuple[tuple[str, ...], Codes]], people: _People, policy: Policy
) -> _Table:
    """Counts one table and suppresses what the policy's primary rules say."""
    values = tuple(columns[key][0] for key in keys)
    shape = tuple(len(each) + 1 for each in values)
    codes_I = np.ravel_multi_index(tuple(columns[key][1] for key in keys), shape)
    size = int(np.prod(shape))
    counts = np.bincount(codes_I[people.chosen], minlength=size).reshape(shape)
    shares = _largest_shares(codes_I, people.patients, size).reshape(shape)
    told = tuple(slice(0, len(each)) for each in values)
    table = _Table(keys=keys, values=values, counts=counts, is_shown=np.zeros(shape, bool), rules={})
    table.is_shown[told] = True
    for rule, is_so in (("few", counts < policy.min_patients_per_cell), ("dominance", shares > policy.max_image_share)):
        for found in np.argwhere(table.is_shown & is_so).tolist():
            table.hide(tuple(found), rule)
    for line in _lines_of_alike(table, policy):
        for place in line:
            table.hide(place, "group")
    return table


def _largest_shares(codes_I: Codes, patients: Codes, size: int) -> npt.NDArray[np.float64]:
    """Returns, for each cell, the largest share that one patient has of its photographs."""
    num_patients = int(patients.max()) + 1
    pairs, images = np.unique(codes_I * num_patients + patients, return_counts=True)
    largest = np.zeros(size)
    np.maximum.at(largest, pairs // num_patients, images)
    return largest / np.maximum(np.bincount(codes_I, minlength=size), 1)


def _lines_of_alike(table: _Table, policy: Policy) -> Iterator[list[tuple[int, ...]]]:
    """Yields the lines of a table in which few patients nearly all have the same sensitive value."""
    sensitive = [axis for axis, key in enumerate(table.keys) if key not in _IDENTIFYING]
    if len(sensitive) != 1:
        return
    for line in table.lines(sensitive[0]):
        counts = [int(table.counts[place]) for place in line]
        if 0 < sum(counts) < policy.min_group_patients and max(counts) >= policy.max_group_share * sum(counts):
            yield line


def _rounded(count: int, rounding: int) -> int:
    return (count + rounding // 2) // rounding * rounding


# The site's side.


def release(rows: Sequence[Row], *, policy: Policy, earlier: Sequence[Release] = ()) -> Release:
    """Makes the summary that leaves a site.

    Args:
        rows: Canonical cells of each photograph, with ``patient`` where it is known.
        policy: The numbers.
        earlier: What the site released before under the same variant, oldest first.

    Returns:
        The release; its ``decision`` is ``first``, ``new``, ``same`` (nothing changed that was told) or ``kept`` (a
        told count changed by fewer patients than the policy requires, so the numbers of the last release stand).
    """
    earlier = [each for each in earlier if each.summary.variant == policy.name]
    made = _release_afresh(rows, policy)
    if policy.min_patients_per_cell > 1 and attacker.find_exposed(made.summary):
        raise RuntimeError("the summary does not protect its patients although it was made to; please report this")
    if not earlier:
        return made
    changes = [_changes(made, each) for each in earlier]
    if earlier[-1].summary.policy != policy.stamp:
        raise ConfigError(
            f"the last release was made by {earlier[-1].summary.policy}, and this program has {policy.stamp}: two "
            "policies' numbers must not be compared; ask the consortium which of the two releases counts"
        )
    if not any(changes[-1]) and earlier[-1].summary.min_patients == made.summary.min_patients:
        return replace(earlier[-1], decision="same")
    is_small = any(0 < change < policy.min_patients_per_cell for each in changes for change in each)
    if is_small or _are_exposed_together([*earlier, made]):
        return replace(earlier[-1], decision="kept")
    return replace(made, decision="new")


def _are_exposed_together(releases: Sequence[Release]) -> bool:
    """Audits each release with what the others tell of the counts that are the same in both.

    Each release may withhold another count for a suppressed one's sake; who has them all, and knows that nothing
    changed there, has none of these withheld from him.
    """
    for one in releases:
        if one.summary.num_patients is None:
            continue
        told = dict(attacker.bounds_told(one.summary))
        for other in releases:
            for cell, bounds in attacker.bounds_told(other.summary):
                if one.truth.get(_text_of(cell), 0) == other.truth.get(_text_of(cell), 0):
                    own = told.get(cell, bounds)
                    told[cell] = max(own[0], bounds[0]), min(own[1], bounds[1])
        attack = attacker.attacker_told(told)
        if attack.find_exposed(attack.hidden_cells(), min_patients=one.summary.min_patients):
            return True
    return False


def _changes(made: Release, earlier: Release) -> list[int]:
    """Returns by how many patients each count differs that one of two releases tells."""
    told = {_text_of(cell) for each in (made, earlier) for cell in attacker.told_cells(each.summary)}
    return [abs(made.truth.get(name, 0) - earlier.truth.get(name, 0)) for name in sorted(told)]


def _text_of(cell: Cell) -> str:
    return json.dumps(cell)


def _release_afresh(rows: Sequence[Row], policy: Policy) -> Release:
    people = _people(rows, counts_unnamed_apart=policy.counts_unnamed_apart)
    summary = MetadataSummary(
        policy=policy.stamp,
        variant=policy.name,
        min_patients=policy.min_patients_per_cell,
        rounding=policy.rounding,
        num_patients=None,
        patients_below=policy.min_patients,
        num_images=0,
        country="",
        counts={},
        pair_counts={},
    )
    if people.num < policy.min_patients:
        return Release(summary=summary, truth={_text_of(PEOPLE): people.num}, suppressions=(), decision="first")
    columns = _columns(rows, policy.tables)
    tables = {key: _table((key,), columns, people, policy) for key in policy.tables}
    for pair in policy.pairs:
        first, second = pair.split("*")
        tables[pair] = _table((first, second), columns, people, policy)
    for key in policy.tables:
        for place in np.flatnonzero(~tables[key].is_shown[:-1]).tolist():
            _hide_margin(tables, key, place)
    if policy.min_patients_per_cell > 1:
        _suppress_complements(tables, policy, people.num)
    country = tables.get("country")
    summary = replace(
        summary,
        num_patients=_rounded(people.num, policy.rounding),
        patients_below=None,
        num_images=_rounded(len(rows), policy.rounding),
        country=_main_country(country, policy.min_patients_per_cell) if country else "",
        counts={key: counts for key in sorted(policy.tables) if (counts := _counts_of(tables[key], policy))},
    )
    summary = replace(summary, pair_counts=_pair_counts_of(tables, summary, policy))
    truth = {
        _text_of(table.cell(place)): int(table.counts[place])
        for table in tables.values()
        for place in np.ndindex(table.counts.shape)
        if table.counts[place] or len(place) > 1 or metadata.values_of(table.keys[0])
    }
    return Release(
        summary=summary,
        truth=truth | {_text_of(PEOPLE): people.num},
        suppressions=tuple(_suppressions_of(tables, summary)),
        decision="first",
    )


def _main_country(country: _Table, min_patients: int) -> str:
    """Geography is the country: that of most patients, if enough of them have it."""
    counts = country.counts[:-1]
    return country.values[0][int(counts.argmax())] if counts.size and counts.max() >= min_patients else ""


def _is_free_text(table: _Table) -> bool:
    return len(table.keys) == 1 and metadata.values_of(table.keys[0]) is None


def _counts_of(table: _Table, policy: Policy) -> dict[str, int | None]:
    """Returns a column's counts as they are told; nothing where no value may be. Words of too few are not named."""
    if not table.is_shown.any():
        return {}
    return {
        value: _rounded(int(table.counts[place]), policy.rounding) if table.is_shown[place] else None
        for place, value in enumerate(table.values[0])
        if table.is_shown[place] or not _is_free_text(table)
    }


def _pair_counts_of(
    tables: Mapping[str, _Table], summary: MetadataSummary, policy: Policy
) -> dict[str, list[tuple[str, str, int | None]]]:
    pair_counts = {}
    for pair in sorted(policy.pairs):
        first, second = (summary.counts.get(key, {}) for key in pair.split("*"))
        table = tables[pair]
        listed = [
            (value, other, table.place((pair, value, other)))
            for value, count in first.items()
            for other, other_count in second.items()
            if count is not None and other_count is not None
        ]
        if any(table.is_shown[place] for _, _, place in listed):
            pair_counts[pair] = [
                (
                    value,
                    other,
                    _rounded(int(table.counts[place]), policy.rounding) if table.is_shown[place] else None,
                )
                for value, other, place in listed
            ]
    return pair_counts


def _suppressions_of(tables: Mapping[str, _Table], summary: MetadataSummary) -> Iterator[Suppression]:
    for name, table in tables.items():
        if name not in summary.counts and name not in summary.pair_counts:
            yield Suppression(table=name, values=(), rule="column")
            if not table.counts[tuple(slice(0, -1) for _ in table.keys)].any():
                continue
        for place, rule in sorted(table.rules.items()):
            values = tuple(each[i] for each, i in zip(table.values, place, strict=True))
            is_rare = rule == "few" and _is_free_text(table)
            yield Suppression(table=name, values=values, rule="rare" if is_rare else rule)


def _hide_margin(tables: Mapping[str, _Table], key: str, place: int) -> None:
    """Suppresses what a pair table tells of a value that has no count of its own."""
    for table in tables.values():
        if len(table.keys) == 2 and key in table.keys:
            axis = table.keys.index(key)
            for other in range(table.counts.shape[1 - axis] - 1):
                table.hide((place, other) if axis == 0 else (other, place), "margin")


def _suppress_complements(tables: Mapping[str, _Table], policy: Policy, num_patients: int) -> None:
    """Suppresses further counts until the attacker cannot compute what the primary rules suppress.

    In each round it takes the exposed cells and suppresses, for each, the smallest count of the line of its table that
    exposes it most. It ends, since a table without counts exposes nothing.
    """
    values_by_key = {
        key: tuple(
            value
            for place, value in enumerate(tables[key].values[0])
            if not _is_free_text(tables[key]) or tables[key].is_shown[place]
        )
        for key in policy.tables
    }
    attack = Attacker(values_by_key, policy.pairs)
    least, rounding = policy.min_patients_per_cell, policy.rounding
    people = _rounded(num_patients, rounding)
    attack.show(PEOPLE, *attacker.bounds_of(people, min_patients=0, rounding=rounding))
    # Words are not named where they are withheld, so that nothing is told of them then: they are no suppressed cells.
    words = {(key, value) for key in values_by_key if _is_free_text(tables[key]) for value in values_by_key[key]}
    places = {cell: (tables[cell[0]], tables[cell[0]].place(cell)) for cell in attack.cells if cell != PEOPLE}
    for cell, (table, place) in places.items():
        if table.is_shown[place]:
            count = _rounded(int(table.counts[place]), rounding)
            attack.show(cell, *attacker.bounds_of(count, min_patients=least, rounding=rounding))
    while True:
        for cell, (table, place) in places.items():
            if not table.is_shown[place]:
                attack.hide(cell)
        exposed = list(_narrow_cells(tables, attack, least))
        if not exposed:
            hidden = [cell for cell in attack.hidden_cells() if cell not in words]
            exposed = list(attack.find_exposed(hidden, min_patients=least))
        if not exposed:
            return
        touched: set[tuple[str, int, int]] = set()
        num_suppressed = sum(_cover(tables, cell, touched) for cell in exposed)
        if not num_suppressed:
            raise RuntimeError("no count is left to suppress and the patients are not protected; please report this")


def _narrow_cells(tables: Mapping[str, _Table], attack: Attacker, least: int) -> Iterator[Cell]:
    """Yields a suppressed cell of each line whose other counts and total expose it, which takes no linear program."""
    bounds = {cell: attack.bounds[variable] for cell, variable in attack.cells.items()}
    for table in tables.values():
        if _is_free_text(table):
            continue
        for axis in range(len(table.keys)):
            for line in table.lines(axis):
                other = 1 - axis
                total = PEOPLE if len(table.keys) == 1 else (table.keys[other], table.cell(line[0])[1 + other])
                hidden = [place for place in line if not table.is_shown[place]]
                told = sum(bounds[table.cell(place)][0] for place in line if table.is_shown[place])
                if hidden and bounds[total][1] - told < least:
                    yield table.cell(hidden[0])


def _cover(tables: Mapping[str, _Table], cell: Cell, touched: set[tuple[str, int, int]]) -> bool:
    """Suppresses one count for an exposed cell's sake, unless this round did so in one of its lines already.

    Returns:
        Whether it suppressed one.
    """
    table = tables[cell[0]]
    place = table.place(cell)
    lines = [(table.name, axis, at) for axis, at in enumerate(place)] if len(place) == 2 else [(table.name, 0, 0)]
    if touched.intersection(lines):
        return False
    touched.update(lines)
    for candidates in _candidates(tables, table, place):
        if candidates:
            chosen, at = min(candidates, key=lambda each: (int(each[0].counts[each[1]]), each[0].name, each[1]))
            chosen.hide(at, "complementary")
            if len(at) == 1:
                _hide_margin(tables, chosen.name, at[0])
                _hide_other_reading(tables, chosen, at[0])
            return True
    return False


def _candidates(
    tables: Mapping[str, _Table], table: _Table, place: tuple[int, ...]
) -> Iterator[list[tuple[_Table, tuple[int, ...]]]]:
    """Yields groups of counts of which one may be suppressed for a cell's sake, the best group first."""

    def shown(each: _Table, index: tuple[int | slice, ...]) -> list[tuple[_Table, tuple[int, ...]]]:
        mask = np.zeros_like(each.is_shown)
        mask[index] = True
        return [(each, tuple(at.tolist())) for at in np.argwhere(mask & each.is_shown)]

    if len(place) == 1:
        other = tables.get({"dr": "dr_present", "dr_present": "dr"}.get(table.name, ""))
        yield shown(table, (slice(None),))
        yield shown(other, (slice(None),)) if other else []
    else:
        lines: list[tuple[int | slice, ...]] = [(place[0], slice(None)), (slice(None), place[1])]
        open_patients = [int(table.counts[line][~table.is_shown[line]].sum()) for line in lines]
        for _, line in sorted(zip(open_patients, lines, strict=True), key=lambda each: each[0]):
            yield shown(table, line)
        yield [each for key, at in zip(table.keys, place, strict=True) for each in shown(tables[key], (at,))]
        yield shown(table, (slice(None),))
    yield [each for one in tables.values() if len(one.keys) == 2 for each in shown(one, (slice(None),))]
    yield [each for one in tables.values() for each in shown(one, (slice(None),))]


def _hide_other_reading(tables: Mapping[str, _Table], table: _Table, at: int) -> None:
    """Suppresses the same count in the other table: grade 0 is no retinopathy."""
    twins = {("dr", "0"): ("dr_present", "no"), ("dr_present", "no"): ("dr", "0")}
    name, value = twins.get((table.name, table.values[0][at]), ("", ""))
    if name in tables:
        other = tables[name].values[0].index(value)
        tables[name].hide((other,), "complementary")
        _hide_margin(tables, name, other)


# What may go on to shards and captions.


def told_rows(rows: Sequence[Row], summary: MetadataSummary, *, policy: Policy) -> list[Cells]:
    """Keeps of each photograph's cells the values that the summary tells and that enough patients have now."""
    people = _people(rows, counts_unnamed_apart=policy.counts_unnamed_apart)
    kept: dict[tuple[str, str], set[int]] = {}
    texts_I = [metadata.summary_texts(row) for row in rows]
    for patient, texts in zip(people.patients.tolist(), texts_I, strict=True):
        for key, text in texts.items():
            if summary.counts.get(key, {}).get(text) is not None:
                kept.setdefault((key, text), set()).add(patient)
    told = {value for value, patients in kept.items() if len(patients) >= _least(summary, policy)}
    return [
        metadata.cells_told(row, {key for key, text in texts.items() if (key, text) in told})
        for row, texts in zip(rows, texts_I, strict=True)
    ]


def _least(summary: MetadataSummary, policy: Policy) -> int:
    """A site that raised the number later may have to tell its earlier summary again; what it trains on can follow."""
    return max(summary.min_patients, policy.min_patients_per_cell)


def caption_rows(rows: Sequence[Row], summary: MetadataSummary, *, policy: Policy) -> list[Cells]:
    """Keeps of the told cells what a caption may say: every caption is that of `min_patients` patients or more.

    Columns are taken one after the other. Where a value would leave fewer patients with the same words so far, the
    photographs with it go with those that say nothing of the column, and if these are too few, so does the next rarest.
    """
    told = told_rows(rows, summary, policy=policy)
    people = _people(rows, counts_unnamed_apart=policy.counts_unnamed_apart)
    texts_I = [metadata.summary_texts(cells) for cells in told]
    group_I = np.zeros(len(rows), np.int64)
    keys_I: list[set[str]] = [set() for _ in rows]
    for key in _CAPTION_ORDER:
        silent = ("no",) if key in _SAID_IF_PRESENT else ()
        words = sorted({text for texts in texts_I if (text := texts.get(key)) is not None and text not in silent})
        numbers = {word: number for number, word in enumerate(words, start=1)}
        value_I = np.fromiter((numbers.get(texts.get(key, ""), 0) for texts in texts_I), np.int64, len(rows))
        value_I = _merged(group_I, value_I, people.patients, _least(summary, policy))
        for place in np.flatnonzero(value_I).tolist():
            keys_I[place].add(key)
        _, group_I = np.unique(group_I * (len(words) + 1) + value_I, return_inverse=True)
    return [metadata.cells_told(cells, keys) for cells, keys in zip(told, keys_I, strict=True)]


def _merged(group_I: Codes, value_I: Codes, patients: Codes, min_patients: int) -> Codes:
    """Sets values to 0 (untold) until, within each group, each value is that of enough patients or of none."""
    num_values, num_patients = int(value_I.max()) + 1, int(patients.max()) + 1
    cell_I = group_I * num_values + value_I
    size = (int(group_I.max()) + 1) * num_values
    people = np.bincount(np.unique(cell_I * num_patients + patients) // num_patients, minlength=size)
    kept = (people.reshape(-1, num_values) >= min_patients) & (np.arange(num_values) > 0)
    people_GV = people.reshape(-1, num_values)

    def untold_people(of_I: Codes) -> npt.NDArray[np.int64]:
        """How many patients each group has with an untold value, among these photographs."""
        untold_I = of_I[~kept[group_I[of_I], value_I[of_I]]]
        pairs = np.unique(group_I[untold_I] * num_patients + patients[untold_I])
        counts: npt.NDArray[np.int64] = np.bincount(pairs // num_patients, minlength=len(kept))
        return counts

    members_I = np.arange(len(group_I))
    while True:
        num_untold_G = untold_people(members_I)
        short = np.flatnonzero((num_untold_G > 0) & (num_untold_G < min_patients) & kept.any(axis=1))
        if not len(short):
            break
        rarest = np.where(kept[short], people_GV[short], num_patients + 1).argmin(axis=1)
        kept[short, rarest] = False
        members_I = members_I[np.isin(group_I[members_I], short)]
    merged: Codes = np.where(kept[group_I, value_I], value_I, 0)
    return merged


# The hub's side.


def check(summary: MetadataSummary, *, policies: Sequence[Policy]) -> None:
    """Checks at the hub that a summary keeps the policy that it names, by an attack of its own.

    Args:
        summary: What a site sent.
        policies: The variants that the hub admits.

    Raises:
        ContributionRejected: ``POLICY`` if it was made by another policy; ``DISCLOSURE`` if it does not keep its own.
    """
    policy = next((each for each in policies if each.name == summary.variant), None)
    if policy is None or summary.policy != policy.stamp:
        admitted = ", ".join(f"{each.stamp} {each.name}" for each in policies)
        raise ContributionRejected(
            "POLICY",
            f"its summary was made by another disclosure policy; this hub requires {admitted}: contribute again",
        )
    faults = _faults(summary, policy)
    if not faults:
        try:
            num_exposed = len(attacker.find_exposed(summary))
            faults = [f"{num_exposed} suppressed count(s) can be computed"] if num_exposed else []
        except attacker.Infeasible:
            faults = ["no patients could have its counts"]
    if faults:
        raise ContributionRejected(
            "DISCLOSURE", f"its summary does not keep the policy: {'; '.join(faults)}; update gretfound-site"
        )


def _faults(summary: MetadataSummary, policy: Policy) -> list[str]:
    least = _rounded(summary.min_patients, policy.rounding)
    counts = [count for table in summary.counts.values() for count in table.values() if count is not None]
    counts += [count for rows in summary.pair_counts.values() for *_, count in rows if count is not None]
    listed = {
        pair: [
            (value, other)
            for value, count in summary.counts.get(pair.partition("*")[0], {}).items()
            for other, other_count in summary.counts.get(pair.partition("*")[2], {}).items()
            if count is not None and other_count is not None
        ]
        for pair in policy.pairs
    }
    is_band = summary.num_patients is None
    checks = {
        "it tells of fewer patients than the policy": summary.min_patients >= policy.min_patients_per_cell,
        "counts are not rounded": summary.rounding == policy.rounding
        and all(count % policy.rounding == 0 for count in (*counts, summary.num_patients or 0, summary.num_images)),
        "a count is of too few patients": all(count >= least for count in counts),
        "it has other tables": set(summary.counts) <= set(policy.tables)
        and set(summary.pair_counts) <= set(policy.pairs),
        "a table has other values": all(
            set(table) == set(values)
            if (values := metadata.values_of(key))
            else None not in table.values() and len(table) <= _MAX_WORDS
            for key, table in summary.counts.items()
            if key in policy.tables
        )
        and all(
            sorted((value, other) for value, other, _ in rows) == sorted(listed.get(pair, []))
            for pair, rows in summary.pair_counts.items()
        ),
        "it has tables of too few patients": not (summary.counts or summary.num_images or summary.country)
        and (summary.patients_below or 0) >= policy.min_patients
        if is_band
        else summary.patients_below is None
        and (summary.num_patients or 0) >= _rounded(policy.min_patients, policy.rounding),
    }
    return [fault for fault, is_right in checks.items() if not is_right]


# The account.


def describe(made: Release, *, policy: Policy) -> dict[str, Any]:
    """Returns the account that stays at the site, JSON-able: every suppression with its rule.

    It tells which suppressed counts are small and which are not, so it must not leave.
    """
    return describe_for_hub(made.summary, policy=policy) | {
        "stays_at_the_site": True,
        "decision": made.decision,
        "suppressions": [asdict(each) for each in made.suppressions],
    }


def describe_for_hub(summary: MetadataSummary, *, policy: Policy) -> dict[str, Any]:
    """Returns the account that is packed: the policy, and which counts are suppressed, without why.

    Whether a count is suppressed because it is small, or for another one's sake, would help to compute it.
    """
    return {
        "schema": REPORT_SCHEMA,
        "policy": asdict(policy),
        "num_counts_told": len(attacker.told_cells(summary)),
        "suppressed": sorted((list(cell) for cell, count in attacker.listed_cells(summary) if count is None), key=str),
        "columns_not_told": sorted(set(policy.tables) - set(summary.counts)),
        "why": f"fewer than {summary.min_patients} patients (none included), or withheld to protect such a count",
    }


def to_text(made: Release, *, policy: Policy) -> str:
    """Returns the account in words, for the security officer. It stays at the site."""
    summary = made.summary
    decisions = {
        "first": "This is the first release of this site.",
        "new": "Every told count differs from every earlier release by no patient or by "
        f"{summary.min_patients} or more.",
        "same": "No told count changed since the last release; its numbers are told again.",
        "kept": f"Some told count changed by fewer than {summary.min_patients} patients since an earlier release, or "
        "one withholds what the other tells: together they would tell about a few patients. The last release's numbers "
        "are told again.",
    }
    lines = [
        f"What the metadata summary tells   (policy {summary.policy} {summary.variant})",
        "This page stays at the site: it says which suppressed counts are small.",
        "",
        decisions[made.decision],
    ]
    if summary.num_patients is None:
        return "\n".join([*lines, f"Fewer than {summary.patients_below} patients: nothing else is told.", ""])
    lines += [
        f"Told: about {summary.num_patients:,} patients, {len(attacker.told_cells(summary))} counts, each of at least "
        f"{summary.min_patients} patients and rounded to a multiple of {summary.rounding}.",
        "",
        *_table_lines(summary),
        "",
        "Suppressed, and why",
    ]
    texts = {
        rule: text.format(k=summary.min_patients, share=policy.max_image_share, group=policy.min_group_patients)
        for rule, text in RULES.items()
    }
    for rule, text in texts.items():
        chosen = [each for each in made.suppressions if each.rule == rule]
        if chosen:
            lines.append(f"  {text}: {len(chosen)}")
            for table in dict.fromkeys(each.table for each in chosen):
                cells = "; ".join(" and ".join(each.values) for each in chosen if each.table == table)
                lines.append(f"    - {table}{': ' if cells else ''}{cells}")
    num_suppressed = sum(count is None for _, count in attacker.listed_cells(summary))
    lines += [
        "",
        f"The audit: an attacker who computes with all tables together is left, for each of the {num_suppressed} "
        f"suppressed counts, with an interval at least {summary.min_patients} wide.",
    ]
    return "\n".join([*lines, ""])


def _table_lines(summary: MetadataSummary) -> Iterator[str]:
    for key, table in summary.counts.items():
        cells = ", ".join(f"{value} {'-' if count is None else f'{count:,}'}" for value, count in table.items())
        yield f"  {key:<18} {cells}"
    for name, rows in summary.pair_counts.items():
        yield f"  {name:<18} {sum(count is not None for *_, count in rows)} of {len(rows)} counts"


# The ledger.


def read_ledger(path: Path) -> list[Release]:
    """Reads what the site released before, oldest first; nothing where there is no ledger yet.

    Raises:
        ConfigError: If the file is damaged. Without it, two releases can differ by a patient.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != LEDGER_SCHEMA:
            raise ValueError(content["schema"])
        return [
            Release(
                summary=metadata.summary_from_json(each["summary"]),
                truth={str(name): int(count) for name, count in each["truth"].items()},
                suppressions=tuple(
                    Suppression(table=one["table"], values=tuple(one["values"]), rule=one["rule"])
                    for one in each["suppressions"]
                ),
                decision=each["decision"],
            )
            for each in content["releases"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no ledger of releases of this version; restore it from a backup, since without it a release "
            "could be compared with an earlier one"
        ) from error


def enter(path: Path, made: Release, *, after: Sequence[Release]) -> None:
    """Enters a release before its package leaves; one that repeats the last one's numbers is there already.

    Args:
        path: The ledger, readable by its owner alone.
        made: What `release` returned.
        after: The releases that it was compared with.

    Raises:
        ConfigError: If another release was entered meanwhile.
    """
    entered = read_ledger(path)
    if any((each.summary, each.truth) == (made.summary, made.truth) for each in entered):
        return
    if entered != list(after):
        raise ConfigError(
            f"another contribution was entered into {path} while this one was made; run the same command again"
        )
    releases = [asdict(each) | {"summary": metadata.summary_to_json(each.summary)} for each in (*entered, made)]
    content = {"schema": LEDGER_SCHEMA, "releases": releases}
    files.write(path, json.dumps(content).encode(), mode=0o600)
