"""jobs.compare_sites: a site whose labels are the other way round is named, and nobody where all are honest."""

from pathlib import Path

import pytest

from gretfound import fundus, phantom, shard, storage
from gretfound.config import load
from gretfound.errors import ConfigError, LineageError
from gretfound.lineage import Report, ShardSet
from jobs import compare_sites

SITES, NUM_IMAGES = ("aster", "birch", "cedar"), 70
SMALL = ["images_per_part=40", "batch_size=20", "num_bootstraps=100", "resolution_px=64", "cpus_per_actor=0.5"]


def content_of(hub_uri: str, report_id: str) -> tuple[dict, str]:
    folder_uri = storage.record_uri(hub_uri, storage.read_record(hub_uri, report_id, Report))
    page = storage.read_bytes(storage.join(folder_uri, "report.html")).decode()
    return storage.read_json(storage.join(folder_uri, "report.json")), page


def hub_of(path: Path, *, flipped: str) -> str:
    """Writes a hub of three sites' drawn eyes; of one of them, if any, retinopathy is said the other way round."""
    hub_uri = storage.normalised(str(path))
    for site_id in SITES:
        rows = []
        for patient, side in phantom.list_eyes(phantom.SITES[site_id], num_images=NUM_IMAGES, seed=7):
            eye = phantom.draw_eye(phantom.SITES[site_id], seed=patient, size_px=96, eye=side)
            cells = {"patient": f"p{patient}", "dr_present": (eye.truth.dr > 0) is not (site_id == flipped)}
            rows.append(shard.row_of(fundus.encode_jpeg(eye.image), site_id=site_id, origin="real", cells=cells))
        part = shard.write_shard(hub_uri, rows)
        record = ShardSet(site_id=site_id, origin="real", num_images=len(rows), shards=(part,), rejected={})
        storage.write_record(hub_uri, record)
    return hub_uri


@pytest.mark.slow
def test_compare_sites__names_the_site_whose_photographs_are_labelled_the_other_way_round(
    ray_cluster: None, tmp_path: Path
) -> None:
    hub_uri = hub_of(tmp_path, flipped="birch")
    report_id = compare_sites.main([f"hub_uri={hub_uri}", *SMALL])
    content, page = content_of(hub_uri, report_id)
    assert content["labels"]["contradicting"] == {"birch": ["any_dr"]}
    assert "labels of site birch contradict" in page and page.count("<b>contradicts</b>") == 1
    assert content["sites"] == {site_id: {"real": NUM_IMAGES, "synthetic": 0} for site_id in SITES}
    assert all(each["influence"] for each in content["labels"]["tasks"]["any_dr"]["sites"].values())

    # As if it had been killed before the record: the parts stay.
    run_uri = storage.run_uri(hub_uri, storage.read_record(hub_uri, report_id, Report).recipe_id)
    storage.local_path(storage.join(run_uri, "record.json")).unlink()
    (part_uri, *_) = storage.list_uris(storage.join(run_uri, "parts"))
    written_at = storage.local_path(part_uri).stat().st_mtime_ns
    assert compare_sites.main([f"hub_uri={hub_uri}", *SMALL]) == report_id
    assert storage.local_path(part_uri).stat().st_mtime_ns == written_at


@pytest.mark.slow
def test_compare_sites__names_no_honest_site(ray_cluster: None, tmp_path: Path) -> None:
    hub_uri = hub_of(tmp_path, flipped="")
    content, page = content_of(hub_uri, compare_sites.main([f"hub_uri={hub_uri}", *SMALL]))
    assert content["labels"]["contradicting"] == {} and "No site's labels contradict" in page


def test_compare_sites__asks_for_something_to_compare(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="no photographs of a site"):
        compare_sites.main([f"hub_uri={tmp_path}"])


def test_config__too_few_resamples_give_no_interval() -> None:
    with pytest.raises(ConfigError, match="num_bootstraps=99"):
        load(compare_sites.Config, ["hub_uri=x", "num_bootstraps=99"])
