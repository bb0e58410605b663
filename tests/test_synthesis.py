"""Synthesis: parts are pure functions of the seed, and a job that is run again neither loses nor doubles a row."""

from pathlib import Path

import numpy as np
import pytest

from gretfound import lineage, matching, metadata, shard, storage, synthesis
from gretfound.config import load
from gretfound.errors import ConfigError
from gretfound.lineage import Generator, ShardSet
from jobs import synthesize
from tests import summaries
from tests.tiny_generator import RESOLUTION_PX, publish_site, write_base


def _hub(hub_uri: str, tmp_path: Path) -> Generator:
    contribution, _ = publish_site(hub_uri, tmp_path / "contribution", num_images=4)
    record = Generator(
        parents=(contribution.id,), site_id="aster", resolution_px=RESOLUTION_PX, num_images=4, images_seen=4,
        final_loss=1.0,
    )  # fmt: skip
    return storage.publish_folder(hub_uri, write_base(tmp_path / "pipeline"), record)


def test_result_settings__the_balance_names_the_recipe() -> None:
    balanced = synthesize.result_settings(load(synthesize.Config, ["hub_uri=x", "balance.dr=0.5", "num_actors=8"]))
    assert balanced == synthesize.result_settings(load(synthesize.Config, ["hub_uri=x"])) | {"balance": {"dr": 0.5}}
    with pytest.raises(ConfigError, match="shoe_size"):
        load(synthesize.Config, ["hub_uri=x", "balance.shoe_size=1"])


def test_make_wishes__follow_the_summary_and_differ_between_parts() -> None:
    rows = [{"patient": f"p{i}", "sex": "female" if i % 4 else "male", "dr": i % 2, "age": 50.0} for i in range(80)]
    groups = matching.fit_groups(summaries.summary_of(rows), balance={})
    parts = [
        synthesis.Part(
            generator_id="generator-0", contribution_id="contribution-0", site_id="aster", run_uri="runs/x",
            index=index, first_image=0, num_images=400,
        )
        for index in range(2)
    ]  # fmt: skip
    wishes = [synthesis.make_wishes(groups, part, seed=1) for part in parts]
    assert wishes[0] == synthesis.make_wishes(groups, parts[0], seed=1)
    assert len({wish.seed for part in wishes for wish in part}) == 800
    share = np.mean([wish.cells["sex"] == "female" for part in wishes for wish in part])
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 800) ** 0.5)
    assert all(wish.caption == metadata.caption(wish.cells) for wish in wishes[0])


def test_synthesize__a_job_that_was_killed_ends_with_the_same_rows(ray_cluster: None, tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    generator = _hub(hub_uri, tmp_path / "work")
    # An untrained generator draws no field of view, so nothing is left out here.
    keys = [f"hub_uri={hub_uri}", "num_images=10", "images_per_shard=4", "num_steps=2", "is_screened=false"]
    keys += ["cpus_per_actor=0.5", "num_actors=2", "balance.sex=1"]
    undisturbed = storage.read_record(hub_uri, synthesize.main(keys), ShardSet)
    settings = synthesize.result_settings(load(synthesize.Config, keys))
    recipe = lineage.recipe_id("synthesize", settings, [generator.id])
    run_path = storage.local_path(storage.run_uri(hub_uri, recipe))
    assert run_path is not None
    # What a job leaves that dies after its second part: that part's shard and receipt, and another shard of its own.
    receipts = sorted((run_path / "parts").iterdir())
    assert len(receipts) == 3
    (run_path / "record.json").unlink()
    for receipt in (receipts[0], receipts[2]):
        receipt.unlink()
    kept = receipts[1].stat().st_mtime_ns
    (tmp_path / "hub" / undisturbed.shards[0].path).unlink()
    resumed = storage.read_record(hub_uri, synthesize.main(keys), ShardSet)
    assert resumed == undisturbed
    assert receipts[1].stat().st_mtime_ns == kept
    rows = [row for each in resumed.shards for row in shard.read_rows(storage.join(hub_uri, each.path))]
    assert len(rows) == len({row["seed"] for row in rows}) == 10
    assert {(row["origin"], row["site_id"], row["patient"]) for row in rows} == {("synthetic", "aster", None)}
    assert all(row["prompt"].startswith("colour fundus photograph") for row in rows)
    assert synthesize.main(keys) == undisturbed.id
    target = storage.read_json(storage.join(storage.run_uri(hub_uri, recipe), "target.json"))
    assert target["balance"] == {"sex": 1.0}
    told = [share["target"] for value, share in target["columns"]["sex"].items() if value]
    assert told == pytest.approx([sum(told) / len(told)] * len(told))
