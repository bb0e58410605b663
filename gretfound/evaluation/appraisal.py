"""Appraisal: everything that is measured of one generator, as plain values for its report.

The real photographs are held-out ones; what a generator's figures are to be read against is measured beside them, on
the same photographs: the base that it was fine-tuned from, which is what no learning reaches, and real photographs that
it was trained on, taken as if they had been drawn, which is what no generator is expected to beat.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import compress
from typing import Any

import numpy as np

from gretfound import fundus, metadata
from gretfound.evaluation import fidelity, protocol, vessels
from gretfound.evaluation.distances import MIN_PHOTOGRAPHS, Bools, Features, Ints
from gretfound.evaluation.fidelity import Group, Sample, Space, TrainedOn
from gretfound.fundus import Photograph
from gretfound.metadata import BLANK, Cells

Tables = Mapping[str, Mapping[str, int | None]]  # of a site's released summary: counts of values by column
SIDES = ("generated", "base", "trained_on")
VESSELS = "vessels"
VESSEL_SHARE = 0.9  # of a photograph's side: its field of view may be a little smaller than it
MIN_PATIENTS_PER_CLASS = fidelity.MIN_PATIENTS_PER_CLASS


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Photographs of one kind in every space, a row each.

    Args:
        features: By the name of a space, (N, D); `VESSELS` holds `vessels.STATISTICS`, NaN where undefined.
        image_ids: `fundus.pixel_digest` of each photograph.
        patients: A name of each one's patient, empty where none is known.
        cells: What each one shows, or was asked to show.
    """

    features: Mapping[str, Features]
    image_ids: tuple[str, ...]
    patients: tuple[str, ...]
    cells: tuple[Cells, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_patients(self) -> int:
        """Patients; a photograph without one counts as a patient."""
        return len({patient or image_id for patient, image_id in zip(self.patients, self.image_ids, strict=True)})

    def sample(self, space: str, conditions: Sequence[str | None] = ()) -> Sample:
        """Returns the photographs in one space."""
        return Sample(
            features=self.features[space],
            image_ids=self.image_ids,
            patients=self.patients,
            conditions=tuple(conditions),
        )

    def where(self, is_kept_N: Bools) -> "Side":
        """Returns some of the photographs."""
        return Side(
            features={name: each[is_kept_N] for name, each in self.features.items()},
            image_ids=tuple(compress(self.image_ids, is_kept_N)),
            patients=tuple(compress(self.patients, is_kept_N)),
            cells=tuple(compress(self.cells, is_kept_N)),
        )


def vessel_space(resolution_px: int) -> Space:
    """Returns the space of `vessels.STATISTICS` for photographs of one side; all NaN where they are too small.

    Args:
        resolution_px: The side that a generator draws at and that real photographs were brought to.
    """
    size_px = min(vessels.SIZE_PX, int(VESSEL_SHARE * resolution_px))

    def is_measurable(image: Photograph) -> bool:
        field = fundus.find_field_of_view(image)
        return size_px >= vessels.MIN_SIZE_PX and (2 * field.radius_px if field else max(image.shape)) >= size_px

    def measured(photographs: Sequence[Photograph]) -> Features:
        rows = [
            astuple(vessels.measure(image, size_px=size_px))
            if is_measurable(image)
            else (np.nan,) * len(vessels.STATISTICS)
            for image in photographs
        ]
        return np.array(rows, dtype=np.float32).reshape(-1, len(vessels.STATISTICS))

    return measured


def appraise(
    held_out: Side,
    sides: Mapping[str, Side],
    *,
    spaces: Sequence[str],
    trained_on: TrainedOn,
    tables: Tables,
    attributes: Sequence[str],
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Measures a generator against held-out photographs.

    Args:
        held_out: Real photographs that the generator was not trained on.
        sides: By name of `SIDES`: ``generated``, and what its figures are to be read against, as far as there is any.
        spaces: Names of the spaces of features, the one that the verdict is about first.
        trained_on: As in `fidelity.require_held_out`.
        tables: What the site released; its values are the conditions.
        attributes: Columns of it by whose values conditions are told apart.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the resamples and of the probe.

    Returns:
        JSON-able: ``figures`` by space and side; ``conditions`` by attribute, space and value; ``vessels`` by side, and
        ``vessels_missing``, why there are none; ``usefulness`` by space and task, with ``skipped_tasks``; ``verdict``.

    Raises:
        LineageError: If the generator was trained on a held-out photograph.
    """
    options: dict[str, Any] = {"trained_on": trained_on, "num_resamples": num_resamples, "seed": seed}
    generated = sides["generated"]
    figures = {
        space: {
            name: group_json(fidelity.compare_if_enough(held_out.sample(space), side.sample(space), **options))
            for name, side in sides.items()
        }
        for space in spaces
    }
    conditions = {
        attribute: {
            space: {
                text: group_json(group)
                for text, group in fidelity.compare_by_condition(
                    held_out.sample(space, conditions_of(held_out, tables, attribute)),
                    generated.sample(space, conditions_of(generated, tables, attribute)),
                    **options,
                ).items()
            }
            for space in spaces
        }
        for attribute in attributes_of(tables, attributes)
    }
    gaps, missing = _vessels(held_out, sides, options)
    useful, skipped = _usefulness(held_out, sides, spaces, options)
    content = {
        "figures": figures,
        "conditions": conditions,
        "vessels": gaps,
        "vessels_missing": missing,
        "usefulness": useful,
        "skipped_tasks": skipped,
    }
    return content | {"verdict": verdict(figures[spaces[0]])}


def nothing(reason: str) -> dict[str, Any]:
    """Returns what `appraise` does, for a generator of which nothing can be measured."""
    names = ("figures", "conditions", "vessels", "vessels_missing", "usefulness")
    return {**{name: {} for name in names}, "skipped_tasks": [], "verdict": f"{reason[:1].upper()}{reason[1:]}."}


def told_values(tables: Tables, attribute: str) -> list[str]:
    """Returns the values of a column that the site told a count of, blanks left out, in their own order."""
    return sorted(text for text, count in tables.get(attribute, {}).items() if text != BLANK and count)


def attributes_of(tables: Tables, attributes: Sequence[str]) -> list[str]:
    """Returns those columns of which the site told two values or more."""
    return [key for key in attributes if len(told_values(tables, key)) > 1]


def conditions_of(side: Side, tables: Tables, attribute: str) -> tuple[str | None, ...]:
    """Returns each photograph's value of a column as the site told it, None where it is blank or was not told."""
    return tuple(value_of(tables, cells, attribute) for cells in side.cells)


def value_of(tables: Tables, cells: Cells, attribute: str) -> str | None:
    """Returns the told value of a column that one photograph's cells have; an age, real or drawn, has its band's."""
    if attribute == "age_band":
        found = cells.get("age") is not None and metadata.age_band(float(cells["age"]))
        return next((text for text in told_values(tables, attribute) if text == found), None)
    for text in told_values(tables, attribute):
        if metadata.cells_of(attribute, text).get(attribute) == cells.get(attribute):
            return text
    return None


def words_of(attribute: str, text: str) -> str:
    """Says a released value in the words of a caption, or as it is written where a caption says nothing of it."""
    start = metadata.caption({})
    said = metadata.caption(metadata.cells_of(attribute, text))
    return said.removeprefix(f"{start}, ") if said != start else f"{attribute.replace('_', ' ')}: {text}"


def group_json(group: Group) -> dict[str, Any]:
    """Returns a group's counts, figures and what it is too small for."""
    return {
        "num_real": group.num_real,
        "num_generated": group.num_generated,
        "figures": {name: protocol.interval_json(each) for name, each in group.figures.items()},
        "too_few": dict(group.too_few),
    }


def verdict(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Says in a sentence how the generator compares with its base, by intervals of KID that do not overlap."""
    generated, base = (figures.get(name, {}).get("figures", {}).get("kid") for name in ("generated", "base"))
    if generated is None:
        return f"Not measurable: {'; '.join(sorted(set(figures['generated']['too_few'].values())))}."
    count = f"Against {figures['generated']['num_real']:,} held-out photographs, "
    if base is None:
        return f"{count}KID is {generated['value']:.3f} ({generated['low']:.3f} to {generated['high']:.3f})."
    if generated["high"] < base["low"]:
        told = "its photographs are clearly closer to the site's than those of the base that it started from"
    elif generated["low"] > base["high"]:
        told = "its photographs are clearly further from the site's than those of the base that it started from"
    else:
        told = "its photographs cannot be told from those of the base in how close they are to the site's"
    real = figures.get("trained_on", {}).get("figures", {}).get("kid")
    best = f", real photographs of its training {real['value']:.3f}" if real else ""
    return f"{count}{told}: KID {generated['value']:.3f}, base {base['value']:.3f}{best} (0 is best)."


def _vessels(
    held_out: Side, sides: Mapping[str, Side], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    gaps: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, side in sides.items():
        counts = [int(np.isfinite(each.features[VESSELS]).all(axis=1).sum()) for each in (held_out, side)]
        if min(counts) < MIN_PHOTOGRAPHS:
            missing[name] = (
                f"found vessels in {counts[0]:,} held-out and {counts[1]:,} of these photographs; required "
                f"{MIN_PHOTOGRAPHS} of each, {math.ceil(vessels.MIN_SIZE_PX / VESSEL_SHARE)} px wide or more"
            )
            continue
        found = vessels.compare(held_out.sample(VESSELS), side.sample(VESSELS), **options)
        gaps[name] = {
            statistic: {
                "difference": protocol.interval_json(gap.difference),
                **{key: value for key, value in asdict(gap).items() if key != "difference"},
            }
            for statistic, gap in found.items()
        }
    return gaps, missing


def _usefulness(
    held_out: Side, sides: Mapping[str, Side], spaces: Sequence[str], options: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
    """Asks every task that all three samples carry, in every space."""
    samples = {"real": sides["trained_on"], "generated": sides["generated"], "tested": held_out}
    useful: dict[str, dict[str, Any]] = {space: {} for space in spaces}
    skipped: list[dict[str, str]] = []
    for task in protocol.tasks_for([cells for side in samples.values() for cells in side.cells]):
        labels = {name: _labels(side, task.label) for name, side in samples.items()}
        labelled = {name: side.where(labels[name] >= 0) for name, side in samples.items()}
        known = {name: label_N[label_N >= 0] for name, label_N in labels.items()}
        if reason := _shortage(task, labelled, known):
            skipped.append({"title": task.title, "reason": reason})
            continue
        for space in spaces:
            real, generated, tested = (labelled[name].sample(space) for name in samples)
            found = fidelity.usefulness(
                real,
                known["real"],
                generated,
                known["generated"],
                tested,
                known["tested"],
                num_classes=len(task.classes),
                **options,
            )
            useful[space][task.key] = {
                "title": task.title,
                "num_images": {name: len(side) for name, side in labelled.items()},
                "figures": {name: protocol.interval_json(each) for name, each in found.figures.items()},
                "gap": protocol.interval_json(found.gap),
                "gain": protocol.interval_json(found.gain),
            }
    return useful, skipped


def _labels(side: Side, label: Callable[[Cells], int | None]) -> Ints:
    found = [label(cells) for cells in side.cells]
    return np.array([-1 if each is None else each for each in found], dtype=np.int64)


def _shortage(task: protocol.Task, labelled: Mapping[str, Side], known: Mapping[str, Ints]) -> str:
    if not any(len(label_N) for label_N in known.values()):
        return "no photograph says"
    for name, side in labelled.items():
        for index, title in enumerate(task.classes):
            num_patients = side.where(known[name] == index).num_patients
            if num_patients < MIN_PATIENTS_PER_CLASS:
                words = {"real": "trained-on", "generated": "generated", "tested": "held-out"}[name]
                return (
                    f"found {num_patients} patients of '{title}' among the {words} photographs; required "
                    f"{MIN_PATIENTS_PER_CLASS}"
                )
    return ""
