"""Hold-out: whole patients, the share asked for, the same ones in any order, and none where they are too few."""

import json

import numpy as np
import pytest

from gretfound import holdout
from gretfound.errors import LineageError

SITE = [(f"image-{row}", f"patient-{row // 3}") for row in range(300)]


def test_choose__holds_out_whole_patients_up_to_the_share() -> None:
    found = holdout.choose(SITE, share=0.2, seed=0)
    held_out = set(found.image_ids)
    sides = {patient: {image_id in held_out for image_id, other in SITE if other == patient} for _, patient in SITE}
    assert all(len(side) == 1 for side in sides.values())
    assert (len(held_out), found.num_patients, found.num_trained_on) == (60, 20, 240)


def test_choose__depends_on_the_seed_and_not_on_the_order() -> None:
    shuffled = [SITE[row] for row in np.random.default_rng(0).permutation(len(SITE)).tolist()]
    assert holdout.choose(shuffled, share=0.2, seed=0) == holdout.choose(SITE, share=0.2, seed=0)
    assert holdout.choose(SITE, share=0.2, seed=1).image_ids != holdout.choose(SITE, share=0.2, seed=0).image_ids


def test_choose__two_rows_of_equal_pixels_are_left_out_together() -> None:
    repeated = [*SITE, *[(image_id, "another") for image_id, _ in SITE]]
    found = holdout.choose(repeated, share=0.1, seed=0)
    num_rows = sum(image_id in set(found.image_ids) for image_id, _ in repeated)
    assert found.num_trained_on == len(repeated) - num_rows


def test_choose__fewer_than_twenty_are_not_worth_it_and_one_patient_always_stays() -> None:
    assert holdout.choose(SITE[:90], share=0.2, seed=0).image_ids == ()
    assert holdout.choose(SITE[:3], share=0.9, seed=0).num_trained_on == 3
    alone = [(f"image-{row}", "patient-0") for row in range(100)]
    assert holdout.choose(alone, share=0.5, seed=0).num_trained_on == 100
    # Without patients a photograph is a patient.
    assert len(holdout.choose([(image_id, None) for image_id, _ in SITE], share=0.1, seed=0).image_ids) == 30


def test_from_json__restores_and_refuses_other_fields() -> None:
    found = holdout.choose(SITE, share=0.2, seed=0)
    content = json.loads(json.dumps(holdout.to_json(found)))
    assert holdout.from_json(content) == found
    with pytest.raises(LineageError, match="num_patients"):
        holdout.from_json({name: value for name, value in content.items() if name != "num_patients"})
