"""jobs.evaluate_generators: held-out photographs only, the same report after a crash, an honest page without any."""

import json
from pathlib import Path

import pytest

from gretfound import holdout, phantom, shard, storage
from gretfound.config import load
from gretfound.errors import ConfigError, LineageError
from gretfound.lineage import Contribution, Generator, Report, ShardSet
from jobs import evaluate_generators
from tests.tiny_generator import RESOLUTION_PX, publish_base, publish_site, write_base

SMALL = [
    "num_images=24",
    "num_steps=2",
    "images_per_part=10",
    "batch_size=8",
    "num_bootstraps=100",
    "num_pictures=2",
    "num_seeds=1",
    "is_screened=false",
    "cpus_per_actor=0.5",
    "attributes=[dr,glaucoma]",
]


def publish_generator(hub_uri: str, path: Path, base: Generator, contribution: Contribution, **held_out) -> Generator:
    """Puts a generator of a site into a hub, as fine-tuning does, with other weights than its base's."""
    folder_path = write_base(path, seed=1)
    if held_out:
        storage.write_json(str(folder_path / holdout.FILE_NAME), holdout.to_json(holdout.Holdout(**held_out)))
    recipe = f"finetune_generator-{contribution.site_id}"
    lines = [json.dumps({"images_seen": 16 * step, "loss": 1.0 / step}) for step in range(1, 5)]
    metrics_uri = storage.join(storage.run_uri(hub_uri, recipe), "metrics", "000000.jsonl")
    storage.write_bytes(metrics_uri, "\n".join(lines).encode())
    record = Generator(
        parents=(contribution.id, base.id),
        recipe_id=recipe,
        site_id=contribution.site_id,
        base_id=base.id,
        resolution_px=RESOLUTION_PX,
        num_images=36,
        images_seen=64,
        final_loss=0.25,
    )
    return storage.publish_folder(hub_uri, folder_path, record)


def content_of(hub_uri: str, report_id: str) -> tuple[dict, str]:
    record = storage.read_record(hub_uri, report_id, Report)
    folder_uri = storage.record_uri(hub_uri, record)
    page = storage.read_bytes(storage.join(folder_uri, "report.html")).decode()
    return storage.read_json(storage.join(folder_uri, "report.json")), page


