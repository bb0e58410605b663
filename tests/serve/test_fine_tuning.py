"""The fine-tuning desk over HTTP, with real jobs that run in this process."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from gretfound import fine_tuning
from serve.fine_tuning import LaunchError, allowed_training_uri
from serve.gate import Refused
from serve.keys import read_keys
from tests.serve.tiny_endpoint import InProcess, Keys, Opened, bearer, photograph

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def opened(open_endpoint: Callable[..., Opened]) -> Opened:
    return open_endpoint()


def ask(client: TestClient, key: str, training_path: Path, **changes: object) -> dict[str, object]:
    answer = client.post(
        JOBS, json={"training_uri": str(training_path), "label_column": "DR", **changes}, headers=bearer(key)
    )
    assert answer.status_code == 202, answer.text
    content: dict[str, object] = answer.json()
    return content


def predict(client: TestClient, key: str, job_id: object, *contents: bytes) -> object:
    files = [("images", ("x.png", content, "image/png")) for content in contents]
    return client.post("/v1/predictions", files=files, data={"fine_tuning_job_id": job_id}, headers=bearer(key))


def test_ask__a_labelled_folder_becomes_predictions(opened: Opened, key_set: Keys, training_path: Path) -> None:
    asked = ask(opened.client, key_set.finetune, training_path)
    job = opened.client.get(f"{JOBS}/{asked['fine_tuning_job_id']}", headers=bearer(key_set.finetune)).json()
    assert job["state"] == "succeeded"
    outcome = job["outcome"]
    assert outcome["labels"] == {"0": 12, "1": 12, "2": 12}
    assert (outcome["num_images"], outcome["num_unlabelled"], outcome["num_unreadable"]) == (36, 1, 1)
    assert outcome["auroc"]["low"] <= outcome["auroc"]["value"] <= outcome["auroc"]["high"]
    assert outcome["auroc"]["value"] > 0.9
    contents = [photograph(seed=500 + grade, brightness=70 + 60 * grade) for grade in range(3)]
    answer = predict(opened.client, key_set.finetune, job["fine_tuning_job_id"], *contents).json()
    assert answer["labels"] == ["0", "1", "2"] and answer["label_column"] == "DR"
    for grade, row in enumerate(answer["predictions"]):
        assert sum(row.values()) == pytest.approx(1, abs=1e-6)
        assert max(row, key=row.get) == str(grade), (answer["predictions"], outcome)


def test_ask__somebodys_own_column_gives_its_words_as_classes(
    opened: Opened, key_set: Keys, training_path: Path
) -> None:
    job = ask(opened.client, key_set.finetune, training_path, label_column="colour")
    found = opened.client.get(f"{JOBS}/{job['fine_tuning_job_id']}", headers=bearer(key_set.finetune)).json()
    assert found["outcome"]["labels"] == {"bright": 12, "dim": 12, "plain": 12}


def test_ask__the_same_request_is_the_same_job(opened: Opened, key_set: Keys, training_path: Path) -> None:
    first = ask(opened.client, key_set.finetune, training_path)
    second = ask(opened.client, key_set.finetune, training_path)
    other = ask(opened.client, key_set.finetune, training_path, seed=1)
    assert first["fine_tuning_job_id"] == second["fine_tuning_job_id"] != other["fine_tuning_job_id"]
    assert opened.launcher.num_started == 2
    listed = opened.client.get(JOBS, headers=bearer(key_set.finetune)).json()["jobs"]
    assert [job["fine_tuning_job_id"] for job in listed] == [other["fine_tuning_job_id"], first["fine_tuning_job_id"]]


def test_find__somebody_elses_job_is_not_there(opened: Opened, key_set: Keys, training_path: Path) -> None:
    job_id = ask(opened.client, key_set.finetune, training_path)["fine_tuning_job_id"]
    absent = opened.client.get(f"{JOBS}/fine_tuning-0123456789ab-{'0' * 20}", headers=bearer(key_set.other))
    other = opened.client.get(f"{JOBS}/{job_id}", headers=bearer(key_set.other))
    assert (absent.status_code, other.status_code) == (404, 404)
    assert absent.json()["error"] == other.json()["error"]
    assert opened.client.get(JOBS, headers=bearer(key_set.other)).json()["jobs"] == []
    assert predict(opened.client, key_set.other, job_id, photograph(seed=1)).status_code == 404
    assert opened.client.get(f"{JOBS}/..%2F..%2Fkeys", headers=bearer(key_set.other)).status_code == 404
    assert opened.client.get(f"{JOBS}/{job_id}", headers=bearer(key_set.admin)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"training_uri": "/etc"}, 403, "place_not_allowed"),
        ({"training_uri": "s3://closed/clinic"}, 403, "place_not_allowed"),
        ({"training_uri": "http://open/clinics"}, 403, "place_not_allowed"),
        ({"label_column": "Age"}, 422, "not_trainable"),
        ({"label_column": "Glaucoma"}, 422, "not_trainable"),
        ({"label_column": "Nothing"}, 422, "not_trainable"),
        ({"seed": -1}, 422, "wrong_field"),
        ({"surprise": 1}, 422, "wrong_field"),
    ],
)
def test_ask__refuses_what_it_may_not_or_cannot_do(
    opened: Opened, key_set: Keys, training_path: Path, changes: dict[str, object], status: int, code: str
) -> None:
    sent = {"training_uri": str(training_path), "label_column": "DR", **changes}
    answer = opened.client.post(JOBS, json=sent, headers=bearer(key_set.finetune))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert opened.client.get(JOBS, headers=bearer(key_set.finetune)).json()["jobs"] == []


def test_ask__a_folder_without_a_table_is_named_after_the_place_is_allowed(
    opened: Opened, key_set: Keys, training_path: Path
) -> None:
    sent = {"training_uri": str(training_path.parent / "absent")}
    answer = opened.client.post(JOBS, json=sent, headers=bearer(key_set.finetune))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_training_folder")


def test_find__a_job_that_died_is_found_out_and_may_be_tried_again(
    opened: Opened, key_set: Keys, training_path: Path
) -> None:
    opened.launcher.is_up = False  # as if the node had gone down after the start
    job_id = ask(opened.client, key_set.finetune, training_path)["fine_tuning_job_id"]
    uri = fine_tuning.job_uri(opened.desk.hub_uri, str(job_id))
    job = fine_tuning.read_job(uri)
    assert job.state == "queued"
    fine_tuning.write_job(uri, dataclasses.replace(job, updated_at="2026-01-01T00:00:00+00:00"))
    found = opened.client.get(f"{JOBS}/{job_id}", headers=bearer(key_set.finetune)).json()
    assert found["state"] == "failed" and "try again" in found["error"]
    assert predict(opened.client, key_set.finetune, job_id, photograph(seed=1)).status_code == 409
    opened.launcher.is_up = True
    ask(opened.client, key_set.finetune, training_path)
    found = opened.client.get(f"{JOBS}/{job_id}", headers=bearer(key_set.finetune)).json()
    assert (found["state"], found["attempt"], found["error"]) == ("succeeded", 2, "")


def test_ask__unfinished_jobs_of_one_owner_are_limited(opened: Opened, key_set: Keys, training_path: Path) -> None:
    opened.launcher.is_up = False
    for seed in range(2):
        ask(opened.client, key_set.finetune, training_path, seed=seed)
    sent = {"training_uri": str(training_path), "seed": 2}
    answer = opened.client.post(JOBS, json=sent, headers=bearer(key_set.finetune))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_jobs")
    assert answer.headers["retry-after"]


def test_ask__a_cluster_that_takes_no_job_is_told(opened: Opened, key_set: Keys, training_path: Path) -> None:
    class Closed(InProcess):
        def start(self, job: fine_tuning.FineTuningJob, uri: str) -> None:
            raise LaunchError("the cluster's job server took no job: refused")

    desk = dataclasses.replace(opened.desk, launcher=Closed(training_path))
    key = next(key for key in read_keys(key_set.uri) if key.allows("finetune"))
    with pytest.raises(Refused) as caught:
        desk.ask(key, training_uri=str(training_path), label_column="DR", seed=0)
    assert caught.value.status_code == 503
    assert desk.jobs_of(key)[0].state == "failed"


def test_allowed_training_uri__follows_links_and_prefixes(tmp_path: Path) -> None:
    root, outside = tmp_path / "open", tmp_path / "closed"
    (root / "clinic").mkdir(parents=True)
    (outside / "clinic").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    places = {"roots": (str(root),), "prefixes": ("s3://open/clinics/",)}
    assert allowed_training_uri(f"{root}/clinic", **places) == f"file://{root}/clinic"
    assert allowed_training_uri(f"file://{root}/clinic/", **places) == f"file://{root}/clinic"
    assert allowed_training_uri("s3://open/clinics/a", **places) == "s3://open/clinics/a"
    for wrong in (
        f"{root}/link/clinic",
        f"{root}/../closed/clinic",
        f"{root}-2/clinic",
        "clinic",
        "s3://open/clinics-2/a",
        "s3://open/clinics/../secret",
        "s3://open/clinics/a?endpoint=evil",
        "s3://key:secret@open/clinics",
        "gs://open/clinics/a",
        "file://",
        "\0",
    ):
        with pytest.raises(Refused) as caught:
            allowed_training_uri(wrong, **places)
        assert caught.value.status_code == 403
