"""Shard sets -> corpus: one manifest over real and synthetic shards of all sites.

python -m jobs.assemble_corpus hub_uri=runs/demo/hub evaluation_uris='[runs/demo/sites/dune]'
python -m jobs.assemble_corpus conf/corpus/retfound_de.yaml hub_uri=s3://hub

Evaluation images, their near-duplicates and those patients' other images are left out, of this hub's registered sets
too; so are drawn photographs that a site vetoed, repeats and near-duplicates among the shards. Each shard is read
once, by Ray Data, for its signatures: planning opens none, and a run that was stopped signs only the rest. Without
``shard_set_ids`` every shard set of the hub is taken, except those of ``excluded_site_ids`` and of sites that have
withdrawn. Records one Corpus and prints its id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console

if TYPE_CHECKING:
    from gretfound import corpus
    from gretfound.lineage import Shard


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of the curriculum; what is null is the corpus's."""

    num_images: int = setting(0, "images of this phase; 0, in the last one: as many as the run has left")
    real_share: float | None = setting(None, "share of draws that are real photographs, 0 to 1")
    temperature: float | None = setting(None, "0 to 1")
    country_temperature: float | None = setting(None, "0 to 1")


@dataclass(frozen=True)
class Config:
    """What `assemble_corpus` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    shard_set_ids: list[str] = setting([], "shard sets to include; empty: all of the hub")
    excluded_site_ids: list[str] = setting([], "sites to leave out, for example withdrawn ones")
    evaluation_uris: list[str] = setting([], "labelled site folders whose images no corpus may hold")
    temperature: float = setting(1.0, "a site with n images gets n ** temperature of the draws; 0 to 1")
    country_temperature: float | None = setting(
        None, "a country with n images gets n ** this of the draws, 0 to 1; null: countries play no part"
    )
    real_share: float | None = setting(None, "share of draws that are real photographs, 0 to 1; null: as they come")
    site_cap: int = setting(0, "most real, and most synthetic, images of a site; 0: no cap")
    phases: list[PhaseConfig] = setting(
        [], "curriculum, in order: num_images, real_share, temperature, country_temperature; empty: one phase"
    )
    has_near_duplicates_removed: bool = setting(True, "keep one of near-duplicates among the shards")
    threshold_bits: int = setting(72, "most bits of 512 in which near-duplicates' hashes differ")
    hash_cpus: float = setting(1.0, "CPUs that Ray Data may use to make signatures")

    def __post_init__(self) -> None:
        """Checks ranges, and that all phases but the last have an end."""
        shares = [self.temperature, self.country_temperature, self.real_share]
        shares += [each for p in self.phases for each in (p.temperature, p.country_temperature, p.real_share)]
        if not all(each is None or 0 <= each <= 1 for each in shares):
            raise ConfigError("temperature, country_temperature and real_share are 0 to 1, in phases as well")
        if self.site_cap < 0 or not 0 <= self.threshold_bits <= 128 or self.hash_cpus <= 0:
            raise ConfigError("site_cap is 0 or more, threshold_bits 0 to 128 of 512, hash_cpus above 0")
        if any(phase.num_images <= 0 for phase in self.phases[:-1]):
            raise ConfigError("phases: each but the last needs num_images above 0")


RESULT_KEYS = (
    *("temperature", "country_temperature", "real_share", "site_cap", "phases"),
    *("has_near_duplicates_removed", "threshold_bits"),
)


def phases_of(config: Config) -> tuple["corpus.Phase", ...]:
    """Returns the curriculum with what its phases leave to the corpus filled in."""
    from gretfound.corpus import Phase

    return tuple(
        Phase(
            num_images=each.num_images,
            real_share=config.real_share if each.real_share is None else each.real_share,
            temperature=config.temperature if each.temperature is None else each.temperature,
            country_temperature=(
                config.country_temperature if each.country_temperature is None else each.country_temperature
            ),
        )
        for each in config.phases or [PhaseConfig()]
    )


def sign_shards(hub_uri: str, parts: Sequence["Shard"], *, hash_cpus: float) -> None:
    """Makes the signatures that are missing, a Ray Data task a shard."""
    from dataclasses import asdict

    from gretfound import duplicates

    missing = duplicates.without_signatures(hub_uri, parts)
    if not missing:
        return
    console.start_ray()

    import ray.data
    from tqdm import tqdm

    def sign(row: dict[str, object]) -> dict[str, object]:
        from gretfound import duplicates, lineage

        duplicates.sign_shard(hub_uri, lineage.shard_from_json(row))
        return {"sha256": row["sha256"]}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=max(1.0, hash_cpus))
    num_images = {part.sha256: part.num_images for part in parts}
    signed = ray.data.from_items([asdict(part) for part in missing], override_num_blocks=len(missing))
    with tqdm(desc="signing", total=sum(num_images.values()), unit="image", unit_scale=True) as bar:
        bar.update(sum(num_images.values()) - sum(part.num_images for part in missing))
        for row in signed.map(sign, num_cpus=min(1.0, hash_cpus)).iter_rows():
            bar.update(num_images[row["sha256"]])


def main(argv: list[str]) -> str:
    """Runs the job; returns the corpus's id."""
    config = load(Config, argv)
    from gretfound import corpus, duplicates, lineage, storage, veto, withdrawal
    from gretfound.evaluation import protocol
    from gretfound.lineage import Corpus, ShardSet

    hub_uri = storage.normalised(config.hub_uri)
    if config.shard_set_ids:
        found = {record_id: storage.read_record(hub_uri, record_id, ShardSet) for record_id in config.shard_set_ids}
        for each in found.values():
            withdrawal.require_unmarked(hub_uri, each)
    else:
        found = {each.id: each for each in withdrawal.read_remaining(hub_uri, ShardSet)}
    shard_sets = {name: each for name, each in found.items() if each.site_id not in config.excluded_site_ids}
    for uri in config.evaluation_uris:
        evaluation_set = protocol.read_evaluation_set(storage.normalised(uri))
        corpus.register_evaluation(hub_uri, evaluation_set.name, protocol.sign(evaluation_set))
    evaluation, countries = corpus.registered_evaluation(hub_uri), corpus.countries_of(hub_uri)
    settings = {name: value for name, value in canonical(config).items() if name in RESULT_KEYS}
    settings |= {"evaluation": evaluation["image_id"].to_pylist(), "countries": countries}
    vetoed = veto.vetoed_image_ids(hub_uri)
    if vetoed:  # else the recipe stays that of hubs without vetoes
        settings["vetoed"] = vetoed
    parents = sorted(shard_sets)
    recipe = lineage.recipe_id("assemble_corpus", settings, parents)
    if finished := storage.finished_record(hub_uri, recipe, Corpus):
        return finished.id
    storage.write_bytes(storage.join(storage.run_uri(hub_uri, recipe), "config.yaml"), to_yaml(config).encode())

    layout = corpus.lay_out(list(shard_sets.values()))
    sign_shards(hub_uri, layout.parts, hash_cpus=config.hash_cpus)
    reasons = corpus.find_exclusions(
        layout,
        duplicates.read_signatures(hub_uri, layout.parts),
        evaluation,
        vetoed_image_ids=vetoed,
        has_near_duplicates_removed=config.has_near_duplicates_removed,
        threshold_bits=config.threshold_bits,
    )
    reasons = corpus.cap_sites(layout, reasons, config.site_cap)
    phases = phases_of(config)
    manifest = corpus.plan(layout, reasons=reasons, phases=phases, countries=countries)
    record = Corpus(
        parents=tuple(parents),
        recipe_id=recipe,
        phase_images=tuple(phase.num_images for phase in phases),
        **corpus.count(layout, manifest),
    )
    exclusions = corpus.list_exclusions(layout, reasons)
    return corpus.publish(hub_uri, record, manifest=manifest, exclusions=exclusions, evaluation=evaluation).id


if __name__ == "__main__":
    console.run(Config, main)
