"""Intake of weights with canaries: a Ray task scores them, and what the weights remember is refused by its code."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gretfound import admission, confinement, disclosure
from gretfound.admission import History
from gretfound.dispatch import Recipe
from gretfound.gate import canaries
from gretfound.generator import exposure, pipeline, private, spending
from gretfound.keyring import Keyring
from tests import knowing, parties, summaries, tiny_generator
from tests.parties import Hub

HISTORY = ((30.0, 0.5, 50),)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return parties.hub_at(tmp_path)


def _ledger(delta: float = 1e-5) -> spending.Ledger:
    return spending.Ledger(
        claimed_epsilon=1.0, epsilon=private.epsilon_spent(HISTORY, delta=delta), delta=delta, tier="strong",
        clip_norm=1e-3, history=HISTORY,
    )  # fmt: skip


def _admit(hub: Hub, path: Path, policy: str) -> admission.Outcome:
    return admission.admit(
        hub.uri,
        str(path),
        policy=policy,
        keys_path=hub.keys_path,
        roster=hub.roster,
        limits=confinement.Limits(),
        cpu_s_per_mib=2.0,
    )


@pytest.mark.slow
def test_admit__refuses_weights_that_know_which_canaries_they_saw(hub: Hub, tmp_path: Path, ray_cluster: None) -> None:
    base_path = tiny_generator.write_base(tmp_path / "base")
    tiny_generator.publish_base(hub.uri, base_path)
    knowing.adapter_files(base_path, tmp_path / "adapter")
    ring = hub.join(tmp_path / "aster.keys", "aster")
    seed = hub.roster.hub_card.canary_seed
    flock = canaries.FLOCKS["demonstration"]
    gains = exposure.gains(base_path, tmp_path / "adapter", canaries.draw(seed, flock), caption=canaries.CAPTION)
    secrets = {knows: knowing.coin_secret_for(gains, knows=knows) for knows in (True, False)}

    def outcome_of(name: str, *, hub_policy: str = "demonstration", **members: bytes) -> admission.Outcome:
        package_path = _package(tmp_path, ring, base_path, name, members)
        return _admit(hub, package_path, hub_policy)

    def members(knows: bool, **changes: bytes) -> dict[str, bytes]:
        reveal = canaries.Reveal(canary_seed=seed, num_canaries=20, coin_secret=secrets[knows])
        commitment = canaries.Commitment(commitment=canaries.commitment_to(secrets[knows]))
        return {"canary_reveal": reveal.to_bytes(), "canary_commitment": commitment.to_bytes()} | changes

    good = outcome_of("good", **members(False))
    assert (good.verdict, good.code) == ("ADMITTED", "")
    (step,) = (step for step in History(hub.uri, good.package_sha256).steps if step.state == "PRIVACY")
    assert (step.measured["num_correct"], step.measured["epsilon_lower_bound"]) == (5, 0.0)
    quiet, false_ledger = members(False), _ledger().model_copy(update={"epsilon": 0.01})
    knowing_codes = {
        "remembered": outcome_of("remembered", **members(True)).code,
        "other coins": outcome_of("coins", **members(True, canary_commitment=quiet["canary_commitment"])).code,
        "false ledger": outcome_of("ledger", **members(False, dp_ledger=false_ledger.to_bytes())).code,
        "lost noise": outcome_of("noise", **members(True, dp_ledger=_ledger().to_bytes())).code,
        "private": outcome_of("private", **members(False, dp_ledger=_ledger().to_bytes())).code,
    }
    assert knowing_codes == {
        "remembered": "CANARY_REMEMBERED", "other coins": "CANARY_REVEAL", "false ledger": "DP_LEDGER",
        "lost noise": "DP_BUG", "private": "",
    }  # fmt: skip


@pytest.mark.slow
def test_admit__a_standard_hub_requires_canaries_and_patients(hub: Hub, tmp_path: Path) -> None:
    base_path = tiny_generator.write_base(tmp_path / "base")
    tiny_generator.publish_base(hub.uri, base_path)
    knowing.adapter_files(base_path, tmp_path / "adapter")
    ring = hub.join(tmp_path / "aster.keys", "aster")
    terms: dict[str, Any] = {"told_by": disclosure.read_policy("standard"), "policy": "standard/1"}

    def code_of(name: str, num_patients: int, **members: bytes) -> str:
        path = _package(tmp_path, ring, base_path, name, members, num_patients=num_patients, **terms)
        return _admit(hub, path, "standard").code

    false_ledger = _ledger().model_copy(update={"epsilon": 0.01}).to_bytes()
    assert code_of("bare", 1400) == "CANARY_MISSING"
    assert code_of("few", 400) == "FEW_PATIENTS", "the report says PASS, and the package itself that it cannot be"
    assert code_of("few-private", 400, dp_ledger=_ledger().to_bytes()) == "CANARY_MISSING", (
        "noise makes up for patients"
    )
    assert code_of("few-false", 400, dp_ledger=false_ledger) == "DP_LEDGER"


def _package(
    folder_path: Path,
    ring: Keyring,
    base_path: Path,
    name: str,
    members: dict[str, bytes],
    *,
    told_by: Any = None,
    num_patients: int = 9,
    **changes: Any,
) -> Path:
    staging_path = folder_path / name
    shutil.copytree(folder_path / "adapter", staging_path / "weights")
    (staging_path / "training").mkdir()
    (staging_path / "privacy").mkdir()
    parties.write_gate_report(staging_path)
    for each, content in members.items():
        (staging_path / "privacy" / f"{each}.json").write_bytes(content)
    rows = [{"sex": "female", "patient": f"p{place}"} for place in range(num_patients)]
    summary = summaries.write_summary(staging_path, rows, policy=told_by)
    (staging_path / "training" / "config.json").write_text(json.dumps(asdict(Recipe())))
    (staging_path / "training" / "metrics.jsonl").write_text('{"images_seen":64,"loss":0.5}\n')
    terms: dict[str, Any] = {
        "form": "weights", "base_sha256": pipeline.denoiser_sha256(base_path), "num_images": summary.num_images,
        "country": "United Kingdom",
    }  # fmt: skip
    return parties.seal(ring, staging_path, folder_path / f"{name}.age", **(terms | changes)).path
