"""The desk where fine-tuning is asked for: whose job it is, where it may read, how often, and what became of it.

Records live in the hub (`gretfound.fine_tuning`), so nothing is lost when the endpoint restarts. Jobs run as Ray jobs
outside Serve; one that ended without a result is found out when somebody asks for it.
"""

import datetime
import logging
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gretfound import fine_tuning, storage
from gretfound.errors import GretfoundError, StorageError
from gretfound.fine_tuning import UNFINISHED, FineTuningJob, Head
from serve.gate import RETRY_AFTER_S, Refused
from serve.keys import Key

log = logging.getLogger(__name__)
JOB_ID_PATTERN = re.compile(rf"{fine_tuning.FOLDER}-[a-z0-9]{{1,32}}-[0-9a-f]{{20}}")
GRACE_S = 60.0  # a Ray job is submitted after its record is written, and its driver needs seconds to start
OBJECT_STORES = ("s3", "gs", "abfs")


class LaunchError(GretfoundError):
    """A job could not be started; the message says where and why."""


class Launcher(Protocol):
    """What starts a job and knows whether it still runs."""

    def start(self, job: FineTuningJob, uri: str) -> None:
        """Starts a job whose record lies in ``uri``; raises `LaunchError`."""

    def is_running(self, job: FineTuningJob) -> bool:
        """Tells whether it is waiting or running; raises `LaunchError` where that cannot be told."""


@dataclass(frozen=True, kw_only=True)
class RayLauncher:
    """Starts jobs through the cluster's job server, which each Ray head with its dashboard runs.

    Its address and token are those of the cluster that the replica belongs to.

    Args:
        cpus: CPUs reserved for one job's driver, which does the work.
        gpus: GPUs reserved for it.
        device: The torch device that it embeds on.
        precision: ``float32`` or ``bfloat16``, as the endpoint embeds.
        cache_path: Where it keeps the release on its machine; empty for the default.
    """

    cpus: float
    gpus: float
    device: str
    precision: str
    cache_path: str

    def start(self, job: FineTuningJob, uri: str) -> None:
        """Submits the job; its submission id is its own, so that it cannot be submitted twice."""
        keys = {
            "job_uri": uri,
            "device": self.device,
            "precision": self.precision,
            "num_threads": max(1, int(self.cpus)),
        }
        if self.cache_path:
            keys["cache_path"] = self.cache_path
        command = [sys.executable, "-m", "jobs.fine_tune_head", *(f"{name}={value}" for name, value in keys.items())]
        client = self._client()
        try:
            client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=_submission_id(job),
                runtime_env=_runtime_env(),
                entrypoint_num_cpus=self.cpus,
                entrypoint_num_gpus=self.gpus,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise LaunchError(f"the cluster's job server took no job: {_first_line(error)}") from error

    def is_running(self, job: FineTuningJob) -> bool:
        """Asks the job server; a job that it doesn't know isn't running."""
        client = self._client()
        try:
            status = client.get_job_status(_submission_id(job))
        except RuntimeError as error:
            if "does not exist" in str(error):
                return False
            raise LaunchError(f"the cluster's job server gave no answer: {_first_line(error)}") from error
        except (ValueError, OSError) as error:
            raise LaunchError(f"the cluster's job server gave no answer: {_first_line(error)}") from error
        return not status.is_terminal()

    def _client(self) -> Any:
        import ray
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        # The address of the cluster's store leads to its job server, on whatever port and machine that listens. The
        # client (Ray 2.60) prefers RAY_ADDRESS, which in a replica may still be the driver's "local" or "auto". An
        # operator who runs jobs on another cluster says so in RAY_API_SERVER_ADDRESS.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        try:
            client = JobSubmissionClient()
            # Ray 2.60 names port 8265 even where a cluster runs without its dashboard and another one listens there.
            session_name = client._do_request("GET", "/api/version").json().get("session_name")
        except (AuthenticationError, RuntimeError, ValueError, OSError) as error:
            raise LaunchError(f"the cluster's job server cannot be reached: {_first_line(error)}") from error
        if "RAY_API_SERVER_ADDRESS" not in os.environ and session_name != ray.get_runtime_context().get_session_name():
            raise LaunchError("this cluster has no job server: start its head with the dashboard")
        return client


