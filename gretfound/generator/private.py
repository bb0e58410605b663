"""Fine-tuning a generator with differential privacy for each patient: DP-SGD on low-rank factors of its attention.

What leaves of a run tells nearly the same whether a patient was in it or not, by the epsilon and delta of its ledger.
A step takes each patient with the same small probability (Poisson sampling), one random photograph of each, and clips
what all photographs of that patient together change; noise is added to the sum. Opacus clips, adds noise and keeps the
account; what this room adds is the patient as the unit, several noisings of a photograph within one gradient, and a
ledger that is checkpointed with the weights, without which no run goes on.

The guarantee is about the adapter. Losses are those of patients, so none is told; the metadata summary follows its own
rules (`gretfound.disclosure`) and has no epsilon.

Source: Abadi et al. 2016 (arXiv:1607.00133), algorithm 1; noise multiplicity: Dockhorn et al. 2023 (arXiv:2210.09929),
section 3.2; Poisson sampling and the account: Gopi et al. 2021 (arXiv:2106.02848).

Shapes: P patients of a step, K noisings of each, I patients in all.
"""

import json
import math
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gretfound import averaging, lineage, storage
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.generator import adapter, denoising, families, finetune, latents, pipeline
from gretfound.generator.latents import EncodedPhotographs
from gretfound.generator.spending import LEDGER_NAME, Ledger, tier_of
from gretfound.generator.squares import Square

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
STATE_NAME = "state.safetensors"
PATIENTS_AT_ONCE = 8
NUM_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class Private:
    """A finished private training: the adapter's folder, and its ledger, which lies beside it."""

    adapter_path: Path
    ledger_path: Path


def delta_for(num_patients: int) -> float:
    """Returns 1 / (10 patients), rounded down to two digits: smaller is stricter."""
    return _two_digits(1 / (10 * num_patients), math.floor)


def sample_rate_for(batch_size: int, num_items: int) -> float:
    """Returns the probability that a step takes a patient, rounded up to two digits."""
    return min(1.0, _two_digits(batch_size / num_items, math.ceil))


def _two_digits(value: float, rounded: Callable[[float], int]) -> float:
    digits = 1 - math.floor(math.log10(value))
    return float(rounded(round(value * 10.0**digits, 6)) / 10.0**digits)


def epsilon_spent(history: Sequence[tuple[float, float, int]], *, delta: float) -> float:
    """Returns the epsilon that a history comes to, an upper bound by PRV accounting; 0 for an empty one."""
    if not history:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = list(history)
    with _quiet():
        return float(accountant.get_epsilon(delta))


