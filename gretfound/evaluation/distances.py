"""Distances between two sets of photographs as feature matrices: KID, FID, precision, recall, density and coverage.

Pure functions of arrays: what the rows are, and whether the real ones were held out, is the matter of
`gretfound.evaluation.fidelity`. Matrices are walked in blocks of float64, so that 50,000 by 2,048 float32 features on
both sides (0.8 GB) take by count of the arrays 0.5 GB more. KID and the neighbourhoods look at all pairs: 3 x 10^13
operations at that size.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gretfound.evaluation import metrics
from gretfound.evaluation.metrics import Interval

# Legend of array suffixes: N real photographs, M generated ones, D features, R resamples, B rows of a block.
Features = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Patients = tuple[Ints, Ints]

FIGURES = ("kid", "fid", "precision", "recall", "density", "coverage")
NEIGHBOURHOODS = FIGURES[2:]
MIN_PHOTOGRAPHS = 20
MIN_PATIENTS = 10
NUM_NEIGHBOURS = 5
NUM_RESAMPLES = 200
BLOCK_ROWS = 1024
BLOCK_CELLS = 2**23


def kid(
    real_ND: Features,
    generated_MD: Features,
    *,
    patients: Patients | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns the kernel inception distance: the unbiased estimate of MMD^2 under the kernel (x.y / D + 1)^3.

    Lower is better; 0 is expected for equal distributions whatever the number of photographs, so the estimate is at
    times negative. Its scale is that of the features: compare it within one space only.

    Source: Binkowski et al. 2018 (arXiv:1801.01401), sections 3 and 4. They average 100 subsets of 1,000; all pairs
    estimate the same number with less noise. The interval is from random halves of the patients of each side: their
    spread is that of the whole (delete-half jackknife: Shao and Wu 1989, Annals of Statistics 17:1176). Where the
    distributions are equal it is up to 1.7 times too wide.

    Args:
        real_ND: Features of real photographs.
        generated_MD: Features of generated ones.
        patients: Patient indices from 0 of the rows of each side, which are resampled together; by default every
            photograph is a patient's only one.
        num_resamples: Number of halves.
        seed: Of the halves.

    Raises:
        ValueError: If a side has fewer than 20 photographs or 10 patients.
    """
    patient_N, patient_M = _checked("kid", real_ND, generated_MD, patients)
    random = np.random.default_rng(seed)
    chosen_RN = _whole_and_halves(patient_N, num_resamples, random)
    chosen_RM = _whole_and_halves(patient_M, num_resamples, random)
    num_real_R, num_generated_R = chosen_RN.sum(axis=1), chosen_RM.sum(axis=1)
    real_R = _kernel_sums(real_ND, chosen_RN, real_ND, chosen_RN) - _diagonal_sums(real_ND, chosen_RN)
    generated_R = _kernel_sums(generated_MD, chosen_RM, generated_MD, chosen_RM)
    generated_R -= _diagonal_sums(generated_MD, chosen_RM)
    across_R = _kernel_sums(real_ND, chosen_RN, generated_MD, chosen_RM)
    value_R = real_R / (num_real_R * (num_real_R - 1)) + generated_R / (num_generated_R * (num_generated_R - 1))
    value_R -= 2 * across_R / (num_real_R * num_generated_R)
    value, half_R = float(value_R[0]), value_R[1:]
    return metrics.interval(value, value + half_R - half_R.mean())


