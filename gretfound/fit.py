"""The one training loop, and the one way to run it on a Ray cluster.

An objective is an `nn.Module` whose ``forward(**batch)`` returns a scalar loss. `train` runs it in this process (a site
without Ray) or in each worker of a Ray Train run that `run` starts; DeepSpeed ZeRO shards it where a stage is given.
Progress and schedules are counted in images.
"""

import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from gretfound import storage
from gretfound.errors import ConfigError, NonFiniteLoss, StorageError

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]
_WORKERS_NAME = "num_workers.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One point of a run, handed to ``on_progress`` on the first worker only."""

    images_seen: int
    num_images: int
    loss: float
    learning_rate: float
    images_per_s: float
    data_wait_share: float


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What a finished run reports.

    ``final_loss`` is the mean over the last twentieth of the steps. ``weights`` holds the objective's parameters whole
    and in float32, by name, on the first worker; it is empty on the others.
    """

    images_seen: int
    final_loss: float
    weights: dict[str, Tensor]


class Checkpoints(Protocol):
    """Where a run keeps its state. Every worker calls both methods at the same points of progress."""

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest committed state into ``engine`` and returns what was saved with it, None without one."""

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        """Commits the state of ``engine`` with the images seen and the latest losses; returns its name."""


def train(
    objective: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    *,
    num_images: int,
    batch_size: int,
    peak_lr: float,
    warmup_images: int = 0,
    final_lr: float = 0.0,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    clip_norm: float = 0.0,
    accumulation: int = 1,
    precision: str = "float32",
    zero_stage: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    checkpoint_every_images: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    progress_every_s: float = 2.0,
) -> TrainingSummary:
    """Minimises an objective with AdamW under a warm-up and cosine schedule.

    Args:
        objective: ``forward(**batch)`` returns a scalar loss, the mean over the batch's images.
        batches: Called once with the number of images already seen; yields this worker's part of each step, as
            ``accumulation`` micro-batches a step. It must be a pure function of that number.
        num_images: Images to see in all, over all workers.
        batch_size: Images a step, over all workers and micro-batches.
        peak_lr: Learning rate after the warm-up.
        warmup_images: Images over which the rate rises linearly from 0.
        final_lr: Rate at the end of the cosine.
        weight_decay: AdamW's, on matrices only: biases, norms and embeddings of one dimension are not decayed.
        betas: AdamW's.
        clip_norm: Largest norm of the whole gradient; 0 does not clip.
        accumulation: Micro-batches a step.
        precision: Of the forward pass; ``bfloat16`` is autocast without ZeRO and DeepSpeed's bf16 with it.
        zero_stage: DeepSpeed ZeRO stage 0 to 3, or None for plain PyTorch in one process.
        device: ``cpu`` or ``cuda``; never chosen silently.
        seed: Seeds Python, NumPy and PyTorch before the first step.
        checkpoints: Where state is kept; None keeps none.
        checkpoint_every_images: Distance between checkpoints; 0 saves at the end only.
        on_progress: Called on the first worker about every ``progress_every_s`` seconds and at the end.
        progress_every_s: Seconds between calls of ``on_progress``.

    Returns:
        Images seen and the final loss, equal on every worker.

    Raises:
        NonFiniteLoss: If the loss is not finite; names the last good checkpoint.
        ConfigError: If the stream of batches ends early.
    """
    _seed_everything(seed)
    engine = _make_engine(
        objective,
        micro_batch_size=batch_size // (_world_size() * accumulation),
        accumulation=accumulation,
        peak_lr=peak_lr,
        weight_decay=weight_decay,
        betas=betas,
        clip_norm=clip_norm,
        precision=precision,
        zero_stage=zero_stage,
        device=device,
    )
    restored = (checkpoints.restore(engine) if checkpoints else None) or {"images_seen": 0, "losses": []}
    images_seen, losses = int(restored["images_seen"]), list(restored["losses"])
    last_checkpoint = f"at {images_seen:,} images" if images_seen else "none"
    num_steps = math.ceil(num_images / batch_size)
    if images_seen:
        log.info("continuing at %s of %s images", f"{images_seen:,}", f"{num_images:,}")
    stream = batches(images_seen) if images_seen < num_images else iter(())
    num_tail = max(1, num_steps // 20)
    waited_s, began_s, began_images, told_s = 0.0, time.monotonic(), images_seen, time.monotonic()
    for step in range(images_seen // batch_size, num_steps):
        learning_rate = learning_rate_at(
            step * batch_size,
            num_images=num_images,
            peak_lr=peak_lr,
            warmup_images=warmup_images,
            final_lr=final_lr,
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        step_loss = torch.zeros((), device=device)
        for _ in range(accumulation):
            waiting_since_s = time.monotonic()
            batch = next(stream, None)
            waited_s += time.monotonic() - waiting_since_s
            if batch is None:
                raise ConfigError(
                    f"the stream of photographs ended after {images_seen:,} images; {num_images:,} were asked for"
                )
            loss = engine(**{name: tensor.to(device) for name, tensor in batch.items() if name != "group"})
            engine.backward(loss)
            engine.step()
            step_loss += loss.detach().float() / accumulation
        mean_loss = _mean_over_workers(step_loss)
        if not math.isfinite(mean_loss):
            raise NonFiniteLoss(
                f"the loss is {mean_loss} after {images_seen:,} images at learning rate {learning_rate:.3g}; "
                f"last good checkpoint: {last_checkpoint}. Lower peak_lr, lengthen the warm-up or set clip_norm"
            )
        images_seen += batch_size
        losses = [*losses[-num_tail:], mean_loss]
        is_last = step + 1 == num_steps
        now_s = time.monotonic()
        if on_progress and _rank() == 0 and (is_last or now_s - told_s > progress_every_s):
            told_s = now_s
            on_progress(
                Progress(
                    images_seen=images_seen,
                    num_images=num_images,
                    loss=float(np.mean(losses[-max(1, num_steps // 50) :])),
                    learning_rate=learning_rate,
                    images_per_s=(images_seen - began_images) / max(now_s - began_s, 1e-9),
                    data_wait_share=waited_s / max(now_s - began_s, 1e-9),
                )
            )
        is_due = checkpoint_every_images and images_seen // checkpoint_every_images > (
            (images_seen - batch_size) // checkpoint_every_images
        )
        if checkpoints and (is_last or is_due):
            last_checkpoint = checkpoints.save(engine, images_seen=images_seen, losses=losses)
    return TrainingSummary(
        images_seen=images_seen, final_loss=float(np.mean(losses[-num_tail:])), weights=_whole_weights(engine)
    )


def learning_rate_at(
    images_seen: int, *, num_images: int, peak_lr: float, warmup_images: int, final_lr: float = 0.0
) -> float:
    """Returns the learning rate of the step that starts after ``images_seen`` images.

    Source: linear warm-up and half-cosine decay of the masked autoencoder (He et al., CVPR 2022, appendix A.1).
    """
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    progress = (images_seen - warmup_images) / max(1, num_images - warmup_images)
    return final_lr + (peak_lr - final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def peak_lr_for(batch_size: int, *, base_lr: float) -> float:
    """Scales a base rate, given for 256 images a step, linearly with the batch (Goyal et al., arXiv:1706.02677)."""
    return base_lr * batch_size / 256


class PlainEngine:
    """PyTorch in one process, behind the five methods of DeepSpeed's engine that `train` uses."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        accumulation: int,
        precision: str,
        device: str,
    ) -> None:
        self.module = objective
        self.optimizer = optimizer
        self._clip_norm, self._accumulation, self._num_micro_steps = clip_norm, accumulation, 0
        self._autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def __call__(self, **batch: Tensor) -> Tensor:
        with self._autocast:
            loss: Tensor = self.module(**batch)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradient, divided by the micro-batches of a step."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Takes a step after the last micro-batch, and does nothing before."""
        self._num_micro_steps += 1
        if self._num_micro_steps % self._accumulation:
            return
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save_checkpoint(self, folder: str, tag: str, client_state: Mapping[str, Any]) -> None:
        """Writes the trainable parameters, the buffers, the optimizer and ``client_state`` below ``folder``."""
        path = Path(folder) / tag / "state.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"objective": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"client_state": dict(client_state)}, path)
        (Path(folder) / "latest").write_text(tag)

    def load_checkpoint(self, folder: str) -> tuple[str, dict[str, Any]]:
        """Reads what `save_checkpoint` wrote; tensors and plain values only, never code."""
        path = Path(folder) / (Path(folder) / "latest").read_text() / "state.pt"
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        return str(path), state["client_state"]


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
        target = self._folder_path / _checkpoint_name(images_seen)
        partial = Path(tempfile.mkdtemp(dir=self._folder_path, prefix=".partial-"))
        engine.save_checkpoint(str(partial), tag="state", client_state={"images_seen": images_seen, "losses": losses})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for older in sorted(self._folder_path.glob("images_*"))[:-1]:
            shutil.rmtree(older)
        return target.name


class RayCheckpoints:
    """Keeps state through Ray Train: each worker uploads its part, and a save returns only once it is committed."""

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest committed checkpoint of this run, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            num_workers = json.loads((Path(folder) / _WORKERS_NAME).read_text())
            if num_workers != _world_size():
                raise ConfigError(
                    f"this run was begun with {num_workers} worker(s) and ZeRO's checkpoints are bound to that; found "
                    f"{_world_size()}. Continue with cluster.num_workers={num_workers}"
                )
            path, client_state = engine.load_checkpoint(folder)
        if path is None:
            raise StorageError(f"the checkpoint {checkpoint.path} holds no state; remove it and run the job again")
        return dict(client_state)

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        """Reports the state and waits until the controller has committed it.

        Without the wait a worker that dies within the controller's polling interval loses the checkpoint although its
        files are in storage (Ray 2.60; ray-project/ray#54555).
        """
        name = _checkpoint_name(images_seen)
        with storage.scratch_folder() as folder:
            engine.save_checkpoint(folder, tag="state", client_state={"images_seen": images_seen, "losses": losses})
            (Path(folder) / _WORKERS_NAME).write_text(json.dumps(_world_size()))
            ray.train.report(
                {"images_seen": images_seen, "loss": losses[-1]},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
            )
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
        return name


def run(
    worker: Callable[[dict[str, Any]], Any],
    worker_settings: dict[str, Any],
    *,
    run_uri: str,
    name: str,
    num_workers: int = 1,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    data_cpus: float = 0.0,
    autoscaling: bool = False,
    max_failures: int = 3,
    num_checkpoints_kept: int = 2,
) -> ray.train.Result:
    """Runs ``worker(worker_settings)`` on a Ray Train worker group, continuing an earlier run of the same name.

    Args:
        worker: A module-level function; it calls `train` with `RayCheckpoints`.
        worker_settings: Plain values for it.
        run_uri: The run's folder in the hub; checkpoints go to ``train/NAME`` below it.
        name: Stable for the same work: a run of an earlier process with this name is continued.
        num_workers: Worker processes.
        cpus_per_worker: CPUs that each one reserves.
        gpus_per_worker: GPUs that each one reserves.
        data_cpus: CPUs that must stay free for Ray Data; Train would otherwise starve its own input.
        autoscaling: Whether the cluster adds nodes on demand.
        max_failures: Restarts from the last committed checkpoint before giving up.
        num_checkpoints_kept: Older ones are removed.

    Raises:
        ConfigError: If the cluster can never hold the workers and the data tasks.
        ray.train.TrainingFailedError: If the worker failed more often than ``max_failures``.
    """
    check_resources(
        num_workers=num_workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        data_cpus=data_cpus,
        autoscaling=autoscaling,
    )
    opened, path = storage.filesystem(storage.join(run_uri, "train"))
    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=worker_settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=opened,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=num_checkpoints_kept),
            # The defaults of Ray 2.60 retry for ever; a run that cannot start must say so.
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures, controller_failure_limit=3, max_preemption_failures=100
            ),
        ),
    )
    return trainer.fit()


def check_resources(
    *,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float = 0.0,
    data_cpus: float = 0.0,
    autoscaling: bool = False,
) -> None:
    """Refuses a worker group that this cluster cannot hold: Ray would wait for it for ever.

    An autoscaling cluster is not refused: what it can grow to is not known here, and the start has a time limit.

    Raises:
        ConfigError: Naming what the cluster has, what is asked for, and which key to change.
    """
    if autoscaling:
        return
    available = ray.cluster_resources()
    required = {"CPU": num_workers * cpus_per_worker + data_cpus, "GPU": num_workers * gpus_per_worker}
    for resource, amount in required.items():
        if amount > available.get(resource, 0.0) + 1e-6:
            raise ConfigError(
                f"found {available.get(resource, 0.0):g} {resource}s in the cluster; required {amount:g} for "
                f"{num_workers} worker(s) and {data_cpus:g} data CPUs. Lower num_workers, cpus_per_worker or "
                "data_cpus, or add nodes"
            )


def _make_engine(
    objective: nn.Module,
    *,
    micro_batch_size: int,
    accumulation: int,
    peak_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    clip_norm: float,
    precision: str,
    zero_stage: int | None,
    device: str,
) -> Any:
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"found precision={precision!r}; required float32 or bfloat16")
    objective.to(device)
    groups = _parameter_groups(objective, weight_decay)
    if zero_stage is None:
        optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=betas, fused=device == "cuda")
        return PlainEngine(
            objective, optimizer, clip_norm=clip_norm, accumulation=accumulation, precision=precision, device=device
        )
    import deepspeed  # seconds to import, and of no use at a site

    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "optimizer": {
            "type": "AdamW",
            # torch's AdamW on CPU: DeepSpeed's own would be compiled for two minutes at the first start.
            "params": {
                "lr": peak_lr,
                "betas": list(betas),
                "torch_adam": device == "cpu",
                "weight_decay": weight_decay,
            },
        },
        "bf16": {"enabled": precision == "bfloat16"},
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(model=objective, model_parameters=groups, config=settings)
    return engine


def _whole_weights(engine: Any) -> dict[str, Tensor]:
    """Gathers every parameter in float32, sharded or not; every worker takes part, the first one keeps it."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        whole = None
        if not isinstance(engine, PlainEngine):
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
            if whole is None and hasattr(
                parameter, "ds_id"
            ):  # frozen under stage 3: sharded, but has no optimizer state
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
        if _rank() == 0:
            weights[name] = (parameter if whole is None else whole).detach().float().cpu().clone()
    return weights


def _parameter_groups(objective: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _checkpoint_name(images_seen: int) -> str:
    return f"images_{images_seen:015d}"


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _world_size() -> int:
    return torch.distributed.get_world_size() if _is_distributed() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0


def _mean_over_workers(loss: Tensor) -> float:
    if _is_distributed():
        torch.distributed.all_reduce(loss)
    return float(loss) / _world_size()
