"""Agreement: whether the labels of one site contradict what the other sites' photographs teach.

Of each label a probe is fitted on the other sites' photographs and asked for this site's: an AUROC well below 0.5 says
that the labels are the other way round. And leave-one-site-out: what the site's photographs, real and drawn, do to a
probe that is tested on real photographs of other sites. Pure: features and cells in, plain values out.

Legend of array suffixes: N photographs, D features.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np

from gretfound import holdout
from gretfound.evaluation import metrics, probe, protocol
from gretfound.evaluation.distances import Bools, Features, Ints
from gretfound.evaluation.metrics import Interval
from gretfound.evaluation.protocol import Task
from gretfound.gate.comparison import holm
from gretfound.metadata import Cells

MIN_PATIENTS_PER_CLASS = 10
MAX_CONTRADICTING = 0.4  # an AUROC above this may be another camera's doing, however narrow its interval
MIN_TAUGHT = 0.65  # below it the others' photographs do not show the label, as weak generators' do not
LEVEL = 0.05
TESTED_SHARE = 0.3
NUM_PARTS = 3  # of the patients of a single site, each held out in turn
NUM_GROUPS = 5  # of more sites, held out in turn: a hundred sites would be a hundred fits for each site otherwise
Run = Callable[[Callable[[Task], Any], Sequence[Task]], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Collection:
    """One site's photographs.

    Args:
        site_id: The site.
        features: (N, D), in one space for all sites.
        is_real: Whether each one is a real photograph, and not a drawn one.
        image_ids: `fundus.pixel_digest` of each.
        patients: A name of each one's patient, empty where none is known: a patient of its own.
        cells: Its metadata, or what it was drawn for.
    """

    site_id: str
    features: Features
    is_real: Bools
    image_ids: tuple[str, ...]
    patients: tuple[str, ...]
    cells: tuple[Cells, ...]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well a probe of the other sites tells one site's labels; ``p`` is one-sided, of an AUROC below 0.5.

    ``taught`` is the control: the AUROC of such probes on the others themselves, each held out in turn, the median.
    """

    auroc: Interval
    taught: Interval
    p: float
    num_images: int
    num_patients: int

    @property
    def is_judged(self) -> bool:
        """Whether the others agree among themselves, so that they can contradict anybody."""
        return self.taught.low > 0.5 and self.taught.value >= MIN_TAUGHT


@dataclass(frozen=True, kw_only=True)
class Influence:
    """What a site adds to a probe that is tested on other sites' real photographs: with it less without it.

    ``p`` is two-sided. Below 0 the site makes the probe worse.
    """

    difference: Interval
    p: float
    num_tested: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Labelled:
    """The photographs of one site that carry one label, features standardised within the site and origin."""

    features: Features
    labels: Ints
    patients: Ints
    is_tested: Bools


