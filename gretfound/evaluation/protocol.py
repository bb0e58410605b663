"""The protocol: which tasks a labelled site folder supports, how they are split, scored, compared and broken down.

Patients never stand on both sides of a split. Encoders see the same folds and the same bootstrap resamples, so their
differences are paired. A task without enough patients in each class is skipped and says so.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.model_selection import StratifiedGroupKFold

from gretfound import duplicates, fundus, metadata, storage
from gretfound.errors import StorageError
from gretfound.evaluation import metrics, probe
from gretfound.evaluation.metrics import Interval

# Legend of array suffixes: N photographs, D features, C classes, R resamples of the patients.
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Cells = Mapping[str, Any]
log = logging.getLogger(__name__)

ENCODERS = ("pretrained", "untrained", "raw_pixels")
BASELINES = ENCODERS[1:]
RAW_PIXELS_SIZE_PX = 32
DECODING_THREADS = 4
METRICS: dict[str, tuple[str, metrics.Metric]] = {
    "auroc": ("linear", metrics.auroc_by_resample),
    "average_precision": ("linear", metrics.average_precision_by_resample),
    "knn_auroc": ("neighbours", metrics.auroc_by_resample),
    "knn_average_precision": ("neighbours", metrics.average_precision_by_resample),
}
AGE_BANDS = ((0, 40, "under 40"), (40, 60, "40 to 59"), (60, 75, "60 to 74"), (75, 200, "75 and over"))
GROUP_ATTRIBUTES = ("sex", "age_band", "ethnicity", "country", "camera")
MAX_GROUPS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question with classes; ``label`` gives the class of a photograph's cells, or None where they don't say."""

    key: str
    title: str
    classes: tuple[str, ...]
    label: Callable[[Cells], int | None]


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One row of a labelled site folder; ``number`` is its line in the CSV, ``uri`` empty where the file is absent."""

    number: int
    uri: str
    cells: Cells


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A labelled site folder as it was found; ``digest`` covers its table and its files' names and sizes."""

    name: str
    digest: str
    rows: tuple[EvaluationRow, ...]
    num_cells_not_understood: int


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """The readable photographs of an evaluation set with their features, in the order of their rows."""

    name: str
    row_numbers: tuple[int, ...]
    image_ids: tuple[str, ...]
    cells: tuple[Cells, ...]
    features: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """One task on one set: which rows, which labels, which folds. ``fitted_on`` is empty for cross-validation."""

    name: str
    set_name: str
    fitted_on: str
    task: Task
    rows: Ints
    labels: Ints
    folds: Ints
    patients: Ints
    fitted_rows: Ints
    fitted_labels: Ints
    fitted_patients: Ints
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one encoder reached in one assessment."""

    scores: Mapping[str, Floats]
    figures: Mapping[str, Interval]
    resampled: Mapping[str, Floats]


def _condition(key: str, title: str) -> Task:
    def label(cells: Cells) -> int | None:
        value = cells.get(key)
        return None if value is None else int(bool(value))

    return Task(key=key, title=title, classes=(f"no {title}", title), label=label)


def _any_dr(cells: Cells) -> int | None:
    if cells.get("dr") is not None:
        return int(cells["dr"] > 0)
    return None if cells.get("dr_present") is None else int(bool(cells["dr_present"]))


def _threshold(key: str, threshold: float) -> Callable[[Cells], int | None]:
    return lambda cells: None if cells.get(key) is None else int(cells[key] >= threshold)


def _sex(cells: Cells) -> int | None:
    return {"female": 0, "male": 1}.get(cells.get("sex") or "")


def tasks_for(cells: Sequence[Cells]) -> tuple[Task, ...]:
    """Returns every task that metadata cells can carry; the age task splits at the median of these very cells."""
    ages = [float(row["age"]) for row in cells if row.get("age") is not None]
    median_age = float(np.median(ages)) if ages else 0.0
    return (
        Task(
            key="any_dr",
            title="any diabetic retinopathy",
            classes=("no diabetic retinopathy", "diabetic retinopathy"),
            label=_any_dr,
        ),
        Task(
            key="referable_dr",
            title="referable diabetic retinopathy (ICDR 2 to 4)",
            classes=("ICDR 0 or 1", "ICDR 2 to 4"),
            label=_threshold("dr", 2),
        ),
        Task(
            key="dr_grade",
            title="diabetic retinopathy grade (ICDR 0 to 4, one against the rest)",
            classes=tuple(f"ICDR {grade}" for grade in range(5)),
            label=lambda row: None if row.get("dr") is None else int(row["dr"]),
        ),
        Task(
            key="dme",
            title="any diabetic macular edema",
            classes=("no macular edema", "macular edema"),
            label=_threshold("dme", 1),
        ),
        _condition("glaucoma", "glaucoma"),
        _condition("amd", "age-related macular degeneration"),
        _condition("cataract", "cataract"),
        _condition("pathologic_myopia", "pathologic myopia"),
        _condition("hypertension", "hypertension"),
        _condition("diabetes", "diabetes"),
        _condition("mi", "myocardial infarction"),
        _condition("stroke", "stroke"),
        _condition("heart_failure", "heart failure"),
        _condition("ckd", "chronic kidney disease"),
        _condition("parkinsons", "Parkinson's disease"),
        _condition("dementia", "dementia"),
        Task(key="sex", title="sex", classes=("female", "male"), label=_sex),
        Task(
            key="age_over_median",
            title=f"age {median_age:.0f} or older (the median)",
            classes=(f"under {median_age:.0f}", f"{median_age:.0f} or older"),
            label=_threshold("age", median_age),
        ),
    )


def read_evaluation_set(uri: str) -> EvaluationSet:
    """Reads a labelled site folder's table; photographs are opened later, one by one.

    Args:
        uri: A folder or bucket prefix with ``metadata.csv`` and ``traindata/``; its last part becomes the name.

    Raises:
        StorageError: If there is no ``metadata.csv``, it has no column ``Image``, or no row.
    """
    csv_bytes = storage.read_bytes(storage.join(uri, "metadata.csv"))
    photographs_uri = storage.join(uri, "traindata")
    listed = {found.removeprefix(photographs_uri).lstrip("/") for found in storage.list_uris(photographs_uri)}
    with storage.scratch_folder() as scratch:
        csv_path = Path(scratch) / "metadata.csv"
        csv_path.write_bytes(csv_bytes)
        try:
            table = metadata.read_metadata(csv_path)
        except ValueError as error:
            raise StorageError(f"{uri}/metadata.csv is no table of photographs: {error}") from error
    if not table.rows:
        raise StorageError(f"{uri}/metadata.csv has no rows; required one row a photograph")
    rows = tuple(
        EvaluationRow(
            number=row.line,
            uri=storage.join(photographs_uri, row.image) if row.image in listed else "",
            cells=dict(row.cells),
        )
        for row in table.rows
    )
    digest = hashlib.sha256(csv_bytes + "\n".join(sorted(listed)).encode()).hexdigest()
    return EvaluationSet(
        name=uri.rstrip("/").rpartition("/")[2],
        digest=digest,
        rows=rows,
        num_cells_not_understood=len(table.problems),
    )


def sign(evaluation_set: EvaluationSet) -> pa.Table:
    """Returns ids and hashes of a set's readable photographs (`duplicates.EVALUATION_SCHEMA`), to keep corpora from."""
    rows = [row for row in evaluation_set.rows if row.uri]
    with ThreadPoolExecutor(DECODING_THREADS) as threads:
        signed = [each for each in threads.map(_signed, rows) if each is not None]
    if len(signed) < len(rows):
        log.warning(
            "%d photograph(s) of an evaluation set could not be read, so no corpus is kept from them",
            len(rows) - len(signed),
        )
    return pa.Table.from_pylist(signed, duplicates.EVALUATION_SCHEMA)


