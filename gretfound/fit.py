"""The one training loop, and the one way to run it on a Ray cluster.

An objective is an `nn.Module` whose ``forward(**batch)`` returns a scalar loss. It may have

- ``after_step(images_seen)``, called on every worker after each step, for a teacher that follows its student;
- ``learning_rate_scale(name)``, the factor of a parameter's learning rate, for layer-wise rules;
- ``image_losses``, a (B,) tensor that forward leaves behind, from which the loss of each group of images is told.

`train` runs it in this process (a site without Ray) or in each worker of a Ray Train run that `run` starts; DeepSpeed
ZeRO shards it where a stage is given. Progress and schedules are counted in images.
"""

import contextlib
import functools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gretfound import storage
from gretfound.errors import ConfigError, NonFiniteLoss

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]
# ZeRO makes its bucket of gradients anew in each step. DeepSpeed's default has 2 GB, which glibc hands back to the
# system in between; with this one a CPU's step takes no new pages (docs/log.md).
BUCKET_PARAMETERS = 2**26
NOT_FOR_OBJECTIVE = ("group", "label", "photograph_key")  # what a run is watched by
MAX_GROUPS = 1024  # sites times origins whose losses are told apart; any further ones share the last place


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One point of a run, handed to ``on_progress`` on the first worker only.

    ``gradient_norm`` is None where DeepSpeed keeps none (stage 0). ``flops_per_s`` counts the multiplications and
    additions of the forward pass three times, as is usual for a step, on all workers together. ``loss_by_group`` has,
    at every thirtieth point, the mean loss of each ``group`` of the first worker's batches since then;
    ``data_wait_share`` and ``images_per_s`` count from the end of this process's first step.
    """

    images_seen: int
    num_images: int
    loss: float
    learning_rate: float
    gradient_norm: float | None
    images_per_s: float
    data_wait_share: float
    flops_per_s: float
    loss_by_group: dict[int, float]

    def figures(self, group_names: Sequence[str] = ()) -> dict[str, float]:
        """Returns everything as one flat row for a tracker, the losses of groups as ``loss/NAME``."""
        flat = {name: value for name, value in asdict(self).items() if name != "loss_by_group" and value is not None}
        names = [*group_names[: MAX_GROUPS - 1], *(["others"] if len(group_names) >= MAX_GROUPS else [])]
        return flat | {f"loss/{names[code]}": loss for code, loss in self.loss_by_group.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What a finished run reports.

    ``final_loss`` is the mean over the last twentieth of the steps. ``weights`` holds the objective's parameters, whole
    and in float32, and its buffers, by name, on the first worker; it is empty on the others.
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
    final_weight_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    clip_norm: float = 0.0,
    accumulation: int = 1,
    precision: str = "float32",
    zero_stage: int | None = None,
    recomputes_activations: bool = False,
    device: str = "cpu",
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    checkpoint_every_images: int = 0,
    on_batch: Callable[[Batch], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    progress_every_s: float = 2.0,
) -> TrainingSummary:
    """Minimises an objective with AdamW under a warm-up and cosine schedule.

    Args:
        objective: ``forward(**batch)`` returns a scalar loss, the mean over the batch's images.
        batches: Called once with the number of images already seen; yields this worker's part of each step, as
            ``accumulation`` micro-batches a step. It must be a pure function of that number. Of a batch, the
            objective gets everything but `NOT_FOR_OBJECTIVE`.
        num_images: Images to see in all, over all workers.
        batch_size: Images a step, over all workers and micro-batches.
        peak_lr: Learning rate after the warm-up.
        warmup_images: Images over which the rate rises linearly from 0.
        final_lr: Rate at the end of the cosine.
        weight_decay: AdamW's, on matrices only: biases, norms and embeddings of one dimension are not decayed.
        final_weight_decay: Where the decay goes to on a cosine, as DINOv2 raises it; None keeps it.
        betas: AdamW's.
        clip_norm: Largest norm of the whole gradient; 0 does not clip.
        accumulation: Micro-batches a step.
        precision: ``float32``, or ``bfloat16`` for autocast in the forward pass; weights and their averages are always
            float32.
        zero_stage: DeepSpeed ZeRO stage 0 to 3, or None for plain PyTorch in one process.
        recomputes_activations: Whether each transformer block is computed anew in the backward pass, not kept.
        device: ``cpu`` or ``cuda``; never chosen silently.
        seed: Seeds Python, NumPy and PyTorch before the first step.
        checkpoints: Where state is kept; None keeps none.
        checkpoint_every_images: Distance between checkpoints; 0 saves at the end only.
        on_batch: Called on every worker with each micro-batch, whole, after its forward pass.
        on_progress: Called on the first worker about every ``progress_every_s`` seconds and at the end.
        progress_every_s: Seconds between calls of ``on_progress``.

    Returns:
        Images seen and the final loss, equal on every worker.

    Raises:
        NonFiniteLoss: If the loss is not finite; names the last good checkpoint.
        ConfigError: If the stream of batches ends early.
    """
    _seed_everything(seed)
    if recomputes_activations:
        _recompute_activations(objective)
    engine, rate_scales = _make_engine(
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
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    after_step: Callable[[int], None] | None = getattr(objective, "after_step", None)
    meter = _Meter(device, groups_every_s=30 * progress_every_s)
    for step in range(images_seen // batch_size, num_steps):
        share = step * batch_size / num_images
        learning_rate = learning_rate_at(
            step * batch_size,
            num_images=num_images,
            peak_lr=peak_lr,
            warmup_images=warmup_images,
            final_lr=final_lr,
        )
        for group, scale, decay in zip(engine.optimizer.param_groups, rate_scales, decays, strict=True):
            group["lr"] = learning_rate * scale
            if final_weight_decay is not None and decay:
                group["weight_decay"] = _cosine(weight_decay, final_weight_decay, share)
        for _ in range(accumulation):
            with meter.waiting():
                batch = next(stream, None)
            if batch is None:
                raise ConfigError(
                    f"the stream of photographs ended after {images_seen:,} images; {num_images:,} were asked for"
                )
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in NOT_FOR_OBJECTIVE}
            with meter.counting_flops(images=len(next(iter(inputs.values())))):
                loss = engine(**inputs)
            engine.backward(loss)
            engine.step()
            meter.add(loss.detach(), batch.get("group"), getattr(objective, "image_losses", None))
            if on_batch:
                on_batch(batch)
        mean_loss = meter.end_step(images=batch_size)
        if not math.isfinite(mean_loss):
            raise NonFiniteLoss(
                f"the loss is {mean_loss} after {images_seen:,} images at learning rate {learning_rate:.3g}; "
                f"last good checkpoint: {last_checkpoint}. Lower peak_lr, lengthen the warm-up or set clip_norm"
            )
        images_seen += batch_size
        if after_step:
            after_step(images_seen)
        losses = [*losses[-num_tail:], mean_loss]
        is_last = step + 1 == num_steps
        if on_progress and _rank() == 0 and (is_last or meter.since_told_s() > progress_every_s):
            on_progress(
                Progress(
                    images_seen=images_seen,
                    num_images=num_images,
                    loss=float(np.mean(losses[-max(1, num_steps // 50) :])),
                    learning_rate=learning_rate,
                    gradient_norm=_gradient_norm_of(engine),
                    **meter.tell(),
                )
            )
        is_due = checkpoint_every_images and images_seen // checkpoint_every_images > (
            (images_seen - batch_size) // checkpoint_every_images
        )
        if checkpoints and (is_last or is_due):
            last_checkpoint = checkpoints.save(engine, images_seen=images_seen, losses=losses)
    return TrainingSummary(
        images_seen=images_seen,
        final_loss=float(np.mean(losses[-num_tail:])),
        weights=_whole_weights(engine, objective),
    )


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# torch 2.14's counter knows the fused attention of GPUs only.
_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _Meter:
    """Counts what `Progress` tells: time, waiting, losses over all workers, floating-point operations."""

    def __init__(self, device: str, *, groups_every_s: float) -> None:
        self._device, self._groups_every_s = device, groups_every_s
        self._began_s = self._told_s = self._groups_told_s = time.monotonic()
        self._waited_s, self._images, self._num_steps, self._flops_per_image = 0.0, 0, 0, 0.0
        self._step = torch.zeros(2, device=device)  # the sum and the number of this step's micro-batches' losses
        self._groups = torch.zeros(2, MAX_GROUPS, device=device)  # sums and counts since they were told

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        since_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - since_s

    @contextlib.contextmanager
    def counting_flops(self, *, images: int) -> Iterator[None]:
        if self._flops_per_image:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
            yield
        self._flops_per_image = 3.0 * max(counter.get_total_flops(), 1) / images

    def add(self, loss: Tensor, group: Tensor | None, image_losses: Tensor | None) -> None:
        self._step += torch.stack([loss.float(), torch.ones((), device=self._device)])
        if group is not None and image_losses is not None:
            code = group.to(self._device).clamp(max=MAX_GROUPS - 1)
            self._groups[0].index_add_(0, code, image_losses.detach().float())
            self._groups[1].index_add_(0, code, torch.ones_like(image_losses, dtype=torch.float32))

    def end_step(self, *, images: int) -> float:
        """Returns the step's mean loss over all workers."""
        if _is_distributed():
            torch.distributed.all_reduce(self._step)
        mean = float(self._step[0] / self._step[1])
        self._step.zero_()
        self._num_steps += 1
        if self._num_steps == 1:  # start-up is over
            self._began_s, self._waited_s = time.monotonic(), 0.0
        else:
            self._images += images
        return mean

    def since_told_s(self) -> float:
        return time.monotonic() - self._told_s

    def tell(self) -> dict[str, Any]:
        now_s = self._told_s = time.monotonic()
        duration_s = max(now_s - self._began_s, 1e-9)
        loss_by_group: dict[int, float] = {}
        if now_s - self._groups_told_s > self._groups_every_s:
            sums, counts = self._groups.cpu().clone()
            loss_by_group = {code: float(sums[code] / counts[code]) for code in counts.nonzero().flatten().tolist()}
            self._groups.zero_()
            self._groups_told_s = now_s
        return {
            "images_per_s": self._images / duration_s,
            "data_wait_share": min(1.0, self._waited_s / duration_s),
            "flops_per_s": self._images / duration_s * self._flops_per_image,
            "loss_by_group": loss_by_group,
        }


