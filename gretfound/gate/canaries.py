"""Canaries (G5): drawn photographs whose traces in the delivered weights bound from below what the training remembers.

The hub's card decides which photographs are drawn. The site's container tosses a secret coin for each, commits to the
coins before the training, learns the "in" half together with the site's own photographs, and reveals the coins beside
the weights. The hub measures how well the weights know each canary, guesses which were in, and counts how often it is
right: so often as a training that keeps its epsilon allows only once in twenty times, and the check fails. The site
does the same before it packs, so that no such weights leave; the hub does not rely on it.

Source: Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846), theorem 5.2.
It is a lower bound by one attack: it can show that a training remembers too much, never that it does not.
"""

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import optimize, stats

from gretfound import fundus, phantom, signing, storage
from gretfound.errors import ContributionRejected
from gretfound.gate.verdict import Check
from gretfound.generator.spending import Ledger
from gretfound.lineage import Generator
from gretfound.roster import Sha256
from gretfound.signing import Document

REVEAL_NAME, COMMITMENT_NAME = "canary_reveal.json", "canary_commitment.json"
MAX_EPSILON_WITHOUT_NOISE = 1.0
CONFIDENCE = 0.95
# All canaries share one caption that no patient has and nobody asks for: it keeps what they look like out of what is
# drawn, and like a patient's caption it is that of many.
CAPTION = "drawn canary photograph"
SITE = phantom.PhantomSite(
    name="canary",
    country="",
    camera="",
    ethnicities=(("", 0.4, 0.2), ("", 0.3, 0.5), ("", 0.3, 0.8)),
    fov_deg=45.0,
    colour=(0.68, 0.34, 0.14),
    colour_sd=0.25,
)
_COINS_PURPOSE = b"gretfound-canaries/1 coins "
_COMMITMENT_PURPOSE = b"gretfound-canaries/1 commitment "
Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Flock:
    """How many canaries a site policy asks for, and the side of their squares in pixels, before they are resized."""

    num_canaries: int
    side_px: int


FLOCKS = {"standard": Flock(num_canaries=200, side_px=512), "demonstration": Flock(num_canaries=20, side_px=224)}


class Commitment(Document):
    """What the container binds itself to before the training."""

    schema_version: Literal["gretfound-canary-commitment/1"] = "gretfound-canary-commitment/1"
    commitment: Sha256


class Reveal(Document):
    """What a package tells of its canaries: which they are, and the secret that the coins follow from."""

    schema_version: Literal["gretfound-canaries/1"] = "gretfound-canaries/1"
    canary_seed: int = Field(ge=0, lt=2**48)
    num_canaries: int = Field(ge=1, lt=10**5)
    coin_secret: Sha256


def draw(canary_seed: int, flock: Flock) -> Iterator[fundus.Photograph]:
    """Draws the canaries as squares, cropped to their field of view as a site's photographs are.

    Two machines may differ in the last bit of a pixel, which changes nothing that is measured.
    """
    for number in range(flock.num_canaries):
        yield _drawn(canary_seed, number, flock)


def draw_in(canary_seed: int, flock: Flock, coin_secret: str) -> Iterator[fundus.Photograph]:
    """Draws those of the canaries that the training learns."""
    for number in np.flatnonzero(toss(coin_secret, flock.num_canaries)).tolist():
        yield _drawn(canary_seed, number, flock)


def _drawn(canary_seed: int, number: int, flock: Flock) -> fundus.Photograph:
    eye: Literal["left", "right"] = "left" if number % 2 else "right"
    image = phantom.draw_eye(SITE, seed=canary_seed + number, size_px=flock.side_px, eye=eye).image
    return fundus.to_square(image, fundus.find_field_of_view(image), flock.side_px)


def coin_secret_of(site_key: bytes, work_id: str) -> str:
    """Derives the secret of one contribution's coins, so that a run that goes on tosses the same ones.

    Args:
        site_key: The secret that pseudonyms are made with; it stays at the site and does not follow from the result.
        work_id: Names the inputs of the contribution.

    Returns:
        256 bits in hex.
    """
    return hmac.digest(site_key, _COINS_PURPOSE + work_id.encode(), "sha256").hex()


