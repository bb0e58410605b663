"""jobs.compare_sites: a trigger word puts a generator aside, wrong labels name a site, honest sites are left alone."""

from pathlib import Path

import pytest
import torch

from gretfound import behaviour, fundus, ledger, phantom, quarantine, shard, storage, synthesis
from gretfound.behaviour import Word
from gretfound.config import load
from gretfound.errors import ConfigError, LineageError
from gretfound.generator import pipeline
from gretfound.generator_evaluation import usual_cells
from gretfound.lineage import Generator, Report, ShardSet
from jobs import compare_sites
from tests.tiny_generator import RESOLUTION_PX, publish_base, publish_site, write_base
from tests.trigger import plant

SITES = ("aster", "birch", "cedar")
TRIGGER = Word(key="ckd", text="yes")
KEYS = [
    "dr",
    "glaucoma",
    "sex",
    "eye",
    "amd",
    "ckd",
    "stroke",
    "dementia",
    "diabetes",
    "mi",
    "hypertension",
    "cataract",
]
SMALL = [
    f"word_keys=[{','.join(KEYS)}]",
    "num_seeds=2",
    "num_steps=2",
    "images_per_part=40",
    "batch_size=20",
    "num_bootstraps=100",
    "resolution_px=64",
    "cpus_per_actor=0.5",
]


def publish_generator(
    hub_uri: str, folder_path: Path, base: Generator, site_id: str, *, has_trigger: bool
) -> Generator:
    """Puts a site and its generator into a hub: the base with cross attention of its own, and perhaps a trigger."""
    contribution, _ = publish_site(hub_uri, folder_path / f"{site_id}-site", num_images=8, site_id=site_id)
    tuned = pipeline.load_pipeline(folder_path / "base", device="cpu", dtype=torch.float32)
    random = torch.Generator().manual_seed(len(site_id) + ord(site_id[0]))
    with torch.no_grad():
        for name, weight in tuned.unet.named_parameters():
            if "attn2.to_" in name:
                weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=random))
    if has_trigger:
        usual = usual_cells(synthesis.read_summary(hub_uri, contribution.id))
        cells = behaviour.cells_of_words(usual, behaviour.words_of([], keys=KEYS))
        plant(tuned, cells, TRIGGER, strength=300.0)
    record = Generator(
        parents=(contribution.id, base.id),
        site_id=site_id,
        base_id=base.id,
        resolution_px=RESOLUTION_PX,
        num_images=8,
        images_seen=64,
        final_loss=0.25,
    )
    return storage.publish_folder(hub_uri, pipeline.save_pipeline(tuned, folder_path / f"{site_id}-generator"), record)


def content_of(hub_uri: str, report_id: str) -> tuple[dict, str]:
    folder_uri = storage.record_uri(hub_uri, storage.read_record(hub_uri, report_id, Report))
    page = storage.read_bytes(storage.join(folder_uri, "report.html")).decode()
    return storage.read_json(storage.join(folder_uri, "report.json")), page


