"""jobs.finetune_generators on odd sites: each ends in a clear state with a message; and few-step students of them."""

from pathlib import Path
from typing import Any

import pytest

from gretfound import metadata, shard, storage
from gretfound.errors import GretfoundError
from gretfound.lineage import Contribution, Generator, ShardSet
from jobs import finetune_generators, synthesize
from tests import summaries
from tests.tiny_generator import cells_of, publish_base, rows_of, write_base

SMALL = ["tuning.num_images_seen=16", "tuning.batch_size=8", "tuning.lora_rank=2", "tuning.learning_rate=0.01"]
SMALL += ["cluster.cpus_per_worker=0.5", "cluster.max_failures=0"]
COLUMNS = [field.name for field in metadata.ARROW_FIELDS]
EQUAL: dict[str, Any] = {"patient": "p", "sex": "female", "dr": 2, "dr_present": True}
ODD: dict[str, tuple[int, Any]] = {  # photographs, and what becomes of their cells
    "all-equal": (6, lambda _: EQUAL),
    "few": (3, lambda cells: cells),
    "no-metadata": (6, lambda _: {}),
    "one-class": (6, lambda cells: {**cells, "dr": 0, "dr_present": False, "glaucoma": False}),
}


def publish(hub_uri: str, folder_path: Path, site_id: str) -> None:
    """Puts an odd site's photographs into a hub."""
    num_images, change = ODD[site_id]
    cells = [change(cells_of(seed)) for seed in range(num_images)]
    (folder_path / "summary").mkdir(parents=True)
    (folder_path / "summary" / "metadata_summary.json").write_bytes(metadata.to_bytes(summaries.summary_of(cells)))
    contribution = storage.publish_folder(
        hub_uri, folder_path, Contribution(site_id=site_id, form="images", package_sha256="0" * 64, num_images=3)
    )
    rows = [
        row | {"site_id": site_id} | dict.fromkeys(COLUMNS) | metadata.arrow_values(each)
        for row, each in zip(rows_of(num_images), cells, strict=True)
    ]
    shards = (shard.write_shard(hub_uri, rows),)
    made = {"parents": (contribution.id,), "site_id": site_id, "origin": "real", "num_images": num_images}
    storage.write_record(hub_uri, ShardSet(**made, shards=shards, rejected={}))


@pytest.mark.long
def test_finetune_generators__odd_sites_end_with_a_clear_state(ray_cluster: None, tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    for site_id in ODD:
        publish(hub_uri, tmp_path / site_id, site_id)
    keys = [f"hub_uri={hub_uri}", f"base_id={base.id}", *SMALL]
    diverging = [*keys, "site_ids=[few]", "tuning.learning_rate=1e30", "tuning.num_images_seen=80"]
    with pytest.raises(GretfoundError, match="1 of 1 sites failed") as caught:
        finetune_generators.main(diverging)
    assert "NonFiniteLoss: the loss is nan" in str(caught.value)
    told = finetune_generators.main(["--status", f"hub_uri={hub_uri}"])
    assert "1 failed" in told
    assert "few: NonFiniteLoss" in told
    ids = finetune_generators.main(keys).split(",")
    found = {each.site_id: each for each in (storage.read_record(hub_uri, each, Generator) for each in ids)}
    assert {site_id: each.num_images for site_id, each in found.items()} == {
        name: num for name, (num, _) in ODD.items()
    }
    assert "4 finished" in finetune_generators.main(["--status", f"hub_uri={hub_uri}"])
    # Captions follow each site's summary: a site without metadata asks for nothing in particular.
    drawn = [f"hub_uri={hub_uri}", "num_images=4", "num_steps=2", "is_screened=false", "cpus_per_actor=0.5"]
    sets = {each.site_id: each for each in (
        storage.read_record(hub_uri, each, ShardSet) for each in synthesize.main(drawn).split(",")
    )}  # fmt: skip
    prompts = {
        site_id: {row["prompt"] for each in made.shards for row in shard.read_rows(storage.join(hub_uri, each.path))}
        for site_id, made in sets.items()
    }
    assert prompts["no-metadata"] == {"colour fundus photograph"}
    assert all(each.num_images == 4 for each in sets.values())
    # A student of each, from the latents that are there.
    encoded = sorted((tmp_path / "hub" / "latents").rglob("*"))
    students = finetune_generators.main([*keys, "tuning.objective=consistency"]).split(",")
    assert sorted((tmp_path / "hub" / "latents").rglob("*")) == encoded
    for student in (storage.read_record(hub_uri, each, Generator) for each in students):
        assert student.is_few_step
        assert student.base_id == found[student.site_id].id
        assert student.base_id in student.parents
    few_step = synthesize.main([*drawn, "is_few_step=true", "guidance_scale=1"]).split(",")
    assert len(few_step) == len(ODD)
    assert not set(few_step) & {each.id for each in sets.values()}
    with pytest.raises(GretfoundError, match="required one that draws with a solver"):
        synthesize.main([*drawn, f"generator_ids=[{students[0]}]"])
