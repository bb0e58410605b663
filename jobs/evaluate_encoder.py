"""Encoder -> report: probes a frozen encoder on labelled site folders, beside two baselines in the same run.

python -m jobs.evaluate_encoder hub_uri=runs/demo/hub encoder_id=encoder-... evaluation_uris='[runs/demo/sites/dune]'

The baselines are the same architecture untrained, and raw pixels. An evaluation photograph of which the encoder's
corpus holds a near-duplicate is an error; the others are registered, so that no later corpus holds them. One that
cannot be read is counted and listed by its row. Records one Report and prints its id.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console, pretrain_encoder
from jobs.recipe import build_objective

RESULT_KEYS = ("num_folds", "num_bootstraps", "min_patients_per_class", "pooling", "seed", "num_pictures")


@dataclass(frozen=True)
class Config:
    """What `evaluate_encoder` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    encoder_id: str = setting(help="the encoder's record id")
    evaluation_uris: list[str] = setting(help="labelled site folders (traindata/ and metadata.csv) to test on")
    fitted_on_uri: str = setting(
        "", "another labelled folder to fit probes on; each evaluation set is then tested as an external set as well"
    )
    num_folds: int = setting(5, "folds of the cross-validation; a patient is in one of them")
    num_bootstraps: int = setting(1000, "resamples of the patients, for 95% intervals")
    min_patients_per_class: int = setting(5, "a class with fewer patients is left out; a task needs two classes")
    pooling: str = setting(
        "mean",
        "what is probed of the patch tokens: mean, as it is served, or mean_and_deviation, which tells of lesions",
    )
    seed: int = setting(0, "decides folds, resamples and the untrained baseline's weights")
    batch_size: int = setting(32, "photographs that a worker embeds at a time")
    num_workers: int = setting(1, "workers that embed photographs in parallel")
    device: str = setting("cpu", "cpu or cuda")
    num_pictures: int = setting(6, "real and synthetic photographs a site, and reconstructions, shown in the report")

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device!r} is neither cpu nor cuda")
        if self.pooling not in ("mean", "mean_and_deviation"):
            raise ConfigError(f"pooling={self.pooling!r} is neither mean nor mean_and_deviation")
        if min(self.num_folds, self.min_patients_per_class) < 2 or min(self.batch_size, self.num_workers) < 1:
            raise ConfigError("num_folds and min_patients_per_class need at least 2, batch_size and num_workers 1")
        if self.num_bootstraps < 100:
            raise ConfigError(f"num_bootstraps={self.num_bootstraps} is too few for a 95% interval; give 100 or more")
        names = [uri.rstrip("/").rpartition("/")[2] for uri in [*self.evaluation_uris, self.fitted_on_uri] if uri]
        if not self.evaluation_uris or len(set(names)) < len(names):
            raise ConfigError(f"evaluation_uris and fitted_on_uri need folders with different names; found {names}")


def pretrained_objective(path: Path) -> Any:
    """Builds the objective of an encoder's folder, as its pretraining was configured, for the reconstructions."""
    config = load(pretrain_encoder.Config, [str(path / "config.yaml")])
    return build_objective(config, seed=config.seed)


def main(argv: list[str]) -> str:
    """Runs the job; returns the report's id."""
    config = load(Config, argv)
    from gretfound import corpus, lineage, release, storage, tracking, withdrawal
    from gretfound.encoder import folder
    from gretfound.evaluation import measurement, pictures, protocol, report
    from gretfound.lineage import Corpus, Encoder, Report

    hub_uri = storage.normalised(config.hub_uri)
    encoder = storage.read_record(hub_uri, config.encoder_id, Encoder)
    withdrawal.require_unmarked(hub_uri, encoder)
    uris = [storage.normalised(uri) for uri in [*config.evaluation_uris, config.fitted_on_uri] if uri]
    sets = [protocol.read_evaluation_set(uri) for uri in uris]
    settings = {name: value for name, value in canonical(config).items() if name in RESULT_KEYS}
    digests = {"sets": [(each.name, each.digest) for each in sets], "has_fitted_on": bool(config.fitted_on_uri)}
    recipe = lineage.recipe_id("evaluate_encoder", settings | digests, [encoder.id])
    if finished := storage.finished_record(hub_uri, recipe, Report):
        return finished.id
    storage.write_bytes(storage.join(storage.run_uri(hub_uri, recipe), "config.yaml"), to_yaml(config).encode())

    console.start_ray()
    measured, faults, signed = measurement.embed_sets(
        hub_uri,
        encoder,
        sets,
        seed=config.seed,
        pooling=config.pooling,
        device=config.device,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )
    tested = [measured[each.name] for each in sets[: len(config.evaluation_uris)]]
    fitted = protocol.without(measured[sets[-1].name], tested) if config.fitted_on_uri else None
    measured |= {fitted.name: fitted} if fitted else {}
    corpora = storage.read_parents(hub_uri, encoder, Corpus)
    for photographs in tested:
        for each in corpora:
            corpus.require_absent(hub_uri, each, signed[photographs.name])
    for photographs in tested:
        corpus.register_evaluation(hub_uri, photographs.name, signed[photographs.name])
    planned, skipped = protocol.plan_sets(
        tested,
        fitted,
        num_folds=config.num_folds,
        min_patients_per_class=config.min_patients_per_class,
        seed=config.seed,
    )
    outcomes = measurement.assess_all(planned, measured, num_resamples=config.num_bootstraps, seed=config.seed)
    content = protocol.summarise(
        planned,
        outcomes,
        measured,
        min_patients_per_class=config.min_patients_per_class,
        num_resamples=config.num_bootstraps,
        seed=config.seed,
    )
    content |= {
        "skipped_tasks": skipped,
        "evaluation_sets": {
            each.name: protocol.describe_set(
                each, measured[each.name], faults[each.name], is_fitted_on=each in sets[len(tested) :]
            )
            for each in sets
        },
        "protocol": protocol.describe_protocol(
            num_folds=config.num_folds,
            num_resamples=config.num_bootstraps,
            min_patients_per_class=config.min_patients_per_class,
            features=folder.POOLINGS[config.pooling],
            seed=config.seed,
            is_checked_against_corpus=bool(corpora),
        ),
        "lineage": {"encoder_id": encoder.id, "records": release.read_lineage(hub_uri, encoder)},
    }
    metrics = tracking.read_metrics(storage.run_uri(hub_uri, encoder.recipe_id))
    with storage.scratch_folder() as scratch:
        report.write_report(
            Path(scratch),
            content,
            assessments=planned,
            outcomes=outcomes,
            photographs=measured,
            loss_curve=[(line["images_seen"], line["loss"]) for line in metrics if "loss" in line],
            site_samples=pictures.sample_sites(hub_uri, corpora, num_pictures=config.num_pictures),
            reconstructions=pictures.reconstruct_photographs(
                hub_uri,
                encoder,
                sets[0],
                tested[0],
                num_pictures=config.num_pictures,
                build_objective=pretrained_objective,
            ),
        )
        record = Report(
            parents=(encoder.id,),
            recipe_id=recipe,
            evaluation_sets=tuple(f"{each.name}:{each.digest}" for each in sets[: len(tested)]),
            num_images=sum(len(photographs.image_ids) for photographs in tested),
        )
        return storage.publish_folder(hub_uri, Path(scratch), record).id


if __name__ == "__main__":
    console.run(Config, main)
