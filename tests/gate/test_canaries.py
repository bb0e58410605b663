"""Canaries: the statistics against closed forms and simulation, the coins, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats

from gretfound import signing
from gretfound.errors import ContributionRejected
from gretfound.gate import canaries
from gretfound.generator import exposure
from gretfound.roster import HubCard
from tests import knowing, tiny_generator

SECRET = canaries.coin_secret_of(b"k" * 32, "work")


@pytest.mark.parametrize(
    ("num_correct", "required"), [(60, 0.05), (70, 0.47), (80, 0.96), (90, 1.63), (95, 2.17), (100, 3.49), (50, 0.0)]
)
def test_epsilon_lower_bound__of_100_guesses(num_correct: int, required: float) -> None:
    assert canaries.epsilon_lower_bound(num_correct, 100) == pytest.approx(required, abs=0.005)


@pytest.mark.parametrize(("num_correct", "num_guesses"), [(9, 10), (10, 10), (66, 90)])
def test_epsilon_lower_bound__is_the_logit_of_clopper_and_pearson(num_correct: int, num_guesses: int) -> None:
    share = stats.binomtest(num_correct, num_guesses, alternative="greater").proportion_ci(0.95, method="exact").low
    found = canaries.epsilon_lower_bound(num_correct, num_guesses)
    assert found == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_epsilon_lower_bound__a_delta_lowers_it() -> None:
    exact = canaries.epsilon_lower_bound(90, 100)
    bounds = [canaries.epsilon_lower_bound(90, 100, delta=delta, num_canaries=200) for delta in (0, 1e-6, 1e-4, 1e-3)]
    assert bounds[0] == exact and bounds == sorted(bounds, reverse=True) and bounds[-1] < exact - 0.05
    assert canaries.epsilon_lower_bound(90, 100, delta=0.1, num_canaries=200) == 0.0


def test_epsilon_lower_bound__holds_where_guesses_are_as_good_as_epsilon_allows() -> None:
    epsilon, rng = 1.0, np.random.default_rng(0)
    correct = rng.binomial(100, 1 / (1 + math.exp(-epsilon)), size=2000)
    bound = np.array([canaries.epsilon_lower_bound(number, 100) for number in range(101)])
    too_high = float(np.mean(bound[correct] > epsilon))
    assert 0.01 < too_high < 0.065, "at most one in twenty, and not by being far too careful"


def test_check__remembered_canaries_fail_and_unknown_ones_pass() -> None:
    is_in = canaries.toss(SECRET, 200)
    noise = np.random.default_rng(1).normal(size=200)
    remembered = canaries.check(3 * is_in + noise, is_in)
    assert remembered.verdict == "FAIL" and "remember" in remembered.reason
    assert remembered.measured["num_guesses"] == 100 and remembered.measured["epsilon_lower_bound"] > 1.0
    assert canaries.check(noise, is_in).verdict == "PASS"
    turned = canaries.check(-3 * is_in + noise, is_in)
    assert turned.verdict == "PASS" and turned.measured["epsilon_lower_bound"] == 0.0


def test_check__a_claimed_epsilon_is_what_it_is_held_against() -> None:
    is_in = canaries.toss(SECRET, 200)
    scores = is_in.astype(float)
    failed = canaries.check(scores, is_in, claimed_epsilon=1.0, delta=1e-5)
    assert failed.verdict == "FAIL" and failed.reason.startswith("DP bug")
    beyond = canaries.check(scores, is_in, claimed_epsilon=8.0, delta=1e-5)
    assert beyond.verdict == "PASS" and "nothing was refuted" in beyond.reason, "100 guesses never refute 8"
    assert canaries.check(scores, is_in, claimed_epsilon=3.0).verdict == "FAIL"


@pytest.mark.parametrize("policy", canaries.FLOCKS)
def test_check__of_each_policy_can_fail(policy: str) -> None:
    is_in = canaries.toss(SECRET, canaries.FLOCKS[policy].num_canaries)
    assert canaries.check(is_in.astype(float), is_in).verdict == "FAIL"


@pytest.mark.parametrize("num_guesses", [0, 3, 12])
def test_guess__refuses_what_cannot_be(num_guesses: int) -> None:
    with pytest.raises(ValueError, match="guesses"):
        canaries.guess([0.0] * 10, num_guesses=num_guesses)


def test_toss__is_fair_independent_and_follows_the_secret() -> None:
    coins = canaries.toss(SECRET, 4000)
    assert abs(coins.mean() - 0.5) < 0.03 and abs(np.mean(coins[1:] == coins[:-1]) - 0.5) < 0.03
    assert np.array_equal(coins[:200], canaries.toss(SECRET, 200))
    other = canaries.toss(canaries.coin_secret_of(b"k" * 32, "other work"), 4000)
    assert abs(np.mean(coins == other) - 0.5) < 0.03


def test_draw__different_photographs_the_same_each_time() -> None:
    flock = canaries.Flock(num_canaries=3, side_px=32)
    drawn = list(canaries.draw(7, flock))
    assert all(image.shape == (32, 32, 3) and image.std() > 10 for image in drawn)
    assert len({image.tobytes() for image in drawn}) == 3
    coins = canaries.toss(SECRET, 3)
    assert 0 < coins.sum() < 3
    learned = list(canaries.draw_in(7, flock, SECRET))
    assert [image.tobytes() for image in learned] == [drawn[place].tobytes() for place in np.flatnonzero(coins)]


def test_read_reveal__accepts_what_the_container_committed_to_and_nothing_else() -> None:
    reveal = canaries.Reveal(canary_seed=7, num_canaries=20, coin_secret=SECRET)
    commitment = canaries.Commitment(commitment=canaries.commitment_to(SECRET)).to_bytes()

    def read(content: bytes, seed: int = 7, before: bytes = commitment, policy: str = "demonstration") -> None:
        canaries.require_reveal(*canaries.read_reveal(content, before), canary_seed=seed, policy=policy)

    read(reveal.to_bytes())
    attempts = [
        lambda: read(reveal.model_copy(update={"coin_secret": "0" * 64}).to_bytes()),
        lambda: read(reveal.model_copy(update={"num_canaries": 4}).to_bytes()),
        lambda: read(reveal.to_bytes(), seed=8),
        lambda: read(reveal.to_bytes(), before=canaries.Commitment(commitment="0" * 64).to_bytes()),
        lambda: read(reveal.to_bytes(), policy="standard"),
        lambda: read(reveal.to_bytes(), policy="unknown"),
        lambda: read(b"{}"),
    ]
    for attempt in attempts:
        with pytest.raises(ContributionRejected) as caught:
            attempt()
        assert caught.value.code == "CANARY_REVEAL"


def test_canary_seed__stands_in_the_hubs_card_and_differs_between_hubs() -> None:
    keys = [str(pyrage.x25519.Identity.generate().to_public()) for _ in range(3)]
    receipt_key = signing.public_hex(Ed25519PrivateKey.generate().public_key())

    def seed_of(*recipients: str) -> int:
        return HubCard(recipients=recipients, receipt_key=receipt_key).canary_seed

    seeds = [seed_of(keys[0], other) for other in keys[1:]]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**48 for seed in seeds)
    assert seeds[0] == seed_of(keys[1], keys[0])


@pytest.mark.slow
def test_score__follows_what_the_weights_know(tmp_path: Path) -> None:
    base = tiny_generator.publish_base(str(tmp_path / "hub"), tiny_generator.write_base(tmp_path / "base"))
    files = knowing.adapter_files(tmp_path / "base", tmp_path / "adapter")
    gains = exposure.gains(
        tmp_path / "base",
        tmp_path / "adapter",
        canaries.draw(7, canaries.FLOCKS["demonstration"]),
        caption=canaries.CAPTION,
    )
    assert gains.shape == (20,) and gains.std() > 0
    for knows, verdict in ((True, "FAIL"), (False, "PASS")):
        reveal = canaries.Reveal(
            canary_seed=7, num_canaries=20, coin_secret=knowing.coin_secret_for(gains, knows=knows)
        )
        found = canaries.score(str(tmp_path / "hub"), base, files, reveal=reveal, policy="demonstration", ledger=None)
        assert found.verdict == verdict
        assert found.measured["num_correct"] == (10 if knows else 5)