def noise_multiplier_for(*, epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Returns the least noise, over the clipping norm, with which so many steps spend at most ``epsilon``."""
    with _quiet():
        found = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=num_steps,
            accountant="prv",
            epsilon_tolerance=epsilon / 100,
        )
    return float(found)


@contextmanager
def _quiet() -> Iterator[None]:
    # Opacus 1.6 sizes its grid with a Renyi bound, whose warning that the bound is loose is about the grid alone, and
    # takes logarithms in both branches of numpy.where.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="divide by zero encountered in log", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        yield


def require_ledger_adds_up(ledger: Ledger) -> None:
    """Computes anew what a package's ledger has spent.

    Raises:
        ContributionRejected: ``DP_LEDGER`` if its history spends more than it says, or something else.
    """
    found = epsilon_spent(ledger.history, delta=ledger.delta) if ledger.history else math.inf
    if found > ledger.claimed_epsilon or abs(found - ledger.epsilon) > 1e-6:
        raise ContributionRejected(
            "DP_LEDGER",
            f"the ledger claims an epsilon of {ledger.claimed_epsilon:g}, its history comes to {found:.4g}; report it",
        )


def finetune_privately(
    *,
    base_path: Path,
    shard_path: Path,
    work_path: Path,
    epsilon: float,
    num_images_seen: int,
    batch_size: int,
    learning_rate: float,
    lora_rank: int = 8,
    num_noisings: int = 8,
    clip_norm: float = 1e-3,
    caption_dropout: float = 0.1,
    average_decay: float = 0.9999,
    left_out: Collection[str] = (),
    canaries: Sequence[Square] = (),
    seed: int = 0,
    device: str = "cpu",
    checkpoint_every_steps: int = 50,
    on_progress: Callable[[int], object] | None = None,
) -> Private:
    """Fine-tunes a base's attention on a site's patients, each protected by epsilon; called again, it goes on.

    Noise and sampling are drawn from the operating system's randomness through torch's generators, whose state stays
    in the checkpoint. They are no cryptographic generators and floating-point noise is not exact, as in Opacus without
    its ``secure_mode``, which needs a library that is no longer maintained (torchcsprng).

    Args:
        base_path: A trusted diffusers folder.
        shard_path: A folder of local Parquet shards whose rows name the patient.
        work_path: Where checkpoints and the result lie; they hold secrets, and stay at the site.
        epsilon: What is claimed.
        num_images_seen: Patients' photographs to train on, as expected: steps times ``batch_size``.
        batch_size: Patients a step, as expected.
        learning_rate: Adam's, constant.
        lora_rank: Rank of the factors.
        num_noisings: Times and noises of a photograph in one gradient; they cost time and no privacy.
        clip_norm: Largest norm of a patient's gradient. It is small, so that nearly all are clipped: Adam does not see
            the scale, and a clipping norm chosen on the data would have to be paid for.
        caption_dropout: Share of the noisings that see the empty caption.
        average_decay: Of the moving average of the weights, which becomes the adapter, per step.
        left_out: Image ids of the photographs that are not trained on.
        canaries: Drawn squares of any size that are learned like patients of one photograph.
        seed: Of the factors, times and noisings of photographs; never of what protects patients.
        device: ``cpu`` or ``cuda``.
        checkpoint_every_steps: Distance between checkpoints.
        on_progress: Told the photographs seen.

    Raises:
        ConfigError: If a photograph has no patient, epsilon is none, a factor was not trained, or a ledger is missing.
    """
    tier = tier_of(epsilon)
    base_sha256 = pipeline.denoiser_sha256(base_path)
    shards = {storage.sha256_of(path): path for path in sorted(shard_path.glob("*.parquet"))}
    request = lineage.digest_of(
        [base_sha256, [*shards], epsilon, num_images_seen, batch_size,
         learning_rate, lora_rank, num_noisings, clip_norm, caption_dropout, average_decay,
         sorted(left_out), finetune.digests_of(canaries), seed]
    )  # fmt: skip
    run_path = work_path / f"private-{request[:16]}"
    finished = Private(adapter_path=run_path / "adapter", ledger_path=run_path / LEDGER_NAME)
    if finished.adapter_path.is_dir():
        return finished
    base = pipeline.load_pipeline(base_path, device=device)
    denoiser, side_px = families.denoiser_of(base), families.native_px(base)
    patients = _places_of_patients(shards.values(), left_out)
    num_photographs = sum(map(len, patients))
    patients += [torch.tensor([num_photographs + place]) for place in range(len(canaries))]
    caches = finetune.encoded(
        base, base_path, shards, canaries, resolution_px=side_px, folder_path=work_path / "latents"
    )
    photographs = latents.lay_out(caches, run_path / "rows", left_out=left_out)
    if photographs.num_images != num_photographs + len(canaries):
        raise ConfigError("a photograph cannot be read, so it is not known whose is whose; take it out of traindata")
    num_patients = len(patients) - len(canaries)
    delta = delta_for(num_patients)
    sample_rate = sample_rate_for(batch_size, len(patients))
    num_steps = max(1, round(num_images_seen / batch_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.add_lora(denoiser, rank=lora_rank, alpha=lora_rank, target_modules=TARGET_MODULES)
    run = _Run(
        denoiser=denoiser,
        noise_multiplier=noise_multiplier_for(
            epsilon=epsilon, delta=delta, sample_rate=sample_rate, num_steps=num_steps
        ),
        sample_rate=sample_rate,
        clip_norm=clip_norm,
        batch_size=batch_size,
        learning_rate=learning_rate,
        device=device,
    )
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}

    def ledger() -> Ledger:
        spent = epsilon_spent(run.accountant.history, delta=delta)
        history = tuple((float(sigma), float(rate), int(steps)) for sigma, rate, steps in run.accountant.history)
        return Ledger(
            claimed_epsilon=epsilon, epsilon=spent, delta=delta, tier=tier, clip_norm=clip_norm, history=history
        )

    checkpoints_path = run_path / "checkpoints"
    run.restore(checkpoints_path)
    objective = denoising.DenoisingObjective(
        denoiser=run.module,
        scheduler=base.scheduler,
        captions=denoising.EncodedCaptions(photographs.empty_text),
        caption_dropout=caption_dropout,
        seed=seed,
    ).to(device)
    for step in range(run.num_steps, num_steps):
        run.step(objective, photographs, patients, num_noisings=num_noisings)
        decay = min(average_decay, (1 + step) / (10 + step))
        averaging.follow(run.averages.values(), run.weights.values(), decay=decay)
        is_last = step + 1 == num_steps
        if is_last or (step + 1) % checkpoint_every_steps == 0:
            run.save(checkpoints_path, ledger())
        if on_progress is not None:
            on_progress((step + 1) * batch_size)
    require_all_moved(before, run.weights)
    account = ledger()
    if account.epsilon > epsilon:
        raise ConfigError(f"the training spent an epsilon of {account.epsilon:.4f}; allowed were {epsilon:g}")
    storage.write_bytes(str(finished.ledger_path), account.to_bytes())
    terms = adapter.AdapterTerms(
        method="lora",
        rank=lora_rank,
        alpha=float(lora_rank),
        target_modules=TARGET_MODULES,
        base_sha256=base_sha256,
        resolution_px=side_px,
        images_seen=num_steps * batch_size,
        final_loss=0.0,
    )
    tensors = pipeline.adapter_tensors({name: weight.data for name, weight in run.averages.items()}, method="lora")
    pipeline.save_adapter(finished.adapter_path, tensors=tensors, terms=terms)
    return finished


def _places_of_patients(shards: Iterable[Path], left_out: Collection[str]) -> list[Tensor]:
    """Returns the places of each patient's photographs in the order of the shards.

    Raises:
        ConfigError: If a photograph has no patient.
    """
    unwanted = frozenset(left_out)
    names = [name for image_id, name in finetune.read_patients(list(shards)) if image_id not in unwanted]
    if num_unknown := sum(not name for name in names):
        raise ConfigError(
            f"{num_unknown} photograph(s) have no patient; required for --dp-epsilon, which protects patients: fill "
            "the column Patient, or take these photographs out"
        )
    owner_I = np.unique([str(name) for name in names], return_inverse=True)[1]
    return [torch.from_numpy(np.flatnonzero(owner_I == owner)) for owner in range(int(owner_I.max(initial=-1)) + 1)]


def require_all_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Requires that a training has changed every factor: one that it missed has no noise either.

    Raises:
        ConfigError: If one is as it was.
    """
    still = [name for name, weight in after.items() if torch.equal(weight.detach(), before[name])]
    if still or not after:
        raise ConfigError(
            f"{len(still)} of {len(after)} low-rank factors were not trained, the first is {next(iter(still), None)}; "
            "this base does not fit a private training"
        )


class _Run:
    """The state of a private training: weights, their averages, Adam, two generators and the account."""

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        noise_multiplier: float,
        sample_rate: float,
        clip_norm: float,
        batch_size: int,
        learning_rate: float,
        device: str,
    ) -> None:
        self.sample_rate, self._device = sample_rate, device
        self.weights = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
        self.averages = {
            name: nn.Parameter(weight.detach().clone(), requires_grad=False) for name, weight in self.weights.items()
        }
        self.module = GradSampleModule(denoiser, loss_reduction="mean")
        self.accountant = PRVAccountant()
        self._sampling = torch.Generator().manual_seed(secrets.randbits(63))
        self._noise = torch.Generator(device=device).manual_seed(secrets.randbits(63))
        adam = torch.optim.Adam(self.weights.values(), lr=learning_rate)
        self._optimizer = DPOptimizer(
            adam,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=batch_size,
            generator=self._noise,
        )
        self._optimizer.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate))

    @property
    def num_steps(self) -> int:
        """Steps that the account knows."""
        return sum(steps for _, _, steps in self.accountant.history)

    def step(
        self,
        objective: nn.Module,
        photographs: EncodedPhotographs,
        patients: Sequence[Tensor],
        *,
        num_noisings: int,
    ) -> None:
        """Takes one step of DP-Adam, a few patients at a time, so that memory does not follow the sample."""
        taken_P = torch.nonzero(torch.rand(len(patients), generator=self._sampling) < self.sample_rate).flatten()
        blocks = torch.split(taken_P, PATIENTS_AT_ONCE) if len(taken_P) else (taken_P,)
        first = self.num_steps * len(patients)
        for place, block_P in enumerate(blocks):
            self._optimizer.zero_grad()
            self._fill_gradients(objective, photographs, patients, block_P, first, num_noisings)
            self._optimizer.signal_skip_step(do_skip=place + 1 < len(blocks))
            self._optimizer.step()
        self._optimizer.zero_grad()

    def _fill_gradients(
        self,
        objective: nn.Module,
        photographs: EncodedPhotographs,
        patients: Sequence[Tensor],
        block_P: Tensor,
        first: int,
        num_noisings: int,
    ) -> None:
        if not len(block_P):  # a step that took nobody adds its noise all the same
            for weight in self.weights.values():
                weight.grad_sample = weight.new_zeros((0, *weight.shape))  # type: ignore[attr-defined]
            return
        chosen = [patients[patient] for patient in block_P.tolist()]
        photograph_P = torch.stack([own[self._draw(len(own))] for own in chosen])
        view_P = torch.stack([self._draw(2) for _ in chosen])
        position_PK = (first + block_P)[:, None] * num_noisings + torch.arange(num_noisings)
        row_P = latents.NUM_VIEWS * photograph_P + view_P
        latents_PCHW = photographs.latents[row_P]
        text_PLD = photographs.text[photographs.caption_numbers[row_P, 0]]
        with warnings.catch_warnings():
            # Opacus 1.6 hooks modules whose inputs need no gradient, as the first layer's latents; torch says so.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            loss = objective(
                latents_BCHW=latents_PCHW.repeat_interleave(num_noisings, 0).to(self._device),
                caption=text_PLD.repeat_interleave(num_noisings, 0).to(self._device),
                position_B=position_PK.flatten(),
            )
            loss.backward()
        for weight in self.weights.values():
            rows = weight.grad_sample  # type: ignore[attr-defined]
            weight.grad_sample = rows.reshape(len(chosen), num_noisings, *weight.shape).mean(1)  # type: ignore[attr-defined]

    def _draw(self, num: int) -> Tensor:
        return torch.randint(num, (), generator=self._sampling)

    def save(self, folder_path: Path, ledger: Ledger) -> None:
        """Writes a checkpoint: state and ledger in one folder, which appears whole or not at all."""
        path = folder_path / f"step-{self.num_steps:08d}"
        partial = folder_path / f".{path.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(self._state(), partial / STATE_NAME)
        entry = {"state_sha256": storage.sha256_of(partial / STATE_NAME), "ledger": ledger.model_dump(mode="json")}
        (partial / LEDGER_NAME).write_bytes(lineage.canonical_json(entry))
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        for old_path in sorted(folder_path.glob("step-*"))[:-NUM_CHECKPOINTS]:
            shutil.rmtree(old_path)

    def restore(self, folder_path: Path) -> None:
        """Takes up the newest checkpoint, if there is one.

        Raises:
            ConfigError: If its ledger is missing or of other weights: nobody knows then what was spent.
        """
        paths = sorted(folder_path.glob("step-*"))
        if not paths:
            return
        try:
            entry = json.loads((paths[-1] / LEDGER_NAME).read_bytes())
            ledger = Ledger.model_validate_json(json.dumps(entry["ledger"]))
            is_whole = entry["state_sha256"] == storage.sha256_of(paths[-1] / STATE_NAME)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _without_ledger(paths[-1], f"cannot be read ({type(error).__name__})") from error
        if not is_whole or paths[-1].name != f"step-{sum(steps for _, _, steps in ledger.history):08d}":
            raise _without_ledger(paths[-1], "belongs to other weights")
        self.accountant.history = list(ledger.history)
        state = load_file(paths[-1] / STATE_NAME)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[f"weight/{name}"])
                self.averages[name].copy_(state[f"average/{name}"])
                self._adam_state[weight] = {
                    "step": torch.tensor(float(self.num_steps)),
                    "exp_avg": state[f"first/{name}"].to(self._device),
                    "exp_avg_sq": state[f"second/{name}"].to(self._device),
                }
        self._sampling.set_state(state["sampling"])
        self._noise.set_state(state["noise"])

    def _state(self) -> dict[str, Tensor]:
        state = {"sampling": self._sampling.get_state(), "noise": self._noise.get_state()}
        for name, weight in self.weights.items():
            state[f"weight/{name}"] = weight.detach()
            state[f"average/{name}"] = self.averages[name].detach()
            state[f"first/{name}"] = self._adam_state[weight]["exp_avg"]
            state[f"second/{name}"] = self._adam_state[weight]["exp_avg_sq"]
        return {name: tensor.contiguous().cpu() for name, tensor in state.items()}

    @property
    def _adam_state(self) -> Any:
        return self._optimizer.original_optimizer.state


def _without_ledger(path: Path, found: str) -> ConfigError:
    return ConfigError(
        f"the ledger {LEDGER_NAME} of the checkpoint {path.name} {found}; without it nobody knows what privacy the "
        "training has spent: put it back from a copy, or remove the work folder to begin anew"
    )
