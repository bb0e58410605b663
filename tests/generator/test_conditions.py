"""Drawn photographs follow their captions, and captions the released tables: what `tests.bench.conditions` measures."""

from pathlib import Path

import numpy as np
import pytest

from tests.bench import conditions


@pytest.mark.long
def test_drawn_photographs__follow_their_captions(tmp_path: Path) -> None:
    found = conditions.measure(tmp_path, tmp_path / "conditions.png")
    assert [each.attribute for each in found.agreements] == list(conditions.ATTRIBUTES)
    for each in found.agreements:
        assert each.accuracy > 0.7, f"{each.attribute}: the grader cannot tell"
        assert each.low > each.chance + 0.05, (
            f"{each.attribute}: {each.agreement:.2f} ({each.low:.2f}, {each.high:.2f})"
        )
        assert each.shuffled_low < each.chance, f"{each.attribute}: shuffled captions are followed too"
    assert {"camera", "ethnicity", "dr", "sex", "dr*sex"} <= set(found.p_values)
    assert min(found.p_values.values()) > 1e-3, found.p_values
    assert found.picture_path.stat().st_size > 0


def test_agreement__chance_is_that_of_a_grader_that_does_not_look() -> None:
    place = np.arange(4000)
    asked = place % 10 < 7
    said = place // 10 % 10 < 6  # each answer as often whatever was asked for
    blind = conditions.agreement("any", np.ones(1, bool), asked, said)
    assert blind.agreement == pytest.approx(blind.chance) == pytest.approx(0.7 * 0.6 + 0.3 * 0.4)
    assert blind.low < blind.chance < blind.high
    seeing = conditions.agreement("any", np.ones(1, bool), asked, asked)
    assert seeing.agreement == 1.0 and seeing.low > 0.99
    assert seeing.shuffled == pytest.approx(0.7**2 + 0.3**2, abs=0.03)