def learning_rate_at(
    images_seen: int, *, num_images: int, peak_lr: float, warmup_images: int, final_lr: float = 0.0
) -> float:
    """Returns the learning rate of the step that starts after ``images_seen`` images.

    Source: linear warm-up and half-cosine decay of the masked autoencoder (He et al., CVPR 2022, appendix A.1).
    """
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    return _cosine(peak_lr, final_lr, (images_seen - warmup_images) / max(1, num_images - warmup_images))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def peak_lr_for(batch_size: int, *, base_lr: float, scaling: str = "linear") -> float:
    """Scales a base rate to the batch.

    Source: ``linear``, for 256 images a step, is Goyal et al., arXiv:1706.02677, as MAE and RETFound take it; ``sqrt``,
    for 1,024 images a step, is DINOv2's.
    """
    match scaling:
        case "linear":
            return base_lr * batch_size / 256
        case "sqrt":
            return base_lr * math.sqrt(batch_size / 1024)
        case _:
            raise ValueError(f"found scaling={scaling!r}; required linear or sqrt")


class PlainEngine:
    """PyTorch in one process, behind the methods of DeepSpeed's engine that `train` uses."""

    def __init__(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float, accumulation: int
    ) -> None:
        self.module = objective
        self.optimizer = optimizer
        self._clip_norm, self._accumulation, self._num_micro_steps = clip_norm, accumulation, 0
        self._gradient_norm = torch.zeros(())

    def __call__(self, **batch: Tensor) -> Tensor:
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
        self._gradient_norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def get_global_grad_norm(self) -> float:
        """Returns the norm of the last step's gradient, before clipping."""
        return float(self._gradient_norm)

    def save_checkpoint(self, folder: str, tag: str, client_state: Mapping[str, Any]) -> None:
        """Writes the parameters, the buffers, the optimizer and ``client_state`` below ``folder``."""
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


