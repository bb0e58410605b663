"""Private fine-tuning: the account against another library, clipped gradients against a loop, what is refused."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from safetensors.torch import load_file
from torch import Tensor, nn

from gretfound import shard, signing
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.gate import canaries
from gretfound.generator import adapter, denoising, private, spending
from gretfound.generator.latents import EncodedPhotographs
from tests import tiny_generator

SETTINGS: dict[str, Any] = {
    "epsilon": 3.0, "num_images_seen": 12, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 2, "num_noisings": 2,
    "checkpoint_every_steps": 1,
}  # fmt: skip


class _Killed(Exception):
    pass


class _Mixer(nn.Module):
    """The smallest denoiser: two matrices over the channels, called as diffusers calls a UNet."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(num_channels, 24, bias=False), nn.Linear(24, num_channels, bias=False)

    def forward(self, x_BCHW: Tensor, time_B: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool) -> Any:
        text_B111 = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        mixed = self.second(torch.tanh(self.first(x_BCHW.movedim(1, -1)) + text_B111))
        return (mixed.movedim(-1, 1),)


def _mixing(
    num_patients: int, denoiser: nn.Module | None = None, **changes: Any
) -> tuple[Any, nn.Module, EncodedPhotographs, list[Tensor]]:
    torch.manual_seed(0)
    denoiser = denoiser or _Mixer(4)
    terms: dict[str, Any] = {
        "noise_multiplier": 0.0, "sample_rate": 1.0, "clip_norm": 0.05, "batch_size": 7, "learning_rate": 1e-3,
        "device": "cpu",
    }  # fmt: skip
    run = private._Run(denoiser=denoiser, **(terms | changes))
    scheduler = SimpleNamespace(
        config=SimpleNamespace(prediction_type="epsilon"), alphas_cumprod=torch.linspace(0.999, 0.01, 100)
    )
    objective = denoising.DenoisingObjective(
        denoiser=run.module, scheduler=scheduler, captions=denoising.EncodedCaptions(torch.randn(3, 5)), seed=1
    )
    latents_NCHW = torch.randn(num_patients, 4, 6, 6) * torch.linspace(0.1, 3, num_patients).view(-1, 1, 1, 1)
    photographs = EncodedPhotographs(
        latents=latents_NCHW.repeat_interleave(2, 0),  # both views alike: a coin chooses
        text=torch.randn(1, 3, 5),
        captions=("a",),
        caption_numbers=torch.zeros(2 * num_patients, 1, dtype=torch.long),
    )
    return run, objective, photographs, [torch.tensor([place]) for place in range(num_patients)]


class _Memory(nn.Module):
    """A denoiser that can learn single photographs by heart: every number of the output sees all of the input."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(num_items + 1, 256), nn.Linear(256, num_items)

    def forward(self, x_BCHW: Tensor, time_B: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool) -> Any:
        seen = torch.cat([x_BCHW.flatten(1), time_B[:, None] / 100], 1)
        return (self.second(torch.relu(self.first(seen))).view_as(x_BCHW),)


def _gradients(run: Any) -> dict[str, Tensor]:
    """Returns the gradients of a first step, which Adam's first moment holds a tenth of."""
    return {name: run._adam_state[weight]["exp_avg"] / 0.1 for name, weight in run.weights.items()}


