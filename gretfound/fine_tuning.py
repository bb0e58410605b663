"""Fine-tuning: the durable records of jobs, their labelled photographs, and the linear heads on frozen embeddings.

A job is HUB/fine_tuning/<job id>/job.json; its state goes queued -> running -> succeeded or failed, and each write is
atomic. A finished job has `head.safetensors` (weight CxD, bias C) and `head.json` (the label map) beside it. Nothing
here starts a job.
"""

import csv
import dataclasses
import datetime
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from sklearn.model_selection import StratifiedGroupKFold
from timm.models.vision_transformer import VisionTransformer

from gretfound import fundus, lineage, metadata, storage, withdrawal
from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import LineageError, StorageError
from gretfound.evaluation import metrics, probe
from gretfound.evaluation.protocol import EvaluationSet, read_evaluation_set

# Legend of array suffixes: N photographs, C classes, D features; tensors BCHW as everywhere.
log = logging.getLogger(__name__)
FOLDER = "fine_tuning"
STATES = ("queued", "running", "succeeded", "failed")
UNFINISHED = ("queued", "running")
MAX_CLASSES = 50
MIN_PATIENTS_PER_CLASS = 5
NUM_FOLDS = 5
NUM_RESAMPLES = 1000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished job found; ``labels`` counts the photographs of each class."""

    labels: dict[str, int]
    num_images: int
    num_unlabelled: int
    num_unreadable: int
    num_folds: int
    auroc: dict[str, float]
    head_sha256: str


@dataclass(frozen=True, kw_only=True)
class FineTuningJob:
    """One request for a head and what became of it; times are ISO 8601 in UTC.

    Its id follows from what was asked, by whom and of which release, so asking twice gives the same job.
    """

    owner: str
    release_id: str
    release_uri: str
    training_uri: str
    training_digest: str
    label_column: str
    seed: int
    state: str = "queued"
    attempt: int = 1
    created_at: str = ""
    updated_at: str = ""
    error: str = ""
    outcome: Outcome | None = None

    @property
    def id(self) -> str:
        """`fine_tuning-<owner>-<digest>`: a caller's own jobs can be listed without opening those of others."""
        asked = (self.owner, self.release_id, self.training_uri, self.training_digest, self.label_column, self.seed)
        return f"{FOLDER}-{self.owner}-{lineage.digest_of(asked)[: lineage.ID_HEX_DIGITS]}"

    def advanced(self, state: str, **changes: Any) -> "FineTuningJob":
        """Returns the job in another state, with the time of the change."""
        if state not in STATES:
            raise ValueError(f"found the state {state!r}; required one of {', '.join(STATES)}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        return dataclasses.replace(self, state=state, updated_at=now, created_at=self.created_at or now, **changes)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear classifier on embeddings: the softmax of weight @ embedding + bias."""

    label_column: str
    labels: tuple[str, ...]
    release_id: str
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def probabilities(self, feature_ND: npt.NDArray[np.float32]) -> Floats:
        """Returns NxC: the probability of each class."""
        logits_NC = feature_ND.astype(np.float64) @ self.weight.astype(np.float64).T + self.bias
        powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        shares_NC: Floats = powers_NC / powers_NC.sum(axis=1, keepdims=True)
        return shares_NC


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """One labelled row of a training folder; ``uri`` is empty where the photograph is not there."""

    uri: str
    label: str
    patient: str | None


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a training folder says in one column; ``digest`` covers its table and the names of its photographs."""

    rows: tuple[LabelledRow, ...]
    num_unlabelled: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings of the readable photographs, with their labels; ``patients`` falls back on the pixels' digest."""

    features: npt.NDArray[np.float32]
    labels: list[str]
    patients: list[str]
    num_unreadable: int


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """The AUROC over the folds (macro one-versus-rest where there are several classes): value, low, high."""

    figure: dict[str, float]
    num_folds: int


def job_uri(hub_uri: str, job_id: str) -> str:
    """Returns a job's folder."""
    return storage.join(hub_uri, FOLDER, job_id)


def create_job(hub_uri: str, job: FineTuningJob) -> bool:
    """Writes a new job's record unless it is there already; returns whether this call wrote it."""
    content = lineage.canonical_json(dataclasses.asdict(job))
    return storage.create_bytes(storage.join(job_uri(hub_uri, job.id), "job.json"), content)


def write_job(uri: str, job: FineTuningJob) -> None:
    """Replaces the record in a job's folder, whole or not at all."""
    storage.write_json(storage.join(uri, "job.json"), dataclasses.asdict(job))


def read_job(uri: str) -> FineTuningJob:
    """Reads the record in a job's folder.

    Raises:
        StorageError: If there is none.
        LineageError: If it is no job's record, or not the one that its folder is named after.
    """
    content = storage.read_json(storage.join(uri, "job.json"))
    try:
        outcome = Outcome(**content["outcome"]) if content["outcome"] is not None else None
        job = FineTuningJob(**{**content, "outcome": outcome})
    except (KeyError, TypeError) as error:
        raise LineageError("a fine-tuning record has other fields than this version writes") from error
    if job.id != uri.rstrip("/").rpartition("/")[2]:
        raise LineageError(f"the fine-tuning record in this folder belongs to {job.id}; it was changed or moved")
    return job


def list_job_ids(hub_uri: str, owner: str) -> list[str]:
    """Lists the ids of one owner's jobs; an empty ``owner`` lists all."""
    prefix = f"{FOLDER}-{owner}-" if owner else f"{FOLDER}-"
    return [name for name in storage.list_names(storage.join(hub_uri, FOLDER)) if name.startswith(prefix)]


def default_cache_path() -> Path:
    """Returns where releases are kept on a machine unless somebody says otherwise."""
    return Path.home() / ".cache" / "gretfound" / "releases"


def fetch_release(release_uri: str, cache_path: Path) -> tuple[lineage.Release, Path]:
    """Copies a release to this machine, verifying its record against its id and every file against its digest.

    Args:
        release_uri: A release's folder with its ``record.json``, in a hub or copied from one.
        cache_path: A local folder; the release goes into a folder of its id, and files already there are verified.

    Raises:
        LineageError: If it is no release, its record was changed, or it descends from a site that has withdrawn.
        StorageError: If a file is absent, or not what the record says.
    """
    content = storage.read_json(storage.join(release_uri, "record.json"))
    release = lineage.from_json({name: value for name, value in content.items() if name != "id"}, lineage.Release)
    if release.id != content.get("id"):
        raise LineageError(
            f"the release's record was changed after it was written: its content has the id {release.id}"
        )
    if storage.exists(storage.join(release_uri, withdrawal.MARK_NAME)):
        raise LineageError(f"{release.id} descends from a site that has withdrawn; serve a release without it")
    local_path = cache_path / release.id
    for file in release.files:
        path = local_path / file.path
        if not path.resolve().is_relative_to(local_path.resolve()):
            raise LineageError("the release's record names a file outside its folder; get the release again")
        if not (path.is_file() and path.stat().st_size == file.size_bytes and storage.sha256_of(path) == file.sha256):
            storage.download_file(storage.join(release_uri, file.path), path, sha256=file.sha256)
    return release, local_path


def require_unchanged(job: FineTuningJob, *, release_id: str, training_digest: str) -> None:
    """Makes sure that a job runs on what was asked for.

    Raises:
        LineageError: If the release or the training folder is another one by now.
    """
    if release_id != job.release_id:
        raise LineageError(f"the job was asked for on {job.release_id}, and its folder holds {release_id} now")
    if training_digest != job.training_digest:
        raise LineageError("the training folder changed after the job was asked for; send the request again")


def read_labels(training_uri: str, label_column: str) -> Labels:
    """Reads one column of a training folder's ``metadata.csv`` as classes.

    A column of the dictionary is parsed as everywhere; any other one is somebody's own task, and its words are the
    classes.

    Args:
        training_uri: A folder or bucket prefix with ``metadata.csv`` and ``traindata/``.
        label_column: A column's name.

    Raises:
        StorageError: If there is no such folder.
        ValueError: If there is no such column, it is a measurement, or its classes are too few or too many.
    """
    found = read_evaluation_set(training_uri)
    labels = _labels_of(found, training_uri, label_column)
    rows = tuple(
        LabelledRow(uri=row.uri, label=label, patient=row.cells.get("patient"))
        for row, label in zip(found.rows, labels, strict=True)
        if label
    )
    read = Labels(rows=rows, num_unlabelled=len(labels) - len(rows), digest=found.digest)
    counts = num_by_class([row.label for row in rows])
    if not 2 <= len(counts) <= MAX_CLASSES or min(counts.values()) < MIN_PATIENTS_PER_CLASS:
        shown = counts if len(counts) <= MAX_CLASSES else f"{len(counts)} classes"
        raise ValueError(
            f"found {shown or 'no label'} in {len(labels)} rows; required 2 to {MAX_CLASSES} classes with at least "
            f"{MIN_PATIENTS_PER_CLASS} photographs each, of as many patients"
        )
    return read


def embed_rows(
    rows: Sequence[LabelledRow],
    *,
    encoder: VisionTransformer,
    transform: Transform,
    precision: str,
    batch_images: int,
    num_threads: int,
) -> Embedded:
    """Embeds labelled photographs; one that cannot be read is counted and stops nothing.

    Raises:
        ValueError: If every photograph of a class is unreadable.
    """
    parts: list[npt.NDArray[np.float32]] = []
    labels: list[str] = []
    patients: list[str] = []
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as decoders:
        for start in range(0, len(rows), batch_images):
            batch = rows[start : start + batch_images]
            squares = decoders.map(lambda row: _read_square(row.uri, transform), batch)
            seen = [(row, *square) for row, square in zip(batch, squares, strict=True) if square is not None]
            if seen:
                parts.append(embed_squares(encoder, transform, [square for _, square, _ in seen], precision=precision))
            labels.extend(row.label for row, _, _ in seen)
            patients.extend(row.patient or image_id for row, _, image_id in seen)
    if lost := sorted({row.label for row in rows} - set(labels)):
        raise ValueError(f"found no readable photograph of the classes {lost}; required some of each")
    features = np.concatenate(parts)
    return Embedded(features=features, labels=labels, patients=patients, num_unreadable=len(rows) - len(labels))


def embed_squares(
    encoder: VisionTransformer,
    transform: Transform,
    squares: Iterable[npt.NDArray[np.uint8]],
    *,
    precision: str,
) -> npt.NDArray[np.float32]:
    """Embeds photographs that `Transform.square` has cropped and resized; fine-tuning and serving share this.

    Args:
        encoder: In evaluation mode, on its device.
        transform: Its preprocessing.
        squares: SxSx3 uint8 each.
        precision: ``float32`` or ``bfloat16`` arithmetic; embeddings are float32.

    Returns:
        NxD.
    """
    device = next(encoder.parameters()).device
    pixels_BCHW = torch.from_numpy(np.stack(list(squares))).to(device).permute(0, 3, 1, 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return folder.embed(encoder, transform.normalise(pixels_BCHW), batch=len(pixels_BCHW))


def fit_head(
    feature_ND: npt.NDArray[np.float32],
    labels: list[str],
    patients: list[str],
    *,
    label_column: str,
    release_id: str,
    seed: int,
    groups: Sequence[str] = (),
    num_folds: int = NUM_FOLDS,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[Head, CrossValidation]:
    """Cross-validates a linear probe by patient, then fits it on everything.

    Args:
        feature_ND: Embeddings.
        labels: The class of each photograph.
        patients: Who is photographed; photographs of one patient are never on both sides of a split.
        label_column: Kept with the head.
        release_id: The release that made the embeddings; kept with the head.
        seed: Of the folds and the bootstrap.
        groups: Of each photograph, such as its site: only photographs of one group are compared; empty: all.
        num_folds: Fewer where the smallest class has fewer patients.
        num_resamples: Bootstrap resamples of patients for the interval.

    Returns:
        The head, and how well its like did on patients that it had not seen.

    Raises:
        ValueError: If there are too few classes, too many, or too few patients in one.
    """
    names = class_names(labels)
    label_N = np.array([names.index(label) for label in labels], np.int64)
    patient_N = np.unique(np.array(patients), return_inverse=True)[1].astype(np.int64)
    num_patients = {name: len(set(patient_N[label_N == index])) for index, name in enumerate(names)}
    if not 2 <= len(names) <= MAX_CLASSES or min(num_patients.values()) < MIN_PATIENTS_PER_CLASS:
        raise ValueError(
            f"found {num_patients} patients by class; required 2 to {MAX_CLASSES} classes with at least "
            f"{MIN_PATIENTS_PER_CLASS} patients each"
        )
    splitter = StratifiedGroupKFold(min(num_folds, *num_patients.values()), shuffle=True, random_state=seed)
    score_NC, fold_N = np.zeros((len(label_N), len(names))), np.zeros(len(label_N), np.int64)
    for fold, (train, test) in enumerate(splitter.split(feature_ND, label_N, patient_N)):
        score_NC[test] = probe.linear_scores(
            feature_ND[train], label_N[train], patient_N[train], feature_ND[test], num_classes=len(names), seed=seed
        )
        fold_N[test] = fold
    group_N = np.unique(np.array(groups), return_inverse=True)[1] if groups else np.zeros(len(label_N), np.int64)
    compared_N = fold_N + (fold_N.max() + 1) * group_N
    value, resampled_R = metrics.bootstrap(
        metrics.auroc_by_resample, label_N, score_NC, compared_N, patient_N, num_resamples=num_resamples, seed=seed
    )
    weight_CD, bias_C = _linear_form(feature_ND, label_N, patient_N, num_classes=len(names), seed=seed)
    head = Head(
        label_column=label_column,
        labels=tuple(names),
        release_id=release_id,
        weight=weight_CD.astype(np.float32),
        bias=bias_C.astype(np.float32),
    )
    auroc = metrics.interval(value, resampled_R)
    figure = {"value": auroc.value, "low": auroc.low, "high": auroc.high}
    return head, CrossValidation(figure=figure, num_folds=int(fold_N.max()) + 1)


def num_by_class(labels: list[str]) -> dict[str, int]:
    """Returns the number of photographs of each class, as `class_names` orders them."""
    return {name: labels.count(name) for name in class_names(labels)}


def class_names(labels: list[str]) -> list[str]:
    """Returns the classes in the order of the head's rows: numbers by value, then words by alphabet."""
    return sorted(set(labels), key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def write_head(uri: str, head: Head) -> str:
    """Writes a head into a job's folder.

    Returns:
        The SHA-256 of ``head.json``, which names the digest of the weights.
    """
    # safetensors (0.8) writes the memory of an array as it lies there, whatever its strides say.
    weights = save_tensors({"weight": np.ascontiguousarray(head.weight), "bias": np.ascontiguousarray(head.bias)})
    description = lineage.canonical_json(
        {
            "label_column": head.label_column,
            "labels": list(head.labels),
            "release_id": head.release_id,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
    )
    storage.write_bytes(storage.join(uri, "head.safetensors"), weights)
    storage.write_bytes(storage.join(uri, "head.json"), description)
    return hashlib.sha256(description).hexdigest()


def read_head(uri: str, *, sha256: str) -> Head:
    """Reads a head from a job's folder.

    Raises:
        StorageError: If a file is absent, or not what the job's record says.
    """
    description = json.loads(_verified(storage.join(uri, "head.json"), sha256))
    weights = load_tensors(_verified(storage.join(uri, "head.safetensors"), description["weights_sha256"]))
    return Head(
        label_column=description["label_column"],
        labels=tuple(description["labels"]),
        release_id=description["release_id"],
        weight=weights["weight"],
        bias=weights["bias"],
    )


def _labels_of(found: EvaluationSet, training_uri: str, label_column: str) -> list[str]:
    wanted = _plain(label_column)
    known = next((column.key for column in metadata.COLUMNS if wanted in (_plain(column.name), _plain(column.key))), "")
    derived = next((key for row in found.rows for key in row.cells if _plain(key) == wanted), "")  # such as dr_present
    known = known or derived
    values = [row.cells.get(known) for row in found.rows] if known else _own_column(found, training_uri, wanted)
    if any(isinstance(value, float) for value in values):
        raise ValueError(f"the column {label_column!r} is a measurement; required one with classes")
    return ["" if value is None else _class_name(value) for value in values]


def _class_name(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _own_column(found: EvaluationSet, training_uri: str, wanted: str) -> list[str | None]:
    text = storage.read_bytes(storage.join(training_uri, "metadata.csv")).decode("utf-8-sig", errors="replace")
    table = csv.DictReader(io.StringIO(text))
    names = {_plain(name): name for name in table.fieldnames or []}
    if wanted not in names or "image" not in names:
        raise ValueError("metadata.csv has no such label column; required its name as in the first row")
    label_by_image = {row[names["image"]]: (row[names[wanted]] or "").strip() for row in table}
    photographs_uri = storage.join(training_uri, "traindata") + "/"
    return [label_by_image.get(row.uri.removeprefix(photographs_uri)) or None for row in found.rows]


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _read_square(uri: str, transform: Transform) -> tuple[npt.NDArray[np.uint8], str] | None:
    if not uri:
        return None
    try:
        image = fundus.decode_photograph(storage.read_bytes(uri))
    except (fundus.UnreadablePhotograph, StorageError) as error:
        log.warning("a photograph was left out: %s", type(error).__name__)
        return None
    return transform.square(image), fundus.pixel_digest(image)


def _verified(uri: str, sha256: str) -> bytes:
    content = storage.read_bytes(uri)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise StorageError(f"a head is not what its job says: found SHA-256 {found}, required {sha256}; run it again")
    return content


def _linear_form(
    feature_ND: npt.NDArray[np.float32],
    label_N: npt.NDArray[np.int64],
    patient_N: npt.NDArray[np.int64],
    *,
    num_classes: int,
    seed: int,
) -> tuple[Floats, Floats]:
    """Fits the probe on everything and reads its weight (CxD) and bias (C) off its answers at D + 1 points.

    The logarithm of a softmax-linear classifier is affine up to a term that all classes share, so one standard
    deviation along each axis tells that axis's weights exactly; the served head is thus the very probe that was
    cross-validated.
    """
    origin_D, step_D = feature_ND.mean(axis=0), feature_ND.std(axis=0)
    step_D = np.where(step_D > 0, step_D, 1.0).astype(np.float32)
    points = np.concatenate([origin_D[None], origin_D + np.diag(step_D)]).astype(np.float32)
    scores = probe.linear_scores(feature_ND, label_N, patient_N, points, num_classes=num_classes, seed=seed)
    logits = np.log(scores)
    logits -= logits.mean(axis=1, keepdims=True)
    taken_D = (points[1:] - points[0]).diagonal().astype(np.float64)  # the steps as float32 rounded them
    weight_CD = (logits[1:] - logits[0]).T / taken_D
    return weight_CD, logits[0] - weight_CD @ points[0].astype(np.float64)
