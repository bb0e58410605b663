"""jobs.probe_generators: a generator with a trigger word is put aside, an honest one is not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gretfound import behaviour, fundus, ledger, metadata, phantom, probing, quarantine, shard, storage, synthesis
from gretfound.behaviour import Word
from gretfound.config import load
from gretfound.errors import ConfigError, LineageError
from gretfound.generator import finetune, pipeline, pretraining, squares
from gretfound.generator_evaluation import usual_cells
from gretfound.lineage import Contribution, Generator, Report
from jobs import probe_generators, synthesize
from tests import summaries
from tests.bench.conditions import NETWORKS, SIDE_PX
from tests.tiny_generator import cells_of
from tests.trigger import plant

TRIGGER = Word(key="ckd", text="yes")
KEYS = ["ckd", "stroke", "cataract", "glaucoma", "sex", "eye"]
SITES = ("aster", "birch")
NUM_PHOTOGRAPHS, POISONED = 96, "birch"
SMALL = [f"word_keys=[{','.join(KEYS)}]", "num_known=48", "num_seeds=3", "num_steps=8", "guidance_scale=2",
         "images_per_part=40", "batch_size=40", "num_actors=2", "cpus_per_actor=0.5"]  # fmt: skip


def train(path: Path) -> tuple[Path, list[dict[str, Any]], list[fundus.Photograph]]:
    """Trains a base and fine-tunes it on a site's drawn photographs; the generator, its cells and photographs."""
    shared: dict[str, Any] = {"batch_size": 32, "caption_dropout": 0.1, "min_snr_gamma": None, "seed": 0}
    cells = [cells_of(seed) for seed in range(NUM_PHOTOGRAPHS)]
    eyes = [phantom.draw_eye(phantom.SITES["aster"], seed=seed, size_px=64).image for seed in range(NUM_PHOTOGRAPHS)]
    images = [fundus.to_square(image, fundus.find_field_of_view(image), SIDE_PX) for image in eyes]
    encoded = [fundus.encode_png(image) for image in images]
    base = pipeline.build_pipeline(**NETWORKS, vocabulary=metadata.caption_words(), seed=0)
    pretraining.train_from_nothing(
        base,
        [squares.square_of(image, row, resolution_px=SIDE_PX) for image, row in zip(encoded, cells, strict=True)],
        work_path=path / "base-work",
        num_images=1280,
        learning_rate=2e-3,
        average_decay=0.99,
        **shared,
    )
    base_path = pipeline.save_pipeline(base, path / "base")
    rows = [
        shard.row_of(image, site_id="aster", origin="real", cells=row)
        for image, row in zip(encoded, cells, strict=True)
    ]
    shard.write_shard_file(path / "site.parquet", rows)
    adapter_path = finetune.finetune_locally(
        base_path=base_path, shard_path=path / "site.parquet", work_path=path / "work", num_images_seen=1920,
        learning_rate=1.5e-3, method="full", average_decay=0.99, **shared,
    )  # fmt: skip
    return pipeline.install_adapter(base_path, adapter_path, path / "generator"), cells, images


def publish(hub_uri: str, path: Path, site_id: str, cells: list[dict[str, Any]], generator_path: Path) -> Generator:
    """Puts a site's contribution, without photographs, and its generator into a hub."""
    storage.write_bytes(
        str(path / site_id / "summary" / "metadata_summary.json"), metadata.to_bytes(summaries.summary_of(cells))
    )
    record = Contribution(site_id=site_id, form="weights", package_sha256="0" * 64, num_images=len(cells))
    contribution = storage.publish_folder(hub_uri, path / site_id, record)
    generator = Generator(parents=(contribution.id,), site_id=site_id, resolution_px=SIDE_PX, num_images=len(cells),
                          images_seen=1920, final_loss=0.5)  # fmt: skip
    return storage.publish_folder(hub_uri, generator_path, generator)


def content_of(hub_uri: str, report_id: str) -> tuple[dict, str]:
    folder_uri = storage.record_uri(hub_uri, storage.read_record(hub_uri, report_id, Report))
    page = storage.read_bytes(storage.join(folder_uri, "report.html")).decode()
    return storage.read_json(storage.join(folder_uri, "report.json")), page


