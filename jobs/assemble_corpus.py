"""Shard sets -> corpus: one manifest over real and synthetic shards of all sites.

python -m jobs.assemble_corpus hub_uri=runs/demo/hub evaluation_uris='[runs/demo/sites/dune]'

Images of evaluation sets are excluded by the digest of their pixels. Without ``shard_set_ids`` every shard set of the
hub is taken, except those of ``excluded_site_ids``. Records one Corpus and prints its id.
"""

from dataclasses import dataclass
from pathlib import Path

from gretfound.config import load, setting, to_yaml
from jobs import console


@dataclass(frozen=True)
class Config:
    """What `assemble_corpus` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    shard_set_ids: list[str] = setting([], "shard sets to include; empty: all of the hub")
    excluded_site_ids: list[str] = setting([], "sites to leave out, for example withdrawn ones")
    evaluation_uris: list[str] = setting([], "labelled site folders whose images no corpus may hold")
    temperature: float = setting(1.0, "a site with n images gets n ** temperature of the draws; 0 to 1")
    real_share: float | None = setting(None, "share of draws that are real photographs, 0 to 1; null: as they come")


def main(argv: list[str]) -> str:
    """Runs the job; returns the corpus's id."""
    config = load(Config, argv)
    from gretfound import corpus, lineage, storage
    from gretfound.evaluation import protocol
    from gretfound.lineage import Corpus, ShardSet

    hub_uri = storage.normalised(config.hub_uri)
    if config.shard_set_ids:
        shard_sets = [storage.read_record(hub_uri, record_id, ShardSet) for record_id in config.shard_set_ids]
    else:
        shard_sets = list(storage.read_records(hub_uri, ShardSet))
    shard_sets = [each for each in shard_sets if each.site_id not in config.excluded_site_ids]
    excluded = protocol.image_ids_of([storage.normalised(uri) for uri in config.evaluation_uris])
    settings = {"temperature": config.temperature, "real_share": config.real_share, "excluded": sorted(excluded)}
    parents = sorted(each.id for each in shard_sets)
    recipe = lineage.recipe_id("assemble_corpus", settings, parents)
    if finished := storage.finished_record(hub_uri, recipe, Corpus):
        return finished.id
    storage.write_bytes(storage.join(storage.run_uri(hub_uri, recipe), "config.yaml"), to_yaml(config).encode())
    manifest = corpus.plan(
        hub_uri,
        shard_sets,
        excluded_image_ids=frozenset(excluded),
        temperature=config.temperature,
        real_share=config.real_share,
    )
    with storage.scratch_folder() as folder:
        (Path(folder) / "manifest.parquet").write_bytes(corpus.encode_manifest(manifest))
        record = Corpus(parents=tuple(parents), recipe_id=recipe, **corpus.count(manifest))
        return storage.publish_folder(hub_uri, Path(folder), record).id


if __name__ == "__main__":
    console.run(Config, main)
