"""Encoder -> report: probes a frozen encoder on labelled site folders, beside two baselines in the same run.

python -m jobs.evaluate_encoder hub_uri=runs/demo/hub encoder_id=encoder-... evaluation_uris='[runs/demo/sites/dune]'

The baselines are the same architecture untrained, and raw pixels. An evaluation photograph of which the encoder's
corpus holds a near-duplicate is an error; the others are registered, so that no later corpus holds them. One that
cannot be read is counted and listed by its row. Records one Report and prints its id.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console

if TYPE_CHECKING:
    import pyarrow as pa

    from gretfound.evaluation.protocol import Assessment, EvaluationSet, Outcome, Photographs
    from gretfound.evaluation.report import Reconstruction, Sample, SiteSamples
    from gretfound.lineage import Corpus, Encoder, ShardSet


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
    seed: int = setting(0, "decides folds, resamples and the untrained baseline's weights")
    batch_size: int = setting(32, "photographs that a worker embeds at a time")
    num_workers: int = setting(1, "workers that embed photographs in parallel")
    device: str = setting("cpu", "cpu or cuda")
    num_pictures: int = setting(6, "real and synthetic photographs a site, and reconstructions, shown in the report")

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device!r} is neither cpu nor cuda")
        if min(self.num_folds, self.min_patients_per_class) < 2 or min(self.batch_size, self.num_workers) < 1:
            raise ConfigError("num_folds and min_patients_per_class need at least 2, batch_size and num_workers 1")
        if self.num_bootstraps < 100:
            raise ConfigError(f"num_bootstraps={self.num_bootstraps} is too few for a 95% interval; give 100 or more")
        names = [uri.rstrip("/").rpartition("/")[2] for uri in [*self.evaluation_uris, self.fitted_on_uri] if uri]
        if not self.evaluation_uris or len(set(names)) < len(names):
            raise ConfigError(f"evaluation_uris and fitted_on_uri need folders with different names; found {names}")


class Embedder:
    """Runs on workers: decodes photographs once and returns every encoder's features of them."""

    def __init__(self, hub_uri: str, encoder: "Encoder", *, seed: int, device: str, batch_size: int) -> None:
        from gretfound import storage
        from gretfound.encoder import folder

        with storage.scratch_folder() as scratch:
            path = storage.fetch_folder(hub_uri, encoder, Path(scratch))
            pretrained, self._transform = folder.read_encoder_folder(path)
            untrained = folder.untrained_like(path, seed=seed)
        self._networks = {"pretrained": pretrained.to(device), "untrained": untrained.to(device)}
        self._batch_size = batch_size

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Adds image ids, features and, for what cannot be read, the reason to a batch of places and URIs."""
        import numpy as np
        import torch

        from gretfound import duplicates, fundus, storage
        from gretfound.encoder import folder
        from gretfound.evaluation.protocol import RAW_PIXELS_SIZE_PX

        images, reasons, image_ids, hashes = [], [], [], []
        for uri in batch["uri"].tolist():
            image, reason = np.zeros((1, 1, 3), np.uint8), "" if uri else "MISSING: the file is not in traindata/"
            try:
                image = fundus.decode_photograph(storage.read_bytes(uri)) if uri else image
            except fundus.UnreadablePhotograph as error:
                reason = str(error)
            images.append(image)
            reasons.append(reason)
            image_ids.append("" if reason else fundus.pixel_digest(image))
            hashes.append(duplicates.hash_photograph(image, fundus.find_field_of_view(image)).view(np.uint8))
        squares = [self._transform.square(image) for image in images]
        tensor_BCHW = self._transform.normalise(torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy()))
        features = {
            name: folder.embed(network, tensor_BCHW, batch=self._batch_size) for name, network in self._networks.items()
        }
        pixels = [fundus.to_square(square, None, RAW_PIXELS_SIZE_PX).reshape(-1) for square in squares]
        features["raw_pixels"] = np.stack(pixels).astype(np.float32) / np.float32(255.0)
        return {
            "place": batch["place"],
            "reason": np.array(reasons),
            "image_id": np.array(image_ids),
            "hash": np.stack(hashes),
            **features,
        }


def main(argv: list[str]) -> str:
    """Runs the job; returns the report's id."""
    config = load(Config, argv)
    from gretfound import corpus, lineage, release, storage, tracking
    from gretfound.evaluation import protocol, report
    from gretfound.lineage import Encoder, Report

    hub_uri = storage.normalised(config.hub_uri)
    encoder = storage.read_record(hub_uri, config.encoder_id, Encoder)
    uris = [storage.normalised(uri) for uri in [*config.evaluation_uris, config.fitted_on_uri] if uri]
    sets = [protocol.read_evaluation_set(uri) for uri in uris]
    settings = {name: value for name, value in canonical(config).items() if name in _SETTINGS_OF_RESULT}
    digests = {"sets": [(each.name, each.digest) for each in sets], "has_fitted_on": bool(config.fitted_on_uri)}
    recipe = lineage.recipe_id("evaluate_encoder", settings | digests, [encoder.id])
    if finished := storage.finished_record(hub_uri, recipe, Report):
        return finished.id
    storage.write_bytes(storage.join(storage.run_uri(hub_uri, recipe), "config.yaml"), to_yaml(config).encode())

    console.start_ray()
    measured, faults, signed = _embedded(config, hub_uri, encoder, sets)
    tested = [measured[each.name] for each in sets[: len(config.evaluation_uris)]]
    fitted = protocol.without(measured[sets[-1].name], tested) if config.fitted_on_uri else None
    measured |= {fitted.name: fitted} if fitted else {}
    corpora = list(_corpora_of(hub_uri, encoder))
    for photographs in tested:
        for each in corpora:
            corpus.require_absent(hub_uri, each, signed[photographs.name])
    for photographs in tested:
        corpus.register_evaluation(hub_uri, photographs.name, signed[photographs.name])
    planned, skipped = _planned(config, tested, fitted)
    outcomes = _assessed(config, planned, measured)
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
            seed=config.seed,
            is_checked_against_corpus=bool(corpora),
        ),
        "lineage": {"encoder_id": encoder.id, "records": release.read_lineage(hub_uri, encoder)},
    }
    with storage.scratch_folder() as scratch:
        report.write_report(
            Path(scratch),
            content,
            assessments=planned,
            outcomes=outcomes,
            photographs=measured,
            loss_curve=[
                (line["images_seen"], line["loss"])
                for line in tracking.read_metrics(storage.run_uri(hub_uri, encoder.recipe_id))
                if "loss" in line
            ],
            site_samples=_site_samples(hub_uri, corpora, config.num_pictures),
            reconstructions=_reconstructions(hub_uri, encoder, tested[0], sets[0], config.num_pictures),
        )
        record = Report(
            parents=(encoder.id,),
            recipe_id=recipe,
            evaluation_sets=tuple(f"{each.name}:{each.digest}" for each in sets[: len(tested)]),
            num_images=sum(len(photographs.image_ids) for photographs in tested),
        )
        return storage.publish_folder(hub_uri, Path(scratch), record).id


