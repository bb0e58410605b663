import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gretfound.evaluation import probe


def drawn(seed: int, num: int, num_features: int, num_classes: int = 2):
    random = np.random.default_rng(seed)
    label_N = np.arange(num) % num_classes
    centres = random.normal(0, 0.6, (num_classes, num_features))
    return (centres[label_N] + random.normal(0, 1, (num, num_features))).astype(np.float32), label_N


@pytest.mark.parametrize("num_features", [5, 300])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_linear_scores__equals_the_plain_pipeline(num_features, num_classes):
    feature_ND, label_N = drawn(0, 80, num_features, num_classes)
    feature_MD, _ = drawn(1, 30, num_features, num_classes)
    scores_MC = probe.linear_scores(
        feature_ND, label_N, np.arange(80), feature_MD, num_classes=num_classes, seed=0, inverse_penalties=(0.01,)
    )
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=20_000, tol=1e-8))
    plain.fit(feature_ND.astype(np.float64), label_N)
    assert scores_MC == pytest.approx(plain.predict_proba(feature_MD.astype(np.float64)), abs=2e-3)


def test_linear_scores__chooses_a_strong_penalty_for_noise():
    random = np.random.default_rng(3)
    feature_ND = random.normal(0, 1, (60, 100)).astype(np.float32)
    label_N = np.arange(60) % 2
    scores_MC = probe.linear_scores(feature_ND, label_N, np.arange(60), feature_ND, num_classes=2, seed=0)
    assert np.abs(scores_MC - 0.5).max() < 0.2


def test_linear_scores__class_without_photographs_gets_zero():
    feature_ND, label_N = drawn(0, 40, 4)
    scores_MC = probe.linear_scores(feature_ND, label_N * 2, np.arange(40), feature_ND, num_classes=3, seed=0)
    assert (scores_MC[:, 1] == 0).all()
    assert scores_MC.sum(axis=1) == pytest.approx(np.ones(40))


def test_linear_scores__one_class_ties_all_scores():
    feature_ND, _ = drawn(0, 10, 4)
    scores_MC = probe.linear_scores(feature_ND, np.zeros(10, int), np.arange(10), feature_ND, num_classes=2, seed=0)
    assert (scores_MC == 0.5).all()


def test_neighbour_scores__equals_scikit_learn():
    feature_ND, label_N = drawn(5, 70, 8)
    feature_MD, _ = drawn(6, 25, 8)
    scaler = StandardScaler().fit(feature_ND.astype(np.float64))
    reference = KNeighborsClassifier(
        n_neighbors=20,
        metric="cosine",
        weights=lambda distance: np.exp(-distance / probe.TEMPERATURE),
        algorithm="brute",
    ).fit(scaler.transform(feature_ND.astype(np.float64)), label_N)
    expected_MC = reference.predict_proba(scaler.transform(feature_MD.astype(np.float64)))
    scores_MC = probe.neighbour_scores(feature_ND, label_N, feature_MD, num_classes=2)
    assert scores_MC == pytest.approx(expected_MC, abs=1e-9)


def test_probes__find_what_is_there():
    feature_ND, label_N = drawn(8, 200, 10)
    train, test = slice(0, 150), slice(150, 200)
    linear_MC = probe.linear_scores(
        feature_ND[train], label_N[train], np.arange(150), feature_ND[test], num_classes=2, seed=0
    )
    neighbour_MC = probe.neighbour_scores(feature_ND[train], label_N[train], feature_ND[test], num_classes=2)
    assert roc_auc_score(label_N[test], linear_MC[:, 1]) > 0.9
    assert roc_auc_score(label_N[test], neighbour_MC[:, 1]) > 0.85
