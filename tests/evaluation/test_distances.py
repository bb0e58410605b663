"""Distances against independent references: closed forms, double loops, brute force, other implementations."""

import importlib.util
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from gretfound.evaluation import distances


def gaussian(seed: int, num: int, mean=0.0, spread=1.0, width: int = 4) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(0, 1, (num, width)) * spread + mean).astype(np.float32)


def looped_kid(real_ND: np.ndarray, generated_MD: np.ndarray) -> float:
    def kernel(x, y) -> float:
        return (float(np.dot(x.astype(np.float64), y.astype(np.float64))) / len(x) + 1.0) ** 3

    num, many = len(real_ND), len(generated_MD)
    within_real = sum(kernel(real_ND[i], real_ND[j]) for i in range(num) for j in range(num) if i != j)
    within = sum(kernel(generated_MD[i], generated_MD[j]) for i in range(many) for j in range(many) if i != j)
    across = sum(kernel(x, y) for x in real_ND for y in generated_MD)
    return within_real / (num * (num - 1)) + within / (many * (many - 1)) - 2 * across / (num * many)


def test_kid__equals_a_double_loop(monkeypatch):
    real_ND, generated_MD = gaussian(0, 45), gaussian(1, 30, mean=0.3, spread=1.4)
    expected = looped_kid(real_ND, generated_MD)
    assert distances.kid(real_ND, generated_MD).value == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(distances, "BLOCK_ROWS", 7)
    assert distances.kid(real_ND, generated_MD).value == pytest.approx(expected, rel=1e-10)


def test_kid__halves_equal_the_double_loop_on_them(monkeypatch):
    # With as many resamples as it takes to see the spread, its centre is the value and its ends come from real halves.
    real_ND, generated_MD = gaussian(0, 20), gaussian(1, 24, mean=0.5)
    patients = np.arange(20) // 2, np.arange(24)
    chosen_RN = distances._whole_and_halves(patients[0], 30, np.random.default_rng(5))
    assert chosen_RN[0].all() and (chosen_RN[1:].sum(axis=1) == 10).all()
    assert (chosen_RN[:, 0::2] == chosen_RN[:, 1::2]).all(), "photographs of a patient are in the same half"
    random = np.random.default_rng(5)
    halves = [distances._whole_and_halves(patient, 30, random)[1:] for patient in patients]
    looped_R = np.array([looped_kid(real_ND[a], generated_MD[b]) for a, b in zip(*halves, strict=True)])
    value = looped_kid(real_ND, generated_MD)
    found = distances.kid(real_ND, generated_MD, patients=patients, num_resamples=30, seed=5)
    expected = value + np.percentile(looped_R - looped_R.mean(), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


def test_kid__is_the_closed_form_on_average():
    # One feature, N(0, 1) against N(m, 1). E k(x, y) = E (xy + 1)^3 needs only the first three moments of each side.
    shift = 0.8

    def moments(mean: float) -> tuple[float, float, float]:
        return mean, mean**2 + 1, mean**3 + 3 * mean

    def expected_kernel(a: float, b: float) -> float:
        (a1, a2, a3), (b1, b2, b3) = moments(a), moments(b)
        return a3 * b3 + 3 * a2 * b2 + 3 * a1 * b1 + 1

    truth = expected_kernel(0, 0) + expected_kernel(shift, shift) - 2 * expected_kernel(0, shift)
    values = [
        distances.kid(
            gaussian(2 * seed, 40, width=1), gaussian(2 * seed + 1, 40, shift, width=1), num_resamples=2
        ).value
        for seed in range(300)
    ]
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(300))


def test_kid__interval_covers_the_truth():
    truth = distances.kid(gaussian(900, 6000), gaussian(901, 6000, mean=0.4), num_resamples=2).value
    covered = 0
    for seed in range(100):
        found = distances.kid(gaussian(2 * seed, 60), gaussian(2 * seed + 1, 80, mean=0.4), num_resamples=100)
        covered += found.low <= truth <= found.high
    assert covered >= 86


def test_kid__equal_distributions_hold_zero():
    held = 0
    for seed in range(100):
        found = distances.kid(gaussian(2 * seed, 60), gaussian(2 * seed + 1, 60), num_resamples=100)
        held += found.low <= 0.0 <= found.high
    assert held >= 90


