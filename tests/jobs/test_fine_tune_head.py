"""The job that fits a head: its record tells of every end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gretfound import fine_tuning, storage
from gretfound.errors import ConfigError, LineageError
from gretfound.fine_tuning import FineTuningJob
from jobs import fine_tune_head
from tests.serve.tiny_endpoint import Place, make_place, make_training_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def training_path(tmp_path: Path) -> Path:
    return make_training_folder(tmp_path)


@pytest.fixture
def job(place: Place, training_path: Path) -> FineTuningJob:
    """A new job, as the endpoint writes it."""
    training_uri = storage.normalised(str(training_path))
    new = FineTuningJob(
        owner="0123456789ab",
        release_id=place.release.id,
        release_uri=place.release_uri,
        training_uri=training_uri,
        training_digest=fine_tuning.read_labels(training_uri, "DR").digest,
        label_column="DR",
        seed=0,
    ).advanced("queued")
    fine_tuning.write_job(fine_tuning.job_uri(place.hub_uri, new.id), new)
    return new


def run(place: Place, job: FineTuningJob, tmp_path: Path) -> FineTuningJob:
    uri = fine_tuning.job_uri(place.hub_uri, job.id)
    assert fine_tune_head.main([f"job_uri={uri}", f"cache_path={tmp_path / 'cache'}", "num_resamples=50"]) == job.id
    return fine_tuning.read_job(uri)


def test_main__a_finished_job_is_left_as_it_is(place: Place, job: FineTuningJob, tmp_path: Path) -> None:
    first = run(place, job, tmp_path)
    assert (first.state, first.error) == ("succeeded", "")
    assert first.outcome is not None and first.outcome.auroc["value"] > 0.9
    assert run(place, job, tmp_path) == first


def test_main__a_folder_that_changed_is_not_trained_on(
    place: Place, job: FineTuningJob, training_path: Path, tmp_path: Path
) -> None:
    csv_path = training_path / "metadata.csv"
    csv_path.write_text(csv_path.read_text().replace("0.png,0", "0.png,1"))
    with pytest.raises(LineageError, match="changed"):
        run(place, job, tmp_path)
    found = fine_tuning.read_job(fine_tuning.job_uri(place.hub_uri, job.id))
    assert found.state == "failed" and "changed" in found.error


def test_main__photographs_that_cannot_be_read_leave_too_few(
    place: Place, job: FineTuningJob, training_path: Path, tmp_path: Path
) -> None:
    for index in range(0, 36, 3):
        (training_path / "traindata" / f"{index}.png").write_bytes(b"broken")
    changed = fine_tuning.read_labels(job.training_uri, "DR").digest
    again = FineTuningJob(**{**vars(job), "training_digest": changed})
    fine_tuning.write_job(fine_tuning.job_uri(place.hub_uri, again.id), again)
    with pytest.raises(ValueError, match="no readable photograph"):
        run(place, again, tmp_path)
    assert fine_tuning.read_job(fine_tuning.job_uri(place.hub_uri, again.id)).state == "failed"


def test_main__refuses_settings_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="precision"):
        fine_tune_head.main(["job_uri=x", "precision=float16"])


def test_help__explains_each_key_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "jobs.fine_tune_head", "--help"]
    started_s = time.monotonic()
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert time.monotonic() - started_s < 10  # under a second on a quiet machine
    assert "job_uri" in shown.stdout and "num_resamples" in shown.stdout
    assert " torch" not in shown.stderr and " ray" not in shown.stderr
