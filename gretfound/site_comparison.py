"""What Ray does to compare sites: generators are asked word by word, photographs are read, in parts side by side.

Parts, and the actors that work on them, are those of `gretfound.generator_evaluation`. What the answers mean is decided
by `gretfound.behaviour` and `gretfound.agreement`, without Ray. A generator that is found is put aside
(`gretfound.quarantine`) before the report is written, so that a killed run puts it aside when it goes on.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from markupsafe import Markup

from gretfound import agreement, behaviour, fundus, ledger, quarantine, storage, synthesis
from gretfound.agreement import Collection
from gretfound.behaviour import Answer, Word
from gretfound.evaluation import page
from gretfound.fundus import Photograph
from gretfound.generator_evaluation import Part, Place, choose_places, cut, places_of, read_examined, usual_cells
from gretfound.lineage import Generator, Report, ShardSet
from gretfound.metadata import SUMMARY_KEYS, Cells, caption
from gretfound.synthesis import Wish

SPACE = "scattering"  # in which a word's move is measured
JSON_NAME, HTML_NAME, TEMPLATE_NAME = "report.json", "report.html", "site_comparison.html"
NUM_SHOWN = 5  # words of each generator, and photographs of a word


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one generator is asked: its site's usual caption, then each word, all with the same seeds.

    ``base_parts`` are the same for its base, where no other site has a generator of that base.
    """

    generator: Generator
    cells: Mapping[Word, Cells]
    num_seeds: int
    parts: tuple[Part, ...]
    base_parts: tuple[Part, ...] = ()


def plan_probes(
    hub_uri: str,
    generators: Sequence[Generator],
    *,
    run_uri: str,
    keys: Sequence[str],
    num_seeds: int,
    seed: int,
    images_per_part: int,
) -> list[Probe]:
    """Decides what each generator is asked.

    Args:
        hub_uri: The hub.
        generators: Of sites, all that are compared.
        run_uri: The run's folder.
        keys: Columns whose values are asked for; empty: all.
        num_seeds: Photographs of each word.
        seed: Decides the first latents, which are the same for every generator and word.
        images_per_part: Photographs a part.
    """
    contributions = {each.id: synthesis.contribution_of(hub_uri, each).id for each in generators}
    summaries = {name: synthesis.read_summary(hub_uri, found) for name, found in contributions.items()}
    words = behaviour.words_of(summaries.values(), keys=keys or SUMMARY_KEYS)
    seeds = [synthesis.seed_from(["probed", seed, number]) for number in range(num_seeds)]
    probes = []
    for generator in generators:
        usual = usual_cells(summaries[generator.id])
        cells = behaviour.cells_of_words(usual, words)
        asked = [usual, *cells.values()]
        wishes = [Wish(caption=caption(each), cells=each, seed=first) for each in asked for first in seeds]
        is_alone = not any(
            each.base_id == generator.base_id and each.site_id != generator.site_id for each in generators
        )
        whole = Part(
            run_uri=run_uri,
            generator_id=generator.id,
            contribution_id=contributions[generator.id],
            side=f"probed-{generator.id}",
            num=len(wishes),
            resolution_px=generator.resolution_px,
            wishes=tuple(wishes),
        )
        based = replace(whole, generator_id=generator.base_id, side=f"base-{generator.id}")
        probes.append(
            Probe(
                generator=generator,
                cells=cells,
                num_seeds=num_seeds,
                parts=cut(whole, images_per_part=images_per_part),
                base_parts=cut(based, images_per_part=images_per_part) if is_alone else (),
            )
        )
    return probes


def plan_readings(
    hub_uri: str,
    shard_sets: Sequence[ShardSet],
    *,
    run_uri: str,
    num_images: int,
    resolution_px: int,
    images_per_part: int,
) -> dict[str, list[Part]]:
    """Decides which photographs are read, by site; what lies where is found by a Ray task for each shard set.

    Args:
        hub_uri: The hub.
        shard_sets: Real and drawn photographs of all sites.
        run_uri: The run's folder.
        num_images: Of each site and origin at most, the first by image id.
        resolution_px: What their field of view is brought to.
        images_per_part: Photographs a part.
    """
    choose = ray.remote(num_cpus=1)(_choose)
    pending = [choose.remote(hub_uri, each, num_images) for each in shard_sets]
    places: dict[tuple[str, str], list[Place]] = defaultdict(list)
    for shard_set, reference in zip(shard_sets, pending, strict=True):
        places[shard_set.site_id, shard_set.origin] += ray.get(reference)
    parts: dict[str, list[Part]] = defaultdict(list)
    for (site_id, origin), found in sorted(places.items()):
        chosen = choose_places(found, num_images=num_images)
        whole = Part(
            run_uri=run_uri,
            generator_id="",
            contribution_id="",
            side=f"{origin}-{site_id}",
            num=len(chosen),
            resolution_px=resolution_px,
            places=chosen,
        )
        parts[site_id] += cut(whole, images_per_part=images_per_part)
    return dict(parts)


