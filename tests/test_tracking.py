"""Tracking: the JSON lines are whole after restarts, and a dead W&B stops nothing."""

import logging
from pathlib import Path

import pytest
import wandb

from gretfound import tracking


def test_read_metrics__a_repeated_stretch_counts_once(tmp_path: Path) -> None:
    with tracking.Tracker(str(tmp_path), run_id="r", project="p") as tracker:
        for images_seen in (10, 20, 30):
            tracker.write({"images_seen": images_seen, "loss": 1.0})
    with tracking.Tracker(str(tmp_path), run_id="r", project="p") as tracker:
        for images_seen in (20, 30, 40):
            tracker.write({"images_seen": images_seen, "loss": 2.0})
    found = tracking.read_metrics(str(tmp_path))
    assert [(line["images_seen"], line["loss"]) for line in found] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]


def test_tracker__written_also_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), tracking.Tracker(str(tmp_path), run_id="r", project="p") as tracker:
        tracker.write({"images_seen": 10, "loss": 1.0})
        raise RuntimeError
    assert len(tracking.read_metrics(str(tmp_path))) == 1


def test_tracker__a_dead_wandb_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**settings: object) -> None:
        raise wandb.errors.CommError("no route")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING), tracking.Tracker(str(tmp_path), run_id="r", project="p") as tracker:
        tracker.write({"images_seen": 10, "loss": 1.0})
    assert len(tracking.read_metrics(str(tmp_path))) == 1
    assert "could not start online" in caplog.text and "could not start offline" in caplog.text


def test_wandb_mode__offline_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert tracking.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert tracking.wandb_mode() == "online"


def test_tracker__inactive_writes_nothing(tmp_path: Path) -> None:
    with tracking.Tracker(str(tmp_path), run_id="r", project="p", is_active=False) as tracker:
        tracker.write({"images_seen": 10, "loss": 1.0})
    assert tracking.read_metrics(str(tmp_path)) == []
