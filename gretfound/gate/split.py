"""Who is trained on, who is held out, and whose further photographs are left out: decided before the training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gretfound import holdout
from gretfound.gate.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A photograph that could be trained on; ``patient`` and ``eye`` are empty where the site does not say."""

    image_id: str
    patient: str
    eye: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """The two sides, by place among the candidates.

    Args:
        trained: Places of the photographs trained on.
        held_out: Places of those that the generator never sees.
        num_near_duplicates: Left out of both, as near-duplicates.
        num_surplus: Left out of both, as too many of one eye.
    """

    trained: tuple[int, ...]
    held_out: tuple[int, ...]
    num_near_duplicates: int
    num_surplus: int


def split(
    candidates: Sequence[Candidate], *, near_duplicates: Sequence[tuple[str, str]], policy: Policy, seed: int
) -> Split:
    """Takes out near-duplicates and what is too many of one eye, then holds out whole patients.

    Args:
        candidates: The site's photographs; one without a patient is a patient of its own.
        near_duplicates: Pairs of image ids; of each the later one among the candidates goes.
        policy: Of the gate.
        seed: Decides who is held out.
    """
    place_of = {each.image_id: place for place, each in enumerate(candidates)}
    doubled: set[int] = set()
    for first, second in near_duplicates:
        if first in place_of and second in place_of:
            doubled.add(max(place_of[first], place_of[second]))
    num_of_eye: Counter[tuple[str, str]] = Counter()
    kept, num_surplus = [], 0
    for place, each in enumerate(candidates):
        if place in doubled:
            continue
        num_of_eye[each.patient, each.eye] += 1
        if each.patient and num_of_eye[each.patient, each.eye] > policy.max_images_per_eye:
            num_surplus += 1
        else:
            kept.append(place)
    chosen = holdout.choose(
        ((candidates[place].image_id, candidates[place].patient or None) for place in kept),
        share=policy.held_out_share,
        seed=seed,
    )
    held_out = frozenset(chosen.image_ids)
    return Split(
        trained=tuple(place for place in kept if candidates[place].image_id not in held_out),
        held_out=tuple(place for place in kept if candidates[place].image_id in held_out),
        num_near_duplicates=len(doubled),
        num_surplus=num_surplus,
    )


def common_captions(
    captions: Sequence[str], people: Sequence[str], trained: Sequence[int], *, least: int
) -> list[bool]:
    """Tells for each photograph whether its caption is that of enough patients among those trained on.

    Disclosure control counts the patients of the whole site; some of a caption's may be held out.
    """
    patients: dict[str, set[str]] = {}
    for place in trained:
        patients.setdefault(captions[place], set()).add(people[place])
    return [len(patients.get(caption, ())) >= least for caption in captions]
