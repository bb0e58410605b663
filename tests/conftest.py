"""What all tests share: one Ray, an S3 server on loopback, and quiet libraries."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray Train polls its workers this often; tests cannot wait for the default of 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parents[1]
REAL_PHOTOGRAPHS = ROOT.parent / "shared" / "cfp"
RAY_ADDRESS = "GRETFOUND_TEST_RAY_ADDRESS"  # set for test processes by the one that starts them
S3_HUB_URI = "s3://gretfound-test/hub"


@pytest.hookimpl(tryfirst=True)  # before xdist starts the others, which inherit the environment
def pytest_sessionstart(session: pytest.Session) -> None:
    """Where tests run in several processes, the one that starts them holds the S3 server and the one Ray for all."""
    num_processes = session.config.getoption("numprocesses", None)
    if num_processes and not hasattr(session.config, "workerinput"):
        held = contextlib.ExitStack()
        session.config.add_cleanup(held.close)
        held.enter_context(_s3_server())
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core each
        os.environ[RAY_ADDRESS] = held.enter_context(_ray_head(num_cpus=4 * num_processes))


@pytest.fixture(scope="session")
def ray_cluster(s3_hub: str) -> Iterator[None]:
    """One Ray for the whole test run: four logical CPUs a test process, so that two workers and their data tasks fit.

    It comes after the S3 server, since its workers inherit the environment that names that server.
    """
    if address := os.environ.get(RAY_ADDRESS):
        ray.init(address=address, log_to_driver=False, runtime_env=_runtime_env())
        _stop_listening()
        yield
        ray.shutdown()
    else:
        with _ray_head(num_cpus=4):
            yield


@pytest.fixture(scope="session")
def s3_hub() -> Iterator[str]:
    """The URI of a hub on an S3 server of this test run, over real HTTP on loopback."""
    with contextlib.nullcontext() if RAY_ADDRESS in os.environ else _s3_server():
        yield S3_HUB_URI


@contextlib.contextmanager
def _ray_head(num_cpus: int) -> Iterator[str]:
    """Holds a Ray of this machine; yields its address."""
    context = ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400 * 2**20,
        runtime_env=_runtime_env(),
    )
    _stop_listening()
    yield context.address_info["gcs_address"]
    ray.shutdown()


def _stop_listening() -> None:
    """Ends the thread that prints the cluster's errors, as `ray.shutdown` would.

    With several drivers on one cluster it was seen (Ray 2.60) to poll 900 times a second without a pause, in each of
    them: with the answers one of two cores' work (docs/log.md).
    """
    worker = ray._private.worker.global_worker
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()


def _runtime_env() -> dict[str, Any]:
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"env_vars": {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}}


@contextlib.contextmanager
def _s3_server() -> Iterator[None]:
    """Holds an S3 server, and the environment that names it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    boto3.client("s3").create_bucket(Bucket="gretfound-test")
    yield
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def real_photographs() -> Path:
    """The folder of real site folders beside the project; the test is skipped where it is absent."""
    if not REAL_PHOTOGRAPHS.is_dir():
        pytest.skip(f"no real photographs at {REAL_PHOTOGRAPHS}")
    return REAL_PHOTOGRAPHS


@pytest.fixture(scope="session")
def gate_eye_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the privacy gate's learned eye of the demonstration: trained once for the whole test run."""
    from gretfound.gate import eyes, policy

    rules, path = policy.read_policy("demonstration"), tmp_path_factory.mktemp("gate")
    eyes.trained_eye(num_drawings=rules.eye_drawings, num_steps=rules.eye_steps, cache_path=path)
    return path