def fid(
    real_ND: Features,
    generated_MD: Features,
    *,
    patients: Patients | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns the Frechet distance between Gaussians of the features' means and covariances, 0 and up.

    Lower is better. It is biased upwards by about a constant over the number of photographs (Chong and Forsyth 2020,
    arXiv:1911.07023): compare figures of equally many photographs in one space only, and prefer `kid` for a small site.
    The interval is around the biased figure and does not hold the bias.

    Source: Heusel et al. 2017 (arXiv:1706.08500), equation 6. The interval resamples patients in the figure's linear
    approximation; its derivative by a covariance is 1 less the Gaussians' optimal transport map, and the covariance's
    own change by a photograph is that photograph's outer product.

    Args:
        real_ND: Features of real photographs.
        generated_MD: Features of generated ones.
        patients: As in `kid`.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the resamples.

    Raises:
        ValueError: If a side has no more photographs than features (its covariance would be singular), or fewer than
            20 photographs or 10 patients.
    """
    patient_N, patient_M = _checked("fid", real_ND, generated_MD, patients)
    (real_D, real_DD), (generated_D, generated_DD) = _moments(real_ND), _moments(generated_MD)
    to_real_DD, shared_trace = _transport(generated_DD, real_DD)
    to_generated_DD, _ = _transport(real_DD, generated_DD)
    shift_D = real_D - generated_D
    value = max(0.0, float(shift_D @ shift_D + np.trace(real_DD) + np.trace(generated_DD) - 2 * shared_trace))
    seed_N, seed_M = two_seeds(seed)
    change_R = resampled_mean(
        _influences(real_ND, real_D, shift_D, to_generated_DD), patient_N, num_resamples, seed_N
    ) + resampled_mean(_influences(generated_MD, generated_D, -shift_D, to_real_DD), patient_M, num_resamples, seed_M)
    return metrics.interval(value, np.maximum(value + change_R, 0.0))


def neighbourhoods(
    real_ND: Features,
    generated_MD: Features,
    *,
    patients: Patients | None = None,
    num_neighbours: int = NUM_NEIGHBOURS,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Returns precision, recall, density and coverage. Higher is better for each.

    A photograph's neighbourhood is the ball around it that reaches to its k-th nearest on its own side.

    - ``precision``, 0 to 1: the share of generated photographs in the neighbourhood of a real one (realism).
    - ``recall``, 0 to 1: the share of real photographs in the neighbourhood of a generated one (variety).
    - ``density``, 0 and up, about 1 for equal distributions: in how many real neighbourhoods a generated photograph
      lies, over k. One outlier's wide neighbourhood raises it less than it raises precision.
    - ``coverage``, 0 to 1: the share of real photographs with a generated one in their neighbourhood; about 1 - 2^-k
      for equal distributions and equally many photographs.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2; Naeem et al. 2020 (arXiv:2002.09797),
    sections 3.1 and 3.2. A point on a ball's border is inside, as in the first. Intervals resample patients with the
    neighbourhoods as they are. All four depend on the numbers of photographs: compare equal ones.

    Args:
        real_ND: Features of real photographs.
        generated_MD: Features of generated ones.
        patients: As in `kid`.
        num_neighbours: k, 1 to 5.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the resamples.

    Raises:
        ValueError: If a side has fewer than 20 photographs or 10 patients, or k is out of range.
    """
    if not 1 <= num_neighbours <= NUM_NEIGHBOURS:
        raise ValueError(f"found num_neighbours={num_neighbours}; required 1 to {NUM_NEIGHBOURS}")
    patient_N, patient_M = _checked("precision", real_ND, generated_MD, patients)
    radius_N, radius_M = _squared_radii(real_ND, num_neighbours), _squared_radii(generated_MD, num_neighbours)
    num_around_M = np.zeros(len(generated_MD))
    is_recalled_N, is_covered_N = np.zeros(len(real_ND), dtype=bool), np.zeros(len(real_ND), dtype=bool)
    for rows, squared_BN in _squared_distances(generated_MD, real_ND):
        is_inside_BN = squared_BN <= radius_N
        num_around_M[rows] = is_inside_BN.sum(axis=1)
        is_covered_N |= is_inside_BN.any(axis=0)
        is_recalled_N |= (squared_BN <= radius_M[rows, None]).any(axis=0)
    seed_N, seed_M = two_seeds(seed)
    real, generated = (patient_N, num_resamples, seed_N), (patient_M, num_resamples, seed_M)
    return {
        "precision": _mean_interval(num_around_M > 0, *generated),
        "recall": _mean_interval(is_recalled_N, *real),
        "density": _mean_interval(num_around_M / num_neighbours, *generated),
        "coverage": _mean_interval(is_covered_N, *real),
    }


def shortage(figure: str, *, num_features: int, num_photographs: int, num_patients: int) -> str | None:
    """Says why one side's photographs are too few for a figure and how many are needed, or None if they are enough.

    Args:
        figure: Of `FIGURES`.
        num_features: D.
        num_photographs: Of that side.
        num_patients: Of that side.
    """
    required = max(MIN_PHOTOGRAPHS, num_features + 1) if figure == "fid" else MIN_PHOTOGRAPHS
    if num_photographs >= required and num_patients >= MIN_PATIENTS:
        return None
    reason = f" ({num_features:,} features and one more)" if required > MIN_PHOTOGRAPHS else ""
    return (
        f"found {num_photographs:,} photographs of {num_patients:,} patients; required {required:,}{reason} of "
        f"{MIN_PATIENTS} for {figure}"
    )


def resampled_mean(value_N: Floats, patient_N: Ints, num_resamples: int, seed: int) -> Floats:
    """Returns the mean of photographs' values in each bootstrap resample of their patients."""
    weight_RN = metrics.patient_weights(patient_N, num_resamples=num_resamples, seed=seed)
    mean_R: Floats = weight_RN @ value_N / weight_RN.sum(axis=1)
    return mean_R


def two_seeds(seed: int) -> tuple[int, int]:
    """Makes a seed for each side: the same one would resample both alike."""
    first, second = np.random.SeedSequence(seed).generate_state(2).tolist()
    return first, second


def _checked(figure: str, real_ND: Features, generated_MD: Features, patients: Patients | None) -> Patients:
    found = patients or (np.arange(len(real_ND)), np.arange(len(generated_MD)))
    for feature_ND, patient_N in zip((real_ND, generated_MD), found, strict=True):
        if feature_ND.ndim != 2 or feature_ND.shape[1:] != real_ND.shape[1:] or len(patient_N) != len(feature_ND):
            raise ValueError(
                f"found features of shapes {real_ND.shape} and {generated_MD.shape} with {len(patient_N)} patients on "
                "a side; required matrices of one width and a patient for each row"
            )
        if not all(np.isfinite(feature_ND[rows]).all() for rows in _blocks(len(feature_ND), BLOCK_ROWS)):
            raise ValueError("found features that are not finite; required finite ones")
        short = shortage(
            figure,
            num_features=feature_ND.shape[1],
            num_photographs=len(feature_ND),
            num_patients=len(np.unique(patient_N)),
        )
        if short:
            raise ValueError(short)
    return found


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _whole_and_halves(patient_N: Ints, num_halves: int, random: np.random.Generator) -> Bools:
    """Chooses every row first, then those of random halves of the patients: (1 + num_halves, N)."""
    chosen_RN = np.ones((1 + num_halves, len(patient_N)), dtype=bool)
    num_patients = int(patient_N.max()) + 1
    for chosen_N in chosen_RN[1:]:
        is_in = np.zeros(num_patients, dtype=bool)
        is_in[random.permutation(num_patients)[: num_patients // 2]] = True
        chosen_N[:] = is_in[patient_N]
    return chosen_RN


def _kernel_sums(left_ND: Features, left_RN: Bools, right_MD: Features, right_RM: Bools) -> Floats:
    """Sums the cubic kernel over the chosen pairs of each resample."""
    total_R = np.zeros(len(left_RN))
    for rows in _blocks(len(left_ND), BLOCK_ROWS):
        block_BD = left_ND[rows].astype(np.float64) / left_ND.shape[1]
        weight_RB = left_RN[:, rows].astype(np.float64)
        for columns in _blocks(len(right_MD), BLOCK_ROWS):
            kernel_BB = block_BD @ right_MD[columns].astype(np.float64).T
            kernel_BB += 1.0
            kernel_BB *= kernel_BB * kernel_BB
            total_R += np.einsum("rb,rb->r", weight_RB @ kernel_BB, right_RM[:, columns])
    return total_R


def _diagonal_sums(feature_ND: Features, chosen_RN: Bools) -> Floats:
    total_R = np.zeros(len(chosen_RN))
    for rows in _blocks(len(feature_ND), BLOCK_ROWS):
        block_BD = feature_ND[rows].astype(np.float64)
        kernel_B = (np.einsum("bd,bd->b", block_BD, block_BD) / feature_ND.shape[1] + 1.0) ** 3
        total_R += chosen_RN[:, rows] @ kernel_B
    return total_R


def _mean(feature_ND: Features) -> Floats:
    mean_D: Floats = feature_ND.mean(axis=0, dtype=np.float64)
    return mean_D


def _moments(feature_ND: Features) -> tuple[Floats, Floats]:
    """Returns the mean and the unbiased covariance."""
    mean_D = _mean(feature_ND)
    sum_DD = np.zeros((len(mean_D), len(mean_D)))
    for rows in _blocks(len(feature_ND), BLOCK_ROWS):
        centred_BD = feature_ND[rows] - mean_D
        sum_DD += centred_BD.T @ centred_BD
    return mean_D, sum_DD / (len(feature_ND) - 1)


def _transport(source_DD: Floats, target_DD: Floats) -> tuple[Floats, float]:
    """Returns the optimal transport map between centred Gaussians, and the trace of (source target)^(1/2).

    Source: Knott and Smith 1984: T = B (B A B)^(-1/2) B with B the root of the target and A the source. Directions in
    which either does not vary are mapped to 0.
    """
    value_D, vector_DD = np.linalg.eigh(target_DD)
    root_DD = (vector_DD * np.sqrt(np.maximum(value_D, 0.0))) @ vector_DD.T
    value_D, vector_DD = np.linalg.eigh(root_DD @ source_DD @ root_DD)
    is_varied_D = value_D > value_D[-1] * len(value_D) * np.finfo(np.float64).eps
    root_D = np.sqrt(np.where(is_varied_D, value_D, 0.0))
    inverse_D = np.where(is_varied_D, 1.0 / np.where(is_varied_D, root_D, 1.0), 0.0)
    half_DD = root_DD @ vector_DD
    return (half_DD * inverse_D) @ half_DD.T, float(root_D.sum())


def _influences(feature_ND: Features, mean_D: Floats, shift_D: Floats, transport_DD: Floats) -> Floats:
    """Returns how much a little more weight on each photograph changes the FID; the mean is 0."""
    slope_DD = np.eye(len(mean_D)) - transport_DD
    influence_N = np.zeros(len(feature_ND))
    for rows in _blocks(len(feature_ND), BLOCK_ROWS):
        centred_BD = feature_ND[rows] - mean_D
        influence_N[rows] = np.einsum("bd,bd->b", centred_BD @ slope_DD, centred_BD) + 2.0 * (centred_BD @ shift_D)
    influence_N -= influence_N.mean()
    return influence_N


def _squared_distances(left_ND: Features, right_MD: Features) -> Iterator[tuple[slice, Floats]]:
    """Yields blocks of rows with their squared distances to every photograph of the right side.

    Both sides are taken relative to the right side's mean first: what features have in common would cost digits.
    """
    centre_D = _mean(right_MD)
    squared_M = np.concatenate([
        np.square(right_MD[rows] - centre_D).sum(axis=1) for rows in _blocks(len(right_MD), BLOCK_ROWS)
    ])  # fmt: skip
    for rows in _blocks(len(left_ND), max(1, min(BLOCK_ROWS, BLOCK_CELLS // len(right_MD)))):
        block_BD = left_ND[rows] - centre_D
        squared_BM = np.square(block_BD).sum(axis=1)[:, None] + squared_M
        for columns in _blocks(len(right_MD), BLOCK_ROWS):
            squared_BM[:, columns] -= 2.0 * (block_BD @ (right_MD[columns] - centre_D).T)
        yield rows, np.maximum(squared_BM, 0.0, out=squared_BM)


def _squared_radii(feature_ND: Features, num_neighbours: int) -> Floats:
    """Returns each photograph's squared distance to its k-th nearest other one, with a margin for rounding."""
    radius_N = np.zeros(len(feature_ND))
    for rows, squared_BN in _squared_distances(feature_ND, feature_ND):
        index_B = np.arange(rows.start, rows.stop)
        squared_BN[np.arange(len(index_B)), index_B] = -1.0  # itself comes first, also before an equal photograph
        squared_BN.partition(num_neighbours, axis=1)
        radius_N[rows] = squared_BN[:, num_neighbours]
    return radius_N * (1.0 + 1e-9)


def _mean_interval(value_N: npt.NDArray[np.generic], patient_N: Ints, num_resamples: int, seed: int) -> Interval:
    number_N = value_N.astype(np.float64)
    return metrics.interval(float(number_N.mean()), resampled_mean(number_N, patient_N, num_resamples, seed))