def compare(
    collections: Sequence[Collection],
    *,
    keys: Sequence[str] = (),
    num_resamples: int = 1000,
    seed: int = 0,
    run: Run = map,
) -> dict[str, Any]:
    """Holds every site's labels against those of the others.

    A site contradicts the others where, of one label or more, the AUROC's 95% interval lies below 0.5, the AUROC is at
    most 0.4, and Holm's p over all sites and labels is below 0.05; and where the others agree among themselves, with a
    median AUROC of 0.65 or more whose interval lies above 0.5. The one with the lowest AUROC is named first and
    taken out of what the others are held against, and all is measured again, until no other is found: so a site does
    not look wrong because of its neighbour. Of two sites that contradict each other both are named.

    Args:
        collections: A site each.
        keys: Keys of `protocol.tasks_for` to ask for; empty: all with two classes.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of folds, of who is held out, and of the resamples.
        run: Gives a function to each task, in order; a pool's or a cluster's `map`.

    Returns:
        JSON-able: ``contradicting``, by site the keys of the labels; ``tasks`` by key with ``title`` and, by site,
        ``agreement``, ``influence`` and ``missing``, why one of them is absent.
    """
    every_task = protocol.tasks_for([cells for each in collections for cells in each.cells])
    tasks = [each for each in every_task if len(each.classes) == 2 and (not keys or each.key in keys)]
    options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
    trusted = {each.site_id for each in collections}
    contradicting: dict[str, list[str]] = {}
    evidence: dict[str, dict[str, Agreement]] = {each.key: {} for each in tasks}
    while True:
        held = partial(agreements, collections, trusted=frozenset(trusted), **options)
        found: dict[str, dict[str, Agreement]] = dict(zip((t.key for t in tasks), run(held, tasks), strict=True))
        wrong = {site_id: places for site_id, places in _contradicting(found).items() if site_id in trusted}
        if not wrong:
            break
        lowest = {site_id: min(found[key][site_id].auroc.value for key in places) for site_id, places in wrong.items()}
        for site_id in wrong if len(trusted) == 2 else [min(lowest, key=lambda name: lowest[name])]:
            contradicting[site_id] = wrong[site_id]
            for key, sites in found.items():
                evidence[key] |= {site_id: sites[site_id]} if site_id in sites else {}
        trusted -= set(contradicting)
    found = {key: {**sites, **evidence[key]} for key, sites in found.items()}
    weighed = partial(influences, collections, trusted=frozenset(trusted), **options)
    influence: dict[str, dict[str, Influence]] = dict(zip((t.key for t in tasks), run(weighed, tasks), strict=True))
    return {
        "contradicting": dict(sorted(contradicting.items())),
        "tasks": {
            task.key: {"title": task.title, "sites": _sites_json(collections, found[task.key], influence[task.key])}
            for task in tasks
            if found[task.key]
        },
    }


def describe(found: Mapping[str, Any]) -> list[str]:
    """Says of each site that contradicts the others in which labels, for the person who decides about it.

    Args:
        found: As `compare` returned it.
    """
    told = []
    for site_id, keys in found["contradicting"].items():
        aurocs = {key: found["tasks"][key]["sites"][site_id]["agreement"]["auroc"] for key in keys}
        labels = "; ".join(
            f"{found['tasks'][key]['title']} (AUROC {each['value']:.2f}, {each['low']:.2f} to {each['high']:.2f})"
            for key, each in aurocs.items()
        )
        told.append(
            f"the labels of site {site_id} contradict what the other sites' photographs teach: {labels}; have the site "
            "look at its columns, and leave it out of corpora until then (excluded_site_ids)"
        )
    return told


def agreements(
    collections: Sequence[Collection], task: Task, *, trusted: frozenset[str], num_resamples: int, seed: int
) -> dict[str, Agreement]:
    """Returns by site how well a probe of the trusted others tells its labels, where both have enough patients.

    Source: the p of an AUROC is that of Mann and Whitney's U, (m + n + 1) / (12 m n) being its variance where the
    labels mean nothing, with m and n patients, not photographs, so that a patient's photographs count once.
    """
    labelled = _labelled_sites(collections, task, seed)
    found: dict[str, Agreement] = {}
    for site_id, site in labelled.items():
        others = [each for name, each in labelled.items() if name in trusted and name != site_id]
        if not others:
            continue
        score_NC = _scores(others, site.features, seed)
        value, resampled_R = _auroc_within([site], score_NC, num_resamples, seed)
        num_negative, num_positive = (len(np.unique(site.patients[site.labels == label])) for label in (0, 1))
        deviation = math.sqrt((num_negative + num_positive + 1) / (12 * num_negative * num_positive))
        found[site_id] = Agreement(
            auroc=metrics.interval(value, resampled_R),
            taught=_taught(others, num_resamples, seed),
            p=NormalDist().cdf((value - 0.5) / deviation),
            num_images=len(site.labels),
            num_patients=len(np.unique(site.patients)),
        )
    return found