def test_fid__equals_the_closed_form_of_gaussians():
    # Samples whose mean and covariance are exactly what was asked for, so that nothing but the formula is left.
    random = np.random.default_rng(3)
    means = random.normal(0, 1, (2, 5))
    roots = [random.normal(0, 1, (5, 5)) for _ in range(2)]
    covariances = [root @ root.T + 0.1 * np.eye(5) for root in roots]
    sides = []
    for mean_D, covariance_DD in zip(means, covariances, strict=True):
        white = random.normal(0, 1, (200, 5))
        white -= white.mean(axis=0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
        sides.append(white @ np.linalg.cholesky(covariance_DD).T + mean_D)
    shared = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared
    assert distances.fid(*sides).value == pytest.approx(expected, rel=1e-9)


def test_fid__one_feature_is_the_difference_of_means_and_deviations():
    real_ND, generated_MD = gaussian(0, 100, width=1), gaussian(1, 150, mean=0.7, spread=2.0, width=1)
    x, y = real_ND.astype(np.float64), generated_MD.astype(np.float64)
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert distances.fid(real_ND, generated_MD).value == pytest.approx(expected, rel=1e-9)


def test_fid__same_photographs_are_at_zero_also_with_a_dead_feature():
    real_ND = gaussian(0, 60)
    real_ND[:, 2] = 0.5
    assert distances.fid(real_ND, real_ND).value == pytest.approx(0.0, abs=1e-9)
    generated_MD = gaussian(1, 60, mean=1.0)
    generated_MD[:, 2] = 0.5
    with_dead, without = (
        distances.fid(*(side[:, columns] for side in (real_ND, generated_MD))) for columns in ([0, 1, 2, 3], [0, 1, 3])
    )
    assert with_dead.value == pytest.approx(without.value, rel=1e-9)
    assert (with_dead.low, with_dead.high) == pytest.approx((without.low, without.high), rel=1e-6)


def test_fid__influences_are_its_derivative():
    # Weight on a photograph is raised a little by repeating all others many times: a finite difference of the figure.
    real_ND, generated_MD = gaussian(0, 30), gaussian(1, 40, mean=0.5, spread=[0.5, 1.0, 1.5, 2.0])
    repeated_ND = np.repeat(real_ND, 400, axis=0)
    (mean_D, real_DD), (other_D, other_DD) = distances._moments(repeated_ND), distances._moments(generated_MD)
    transport_DD, _ = distances._transport(real_DD, other_DD)
    influence_N = distances._influences(real_ND, mean_D, mean_D - other_D, transport_DD)
    value = distances.fid(repeated_ND, generated_MD, num_resamples=2).value
    for row in (0, 7, 29):
        raised_ND = np.concatenate([repeated_ND, np.repeat(real_ND[row : row + 1], 4, axis=0)])
        change = distances.fid(raised_ND, generated_MD, num_resamples=2).value - value
        assert change * len(raised_ND) / 4 == pytest.approx(influence_N[row], rel=0.01, abs=0.01)


def test_fid__interval_covers_the_truth():
    covered = 0
    for seed in range(100):
        real_ND, generated_MD = gaussian(2 * seed, 400, width=2), gaussian(2 * seed + 1, 400, 0.5, 1.5, width=2)
        found = distances.fid(real_ND, generated_MD, num_resamples=200)
        covered += found.low <= 2 * (0.5**2 + 0.5**2) <= found.high
    assert covered >= 86


@pytest.mark.parametrize("num_neighbours", [1, 3, 5])
def test_neighbourhoods__equal_brute_force(num_neighbours, monkeypatch):
    real_ND, generated_MD = gaussian(0, 40, width=3), gaussian(1, 33, mean=0.6, spread=1.3, width=3)
    x, y = real_ND.astype(np.float64), generated_MD.astype(np.float64)

    def radius(points, index) -> float:
        return sorted(np.linalg.norm(points[index] - other) for other in np.delete(points, index, axis=0))[
            num_neighbours - 1
        ]

    real_radius = [radius(x, i) for i in range(len(x))]
    generated_radius = [radius(y, j) for j in range(len(y))]
    distance = [[np.linalg.norm(a - b) for b in y] for a in x]
    in_real = [[distance[i][j] <= real_radius[i] for j in range(len(y))] for i in range(len(x))]
    expected = {
        "precision": np.mean([any(in_real[i][j] for i in range(len(x))) for j in range(len(y))]),
        "recall": np.mean([any(distance[i][j] <= generated_radius[j] for j in range(len(y))) for i in range(len(x))]),
        "density": np.sum(in_real) / (num_neighbours * len(y)),
        "coverage": np.mean([any(in_real[i]) for i in range(len(x))]),
    }
    monkeypatch.setattr(distances, "BLOCK_ROWS", 9)
    found = distances.neighbourhoods(real_ND, generated_MD, num_neighbours=num_neighbours)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(expected, abs=1e-12)
    assert 0.0 < expected["precision"] < 1.0
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())