_SETTINGS_OF_RESULT = ("num_folds", "num_bootstraps", "min_patients_per_class", "seed", "num_pictures")


def _embedded(
    config: Config, hub_uri: str, encoder: "Encoder", sets: Sequence["EvaluationSet"]
) -> tuple[dict[str, "Photographs"], dict[str, list[dict[str, Any]]], dict[str, "pa.Table"]]:
    import numpy as np
    import pyarrow as pa
    import ray.data

    from gretfound import duplicates
    from gretfound.evaluation import protocol

    rows = [(each.name, row) for each in sets for row in each.rows]
    ray.data.DataContext.get_current().enable_progress_bars = False
    embedded = ray.data.from_items(
        [{"place": place, "uri": row.uri} for place, (_, row) in enumerate(rows)]
    ).map_batches(
        Embedder,
        fn_constructor_args=(hub_uri, encoder),
        fn_constructor_kwargs={"seed": config.seed, "device": config.device, "batch_size": config.batch_size},
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.num_workers),
        num_cpus=1,
        num_gpus=1 if config.device == "cuda" else 0,
    )
    batches = list(embedded.iter_batches(batch_size=None))
    measured, faults = protocol.collect(rows, batches)
    hash_of = {
        image_id: words.astype(np.uint8).tobytes()
        for batch in batches
        for image_id, words in zip(batch["image_id"].tolist(), batch["hash"], strict=True)
    }
    signed = {
        name: pa.table(
            {"image_id": list(each.image_ids), "hash": [hash_of[image_id] for image_id in each.image_ids]},
            schema=duplicates.EVALUATION_SCHEMA,
        )
        for name, each in measured.items()
    }
    return measured, faults, signed


def _corpora_of(hub_uri: str, encoder: "Encoder") -> Iterator["Corpus"]:
    from gretfound import lineage, storage
    from gretfound.lineage import Corpus

    for parent_id in encoder.parents:
        if lineage.kind_of(parent_id) is Corpus:
            yield storage.read_record(hub_uri, parent_id, Corpus)