def test_evaluate_generators__measures_held_out_photographs_and_goes_on_where_it_was_killed(
    ray_cluster: None, tmp_path: Path
) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    contribution, shard_set = publish_site(hub_uri, tmp_path / "aster", num_images=60)
    rows = [row for part in shard_set.shards for row in shard.read_rows(storage.join(hub_uri, part.path))]
    chosen = holdout.choose([(row["image_id"], row["patient"]) for row in rows], share=0.4, seed=0)
    held_out = {name: getattr(chosen, name) for name in holdout.Holdout.__dataclass_fields__}
    generator = publish_generator(hub_uri, tmp_path / "tuned", base, contribution, **held_out)
    # Of another site's generator the photographs never left.
    elsewhere, stayed = publish_site(hub_uri, tmp_path / "birch", num_images=40, site_id="birch")
    storage.local_path(storage.join(storage.record_uri(hub_uri, stayed), "record.json")).unlink()
    other = publish_generator(hub_uri, tmp_path / "other", base, elsewhere)

    report_ids = evaluate_generators.main([f"hub_uri={hub_uri}", *SMALL])
    by_parent = {storage.read_record(hub_uri, each, Report).parents: each for each in report_ids.split(",")}
    report_id = by_parent[(generator.id,)]
    record = storage.read_record(hub_uri, report_id, Report)
    content, page = content_of(hub_uri, report_id)
    assert record.num_images == 24
    assert content["held_out"]["image_ids"] == sorted(chosen.image_ids)
    assert content["held_out"]["num_trained_on"] == 36 and content["held_out"]["num_near_duplicates"] == 0
    assert set(content["figures"]) == {"scattering", "thumbnail"}
    for sides in content["figures"].values():
        assert {name: (side["num_real"], side["num_generated"]) for name, side in sides.items()} == {
            "generated": (24, 24), "base": (24, 24), "trained_on": (24, 36)
        }  # fmt: skip
        # Real photographs of the training are closer to held-out ones than noise is, and 24 are too few for FID.
        assert sides["trained_on"]["figures"]["kid"]["high"] < sides["generated"]["figures"]["kid"]["low"]
        assert "fid" in sides["generated"]["too_few"]
    assert set(content["conditions"]) == {"dr", "glaucoma"}
    assert "required 20" in content["vessels_missing"]["generated"]
    assert page.count('alt="real photograph"') > 0 and "<script" not in page and "http" not in page

    content, page = content_of(hub_uri, by_parent[(other.id,)])
    assert content["figures"] == {} and content["held_out"]["num_images"] == 0
    assert "not measurable at the hub" in content["missing"] and "Not measurable at the hub" in page
    assert page.count('alt="drawn photograph"') > 4 and 'alt="real photograph"' not in page

    # As if it had been killed: some parts and the record are not there, and one part is.
    run_uri = storage.run_uri(hub_uri, record.recipe_id)
    parts = storage.list_uris(storage.join(run_uri, "parts"))
    assert [Path(uri).name for uri in parts if "generated" in uri] == [f"generated-{n:06d}.parquet" for n in range(3)]
    kept_path = storage.local_path(parts[0])
    kept_at = kept_path.stat().st_mtime_ns
    for uri in [*parts[1::2], storage.join(run_uri, "record.json")]:
        storage.local_path(uri).unlink()
    assert evaluate_generators.main([f"hub_uri={hub_uri}", *SMALL]) == report_ids
    assert kept_path.stat().st_mtime_ns == kept_at


def test_plan__leaves_out_what_is_nearly_a_photograph_of_the_training(tmp_path: Path) -> None:
    from gretfound import duplicates, fundus, generator_evaluation

    hub_uri = storage.normalised(str(tmp_path / "hub"))
    eye = phantom.draw_eye(phantom.SITES["aster"], seed=1, size_px=96).image
    other = phantom.draw_eye(phantom.SITES["aster"], seed=2, size_px=96).image
    images = [eye, eye[:, ::-1], other]
    rows = [shard.row_of(fundus.encode_png(each), site_id="aster", origin="real", cells={}) for each in images]
    contribution = Contribution(site_id="aster", form="images", package_sha256="0" * 64, num_images=3)
    storage.write_record(hub_uri, contribution)
    part = shard.write_shard(hub_uri, rows)
    shard_set = ShardSet(parents=(contribution.id,), site_id="aster", origin="real", num_images=3, shards=(part,),
                         rejected={})  # fmt: skip
    duplicates.sign_shard(hub_uri, part)
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    held_out = holdout.Holdout(
        share=0.5, seed=0, num_trained_on=1, num_patients=2, image_ids=(rows[1]["image_id"], rows[2]["image_id"])
    )
    generator = publish_generator(hub_uri, tmp_path / "tuned", base, contribution, **vars(held_out))
    found = generator_evaluation.plan(hub_uri, generator, shard_set, run_uri=hub_uri, max_real=10)
    assert [each.image_id for each in found.held_out] == [rows[2]["image_id"]]
    assert [each.image_id for each in found.trained_on] == [rows[0]["image_id"]]
    assert (found.num_held_out, found.num_trained_on, found.num_near_duplicates) == (2, 1, 1)


def test_evaluate_generators__asks_for_a_generator(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="no such generator of a site"):
        evaluate_generators.main([f"hub_uri={tmp_path}"])


def test_config__names_unknown_columns() -> None:
    with pytest.raises(ConfigError, match="shoe_size"):
        load(evaluate_generators.Config, ["hub_uri=x", "attributes=[shoe_size]"])
