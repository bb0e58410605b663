"""Checkpoints: where a run keeps its state, so that it can be killed at any moment and be run again.

A checkpoint counts once it is committed, is verified by digest when it is read, and the newest whole one is taken.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import torch

from gretfound import storage
from gretfound.errors import StorageError

log = logging.getLogger(__name__)
_DIGESTS_NAME = "digests-{rank:05d}-of-{num_workers:05d}.json"
_DIGESTS_PATTERN = "digests-*-of-*.json"
_UNTRAINED_NAME = "untrained.pt"
_STATE_TAG = "state"


class LocalCheckpoints:
    """Keeps the newest state in a local folder: at a site, or wherever Ray is not."""

    def __init__(self, folder_path: Path) -> None:
        self._folder_path = folder_path

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest complete state, if there is one."""
        complete = sorted(self._folder_path.glob("images_*"))
        if not complete:
            return None
        _, client_state = engine.load_checkpoint(str(complete[-1]))
        return dict(client_state)

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        """Writes the state beside the older one, renames it when complete, then removes the older one."""
        self._folder_path.mkdir(parents=True, exist_ok=True)
        for abandoned in self._folder_path.glob(".partial-*"):  # by a process that was killed
            shutil.rmtree(abandoned)
        target = self._folder_path / _name(images_seen)
        partial = Path(tempfile.mkdtemp(dir=self._folder_path, prefix=".partial-"))
        engine.save_checkpoint(
            str(partial), tag=_STATE_TAG, client_state={"images_seen": images_seen, "losses": losses}
        )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for older in sorted(self._folder_path.glob("images_*"))[:-1]:
            shutil.rmtree(older)
        return target.name


class HubCheckpoints:
    """Keeps the newest state of a run in one process in the hub, so that another machine can go on with it.

    There are two places, written in turn; `latest.json` is written last and says which one holds, with its digests.

    Args:
        folder_uri: A folder for this run alone.
    """

    def __init__(self, folder_uri: str) -> None:
        self._folder_uri = folder_uri

    @property
    def _latest_uri(self) -> str:
        return storage.join(self._folder_uri, "latest.json")

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest state, if there is one.

        Raises:
            StorageError: If it is not what was written.
        """
        if not storage.exists(self._latest_uri):
            return None
        latest = storage.read_json(self._latest_uri)
        with storage.scratch_folder() as folder:
            for name, sha256 in latest["digests"].items():
                uri = storage.join(self._folder_uri, latest["place"], name)
                storage.download_file(uri, Path(folder) / name, sha256=sha256)
            _, client_state = engine.load_checkpoint(folder)
        return dict(client_state)

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        """Writes the state into the place that does not hold the newest one, then says that it does now."""
        is_first = not storage.exists(self._latest_uri) or storage.read_json(self._latest_uri)["place"] == "second"
        place = "first" if is_first else "second"
        with storage.scratch_folder() as folder:
            engine.save_checkpoint(folder, tag=_STATE_TAG, client_state={"images_seen": images_seen, "losses": losses})
            described = storage.describe_folder(Path(folder))
            digests = {str(path.relative_to(folder)): sha256 for path, sha256, _ in described}
            for name in digests:
                storage.upload_file(Path(folder) / name, storage.join(self._folder_uri, place, name))
        storage.write_json(self._latest_uri, {"place": place, "images_seen": images_seen, "digests": digests})
        return _name(images_seen)


class RayCheckpoints:
    """Keeps state through Ray Train: each worker uploads its part, and a save returns only once it is committed.

    A run may go on with another number of workers than it was saved with: ZeRO's parts are then converted to
    DeepSpeed's universal form, once on each node.

    Args:
        train_uri: The folder of the Ray Train run, as `fit.train_uri` gives it.
    """

    def __init__(self, train_uri: str) -> None:
        self._train_uri = train_uri

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint of this run, if it has any.

        Raises:
            StorageError: If the run has checkpoints and none of them is whole.
        """
        reported = ray.train.get_all_reported_checkpoints(
            consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED
        )
        faults = []
        for checkpoint in [each.checkpoint for each in reversed(reported)]:
            name = Path(checkpoint.path).name
            with checkpoint.as_directory() as folder:
                fault = _fault_of(Path(folder))
                if _largest(float(fault is not None)):
                    faults.append(f"{name}: {fault or 'damaged on another node'}")
                    log.warning("checkpoint %s is not whole and is passed over: %s", name, faults[-1])
                    continue
                return _load(engine, Path(folder))
        if faults:
            raise StorageError(
                f"none of this run's {len(faults)} checkpoints is whole ({'; '.join(faults)}); restore one of them "
                f"below {self._train_uri}, or remove that folder to begin the run anew"
            )
        return None

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        """Reports the state and waits until the controller has committed it.

        Without the wait a worker that dies within the controller's polling interval loses the checkpoint although its
        files are in storage (Ray 2.60; ray-project/ray#54555).
        """
        # Never one name twice: Ray removes old checkpoints by their path, and a killed upload leaves parts behind.
        name = f"{_name(images_seen)}-{ray.train.collective.broadcast_from_rank_zero(secrets.token_hex(4))}"
        with storage.scratch_folder() as folder:
            engine.save_checkpoint(folder, tag=_STATE_TAG, client_state={"images_seen": images_seen, "losses": losses})
            untrained = _untrained_state(engine)
            if _rank() == 0:
                torch.save(untrained, Path(folder) / _UNTRAINED_NAME)
            _write_digests(Path(folder))
            ray.train.report(
                {"images_seen": images_seen, "loss": losses[-1]},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
                checkpoint_upload_fn=self._upload,
            )
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
        return name

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Uploads through the storage room, which tries again on every store's errors; Ray's own does on S3's only."""
        folder_uri = storage.join(self._train_uri, name)
        for path in sorted(Path(checkpoint.path).rglob("*")):
            if path.is_file():
                storage.upload_file(path, storage.join(folder_uri, str(path.relative_to(checkpoint.path))))
        opened, path_in_store = storage.filesystem(folder_uri)
        return ray.train.Checkpoint(path_in_store, filesystem=opened)