@pytest.mark.parametrize("clip_norm", [0.05, 1e3])
def test_step__sums_what_each_patients_noisings_change_together_clipped(clip_norm: float) -> None:
    num_patients, num_noisings = private.PATIENTS_AT_ONCE + 3, 4
    run, objective, photographs, patients = _mixing(num_patients, clip_norm=clip_norm)
    unet = _Mixer(4)
    unet.load_state_dict({name: weight.detach().clone() for name, weight in run.weights.items()})
    required = {name: torch.zeros_like(weight) for name, weight in unet.named_parameters()}
    plain = denoising.DenoisingObjective(
        denoiser=unet,
        scheduler=SimpleNamespace(
            config=SimpleNamespace(prediction_type="epsilon"), alphas_cumprod=objective.signal_T.square()
        ),
        captions=objective.captions,
        seed=1,
    )
    num_clipped = 0
    for patient in range(num_patients):
        loss = plain(
            photographs.latents[2 * patient].expand(num_noisings, -1, -1, -1),
            photographs.text.expand(num_noisings, -1, -1),
            patient * num_noisings + torch.arange(num_noisings),
        )
        own = dict(zip(required, torch.autograd.grad(loss, list(unet.parameters())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in own.values()))
        num_clipped += norm > clip_norm
        for name, gradient in own.items():
            required[name] += gradient * min(1.0, clip_norm / norm) / 7
    assert (num_clipped > 2) == (clip_norm < 1)
    run.step(objective, photographs, patients, num_noisings=num_noisings)
    for name, found in _gradients(run).items():
        torch.testing.assert_close(found, required[name], rtol=1e-3, atol=1e-6)
    assert run.num_steps == 1


def test_step__a_step_that_takes_nobody_adds_the_same_noise() -> None:
    run, objective, photographs, patients = _mixing(5, sample_rate=1e-12, noise_multiplier=2.0)
    run.step(objective, photographs, patients, num_noisings=2)
    noise = torch.cat([gradient.flatten() for gradient in _gradients(run).values()])
    assert noise.std().item() == pytest.approx(2.0 * 0.05 / 7, rel=0.2)
    assert run.accountant.history == [(2.0, 1e-12, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("is_noise_lost", [True, False])
def test_step__lost_noise_is_found_by_canaries(is_noise_lost: bool) -> None:
    num_canaries, num_steps, epsilon, delta = 40, 150, 1.0, 1e-4
    is_in = canaries.toss(canaries.coin_secret_of(b"k" * 32, "case 6"), num_canaries)
    promised = private.noise_multiplier_for(epsilon=epsilon, delta=delta, sample_rate=0.5, num_steps=num_steps)
    torch.manual_seed(1)
    run, objective, photographs, places = _mixing(
        num_canaries,
        denoiser=_Memory(4 * 6 * 6),
        noise_multiplier=0.0 if is_noise_lost else promised,
        sample_rate=0.5,
        batch_size=10,
        learning_rate=3e-3,
    )
    trials = [(time, torch.randn(4, 6, 6)) for time in (10, 20, 30, 40) for _ in range(4)]

    def errors() -> Tensor:
        text_NLD = photographs.text.expand(num_canaries, -1, -1)
        with torch.no_grad():
            found = [
                objective.errors(
                    photographs.latents[::2],
                    text_NLD,
                    torch.full((num_canaries,), time),
                    noise.expand(num_canaries, -1, -1, -1),
                )
                for time, noise in trials
            ]
        return torch.stack(found).mean(0)

    before = errors()
    learned = [places[place] for place in np.flatnonzero(is_in)]
    for _ in range(num_steps):
        run.step(objective, photographs, learned, num_noisings=4)
    found = canaries.check((before - errors()).numpy(), is_in, claimed_epsilon=epsilon, delta=delta)
    assert found.verdict == ("FAIL" if is_noise_lost else "PASS")
    assert found.reason.startswith("DP bug") == is_noise_lost


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [(1.5, 0.05, 400, 1e-4), (4.0, 0.4, 60, 5e-4)])
def test_epsilon_spent__agrees_with_dp_accounting(sigma: float, rate: float, steps: int, delta: float) -> None:
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    required = accountant.compose(event, steps).get_epsilon(delta)
    assert private.epsilon_spent([(sigma, rate, steps)], delta=delta) == pytest.approx(required, rel=0.01)


def test_noise_multiplier_for__spends_what_is_claimed_and_not_more() -> None:
    sigma = private.noise_multiplier_for(epsilon=2.0, delta=1e-4, sample_rate=0.1, num_steps=50)
    assert 1.97 < private.epsilon_spent([(sigma, 0.1, 50)], delta=1e-4) <= 2.0


def test_tier_of__more_than_10_is_no_differential_privacy() -> None:
    assert [spending.tier_of(epsilon) for epsilon in (0.5, 3, 3.1, 8, 10)] == [
        "strong", "strong", "standard", "standard", "weak",
    ]  # fmt: skip
    for epsilon in (0.0, -1.0, 10.1, math.inf, math.nan):
        with pytest.raises(ConfigError, match="differential privacy"):
            spending.tier_of(epsilon)


def test_delta_for__is_never_larger_and_tells_two_digits() -> None:
    for num_patients in (5, 200, 333, 1000, 12345):
        delta = private.delta_for(num_patients)
        assert 0.9 / (10 * num_patients) < delta <= 1 / (10 * num_patients) and float(f"{delta:.1e}") == delta
    assert private.delta_for(1000) == 1e-4
    assert private.sample_rate_for(16, 333) == 0.049 and private.sample_rate_for(16, 8) == 1.0


def _ledger(**changes: Any) -> spending.Ledger:
    history = ((1.5, 0.05, 400),)
    terms = {"claimed_epsilon": 3.0, "delta": 1e-4, "tier": "strong", "clip_norm": 0.01, "history": history} | changes
    return spending.Ledger(**{"epsilon": private.epsilon_spent(history, delta=1e-4)} | terms)


def test_require_ledger_adds_up__refuses_a_claim_that_its_history_does_not_keep() -> None:
    sound = _ledger()
    private.require_ledger_adds_up(sound)
    for changed in (
        _ledger(claimed_epsilon=1.0),
        _ledger(epsilon=1.0),
        _ledger(history=()),
        _ledger(history=((1.5, 0.05, 900),)),
        _ledger(delta=1e-7),
    ):
        with pytest.raises(ContributionRejected) as caught:
            private.require_ledger_adds_up(changed)
        assert caught.value.code == "DP_LEDGER"


def test_read_ledger__is_of_this_version_and_in_range() -> None:
    sound = _ledger().model_dump(mode="json")
    assert spending.read_ledger(signing.canonical_json(sound)) == _ledger()
    odd: list[dict[str, Any]] = [
        {"tier": "weak"},
        {"history": [[0.0, 0.05, 400]]},
        {"history": [[1.5, 1.05, 400]]},
        {"history": [[1.5, 0.05, 10**9]]},
        {"claimed_epsilon": 11.0},
        {"note": "a word"},
    ]
    contents = [signing.canonical_json(sound | changes) for changes in odd]
    contents += [b"{}", signing.canonical_json(sound).replace(b",400]", b",4" + b"0" * 30 + b"]")]
    for content in contents:
        with pytest.raises(ContributionRejected) as caught:
            spending.read_ledger(content)
        assert caught.value.code == "DP_LEDGER", content


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder_path = tmp_path_factory.mktemp("site")
    (folder_path / "shards").mkdir()
    shard.write_shard_file(folder_path / "shards" / "part-00000.parquet", tiny_generator.rows_of(5))
    return {"base_path": tiny_generator.write_base(folder_path / "base"), "shard_path": folder_path / "shards"}


def test_finetune_privately__goes_on_with_its_ledger_and_not_without(site: dict[str, Path], tmp_path: Path) -> None:
    def dies(images_seen: int) -> None:
        if images_seen == 8:
            raise _Killed

    undisturbed = private.finetune_privately(work_path=tmp_path / "a", **site, **SETTINGS)
    with pytest.raises(_Killed):
        private.finetune_privately(work_path=tmp_path / "b", on_progress=dies, **site, **SETTINGS)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    seen: list[int] = []
    resumed = private.finetune_privately(work_path=tmp_path / "b", on_progress=seen.append, **site, **SETTINGS)
    assert seen == [12]
    one, other = (spending.Ledger.model_validate_json(each.ledger_path.read_bytes()) for each in (undisturbed, resumed))
    assert other.epsilon == pytest.approx(one.epsilon, abs=1e-6) and other.history == one.history
    assert 0 < one.epsilon <= 3.0 and one.history[0][2] == 3
    assert spending.read_ledger(resumed.ledger_path.read_bytes()) == other
    private.require_ledger_adds_up(other)
    terms = adapter.read_terms(resumed.adapter_path)
    assert (terms.images_seen, terms.final_loss) == (12, 0.0)
    factors = load_file(resumed.adapter_path / adapter.ADAPTER_TENSORS)
    assert all(tensor.abs().sum() > 0 for tensor in factors.values())

    (ledger_path,) = (tmp_path / "c").glob("*/checkpoints/step-00000002/dp_ledger.json")
    content = ledger_path.read_text()
    for changed in (None, "{}", content.replace(json.loads(content)["state_sha256"], "0" * 64)):
        ledger_path.unlink()
        if changed is not None:
            ledger_path.write_text(changed)
        with pytest.raises(ConfigError, match="ledger"):
            private.finetune_privately(work_path=tmp_path / "c", **site, **SETTINGS)
        ledger_path.write_text(content)


def test_finetune_privately__a_photograph_needs_a_patient(site: dict[str, Path], tmp_path: Path) -> None:
    rows = [row | {"patient": None} for row in tiny_generator.rows_of(2)]
    shard.write_shard_file(tmp_path / "part-00000.parquet", rows)
    inputs = {"base_path": site["base_path"], "shard_path": tmp_path}
    with pytest.raises(ConfigError, match="2 photograph"):
        private.finetune_privately(work_path=tmp_path / "work", **inputs, **SETTINGS)


def test_require_all_moved__names_a_factor_that_was_not_trained() -> None:
    before = {"a": torch.zeros(2), "b": torch.zeros(2)}
    private.require_all_moved(before, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ConfigError, match=r"1 of 2 .* the first is b"):
        private.require_all_moved(before, {"a": torch.ones(2), "b": torch.zeros(2)})
    with pytest.raises(ConfigError):
        private.require_all_moved({}, {})
