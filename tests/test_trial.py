"""The trial of a base generator: what it measures, what follows from it, and how `check` tells it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gretfound import examination, phantom, site, trial
from gretfound.errors import ConfigError
from tests import tiny_generator

MEASURED = trial.Trial(
    device="cuda", batch_size=16, trained_per_s=2.0, drawn_per_s=0.5, peak_bytes=9 * 2**30, total_bytes=24 * 2**30
)


def test_duration_s__training_then_drawing() -> None:
    assert MEASURED.duration_s(images_seen=7200) == pytest.approx(3600)
    assert MEASURED.duration_s(images_seen=7200, num_drawn=1000) == pytest.approx(5600)
    with pytest.raises(ValueError, match="ran out of memory"):
        replace(MEASURED, trained_per_s=0.0).duration_s(images_seen=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> examination.Examination:
    path = tmp_path_factory.mktemp("sites") / "aster"
    phantom.write_site(phantom.SITES["aster"], path, num_images=4, seed=0, size_px=72)
    return examination.examine(path, policy=examination.DEMONSTRATION)


def test_estimates__say_what_was_measured_and_what_was_not(found: examination.Examination) -> None:
    told = dict(examination.estimates(found, None, images_seen=20_000, num_drawn=1000))
    assert "measured elsewhere" in told["images"]
    assert "not measured" in told["weights"] and "--base" in told["synthetic"]
    told = dict(examination.estimates(found, MEASURED, images_seen=20_000, num_drawn=9000))
    assert told["weights"].startswith("about 3 hours: 20,000 photographs at 2 a second")  # 10,000 s
    assert told["synthetic"].startswith("about 8 hours")  # and 18,000 s
    assert "memory 9.0 GiB of 24.0 GiB at --batch-size 16" in told["weights"]
    told = dict(examination.estimates(found, replace(MEASURED, trained_per_s=0.0), images_seen=1, num_drawn=1))
    assert "out of memory at --batch-size 16" in told["weights"] and "halve" in told["weights"]


def test_examine__a_table_that_may_not_be_read_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phantom.write_site(phantom.SITES["aster"], tmp_path / "site", num_images=1, seed=0, size_px=72)

    def refused(path: Path) -> bytes:  # to root, under whom tests may run, no file is closed
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", lambda path: refused(path) if path.name == "metadata.csv" else _read(path))
    result = examination.examine(tmp_path / "site", policy=examination.DEMONSTRATION)
    assert not result.is_fit_for(None)
    assert "metadata.csv cannot be opened: Permission denied" in examination.to_text(result)


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read()


def test_run__no_gpu_is_told(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"found no GPU .* or --device cpu"):
        trial.run(tmp_path, device="cuda", batch_size=4, lora_rank=8, num_steps=25)


@pytest.mark.slow
def test_main__check_times_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phantom.write_site(phantom.SITES["aster"], tmp_path / "site", num_images=8, seed=0, size_px=72)
    base_path = tiny_generator.write_base(tmp_path / "base")
    page_path = tmp_path / "report.html"
    arguments = ["check", str(tmp_path / "site"), "--policy", "demonstration", "--html", str(page_path)]
    assert site.main([*arguments, "--base", str(base_path), "--batch-size", "4"]) == site.EXIT_FIT
    said = capsys.readouterr().out
    assert "measured just now on this machine's cpu with this base" in said
    assert "measured just now" in page_path.read_text()