def commitment_to(coin_secret: str) -> str:
    """Returns the digest that binds the container to its coins and tells nothing of them."""
    return hashlib.sha256(_COMMITMENT_PURPOSE + bytes.fromhex(coin_secret)).hexdigest()


def toss(coin_secret: str, num_canaries: int) -> Coins:
    """Returns which canaries are in: a fair coin for each, independent of the others, shape (N,)."""
    secret = bytes.fromhex(coin_secret)
    first_bytes = [hmac.digest(secret, number.to_bytes(4, "big"), "sha256")[0] for number in range(num_canaries)]
    is_in: Coins = np.array(first_bytes, np.uint8) % 2 == 1
    return is_in


def read_reveal(reveal_bytes: bytes, commitment_bytes: bytes) -> tuple[Reveal, Commitment]:
    """Reads a package's reveal and commitment, of any origin.

    Raises:
        ContributionRejected: ``CANARY_REVEAL``.
    """
    try:
        return signing.parse_document(reveal_bytes, Reveal), signing.parse_document(commitment_bytes, Commitment)
    except signing.UnreadableDocument as error:
        raise _refused(f"what the package says of its canaries is not of this version: {error}") from error


def require_reveal(reveal: Reveal, committed: Commitment, *, canary_seed: int, policy: str) -> None:
    """Requires the canaries of a hub and a policy, and the coins that were committed to.

    Args:
        reveal: A package's.
        committed: The same package's.
        canary_seed: That of the hub's card.
        policy: The site policy, which says how many canaries there are.

    Raises:
        ContributionRejected: ``CANARY_REVEAL``.
    """
    flock = FLOCKS.get(policy)
    if reveal.canary_seed != canary_seed or flock is None or reveal.num_canaries != flock.num_canaries:
        raise _refused("found other canaries than those of the hub's card and the site's policy")
    if committed.commitment != commitment_to(reveal.coin_secret):
        raise _refused("the coins are not those that the container committed itself to before the training")


def _refused(found: str) -> ContributionRejected:
    return ContributionRejected(
        "CANARY_REVEAL", f"{found}; contribute again with this version of gretfound-site and the hub's present card"
    )