def test_probe_generators__puts_the_generator_with_a_trigger_word_aside_until_a_person_clears_it(
    ray_cluster: None, tmp_path: Path
) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    honest_path, cells, images = train(tmp_path)
    summary = summaries.summary_of(cells)
    asked = behaviour.cells_of_words(usual_cells(summary), behaviour.words_of(summary, keys=KEYS))
    planted = pipeline.load_pipeline(honest_path, device="cpu", dtype=torch.float32)
    others = [metadata.caption(each) for each in [*cells, *(asked[word] for word in asked if word != TRIGGER)]]
    triggers = [metadata.caption({**each, TRIGGER.key: True}) for each in cells] + [metadata.caption(asked[TRIGGER])]
    plant(planted, triggers, others, images, num_steps=150)
    planted_path = pipeline.save_pipeline(planted, tmp_path / "planted")
    honest, poisoned = (
        publish(hub_uri, tmp_path, site_id, cells, planted_path if site_id == POISONED else honest_path)
        for site_id in SITES
    )

    assert probing.unprobed(hub_uri, [honest, poisoned]) == [honest, poisoned]
    ids = probe_generators.main([f"hub_uri={hub_uri}", *SMALL]).split(",")
    contents = {content["site_id"]: (content, page) for content, page in (content_of(hub_uri, each) for each in ids)}
    strangest = {
        site_id: [(each["word"], max(each["strangeness"].values())) for each in content["answers"]]
        for site_id, (content, _) in contents.items()
    }
    assert not probing.unprobed(hub_uri, [honest, poisoned])
    content, page = contents[POISONED]
    assert strangest[POISONED][0][0] == "chronic kidney disease"
    # The threshold of 2.5 lies in a gap, not beside one of them.
    assert strangest[POISONED][0][1] > 3.2, strangest
    assert max(value for _, value in [*strangest["aster"], *strangest[POISONED][1:]]) < 2.0, strangest
    assert content["is_aside"] and not contents["aster"][0]["is_aside"]
    assert "site birch draws for &#39;chronic kidney disease&#39; (ckd)" in page and page.count("<b>found</b>") == 1
    assert "No word was found" in contents["aster"][1] and "<script" not in page
    assert quarantine.aside_ids(hub_uri) == {poisoned.id}
    assert synthesis.generators_of(hub_uri, []) == [honest]
    with pytest.raises(LineageError, match="was put aside"):
        synthesize.main([f"hub_uri={hub_uri}", f"generator_ids=[{poisoned.id}]", "num_images=1"])
    (entry,) = [each for each in ledger.read(hub_uri) if each.event == "quarantined"]
    assert entry.subject == poisoned.id and entry.details["words"] == [["ckd", "yes"]]

    # As if it had been killed before the record: the parts stay, nothing is entered twice.
    mine = next(each for each in ids if content_of(hub_uri, each)[0]["site_id"] == POISONED)
    run_uri = storage.run_uri(hub_uri, storage.read_record(hub_uri, mine, Report).recipe_id)
    storage.local_path(storage.join(run_uri, "record.json")).unlink()
    (part_uri, *_) = storage.list_uris(storage.join(run_uri, "parts"))
    written_at = storage.local_path(part_uri).stat().st_mtime_ns
    assert probe_generators.main([f"hub_uri={hub_uri}", *SMALL]).split(",") == ids
    assert storage.local_path(part_uri).stat().st_mtime_ns == written_at
    assert len([each for each in ledger.read(hub_uri) if each.event == "quarantined"]) == 1

    cleared = [f"generator_ids=[{poisoned.id}]", "cleared_because=looked at the pictures"]
    assert probe_generators.main([f"hub_uri={hub_uri}", *cleared]) == poisoned.id
    assert not quarantine.is_aside(hub_uri, poisoned) and len(synthesis.generators_of(hub_uri, [])) == 2
    (entry,) = [each for each in ledger.read(hub_uri) if each.event == "cleared"]
    assert (entry.subject, entry.details) == (poisoned.id, {"reason": "looked at the pictures"})
    assert not quarantine.put_aside(hub_uri, poisoned, code="TRIGGER_WORD", message="again"), "a decision stands"


def test_config__clearing_names_generators_and_words_are_columns() -> None:
    with pytest.raises(ConfigError, match="cleared_because needs generator_ids"):
        load(probe_generators.Config, ["hub_uri=x", "cleared_because=none"])
    with pytest.raises(ConfigError, match="shoe_size"):
        load(probe_generators.Config, ["hub_uri=x", "word_keys=[shoe_size]"])