@dataclass(frozen=True, kw_only=True)
class FineTuningDesk:
    """Takes requests for heads and answers what became of them; every method blocks.

    Args:
        hub_uri: The hub that keeps the jobs.
        release_id: The release that is served; jobs are made on it.
        release_uri: Its folder.
        launcher: What starts jobs.
        training_roots: Local folders below which training folders may lie.
        training_prefixes: Object-store prefixes below which they may lie.
        max_jobs_per_owner: Unfinished jobs of one owner at a time.
    """

    hub_uri: str
    release_id: str
    release_uri: str
    launcher: Launcher
    training_roots: tuple[str, ...]
    training_prefixes: tuple[str, ...]
    max_jobs_per_owner: int

    def ask(self, key: Key, *, training_uri: str, label_column: str, seed: int) -> FineTuningJob:
        """Makes and starts a job, or returns the one that the same request made before; a failed one is tried again.

        Raises:
            Refused: If the place is not allowed, the folder cannot be trained on, there are too many unfinished jobs,
                or the job could not be started.
        """
        uri = allowed_training_uri(training_uri, roots=self.training_roots, prefixes=self.training_prefixes)
        try:
            labels = fine_tuning.read_labels(uri, label_column)
        except StorageError as error:
            raise Refused(422, "no_training_folder", "no metadata.csv with rows was found in training_uri") from error
        except (ValueError, GretfoundError) as error:
            raise Refused(422, "not_trainable", str(error)) from error
        job = FineTuningJob(
            owner=key.owner,
            release_id=self.release_id,
            release_uri=self.release_uri,
            training_uri=uri,
            training_digest=labels.digest,
            label_column=label_column,
            seed=seed,
        ).advanced("queued")
        earlier = self._read(job.id)
        if earlier is not None and earlier.state != "failed":
            return earlier
        unfinished = [found for found in self.jobs_of(key, own=True) if found.state in UNFINISHED]
        if len(unfinished) >= self.max_jobs_per_owner:
            message = f"{len(unfinished)} of your jobs are unfinished; at most {self.max_jobs_per_owner} at a time"
            raise Refused(429, "too_many_jobs", message, retry_after_s=60)
        if earlier is not None:
            job = earlier.advanced("queued", attempt=earlier.attempt + 1, error="")
            fine_tuning.write_job(self._uri(job.id), job)
        elif not fine_tuning.create_job(self.hub_uri, job):
            return fine_tuning.read_job(
                self._uri(job.id)
            )  # the same request came twice at once; the other one starts it
        try:
            self.launcher.start(job, self._uri(job.id))
        except LaunchError as error:
            log.error("the job %s could not be started: %s", job.id, error)
            fine_tuning.write_job(self._uri(job.id), job.advanced("failed", error="the job could not be started"))
            message = "the job could not be started; send the request again later"
            raise Refused(503, "no_job_server", message, retry_after_s=RETRY_AFTER_S) from error
        return job

    def find(self, job_id: str, key: Key) -> FineTuningJob:
        """Returns a job of the key's owner.

        Raises:
            Refused: If there is none; somebody else's job is answered in the same words.
        """
        job = self._read(job_id) if JOB_ID_PATTERN.fullmatch(job_id) else None
        if job is None or (job.owner != key.owner and "admin" not in key.scopes):
            raise Refused(
                404, "no_such_job", "you have no fine-tuning job of this id; GET /v1/fine_tuning/jobs lists yours"
            )
        return self._settled(job)

    def jobs_of(self, key: Key, *, own: bool = False) -> list[FineTuningJob]:
        """Lists the jobs of the key's owner, or everybody's for an admin key unless ``own``; newest first."""
        owner = "" if "admin" in key.scopes and not own else key.owner
        jobs = [self._read(job_id) for job_id in fine_tuning.list_job_ids(self.hub_uri, owner)]
        settled = [self._settled(job) for job in jobs if job is not None]
        return sorted(settled, key=lambda job: job.created_at, reverse=True)

    def head(self, job_id: str, key: Key) -> Head:
        """Returns the head of a finished job.

        Raises:
            Refused: If there is no such job, it isn't finished, or it belongs to another release.
        """
        job = self.find(job_id, key)
        if job.outcome is None:
            raise Refused(409, "job_not_finished", f"this job is {job.state}; predictions need one that succeeded")
        if job.release_id != self.release_id:
            message = f"this job's head belongs to {job.release_id}; ask for the job again on this release"
            raise Refused(409, "other_release", message)
        return fine_tuning.read_head(self._uri(job.id), sha256=job.outcome.head_sha256)

    def _uri(self, job_id: str) -> str:
        return fine_tuning.job_uri(self.hub_uri, job_id)

    def _read(self, job_id: str) -> FineTuningJob | None:
        uri = self._uri(job_id)
        return fine_tuning.read_job(uri) if storage.exists(storage.join(uri, "job.json")) else None

    def _settled(self, job: FineTuningJob) -> FineTuningJob:
        if job.state not in UNFINISHED or _age_s(job) < GRACE_S:
            return job
        try:
            if self.launcher.is_running(job):
                return job
        except LaunchError as error:
            log.warning("whether %s still runs cannot be told: %s", job.id, error)
            return job
        job = fine_tuning.read_job(self._uri(job.id))  # it may have finished between the two questions
        if job.state in UNFINISHED:
            job = job.advanced("failed", error="the job ended without a result; send the same request to try again")
            fine_tuning.write_job(self._uri(job.id), job)
        return job


