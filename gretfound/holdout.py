"""Hold-out: the photographs of a site that its generator is not trained on, so that it can be measured against them.

Whole patients are held out: two photographs of one eye are too alike for one to judge a copy of the other. Which ones
depends on the seed and on the photographs, never on their order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gretfound import lineage
from gretfound.errors import LineageError

FILE_NAME = "held_out.json"  # beside a generator's networks
MIN_PHOTOGRAPHS = 20  # what the figures of `gretfound.evaluation.distances` need


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """What a generator was not trained on.

    Args:
        share: The share of the photographs that was asked for, 0 to under 1.
        seed: Of the choice.
        num_trained_on: Photographs that are left to train on.
        num_patients: Patients held out; a photograph without one counts as a patient.
        image_ids: The photographs held out, sorted.
    """

    share: float
    seed: int
    num_trained_on: int
    num_patients: int
    image_ids: tuple[str, ...]


def choose(photographs: Iterable[tuple[str, str | None]], *, share: float, seed: int) -> Holdout:
    """Chooses whole patients until they have the share of the photographs that is asked for.

    Where that share is under 20 photographs, nothing is held out: fewer measure nothing and would only be lost to the
    training.

    Args:
        photographs: The image id and the patient, or None, of each photograph.
        share: Of the photographs, 0 to under 1.
        seed: Decides which patients.

    Raises:
        ValueError: If the share is out of range.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"found a share of {share} to hold out; required 0 to under 1")
    by_patient: dict[tuple[str, str], list[str]] = {}
    for image_id, patient in photographs:
        by_patient.setdefault(("patient", patient) if patient else ("photograph", image_id), []).append(image_id)
    num_photographs = sum(len(image_ids) for image_ids in by_patient.values())
    wanted = round(share * num_photographs)
    held_out: set[str] = set()
    num_found = num_patients = 0
    if wanted >= MIN_PHOTOGRAPHS:
        order = sorted(by_patient, key=lambda name: lineage.digest_of(["held out", seed, *name]))
        for name in order[:-1]:  # one stays to train on, whatever the share
            if num_found >= wanted:
                break
            held_out.update(by_patient[name])
            num_found, num_patients = num_found + len(by_patient[name]), num_patients + 1
    num_left_out = sum(image_id in held_out for image_ids in by_patient.values() for image_id in image_ids)
    return Holdout(
        share=share,
        seed=seed,
        num_trained_on=num_photographs - num_left_out,
        num_patients=num_patients,
        image_ids=tuple(sorted(held_out)),
    )


def to_json(found: Holdout) -> dict[str, Any]:
    """Returns the content of `FILE_NAME`."""
    return {**asdict(found), "image_ids": list(found.image_ids)}


def from_json(content: Mapping[str, Any]) -> Holdout:
    """Rebuilds what `to_json` wrote.

    Raises:
        LineageError: If the content has other fields than this version writes.
    """
    if odd := sorted(set(content) ^ set(Holdout.__dataclass_fields__)):
        raise LineageError(
            f"{FILE_NAME} has other fields than this version writes: {odd}; fine-tune the generator again"
        )
    return Holdout(**{**content, "image_ids": tuple(content["image_ids"])})
