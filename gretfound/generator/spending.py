"""Spending: the ledger of a training with differential privacy, as a page of a package. Nothing here imports torch.

What a history of steps comes to is computed by `gretfound.generator.private`.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from gretfound import signing
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.signing import Document

LEDGER_NAME = "dp_ledger.json"
MAX_EPSILON = {"strong": 3.0, "standard": 8.0, "weak": 10.0}
Tier = Literal["strong", "standard", "weak"]
MAX_STEPS = 200_000
# Of a Gaussian mechanism as private as the history, in the limit of many steps; 10 is an epsilon of more than 50.
MAX_MU = 10.0
_Noise = Annotated[float, Field(ge=0.05, le=1e6)]
_Rate = Annotated[float, Field(gt=0, le=1)]
_Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]


class Ledger(Document):
    """What a private training has spent: the accountant's history, and what follows from it.

    Each entry of ``history`` is a noise multiplier, a sampling rate and a number of steps. ``epsilon`` is at most
    ``claimed_epsilon``; both hold with ``delta``. Rate and delta are rounded, so that they count no patients.
    """

    schema_version: Literal["gretfound-dp-ledger/1"] = "gretfound-dp-ledger/1"
    unit: Literal["patient"] = "patient"
    mechanism: Literal["poisson-sampled gaussian"] = "poisson-sampled gaussian"
    accountant: Literal["prv"] = "prv"
    claimed_epsilon: float = Field(gt=0, le=MAX_EPSILON["weak"])
    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    tier: Tier
    clip_norm: float = Field(gt=0)
    history: tuple[tuple[_Noise, _Rate, _Steps], ...] = Field(max_length=64)


def tier_of(epsilon: float) -> Tier:
    """Names a guarantee: up to 3 strong, up to 8 standard, up to 10 weak.

    Raises:
        ConfigError: If it is larger, or not above 0: that may not be called differential privacy.
    """
    found = next((tier for tier, largest in MAX_EPSILON.items() if 0 < epsilon <= largest), None)
    if found is None:
        raise ConfigError(
            f"found an epsilon of {epsilon:g}; required above 0 and at most {MAX_EPSILON['weak']:g}: a larger one may "
            "not be called differential privacy"
        )
    return found  # type: ignore[return-value]


def read_ledger(content: bytes) -> Ledger:
    """Reads a package's ledger; whether it adds up is another question, which can be computed of what is returned.

    Source: Bu et al. 2020 (arXiv:1911.11607), theorem 5, for what many steps come to.

    Raises:
        ContributionRejected: ``DP_LEDGER`` if it is not of this version, names its guarantee wrongly, or its history is
            far from what it claims.
    """
    try:
        ledger = signing.parse_document(content, Ledger)
    except signing.UnreadableDocument as error:
        raise ContributionRejected(
            "DP_LEDGER", f"the ledger of the private training is not of this version: {error}; contribute again"
        ) from error
    if ledger.tier != tier_of(ledger.claimed_epsilon):
        raise ContributionRejected("DP_LEDGER", f"the ledger calls its epsilon {ledger.tier}; report it")
    # A history that is far from its claim, or very long, would take the accountant more memory than there is.
    mu = math.sqrt(sum(rate**2 * steps * math.expm1(noise**-2) for noise, rate, steps in ledger.history))
    num_steps = sum(steps for _, _, steps in ledger.history)
    if mu > MAX_MU or num_steps > MAX_STEPS:
        raise ContributionRejected(
            "DP_LEDGER",
            f"the ledger's {num_steps:,} steps cannot come to the claimed epsilon of {ledger.claimed_epsilon:g}, or "
            f"are more than {MAX_STEPS:,}; report it",
        )
    return ledger
