"""Macro AUROC and average precision with patient-bootstrap intervals, counted within folds.

Scores of different folds come from different fits and are not on one scale, so no pair of photographs from two folds
is ever compared. Everything takes weights, so that a bootstrap resample is a row of weights and not a copy of the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Legend of array suffixes: N photographs, C classes, R resamples of the patients.
Floats = npt.NDArray[np.float64]
Metric = Callable[[npt.NDArray[np.bool_], Floats, Floats], tuple[Floats, Floats]]
INTERVAL_PERCENT = 95.0
RESAMPLES_AT_A_TIME = 100


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95% percentile interval; ``num_resamples`` is how many resamples defined it."""

    value: float
    low: float
    high: float
    num_resamples: int

    def is_above(self, other: "Interval") -> bool:
        """Tells whether this interval lies wholly above the other one."""
        return self.low > other.high


def auroc_by_resample(
    is_positive_N: npt.NDArray[np.bool_], score_N: Floats, weight_RN: Floats
) -> tuple[Floats, Floats]:
    """Computes the area under the ROC curve for each row of weights; ties count half.

    Source: the Mann-Whitney form of the area, with weights as multiplicities.

    Returns:
        The areas, NaN where a class has no weight, and the weight of the pairs that each rests on; both of length R.
    """
    order = np.argsort(score_N, kind="stable")
    score_N, is_positive_N, weight_RN = score_N[order], is_positive_N[order], weight_RN[:, order]
    starts = np.flatnonzero(np.r_[True, score_N[1:] != score_N[:-1]])
    positive_RG = np.add.reduceat(weight_RN * is_positive_N, starts, axis=1)
    negative_RG = np.add.reduceat(weight_RN * ~is_positive_N, starts, axis=1)
    negatives_below_RG = np.cumsum(negative_RG, axis=1) - negative_RG
    num_pairs_R = positive_RG.sum(axis=1) * negative_RG.sum(axis=1)
    concordant_R = (positive_RG * (negatives_below_RG + 0.5 * negative_RG)).sum(axis=1)
    return _divided(concordant_R, num_pairs_R), num_pairs_R


def average_precision_by_resample(
    is_positive_N: npt.NDArray[np.bool_], score_N: Floats, weight_RN: Floats
) -> tuple[Floats, Floats]:
    """Computes the average precision for each row of weights: sum over thresholds of (R_n - R_n-1) P_n.

    Source: scikit-learn's definition (no interpolation).

    Returns:
        The values, NaN where a class has no weight, and the weight of the positives; both of length R.
    """
    order = np.argsort(-score_N, kind="stable")
    score_N, is_positive_N, weight_RN = score_N[order], is_positive_N[order], weight_RN[:, order]
    starts = np.flatnonzero(np.r_[True, score_N[1:] != score_N[:-1]])
    positive_RG = np.add.reduceat(weight_RN * is_positive_N, starts, axis=1)
    all_RG = np.cumsum(np.add.reduceat(weight_RN, starts, axis=1), axis=1)
    precision_RG = _divided(np.cumsum(positive_RG, axis=1), all_RG, undefined=0.0)
    num_positive_R = positive_RG.sum(axis=1)
    values_R = _divided((positive_RG * precision_RG).sum(axis=1), num_positive_R)
    has_negatives_R = all_RG[:, -1] > num_positive_R
    return np.where(has_negatives_R, values_R, np.nan), np.where(has_negatives_R, num_positive_R, 0.0)


def macro(
    metric: Metric, label_N: npt.NDArray[np.int64], score_NC: Floats, fold_N: npt.NDArray[np.int64], weight_RN: Floats
) -> Floats:
    """Computes a metric one class against the rest, within folds, and averages over the classes.

    Within a class the folds are averaged by the weight that each fold's value rests on (pairs for the AUROC, positives
    for the average precision). With two classes only the second one counts: the first would repeat it. A class that a
    resample leaves without positives or negatives in every fold is left out of that resample's average.

    Args:
        metric: `auroc_by_resample` or `average_precision_by_resample`.
        label_N: Class indices, 0 to C - 1.
        score_NC: A higher score means that class more.
        fold_N: The fold in which each photograph was tested.
        weight_RN: How often each photograph counts in each resample.

    Returns:
        One value a resample, NaN where no class is defined.
    """
    num_classes = score_NC.shape[1]
    classes = range(1, 2) if num_classes == 2 else range(num_classes)
    values_CR = []
    for index in classes:
        numerator_R = np.zeros(len(weight_RN))
        denominator_R = np.zeros(len(weight_RN))
        for fold in np.unique(fold_N):
            rows = np.flatnonzero(fold_N == fold)
            value_R, support_R = metric(label_N[rows] == index, score_NC[rows, index], weight_RN[:, rows])
            numerator_R += np.where(support_R > 0, np.nan_to_num(value_R) * support_R, 0.0)
            denominator_R += support_R
        values_CR.append(_divided(numerator_R, denominator_R))
    stacked_CR = np.stack(values_CR)
    is_defined_CR = np.isfinite(stacked_CR)
    return _divided(np.where(is_defined_CR, stacked_CR, 0.0).sum(axis=0), is_defined_CR.sum(axis=0).astype(np.float64))