def _taught(sites: Sequence[_Labelled], num_resamples: int, seed: int) -> Interval:
    """Returns the median AUROC of probes on each site, fitted on the others; of one site, on its patients in thirds."""
    if len(sites) > 1:
        groups = [sites[first::NUM_GROUPS] for first in range(min(NUM_GROUPS, len(sites)))]
        turns = [(group, [each for each in sites if each not in group]) for group in groups]
    else:
        (site,) = sites
        patients = np.random.default_rng(seed).permutation(np.unique(site.patients))
        parts = [np.isin(site.patients, patients[part::NUM_PARTS]) for part in range(NUM_PARTS)]
        turns = [([_where(site, is_tested_N)], [_where(site, ~is_tested_N)]) for is_tested_N in parts]
    aurocs = []
    for tested, fitted in turns:
        score_NC = _scores(fitted, np.concatenate([each.features for each in tested]), seed)
        by_site = np.split(score_NC, np.cumsum([len(each.labels) for each in tested])[:-1])
        aurocs += [
            _auroc_within([each], scores, num_resamples, seed) for each, scores in zip(tested, by_site, strict=True)
        ]
    resampled_R = np.nanmedian([resampled_R for _, resampled_R in aurocs], axis=0)
    return metrics.interval(float(np.median([value for value, _ in aurocs])), resampled_R)


def _auroc_within(
    sites: Sequence[_Labelled], score_NC: metrics.Floats, num_resamples: int, seed: int
) -> tuple[float, metrics.Floats]:
    """Returns the AUROC of scores, photographs compared within a site only, and that of each resample of patients."""
    fold_N = np.repeat(np.arange(len(sites)), [len(each.labels) for each in sites])
    named_2N = np.stack([fold_N, np.concatenate([each.patients for each in sites])])
    return metrics.bootstrap(
        metrics.auroc_by_resample,
        np.concatenate([each.labels for each in sites]),
        score_NC,
        fold_N,
        np.unique(named_2N, axis=1, return_inverse=True)[1].reshape(-1),
        num_resamples=num_resamples,
        seed=seed,
    )


def influences(
    collections: Sequence[Collection], task: Task, *, trusted: frozenset[str], num_resamples: int, seed: int
) -> dict[str, Influence]:
    """Returns by site what it adds to a probe fitted on all sites, tested on the trusted others' held-out patients.

    Both fits are tested on the same resamples of the same patients; photographs are compared within a site only.
    """
    labelled = _labelled_sites(collections, task, seed)
    fitted = {name: _where(each, ~each.is_tested) for name, each in labelled.items()}
    tested = {name: _where(each, each.is_tested) for name, each in labelled.items() if name in trusted}
    found: dict[str, Influence] = {}
    for site_id in labelled:
        others = [each for name, each in fitted.items() if name != site_id]
        real = [each for name, each in tested.items() if name != site_id and len(set(each.labels.tolist())) == 2]
        if not real or not others:
            continue
        feature_ND = np.concatenate([each.features for each in real])
        (value, resampled_R), (value_without, without_R) = (
            _auroc_within(real, _scores(sites, feature_ND, seed), num_resamples, seed)
            for sites in ([*others, fitted[site_id]], others)
        )
        difference = metrics.interval(value - value_without, resampled_R - without_R)
        deviation = float(np.nanstd(resampled_R - without_R))
        p = 2.0 * NormalDist().cdf(-abs(difference.value) / deviation) if deviation else 1.0
        found[site_id] = Influence(difference=difference, p=p, num_tested=len(feature_ND))
    return found


def _labelled_sites(collections: Sequence[Collection], task: Task, seed: int) -> dict[str, _Labelled]:
    """Returns the sites with enough patients of each class."""
    every = {each.site_id: _labelled(each, task, seed) for each in collections}
    return {site_id: each for site_id, each in every.items() if _has_classes(each)}