def test_neighbourhoods__copies_are_on_the_border_and_inside():
    real_ND = gaussian(0, 50) + 100.0  # a large common part, which must not cost the last digits
    found = distances.neighbourhoods(real_ND, real_ND.copy())
    # Each photograph's ball holds itself and its five nearest, whose copies lie on it and within it.
    assert {name: interval.value for name, interval in found.items()} == {
        "precision": 1.0,
        "recall": 1.0,
        "density": 6 / 5,
        "coverage": 1.0,
    }


def test_neighbourhoods__tell_lost_variety_from_lost_realism():
    real_ND = gaussian(0, 300)
    narrow = distances.neighbourhoods(real_ND, gaussian(1, 300, spread=0.3))
    wide = distances.neighbourhoods(real_ND, gaussian(2, 300, spread=3.0))
    assert narrow["precision"].value > 0.95 and narrow["recall"].value < 0.6
    assert wide["precision"].value < 0.6 and wide["coverage"].value < narrow["precision"].value
    same = distances.neighbourhoods(real_ND, gaussian(3, 300))
    assert same["density"].value == pytest.approx(1.0, abs=0.15)
    assert same["coverage"].value == pytest.approx(1 - 2**-5, abs=0.04)


@pytest.mark.parametrize("figure", ["kid", "fid", "neighbourhoods"])
def test_intervals__photographs_of_a_patient_widen_them(figure):
    # Ten identical photographs of each patient carry the information of one.
    real_ND, generated_MD = np.repeat(gaussian(0, 60), 10, axis=0), gaussian(1, 600, mean=0.4)
    widths = []
    for patient_N in (np.repeat(np.arange(60), 10), np.arange(600)):
        found = getattr(distances, figure)(real_ND, generated_MD, patients=(patient_N, np.arange(600)))
        found = found["recall"] if figure == "neighbourhoods" else found
        widths.append(found.high - found.low)
    assert widths[0] > 1.5 * widths[1]


@pytest.mark.parametrize(
    ("figure", "num", "width", "message"),
    [
        ("kid", 19, 4, "found 19 photographs of 19 patients; required 20 of 10 for kid"),
        ("neighbourhoods", 19, 4, "required 20 of 10"),
        ("fid", 30, 30, r"found 30 photographs of 30 patients; required 31 \(30 features and one more\) of 10 for fid"),
    ],
)
def test_figures__too_few_photographs_is_an_error_that_says_how_many(figure, num, width, message):
    enough, short = gaussian(0, 50, width=width), gaussian(1, num, width=width)
    for sides in ((enough, short), (short, enough)):
        with pytest.raises(ValueError, match=message):
            getattr(distances, figure)(*sides)


def test_figures__too_few_patients_is_an_error():
    with pytest.raises(ValueError, match="found 40 photographs of 8 patients; required 20 of 10 for kid"):
        distances.kid(gaussian(0, 40), gaussian(1, 40), patients=(np.arange(40) // 5, np.arange(40)))


def test_figures__not_finite_or_of_other_width_is_an_error():
    damaged_ND = gaussian(0, 30)
    damaged_ND[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        distances.kid(damaged_ND, gaussian(1, 30))
    with pytest.raises(ValueError, match="one width"):
        distances.fid(gaussian(0, 30), gaussian(1, 30, width=5))


@pytest.mark.parametrize("figure", ["kid", "fid", "neighbourhoods"])
def test_figures__memory_does_not_grow_with_pairs(figure):
    # 4,000 x 4,000 pairs are 128 MB of float64, the features 2 MB.
    real_ND, generated_MD = gaussian(0, 4000, width=64), gaussian(1, 4000, width=64)
    distances.fid(real_ND[:100], generated_MD[:100], num_resamples=2)
    tracemalloc.start()
    getattr(distances, figure)(real_ND, generated_MD, num_resamples=20)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < {"kid": 40, "fid": 40, "neighbourhoods": 90}[figure] * 2**20


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_figures__equal_torch_fidelity():
    # Run by hand with torch-fidelity 0.4.0.
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    # Their float32 kernel keeps five digits.
    real_ND, generated_MD = gaussian(0, 200, width=8), gaussian(1, 200, mean=0.5, width=8)
    sides = torch.from_numpy(real_ND), torch.from_numpy(generated_MD)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, sides), verbose=False)
    ours = distances.fid(real_ND, generated_MD).value
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    theirs = kid_features_to_metric(*sides, kid_subsets=1, kid_subset_size=200, verbose=False)
    ours = distances.kid(real_ND, generated_MD).value
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
