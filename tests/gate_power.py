"""How well the privacy gate finds planted copies, as a table: `make gate-power`, or `python -m tests.gate_power`.

For each share of copies among the samples, 20 seeds: in how many G2 fails. Copies are photographs trained on, changed
as `gretfound.gate.controls` does; the other samples are photographs of patients whom nobody trained on, which is
harder for the gate than what a generator draws, since they are as sharp as real ones. On drawn photographs there are
2,000 samples and as many held-out photographs as trained ones. Of the real ones in ../shared/cfp, less near-
duplicates, each seed draws 150 to be trained on and 150 to be held out (by chance: IDRiD's own order begins with the
sick), and the samples are the rest with nine imitated second visits of each: 2,000 samples of 209 people, so that one
who is like somebody trained on counts ten times. The last row of each kind of photograph is of all eyes together, also
of one that G1 would leave out. Features are kept in runs/bench/gate_power.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

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
NUM_REAL_SIDE, NUM_REAL_VISITS = 150, 9
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
Floats = npt.NDArray[np.float32]


def main() -> None:
    """Prints the table and writes runs/bench/gate_power.json."""
    cache_path = OUT_PATH / "gate_power"
    cache_path.mkdir(parents=True, exist_ok=True)
    learned = eyes.trained_eye(num_drawings=RULES.eye_drawings, num_steps=RULES.eye_steps, cache_path=cache_path)
    drawn = drawn_photographs(cache_path)
    looking: list[Eye] = [learned, eyes.DetailEye()]
    settings = {"num_side": NUM_SIDE, "num_candidates": NUM_SIDE, "num_visits": 0}
    rows = measure("drawn", drawn, looking, **settings, cache_path=cache_path)
    if REAL_PATH.is_dir():
        real = real_photographs(cache_path)
        looking.append(eyes.VesselEye())
        settings = {"num_side": NUM_REAL_SIDE, "num_candidates": len(real), "num_visits": NUM_REAL_VISITS}
        rows += measure("real", real, looking, **settings, cache_path=cache_path)
    (OUT_PATH / "gate_power.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'photographs':<12}{'eye':<11}{'samples':>8}{'planted':>9}{'found':>8}  G1")
    for row in rows:
        counts = f"{row['samples']:>8}{row['planted']:>9.1%}{row['found']:>8.0%}"
        control = f"copies {row['copies_found']:.0%}, second visits {row['visits_found']:.0%}"
        print(f"{row['photographs']:<12}{row['eye']:<11}{counts}  {control}")


def measure(
    name: str,
    squares: Sequence[Photograph],
    looking: Sequence[Eye],
    *,
    num_side: int,
    num_candidates: int,
    num_visits: int,
    cache_path: Path,
) -> list[dict[str, float | str]]:
    """Returns a row for each eye, and for all together, and share of copies.

    Args:
        name: Of the kind of photographs, in the table and in the cache.
        squares: Photographs; each seed divides them into those trained on, those held out, and samples.
        looking: The eyes.
        num_side: Photographs trained on, and held-out ones.
        num_candidates: Only the first so many can be trained on: those are copied, which takes long.
        num_visits: Imitated second visits of each sample, which are samples, too.
        cache_path: Where what the eyes see is kept.
    """
    candidates = squares[:num_candidates]
    planted = [controls.plant_copy(square, kind=controls.KINDS[place % 5], seed=place)
               for place, square in enumerate(tqdm(candidates, desc=f"{name}: copies"))]  # fmt: skip
    visits = [controls.imitate_visit(square, seed=place)
              for place, square in enumerate(tqdm(candidates, desc=f"{name}: visits"))]  # fmt: skip
    owners = np.tile(np.arange(len(squares)), 1 + num_visits)
    further = [controls.imitate_visit(squares[owner], seed=len(squares) + place)
               for place, owner in enumerate(tqdm(owners[len(squares) :], desc=f"{name}: samples"))]  # fmt: skip
    seen_by: dict[str, dict[str, Floats]] = {}
    for eye in tqdm(looking, desc=name):
        cached = f"{name}-{eye.name}"
        seen = kept(cache_path / f"{cached}.npy", eye, squares)
        among = similarities(cache_path / f"{cached}-among.npy", eye, seen, seen)
        copied = kept(cache_path / f"{cached}-{num_candidates}-copies.npy", eye, planted)
        revisited = kept(cache_path / f"{cached}-{num_candidates}-visits.npy", eye, visits)
        sampled = [among]
        if further:
            again = kept(cache_path / f"{cached}-{len(further)}-further.npy", eye, further)
            sampled.append(similarities(cache_path / f"{cached}-{len(further)}-further-among.npy", eye, again, seen))
        seen_by[eye.name] = {
            "among": among,
            "copies": similarities(cache_path / f"{cached}-{num_candidates}-to-copies.npy", eye, copied, seen),
            "visits": similarities(
                cache_path / f"{cached}-{num_candidates}-to-visits.npy", eye, revisited, seen[:num_candidates]
            ),
            "samples": np.vstack(sampled),
        }
    groups = {eye: [eye] for eye in seen_by} | {"all": list(seen_by)}
    outcomes: dict[tuple[str, float], list[bool]] = {(group, share): [] for group in groups for share in SHARES}
    shares_found: dict[tuple[str, str], list[float]] = {
        (group, kind): [] for group in groups for kind in ("copies", "visits")
    }
    numbers = np.arange(num_side)
    for seed in tqdm(range(NUM_SEEDS), desc=f"{name}: seeds"):
        random = np.random.default_rng(seed)
        trained = random.permutation(num_candidates)[:num_side]
        held_out = random.permutation(np.setdiff1d(np.arange(len(squares)), trained))[:num_side]
        eligible = np.flatnonzero(~np.isin(owners, np.concatenate([trained, held_out])))
        fresh = random.permutation(eligible)[:NUM_SAMPLES]
        tau = {
            eye: comparison.threshold(seen["among"][np.ix_(held_out, trained)].max(axis=1))
            for eye, seen in seen_by.items()
        }
        visit_p5 = {
            eye: float(np.quantile(seen["visits"][np.ix_(trained, trained)].max(axis=1), 0.05))
            for eye, seen in seen_by.items()
        }
        for group, kind in shares_found:
            nearest = {eye: seen_by[eye][kind][np.ix_(trained, trained)].max(axis=1) for eye in groups[group]}
            is_found = np.any([near > tau[eye] for eye, near in nearest.items()], axis=0)
            shares_found[group, kind].append(float(is_found.mean()))
        for share in SHARES:
            num_planted = round(share * NUM_SAMPLES)
            copied_C, others = random.permutation(trained)[np.arange(num_planted) % num_side], fresh[num_planted:]
            sights = {
                eye: Sight(
                    to_trained=np.vstack(
                        [seen["copies"][np.ix_(copied_C, trained)], seen["samples"][others][:, trained]]
                    ),
                    to_held_out=np.vstack(
                        [seen["copies"][np.ix_(copied_C, held_out)], seen["samples"][others][:, held_out]]
                    ),
                    tau=tau[eye],
                    visit_p5=visit_p5[eye],
                )
                for eye, seen in seen_by.items()
            }
            for group, names in groups.items():
                found = comparison.find_copies(
                    {eye: sights[eye] for eye in names},
                    trained_N=numbers,
                    held_out_H=numbers,
                    max_p=RULES.max_p,
                    seed=seed,
                )
                outcomes[group, share].append(checks.copies(found, RULES).verdict == "FAIL")
    return [
        {"photographs": name, "eye": group, "samples": NUM_SAMPLES, "planted": share, "seeds": NUM_SEEDS,
         "found": float(np.mean(outcomes[group, share])),
         **{f"{kind}_found": float(np.mean(shares_found[group, kind])) for kind in ("copies", "visits")}}
        for group in groups
        for share in SHARES
    ]  # fmt: skip


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
