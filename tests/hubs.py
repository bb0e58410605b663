"""Small real hubs for tests: drawn photographs as shard sets and a corpus."""

from gretfound import corpus, duplicates, fundus, lineage, metadata, phantom, shard, storage
from gretfound.lineage import Corpus, ShardSet


def draw_shard_set(
    hub_uri: str, site_name: str, *, num_images: int, size_px: int = 64, origin: str = "real"
) -> ShardSet:
    """Draws photographs of a site and writes them as a shard set, with their metadata."""
    site = phantom.SITES[site_name]
    rows = []
    for place, (patient_seed, eye) in enumerate(phantom.list_eyes(site, num_images=num_images, seed=7)):
        eye_drawn = phantom.draw_eye(site, seed=patient_seed, size_px=size_px, eye=eye)
        cells = {"eye": eye, "dr": eye_drawn.truth.dr, "dr_present": eye_drawn.truth.dr > 0}
        caption = metadata.caption(cells) if origin == "synthetic" else None
        rows.append(
            shard.row_of(
                fundus.encode_jpeg(eye_drawn.image),
                site_id=site_name,
                origin=origin,
                cells=cells,
                seed=place,
                prompt=caption,
            )
        )
    half = len(rows) // 2
    shards = tuple(shard.write_shard(hub_uri, part) for part in (rows[:half], rows[half:]) if part)
    record = ShardSet(site_id=site_name, origin=origin, num_images=len(rows), shards=shards, rejected={})
    storage.write_record(hub_uri, record)
    return record


def assemble(hub_uri: str, *shard_sets: ShardSet) -> Corpus:
    """Makes a corpus of shard sets, every image drawn once an epoch."""
    layout = corpus.lay_out(shard_sets)
    for part in layout.parts:
        duplicates.sign_shard(hub_uri, part)
    manifest = corpus.plan(layout)
    parents = tuple(sorted(each.id for each in shard_sets))
    return corpus.publish(
        hub_uri,
        Corpus(
            parents=parents,
            recipe_id=lineage.recipe_id("assemble_corpus", {}, list(parents)),
            **corpus.count(layout, manifest),
        ),
        manifest=manifest,
        exclusions=corpus.EXCLUSIONS_SCHEMA.empty_table(),
        evaluation=duplicates.EVALUATION_SCHEMA.empty_table(),
    )
