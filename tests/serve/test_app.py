"""The application in Ray Serve: one start for this file, and (slow) docs/serving.md on its own Ray."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from ray import serve

from gretfound import fine_tuning
from gretfound.encoder.folder import read_encoder_folder
from gretfound.errors import ConfigError, LineageError, StorageError
from gretfound.fundus import decode_photograph
from gretfound.release import read_signing_key
from serve.app import Encoder, app
from serve.protocol import Arguments
from tests.serve.tiny_endpoint import Keys, Place, bearer, photograph

ROOT = Path(__file__).parents[2]
SERVE_FILES = sorted((ROOT / "conf" / "serve").glob("*.yaml"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def arguments(place: Place, key_set: Keys, cache_path: Path, **changes: object) -> Arguments:
    return Arguments.model_validate(
        {
            "release_uri": place.release.id,
            "hub_uri": place.hub_uri,
            "keys_uri": key_set.uri,
            "cache_path": str(cache_path),
            "encoder_cpus": 0.5,
            "endpoint_cpus": 0.25,
            "batch_images": 8,
            "batch_wait_s": 0.05,
            "max_images": 8,
            "max_requests_per_key": 32,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def endpoint(
    ray_cluster: None, place: Place, key_set: Keys, training_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of the application in Ray Serve."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    roots = str(training_path.parent)
    serve.run(app(arguments(place, key_set, tmp_path_factory.mktemp("cache"), training_roots=roots)), name="gretfound")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_app__answers_many_callers_with_their_own_embeddings(endpoint: str, place: Place, key_set: Keys) -> None:
    encoder, transform = read_encoder_folder(place.release_path)
    contents = [photograph(seed=seed, brightness=60 + 10 * seed) for seed in range(12)]
    squares = [transform.square(decode_photograph(content)) for content in contents]
    expected = fine_tuning.embed_squares(encoder, transform, squares, precision="float32")

    def post(first: int) -> list[list[float]]:
        files = [("images", ("x.png", content, "image/png")) for content in contents[first : first + 3]]
        answer = httpx.post(f"{endpoint}/v1/embeddings", files=files, headers=bearer(key_set.embed), timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["release_id"] == place.release.id == answer.headers["x-release-id"]
        embeddings: list[list[float]] = answer.json()["embeddings"]
        return embeddings

    with ThreadPoolExecutor(4) as callers:
        found = [row for rows in callers.map(post, range(0, 12, 3)) for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_app__refuses_through_the_proxy_as_it_does_without_one(endpoint: str, key_set: Keys) -> None:
    text = [("images", ("notes.jpg", b"just words", "image/jpeg"))]
    answer = httpx.post(f"{endpoint}/v1/embeddings", files=text, headers=bearer(key_set.embed))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unreadable_photograph")
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]
    assert httpx.post(f"{endpoint}/v1/embeddings", files=text).status_code == 401
    large = httpx.post(f"{endpoint}/v1/embeddings", content=b"x" * 65_000_000, headers=bearer(key_set.embed))
    assert large.status_code == 413
    health = httpx.get(f"{endpoint}/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "ready")
    assert httpx.get(f"{endpoint}/docs").status_code == 200
    assert "text/html" in httpx.get(f"{endpoint}/").headers["content-type"]


def test_app__tells_when_the_cluster_has_no_job_server(endpoint: str, key_set: Keys, training_path: Path) -> None:
    # This test run's Ray has no dashboard, so it takes no jobs; the slow test below has one.
    sent = {"training_uri": str(training_path), "label_column": "DR"}
    answer = httpx.post(f"{endpoint}/v1/fine_tuning/jobs", json=sent, headers=bearer(key_set.finetune), timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_job_server")
    (job,) = httpx.get(f"{endpoint}/v1/fine_tuning/jobs", headers=bearer(key_set.finetune)).json()["jobs"]
    assert job["state"] == "failed"


def test_app__does_not_start_without_keys(place: Place, key_set: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.keys create"):
        app(arguments(place, key_set, tmp_path, keys_uri=str(tmp_path / "absent.json")))


def test_fetch_release__refuses_a_changed_file_and_a_changed_record(place: Place, tmp_path: Path) -> None:
    source = Path(place.release_uri.removeprefix("file://"))
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in source.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    _, local_path = fine_tuning.fetch_release(str(copied), tmp_path / "cache")
    assert (local_path / "model.safetensors").is_file()
    (local_path / "config.json").write_text("{}")  # a damaged cache heals
    fine_tuning.fetch_release(str(copied), tmp_path / "cache")
    assert (local_path / "config.json").read_bytes() == (copied / "config.json").read_bytes()
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    with pytest.raises(StorageError, match="SHA-256"):
        fine_tuning.fetch_release(str(copied), tmp_path / "other")
    record = json.loads((copied / "record.json").read_text())
    (copied / "record.json").write_text(json.dumps({**record, "name": "forged"}))
    with pytest.raises(LineageError, match="changed"):
        fine_tuning.fetch_release(str(copied), tmp_path / "third")


def test_encoder__serves_no_release_that_another_key_signed(place: Place, key_set: Keys, tmp_path: Path) -> None:
    read_signing_key(tmp_path / "other.pem")
    signed = arguments(place, key_set, tmp_path, public_key_path=str(place.public_key_path)).resolved()
    assert Encoder(signed).describe()["release_id"] == place.release.id
    with pytest.raises(LineageError, match="signed by"):
        Encoder(arguments(place, key_set, tmp_path, public_key_path=str(tmp_path / "other.pem.pub")).resolved())


def test_arguments__come_as_text_from_the_command_line(tmp_path: Path) -> None:
    text = {
        "release_uri": "release-00000000000000000000",
        "hub_uri": str(tmp_path),
        "training_roots": f"{tmp_path}/a,{tmp_path}/b",
        "max_images": "16",
    }
    resolved = Arguments.model_validate(text).resolved()
    assert resolved.release_uri == f"file://{tmp_path}/releases/release-00000000000000000000"
    assert resolved.keys_uri == f"file://{tmp_path}/keys.json"
    assert resolved.training_roots == (f"file://{tmp_path}/a", f"file://{tmp_path}/b")
    assert resolved.max_images == 16
    for wrong in ({"batch_images": "8"}, {"surprise": "1"}, {"hub_uri": ""}, {"precision": "int8"}):
        with pytest.raises(ValidationError):
            Arguments.model_validate({**text, **wrong})


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.stem)
def test_conf__each_serve_file_is_what_ray_and_the_application_take(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    content = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = content.applications
    assert application.import_path == "serve.app:app"
    Arguments.model_validate(application.args)
    assert {deployment.name for deployment in application.deployments} <= {"Encoder", "Endpoint"}
    assert content.http_options.request_timeout_s


@pytest.mark.slow
def test_serve_deploy__a_fine_tuning_job_runs_as_a_ray_job(
    place: Place, key_set: Keys, training_path: Path, tmp_path: Path
) -> None:
    head_port, dashboard_port, agent_port, port = (free_port() for _ in range(4))
    chosen = arguments(place, key_set, tmp_path / "cache", training_roots=[str(training_path.parent)])
    application = {"name": "gretfound", "import_path": "serve.app:app", "args": chosen.model_dump(mode="json")}
    http_options = {"host": "127.0.0.1", "port": port}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"http_options": http_options, "applications": [application]}))
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    temporary = tempfile.TemporaryDirectory(prefix="gf", dir="/tmp", ignore_cleanup_errors=True)  # sockets: short paths
    command = [str(programs / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={temporary.name}"]
    ports = [f"--port={head_port}", f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"]
    head = subprocess.Popen([*command, *ports], env=environment, cwd=ROOT, start_new_session=True)
    try:
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{dashboard_port}/api/version").status_code in (200, 401), head)
        deploy = [str(programs / "serve"), "deploy", "-a", f"http://127.0.0.1:{dashboard_port}"]
        subprocess.run([*deploy, str(tmp_path / "serve.yaml")], env=environment, cwd=ROOT, check=True, timeout=120)
        headers, url = bearer(key_set.finetune), f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/healthz").status_code == 200, head)
        sent = {"training_uri": str(training_path), "label_column": "DR", "seed": 3}
        asked = httpx.post(f"{url}/v1/fine_tuning/jobs", json=sent, headers=headers, timeout=60)
        assert asked.status_code == 202, asked.text
        job_url = f"{url}/v1/fine_tuning/jobs/{asked.json()['fine_tuning_job_id']}"
        wait_until(lambda: httpx.get(job_url, headers=headers).json()["state"] in ("succeeded", "failed"), head)
        assert httpx.get(job_url, headers=headers).json()["error"] == ""
        files = {"images": ("x.png", photograph(seed=700, brightness=190), "image/png")}
        fields = {"fine_tuning_job_id": asked.json()["fine_tuning_job_id"]}
        answer = httpx.post(f"{url}/v1/predictions", files=files, data=fields, headers=headers, timeout=60).json()
        assert max(answer["predictions"][0].items(), key=lambda entry: entry[1])[0] == "2"
    finally:
        head.terminate()
        head.wait(60)
        temporary.cleanup()


def wait_until(is_done: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float = 180.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "Ray ended"
        try:
            if is_done():
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(f"not done within {timeout_s:g} s")