def collect(
    rows: Sequence[tuple[str, EvaluationRow]], batches: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> tuple[dict[str, Photographs], dict[str, list[dict[str, Any]]]]:
    """Gathers what workers found, in whatever order they were done, into evaluation sets.

    Args:
        rows: Every row with its set's name.
        batches: Columns ``place`` (index into ``rows``), ``image_id``, ``reason`` (empty where it was readable) and
            one array of features an encoder.

    Returns:
        The readable photographs by set, and by set the rows that could not be read, with reasons.

    Raises:
        StorageError: If a set has no readable photograph.
    """
    parts = list(batches)
    order = np.argsort(np.concatenate([part["place"] for part in parts]))
    columns = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
    assert columns["place"].tolist() == list(range(len(rows))), "every row comes back once"
    found: dict[str, Photographs] = {}
    faults: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(name for name, _ in rows):
        places = [place for place, (owner, _) in enumerate(rows) if owner == name]
        readable = [place for place in places if not columns["reason"][place]]
        faults[name] = [
            {"row": rows[place][1].number, "reason": str(columns["reason"][place])}
            for place in places
            if columns["reason"][place]
        ]
        if not readable:
            raise StorageError(f"none of the {len(places)} photographs of the set {name!r} could be read")
        found[name] = Photographs(
            name=name,
            row_numbers=tuple(rows[place][1].number for place in readable),
            image_ids=tuple(str(columns["image_id"][place]) for place in readable),
            cells=tuple(rows[place][1].cells for place in readable),
            features={encoder: columns[encoder][readable].astype(np.float32) for encoder in ENCODERS},
        )
    return found, faults


def without(photographs: Photographs, tested: Sequence[Photographs]) -> Photographs:
    """Returns the set without the photographs of the tested sets, by the digest of their pixels.

    Public data sets do hold photographs twice: one of IDRiD's official test part is in its training part.
    """
    held = {image_id for each in tested for image_id in each.image_ids}
    kept = [index for index, image_id in enumerate(photographs.image_ids) if image_id not in held]
    return Photographs(
        name=photographs.name,
        row_numbers=tuple(photographs.row_numbers[index] for index in kept),
        image_ids=tuple(photographs.image_ids[index] for index in kept),
        cells=tuple(photographs.cells[index] for index in kept),
        features={name: feature_ND[kept] for name, feature_ND in photographs.features.items()},
    )


def describe_set(
    found: EvaluationSet, photographs: Photographs, faults: Sequence[Mapping[str, Any]], *, is_fitted_on: bool
) -> dict[str, Any]:
    """Returns an evaluation set's counts; photographs that cannot be read are named by their row alone."""
    return {
        "digest": found.digest,
        "role": "probes are fitted on it" if is_fitted_on else "tested on",
        "num_rows": len(found.rows),
        "num_readable": len(found.rows) - len(faults),
        "num_left_out": len(found.rows) - len(faults) - len(photographs.image_ids),
        "num_repeated": len(photographs.image_ids) - len(set(photographs.image_ids)),
        "num_cells_not_understood": found.num_cells_not_understood,
        "unreadable": [dict(fault) for fault in faults],
    }


def describe_protocol(
    *,
    num_folds: int,
    num_resamples: int,
    min_patients_per_class: int,
    features: str,
    seed: int,
    is_checked_against_corpus: bool,
) -> dict[str, str]:
    """Returns the protocol in sentences, for the report; ``features`` says what is probed of the encoders."""
    return {
        "encoders": "the pretrained encoder; the same architecture untrained (random weights from the seed); the "
        f"photograph itself at {RAW_PIXELS_SIZE_PX} px. All are frozen and read the same preprocessed photographs.",
        "features": features,
        "splits": f"{num_folds} folds, stratified by class and grouped by patient: no patient is fitted on and tested. "
        "A photograph without a patient counts as a patient of its own; identical photographs count as one patient's.",
        "linear_probe": "standardised features, L2-penalised logistic regression; the penalty is chosen by log loss on "
        f"{probe.NUM_INNER_FOLDS} inner folds of the fitted photographs, again grouped by patient.",
        "nearest_neighbours": f"cosine similarity of standardised features, {probe.NUM_NEIGHBOURS} neighbours, weights "
        f"exp(similarity / {probe.TEMPERATURE}).",
        "AUROC": "photographs are compared within a fold only, because scores of different fits are not on one scale; "
        "folds are weighted by their pairs. With more than two classes: each against the rest, averaged.",
        "average_precision": "as the AUROC, folds weighted by their positives; chance is the share of positives.",
        "intervals": f"95% percentile intervals over {num_resamples} resamples of patients, the same for all encoders, "
        "so that differences are paired. The fits are not repeated, so the choice of training photographs is not in "
        "the interval.",
        "tasks": f"a class needs {max(min_patients_per_class, num_folds)} patients, a task two classes; others are "
        "listed as skipped. Tests are not corrected for their number.",
        "seed": str(seed),
        "held_out": "no evaluation photograph (by the digest of its pixels) is in the encoder's corpus"
        if is_checked_against_corpus
        else "the encoder names no corpus, so nothing could be checked",
    }


def _signed(row: EvaluationRow) -> dict[str, Any] | None:
    try:
        image = fundus.decode_photograph(storage.read_bytes(row.uri))
    except fundus.UnreadablePhotograph:
        return None
    words = duplicates.hash_photograph(image, fundus.find_field_of_view(image))
    return {"image_id": fundus.pixel_digest(image), "hash": words.astype("<u8").tobytes()}


def plan(
    photographs: Photographs,
    *,
    num_folds: int,
    min_patients_per_class: int,
    seed: int,
    is_named_by_set: bool,
    fitted: Photographs | None = None,
) -> tuple[list[Assessment], list[dict[str, str]]]:
    """Decides which tasks a set supports and splits each by patient.

    A photograph without a patient is a patient of its own; identical photographs always count as one patient's.

    Args:
        photographs: The set to test on.
        num_folds: Folds of the cross-validation.
        min_patients_per_class: A class with fewer patients is left out, a task with fewer than two classes skipped.
        seed: Of the split.
        is_named_by_set: Whether names read ``SET/task``.
        fitted: Another set to fit the probes on; ``photographs`` is then an external set and is not split.

    Returns:
        The assessments, and for each skipped task its set, key and reason.
    """
    planned: list[Assessment] = []
    skipped: list[dict[str, str]] = []
    source = fitted or photographs
    prefix = f"{source.name}->{photographs.name}" if fitted else photographs.name
    for task in tasks_for(source.cells):
        required = min_patients_per_class if fitted else max(min_patients_per_class, num_folds)
        selected, reason, notes = _labelled(task, photographs, required)
        chosen = selected
        if fitted and selected is not None:
            chosen, reason, _ = _labelled(task, fitted, required)
            if chosen is not None and set(chosen[1]) != set(selected[1]):
                reason, chosen = "the two sets do not hold the same classes", None
        if selected is None or chosen is None:
            if reason:
                skipped.append({"set": prefix, "task": task.key, "title": task.title, "reason": reason})
            continue
        row_N, label_N, patient_N = selected
        kept = sorted(set(label_N.tolist()))
        task = replace(task, classes=tuple(task.classes[index] for index in kept))
        relabelled = {old: new for new, old in enumerate(kept)}
        label_N = np.array([relabelled[label] for label in label_N.tolist()])
        if fitted:
            fold_N = np.zeros(len(row_N), dtype=np.int64)
            fitted_row_N, old_label_N, fitted_patient_N = chosen
            fitted_label_N = np.array([relabelled[label] for label in old_label_N.tolist()])
        else:
            fold_N = _folds(label_N, patient_N, num_folds=num_folds, seed=seed)
            fitted_row_N = fitted_label_N = fitted_patient_N = np.zeros(0, dtype=np.int64)
        planned.append(
            Assessment(
                name=f"{prefix}/{task.key}" if is_named_by_set or fitted else task.key,
                set_name=photographs.name,
                fitted_on=fitted.name if fitted else "",
                task=task,
                rows=row_N,
                labels=label_N,
                folds=fold_N,
                patients=patient_N,
                fitted_rows=fitted_row_N,
                fitted_labels=fitted_label_N,
                fitted_patients=fitted_patient_N,
                notes=tuple(notes),
            )
        )
    return planned, skipped


def plan_sets(
    tested: Sequence[Photographs],
    fitted: Photographs | None,
    *,
    num_folds: int,
    min_patients_per_class: int,
    seed: int,
) -> tuple[list[Assessment], list[dict[str, str]]]:
    """Plans every set by itself and, where there is one to fit on, as an external set of that one as well.

    Args:
        tested: The sets to test on.
        fitted: Another set to fit the probes on.
        num_folds: As `plan` takes it, like the others.
        min_patients_per_class: See there.
        seed: See there.

    Returns:
        As `plan` does; names read ``SET/task`` where there is more than one set.
    """
    planned: list[Assessment] = []
    skipped: list[dict[str, str]] = []
    for photographs in tested:
        for source in (None, fitted) if fitted else (None,):
            found = plan(
                photographs,
                num_folds=num_folds,
                min_patients_per_class=min_patients_per_class,
                seed=seed,
                is_named_by_set=len(tested) > 1 or fitted is not None,
                fitted=source,
            )
            planned, skipped = planned + found[0], skipped + found[1]
    return planned, skipped


def assess(
    assessment: Assessment,
    feature_ND: npt.NDArray[np.float32],
    fitted_feature_ND: npt.NDArray[np.float32] | None = None,
    *,
    num_resamples: int,
    seed: int,
) -> Outcome:
    """Fits both probes fold by fold and measures them with intervals.

    Args:
        assessment: The task, its rows and its folds.
        feature_ND: One encoder's features of all readable photographs of the set.
        fitted_feature_ND: The same of the set that the probes are fitted on, for an external set.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the inner splits and of the bootstrap.
    """
    num_classes = len(assessment.task.classes)
    test_ND = feature_ND[assessment.rows]
    scores = {name: np.zeros((len(test_ND), num_classes)) for name in ("linear", "neighbours")}
    for fold in np.unique(assessment.folds):
        test = np.flatnonzero(assessment.folds == fold)
        if fitted_feature_ND is None:
            train = np.flatnonzero(assessment.folds != fold)
            fit_ND, label_N, patient_N = test_ND[train], assessment.labels[train], assessment.patients[train]
        else:
            fit_ND = fitted_feature_ND[assessment.fitted_rows]
            label_N, patient_N = assessment.fitted_labels, assessment.fitted_patients
        scores["linear"][test] = probe.linear_scores(
            fit_ND, label_N, patient_N, test_ND[test], num_classes=num_classes, seed=seed
        )
        scores["neighbours"][test] = probe.neighbour_scores(fit_ND, label_N, test_ND[test], num_classes=num_classes)
    figures, resampled = {}, {}
    for name, (kind, metric) in METRICS.items():
        value, resampled[name] = metrics.bootstrap(
            metric,
            assessment.labels,
            scores[kind],
            assessment.folds,
            assessment.patients,
            num_resamples=num_resamples,
            seed=seed,
        )
        figures[name] = metrics.interval(value, resampled[name])
    return Outcome(scores=scores, figures=figures, resampled=resampled)


def difference(outcome: Outcome, baseline: Outcome, metric: str) -> Interval:
    """Returns how far an encoder is above a baseline, with the interval of the paired resamples."""
    value = outcome.figures[metric].value - baseline.figures[metric].value
    return metrics.interval(value, outcome.resampled[metric] - baseline.resampled[metric])


def group_figures(
    assessment: Assessment,
    outcome: Outcome,
    cells: Sequence[Cells],
    *,
    min_patients_per_class: int,
    num_resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Breaks the linear probe's AUROC down by every attribute that the cells hold and at least two groups support.

    The equity-scaled AUROC shrinks with the number of groups, so the worst group, the gap and the counts stand beside
    it. Groups with too few patients of a class are counted and not measured.

    Source: ES-AUC = AUC / (1 + sum of |AUC_g - AUC|), FairVision and Harvard-GF.
    """
    found: dict[str, dict[str, Any]] = {}
    for attribute in GROUP_ATTRIBUTES:
        values = [_group_of(cells[row], attribute) for row in assessment.rows.tolist()]
        measured: dict[str, Any] = {}
        too_few: dict[str, int] = {}
        for group, num_images in Counter(value for value in values if value is not None).most_common():
            rows = np.flatnonzero(np.array([value == group for value in values]))
            label_N, patient_N = assessment.labels[rows], assessment.patients[rows]
            counts = [len(np.unique(patient_N[label_N == index])) for index in range(len(assessment.task.classes))]
            if min(counts) < min_patients_per_class or len(measured) == MAX_GROUPS_SHOWN:
                too_few[group] = num_images
                continue
            value, resampled = metrics.bootstrap(
                metrics.auroc_by_resample,
                label_N,
                outcome.scores["linear"][rows],
                assessment.folds[rows],
                np.unique(patient_N, return_inverse=True)[1],
                num_resamples=num_resamples,
                seed=seed,
            )
            if not np.isfinite(value):
                too_few[group] = num_images
                continue
            measured[group] = {
                "auroc": interval_json(metrics.interval(value, resampled)),
                "num_images": num_images,
                "num_patients": len(np.unique(patient_N)),
                "num_images_by_class": np.bincount(label_N, minlength=len(counts)).tolist(),
            }
        if len(measured) > 1:
            found[attribute] = {**spread(measured, outcome.figures["auroc"].value), "too_few": too_few}
    return found


def spread(measured: Mapping[str, Mapping[str, Any]], overall: float) -> dict[str, Any]:
    """Summarises groups' AUROCs: the worst group, the gap between best and worst, the equity-scaled AUROC."""
    values = {group: float(entry["auroc"]["value"]) for group, entry in measured.items()}
    worst = min(values, key=lambda group: values[group])
    return {
        "groups": dict(measured),
        "num_groups": len(values),
        "worst_group": worst,
        "worst_auroc": values[worst],
        "gap": max(values.values()) - values[worst],
        "equity_scaled_auroc": overall / (1.0 + sum(abs(value - overall) for value in values.values())),
    }


def summarise(
    assessments: Sequence[Assessment],
    outcomes: Mapping[tuple[str, str], Outcome],
    photographs: Mapping[str, Photographs],
    *,
    min_patients_per_class: int,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the figures of all encoders, their differences, the groups and the verdict, as JSON-able values.

    Args:
        assessments: What was planned.
        outcomes: By the assessment's name and the encoder's.
        photographs: The evaluation sets by name.
        min_patients_per_class: A group with fewer patients of a class is counted and not measured.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the bootstrap.

    Returns:
        The report's ``encoders``, ``differences``, ``tasks``, ``groups`` and ``verdict``.
    """
    encoders: dict[str, dict[str, dict[str, dict[str, float]]]] = {name: {} for name in ENCODERS}
    differences: dict[str, dict[str, dict[str, dict[str, float]]]] = {name: {} for name in BASELINES}
    groups: dict[str, dict[str, Any]] = {}
    for assessment in assessments:
        pretrained = outcomes[assessment.name, "pretrained"]
        for encoder in ENCODERS:
            figures = outcomes[assessment.name, encoder].figures
            encoders[encoder][assessment.name] = {name: interval_json(figure) for name, figure in figures.items()}
        for baseline in BASELINES:
            differences[baseline][assessment.name] = {
                name: interval_json(difference(pretrained, outcomes[assessment.name, baseline], name))
                for name in METRICS
            }
        groups[assessment.name] = group_figures(
            assessment,
            pretrained,
            photographs[assessment.set_name].cells,
            min_patients_per_class=min_patients_per_class,
            num_resamples=num_resamples,
            seed=seed,
        )
    for key in dict.fromkeys(assessment.task.key for assessment in assessments):
        across = {a.set_name: a for a in assessments if a.task.key == key and not a.fitted_on}
        if len(across) > 1:
            measured = {
                name: {
                    "auroc": encoders["pretrained"][assessment.name]["auroc"],
                    **{kept: describe(assessment)[kept] for kept in ("num_images", "num_patients")},
                    "num_images_by_class": np.bincount(assessment.labels).tolist(),
                }
                for name, assessment in across.items()
            }
            overall = float(np.mean([entry["auroc"]["value"] for entry in measured.values()]))
            groups[key] = {"site": {**spread(measured, overall), "too_few": {}}}
    return {
        "encoders": encoders,
        "differences": differences,
        "tasks": {assessment.name: describe(assessment) for assessment in assessments},
        "groups": {name: found for name, found in groups.items() if found},
        "verdict": _verdict(assessments, outcomes),
    }


def _verdict(assessments: Sequence[Assessment], outcomes: Mapping[tuple[str, str], Outcome]) -> dict[str, Any]:
    """Counts on how many tasks pretraining is above or below each baseline, by the AUROC of the linear probe."""
    counts = {}
    for baseline in BASELINES:
        pairs = [
            (outcomes[assessment.name, "pretrained"], outcomes[assessment.name, baseline]) for assessment in assessments
        ]
        gaps = [difference(pretrained, other, "auroc") for pretrained, other in pairs]
        counts[baseline] = {
            "num_above": sum(a.figures["auroc"].is_above(b.figures["auroc"]) for a, b in pairs),
            "num_below": sum(b.figures["auroc"].is_above(a.figures["auroc"]) for a, b in pairs),
            "num_paired_above": sum(gap.low > 0 for gap in gaps),
            "num_paired_below": sum(gap.high < 0 for gap in gaps),
            "mean_gain": float(np.mean([gap.value for gap in gaps])) if gaps else 0.0,
        }
    return {"num_tasks": len(assessments), "against": counts, "sentence": _sentence(len(assessments), counts)}


def _sentence(num_tasks: int, counts: Mapping[str, Mapping[str, Any]]) -> str:
    if not num_tasks:
        return "No task had enough patients of each class, so nothing can be said about this encoder."
    above = {baseline: entry["num_above"] for baseline, entry in counts.items()}
    named = {"untrained": "the same network untrained", "raw_pixels": "raw pixels"}
    parts = [f"{named[baseline]} on {count} of {num_tasks}" for baseline, count in above.items()]
    detail = f"its 95% interval lies wholly above that of {' and '.join(parts)} task(s)"
    if all(count == num_tasks for count in above.values()):
        opening = "The pretrained encoder beats both baselines on every task"
    elif not any(above.values()):
        opening = "The pretrained encoder is not shown to beat either baseline on any task"
    else:
        opening = "The pretrained encoder is shown to beat the baselines on part of the tasks only"
    below = sum(entry["num_below"] for entry in counts.values())
    closing = f"; it lies wholly below a baseline in {below} comparison(s)" if below else ""
    gains = ", ".join(f"{counts[baseline]['mean_gain']:+.3f} against {named[baseline]}" for baseline in above)
    paired = ", ".join(
        f"above {named[baseline]} on {entry['num_paired_above']} and below on {entry['num_paired_below']}"
        for baseline, entry in counts.items()
    )
    return (
        f"{opening}: {detail}{closing}. By the interval of the paired difference, which is sharper, it is {paired}. "
        f"Mean difference in AUROC: {gains}."
    )


def describe(assessment: Assessment) -> dict[str, Any]:
    """Returns an assessment's counts as plain JSON-able values."""
    names = assessment.task.classes
    counts = {
        name: {
            "num_images": int((assessment.labels == index).sum()),
            "num_patients": len(np.unique(assessment.patients[assessment.labels == index])),
        }
        for index, name in enumerate(names)
    }
    shares = [entry["num_images"] / len(assessment.labels) for entry in counts.values()]
    return {
        "task": assessment.task.key,
        "title": assessment.task.title,
        "set": assessment.set_name,
        "fitted_on": assessment.fitted_on,
        "classes": counts,
        "num_images": len(assessment.labels),
        "num_patients": len(np.unique(assessment.patients)),
        "num_images_fitted_on": len(assessment.fitted_rows),
        "chance_average_precision": shares[1] if len(shares) == 2 else float(np.mean(shares)),
        "notes": list(assessment.notes),
    }


def interval_json(interval: Interval) -> dict[str, float]:
    """Returns an interval as ``{value, low, high}``."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _group_of(cells: Cells, attribute: str) -> str | None:
    if attribute == "age_band":
        age = cells.get("age")
        return None if age is None else next((name for low, high, name in AGE_BANDS if low <= age < high), None)
    value = cells.get(attribute)
    return None if value is None else str(value)


def _labelled(
    task: Task, photographs: Photographs, required: int
) -> tuple[tuple[Ints, Ints, Ints] | None, str, list[str]]:
    labels = [task.label(cells) for cells in photographs.cells]
    rows = np.array([index for index, label in enumerate(labels) if label is not None], dtype=np.int64)
    if not len(rows):
        return None, "", []  # the set says nothing about this task: not worth a line in the report
    label_N = np.array([label for label in labels if label is not None], dtype=np.int64)
    patient_N = _patients(photographs)[rows]
    num_patients = [len(np.unique(patient_N[label_N == index])) for index in range(len(task.classes))]
    kept = [index for index, count in enumerate(num_patients) if count >= required]
    found = ", ".join(f"{name}: {count}" for name, count in zip(task.classes, num_patients, strict=True))
    if len(kept) < 2:
        return None, f"too few patients in a class ({found}); required {required} in each of two", []
    notes = [
        f"{task.classes[index]} is left out: {count} patient(s), required {required}"
        for index, count in enumerate(num_patients)
        if 0 < count < required
    ]
    is_kept = np.isin(label_N, kept)
    _, patient_N = np.unique(patient_N[is_kept], return_inverse=True)
    return (rows[is_kept], label_N[is_kept], patient_N.astype(np.int64)), "", notes


def _patients(photographs: Photographs) -> Ints:
    """Numbers the patients; joined where identical pixels link two of them."""
    keys = [
        f"patient {cells['patient']}" if cells.get("patient") else f"image {image_id}"
        for cells, image_id in zip(photographs.cells, photographs.image_ids, strict=True)
    ]
    first_key_by_image: dict[str, str] = {}
    joined: dict[str, str] = {}
    for key, image_id in zip(keys, photographs.image_ids, strict=True):
        first = _root(first_key_by_image.setdefault(image_id, key), joined)
        if _root(key, joined) != first:
            joined[_root(key, joined)] = first
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_root(key, joined), len(numbers)) for key in keys], dtype=np.int64)


def _root(key: str, joined: Mapping[str, str]) -> str:
    while key in joined:
        key = joined[key]
    return key


def _folds(label_N: Ints, patient_N: Ints, *, num_folds: int, seed: int) -> Ints:
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    fold_N = np.zeros(len(label_N), dtype=np.int64)
    for fold, (_, test) in enumerate(splitter.split(np.zeros(len(label_N)), label_N, patient_N)):
        fold_N[test] = fold
    return fold_N