def allowed_training_uri(training_uri: str, *, roots: tuple[str, ...], prefixes: tuple[str, ...]) -> str:
    """Returns the training folder's URI if the endpoint may read it: below a root or a prefix, links followed.

    Raises:
        Refused: If not; the words don't tell whether there is such a folder.
    """
    message = "training_uri lies in no place that this endpoint may read; ask the operator for one"
    scheme, separator, rest = training_uri.partition("://")
    if "\0" in training_uri or any(part in (".", "..") for part in training_uri.split("/")):
        raise Refused(403, "place_not_allowed", message)
    if separator and scheme in OBJECT_STORES:
        uri = training_uri.rstrip("/")
        if any(sign in rest for sign in "?#@\\") or "//" in rest:
            raise Refused(403, "place_not_allowed", message)
        if not any(uri == prefix.rstrip("/") or uri.startswith(prefix.rstrip("/") + "/") for prefix in prefixes):
            raise Refused(403, "place_not_allowed", message)
        return uri
    if separator and scheme != "file":
        raise Refused(403, "place_not_allowed", message)
    path = storage.local_path(training_uri) if separator or training_uri.startswith("/") else None
    if path is None:
        raise Refused(403, "place_not_allowed", message)
    resolved = path.resolve()
    allowed = [root_path.resolve() for root in roots if (root_path := storage.local_path(root)) is not None]
    if not any(resolved.is_relative_to(root_path) for root_path in allowed):
        raise Refused(403, "place_not_allowed", message)
    return storage.normalised(str(resolved))


def _submission_id(job: FineTuningJob) -> str:
    return f"{job.id}-{job.attempt}"


def _runtime_env() -> dict[str, Any]:
    # A job sees the code that its endpoint runs: the endpoint's own uploaded folder, or this installation.
    import ray

    inherited = dict(ray.get_runtime_context().runtime_env)
    code = {
        name: inherited[name] for name in ("working_dir", "py_modules", "env_vars", "image_uri") if name in inherited
    }
    if "working_dir" in code or "py_modules" in code:
        return code
    return {**code, "env_vars": {**code.get("env_vars", {}), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}}


def _age_s(job: FineTuningJob) -> float:
    updated = datetime.datetime.fromisoformat(job.updated_at)
    return (datetime.datetime.now(datetime.UTC) - updated).total_seconds()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
