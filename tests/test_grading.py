"""Grading: swapped rows are rejected and right ones kept, who cannot tell filters nothing, a run decides once."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gretfound import fundus, grading, phantom, shard, storage
from gretfound.agreement import Collection
from gretfound.config import load
from gretfound.errors import ConfigError, LineageError
from gretfound.evaluation import features
from gretfound.fundus import Photograph
from gretfound.grading import Graders
from gretfound.lineage import Generator, ShardSet
from jobs import synthesize
from tests.tiny_generator import RESOLUTION_PX, publish_site, write_base

KEY = "dr_present"


def eyes_of(site_id: str, first: int, num: int) -> tuple[list[Photograph], list[bool]]:
    site = phantom.SITES[site_id]
    drawn = [phantom.draw_eye(site, seed=seed, size_px=64) for seed in range(first, first + num)]
    return [each.image for each in drawn], [each.truth.dr > 0 for each in drawn]


def collection(site_id: str, feature_ND: npt.NDArray[np.float32], labels: list[bool]) -> Collection:
    return Collection(
        site_id=site_id,
        features=feature_ND,
        is_real=np.ones(len(labels), dtype=bool),
        image_ids=tuple(f"{site_id}{place}" for place in range(len(labels))),
        patients=("",) * len(labels),
        cells=tuple({KEY: label} for label in labels),
    )


def test_judge__rejects_what_contradicts_its_row_and_keeps_what_agrees() -> None:
    collections = []
    for site_id in ("aster", "birch"):
        images, labels = eyes_of(site_id, 0, 80)
        collections.append(collection(site_id, features.scattering_space(images), labels))
    grader = grading.fit(KEY, collections, seed=0)
    assert not grader["missing"] and grader["num_patients"] == 160
    graders = Graders(space=features.scattering_space, min_agreement=0.2, graders={KEY: grader})
    images, labels = eyes_of("aster", 1000, 60)
    right = graders.judge(images, [{KEY: label} for label in labels])
    swapped = graders.judge(images, [{KEY: not label} for label in labels])
    assert set(filter(None, swapped)) == {f"contradicts {KEY}"}
    num_right, num_swapped = len(list(filter(None, right))), len(list(filter(None, swapped)))
    assert num_swapped >= 10 and num_right <= 3, f"rejected {num_right} right rows and {num_swapped} swapped ones of 60"
    assert graders.judge(images, [{"glaucoma": label} for label in labels]) == [None] * 60


@pytest.mark.parametrize("offset", [0.0, 6.0], ids=["noise", "cameras"])
def test_fit__who_tells_chance_or_cameras_apart_filters_nothing(offset: float) -> None:
    # Where cameras differ and one site has more disease, a grader is far above chance over both sites, not in any.
    random = np.random.default_rng(3)
    collections = [
        collection(
            site_id,
            (random.normal(size=(100, 8)) + offset * place).astype(np.float32),
            [(number % 10 < 8) is bool(place) for number in range(100)],
        )
        for place, site_id in enumerate(("aster", "birch"))
    ]
    grader = grading.fit(KEY, collections, seed=0)
    assert "AUROC" in grader["missing"] and grader["auroc"]["value"] < 0.7
    graders = Graders(space=lambda images: collections[0].features, min_agreement=0.99, graders={KEY: grader})
    blank = np.zeros((8, 8, 3), np.uint8)
    assert graders.judge([blank] * 100, [{KEY: True}] * 100) == [None] * 100
    too_few = grading.fit(KEY, [collection("aster", collections[0].features, [n < 9 for n in range(100)])], seed=0)
    assert "10 patients" in too_few["missing"]


def test_result_settings__without_graders_a_run_has_the_id_it_had() -> None:
    plain = synthesize.result_settings(load(synthesize.Config, ["hub_uri=x", "min_agreement=0.3"]))
    assert set(plain) == set(synthesize.RESULT_KEYS)
    graded = synthesize.result_settings(load(synthesize.Config, ["hub_uri=x", "grader_keys=[amd]"]))
    assert {key: graded[key] for key in set(graded) - set(plain)} == {
        "grader_keys": ["amd"], "grader_encoder_id": "", "grader_images": 500, "min_agreement": 0.1
    }  # fmt: skip
    with pytest.raises(ConfigError, match="found diabetes"):
        load(synthesize.Config, ["hub_uri=x", "grader_keys=[diabetes]"])
    with pytest.raises(ConfigError, match="min_agreement=1 "):
        load(synthesize.Config, ["hub_uri=x", "min_agreement=1"])


def hub_of(hub_uri: str, tmp_path: Path) -> Generator:
    """Publishes an untrained generator, and real photographs that are dark where they are said to show retinopathy."""
    contribution, _ = publish_site(hub_uri, tmp_path / "contribution", num_images=8)
    image = phantom.draw_eye(phantom.SITES["birch"], seed=0, size_px=64).image
    random = np.random.default_rng(0)
    rows = []
    for number in range(40):
        shown = (image * random.uniform(0.4, 0.5) if number % 2 else image * random.uniform(0.8, 1.0)).astype(np.uint8)
        cells = {"patient": f"p{number}", KEY: bool(number % 2)}
        rows.append(shard.row_of(fundus.encode_png(shown), site_id="birch", origin="real", cells=cells))
    shards = (shard.write_shard(hub_uri, rows),)
    storage.write_record(
        hub_uri, ShardSet(site_id="birch", origin="real", num_images=len(rows), shards=shards, rejected={})
    )
    record = Generator(
        parents=(contribution.id,), site_id="aster", resolution_px=RESOLUTION_PX, num_images=8, images_seen=8,
        final_loss=1.0,
    )  # fmt: skip
    return storage.publish_folder(hub_uri, write_base(tmp_path / "pipeline"), record)


@pytest.mark.slow
def test_synthesize__counts_contradictions_and_a_restart_gives_the_same_shards(
    ray_cluster: None, tmp_path: Path
) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    generator = hub_of(hub_uri, tmp_path / "work")
    keys = [f"hub_uri={hub_uri}", "num_images=12", "images_per_shard=6", "num_steps=2", "is_screened=false"]
    keys += ["cpus_per_actor=0.5", "jpeg_quality=0", "batch_size=4", f"grader_keys=[{KEY}]", "min_agreement=0.5"]
    real = [each.id for each in storage.read_records(hub_uri, ShardSet)]
    drawn = storage.read_record(hub_uri, synthesize.main(keys), ShardSet)
    assert drawn.parents == (generator.id, *real)
    run_path = storage.local_path(storage.run_uri(hub_uri, drawn.recipe_id))
    assert run_path is not None
    assert storage.read_json(str(run_path / grading.NAME))["graders"][KEY]["missing"] == ""
    assert set(drawn.rejected) == {f"contradicts {KEY}"}
    assert drawn.num_images + drawn.rejected[f"contradicts {KEY}"] == 12
    graders = grading.read(hub_uri, str(run_path / grading.NAME), device="cpu")
    rows = [row for each in drawn.shards for row in shard.read_rows(storage.join(hub_uri, each.path))]
    assert graders.judge([fundus.decode_photograph(row["image"]) for row in rows], rows) == [None] * len(rows)

    # As if it had been killed: no record, one part missing. What grades was decided, and is not decided again.
    decided_at = (run_path / grading.NAME).stat().st_mtime_ns
    (run_path / "record.json").unlink()
    sorted((run_path / "parts").iterdir())[0].unlink()
    assert storage.read_record(hub_uri, synthesize.main(keys), ShardSet) == drawn
    assert (run_path / grading.NAME).stat().st_mtime_ns == decided_at


def test_synthesize__graders_need_real_photographs(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    storage.publish_folder(
        hub_uri, write_base(tmp_path / "pipeline"),
        Generator(site_id="aster", resolution_px=RESOLUTION_PX, num_images=8, images_seen=8, final_loss=1.0),
    )  # fmt: skip
    with pytest.raises(LineageError, match="no real photographs"):
        synthesize.main([f"hub_uri={hub_uri}", f"grader_keys=[{KEY}]"])
