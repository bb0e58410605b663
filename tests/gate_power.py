"""How well the privacy gate finds planted copies, as a table: `make gate-power`, or `python -m tests.gate_power`.

For each share of copies among the samples, 20 seeds: in how many G2 fails. Copies are photographs trained on, changed
as `gretfound.gate.controls` does; the other samples are photographs of patients whom nobody trained on, which is
harder for the gate than what a generator draws, since they are as sharp as real ones. On drawn photographs there are
2,000 samples and as many held-out photographs as trained ones. Of the real ones in ../shared/cfp, less near-
duplicates, 150 are trained on, 150 are held out and the rest are samples; so few samples tell larger shares only, and
the table says so. Features are kept in runs/bench/gate_power.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gretfound import duplicates, fundus, phantom
from gretfound.fundus import Photograph
from gretfound.gate import checks, comparison, controls, eyes, policy
from gretfound.gate.comparison import Sight
from gretfound.gate.eyes import Eye

OUT_PATH = Path("runs/bench")
REAL_PATH = Path("../shared/cfp")
RULES = policy.read_policy("standard")
NUM_SEEDS = 20
DRAWN_PX, REAL_PX = 64, 320
NUM_SAMPLES, NUM_SIDE = 2000, 500
NUM_REAL_SIDE = 150
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
Floats = npt.NDArray[np.float32]


def main() -> None:
    """Prints the table and writes runs/bench/gate_power.json."""
    cache_path = OUT_PATH / "gate_power"
    cache_path.mkdir(parents=True, exist_ok=True)
    learned = eyes.trained_eye(num_drawings=RULES.eye_drawings, num_steps=RULES.eye_steps, cache_path=cache_path)
    drawn = drawn_photographs(cache_path)
    looking: list[Eye] = [learned, eyes.DetailEye()]
    rows = measure("drawn", drawn, looking, num_side=NUM_SIDE, num_samples=NUM_SAMPLES, cache_path=cache_path)
    if REAL_PATH.is_dir():
        real = real_photographs(cache_path)
        num_samples = len(real) - 2 * NUM_REAL_SIDE
        looking.append(eyes.VesselEye())
        rows += measure("real", real, looking, num_side=NUM_REAL_SIDE, num_samples=num_samples, cache_path=cache_path)
    (OUT_PATH / "gate_power.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'photographs':<12}{'eye':<11}{'samples':>8}{'planted':>9}{'found':>8}  G1")
    for row in rows:
        counts = f"{row['samples']:>8}{row['planted']:>9.1%}{row['found']:>8.0%}"
        control = f"copies {row['copies_found']:.0%}, second visits {row['visits_found']:.0%}, tau {row['tau']:.3f}"
        print(f"{row['photographs']:<12}{row['eye']:<11}{counts}  {control}")


def measure(
    name: str,
    squares: Sequence[Photograph],
    looking: Sequence[Eye],
    *,
    num_side: int,
    num_samples: int,
    cache_path: Path,
) -> list[dict[str, float | str]]:
    """Returns a row for each eye and share of copies."""
    planted = [controls.plant_copy(square, kind=controls.KINDS[place % 5], seed=place)
               for place, square in enumerate(squares[:num_side])]  # fmt: skip
    visits = [controls.imitate_visit(square, seed=place) for place, square in enumerate(squares[:num_side])]
    rows: list[dict[str, float | str]] = []
    for eye in looking:
        seen = kept(cache_path / f"{name}-{eye.name}.npy", eye, squares)
        copied = kept(cache_path / f"{name}-{eye.name}-copies.npy", eye, planted)
        revisited = kept(cache_path / f"{name}-{eye.name}-visits.npy", eye, visits)
        among = similarities(cache_path / f"{name}-{eye.name}-among.npy", eye, seen, seen)
        to_copies = similarities(cache_path / f"{name}-{eye.name}-to-copies.npy", eye, copied, seen)
        to_visits = similarities(cache_path / f"{name}-{eye.name}-to-visits.npy", eye, revisited, seen[:num_side])
        outcomes: dict[float, list[bool]] = {share: [] for share in SHARES}
        for seed in range(NUM_SEEDS):
            random = np.random.default_rng(seed)
            order = random.permutation(np.arange(num_side, len(squares)))
            trained, held_out, fresh = np.arange(num_side), order[:num_side], order[num_side:][:num_samples]
            best = among[np.ix_(held_out, trained)].max(axis=1)
            tau = comparison.threshold(best)
            for share in SHARES:
                num_planted = round(share * num_samples)
                chosen = random.permutation(num_side)[:num_planted]
                others = fresh[num_planted:]
                sight = Sight(
                    to_trained=np.vstack([to_copies[np.ix_(chosen, trained)], among[np.ix_(others, trained)]]),
                    to_held_out=np.vstack([to_copies[np.ix_(chosen, held_out)], among[np.ix_(others, held_out)]]),
                    tau=tau,
                )
                found = comparison.find_copies(
                    {eye.name: sight}, trained_N=np.arange(num_side), held_out_H=np.arange(num_side), seed=seed
                )
                # Of few samples 1% is one or two: the share alone would be chance, so there the test of p is counted.
                is_enough = num_samples >= RULES.num_samples
                verdict = checks.copies(found, RULES).verdict
                outcomes[share].append(verdict == "FAIL" if is_enough else found.p < RULES.max_p)
        rows += [
            {"photographs": name, "eye": eye.name, "samples": num_samples, "planted": share, "seeds": NUM_SEEDS,
             "found": float(np.mean(outcomes[share])), "tau": tau,
             "copies_found": float((to_copies[:, :num_side].max(axis=1) > tau).mean()),
             "visits_found": float((to_visits.max(axis=1) > tau).mean())}
            for share in SHARES
        ]  # fmt: skip
    return rows


def kept(path: Path, eye: Eye, squares: Sequence[Photograph]) -> Floats:
    """Returns what an eye keeps of photographs, from a file where it is there."""
    if not path.exists():
        np.save(path, eye.look(squares))
    features: Floats = np.load(path)
    return features


def similarities(path: Path, eye: Eye, seen: Floats, known: Floats) -> Floats:
    """Returns the similarities of all pairs, from a file where it is there."""
    if not path.exists():
        np.save(path, eye.similarity(seen, known))
    found: Floats = np.load(path)
    return found


def drawn_photographs(cache_path: Path) -> list[Photograph]:
    """Returns drawn photographs, one a patient."""
    path = cache_path / "drawn.npy"
    if not path.exists():
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
            drawn = list(pool.map(_drawn, range(2 * NUM_SIDE + NUM_SAMPLES), chunksize=50))
        np.save(path, np.stack(drawn))
    return list(np.load(path))


def _drawn(seed: int) -> Photograph:
    image = phantom.draw_eye(phantom.SITES["aster"], seed=seed, size_px=DRAWN_PX).image
    return fundus.to_square(image, fundus.find_field_of_view(image), DRAWN_PX)


def real_photographs(cache_path: Path) -> list[Photograph]:
    """Returns the real photographs of one camera (IDRiD), less near-duplicates, in the order of their names."""
    path = cache_path / "real.npy"
    if not path.exists():
        files = [
            each for name in ("idrid", "idrid_test") for each in sorted((REAL_PATH / name / "traindata").iterdir())
        ]
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
            squares = list(pool.map(_read, files, chunksize=20))
        hashes = np.stack([duplicates.hash_photograph(each, fundus.find_field_of_view(each)) for each in squares])
        again = {max(pair) for pair in duplicates.find_matches(hashes, hashes).tolist() if pair[0] != pair[1]}
        np.save(path, np.stack([each for place, each in enumerate(squares) if place not in again]))
    return list(np.load(path))


def _read(path: Path) -> Photograph:
    image = fundus.decode_photograph(path.read_bytes())
    return fundus.to_square(image, fundus.find_field_of_view(image), REAL_PX)


if __name__ == "__main__":
    main()
