"""The gatehouse: a site judges its own canaries, once."""

from pathlib import Path
from typing import Any

import pytest

from gretfound import gatehouse
from gretfound.gate import canaries
from gretfound.generator import exposure
from tests import knowing, tiny_generator


@pytest.mark.slow
def test_judge_canaries__follows_what_the_weights_know_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_generator.write_base(tmp_path / "base")
    knowing.adapter_files(tmp_path / "base", tmp_path / "adapter")
    drawn = canaries.draw(7, canaries.FLOCKS["demonstration"])
    gains = exposure.gains(tmp_path / "base", tmp_path / "adapter", drawn, caption=canaries.CAPTION)
    terms: dict[str, Any] = {"policy": "demonstration", "ledger": None, "device": "cpu"}
    at_site = {"base_path": tmp_path / "base", "adapter_path": tmp_path / "adapter", "work_path": tmp_path / "work"}
    reveals = {
        verdict: canaries.Reveal(
            canary_seed=7, num_canaries=20, coin_secret=knowing.coin_secret_for(gains, knows=knows)
        )
        for knows, verdict in ((True, "FAIL"), (False, "PASS"))
    }
    found = {verdict: gatehouse.judge_canaries(reveal, **at_site, **terms) for verdict, reveal in reveals.items()}
    for verdict in reveals:
        assert found[verdict].verdict == verdict, "coins of one training were judged by those of another"
    monkeypatch.setattr(canaries, "measure", None)
    assert gatehouse.judge_canaries(reveals["FAIL"], **at_site, **terms) == found["FAIL"]
