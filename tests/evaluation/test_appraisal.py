"""Appraisal: figures follow the features, conditions are the site's released values, and absence has a reason."""

import json
from dataclasses import astuple

import numpy as np
import pytest

from gretfound import fundus, metadata, phantom
from gretfound.errors import LineageError
from gretfound.evaluation import appraisal, vessels
from gretfound.evaluation.appraisal import Side

CELLS = [{"dr": row % 2 * 2, "dr_present": row % 2 == 1, "age": 30.0 + row % 40, "sex": "female"} for row in range(120)]
TABLES = {
    "dr": {"0": 60, "2": 60, "4": None},
    "sex": {"female": 120},
    "age_band": {"30-34": 15, "40-44": 15, "45-49": 15},
}
OPTIONS = {"spaces": ["plain"], "tables": TABLES, "attributes": ["dr", "glaucoma", "sex"], "num_resamples": 100}


def side(name: str, *, num: int = 60, mean: float = 0.0, seed: int = 0, follows_grade: bool = True) -> Side:
    random = np.random.default_rng(seed)
    cells = tuple(CELLS[:num])
    told = np.array([each["dr"] for each in cells]) if follows_grade else random.permutation(num) % 2 * 2
    plain = random.normal(mean, 1.0, (num, 5))
    plain[:, 0] += told
    undefined = np.full((num, len(vessels.STATISTICS)), np.nan)
    return Side(
        features={"plain": plain.astype(np.float32), appraisal.VESSELS: undefined.astype(np.float32)},
        image_ids=tuple(f"{name}-{row}" for row in range(num)),
        patients=tuple(f"{name}-{row // 2}" for row in range(num)),
        cells=cells,
    )


def appraised(**changed: Side) -> dict:
    sides = {
        "generated": side("generated", mean=0.2, seed=1),
        "base": side("base", mean=2.0, seed=2),
        "trained_on": side("trained", seed=3),
    }
    return appraisal.appraise(
        side("held out"), sides | changed, trained_on=lambda image_id: "held out" not in image_id, seed=0, **OPTIONS
    )


def test_appraise__figures_and_verdict_follow_the_features() -> None:
    found = appraised()
    kid = {name: each["figures"]["kid"]["value"] for name, each in found["figures"]["plain"].items()}
    assert kid["trained_on"] < kid["generated"] < kid["base"]
    assert "clearly closer" in found["verdict"] and "60 held-out photographs" in found["verdict"]
    swapped = appraised(generated=side("generated", mean=2.0, seed=2), base=side("base", mean=0.2, seed=1))
    assert "clearly further" in swapped["verdict"]
    assert "cannot be told" in appraised(base=side("base", mean=0.2, seed=4))["verdict"]
    json.dumps(found, allow_nan=False)


def test_appraise__conditions_are_released_values_that_differ() -> None:
    found = appraised()
    assert set(found["conditions"]) == {"dr"}, "no glaucoma column, and one sex only"
    groups = found["conditions"]["dr"]["plain"]
    assert {text: (group["num_real"], group["num_generated"]) for text, group in groups.items()} == {
        "0": (30, 30), "2": (30, 30)
    }  # fmt: skip
    assert "kid" in groups["0"]["figures"]
    few = appraised(generated=side("generated", num=30, seed=1))["conditions"]["dr"]["plain"]["0"]
    assert few["figures"] == {} and "found 15 photographs" in few["too_few"]["kid"]


def test_appraise__usefulness_falls_where_drawn_labels_say_nothing() -> None:
    found = appraised()["usefulness"]["plain"]
    assert found["any_dr"]["num_images"] == {"real": 60, "generated": 60, "tested": 60}
    assert abs(found["any_dr"]["gap"]["value"]) < 0.1
    deaf = appraised(generated=side("generated", mean=0.2, seed=1, follows_grade=False))["usefulness"]["plain"]
    assert deaf["any_dr"]["gap"]["high"] < 0


def test_appraise__says_why_tasks_are_skipped_and_vessels_absent() -> None:
    found = appraised()
    skipped = {each["title"]: each["reason"] for each in found["skipped_tasks"]}
    assert skipped["glaucoma"] == "no photograph says"
    assert "found 0 patients of 'male' among the trained-on photographs" in skipped["sex"]
    assert found["vessels"] == {}
    assert "found vessels in 0 held-out and 0 of these" in found["vessels_missing"]["generated"]


def test_appraise__refuses_a_reference_of_the_training() -> None:
    with pytest.raises(LineageError, match="60 of 60"):
        appraisal.appraise(
            side("held out"), {"generated": side("generated", seed=1)}, trained_on=lambda _: True, seed=0, **OPTIONS
        )


def test_value_of__a_real_age_and_a_drawn_one_are_of_one_band() -> None:
    (drawn,) = [metadata.cells_of("age_band", "40-44")]
    assert {appraisal.value_of(TABLES, cells, "age_band") for cells in (drawn, {"age": 44.0})} == {"40-44"}
    assert appraisal.value_of(TABLES, {"age": 99.0}, "age_band") is None
    assert appraisal.value_of(TABLES, {}, "dr") is None
    assert appraisal.value_of(TABLES, {"dr": 4}, "dr") is None, "its count is not told"


def test_words_of__speaks_as_captions_do() -> None:
    assert appraisal.words_of("dr", "2") == metadata.DR_WORDS[2]
    assert appraisal.words_of("hypertension", "no") == "hypertension: no"


def test_vessel_space__measures_at_nine_tenths_of_the_side_and_nothing_below() -> None:
    eye = phantom.draw_eye(phantom.SITES["aster"], seed=0, size_px=320).image
    square = fundus.to_square(eye, fundus.find_field_of_view(eye), 320)
    (found,) = appraisal.vessel_space(320)([square])
    assert found == pytest.approx(astuple(vessels.measure(square, size_px=288)), rel=1e-6)
    assert np.isnan(appraisal.vessel_space(256)([square])).all()
    assert np.isnan(appraisal.vessel_space(320)([square[::2, ::2]])).all()