def run(
    worker: Callable[[dict[str, Any]], Any],
    worker_settings: dict[str, Any],
    *,
    run_uri: str,
    name: str,
    num_workers: int = 1,
    min_workers: int = 0,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    data_cpus: float = 0.0,
    autoscaling: bool = False,
    max_failures: int = 3,
    num_checkpoints_kept: int = 2,
) -> ray.train.Result:
    """Runs ``worker(worker_settings)`` on a Ray Train worker group, continuing an earlier run of the same name.

    Args:
        worker: A module-level function; it calls `train` with `checkpoints.RayCheckpoints`.
        worker_settings: Plain values for it.
        run_uri: The run's folder in the hub; checkpoints go to `train_uri` in it.
        name: Stable for the same work: a run of an earlier process with this name is continued.
        num_workers: Worker processes.
        min_workers: The run goes on with as few as these when nodes are lost, and grows again; 0 keeps the number.
        cpus_per_worker: CPUs that each one reserves.
        gpus_per_worker: GPUs that each one reserves.
        data_cpus: CPUs that must stay free for Ray Data; Train would otherwise starve its own input.
        autoscaling: Whether the cluster adds nodes on demand.
        max_failures: Restarts from the last committed checkpoint before giving up.
        num_checkpoints_kept: Older ones are removed.

    Raises:
        ConfigError: If the cluster can never hold the workers and the data tasks.
        NonFiniteLoss: If training diverged; it is not restarted, since it would diverge again.
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

    def returning_divergence(settings: dict[str, Any]) -> Any:
        try:
            return worker(settings)
        except NonFiniteLoss as error:  # on every worker alike; raised, it would count as a failure to recover from
            return error

    trainer = ray.train.torch.TorchTrainer(
        returning_divergence,
        train_loop_config=worker_settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(min_workers, num_workers) if min_workers else num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker=resources,
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
    result = trainer.fit()
    if isinstance(result.return_value, NonFiniteLoss):
        raise result.return_value
    return result


def train_uri(run_uri: str, name: str) -> str:
    """Returns the folder in which the Ray Train run ``name`` keeps its checkpoints."""
    return storage.join(run_uri, "train", name)


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


def _recompute_activations(objective: nn.Module) -> None:
    """Makes timm's transformer blocks forget what they computed until the backward pass needs it."""
    from timm.models.vision_transformer import Block  # seconds to import, and of no use to a driver or a generator

    for module in objective.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(  # type: ignore[method-assign]
                torch.utils.checkpoint.checkpoint,
                module.forward,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _Float32Attention()),
            )


