"""jobs.finetune_generators: one run a site, and a site that fails leaves the others alone."""

from pathlib import Path

import pytest

from gretfound import lineage, storage
from gretfound.config import load
from gretfound.errors import ConfigError, GretfoundError, LineageError
from gretfound.generator import pipeline
from gretfound.lineage import Generator, ShardSet
from jobs import finetune_generators, site_runs, tuning
from tests.tiny_generator import publish_base, publish_site, unet_output, write_base

SMALL = [
    "tuning.num_images_seen=16",
    "tuning.batch_size=4",
    "tuning.accumulation=2",
    "tuning.cell_dropout=0.3",
    "tuning.learning_rate=0.01",
    "tuning.lora_rank=2",
    "cluster.cpus_per_worker=0.5",
    "cluster.max_failures=0",
]


# Ids of 2026-11-22: a hub's finished runs are found by them.
@pytest.mark.parametrize(
    ("layer", "recipe_id"),
    [
        ("", "finetune_generator-52556f431214e25cf9e2"),
        ("conf/generator/finetune_demo.yaml", "finetune_generator-8fdb0851057a2207b8e4"),
        ("conf/generator/finetune_sd15.yaml", "finetune_generator-b7ef8f9c9e2120f2c44b"),
    ],
)
def test_settings_of__recipe_id_is_what_it_was(layer: str, recipe_id: str) -> None:
    layers = [*([layer] if layer else []), "hub_uri=x", "base_id=y"]
    config, other, faster = (
        load(tuning.Config, [*layers, *more])
        for more in ([], ["tuning.cell_dropout=0.1"], ["tuning.accumulation=2", "tuning.recomputes_activations=true"])
    )
    found = [
        lineage.recipe_id("finetune_generator", tuning.settings_of(each), ["generator-0"])
        for each in (config, faster, other)
    ]
    assert found[:2] == [recipe_id] * 2 and found[2] != recipe_id


def test_load__shares_are_tenths_and_a_step_divides() -> None:
    for key, said in (
        ("cell_dropout=0.25", "tuning.cell_dropout=0.25 is none of"),
        ("cell_dropout=1", "tuning.cell_dropout=1 is none of"),
        ("accumulation=3", "batch_size=16 is not divisible by cluster.num_workers=1 times tuning.accumulation=3"),
        ("accumulation=0", "tuning.accumulation=0"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(tuning.Config, ["hub_uri=x", "base_id=y", f"tuning.{key}"])


def test_finetune_generators__a_failing_site_leaves_the_others_alone(ray_cluster: None, tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    publish_site(hub_uri, tmp_path / "aster", num_images=4, site_id="aster")
    _, broken = publish_site(hub_uri, tmp_path / "birch", num_images=4, site_id="birch")
    broken_path = storage.local_path(storage.join(hub_uri, broken.shards[0].path))
    assert broken_path is not None
    whole = broken_path.read_bytes()
    broken_path.write_bytes(whole[:-1])
    keys = [f"hub_uri={hub_uri}", f"base_id={base.id}", *SMALL]
    with pytest.raises(GretfoundError, match="1 of 2 sites failed") as caught:
        finetune_generators.main(keys)
    assert "birch" in str(caught.value)
    assert "SHA-256" in str(caught.value)
    (done,) = [each for each in storage.read_records(hub_uri, Generator) if each.site_id]
    assert done.site_id == "aster"
    told = finetune_generators.main(["--status", f"hub_uri={hub_uri}"])
    assert "1 finished, 1 failed" in told
    assert f"16 of 16  {done.final_loss:.4f}" in told
    # Once the fault is mended the same command finishes the rest and finds what is done.
    broken_path.write_bytes(whole)
    generator_ids = finetune_generators.main(keys).split(",")
    assert generator_ids[0] == done.id
    mended = storage.read_record(hub_uri, generator_ids[1], Generator)
    assert (mended.site_id, mended.images_seen, mended.base_id, mended.num_images) == ("birch", 16, base.id, 4)
    # The table keeps the site that the first call finished.
    assert "2 finished" in finetune_generators.main(["--status", f"hub_uri={hub_uri}", "every_s=60"])
    trained = pipeline.load_pipeline(storage.fetch_folder(hub_uri, mended, tmp_path / "fetched"))
    assert (unet_output(trained.unet) - unet_output(pipeline.load_pipeline(tmp_path / "base").unet)).abs().max() > 1e-4


def test_status__of_a_hub_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="no run"):
        finetune_generators.main(["--status", f"hub_uri={tmp_path}"])


def test_finetune_generators__asks_for_contributions(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    with pytest.raises(LineageError, match="any site"):
        finetune_generators.main([f"hub_uri={hub_uri}", f"base_id={base.id}"])
    assert not list(storage.read_records(hub_uri, ShardSet))


def test_config__faults_name_both_keys() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers=2 needs tuning\.zero_stage"):
        load(tuning.Config, ["hub_uri=x", "base_id=y", "cluster.num_workers=2"])


def test_window_for__is_bounded_by_the_cluster_and_by_the_key() -> None:
    def window(*keys: str) -> int:
        config = load(tuning.Config, ["hub_uri=x", "base_id=y", *keys])
        return site_runs.window_for(config, {"CPU": 16.0, "GPU": 4.0})

    assert window("max_concurrent=100") == 16
    assert window("max_concurrent=3") == 3
    assert window("max_concurrent=100", "cluster.gpus_per_worker=1") == 4
    assert window("max_concurrent=100", "cluster.cpus_per_worker=64") == 1
    assert window("max_concurrent=100", "cluster.autoscaling=true") == 100