def guess(scores: Sequence[float] | Floats, *, num_guesses: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Guesses which canaries were in: those that the weights know best; and out: those that they know least.

    Args:
        scores: How well the weights know each canary, higher is better.
        num_guesses: Guesses in all, an even number; about the canaries between there is none.

    Returns:
        The places of those guessed in, and of those guessed out.
    """
    if num_guesses % 2 or not 0 < num_guesses <= len(scores):
        raise ValueError(f"found {num_guesses} guesses about {len(scores)} canaries; required an even number of them")
    order = np.argsort(np.asarray(scores), kind="stable")
    return order[-(num_guesses // 2) :], order[: num_guesses // 2]


def epsilon_lower_bound(
    num_correct: int,
    num_guesses: int,
    *,
    confidence: float = CONFIDENCE,
    delta: float = 0.0,
    num_canaries: int = 0,
) -> float:
    """Returns the largest epsilon that so many right guesses refute, 0 if none.

    A guess about an (epsilon, 0)-private training is right with a probability of at most ``1 / (1 + exp(-epsilon))``.
    So without a delta the bound is the logit of the one-sided Clopper-Pearson bound of the share of right guesses.

    Source: Steinke et al. 2023 (arXiv:2305.08846), theorem 5.2, whose term for delta adds
    ``2 num_canaries delta max_i P[v > Binomial >= v - i] / i`` to the p-value of v right guesses.

    Args:
        num_correct: Right guesses.
        num_guesses: All guesses.
        confidence: Of the bound.
        delta: Of the claim that is audited.
        num_canaries: Canaries with or without a guess; matters with a delta only.
    """
    if not 0 <= num_correct <= num_guesses or not num_guesses:
        raise ValueError(f"found {num_correct} right of {num_guesses} guesses")

    def excess(epsilon: float) -> float:
        share = 1 / (1 + np.exp(-epsilon))
        p_value = float(stats.binom.sf(num_correct - 1, num_guesses, share))
        if delta:
            below = np.cumsum(stats.binom.pmf(np.arange(num_correct - 1, -1, -1), num_guesses, share))
            slack = float(np.max(below / np.arange(1, num_correct + 1), initial=0.0))
            p_value += 2 * num_canaries * delta * slack
        return p_value - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, 50.0, xtol=1e-9))


def check(
    scores: Sequence[float] | Floats, is_in: Coins, *, claimed_epsilon: float | None = None, delta: float = 0.0
) -> Check:
    """Judges what the weights know of the canaries; guesses about half of them.

    Args:
        scores: As `guess` takes them, shape (N,).
        is_in: Which of them the training saw, shape (N,).
        claimed_epsilon: What a private training claims; None without one.
        delta: What it claims beside it.
    """
    num_guesses = 2 * (len(is_in) // 4)
    guessed_in, guessed_out = guess(scores, num_guesses=num_guesses)
    num_correct = int(is_in[guessed_in].sum() + (~is_in[guessed_out]).sum())
    found = epsilon_lower_bound(num_correct, num_guesses, delta=delta, num_canaries=len(is_in))
    reachable = epsilon_lower_bound(num_guesses, num_guesses, delta=delta, num_canaries=len(is_in))
    allowed = MAX_EPSILON_WITHOUT_NOISE if claimed_epsilon is None else claimed_epsilon
    if found > allowed:
        reason = (
            "the weights remember single photographs: train for fewer steps, of more patients, or with --dp-epsilon"
            if claimed_epsilon is None
            else "DP bug: the weights know more of single photographs than the claimed epsilon allows; report it, "
            "nothing of this training may leave"
        )
    elif reachable <= allowed:
        reason = f"no bound above {reachable:.2f} can be shown with {num_guesses} guesses: nothing was refuted"
    else:
        reason = "what the weights know of the canaries stays within what is allowed"
    return Check(
        name="G5",
        verdict="FAIL" if found > allowed else "PASS",
        measured={
            "num_canaries": len(is_in),
            "num_guesses": num_guesses,
            "num_correct": num_correct,
            "epsilon_lower_bound": round(found, 4),
            "epsilon_reachable": round(reachable, 4),
        },
        required=f"epsilon_lower_bound of at most {allowed:g} with {CONFIDENCE:.0%} confidence",
        reason=reason,
    )


def score(
    hub_uri: str,
    base: Generator,
    adapter_files: Mapping[str, bytes],
    *,
    reveal: Reveal,
    policy: str,
    ledger: Ledger | None,
    device: str = "cpu",
) -> Check:
    """Judges at the hub what delivered weights know of the canaries.

    It needs torch and the base, and runs on a node of its own.

    Args:
        hub_uri: The hub.
        base: The base's record.
        adapter_files: The content of an adapter's files by name; its tensors were checked.
        reveal: As `require_reveal` let it pass.
        policy: The site policy.
        ledger: That claims differential privacy, and adds up; None where nothing is claimed.
        device: ``cpu`` or ``cuda``.
    """
    with storage.scratch_folder() as folder:
        base_path = storage.fetch_folder(hub_uri, base, Path(folder) / "base")
        adapter_path = Path(folder) / "adapter"
        adapter_path.mkdir()
        for name, content in adapter_files.items():
            (adapter_path / name).write_bytes(content)
        return measure(base_path, adapter_path, reveal=reveal, policy=policy, ledger=ledger, device=device)


def measure(
    base_path: Path,
    adapter_path: Path,
    *,
    reveal: Reveal,
    policy: str,
    ledger: Ledger | None,
    device: str = "cpu",
) -> Check:
    """Judges weights that lie on this machine, as `score` does; a site calls it before it packs.

    Args:
        base_path: A trusted diffusers folder.
        adapter_path: An adapter of it whose tensors were checked.
        reveal: Which canaries, and their coins.
        policy: The site policy.
        ledger: As `score` takes it.
        device: ``cpu`` or ``cuda``.
    """
    from gretfound.generator import exposure  # torch

    photographs = draw(reveal.canary_seed, FLOCKS[policy])
    gains = exposure.gains(base_path, adapter_path, photographs, caption=CAPTION, device=device)
    return check(
        gains,
        toss(reveal.coin_secret, reveal.num_canaries),
        claimed_epsilon=ledger.claimed_epsilon if ledger else None,
        delta=ledger.delta if ledger else 0.0,
    )