def _planned(
    config: Config, tested: Sequence["Photographs"], fitted: "Photographs | None"
) -> tuple[list["Assessment"], list[dict[str, str]]]:
    from gretfound.evaluation import protocol

    planned: list[Assessment] = []
    skipped: list[dict[str, str]] = []
    for photographs in tested:
        for source in (None, fitted) if fitted else (None,):
            found = protocol.plan(
                photographs,
                num_folds=config.num_folds,
                min_patients_per_class=config.min_patients_per_class,
                seed=config.seed,
                is_named_by_set=len(tested) > 1 or fitted is not None,
                fitted=source,
            )
            planned, skipped = planned + found[0], skipped + found[1]
    return planned, skipped


def _assessed(
    config: Config, planned: Sequence["Assessment"], measured: Mapping[str, "Photographs"]
) -> dict[tuple[str, str], "Outcome"]:
    import ray

    from gretfound.evaluation import protocol

    features = {
        (name, encoder): ray.put(photographs.features[encoder])
        for name, photographs in measured.items()
        for encoder in protocol.ENCODERS
    }
    assess = ray.remote(protocol.assess).options(num_cpus=1)
    pending = {
        (assessment.name, encoder): assess.remote(
            assessment,
            features[assessment.set_name, encoder],
            features[assessment.fitted_on, encoder] if assessment.fitted_on else None,
            num_resamples=config.num_bootstraps,
            seed=config.seed,
        )
        for assessment in planned
        for encoder in protocol.ENCODERS
    }
    return dict(zip(pending, ray.get(list(pending.values())), strict=True))


def _site_samples(hub_uri: str, corpora: Sequence["Corpus"], num_pictures: int) -> list["SiteSamples"]:
    from gretfound import storage
    from gretfound.evaluation import report
    from gretfound.lineage import ShardSet

    shard_sets = [storage.read_record(hub_uri, parent, ShardSet) for each in corpora for parent in each.parents]
    return [
        report.SiteSamples(
            site_id=site_id,
            **{
                origin: tuple(itertools.islice(_samples(hub_uri, shard_sets, site_id, origin), num_pictures))
                for origin in ("real", "synthetic")
            },
        )
        for site_id in sorted({each.site_id for each in shard_sets})
    ]


def _samples(hub_uri: str, shard_sets: Sequence["ShardSet"], site_id: str, origin: str) -> Iterator["Sample"]:
    from gretfound import fundus, metadata, shard, storage
    from gretfound.evaluation import report

    keys = [field.name for field in metadata.ARROW_FIELDS]
    for shard_set in shard_sets:
        for part in shard_set.shards if (shard_set.site_id, shard_set.origin) == (site_id, origin) else ():
            for row in shard.read_rows(storage.join(hub_uri, part.path), columns=["image", "prompt", *keys]):
                cells = {key: row[key] for key in keys if row[key] is not None}
                yield report.Sample(
                    image=fundus.decode_photograph(row["image"]), caption=row["prompt"] or metadata.caption(cells)
                )


def _reconstructions(
    hub_uri: str, encoder: "Encoder", photographs: "Photographs", shown: "EvaluationSet", num_pictures: int
) -> list["Reconstruction"]:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from gretfound import fundus, storage
    from gretfound.encoder import folder, mae
    from gretfound.evaluation import report
    from jobs import pretrain_encoder

    if mae.AUTOENCODER_NAME not in {file.path for file in encoder.files}:
        return []
    with storage.scratch_folder() as scratch:
        path = storage.fetch_folder(hub_uri, encoder, Path(scratch))
        objective = pretrain_encoder.build_objective(load(pretrain_encoder.Config, [str(path / "config.yaml")]))
        folder.load_strictly(objective, load_file(path / mae.AUTOENCODER_NAME))
        _, transform = folder.read_encoder_folder(path)
    numbers = set(photographs.row_numbers[:num_pictures])
    originals = [
        transform.square(fundus.decode_photograph(storage.read_bytes(row.uri)))
        for row in shown.rows
        if row.number in numbers
    ]
    pixels_BCHW = torch.from_numpy(np.stack(originals).transpose(0, 3, 1, 2).copy())
    masked, reconstructed = mae.reconstruct(objective.eval(), pixels_BCHW)
    return [
        report.Reconstruction(original=original, masked=masked[index], reconstruction=reconstructed[index])
        for index, original in enumerate(originals)
    ]


if __name__ == "__main__":
    console.run(Config, main)
