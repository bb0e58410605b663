"""What Ray does to fit graders: the hub's real photographs are read in parts, columns are fitted task by task.

Parts are those of `gretfound.site_comparison`; what a grader is, and when it grades, is `gretfound.grading`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gretfound import grading, lineage, site_comparison, storage, withdrawal
from gretfound.errors import LineageError
from gretfound.generator_evaluation import Part
from gretfound.lineage import Encoder, Generator, ShardSet

IMAGES_PER_PART = 64


def read_real(hub_uri: str, encoder_id: str) -> list[ShardSet]:
    """Returns what graders are fitted on, once it is sure that they may be.

    Raises:
        LineageError: If the hub holds no real photographs, or the encoder was withdrawn.
    """
    found = [each for each in withdrawal.read_remaining(hub_uri, ShardSet) if each.origin == "real"]
    if not found:
        raise LineageError("grader_keys: the hub holds no real photographs to fit graders on; leave it empty")
    if encoder_id:
        withdrawal.require_unmarked(hub_uri, storage.read_record(hub_uri, encoder_id, Encoder))
    return found


def decide(
    hub_uri: str,
    generators: Mapping[str, Generator],
    shard_sets: Sequence[ShardSet],
    *,
    keys: Sequence[str],
    encoder_id: str,
    num_images: int,
    min_agreement: float,
    seed: int,
    examine: Callable[[Sequence[Part]], object],
) -> None:
    """Decides what grades each generator's run, once for each size of photographs; what was decided before stays.

    Args:
        hub_uri: The hub.
        generators: By the recipe id of the run.
        shard_sets: Real photographs, of `read_real`.
        keys: Columns to grade.
        encoder_id: In whose features graders see; empty: wavelet scattering.
        num_images: Real photographs of each site at most.
        min_agreement: See `grading.decide`.
        seed: See `grading.fit`.
        examine: Reads parts on the cluster (`generator_evaluation.examine_parts`).
    """
    decided = {recipe_id: storage.join(storage.run_uri(hub_uri, recipe_id), grading.NAME) for recipe_id in generators}
    missing = [recipe_id for recipe_id, uri in decided.items() if not storage.exists(uri)]
    for resolution_px in sorted({generators[recipe_id].resolution_px for recipe_id in missing}):
        settings = {"grader_images": num_images, "resolution_px": resolution_px}
        parents = [*(each.id for each in shard_sets), *filter(None, [encoder_id])]
        readings = site_comparison.plan_readings(
            hub_uri,
            shard_sets,
            run_uri=storage.run_uri(hub_uri, lineage.recipe_id("read_for_graders", settings, parents)),
            num_images=num_images,
            resolution_px=resolution_px,
            images_per_part=IMAGES_PER_PART,
        )
        examine([part for each in readings.values() for part in each])
        collections = site_comparison.read_collections(readings, space="encoder" if encoder_id else "scattering")
        asked = sorted(set(keys))
        fitted = site_comparison.on_cluster(partial(grading.fit, collections=collections, seed=seed), asked)
        for recipe_id in missing:
            if generators[recipe_id].resolution_px == resolution_px:
                grading.decide(
                    decided[recipe_id],
                    dict(zip(asked, fitted, strict=True)),
                    encoder_id=encoder_id,
                    min_agreement=min_agreement,
                )