def patient_weights(patient_N: npt.NDArray[np.int64], *, num_resamples: int, seed: int) -> Floats:
    """Draws bootstrap resamples of patients; all photographs of a patient are drawn together.

    Args:
        patient_N: Patient indices, 0 to the number of patients - 1.
        num_resamples: How many.
        seed: Equal seeds give equal resamples, so that encoders are compared on the same patients.

    Returns:
        RxN: how often each photograph counts in each resample.
    """
    num_patients = int(patient_N.max()) + 1 if len(patient_N) else 0
    random = np.random.default_rng(seed)
    counts = random.multinomial(num_patients, np.full(num_patients, 1.0 / max(num_patients, 1)), size=num_resamples)
    return counts[:, patient_N].astype(np.float64)


def bootstrap(
    metric: Metric,
    label_N: npt.NDArray[np.int64],
    score_NC: Floats,
    fold_N: npt.NDArray[np.int64],
    patient_N: npt.NDArray[np.int64],
    *,
    num_resamples: int,
    seed: int,
) -> tuple[float, Floats]:
    """Computes a macro metric on the photographs and on resamples of their patients.

    Returns:
        The value, and the R values of the resamples (NaN where a resample leaves it undefined).
    """
    value = macro(metric, label_N, score_NC, fold_N, np.ones((1, len(label_N))))[0]
    weight_RN = patient_weights(patient_N, num_resamples=num_resamples, seed=seed)
    parts = [
        macro(metric, label_N, score_NC, fold_N, weight_RN[start : start + RESAMPLES_AT_A_TIME])
        for start in range(0, num_resamples, RESAMPLES_AT_A_TIME)
    ]
    return float(value), np.concatenate(parts) if parts else np.zeros(0)


def interval(value: float, resampled_R: Floats) -> Interval:
    """Returns a value with the percentile interval of its resamples.

    Raises:
        ValueError: If the value or every resample is undefined.
    """
    defined = resampled_R[np.isfinite(resampled_R)]
    if not np.isfinite(value) or not len(defined):
        raise ValueError("found a metric without both classes; required positives and negatives in one fold")
    tail = (100.0 - INTERVAL_PERCENT) / 2.0
    low, high = np.percentile(defined, [tail, 100.0 - tail])
    return Interval(value=value, low=float(low), high=float(high), num_resamples=len(defined))


def roc_curve(
    label_N: npt.NDArray[np.int64], score_NC: Floats, fold_N: npt.NDArray[np.int64], *, num_points: int = 201
) -> tuple[Floats, Floats]:
    """Averages the ROC curves of folds and classes at equal false positive rates, weighted as `macro` weights areas.

    Returns:
        False and true positive rates, both of length ``num_points``.
    """
    grid = np.linspace(0.0, 1.0, num_points)
    classes = range(1, 2) if score_NC.shape[1] == 2 else range(score_NC.shape[1])
    curves = []
    for index in classes:
        total, num_pairs = np.zeros(num_points), 0.0
        for fold in np.unique(fold_N):
            rows = fold_N == fold
            is_positive, score = label_N[rows] == index, score_NC[rows, index]
            pairs = float(is_positive.sum()) * float((~is_positive).sum())
            if pairs:
                total += pairs * np.interp(grid, *_fold_curve(is_positive, score))
                num_pairs += pairs
        if num_pairs:
            curves.append(total / num_pairs)
    if not curves:
        raise ValueError("found no fold with positives and negatives; required one for a ROC curve")
    mean = np.mean(curves, axis=0)
    return np.r_[0.0, grid], np.r_[0.0, mean]


def _fold_curve(is_positive_N: npt.NDArray[np.bool_], score_N: Floats) -> tuple[Floats, Floats]:
    order = np.argsort(-score_N, kind="stable")
    ends = np.flatnonzero(np.r_[score_N[order][1:] != score_N[order][:-1], True])
    true_positives = np.cumsum(is_positive_N[order])[ends]
    false_positives = (ends + 1) - true_positives
    return (
        np.r_[0.0, false_positives / (~is_positive_N).sum()],
        np.r_[0.0, true_positives / is_positive_N.sum()],
    )


def _divided(numerator: Floats, denominator: Floats, *, undefined: float = np.nan) -> Floats:
    result = np.full(np.shape(numerator), undefined, dtype=np.float64)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result
