"""The gate's statistics against closed forms and simulations."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from gretfound.gate import comparison, policy
from gretfound.gate.comparison import Sight


def test_threshold__one_of_the_held_out_exceeds_it() -> None:
    best = np.random.default_rng(0).random(300).astype(np.float32)
    assert (best > comparison.threshold(best)).sum() == 1


def test_threshold__of_a_large_null_is_the_wanted_quantile() -> None:
    # The expected share of a continuous distribution above it is about 1.5 / n: it lies between the two largest.
    shares = [1 - comparison.threshold(np.random.default_rng(seed).random(100).astype("f4")) for seed in range(400)]
    assert 0.01 < np.mean(shares) < 0.025


def test_division_p__is_that_of_the_hypergeometric_distribution() -> None:
    # Nine patients are found by a sample each, eight of them of the five hundred trained on.
    near_trained, near_held_out = np.zeros((20, 500), bool), np.zeros((20, 300), bool)
    near_trained[np.arange(8), np.arange(8)] = near_held_out[8, 0] = True
    found = comparison.division_p(near_trained, near_held_out, trained_N=np.arange(500), held_out_H=np.arange(300))
    assert found == pytest.approx(stats.hypergeom.sf(7, 800, 500, 9), abs=0.015)
    nothing = np.zeros((20, 5), bool)
    assert comparison.division_p(nothing, nothing, trained_N=np.arange(5), held_out_H=np.arange(5)) == 1.0


def test_division_p__many_samples_near_to_one_patient_are_no_excess() -> None:
    # Two hundred samples are like one patient: by chance that one is held out as often.
    near_trained, near_held_out = np.zeros((500, 90), bool), np.zeros((500, 90), bool)
    near_trained[:200, 4:6] = True
    found = comparison.division_p(near_trained, near_held_out, trained_N=np.arange(90) // 2, held_out_H=np.arange(90))
    assert found == pytest.approx(45 / 135, abs=0.03)


def test_holm__is_the_textbook_example() -> None:
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def _sight(
    num_copies: int, *, seed: int, num_samples: int = 2000, num_trained: int = 600, num_held_out: int = 300
) -> Sight:
    """Similarities of one exchangeable population, and copies that are above all of them."""
    random = np.random.default_rng(seed)
    to_trained = random.beta(2, 8, (num_samples, num_trained)).astype(np.float32)
    to_trained[np.arange(num_copies), random.permutation(num_trained)[:num_copies]] = 0.99
    to_held_out = random.beta(2, 8, (num_samples, num_held_out)).astype(np.float32)
    null = random.beta(2, 8, (num_held_out, num_trained)).max(axis=1)
    tau = comparison.threshold(null.astype("f4"))
    return Sight(to_trained=to_trained, to_held_out=to_held_out, tau=tau, visit_p5=0.98)


def _found(sight: Sight, *, max_p: float = 0.01) -> comparison.Copies:
    num_trained, num_held_out = sight.to_trained.shape[1], sight.to_held_out.shape[1]
    return comparison.find_copies(
        {"eye": sight}, trained_N=np.arange(num_trained), held_out_H=np.arange(num_held_out), max_p=max_p, seed=0
    )


def test_find_copies__no_copy_is_seldom_an_alarm_and_many_always() -> None:
    alarms = [_found(_sight(0, seed=seed, num_samples=500)).p < 0.01 for seed in range(40)]
    assert sum(alarms) <= 2
    found = [_found(_sight(60, seed=seed, num_samples=1000)) for seed in range(5)]
    assert all(each.p < 0.01 and each.is_flagged[:60].all() and each.excess > 0.02 for each in found)
    assert all(each.patient_excess > 0.05 and each.patient_p < 0.01 for each in found)


def test_find_copies__can_fall_below_the_p_of_every_policy() -> None:
    rules = [policy.read_policy(name).max_p for name in ("standard", "demonstration")]
    assert min(rules) < 1 / comparison.NUM_DIVISIONS, "or this tests nothing"
    sight = _sight(60, seed=1, num_samples=500, num_trained=300)
    sights = dict.fromkeys(("one", "two", "three"), sight)
    sides = {"trained_N": np.arange(300), "held_out_H": np.arange(300)}
    assert all(comparison.find_copies(sights, **sides, max_p=max_p).p < max_p for max_p in rules)


def test_policy__with_a_p_that_chance_cannot_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="max_p out of range"):
        replace(policy.read_policy("standard"), max_p=0.0)


def test_find_copies__a_larger_training_set_is_no_excess() -> None:
    # Eight times the references have eight times as many samples near to them, by chance.
    sight = _sight(0, seed=3, num_trained=2400, num_held_out=300)
    lower = replace(sight, tau=sight.tau - 0.05, visit_p5=0.0)
    found = _found(lower)
    near = (lower.to_trained > lower.tau).any(axis=1).mean()
    assert near > 4 * (lower.to_held_out > lower.tau).any(axis=1).mean() and near > 0.01
    assert found.p > 0.01 and found.excess < near / 2


def test_find_copies__one_patient_drawn_again_and_again_is_an_excess() -> None:
    # By chance that patient could be held out, so p tells nothing; but nobody else is as near as a second visit.
    sight = _sight(0, seed=5, num_samples=500)
    sight.to_trained[:25, 7] = 0.99
    found = _found(sight)
    assert found.p > 0.01 and found.excess == pytest.approx(0.05)


def test_find_copies__samples_near_to_a_held_out_patient_hide_no_copies() -> None:
    # Less near than second visits are, so that p alone finds them.
    sight = _sight(0, seed=6, num_samples=500)
    sight.to_trained[np.arange(60), np.arange(60)] = 0.9
    sight.to_held_out[60:62, 0] = 0.95
    found = _found(sight)
    assert found.p < 0.01 and found.excess == 0.0 and found.num_patients >= 60


def test_find_copies__photographs_that_many_samples_resemble_are_seldom_an_alarm() -> None:
    # A tenth of the samples is like the same few of eight photographs; chance decides on which side those are.
    alarms = []
    for seed in range(40):
        sight, random = _sight(0, seed=seed, num_samples=500, num_trained=300), np.random.default_rng([seed, 1])
        both = np.hstack([sight.to_trained, sight.to_held_out])
        alike = random.permutation(600)[:8]
        both[:50, alike] += random.random((50, 8)).astype("f4")
        drawn = replace(sight, to_trained=both[:, :300], to_held_out=both[:, 300:], visit_p5=0.98)
        alarms.append(_found(drawn).p < 0.01)
    assert sum(alarms) <= 2


def test_find_copies__requires_an_eye_and_a_control() -> None:
    with pytest.raises(ValueError, match="no eye"):
        comparison.find_copies({}, trained_N=np.arange(3), held_out_H=np.arange(3), max_p=0.01)


def test_tell_apart__agrees_with_scikit_learn_and_covers_the_truth() -> None:
    random = np.random.default_rng(1)
    member, other = random.normal(1, 1, 400), random.normal(0, 1, 300)
    told = comparison.tell_apart(member, other, trained_N=np.arange(400), held_out_H=np.arange(300))
    assert told.auc.value == pytest.approx(roc_auc_score(np.repeat([1, 0], [400, 300]), np.r_[member, other]))
    assert told.auc.low < stats.norm.cdf(1 / np.sqrt(2)) < told.auc.high
    assert told.tpr.value == pytest.approx((member > np.sort(other)[-4]).mean())
    assert told.tpr.low < stats.norm.sf(stats.norm.isf(0.01) - 1) < told.tpr.high


def test_tell_apart__nothing_to_tell_includes_a_half() -> None:
    random = np.random.default_rng(2)
    member, other = random.normal(size=500), random.normal(size=500)
    told = comparison.tell_apart(member, other, trained_N=np.arange(500) // 2, held_out_H=np.arange(500) // 2)
    assert told.auc.low < 0.5 < told.auc.high and told.tpr.value < 0.04


def test_groups_alike__needs_enough() -> None:
    alike = np.eye(12, dtype=bool)
    alike[:9, :9] = True
    assert comparison.groups_alike(alike, min_group=9) == list(range(9))
    assert comparison.groups_alike(alike, min_group=10) == []