class _Float32Attention(TorchFunctionMode):
    """Computes attention in float32 under a CPU's bfloat16 autocast.

    Fused attention of torch 2.14 takes 2 to 15 times longer for a backward pass in bfloat16 than in float32 on a CPU
    (docs/log.md), and it is more exact this way. On a GPU nothing changes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if tensors[0].device.type != "cpu":
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            attended = func(*map(_in_float32, args), **{name: _in_float32(each) for name, each in kwargs.items()})
        return attended.to(tensors[0].dtype)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Autocast(nn.Module):
    """An objective whose forward pass runs in bfloat16 where that is safe, with weights in float32.

    DeepSpeed's own bfloat16 mode keeps the weights themselves in bfloat16, in which a teacher's moving average stands
    still; plain PyTorch and every ZeRO stage use this instead, and so compute the same.
    """

    def __init__(self, objective: nn.Module, device: str) -> None:
        super().__init__()
        self.objective, self._device = objective, device

    def forward(self, **batch: Tensor) -> Tensor:
        with torch.autocast(self._device, dtype=torch.bfloat16), _Float32Attention():
            loss: Tensor = self.objective(**batch)
        return loss.float()


def _gradient_norm_of(engine: Any) -> float | None:
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


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
) -> tuple[Any, list[float]]:
    """Returns an engine around the objective, and the learning-rate scale of each of its parameter groups."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"found precision={precision!r}; required float32 or bfloat16")
    objective.to(device)
    groups, rate_scales = _parameter_groups(objective, weight_decay)
    module = _Autocast(objective, device) if precision == "bfloat16" else objective
    if zero_stage is None:
        optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=betas, fused=True)
        return PlainEngine(module, optimizer, clip_norm=clip_norm, accumulation=accumulation), rate_scales
    import deepspeed  # seconds to import, and of no use at a site
    import deepspeed.ops

    # DeepSpeed 0.19 compiles its own all-reduce for CPUs at the first start on a machine: a minute, and a compiler is
    # needed; gloo does the same. To be removed when it can be switched off by configuration.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "optimizer": {
            "type": "AdamW",
            # torch's AdamW: DeepSpeed's own are compiled at the first start, for which the hub's image has no compiler.
            "params": {
                "lr": peak_lr,
                "betas": list(betas),
                "torch_adam": True,
                "fused": True,
                "weight_decay": weight_decay,
            },
        },
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": BUCKET_PARAMETERS},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=settings)
    return engine, rate_scales


def _whole_weights(engine: Any, objective: nn.Module) -> dict[str, Tensor]:
    """Gathers every parameter in float32, sharded or not; every worker takes part, the first one keeps it.

    Buffers that belong to the state come as they are.
    """
    parameter_names = {name for name, _ in objective.named_parameters()}
    state = objective.state_dict() if _rank() == 0 else {}
    weights = {name: value.detach().cpu().clone() for name, value in state.items() if name not in parameter_names}
    for name, parameter in objective.named_parameters():
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


def _parameter_groups(objective: nn.Module, weight_decay: float) -> tuple[list[dict[str, Any]], list[float]]:
    """Groups the trainable parameters by their learning-rate scale and by whether they decay."""
    scale_of = getattr(objective, "learning_rate_scale", lambda _: 1.0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            key = (float(scale_of(name)), weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    return (
        [{"params": parameters, "weight_decay": decay} for (_, decay), parameters in groups.items()],
        [scale for scale, _ in groups],
    )


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