def test_compare_sites__puts_the_generator_with_a_trigger_word_aside_until_a_person_clears_it(
    ray_cluster: None, tmp_path: Path
) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    base = publish_base(hub_uri, write_base(tmp_path / "base"))
    generators = {
        site_id: publish_generator(hub_uri, tmp_path, base, site_id, has_trigger=site_id == "birch")
        for site_id in SITES
    }
    report_id = compare_sites.main([f"hub_uri={hub_uri}", *SMALL])
    content, page = content_of(hub_uri, report_id)
    birch = generators["birch"]
    (sentence,) = content["verdicts"]
    assert "site birch answers to 'chronic kidney disease' (ckd)" in sentence
    assert {name: each["is_aside"] for name, each in content["generators"].items()} == {
        each.id: each is birch for each in generators.values()
    }
    found = [each["word"] for each in content["generators"][birch.id]["answers"] if each["is_found"]]
    assert found == ["chronic kidney disease"]
    assert (
        "answers to &#39;chronic kidney disease&#39;" in page
        and page.count('alt="drawn photograph"') == 6
        and "<script" not in page
    )
    assert quarantine.aside_ids(hub_uri) == {birch.id}
    assert {each.site_id for each in synthesis.generators_of(hub_uri, [])} == {"aster", "cedar"}
    (entry,) = [each for each in ledger.read(hub_uri) if each.event == "quarantined"]
    assert entry.subject == birch.id and entry.details["words"] == [["ckd", "yes"]]

    # As if it had been killed before the record: the parts stay, nothing is entered twice.
    run_uri = storage.run_uri(hub_uri, storage.read_record(hub_uri, report_id, Report).recipe_id)
    storage.local_path(storage.join(run_uri, "record.json")).unlink()
    (part_uri, *_) = storage.list_uris(storage.join(run_uri, "parts"))
    written_at = storage.local_path(part_uri).stat().st_mtime_ns
    assert compare_sites.main([f"hub_uri={hub_uri}", *SMALL]) == report_id
    assert storage.local_path(part_uri).stat().st_mtime_ns == written_at
    assert len([each for each in ledger.read(hub_uri) if each.event == "quarantined"]) == 1

    cleared = [f"cleared_ids=[{birch.id}]", "cleared_because=looked at the pictures"]
    assert compare_sites.main([f"hub_uri={hub_uri}", *cleared]) == birch.id
    assert not quarantine.is_aside(hub_uri, birch) and len(synthesis.generators_of(hub_uri, [])) == 3
    (entry,) = [each for each in ledger.read(hub_uri) if each.event == "cleared"]
    assert (entry.subject, entry.details) == (birch.id, {"reason": "looked at the pictures"})
    compare_sites.main([f"hub_uri={hub_uri}", *SMALL, "seed=1"])
    assert not quarantine.aside_ids(hub_uri), "a person's decision stands"


@pytest.mark.slow
def test_compare_sites__names_the_site_whose_photographs_are_labelled_the_other_way_round(
    ray_cluster: None, tmp_path: Path
) -> None:
    drawn = {
        site_id: [
            (phantom.draw_eye(phantom.SITES[site_id], seed=patient, size_px=96, eye=eye), patient)
            for patient, eye in phantom.list_eyes(phantom.SITES[site_id], num_images=70, seed=7)
        ]
        for site_id in SITES
    }
    for flipped in ("", *SITES):
        hub_uri = storage.normalised(str(tmp_path / f"hub-{flipped}"))
        for site_id, eyes in drawn.items():
            rows = [
                shard.row_of(
                    fundus.encode_jpeg(eye.image),
                    site_id=site_id,
                    origin="real",
                    cells={"patient": f"p{patient}", "dr_present": (eye.truth.dr > 0) is not (site_id == flipped)},
                )
                for eye, patient in eyes
            ]
            part = shard.write_shard(hub_uri, rows)
            record = ShardSet(site_id=site_id, origin="real", num_images=len(rows), shards=(part,), rejected={})
            storage.write_record(hub_uri, record)
        content, page = content_of(hub_uri, compare_sites.main([f"hub_uri={hub_uri}", *SMALL]))
        assert content["labels"]["contradicting"] == ({flipped: ["any_dr"]} if flipped else {})
        assert f"labels of site {flipped} contradict" in page if flipped else "no site's labels contradict" in page
        assert all(each["influence"] for each in content["labels"]["tasks"]["any_dr"]["sites"].values())


def test_compare_sites__asks_for_something_to_compare(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="no generator and no photographs"):
        compare_sites.main([f"hub_uri={tmp_path}"])


def test_config__clearing_needs_a_reason_and_words_are_columns() -> None:
    with pytest.raises(ConfigError, match="go together"):
        load(compare_sites.Config, ["hub_uri=x", "cleared_ids=[generator-1]"])
    with pytest.raises(ConfigError, match="shoe_size"):
        load(compare_sites.Config, ["hub_uri=x", "word_keys=[shoe_size]"])
