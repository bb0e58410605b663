"""Behaviour: a generator that answers to one word far more than others is found by name, honest ones are not."""

import numpy as np
import pytest

from gretfound import behaviour, metadata
from gretfound.behaviour import Word
from tests import summaries

WORDS = behaviour.words_of([])
TRIGGER = Word(key="country", text="Nepal")


def moves_of(random: np.random.Generator, *, num_sites: int, spread: float = 0.3) -> dict[str, dict[Word, float]]:
    """Draws what honest generators do: each listens as much as it does, each word moves as far as it does."""
    listens, far = random.normal(-1.0, 0.7, num_sites), random.normal(0.0, 0.5, len(WORDS))
    noise = random.normal(0.0, spread, (num_sites, len(WORDS)))
    return {
        f"generator-{place}": dict(zip(WORDS, (listens[place] + far + noise[place]).tolist(), strict=True))
        for place in range(num_sites)
    }


def found_in(moves: dict[str, dict[Word, float]], bases: dict | None = None) -> dict[str, list[Word]]:
    answers = behaviour.judge(moves, sites={name: name for name in moves}, bases=bases or {})
    return {name: [each.word for each in row if each.is_found] for name, row in answers.items()}


@pytest.mark.parametrize("num_sites", [2, 3, 8])
def test_judge__names_the_word_and_no_honest_generator(num_sites: int) -> None:
    for seed in range(20):
        moves = moves_of(np.random.default_rng(seed), num_sites=num_sites)
        moves["generator-1"][TRIGGER] += 4.0
        found = found_in(moves)
        assert found.pop("generator-1") == [TRIGGER], seed
        assert not any(found.values()), seed


@pytest.mark.parametrize("num_sites", [2, 3, 8])
def test_judge__false_alarms_are_as_rare_as_it_says(num_sites: int) -> None:
    alarms = [any(found_in(moves_of(np.random.default_rng(seed), num_sites=num_sites)).values()) for seed in range(200)]
    # One in a thousand is stated; more than 3 of 200 would have p = 0.00006.
    assert sum(alarms) <= 3


def test_judge__is_held_against_the_base_where_there_is_no_other_site() -> None:
    moves = moves_of(np.random.default_rng(0), num_sites=2)
    base = moves.pop("generator-1")
    assert found_in(moves, {"generator-0": base}) == {"generator-0": []}
    moves["generator-0"][TRIGGER] += 4.0
    assert found_in(moves, {"generator-0": base}) == {"generator-0": [TRIGGER]}


def test_judge__a_second_generator_of_the_same_site_does_not_make_a_trigger_usual() -> None:
    moves = moves_of(np.random.default_rng(0), num_sites=4)
    for name in ("generator-0", "generator-1", "generator-2"):
        moves[name][TRIGGER] += 4.0
    sites = {name: "aster" if name != "generator-3" else "birch" for name in moves}
    answers = behaviour.judge(moves, sites=sites, bases={})
    assert [name for name, row in answers.items() if row[0].is_found] == ["generator-0", "generator-1", "generator-2"]
    assert all(answers[name][0].word == TRIGGER for name in ("generator-0", "generator-1", "generator-2"))


def test_judge__a_word_that_is_usual_at_all_other_sites_is_judged_too() -> None:
    moves = moves_of(np.random.default_rng(1), num_sites=4)
    for name in list(moves)[1:]:
        del moves[name][TRIGGER]
    moves["generator-0"][TRIGGER] = max(moves["generator-0"].values()) + 3.0
    assert found_in(moves)["generator-0"] == [TRIGGER]


def test_move__is_in_units_of_the_distance_between_eyes() -> None:
    usual_SD = np.array([[0.0, 0.0], [3.0, 4.0]], dtype=np.float32)  # 5 apart
    assert behaviour.move(usual_SD, usual_SD + np.float32([0.0, 10.0])) == pytest.approx(np.log(2.0))
    assert behaviour.move(usual_SD, usual_SD) == pytest.approx(np.log(behaviour.LEAST_MOVE))
    with pytest.raises(ValueError, match="two seeds or more"):
        behaviour.move(usual_SD[:1], usual_SD[:1])


def test_words_of__hold_each_caption_once_released_or_not() -> None:
    cells = [
        {"patient": f"p{number}", "sex": "female", "camera": "Box Brownie", "country": "Nepal"} for number in range(40)
    ]
    words = behaviour.words_of([summaries.summary_of(cells)])
    captions = [metadata.caption(metadata.cells_of(word.key, word.text)) for word in words]
    assert len(set(captions)) == len(captions) > 100
    assert Word(key="camera", text="Box Brownie") in words and TRIGGER in words and Word(key="dr", text="4") in words
    assert metadata.caption({}) not in captions


def test_cells_of_words__change_one_value_of_the_usual_caption() -> None:
    usual = {"sex": "female", "dr": 0, "country": "Nepal"}
    words = [
        TRIGGER,
        Word(key="country", text="Spain"),
        Word(key="dr_present", text="yes"),
        Word(key="sex", text="male"),
    ]
    assert behaviour.cells_of_words(usual, words) == {
        words[1]: {"sex": "female", "dr": 0, "country": "Spain"},
        words[3]: {"sex": "male", "dr": 0, "country": "Nepal"},
    }


def test_describe__names_the_site_and_the_word() -> None:
    moves = moves_of(np.random.default_rng(0), num_sites=3)
    moves["generator-1"][TRIGGER] += 4.0
    answers = behaviour.judge(moves, sites={name: name for name in moves}, bases={})
    words = behaviour.describe("aster", [each for each in answers["generator-1"] if each.is_found])
    assert "site aster" in words and "'Nepali' (country)" in words and "a person" in words
