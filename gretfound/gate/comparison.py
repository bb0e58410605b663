"""The statistics of the gate, as pure functions of arrays: who is too alike to whom, and can two sides be told apart.

A similarity counts as a copy above what the same eye finds between different patients. The held-out patients are the
control: a generator that repeats nobody comes as near to them as to an equal number of those that it was trained on.

Legend of array suffixes: S samples, N photographs trained on, H held-out ones, P patients of both sides, K those of
them that a sample is near to, R resamples or divisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from gretfound.evaluation import metrics
from gretfound.evaluation.metrics import Interval

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
NUM_RESAMPLES = 500
NUM_DIVISIONS = 4999
_BLOCK = 1000  # divisions at once, for memory
FALSE_ANSWERS = 0.01  # the rate at which true ones are counted


def threshold(best_H: Floats) -> float:
    """Returns the similarity that one held-out photograph exceeds: the quantile 1 - 1/n of their nearest patient.

    Args:
        best_H: Of each held-out photograph, the similarity to the most similar one of another patient.
    """
    return float(np.quantile(best_H, 1.0 - 1.0 / len(best_H)))


def division_p(
    near_SN: Bools,
    near_SH: Bools,
    *,
    trained_N: Ints,
    held_out_H: Ints,
    num_divisions: int = NUM_DIVISIONS,
    seed: int = 0,
) -> float:
    """Returns how often a division of the same patients by chance has as large a surplus of samples near to one side.

    Nobody was trained on by the null hypothesis, so that who is on which side is chance. Samples need not be
    independent: a photograph that many samples resemble is as likely to be held out as trained on. Two sides of
    unequal size are compared with divisions of those sizes.

    Args:
        near_SN: Which samples are near to which photographs trained on, (S, N).
        near_SH: And to which held-out ones, (S, H).
        trained_N: Numbers of the patients trained on.
        held_out_H: And of those held out; none is on both sides, also where numbers are the same.
        num_divisions: By chance, the one that was made not counted: p is at least 1 / (num_divisions + 1).
        seed: Of the divisions.

    Source: Phipson and Smyth 2010 (Statistical Applications in Genetics and Molecular Biology 9:39): p is never 0.
    """
    sides = [_by_patient(near_SN, trained_N), _by_patient(near_SH, held_out_H)]
    num_trained, num_patients = sides[0].shape[1], sum(each.shape[1] for each in sides)
    near_SP = np.hstack(sides)
    found_K = np.flatnonzero(near_SP.any(axis=0))
    if not len(found_K):
        return 1.0
    near_SK = near_SP[:, found_K][near_SP.any(axis=1)].astype(np.float32)
    made = _more_near(near_SK, found_K[None] < num_trained)[0]
    random = np.random.default_rng(seed)
    num_as_large = 1  # the division that was made is one of them
    for begin in range(0, num_divisions, _BLOCK):
        size = min(_BLOCK, num_divisions - begin)
        places_RK = np.stack([random.choice(num_patients, len(found_K), replace=False) for _ in range(size)])
        num_as_large += int((_more_near(near_SK, places_RK < num_trained) >= made).sum())
    return num_as_large / (num_divisions + 1)


def _more_near(near_SK: Floats, is_trained_RK: Bools) -> Ints:
    """Returns how many more samples are near to the side trained on than to the other, for each division."""
    is_trained_KR = is_trained_RK.T.astype(np.float32)
    num_near_SR = near_SK @ is_trained_KR
    more_R: Ints = (num_near_SR > 0).sum(axis=0) - (num_near_SR < near_SK.sum(axis=1, keepdims=True)).sum(axis=0)
    return more_R


def _by_patient(near_SN: Bools, people_N: Ints) -> Bools:
    """Returns which samples are near to any photograph of each patient, (S, patients)."""
    order = np.argsort(people_N, kind="stable")
    starts = np.unique(people_N[order], return_index=True)[1]
    near: Bools = np.logical_or.reduceat(near_SN[:, order], starts, axis=1)
    return near


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for being several, in their order.

    Source: Holm 1979 (Scandinavian Journal of Statistics 6:65).
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(each) for each in adjusted]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one eye sees of samples.

    Args:
        to_trained: Similarity of each sample to each photograph trained on, (S, N).
        to_held_out: And to each held-out one, (S, H).
        tau: Above it is a copy.
        visit_p5: The similarity that 95% of second visits reach.
    """

    to_trained: Floats
    to_held_out: Floats
    tau: float
    visit_p5: float

    @property
    def as_a_visit(self) -> float:
        """The similarity of a second visit, never below tau: a photograph that is like many others is not that near."""
        return max(self.tau, self.visit_p5)


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What the eyes found together.

    Args:
        is_flagged: Samples that are above an eye's tau to a photograph trained on.
        p: The smallest of all eyes, adjusted for their number.
        excess: Share of samples as near as a second visit, beyond that of the control, of the eye with the largest.
        num_controls: Samples that are above an eye's tau to a held-out photograph.
        patient_excess: Share of patients trained on who are found in a sample, beyond that of held-out patients.
        patient_p: Of that excess, by the binomial distribution.
        num_patients: Patients trained on who are found in a sample.
    """

    is_flagged: Bools
    p: float
    excess: float
    num_controls: int
    patient_excess: float
    patient_p: float
    num_patients: int


def find_copies(
    sights: Mapping[str, Sight], *, trained_N: Ints, held_out_H: Ints, max_p: float, seed: int = 0
) -> Copies:
    """Tests whether samples are nearer to the photographs trained on than chance brings them to held-out ones.

    Args:
        sights: What each eye that can see sees.
        trained_N: Numbers of the patients trained on.
        held_out_H: And of those held out.
        max_p: That the result is held against: there are enough divisions for a p of half of it.
        seed: Of the divisions by chance.

    Raises:
        ValueError: If there is no eye or nobody is held out.
    """
    if not sights or not len(held_out_H):
        raise ValueError("found no eye or no held-out photograph; required one of each")
    num_trained, num_held_out = len(trained_N), len(held_out_H)
    num_divisions = max(NUM_DIVISIONS, math.ceil(2 * len(sights) / max_p))
    p_values, excesses = [], []
    num_samples = len(next(iter(sights.values())).to_trained)
    is_flagged_S, is_control_S = np.zeros(num_samples, bool), np.zeros(num_samples, bool)
    found_N, found_H = np.zeros(num_trained, bool), np.zeros(num_held_out, bool)
    for sight in sights.values():
        near_SN, near_SH = sight.to_trained > sight.tau, sight.to_held_out > sight.tau
        p_values.append(
            division_p(
                near_SN, near_SH, trained_N=trained_N, held_out_H=held_out_H, num_divisions=num_divisions, seed=seed
            )
        )
        # A larger set holds more that are near by chance alone.
        as_visits = [
            float((each > sight.as_a_visit).any(axis=1).mean()) for each in (sight.to_trained, sight.to_held_out)
        ]
        excesses.append(as_visits[0] - as_visits[1] * num_trained / num_held_out)
        near_trained_S: Bools = np.any(near_SN, axis=1)
        near_held_out_S: Bools = np.any(near_SH, axis=1)
        is_flagged_S |= near_trained_S
        is_control_S |= near_held_out_S
        found_N |= _nearest(sight.to_trained, near_trained_S)
        found_H |= _nearest(sight.to_held_out, near_held_out_S)
    people, controls = len(np.unique(trained_N)), len(np.unique(held_out_H))
    num_found, num_controls = len(np.unique(trained_N[found_N])), len(np.unique(held_out_H[found_H]))
    return Copies(
        is_flagged=is_flagged_S,
        p=min(holm(p_values)),
        excess=max(excesses),
        num_controls=int(is_control_S.sum()),
        patient_excess=num_found / people - num_controls / controls,
        patient_p=float(stats.binom.sf(num_found - 1, num_found + num_controls, people / (people + controls))),
        num_patients=num_found,
    )


def _nearest(similarity_SN: Floats, is_flagged_S: Bools) -> Bools:
    found_N = np.zeros(similarity_SN.shape[1], bool)
    found_N[similarity_SN[is_flagged_S].argmax(axis=1)] = True
    return found_N


@dataclass(frozen=True, kw_only=True)
class Told:
    """How well members are told from others by a score: the area under the curve, and true answers at 1% false ones."""

    auc: Interval
    tpr: Interval


def tell_apart(
    member_N: npt.NDArray[np.float64],
    other_H: npt.NDArray[np.float64],
    *,
    trained_N: Ints,
    held_out_H: Ints,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Told:
    """Measures how well a score tells the photographs trained on from held-out ones, with 95% intervals by patient.

    Args:
        member_N: Scores of the photographs trained on; higher means more likely trained on.
        other_H: Scores of held-out ones.
        trained_N: Their patients.
        held_out_H: And these.
        num_resamples: Of the patients of each side.
        seed: Of the resamples.
    """
    score = np.concatenate([member_N, other_H])
    is_member = np.arange(len(score)) < len(member_N)
    weights = [
        np.vstack(
            [np.ones(len(people)), metrics.patient_weights(numbered(people), num_resamples=num_resamples, seed=s)]
        )
        for people, s in ((trained_N, seed), (held_out_H, seed + 1))
    ]
    auc_R, _ = metrics.auroc_by_resample(is_member, score, np.hstack(weights))
    tpr_R = np.array([_true_answers(member_N, other_H, n, h) for n, h in zip(*weights, strict=True)])
    return Told(auc=metrics.interval(float(auc_R[0]), auc_R[1:]), tpr=metrics.interval(float(tpr_R[0]), tpr_R[1:]))


def numbered(people: Ints) -> Ints:
    """Returns patients as numbers from 0 without gaps."""
    numbers: Ints = np.unique(people, return_inverse=True)[1].astype(np.int64)
    return numbers


def _true_answers(
    member_N: npt.NDArray[np.float64],
    other_H: npt.NDArray[np.float64],
    weight_N: npt.NDArray[np.float64],
    weight_H: npt.NDArray[np.float64],
) -> float:
    """Returns the share of members above the score that at most 1% of the others exceed."""
    order = np.argsort(-other_H, kind="stable")
    allowed = np.cumsum(weight_H[order]) <= FALSE_ANSWERS * weight_H.sum()
    limit = other_H[order][allowed.sum()] if not allowed.all() else -np.inf
    return float((weight_N * (member_N > limit)).sum() / max(weight_N.sum(), 1.0))


def groups_alike(is_alike_SS: Bools, *, min_group: int) -> list[int]:
    """Returns the samples that are alike to so many of their caption that they are a group, themselves counted."""
    return np.flatnonzero(is_alike_SS.sum(axis=1) >= min_group).tolist()
