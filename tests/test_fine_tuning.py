"""Heads: the served linear form, honest cross-validation, records that cannot be torn or moved."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gretfound import fine_tuning, storage
from gretfound.errors import LineageError, StorageError
from gretfound.evaluation import probe
from gretfound.fine_tuning import FineTuningJob, Head


def drawn_features(num_classes: int, *, num: int, shift: float) -> tuple[npt.NDArray[np.float32], list[str]]:
    random = np.random.default_rng(3)
    label_N = np.arange(num) % num_classes
    feature_ND = random.normal(5.0, 0.3, (num, 24)) + shift * label_N[:, None] * random.normal(size=24)
    feature_ND[:, 7] = 2.5  # a feature that says nothing
    return feature_ND.astype(np.float32), [str(label) for label in label_N]


def fitted(
    num_classes: int, *, num: int = 90, shift: float = 0.2, patients: list[str] | None = None
) -> tuple[Head, fine_tuning.CrossValidation, npt.NDArray[np.float32], list[str]]:
    features, labels = drawn_features(num_classes, num=num, shift=shift)
    people = patients or [f"p{index:03}" for index in range(num)]
    head, found = fine_tuning.fit_head(
        features, labels, people, label_column="DR", release_id="release-0", seed=0, num_resamples=200
    )
    return head, found, features, labels


@pytest.mark.parametrize("num_classes", [2, 4])
def test_fit_head__is_the_very_probe_of_the_evaluation(num_classes: int) -> None:
    head, _, features, labels = fitted(num_classes)
    label_N = np.array([int(label) for label in labels])
    others = features + np.random.default_rng(5).normal(0, 0.3, features.shape).astype(np.float32)
    expected = probe.linear_scores(features, label_N, np.arange(len(labels)), others, num_classes=num_classes, seed=0)
    np.testing.assert_allclose(head.probabilities(others), expected, atol=1e-4)


def test_fit_head__is_scikit_learns_logistic_regression_at_one_of_the_penalties() -> None:
    head, _, features, labels = fitted(3)
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    differences = []
    for penalty in probe.INVERSE_PENALTIES:
        plain = LogisticRegression(C=penalty, max_iter=20_000).fit(scaled, labels).predict_proba(scaled)
        differences.append(np.abs(head.probabilities(features) - plain).max())
    assert min(differences) < 1e-4 < sorted(differences)[1]


def test_fit_head__finds_what_is_there_and_nothing_where_nothing_is() -> None:
    _, strong, _, _ = fitted(2, shift=0.5)
    _, none, _, _ = fitted(2, shift=0.0)
    assert strong.figure["low"] > 0.95
    assert none.figure["low"] < 0.5 < none.figure["high"]
    assert none.num_folds == 5


def test_fit_head__never_learns_a_patient_to_recognise_the_same_patient() -> None:
    # Features tell patients apart perfectly and labels are drawn by lot for each patient: chance is all there is.
    random = np.random.default_rng(11)
    patient_N = np.repeat(np.arange(40), 5)
    features = (random.normal(size=(40, 24))[patient_N] + random.normal(0, 0.01, (200, 24))).astype(np.float32)
    labels = [str(label) for label in (random.permutation(40) % 2)[patient_N]]
    _, found = fine_tuning.fit_head(
        features, labels, [str(p) for p in patient_N], label_column="x", release_id="r", seed=0, num_resamples=200
    )
    assert found.figure["low"] < 0.5 < found.figure["high"]


def test_fit_head__refuses_too_few_patients_however_many_photographs() -> None:
    with pytest.raises(ValueError, match=r"'0': 2, '1': 1"):
        fitted(2, num=40, patients=[f"p{index % 2 + 2 * (index % 4 == 0)}{index % 2}" for index in range(40)])


def test_write_head__reads_back_and_notices_a_change(tmp_path: Path) -> None:
    head, _, _, _ = fitted(3)
    sha256 = fine_tuning.write_head(str(tmp_path), head)
    restored = fine_tuning.read_head(str(tmp_path), sha256=sha256)
    assert (restored.labels, restored.label_column, restored.release_id) == (("0", "1", "2"), "DR", "release-0")
    np.testing.assert_array_equal(restored.weight, head.weight)
    np.testing.assert_array_equal(restored.bias, head.bias)
    description = json.loads((tmp_path / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps({**description, "labels": ["2", "1", "0"]}))
    with pytest.raises(StorageError, match="SHA-256"):
        fine_tuning.read_head(str(tmp_path), sha256=sha256)


def test_class_names__are_in_the_order_of_a_scale() -> None:
    assert fine_tuning.class_names(["10", "9", "yes", "0", "9", "no"]) == ["0", "9", "10", "no", "yes"]


@pytest.fixture
def job() -> FineTuningJob:
    return FineTuningJob(
        owner="0123456789ab",
        release_id="release-0",
        release_uri="file:///nowhere",
        training_uri="file:///clinic",
        training_digest="0" * 64,
        label_column="DR",
        seed=0,
    ).advanced("queued")


def test_create_job__of_two_writers_one_wins(tmp_path: Path, job: FineTuningJob) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    assert fine_tuning.create_job(hub_uri, job)
    assert not fine_tuning.create_job(hub_uri, job.advanced("failed", error="second"))
    assert fine_tuning.read_job(fine_tuning.job_uri(hub_uri, job.id)) == job
    assert fine_tuning.list_job_ids(hub_uri, job.owner) == [job.id] == fine_tuning.list_job_ids(hub_uri, "")
    assert fine_tuning.list_job_ids(hub_uri, "0123456789") == []


def test_read_job__a_record_moved_or_changed_is_not_that_job(tmp_path: Path, job: FineTuningJob) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    uri = fine_tuning.job_uri(hub_uri, job.id)
    fine_tuning.write_job(uri, dataclasses.replace(job, owner="ba9876543210"))
    with pytest.raises(LineageError, match="changed or moved"):
        fine_tuning.read_job(uri)
    storage.write_json(storage.join(uri, "job.json"), {"state": "queued"})
    with pytest.raises(LineageError, match="other fields"):
        fine_tuning.read_job(uri)


def test_read_labels__knows_derived_columns_and_keeps_one_and_true_apart(tmp_path: Path) -> None:
    (tmp_path / "traindata").mkdir()
    rows = [f"{index}.png,{'diabetic retinopathy' if index % 2 else 'no diabetic retinopathy'}" for index in range(12)]
    (tmp_path / "metadata.csv").write_text("\n".join(["Image,DR", *rows]) + "\n")
    labels = fine_tuning.read_labels(str(tmp_path), "dr_present")
    assert fine_tuning.num_by_class([row.label for row in labels.rows]) == {"no": 6, "yes": 6}
    with pytest.raises(ValueError, match="required 2"):  # "diabetic retinopathy" states no grade: only 0 is known
        fine_tuning.read_labels(str(tmp_path), "DR")
