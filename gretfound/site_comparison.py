"""What Ray does to compare sites: their photographs are read in parts side by side, labels are compared task by task.

Parts, and the actors that work on them, are those of `gretfound.generator_evaluation`. What the figures mean is decided
by `gretfound.agreement`, without Ray.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from markupsafe import Markup

from gretfound import agreement, storage
from gretfound.agreement import Collection
from gretfound.evaluation import page
from gretfound.generator_evaluation import Part, Place, choose_places, cut, places_of, read_examined
from gretfound.lineage import Report, ShardSet

JSON_NAME, HTML_NAME, TEMPLATE_NAME = "report.json", "report.html", "site_comparison.html"


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


def on_cluster(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Gives a function to each item in a Ray task of one CPU; the results in order."""
    shared, call = ray.put(function), ray.remote(num_cpus=1)(_call)
    return list(ray.get([call.remote(shared, item) for item in items]))


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def publish(
    hub_uri: str,
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
    """Compares from finished parts and writes the report; the record comes last.

    Args:
        hub_uri: The hub.
        readings: The photographs that were read, by site.
        parents: Ids of shard sets and an encoder.
        recipe_id: Of the run.
        space: The space of features in which labels are compared.
        label_keys: Keys of `protocol.tasks_for`; empty: all.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of resamples, folds and who is held out.
        settings: What decides the result, for the report.
    """
    collections = read_collections(readings, space=space)
    labels = agreement.compare(collections, keys=label_keys, num_resamples=num_resamples, seed=seed, run=on_cluster)
    content = {
        "labels": labels,
        "num_judged": sum(
            bool(each["agreement"] and each["agreement"]["is_judged"])
            for task in labels["tasks"].values()
            for each in task["sites"].values()
        ),
        "sites": {
            each.site_id: {"real": int(each.is_real.sum()), "synthetic": int((~each.is_real).sum())}
            for each in collections
        },
        "verdicts": agreement.describe(labels),
        "settings": dict(settings),
    }
    with storage.scratch_folder() as scratch:
        path = Path(scratch)
        (path / JSON_NAME).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        (path / HTML_NAME).write_text(page.render(TEMPLATE_NAME, content=content, auroc_svg=_auroc_svg))
        num_images = sum(part.num for parts in readings.values() for part in parts)
        record = Report(parents=tuple(parents), recipe_id=recipe_id, evaluation_sets=(), num_images=num_images)
        return storage.publish_folder(hub_uri, path, record)


def _auroc_svg(interval: Mapping[str, float], is_wrong: bool) -> Markup:
    """Draws one AUROC on a scale of 0 to 1 on which chance is marked."""
    colour = "#b3372f" if is_wrong else page.ACCENT
    drawn = page.range_svg(interval, y=9, name="AUROC", colour=colour, place=lambda value: 6 + 198 * value)
    return Markup(
        '<svg class="forest" viewBox="0 0 210 18" width="210" height="18" role="img">'
        f'<line x1="105" y1="0" x2="105" y2="18" class="chance"/>{drawn}</svg>'
    )
