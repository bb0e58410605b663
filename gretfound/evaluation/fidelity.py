"""Fidelity: how close generated photographs are to real ones that their generator never saw, and what they are worth.

Everything here takes samples with image ids and refuses a reference that the generator was trained on: such a figure
would praise a generator that copies. The figures themselves are `gretfound.evaluation.distances`, the spaces of
features `gretfound.evaluation.features` and `gretfound.evaluation.vessels`.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gretfound import fundus
from gretfound.errors import LineageError
from gretfound.evaluation import distances, metrics, probe
from gretfound.evaluation.distances import FIGURES, NEIGHBOURHOODS, NUM_RESAMPLES, Bools, Features, Ints
from gretfound.evaluation.metrics import Interval
from gretfound.fundus import Photograph

# Legend of array suffixes: N photographs to fit on, M generated ones, T real ones to test on, D features, C classes.
Space = Callable[[Sequence[Photograph]], Features]
TrainedOn = Collection[str] | Callable[[str], bool]

NOT_STATED = "not stated"
MIN_PATIENTS_PER_CLASS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Photographs in one space of features, a row each.

    Args:
        features: (N, D).
        image_ids: `fundus.pixel_digest` of each photograph.
        patients: A name of each photograph's patient, whose photographs are resampled together; a photograph with an
            empty name is a patient of its own, and so are all if this is empty, as for generated ones.
        conditions: What each photograph shows or was asked to show, None where that is not stated; empty if nowhere.

    Raises:
        ValueError: If the features are no matrix, or ids, patients or conditions are not one for each row.
    """

    features: Features
    image_ids: tuple[str, ...]
    patients: tuple[str, ...] = ()
    conditions: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        num_rows = len(self.features)
        counts = [len(self.image_ids), len(self.patients) or num_rows, len(self.conditions) or num_rows]
        if self.features.ndim != 2 or counts != [num_rows] * 3:
            raise ValueError(
                f"found features of shape {self.features.shape} with {counts} ids, patients and conditions; required a "
                "matrix with one of each for a row"
            )

    @property
    def patient_numbers(self) -> Ints:
        """The patients as indices, 0 to their number - 1."""
        stated = self.patients or ("",) * len(self.features)
        names = [("patient", name) if name else ("photograph", row) for row, name in enumerate(stated)]
        numbers: dict[tuple[str, str | int], int] = {}
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)

    def where(self, is_kept_N: Bools) -> "Sample":
        """Returns some of the photographs."""
        return Sample(
            features=self.features[is_kept_N],
            image_ids=tuple(itertools.compress(self.image_ids, is_kept_N)),
            patients=tuple(itertools.compress(self.patients, is_kept_N)),
            conditions=tuple(itertools.compress(self.conditions, is_kept_N)),
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Photographs of both sides, as of one condition: the figures they are enough for, and why others are absent."""

    num_real: int
    num_generated: int
    figures: Mapping[str, Interval]
    too_few: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Usefulness:
    """What generated photographs are worth to a classifier that is tested on real ones. Higher is better throughout.

    Args:
        figures: The metric of a probe fitted on ``real``, ``generated`` and ``real_and_generated`` photographs.
        gap: Generated in place of real, -1 to 1; at 0 they are as good as real.
        gain: Real and generated less real alone, -1 to 1; above 0 the generated ones add something.
    """

    figures: Mapping[str, Interval]
    gap: Interval
    gain: Interval


def describe(
    photographs: Iterable[Photograph],
    space: Space,
    *,
    patients: Sequence[str] = (),
    conditions: Sequence[str | None] = (),
    batch_size: int = 32,
) -> Sample:
    """Takes photographs to a space of features, a batch at a time; ids come from their own pixels.

    Args:
        photographs: (H, W, 3) uint8 RGB of any sizes; may be an iterator.
        space: Gives a batch's features, (B, D).
        patients: As in `Sample`.
        conditions: As in `Sample`.
        batch_size: Photographs held at a time.

    Raises:
        ValueError: If there is no photograph, or patients or conditions are not one for each.
    """
    parts: list[Features] = []
    image_ids: list[str] = []
    waiting = iter(photographs)
    while batch := list(itertools.islice(waiting, batch_size)):
        parts.append(np.asarray(space(batch), dtype=np.float32))
        image_ids.extend(fundus.pixel_digest(image) for image in batch)
    if not parts:
        raise ValueError("found no photograph; required at least one")
    return Sample(
        features=np.concatenate(parts),
        image_ids=tuple(image_ids),
        patients=tuple(patients),
        conditions=tuple(conditions),
    )


def require_held_out(image_ids: Sequence[str], trained_on: TrainedOn) -> None:
    """Refuses a reference that holds what the generator was trained on.

    Args:
        image_ids: Of the reference.
        trained_on: The image ids that the generator was trained on, or a predicate that knows them. A predicate may
            know of more than equal pixels: near-duplicates, other photographs of the same patients.

    Raises:
        LineageError: If any of the reference is among them; the message says how many.
        ValueError: If ``trained_on`` is an empty collection, which would check nothing.
    """
    if callable(trained_on):
        num_found = sum(bool(trained_on(image_id)) for image_id in image_ids)
    elif not trained_on:
        raise ValueError(
            "found no image id of what the generator was trained on, so no reference can be checked; required all of "
            "them, or a predicate"
        )
    else:
        known = frozenset(trained_on)
        num_found = sum(image_id in known for image_id in image_ids)
    if num_found:
        raise LineageError(
            f"found {num_found:,} of {len(image_ids):,} reference photographs among those that the generator was "
            "trained on; required none, so take photographs that were held out"
        )


def compare(
    real: Sample,
    generated: Sample,
    *,
    trained_on: TrainedOn,
    figures: Sequence[str] = FIGURES,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Measures generated photographs against held-out real ones.

    Args:
        real: The held-out photographs.
        generated: The generated ones, in the same space.
        trained_on: As in `require_held_out`.
        figures: Of `FIGURES`; lower is better for ``kid`` and ``fid``, higher for the others.
        num_resamples: Of each interval.
        seed: Of the resamples.

    Returns:
        The figures asked for, with 95% intervals.

    Raises:
        LineageError: If the generator was trained on a photograph of ``real``.
        ValueError: If photographs are too few for a figure (the message says how many are needed), one is on both
            sides, a figure is unknown, or the features are not finite or not of one width.
    """
    _require_comparable(real, generated, figures)
    require_held_out(real.image_ids, trained_on)
    if short := _shortages(real, generated, figures):
        raise ValueError("; ".join(short.values()))
    return _figures(real, generated, figures, num_resamples, seed)


def compare_if_enough(
    real: Sample,
    generated: Sample,
    *,
    trained_on: TrainedOn,
    figures: Sequence[str] = FIGURES,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Group:
    """Measures as `compare`, except that too few photographs are no error: see `Group`."""
    _require_comparable(real, generated, figures)
    require_held_out(real.image_ids, trained_on)
    return _group(real, generated, figures, num_resamples, seed)


def compare_by_condition(
    real: Sample,
    generated: Sample,
    *,
    trained_on: TrainedOn,
    figures: Sequence[str] = FIGURES,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Group]:
    """Measures each condition apart: what was generated for a condition against held-out real photographs of it.

    Arguments and errors are those of `compare`, except that too few photographs are no error: a figure that a group is
    too small for is in its ``too_few``, with the reason. Photographs without a condition are the group `NOT_STATED`.

    Returns:
        A group for every condition that occurs on either side, by name.
    """
    _require_comparable(real, generated, figures)
    require_held_out(real.image_ids, trained_on)
    real_N, generated_M = _conditions(real), _conditions(generated)
    groups: dict[str, Group] = {}
    for condition in sorted({*real_N.tolist(), *generated_M.tolist()}):
        asked, drawn = real.where(real_N == condition), generated.where(generated_M == condition)
        groups[condition] = _group(asked, drawn, figures, num_resamples, seed)
    return groups


def usefulness(
    real: Sample,
    real_label_N: Ints,
    generated: Sample,
    generated_label_M: Ints,
    tested: Sample,
    tested_label_T: Ints,
    *,
    trained_on: TrainedOn,
    num_classes: int,
    metric: metrics.Metric = metrics.auroc_by_resample,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Usefulness:
    """Fits the house probe on real, on generated and on both, and tests each on the same held-out real photographs.

    Source: train on synthetic, test on real (Esteban et al. 2017, arXiv:1706.02633, section 4; Ravuri and Vinyals 2019,
    arXiv:1905.10887). Intervals resample the tested patients, the same for all three fits, so that gap and gain are
    paired; the fits are not repeated.

    Args:
        real: Real photographs to fit on; the generator may have been trained on them.
        real_label_N: Class indices, 0 to ``num_classes`` - 1.
        generated: Generated photographs to fit on, in the same space.
        generated_label_M: The classes that they were drawn for.
        tested: Held-out real photographs.
        tested_label_T: Their classes.
        trained_on: As in `require_held_out`; the reference is ``tested``.
        num_classes: At least 2.
        metric: `metrics.auroc_by_resample` or `metrics.average_precision_by_resample`, both 0 to 1.
        num_resamples: Bootstrap resamples of the tested patients.
        seed: Of the probe's inner folds and of the resamples.

    Raises:
        LineageError: If the generator or the probe was given a tested photograph or, as far as they are named, patient.
        ValueError: If a class has fewer than 5 patients in one of the three samples, labels are out of range or not
            one for each photograph, or the features are not finite or not of one width.
    """
    _require_comparable(tested, generated, ())
    _require_comparable(real, generated, ())
    require_held_out(tested.image_ids, trained_on)
    num_images = len(set(tested.image_ids) & set(real.image_ids))
    num_patients = len((set(tested.patients) & set(real.patients)) - {""})
    if num_images or num_patients:
        raise LineageError(
            f"found {num_images:,} tested photographs and {num_patients:,} tested patients among those that the probe "
            "is fitted on; required none"
        )
    fits = {
        "real": (real.features, real_label_N, real.patient_numbers),
        "generated": (generated.features, generated_label_M, generated.patient_numbers),
    }
    _require_classes(fits | {"tested": (tested.features, tested_label_T, tested.patient_numbers)}, num_classes)
    fits["real_and_generated"] = (
        np.concatenate([real.features, generated.features]),
        np.concatenate([real_label_N, generated_label_M]),
        np.concatenate([real.patient_numbers, generated.patient_numbers + len(real.features)]),
    )
    values: dict[str, float] = {}
    resampled: dict[str, metrics.Floats] = {}
    for name, (feature_ND, label_N, patient_N) in fits.items():
        score_TC = probe.linear_scores(
            feature_ND, label_N, patient_N, tested.features, num_classes=num_classes, seed=seed
        )
        values[name], resampled[name] = metrics.bootstrap(
            metric,
            tested_label_T,
            score_TC,
            np.zeros(len(tested_label_T), dtype=np.int64),
            tested.patient_numbers,
            num_resamples=num_resamples,
            seed=seed,
        )

    def above_real(name: str) -> Interval:
        return metrics.interval(values[name] - values["real"], resampled[name] - resampled["real"])

    return Usefulness(
        figures={name: metrics.interval(values[name], resampled[name]) for name in fits},
        gap=above_real("generated"),
        gain=above_real("real_and_generated"),
    )


def _require_comparable(real: Sample, generated: Sample, figures: Sequence[str]) -> None:
    if unknown := sorted(set(figures) - set(FIGURES)):
        raise ValueError(f"found the figures {unknown}; required some of {list(FIGURES)}")
    if real.features.shape[1] != generated.features.shape[1]:
        raise ValueError(
            f"found {real.features.shape[1]:,} features of real and {generated.features.shape[1]:,} of generated "
            "photographs; required one space"
        )
    if not all(np.isfinite(side.features).all() for side in (real, generated)):
        raise ValueError("found features that are not finite; required finite ones")
    if num_shared := len(set(real.image_ids) & set(generated.image_ids)):
        raise ValueError(f"found {num_shared:,} photographs both real and generated; required none")


def _shortages(real: Sample, generated: Sample, figures: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for figure in figures:
        reasons = [
            f"{side}: {short}"
            for side, sample in (("real", real), ("generated", generated))
            if (
                short := distances.shortage(
                    figure,
                    num_features=sample.features.shape[1],
                    num_photographs=len(sample.features),
                    num_patients=len(np.unique(sample.patient_numbers)),
                )
            )
        ]
        if reasons:
            found[figure] = "; ".join(reasons)
    return found


def _group(real: Sample, generated: Sample, figures: Sequence[str], num_resamples: int, seed: int) -> Group:
    too_few = _shortages(real, generated, figures)
    enough = [name for name in figures if name not in too_few]
    return Group(
        num_real=len(real.features),
        num_generated=len(generated.features),
        figures=_figures(real, generated, enough, num_resamples, seed),
        too_few=too_few,
    )


def _figures(
    real: Sample, generated: Sample, figures: Sequence[str], num_resamples: int, seed: int
) -> dict[str, Interval]:
    sides = real.features, generated.features
    patients = real.patient_numbers, generated.patient_numbers
    found: dict[str, Interval] = {}
    if "kid" in figures:
        found["kid"] = distances.kid(*sides, patients=patients, num_resamples=num_resamples, seed=seed)
    if "fid" in figures:
        found["fid"] = distances.fid(*sides, patients=patients, num_resamples=num_resamples, seed=seed)
    if set(figures) & set(NEIGHBOURHOODS):
        found |= distances.neighbourhoods(*sides, patients=patients, num_resamples=num_resamples, seed=seed)
    return {name: found[name] for name in figures}


def _conditions(sample: Sample) -> npt.NDArray[np.object_]:
    stated = sample.conditions or (None,) * len(sample.features)
    return np.array([NOT_STATED if each is None else each for each in stated], dtype=object)


def _require_classes(sides: Mapping[str, tuple[Features, Ints, Ints]], num_classes: int) -> None:
    faults = []
    for name, (feature_ND, label_N, patient_N) in sides.items():
        if (
            num_classes < 2
            or label_N.shape != (len(feature_ND),)
            or not set(label_N.tolist()) <= set(range(num_classes))
        ):
            raise ValueError(
                f"found {len(label_N):,} labels for {len(feature_ND):,} {name} photographs; required one of 0 to "
                f"{num_classes - 1} for each, and two classes or more"
            )
        counts = [len(np.unique(patient_N[label_N == index])) for index in range(num_classes)]
        faults += [
            f"found {count} patients of class {index} among the {name} photographs"
            for index, count in enumerate(counts)
            if count < MIN_PATIENTS_PER_CLASS
        ]
    if faults:
        raise ValueError(f"{'; '.join(faults)}; required {MIN_PATIENTS_PER_CLASS} of each class in each sample")