def _labelled(site: Collection, task: Task, seed: int) -> _Labelled:
    feature_ND = site.features.astype(np.float64)
    for is_origin_N in (site.is_real, ~site.is_real):
        # A site's camera moves all its photographs alike: it shall not be learnt in place of what they show.
        part_ND = feature_ND[is_origin_N]
        if len(part_ND):
            feature_ND[is_origin_N] = (part_ND - part_ND.mean(axis=0)) / np.maximum(part_ND.std(axis=0), 1e-6)
    names = [
        ("patient", patient) if patient else ("photograph", image_id)
        for patient, image_id in zip(site.patients, site.image_ids, strict=True)
    ]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    real = [(image_id, patient) for image_id, patient, is_real in
            zip(site.image_ids, site.patients, site.is_real.tolist(), strict=True) if is_real]  # fmt: skip
    held_out = set(holdout.choose(real, share=TESTED_SHARE, seed=seed).image_ids)
    labels = [task.label(cells) for cells in site.cells]
    whole = _Labelled(
        features=feature_ND.astype(np.float32),
        labels=np.array([-1 if each is None else each for each in labels], dtype=np.int64),
        patients=np.array([numbers[name] for name in names], dtype=np.int64),
        is_tested=np.array([image_id in held_out for image_id in site.image_ids]) & site.is_real,
    )
    return _where(whole, whole.labels >= 0)


def _where(site: _Labelled, is_kept_N: Bools) -> _Labelled:
    return _Labelled(**{name: column[is_kept_N] for name, column in vars(site).items()})


def _has_classes(site: _Labelled) -> bool:
    counts = [len(np.unique(site.patients[site.labels == label])) for label in (0, 1)]
    return min(counts) >= MIN_PATIENTS_PER_CLASS


def _scores(sites: Sequence[_Labelled], feature_ND: Features, seed: int) -> metrics.Floats:
    """Scores photographs by the house probe, fitted on sites whose patients are different people."""
    starts = np.cumsum([0, *(int(each.patients.max()) + 1 for each in sites[:-1])])
    score_NC: metrics.Floats = probe.linear_scores(
        np.concatenate([each.features for each in sites]),
        np.concatenate([each.labels for each in sites]),
        np.concatenate([each.patients + start for each, start in zip(sites, starts, strict=True)]),
        feature_ND,
        num_classes=2,
        seed=seed,
    )
    return score_NC


def _contradicting(found: Mapping[str, Mapping[str, Agreement]]) -> dict[str, list[str]]:
    """Returns by site the tasks in which it contradicts the others."""
    places = [(key, site_id) for key, sites in found.items() for site_id in sites]
    adjusted = holm([found[key][site_id].p for key, site_id in places])
    wrong: dict[str, list[str]] = {}
    for (key, site_id), p in zip(places, adjusted, strict=True):
        auroc = found[key][site_id].auroc
        is_low = auroc.high < 0.5 and auroc.value <= MAX_CONTRADICTING
        if p < LEVEL and is_low and found[key][site_id].is_judged:
            wrong.setdefault(site_id, []).append(key)
    return wrong


def _sites_json(
    collections: Sequence[Collection], agreement: Mapping[str, Agreement], influence: Mapping[str, Influence]
) -> dict[str, dict[str, Any]]:
    adjusted = dict(zip(influence, holm([each.p for each in influence.values()]), strict=True))
    content: dict[str, dict[str, Any]] = {}
    for site_id in (each.site_id for each in collections):
        held, weighed = agreement.get(site_id), influence.get(site_id)
        content[site_id] = {
            "agreement": asdict(held) | {"is_judged": held.is_judged} if held else None,
            "influence": asdict(weighed) | {"holm_p": adjusted[site_id]} if weighed else None,
            "missing": ""
            if held and weighed
            else f"required {MIN_PATIENTS_PER_CLASS} patients of each class here and at another site, and "
            f"{holdout.MIN_PHOTOGRAPHS} held-out real photographs of another site for what the site adds",
        }
    return content
