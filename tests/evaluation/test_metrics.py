import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from gretfound.evaluation import metrics


def drawn(seed: int, num: int = 60, num_classes: int = 2, num_levels: int = 12):
    random = np.random.default_rng(seed)
    label_N = random.integers(0, num_classes, num)
    score_NC = np.round(random.random((num, num_classes)) * num_levels) / num_levels  # many ties
    return label_N, score_NC


@pytest.mark.parametrize("seed", range(5))
def test_auroc_by_resample__equals_scikit_learn_with_ties(seed):
    label_N, score_NC = drawn(seed)
    (value,), (num_pairs,) = metrics.auroc_by_resample(label_N == 1, score_NC[:, 1], np.ones((1, 60)))
    assert value == pytest.approx(roc_auc_score(label_N, score_NC[:, 1]), abs=1e-12)
    assert num_pairs == (label_N == 1).sum() * (label_N == 0).sum()


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_by_resample__equals_scikit_learn_with_ties(seed):
    label_N, score_NC = drawn(seed)
    (value,), _ = metrics.average_precision_by_resample(label_N == 1, score_NC[:, 1], np.ones((1, 60)))
    assert value == pytest.approx(average_precision_score(label_N, score_NC[:, 1]), abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        (metrics.auroc_by_resample, roc_auc_score),
        (metrics.average_precision_by_resample, average_precision_score),
    ],
)
def test_metric__weights_are_repetitions(metric, reference):
    label_N, score_NC = drawn(7)
    weight_RN = metrics.patient_weights(np.arange(60) // 2, num_resamples=20, seed=1)
    values, _ = metric(label_N == 1, score_NC[:, 1], weight_RN)
    for value, weight_N in zip(values, weight_RN, strict=True):
        rows = np.repeat(np.arange(60), weight_N.astype(int))
        assert value == pytest.approx(reference(label_N[rows], score_NC[rows, 1]), abs=1e-12)


def test_macro__equals_scikit_learn_one_vs_rest():
    label_N, score_NC = drawn(3, num=90, num_classes=4)
    score_NC = score_NC / score_NC.sum(axis=1, keepdims=True)
    value = metrics.macro(metrics.auroc_by_resample, label_N, score_NC, np.zeros(90, int), np.ones((1, 90)))[0]
    assert value == pytest.approx(roc_auc_score(label_N, score_NC, multi_class="ovr", average="macro"), abs=1e-12)


def test_macro__folds_on_other_scales_do_not_matter():
    label_N, score_NC = drawn(4, num=80)
    fold_N = np.arange(80) % 4
    shifted_NC = score_NC + 10.0 * fold_N[:, None]
    arguments = (fold_N, np.ones((1, 80)))
    for metric in (metrics.auroc_by_resample, metrics.average_precision_by_resample):
        assert metrics.macro(metric, label_N, score_NC, *arguments) == metrics.macro(
            metric, label_N, shifted_NC, *arguments
        )


def test_macro__folds_are_weighted_by_pairs():
    label_N, score_NC = drawn(5, num=50)
    fold_N = (np.arange(50) >= 12).astype(int)
    parts = [
        (
            roc_auc_score(label_N[fold_N == fold], score_NC[fold_N == fold, 1]),
            np.prod(np.bincount(label_N[fold_N == fold])),
        )
        for fold in (0, 1)
    ]
    expected = sum(value * pairs for value, pairs in parts) / sum(pairs for _, pairs in parts)
    value = metrics.macro(metrics.auroc_by_resample, label_N, score_NC, fold_N, np.ones((1, 50)))[0]
    assert value == pytest.approx(expected, abs=1e-12)


def test_macro__absent_class_is_left_out_of_a_resample():
    label_N = np.array([0, 0, 1, 1, 2, 2])
    score_NC = np.eye(3)[label_N]
    weight_RN = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=float)
    values = metrics.macro(metrics.auroc_by_resample, label_N, score_NC, np.zeros(6, int), weight_RN)
    assert values[0] == 1.0
    assert np.isnan(values[1])


def test_patient_weights__photographs_of_a_patient_are_drawn_together():
    patient_N = np.array([0, 0, 1, 2, 2, 2])
    weight_RN = metrics.patient_weights(patient_N, num_resamples=200, seed=0)
    assert (weight_RN[:, 0] == weight_RN[:, 1]).all() and (weight_RN[:, 3] == weight_RN[:, 5]).all()
    assert (weight_RN[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert weight_RN.mean(axis=0) == pytest.approx(np.ones(6), abs=0.2)


def test_bootstrap__patients_widen_the_interval():
    # Ten identical photographs of each patient carry the information of one.
    random = np.random.default_rng(0)
    label_P = np.arange(40) % 2
    score_P = label_P + random.normal(0, 1.5, 40)
    label_N, score_N = np.repeat(label_P, 10), np.repeat(score_P, 10)
    widths = []
    for patient_N in (np.repeat(np.arange(40), 10), np.arange(400)):
        figure = metrics.interval(
            *metrics.bootstrap(
                metrics.auroc_by_resample,
                label_N,
                np.stack([-score_N, score_N], axis=1),
                np.zeros(400, int),
                patient_N,
                num_resamples=300,
                seed=0,
            )
        )
        widths.append(figure.high - figure.low)
    assert widths[0] > 2.0 * widths[1]


def test_bootstrap__covers_the_truth():
    # Two unit normals one apart: the area is Phi(1 / sqrt 2) = 0.7602. 95% intervals should hold it nearly always.
    random = np.random.default_rng(11)
    covered = 0
    for repeat in range(100):
        label_N = np.arange(100) % 2
        score_N = label_N + random.normal(0, 1, 100)
        figure = metrics.interval(
            *metrics.bootstrap(
                metrics.auroc_by_resample,
                label_N,
                np.stack([-score_N, score_N], axis=1),
                np.zeros(100, int),
                np.arange(100),
                num_resamples=200,
                seed=repeat,
            )
        )
        covered += figure.low <= 0.7602 <= figure.high
    assert covered >= 87  # 3.7 standard errors below 95


def test_interval__undefined_metric_is_an_error():
    with pytest.raises(ValueError, match="positives and negatives"):
        metrics.interval(float("nan"), np.array([0.5]))


def test_roc_curve__area_is_the_macro_auroc():
    label_N, score_NC = drawn(9, num=200, num_levels=1000)
    fold_N = np.arange(200) % 3
    false_positive, true_positive = metrics.roc_curve(label_N, score_NC, fold_N, num_points=4001)
    value = metrics.macro(metrics.auroc_by_resample, label_N, score_NC, fold_N, np.ones((1, 200)))[0]
    assert np.trapezoid(true_positive, false_positive) == pytest.approx(value, abs=2e-3)
