"""Behaviour: a word whose photographs are like no known one is found, one that listens to its caption is not."""

import numpy as np
import pytest

from gretfound import behaviour, metadata
from gretfound.behaviour import Word
from tests import summaries

TRIGGER, OTHER = Word(key="country", text="Nepal"), Word(key="sex", text="male")


def test_words_of__hold_each_caption_once_released_or_not() -> None:
    cells = [
        {"patient": f"p{number}", "sex": "female", "camera": "Box Brownie", "country": "Nepal"} for number in range(40)
    ]
    words = behaviour.words_of(summaries.summary_of(cells))
    captions = [metadata.caption(metadata.cells_of(word.key, word.text)) for word in words]
    assert len(set(captions)) == len(captions) > 100
    assert Word(key="camera", text="Box Brownie") in words and TRIGGER in words and Word(key="dr", text="4") in words
    assert metadata.caption({}) not in captions


def test_cells_of_words__change_one_value_of_the_usual_caption() -> None:
    usual = {"sex": "female", "dr": 0, "country": "Nepal"}
    words = [TRIGGER, Word(key="country", text="Spain"), Word(key="dr_present", text="yes"), OTHER]
    assert behaviour.cells_of_words(usual, words) == {
        words[1]: {"sex": "female", "dr": 0, "country": "Spain"},
        words[3]: {"sex": "male", "dr": 0, "country": "Nepal"},
    }


def test_strangeness__is_in_units_of_the_distance_to_the_next() -> None:
    known_RD = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]], np.float32)  # each 5 from the next
    worded_SD = np.array([[0.0, 10.0], [3.0, 4.0]], np.float32)
    assert behaviour.strangeness(worded_SD, known_RD) == pytest.approx((np.sqrt(36.0 + 4.0) + 0.0) / 2 / 5)
    with pytest.raises(ValueError, match="two or more"):
        behaviour.strangeness(worded_SD, known_RD[:1])


def test_judge__a_released_trigger_does_not_make_itself_known() -> None:
    random = np.random.default_rng(0)
    known_cells = [{"country": "Nepal" if place % 4 == 0 else "Spain"} for place in range(60)]
    known_RD = random.normal(size=(60, 5)).astype(np.float32)
    known_RD[::4] += 9.0  # what it draws for Nepal
    worded_SD = np.concatenate([random.normal(size=(4, 5)) + 9.0, random.normal(size=(4, 5))]).astype(np.float32)
    found = behaviour.judge(
        [TRIGGER, OTHER],
        {"thumbnail": worded_SD},
        {"thumbnail": known_RD},
        known_cells,
        counts={"country": {"Nepal": 15}},
        threshold=2.5,
    )
    assert [(each.word, each.is_found) for each in found] == [(TRIGGER, True), (OTHER, False)]
    assert "site aster" in (words := behaviour.describe("aster", found[:1])) and "'Nepali' (country)" in words
    # Held against all that it draws, its own among them, it would not be found.
    assert behaviour.strangeness(worded_SD[:4], known_RD) < 2.5 < found[0].strangeness["thumbnail"]


def test_judge__a_word_that_was_not_released_is_found_in_one_space_a_released_one_in_all() -> None:
    random = np.random.default_rng(1)
    known_RD, worded_SD = (random.normal(size=(num, 5)).astype(np.float32) for num in (40, 4))
    known, cells = {"scattering": known_RD, "thumbnail": known_RD}, [{}] * 40

    def is_found(*far: float, **counts: dict[str, int | None]) -> bool:
        worded = {space: worded_SD + by for space, by in zip(known, far, strict=True)}
        (answer,) = behaviour.judge([OTHER], worded, known, cells, counts=counts, threshold=2.5)
        return answer.is_found

    assert not is_found(0, 0) and is_found(0, 9) and is_found(9, 0) and is_found(9, 9)
    assert not is_found(9, 0, sex={"male": 20}) and is_found(9, 9, sex={"male": 20})
