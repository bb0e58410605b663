"""Site states: the table of sites and states as it is read from object storage, during a run and after a crash."""

import time
from pathlib import Path

import pytest

from gretfound import site_states, storage
from gretfound.lineage import Generator
from gretfound.site_states import State

RUN = "finetune_generators-00"
STATES = {
    "finetune_generator-a": ("aster", State(state="running")),
    "finetune_generator-b": ("birch", State(state="waiting")),
    "finetune_generator-c": ("cedar", State(state="failed", message="NonFiniteLoss: diverged\nmore", wall_s=200.0)),
    "finetune_generator-d": ("dune", State(state="running")),
}


def hub_of(tmp_path: Path, *, silent_s: float) -> str:
    hub_uri = storage.normalised(str(tmp_path))
    site_states.write(hub_uri, RUN, STATES)
    uri = storage.join(storage.run_uri(hub_uri, RUN), site_states.FILE_NAME)
    storage.write_json(uri, storage.read_json(uri) | {"told_at_s": time.time() - silent_s})
    progress = {"images_seen": 480, "num_images": 2400, "loss": 0.25, "images_per_s": 12.5, "learning_rate": 0.1}
    storage.write_json(storage.join(hub_uri, "runs", "finetune_generator-a", "progress.json"), progress)
    record = Generator(
        recipe_id="finetune_generator-d", site_id="dune", resolution_px=64, num_images=9, images_seen=2400,
        final_loss=0.125
    )  # fmt: skip
    storage.write_record(hub_uri, record)
    return hub_uri


def test_read__follows_each_site_while_the_driver_lives(tmp_path: Path) -> None:
    (found,) = site_states.read(hub_of(tmp_path, silent_s=5.0), job="finetune_generators")
    aster, birch, cedar, dune = found.lines
    assert (aster.state, aster.images_seen, aster.num_images, aster.loss) == ("running", 480, 2400, 0.25)
    assert (birch.state, birch.loss) == ("waiting", None)
    assert (cedar.state, cedar.message) == ("failed", "NonFiniteLoss: diverged\nmore")
    assert (dune.state, dune.images_seen, dune.loss) == ("finished", 2400, 0.125)
    assert found.is_driven and not found.is_over


def test_read__after_a_crash_what_ran_is_interrupted_and_what_finished_is_finished(tmp_path: Path) -> None:
    (found,) = site_states.read(hub_of(tmp_path, silent_s=600.0), job="finetune_generators")
    assert [line.state for line in found.lines] == ["interrupted", "waiting", "failed", "finished"]
    assert not found.is_driven
    assert "no driver for 10 min: run the same command again" in site_states.to_text(found)


def test_read__knows_other_jobs_runs_apart_and_gives_the_latest_last(tmp_path: Path) -> None:
    hub_uri = hub_of(tmp_path, silent_s=600.0)
    site_states.write(hub_uri, "finetune_generators-11", {"finetune_generator-d": ("dune", State(state="waiting"))})
    site_states.write(hub_uri, "other_job-22", {})
    found = site_states.read(hub_uri, job="finetune_generators")
    assert [each.run_id for each in found] == [RUN, "finetune_generators-11"]
    assert found[-1].is_over, "its one site is finished, whatever its driver wrote"


def test_to_text__is_a_line_a_site_with_the_counts_above(tmp_path: Path) -> None:
    (found,) = site_states.read(hub_of(tmp_path, silent_s=5.0), job="finetune_generators")
    lines = site_states.to_text(found).splitlines()
    assert lines[0].startswith(f"{RUN}: 1 waiting, 1 running, 1 finished, 1 failed; driver seen ")
    assert len(lines) == 3 + 4
    assert lines[3].split() == ["aster", "running", "480", "of", "2,400", "0.2500", "12.5"]
    assert lines[5].split()[:4] == ["cedar", "failed", "3", "min"] and lines[5].endswith("diverged more")


def test_to_text__gives_a_long_reason_in_full_below(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    reason = f"StorageError: {'x' * 100} restore the object"
    site_states.write(hub_uri, RUN, {"finetune_generator-c": ("cedar", State(state="failed", message=reason))})
    (found,) = site_states.read(hub_uri, job="finetune_generators")
    row, below = site_states.to_text(found).splitlines()[3], site_states.to_text(found).splitlines()[-1]
    assert row.endswith("x...") and below == f"cedar: {reason}"


def test_telling__gives_signs_of_life_while_all_sites_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_states, "HEARTBEAT_S", 0.01)
    hub_uri = storage.normalised(str(tmp_path))
    uri = storage.join(storage.run_uri(hub_uri, RUN), site_states.FILE_NAME)
    with site_states.telling(hub_uri, RUN, {"finetune_generator-b": ("birch", State(state="waiting"))}):
        time.sleep(0.05)
        first = storage.read_json(uri)
        time.sleep(0.1)
        assert storage.read_json(uri)["told_at_s"] > first["told_at_s"]
    last = storage.read_json(uri)
    time.sleep(0.05)
    assert storage.read_json(uri) == last
    (found,) = site_states.read(hub_uri, job="finetune_generators")
    assert [(line.site_id, line.state) for line in found.lines] == [("birch", "waiting")]
