"""The numbers of the privacy gate: variants in versioned files, `conf/gate/`."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from gretfound.errors import ConfigError

POLICY_FOLDER = Path(__file__).parents[2] / "conf" / "gate"
EYES = ("embedding", "details", "vessels")
_LEAST_MAX_P = 1e-5  # G2 takes 2 / max_p divisions by chance for each eye
_SHARES = (
    "held_out_share", "min_copies_found", "min_visits_found", "max_false_flags", "max_p", "max_excess", "warn_excess",
    "max_patient_excess", "max_auc_upper", "fail_auc", "max_tpr", "max_tpr_upper", "fail_tpr", "max_blind_auc",
    "reviewed_captions",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers of the gate; `conf/gate/` explains each."""

    name: str
    version: int
    held_out_share: float
    min_held_out_images: int
    min_held_out_patients: int
    min_patients: int
    min_patients_private: int
    max_epsilon: float
    max_images_per_eye: int
    required_eyes: tuple[str, ...]
    eye_drawings: int
    eye_steps: int
    num_planted: int
    min_copies_found: float
    min_visits_found: float
    max_false_flags: float
    num_samples: int
    max_p: float
    max_excess: float
    warn_excess: float
    max_patient_excess: float
    num_exposed: int
    seeds_per_exposed: int
    min_group: int
    max_images_per_side: int
    times: tuple[int, ...]
    num_noises: int
    max_auc_upper: float
    fail_auc: float
    max_tpr: float
    max_tpr_upper: float
    fail_tpr: float
    max_blind_auc: float
    min_patients_per_caption: int
    reviewed_captions: float
    max_kid: float

    def __post_init__(self) -> None:
        """Checks each number's range.

        Raises:
            ValueError: Naming the fields that are out of it.
        """
        odd = [name for name in _SHARES if not 0.0 <= getattr(self, name) <= 1.0]
        odd += [each.name for each in fields(self) if each.type is int and getattr(self, each.name) < 1]
        odd += ["required_eyes"] if not self.required_eyes or set(self.required_eyes) - set(EYES) else []
        odd += ["times"] if not self.times else []
        odd += ["max_p"] if self.max_p < _LEAST_MAX_P else []
        odd += ["held_out_share"] if not 0.0 < self.held_out_share < 1.0 else []
        if odd:
            raise ValueError(f"found {', '.join(odd)} out of range")

    def num_patients_for(self, epsilon: float | None) -> int:
        """Returns how many patients a site needs, those held out included; fewer with differential privacy."""
        is_private = epsilon is not None and epsilon <= self.max_epsilon
        return math.ceil((self.min_patients_private if is_private else self.min_patients) / (1 - self.held_out_share))

    @property
    def stamp(self) -> str:
        """The variant and its version, as a report names them."""
        return f"{self.name}/{self.version}"


def read_policy(name: str) -> Policy:
    """Reads a variant of the policy from `conf/gate/`.

    Raises:
        ConfigError: If the file is not a policy.
    """
    path = POLICY_FOLDER / f"{name}.yaml"
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text())
        policy = Policy(**content | {key: tuple(content[key]) for key in ("required_eyes", "times")})
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is not a policy of the gate: {error}; restore the file") from error
    if policy.name != name:
        raise ConfigError(f"{path} is the policy {policy.name!r}; required {name!r}: restore the file")
    return policy