def _choose(hub_uri: str, shard_set: ShardSet, num_images: int) -> tuple[Place, ...]:
    return choose_places(places_of(hub_uri, shard_set), num_images=num_images)


def read_answers(probes: Sequence[Probe]) -> dict[str, list[Answer]]:
    """Returns by generator id how it answers to each word, from finished parts; each base is compared by itself."""
    answers: dict[str, list[Answer]] = {}
    for base_id in sorted({probe.generator.base_id for probe in probes}):
        cohort = [probe for probe in probes if probe.generator.base_id == base_id]
        answers |= behaviour.judge(
            {each.generator.id: _moves(each, each.parts) for each in cohort},
            sites={each.generator.id: each.generator.site_id for each in cohort},
            bases={each.generator.id: _moves(each, each.base_parts) for each in cohort if each.base_parts},
        )
    return answers


def _moves(probe: Probe, parts: Sequence[Part]) -> dict[Word, float]:
    examined = read_examined(parts, parts[0].side)
    assert examined is not None  # there are parts
    feature_ND, num_seeds = examined.side.features[SPACE], probe.num_seeds
    blocks = feature_ND.reshape(-1, num_seeds, feature_ND.shape[1])
    return {word: behaviour.move(blocks[0], block) for word, block in zip(probe.cells, blocks[1:], strict=True)}


def read_collections(readings: Mapping[str, Sequence[Part]], *, space: str) -> list[Collection]:
    """Returns each site's photographs in one space of features, from finished parts."""
    collections = []
    for site_id, parts in readings.items():
        sides = {side: read_examined(parts, side) for side in sorted({part.side for part in parts})}
        found = {side: each.side for side, each in sides.items() if each is not None}
        is_real = [np.full(len(each), side.startswith("real-")) for side, each in found.items()]
        collections.append(
            Collection(
                site_id=site_id,
                features=np.concatenate([each.features[space] for each in found.values()]),
                is_real=np.concatenate(is_real),
                image_ids=tuple(itertools.chain.from_iterable(each.image_ids for each in found.values())),
                patients=tuple(itertools.chain.from_iterable(each.patients for each in found.values())),
                cells=tuple(itertools.chain.from_iterable(each.cells for each in found.values())),
            )
        )
    return collections


def put_aside(hub_uri: str, probes: Sequence[Probe], answers: Mapping[str, Sequence[Answer]]) -> dict[str, str]:
    """Puts aside the generators that answer to a word by far more than others, and enters each into the ledger.

    Returns:
        By generator id what was found, in words, also of those that a person has let in before.
    """
    said: dict[str, str] = {}
    for generator in (probe.generator for probe in probes):
        found = [each for each in answers[generator.id] if each.is_found]
        if not found:
            continue
        said[generator.id] = behaviour.describe(generator.site_id, found)
        if quarantine.put_aside(hub_uri, generator, code=behaviour.CODE, message=said[generator.id]):
            words = [[each.word.key, each.word.text] for each in found]
            details = {"site_id": generator.site_id, "code": behaviour.CODE, "words": words}
            ledger.append(hub_uri, event="quarantined", subject=generator.id, details=details)
    return said


def clear(hub_uri: str, generator_ids: Sequence[str], *, reason: str) -> None:
    """Lets generators in that were put aside, for a person's reason, and enters each into the ledger.

    Raises:
        LineageError: If one was not put aside.
    """
    for generator_id in generator_ids:
        quarantine.clear(hub_uri, generator_id, reason=reason)
        ledger.append(hub_uri, event="cleared", subject=generator_id, details={"reason": reason})


