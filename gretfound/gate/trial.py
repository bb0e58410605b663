"""The gate's trial of one generator: looks, plants, draws and measures, and returns the checks.

It needs the site's photographs, so it runs at the site; what it returns holds figures only, and beside them the places
of the most similar pairs, for a page that stays there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gretfound import metadata
from gretfound.evaluation import distances, metrics, probe
from gretfound.evaluation.scattering import scattering_space
from gretfound.fundus import Photograph
from gretfound.gate import checks, comparison, exposure
from gretfound.gate import controls as planted
from gretfound.gate.checks import Control
from gretfound.gate.comparison import Sight
from gretfound.gate.eyes import Eye
from gretfound.gate.policy import Policy
from gretfound.gate.verdict import Check

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Read = Callable[[Sequence[int]], Iterator[Photograph]]
Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Photograph]]
NUM_PAIRS = 24
_BLOCK = 64
_FOLDS = 5
_EXPOSED_SEED = 2**32  # seeds of the extraction are no others


@dataclass(frozen=True, kw_only=True)
class Side:
    """The photographs trained on, or the held-out ones, at the generator's resolution.

    Args:
        patients: Of each photograph, a text; one without a patient has one of its own.
        eyes: Which eye, or empty.
        captions: What each was, or would have been, trained with.
        read: Yields the photographs at these places, in order; (S, S, 3) squares.
    """

    patients: tuple[str, ...]
    eyes: tuple[str, ...]
    captions: tuple[str, ...]
    read: Read = field(repr=False)

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def numbers(self) -> Ints:
        """The patients as numbers from 0."""
        numbered: Ints = np.unique(np.array(self.patients), return_inverse=True)[1].astype(np.int64)
        return numbered


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sample and the photograph trained on that an eye finds nearest: places, and how alike."""

    sample: int
    trained: int
    eye: str
    similarity: float
    is_flagged: bool


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the gate found: the checks, the samples that may not leave, and what the page shows."""

    checks: tuple[Check, ...]
    flagged: tuple[int, ...]
    pairs: tuple[Pair, ...]
    reviewed: tuple[tuple[str, float], ...] = ()


def hold(
    *,
    trained: Side,
    held_out: Side,
    samples: Sequence[Photograph],
    eyes: Sequence[Eye],
    generator: Any,
    draw: Draw,
    policy: Policy,
    first: Check,
    extra: Iterable[Check] = (),
    seed: int = 0,
) -> Trial:
    """Holds the trial of one generator.

    Args:
        trained: What it was trained on.
        held_out: What it never saw.
        samples: Drawn for captions of the released summary.
        eyes: That look for copies.
        generator: The fine-tuned pipeline.
        draw: Draws a photograph for each caption and seed, in order.
        policy: The numbers.
        first: What `checks.preconditions` found; where it is no PASS, nothing else is looked at.
        extra: Checks of other rooms.
        seed: Of what is planted and chosen.
    """
    if first.verdict != "PASS":
        return Trial(checks=(first, *extra), flagged=(), pairs=())
    copies = look_for_copies(trained=trained, held_out=held_out, samples=samples, eyes=eyes, policy=policy, seed=seed)
    trained_S, held_out_S = (_some(len(side), policy.max_images_per_side, seed) for side in (trained, held_out))
    shown, others = list(trained.read(trained_S)), list(held_out.read(held_out_S))
    loss_N = exposure.losses(
        generator,
        [*shown, *others],
        [*(trained.captions[place] for place in trained_S), *(held_out.captions[place] for place in held_out_S)],
        times=policy.times,
        num_noises=policy.num_noises,
        seed=seed,
    )
    told = comparison.tell_apart(
        -loss_N[: len(shown)],
        -loss_N[len(shown) :],
        trained_N=trained.numbers[trained_S],
        held_out_H=held_out.numbers[held_out_S],
        seed=seed,
    )
    trained_ND, held_out_HD = scattering_space(shown), scattering_space(others)
    few = _some(len(samples), policy.max_images_per_side, seed)
    kid = distances.kid(
        held_out_HD,
        scattering_space([samples[place] for place in few]),
        patients=(comparison.numbered(held_out.numbers[held_out_S]), np.arange(len(few))),
        seed=seed,
    )
    exposed = _most_exposed(trained, dict(zip(trained_S, loss_N, strict=False)), policy.num_exposed)
    people: dict[str, set[str]] = {}
    for caption, patient in zip(trained.captions, trained.patients, strict=True):
        people.setdefault(caption, set()).add(patient)
    scores = exposure.caption_scores(generator, sorted(people), num_noises=policy.num_noises, seed=seed)
    blank = metadata.caption({})  # it says nothing of anybody
    telling = {caption: len(found) for caption, found in people.items() if caption != blank}
    num_reviewed = max(1, round(policy.reviewed_captions * len(scores)))
    found = (
        first,
        *copies.checks,
        _extraction(trained, exposed, eyes, copies, draw, policy),
        checks.membership(
            told,
            blind_auc=told_without_generator(
                trained_ND, held_out_HD, trained.numbers[trained_S], held_out.numbers[held_out_S], seed=seed
            ),
            policy=policy,
        ),
        checks.captions(telling, scores, policy),
        checks.usefulness(kid, policy),
        *extra,
    )
    return Trial(
        checks=tuple(sorted(found, key=lambda check: check.name)),
        flagged=copies.flagged,
        pairs=copies.pairs,
        reviewed=tuple(sorted(scores.items(), key=lambda each: -each[1])[:num_reviewed]),
    )


@dataclass(frozen=True, kw_only=True)
class CopyTrial:
    """G1 and G2 of one generator, and what the eyes that see keep for G3."""

    checks: tuple[Check, Check]
    flagged: tuple[int, ...]
    pairs: tuple[Pair, ...]
    limits: dict[str, tuple[float, float]]  # of each eye that sees: tau, and what 95% of second visits reach
    trained: dict[str, Floats]


def look_for_copies(
    *, trained: Side, held_out: Side, samples: Iterable[Photograph], eyes: Sequence[Eye], policy: Policy, seed: int = 0
) -> CopyTrial:
    """Plants copies for each eye to find (G1), then has the eyes that did look at the samples (G2)."""
    size_px = next(iter(trained.read([0]))).shape[0]
    looking = [eye for eye in eyes if not eye.why_blind(size_px)]
    known = _look(looking, trained.read(range(len(trained))))
    unknown = _look(looking, held_out.read(range(len(held_out))))
    chosen = _some(len(trained), policy.num_planted, seed + 1)
    originals = list(trained.read(chosen))
    copied = [
        planted.plant_copy(square, kind=planted.KINDS[place % len(planted.KINDS)], seed=seed + place // 2)
        for place, square in enumerate(originals)
    ]
    visits = _second_visits(trained)
    has_visits = len(visits) >= policy.num_planted
    imitated = [] if has_visits else [planted.imitate_visit(each, seed=seed + i) for i, each in enumerate(originals)]
    found = [Control(eye=eye.name, blind=why) for eye in eyes if (why := eye.why_blind(size_px))]
    taus = {}
    for eye in looking:
        trained_N = known[eye.name]
        best_H = _best(eye, unknown[eye.name], trained_N)
        tau = taus[eye.name] = comparison.threshold(best_H)
        if has_visits:
            visit_V = np.array([eye.similarity(trained_N[[a]], trained_N[[b]])[0, 0] for a, b in visits])
        else:
            visit_V = _best(eye, eye.look(imitated), trained_N)
        found.append(
            Control(
                eye=eye.name,
                copies_found=float((_best(eye, eye.look(copied), trained_N) > tau).mean()),
                visits_found=float((visit_V > tau).mean()),
                false_flags=float((best_H > tau).mean()),
                visit_p5=float(np.quantile(visit_V, 0.05)),
            )
        )
    seeing = {each.eye: each for each in found if each.sees(policy)}
    first = checks.controls(found, policy, num_real_visits=len(visits))
    able = [eye for eye in looking if eye.name in seeing]
    if not able:
        return CopyTrial(checks=(first, checks.copies(None, policy)), flagged=(), pairs=(), limits={}, trained={})
    seen = _look(able, samples)
    sights = {}
    for eye in able:  # against both sides at once: laying one sample over others is what takes the time
        both_SM = eye.similarity(seen[eye.name], np.concatenate([known[eye.name], unknown[eye.name]]))
        to_trained_SN, to_held_out_SH = np.split(both_SM, [len(trained)], axis=1)
        sights[eye.name] = Sight(
            to_trained=to_trained_SN,
            to_held_out=to_held_out_SH,
            tau=taus[eye.name],
            visit_p5=seeing[eye.name].visit_p5,
        )
    copies = comparison.find_copies(
        sights, trained_N=trained.numbers, held_out_H=held_out.numbers, max_p=policy.max_p, seed=seed
    )
    return CopyTrial(
        checks=(first, checks.copies(copies, policy)),
        flagged=tuple(np.flatnonzero(copies.is_flagged).tolist()),
        pairs=_nearest_pairs(sights),
        limits={name: (sight.tau, sight.as_a_visit) for name, sight in sights.items()},
        trained={name: known[name] for name in seeing},
    )


def _look(eyes: Sequence[Eye], squares: Iterable[Photograph]) -> dict[str, Floats]:
    """Looks once at each photograph, however many they are, with all eyes."""
    parts: dict[str, list[Floats]] = {eye.name: [eye.look([])] for eye in eyes}
    block: list[Photograph] = []
    for square in squares:
        block.append(square)
        if len(block) == _BLOCK:
            for eye in eyes:
                parts[eye.name].append(eye.look(block))
            block = []
    for eye in eyes:
        parts[eye.name].append(eye.look(block))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _best(eye: Eye, seen: Floats, known: Floats) -> Floats:
    best: Floats = eye.similarity(seen, known).max(axis=1)
    return best


def _some(num: int, most: int, seed: int) -> list[int]:
    """Chooses places, sorted."""
    return sorted(np.random.default_rng([seed, 3]).permutation(num)[:most].tolist())


def _second_visits(side: Side) -> list[tuple[int, int]]:
    """Returns pairs of photographs of one eye of one patient, each photograph in one pair at most."""
    first: dict[tuple[str, str], int] = {}
    pairs = []
    for place, key in enumerate(zip(side.patients, side.eyes, strict=True)):
        if not key[1]:
            continue
        if key in first:
            pairs.append((first.pop(key), place))
        else:
            first[key] = place
    return pairs


def _nearest_pairs(sights: dict[str, Sight]) -> tuple[Pair, ...]:
    pairs: list[Pair] = []
    for name, sight in sights.items():
        best_S = sight.to_trained.max(axis=1)
        pairs.extend(
            Pair(
                sample=sample,
                trained=int(sight.to_trained[sample].argmax()),
                eye=name,
                similarity=float(best_S[sample]),
                is_flagged=bool(best_S[sample] > sight.tau),
            )
            for sample in np.argsort(-best_S, kind="stable")[: NUM_PAIRS // len(sights)].tolist()
        )
    return tuple(pairs)


def _most_exposed(trained: Side, loss_of: dict[int, float], num: int) -> list[int]:
    """Returns the photographs most at risk: by turns of the lowest loss, the rarest caption, the most of one eye."""
    captions = Counter(trained.captions)
    repeats = Counter(zip(trained.patients, trained.eyes, strict=True))
    places = sorted(loss_of)
    orders = (
        sorted(places, key=lambda place: loss_of[place]),
        sorted(places, key=lambda place: captions[trained.captions[place]]),
        sorted(places, key=lambda place: -repeats[trained.patients[place], trained.eyes[place]]),
    )
    ranked = dict.fromkeys(place for row in zip(*orders, strict=True) for place in row)
    return list(ranked)[:num]


def _extraction(
    trained: Side, exposed: Sequence[int], eyes: Sequence[Eye], copies: CopyTrial, draw: Draw, policy: Policy
) -> Check:
    able = [eye for eye in eyes if eye.name in copies.limits]
    if not able:
        return checks.extraction(0, 0, 0, num_drawn=0, is_seen=False, policy=policy)
    num_hits = num_groups = num_confirmed = 0
    for turn, place in enumerate(exposed):
        first = _EXPOSED_SEED + turn * policy.seeds_per_exposed
        seeds = range(first, first + policy.seeds_per_exposed)
        seen = _look(able, draw([trained.captions[place]] * len(seeds), seeds))
        is_hit, is_group, is_confirmed = np.zeros(len(seeds), bool), False, False
        for eye in able:
            tau, visit = copies.limits[eye.name]
            known, drawn = copies.trained[eye.name], seen[eye.name]
            is_hit |= eye.similarity(drawn, known[[place]])[:, 0] >= visit
            group = comparison.groups_alike(eye.similarity(drawn, drawn) > tau, min_group=policy.min_group)
            is_group |= bool(group)
            is_confirmed |= bool(group) and bool((_best(eye, drawn[group], known) >= visit).any())
        num_hits += int(is_hit.sum())
        num_groups += is_group
        num_confirmed += is_confirmed
    return checks.extraction(
        num_hits,
        num_confirmed,
        num_groups,
        num_drawn=len(exposed) * policy.seeds_per_exposed,
        is_seen=True,
        policy=policy,
    )


def told_without_generator(
    trained_ND: Floats, held_out_HD: Floats, trained_N: Ints, held_out_H: Ints, *, seed: int = 0
) -> float:
    """Returns how well a classifier tells the two sides apart by the photographs alone: AUC over folds of patients.

    Source: the blind baseline of CopyMark: an attack that does no better has found the bias of the split.
    """
    feature_ND = np.concatenate([trained_ND, held_out_HD])
    label_N = np.repeat([0, 1], [len(trained_ND), len(held_out_HD)]).astype(np.int64)
    patient_N = np.concatenate([trained_N, trained_N.max() + 1 + held_out_H])
    people = np.unique(patient_N)
    fold_of = dict(zip(people.tolist(), (np.random.default_rng(seed).permutation(len(people)) % _FOLDS), strict=True))
    fold_N = np.array([fold_of[patient] for patient in patient_N.tolist()])
    areas, weights = [], []
    for fold in range(_FOLDS):  # scores of two folds are of two fits, so no pair is of two folds
        is_scored = fold_N == fold
        scores_MC = probe.linear_scores(
            feature_ND[~is_scored],
            label_N[~is_scored],
            comparison.numbered(patient_N[~is_scored]),
            feature_ND[is_scored],
            num_classes=2,
            seed=seed,
        )
        auc_R, num_pairs_R = metrics.auroc_by_resample(
            label_N[is_scored] == 1, scores_MC[:, 1], np.ones((1, int(is_scored.sum())))
        )
        areas.append(np.nan_to_num(auc_R[0]))
        weights.append(num_pairs_R[0])
    return float(np.average(areas, weights=weights))