def _write_digests(folder: Path) -> None:
    digests = {str(path.relative_to(folder)): sha256 for path, sha256, _ in storage.describe_folder(folder)}
    name = _DIGESTS_NAME.format(rank=_rank(), num_workers=_world_size())
    (folder / name).write_text(json.dumps(digests))


def _fault_of(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint's files, None if every worker's part is there and is what was written."""
    listed = sorted(folder.glob(_DIGESTS_PATTERN))
    if not listed or len(listed) != _saved_workers(folder):
        return (
            f"found the parts of {len(listed)} workers of {_saved_workers(folder) if listed else 'an unknown number'}"
        )
    for part in listed:
        for name, sha256 in json.loads(part.read_text()).items():
            path = folder / name
            if not path.is_file() or storage.sha256_of(path) != sha256:
                return f"{name} is absent or not what was written"
    return None


def _saved_workers(folder: Path) -> int:
    return int(sorted(folder.glob(_DIGESTS_PATTERN))[0].stem.rpartition("-")[2])


def _untrained_state(engine: Any) -> dict[str, torch.Tensor]:
    """Returns what no optimizer owns, whole: frozen parameters and buffers. Every worker takes part."""
    state = {name: value for name, value in engine.module.named_buffers() if name in engine.module.state_dict()}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with _gathered(parameter):
                state[name] = parameter.detach().cpu().clone()
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _set_untrained_state(engine: Any, state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                with _gathered(parameter, modifier_rank=0):
                    parameter.copy_(state[name])


def _gathered(parameter: torch.nn.Parameter, **settings: Any) -> Any:
    """Makes a parameter whole while the block runs, where ZeRO stage 3 has sharded it."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed  # seconds to import, and of no use at a site

    return deepspeed.zero.GatheredParameters([parameter], **settings)


def _load(engine: Any, folder: Path) -> dict[str, Any]:
    saved, found = _saved_workers(folder), _world_size()
    is_sharded = getattr(engine, "zero_optimization_stage", lambda: 0)() > 0
    if saved == found or not is_sharded:
        _, client_state = engine.load_checkpoint(str(folder))
        return dict(client_state)
    log.info("the checkpoint was saved by %d worker(s); converting it for %d", saved, found)
    with _universal(folder) as converted:
        # DeepSpeed 0.19 has no public way to load a universal checkpoint but from the start of a run, and then leaves
        # what no optimizer owns as it was built.
        engine._config.load_universal_checkpoint = True
        try:
            _, client_state = engine.load_checkpoint(str(converted), tag=_STATE_TAG)
        finally:
            engine._config.load_universal_checkpoint = False
        _set_untrained_state(engine, torch.load(folder / _UNTRAINED_NAME, weights_only=True))
        _wait_for_all()
    return dict(client_state)


@contextlib.contextmanager
def _universal(folder: Path) -> Iterator[Path]:
    """Converts ZeRO's parts to DeepSpeed's universal form, once on each node, for the workers of that node."""
    context = ray.train.get_context()
    converted = Path(tempfile.gettempdir()) / f"gretfound-universal-{os.getuid()}-{context.get_experiment_name()}"
    if context.get_local_rank() == 0:
        shutil.rmtree(converted, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / _STATE_TAG), "--output_folder", str(converted / _STATE_TAG)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise StorageError(
                f"a checkpoint of {_saved_workers(folder)} worker(s) could not be converted for {_world_size()}: "
                f"{finished.stderr.strip()[-500:]}"
            )
    _wait_for_all()
    try:
        yield converted
    finally:
        if context.get_local_rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)


def _name(images_seen: int) -> str:
    return f"images_{images_seen:015d}"


def _rank() -> int:
    return int(ray.train.get_context().get_world_rank())


def _world_size() -> int:
    return int(ray.train.get_context().get_world_size())


def _largest(value: float) -> float:
    """Returns the largest of all workers' values, so that all of them go the same way."""
    if _world_size() == 1:
        return value
    held = torch.tensor(value, device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
    return float(held)


def _wait_for_all() -> None:
    _largest(0.0)
