"""The eyes on drawn photographs: planted copies are found, a blind eye is told, and what cannot see says so."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gretfound import fundus, phantom
from gretfound.fundus import Photograph
from gretfound.gate import controls, eyes, policy, trial
from gretfound.gate.trial import Side

RULES = replace(policy.read_policy("demonstration"), num_samples=40, num_planted=20)


def draw(first_seed: int, num: int, size_px: int, site: str = "aster") -> list[Photograph]:
    squares = []
    for seed in range(first_seed, first_seed + num):
        image = phantom.draw_eye(phantom.SITES[site], seed=seed, size_px=size_px).image
        squares.append(fundus.to_square(image, fundus.find_field_of_view(image), size_px))
    return squares


def side_of(squares: list[Photograph], name: str) -> Side:
    return Side(
        patients=tuple(f"{name}{place}" for place in range(len(squares))),
        eyes=("",) * len(squares),
        captions=("colour fundus photograph",) * len(squares),
        read=lambda rows: (squares[row] for row in rows),
    )


@pytest.fixture
def eye(gate_eye_path: Path) -> eyes.EmbeddingEye:
    return eyes.trained_eye(num_drawings=RULES.eye_drawings, num_steps=RULES.eye_steps, cache_path=gate_eye_path)


class _Blind:
    """Features that have nothing to do with the photograph."""

    name = "embedding"

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def why_blind(self, size_px: int) -> str:
        return ""

    def look(self, squares: Iterable[Photograph]) -> npt.NDArray[np.float32]:
        rows = self._random.normal(size=(len(list(squares)), 64)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def similarity(self, seen_N: npt.NDArray[np.float32], known_M: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return seen_N @ known_M.T


def test_look_for_copies__finds_planted_ones_and_no_others(eye: eyes.EmbeddingEye) -> None:
    trained, held_out, fresh = draw(0, 60, 64), draw(1000, 30, 64), draw(2000, 96, 64)
    sides = {"trained": side_of(trained, "t"), "held_out": side_of(held_out, "h")}
    looking = [eye, eyes.DetailEye(), eyes.VesselEye()]
    healthy = trial.look_for_copies(**sides, samples=fresh, eyes=looking, policy=RULES)
    assert [check.verdict for check in healthy.checks] == ["PASS", "PASS"], healthy.checks
    assert "vessels_cannot_see" in healthy.checks[0].measured, "64 px show no vessel, and it has to say so"

    copied = [controls.plant_copy(trained[place], kind="brightness", seed=place) for place in range(20)]
    found = trial.look_for_copies(**sides, samples=[*copied, *fresh[20:]], eyes=looking, policy=RULES)
    assert found.checks[1].verdict == "FAIL" and len({*found.flagged} & {*range(20)}) >= 18
    assert found.pairs[0].trained == found.pairs[0].sample < 20
    required = replace(RULES, required_eyes=("details", "vessels"))
    unseen = trial.look_for_copies(**sides, samples=fresh, eyes=looking, policy=required)
    assert unseen.checks[0].verdict == "INCONCLUSIVE"


def test_look_for_copies__a_blind_eye_is_inconclusive() -> None:
    trained, held_out = draw(0, 24, 64), draw(1000, 12, 64)
    found = trial.look_for_copies(
        trained=side_of(trained, "t"), held_out=side_of(held_out, "h"), samples=trained, eyes=[_Blind()], policy=RULES
    )
    assert [check.verdict for check in found.checks] == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert found.checks[0].measured["embedding_copies_found"] < 0.5


def test_trained_eye__is_found_again_and_depends_on_its_recipe_alone(tmp_path: Path) -> None:
    first = eyes.trained_eye(num_drawings=8, num_steps=2, cache_path=tmp_path / "one")
    again = eyes.trained_eye(num_drawings=8, num_steps=2, cache_path=tmp_path / "two")
    kept = eyes.trained_eye(num_drawings=8, num_steps=2, cache_path=tmp_path / "one")
    squares = draw(0, 2, 64)
    np.testing.assert_array_equal(first.look(squares), again.look(squares))
    np.testing.assert_array_equal(first.look(squares), kept.look(squares))
    assert [path.suffix for path in (tmp_path / "one").iterdir()] == [".safetensors"]


def test_embedding_eye__sees_a_mirrored_copy(eye: eyes.EmbeddingEye) -> None:
    squares = draw(0, 3, 64)
    mirrored = [np.ascontiguousarray(square[:, ::-1]) for square in squares]
    assert np.diag(eye.similarity(eye.look(mirrored), eye.look(squares))).min() > 0.99


@pytest.mark.parametrize("size_px", [32, 64])
def test_detail_eye__finds_copies_and_second_visits_at_few_pixels(size_px: int) -> None:
    seeing = eyes.DetailEye()
    trained, held_out = draw(0, 40, size_px), draw(1000, 40, size_px)
    known = seeing.look(trained)
    best = seeing.similarity(seeing.look(held_out), known).max(axis=1)
    for changed in (
        [
            controls.plant_copy(square, kind=controls.KINDS[place % 5], seed=place // 2)
            for place, square in enumerate(trained)
        ],
        [controls.imitate_visit(square, seed=place) for place, square in enumerate(trained)],
    ):
        similarity = seeing.similarity(seeing.look(changed), known)
        assert (similarity.argmax(axis=1) == np.arange(40)).mean() >= 0.95
        assert (similarity.max(axis=1) > best.max()).mean() >= 0.95


def test_detail_eye__finds_nothing_in_a_blank_photograph() -> None:
    seeing = eyes.DetailEye()
    blank = np.zeros((64, 64, 3), np.uint8)
    known = seeing.look(draw(0, 4, 64))
    assert seeing.similarity(seeing.look([blank]), known).max() < 0.1
    assert seeing.similarity(known, seeing.look([blank])).max() < 0.1
    assert seeing.similarity(known, known[:0]).shape == (4, 0)


@pytest.mark.slow
def test_vessel_eye__finds_turned_shifted_and_mirrored_copies() -> None:
    seeing = eyes.VesselEye()
    assert seeing.why_blind(256) and not seeing.why_blind(320)
    trained, held_out = draw(0, 24, 320), draw(1000, 24, 320)
    known, unknown = seeing.look(trained), seeing.look(held_out)
    best = seeing.similarity(unknown, known).max(axis=1)
    copied = [
        controls.plant_copy(square, kind=controls.KINDS[place % 5], seed=place) for place, square in enumerate(trained)
    ]
    similarity = seeing.similarity(seeing.look(copied), known)
    assert (similarity.argmax(axis=1) == np.arange(24)).mean() >= 0.95
    assert (similarity.max(axis=1) > best.max()).mean() >= 0.95


@pytest.mark.parametrize("kind", controls.KINDS)
def test_plant_copy__changes_the_photograph_and_keeps_its_shape(kind: str) -> None:
    square = draw(0, 1, 64)[0]
    copied = controls.plant_copy(square, kind=kind, seed=2)
    assert copied.shape == square.shape and copied.dtype == np.uint8
    difference = np.abs(copied.astype(int) - square.astype(int)).mean()
    assert 0.5 < difference < 30
    np.testing.assert_array_equal(copied, controls.plant_copy(square, kind=kind, seed=2))
    with pytest.raises(ValueError, match="required one of"):
        controls.plant_copy(square, kind="else", seed=2)
