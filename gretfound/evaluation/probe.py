"""Two ways to ask frozen features for a label: a linear probe and k-nearest neighbours. Neither changes the encoder."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

# Legend of array suffixes: N photographs to fit on, M photographs to score, D features, C classes.
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NUM_INNER_FOLDS = 3
NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07
MAX_ITERATIONS = 20_000


@threadpool_limits.wrap(
    limits=1
)  # thousands of small fits: threads of one fit only wait for each other (17 times slower)
def linear_scores(
    feature_ND: npt.NDArray[np.float32],
    label_N: Ints,
    patient_N: Ints,
    feature_MD: npt.NDArray[np.float32],
    *,
    num_classes: int,
    seed: int,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> Floats:
    """Fits a logistic regression on standardised features and scores others; the penalty is chosen inside.

    The penalty with the least log loss over inner folds wins; no patient is in two of them, and the photographs to
    score play no part. Features are first rotated onto the space that the fitted ones span: an L2-penalised solution
    lies in it, so nothing changes except that wide features cost no more than there are photographs.

    Source: RETFound-Green's notebooks (StandardScaler, LogisticRegression, 20,000 iterations), with the penalty chosen.

    Returns:
        MxC: the probability of each class; a class without photographs to fit on gets 0.
    """
    if len(np.unique(label_N)) < 2:
        return np.full((len(feature_MD), num_classes), 1.0 / num_classes)  # nothing to tell apart: all scores are tied
    fitted_ND, scored_MD = _standardised(feature_ND, feature_MD)
    if fitted_ND.shape[1] > fitted_ND.shape[0]:
        _, _, basis_KD = np.linalg.svd(fitted_ND, full_matrices=False)
        fitted_ND, scored_MD = fitted_ND @ basis_KD.T, scored_MD @ basis_KD.T
    penalty = _chosen_penalty(fitted_ND, label_N, patient_N, inverse_penalties, seed)
    fitted = LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS).fit(fitted_ND, label_N)
    scores_MC = np.zeros((len(scored_MD), num_classes))
    scores_MC[:, fitted.classes_] = fitted.predict_proba(scored_MD)
    return scores_MC


def neighbour_scores(
    feature_ND: npt.NDArray[np.float32],
    label_N: Ints,
    feature_MD: npt.NDArray[np.float32],
    *,
    num_classes: int,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> Floats:
    """Scores by the labels of the most similar photographs: cosine of standardised features, exponential weights.

    Source: DINO (arXiv:2104.14294), k = 20 and temperature 0.07. Standardising first takes out the large common
    component that makes all cosines of an untrained network nearly equal, so that baselines are not beaten by it.

    Returns:
        MxC: each class's share of the neighbours' weights.
    """
    fitted_ND, scored_MD = _standardised(feature_ND, feature_MD)
    fitted_ND, scored_MD = _unit_length(fitted_ND), _unit_length(scored_MD)
    num_neighbours = min(num_neighbours, len(fitted_ND))
    similarity_MN = scored_MD @ fitted_ND.T
    nearest_MK = np.argsort(-similarity_MN, axis=1, kind="stable")[:, :num_neighbours]
    weight_MK = np.exp((np.take_along_axis(similarity_MN, nearest_MK, axis=1) - 1.0) / TEMPERATURE)
    votes_MC = np.stack([(weight_MK * (label_N[nearest_MK] == c)).sum(axis=1) for c in range(num_classes)], axis=1)
    shares_MC: Floats = votes_MC / votes_MC.sum(axis=1, keepdims=True)
    return shares_MC


def _standardised(feature_ND: npt.NDArray[np.float32], feature_MD: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    scaler = StandardScaler().fit(feature_ND.astype(np.float64))
    return scaler.transform(feature_ND.astype(np.float64)), scaler.transform(feature_MD.astype(np.float64))


def _unit_length(feature_ND: Floats) -> Floats:
    length_N = np.linalg.norm(feature_ND, axis=1, keepdims=True)
    scaled: Floats = feature_ND / np.maximum(length_N, 1e-12)
    return scaled


def _chosen_penalty(
    feature_ND: Floats, label_N: Ints, patient_N: Ints, inverse_penalties: Sequence[float], seed: int
) -> float:
    num_patients = min(len(np.unique(patient_N[label_N == label])) for label in np.unique(label_N))
    if len(inverse_penalties) == 1 or num_patients < 2:
        return sorted(inverse_penalties)[0]  # the strongest penalty, where nothing can be chosen
    splitter = StratifiedGroupKFold(min(NUM_INNER_FOLDS, num_patients), shuffle=True, random_state=seed)
    folds = list(splitter.split(feature_ND, label_N, patient_N))
    losses = [
        np.mean([_log_loss(feature_ND, label_N, train, test, penalty) for train, test in folds])
        for penalty in sorted(inverse_penalties)
    ]
    return sorted(inverse_penalties)[int(np.argmin(losses))]


def _log_loss(feature_ND: Floats, label_N: Ints, train: Ints, test: Ints, inverse_penalty: float) -> float:
    if len(np.unique(label_N[train])) < 2:
        return float(np.log(2.0))
    fitted = LogisticRegression(C=inverse_penalty, max_iter=MAX_ITERATIONS).fit(feature_ND[train], label_N[train])
    probability_MC = np.full((len(test), int(label_N.max()) + 1), 1e-6)
    probability_MC[:, fitted.classes_] = np.maximum(fitted.predict_proba(feature_ND[test]), 1e-6)
    return float(-np.log(probability_MC[np.arange(len(test)), label_N[test]]).mean())
