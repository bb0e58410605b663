"""Who is trained on: whole patients held out, near-duplicates and a surplus of one eye left out, common captions."""

from dataclasses import replace

from gretfound.gate import policy, split
from gretfound.gate.split import Candidate

RULES = replace(policy.read_policy("demonstration"), max_images_per_eye=2)
SITE = [Candidate(image_id=f"{place:04d}", patient=f"p{place // 6}", eye="lr"[place % 2]) for place in range(600)]


def test_split__keeps_patients_whole_and_leaves_out_what_is_too_many() -> None:
    found = split.split(SITE, near_duplicates=[("0001", "0000"), ("0001", "absent")], policy=RULES, seed=0)
    sides = {SITE[place].patient for place in found.trained}, {SITE[place].patient for place in found.held_out}
    assert not sides[0] & sides[1]
    assert (found.num_near_duplicates, found.num_surplus) == (1, 199)  # the eye that lost a duplicate has room
    assert not {1} & {*found.trained, *found.held_out}
    assert len(found.trained) + len(found.held_out) == 600 - 1 - 199
    assert abs(len(found.held_out) - 100) <= 4


def test_split__photographs_without_a_patient_are_patients_of_their_own() -> None:
    nameless = [replace(each, patient="") for each in SITE]
    found = split.split(nameless, near_duplicates=[], policy=RULES, seed=0)
    assert (found.num_surplus, len(found.held_out)) == (0, 150)


def test_common_captions__counts_patients_that_are_trained_on() -> None:
    captions, people = ["a", "a", "a", "b", "b"], ["1", "1", "2", "3", "4"]
    assert split.common_captions(captions, people, [0, 1, 2, 3, 4], least=2) == [True] * 5
    assert split.common_captions(captions, people, [0, 1, 3, 4], least=2) == [False, False, False, True, True]