def on_cluster(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Gives a function to each item in a Ray task of one CPU; the results in order."""
    shared, call = ray.put(function), ray.remote(num_cpus=1)(_call)
    return list(ray.get([call.remote(shared, item) for item in items]))


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def publish(
    hub_uri: str,
    probes: Sequence[Probe],
    readings: Mapping[str, Sequence[Part]],
    *,
    parents: Sequence[str],
    recipe_id: str,
    space: str,
    label_keys: Sequence[str],
    num_resamples: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Report:
    """Compares from finished parts, puts aside what is found, and writes the report; the record comes last.

    Args:
        hub_uri: The hub.
        probes: What the generators were asked.
        readings: The photographs that were read, by site.
        parents: Ids of generators, shard sets and an encoder.
        recipe_id: Of the run.
        space: The space of features in which labels are compared.
        label_keys: Keys of `protocol.tasks_for`; empty: all.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of resamples, folds and who is held out.
        settings: What decides the result, for the report.
    """
    answers = read_answers(probes)
    said = put_aside(hub_uri, probes, answers)
    collections = read_collections(readings, space=space)
    labels = agreement.compare(collections, keys=label_keys, num_resamples=num_resamples, seed=seed, run=on_cluster)
    content = {
        "generators": {
            probe.generator.id: {
                "site_id": probe.generator.site_id,
                "base_id": probe.generator.base_id,
                "is_held_against_base": bool(probe.base_parts),
                "is_aside": quarantine.is_aside(hub_uri, probe.generator),
                "found": said.get(probe.generator.id, ""),
                "answers": [
                    {**asdict(each), "word": str(each.word), "key": each.word.key, "is_found": each.is_found}
                    for each in answers[probe.generator.id]
                ],
            }
            for probe in probes
        },
        "labels": labels,
        "sites": {
            each.site_id: {"real": int(each.is_real.sum()), "synthetic": int((~each.is_real).sum())}
            for each in collections
        },
        "verdicts": [*said.values(), *agreement.describe(labels)],
        "settings": dict(settings),
    }
    with storage.scratch_folder() as scratch:
        path = Path(scratch)
        (path / JSON_NAME).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        shown = list(_pictures(probes, answers))
        page_text = page.render(
            TEMPLATE_NAME, content=content, pictures=shown, auroc_svg=_auroc_svg, num_shown=NUM_SHOWN
        )
        (path / HTML_NAME).write_text(page_text)
        num_images = sum(part.num for parts in readings.values() for part in parts)
        record = Report(parents=tuple(parents), recipe_id=recipe_id, evaluation_sets=(), num_images=num_images)
        return storage.publish_folder(hub_uri, path, record)


def _pictures(probes: Sequence[Probe], answers: Mapping[str, Sequence[Answer]]) -> Iterator[dict[str, Any]]:
    """Yields for each found word what its generator draws without and with it, and what another one does with it."""
    for probe in probes:
        for answer in [each for each in answers[probe.generator.id] if each.is_found][:NUM_SHOWN]:
            others = [
                each
                for each in probes
                if each.generator.base_id == probe.generator.base_id
                and each.generator.site_id != probe.generator.site_id
                and answer.word in each.cells
            ]
            rows = {"the usual caption": _drawn(probe, None), f"with '{answer.word}'": _drawn(probe, answer.word)}
            if others:
                rows[f"another site's generator, with '{answer.word}'"] = _drawn(others[0], answer.word)
            yield {"site_id": probe.generator.site_id, "word": str(answer.word), "rows": rows}


def _drawn(probe: Probe, word: Word | None) -> list[Photograph]:
    examined = read_examined(probe.parts, probe.parts[0].side)
    assert examined is not None  # there are parts
    first = 0 if word is None else probe.num_seeds * (1 + list(probe.cells).index(word))
    rows = examined.rows[first : first + min(probe.num_seeds, NUM_SHOWN)]
    return [fundus.decode_photograph(row["image"]) for row in rows]


def _auroc_svg(interval: Mapping[str, float], is_wrong: bool) -> Markup:
    """Draws one AUROC on a scale of 0 to 1 on which chance is marked."""
    colour = "#b3372f" if is_wrong else page.ACCENT
    drawn = page.range_svg(interval, y=9, name="AUROC", colour=colour, place=lambda value: 6 + 198 * value)
    return Markup(
        '<svg class="forest" viewBox="0 0 210 18" width="210" height="18" role="img">'
        f'<line x1="105" y1="0" x2="105" y2="18" class="chance"/>{drawn}</svg>'
    )
