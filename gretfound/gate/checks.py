"""The checks of the gate on figures: each turns what was measured into a verdict by the numbers of the policy.

G0 what there is to judge by, G1 planted copies, G2 copies among samples, G3 extraction, G4 membership, G6 captions, G7
usefulness. (G5, canaries, is a room of its own.) Nothing here sees a photograph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gretfound.evaluation.metrics import Interval
from gretfound.gate.comparison import Copies, Told
from gretfound.gate.policy import Policy
from gretfound.gate.verdict import Check, Verdict

_TRAIN_LESS = (
    "train for fewer photographs, with a lower rank or learning rate, or on more patients, and contribute again"
)


@dataclass(frozen=True, kw_only=True)
class Control:
    """How well one eye found what was planted; ``blind`` says why it could not look at all.

    ``visit_p5`` is the similarity that 95% of second visits reach.
    """

    eye: str
    copies_found: float = 0.0
    visits_found: float = 0.0
    false_flags: float = 0.0
    visit_p5: float = 1.0
    blind: str = ""

    def sees(self, policy: Policy) -> bool:
        """Tells whether the eye finds enough to be believed."""
        return (
            not self.blind
            and self.copies_found >= policy.min_copies_found
            and self.visits_found >= policy.min_visits_found
            and self.false_flags <= policy.max_false_flags
        )


def preconditions(
    policy: Policy,
    *,
    num_held_out_images: int,
    num_held_out_patients: int,
    num_patients: int,
    epsilon: float | None = None,
    num_near_duplicates_left_out: int = 0,
    num_surplus_left_out: int = 0,
) -> Check:
    """G0: are there enough patients to learn from, and enough held out to judge by?"""
    is_private = epsilon is not None and epsilon <= policy.max_epsilon
    least = policy.min_patients_private if is_private else policy.min_patients
    is_enough = (
        num_held_out_images >= policy.min_held_out_images
        and num_held_out_patients >= policy.min_held_out_patients
        and num_patients >= least
    )
    return Check(
        name="G0",
        verdict="PASS" if is_enough else "FAIL",
        measured={
            "held_out_images": num_held_out_images,
            "held_out_patients": num_held_out_patients,
            "patients": num_patients,
            "near_duplicates_left_out": num_near_duplicates_left_out,
            "surplus_of_an_eye_left_out": num_surplus_left_out,
        },
        required=(
            f"{policy.min_held_out_images} photographs and {policy.min_held_out_patients} patients held out, {least} "
            "patients trained on"
        ),
        reason="there is enough to judge by"
        if is_enough
        else "too few patients: a generator of few patients remembers them; send photographs (--form images) instead, "
        "or pool with other sites",
    )


def controls(found: Sequence[Control], policy: Policy, *, num_real_visits: int) -> Check:
    """G1: do the eyes find the copies that were planted?"""
    seeing = [each.eye for each in found if each.sees(policy)]
    lacking = [eye for eye in policy.required_eyes if eye not in seeing]
    verdict: Verdict = "INCONCLUSIVE" if lacking or not seeing else "PASS"
    measured: dict[str, float | int | str] = {"real_second_visits": num_real_visits}
    for each in found:
        if each.blind:
            measured[f"{each.eye}_cannot_see"] = each.blind
            continue
        measured |= {
            f"{each.eye}_copies_found": round(each.copies_found, 4),
            f"{each.eye}_second_visits_found": round(each.visits_found, 4),
            f"{each.eye}_false_flags": round(each.false_flags, 4),
        }
    return Check(
        name="G1",
        verdict=verdict,
        measured=measured,
        required=(
            f"of {', '.join(policy.required_eyes)}: {policy.min_copies_found:.0%} of planted copies and "
            f"{policy.min_visits_found:.0%} of second visits found, at most {policy.max_false_flags:.1%} of held-out "
            "photographs flagged"
        ),
        reason="the eyes find planted copies, so that finding none means something"
        if verdict == "PASS"
        else f"what {', '.join(lacking) or 'no eye'} did not find means nothing; use a base of a higher resolution, "
        "photographs of better quality, or more of them",
    )


def copies(found: Copies | None, policy: Policy) -> Check:
    """G2: are more samples copies of patients trained on than chance makes of held-out ones?"""
    required = (
        f"of {policy.num_samples:,} samples an excess under {policy.max_excess:.1%} as near as a second visit, and "
        f"no p below {policy.max_p:g}; patients found beyond the control at most {policy.max_patient_excess:.1%}"
    )
    if found is None:
        return _no_eye("G2", required)
    num_samples = len(found.is_flagged)
    is_short = num_samples < policy.num_samples
    many_patients = found.patient_excess > policy.max_patient_excess
    verdict: Verdict
    if (
        found.p < policy.max_p
        or found.excess >= policy.max_excess
        or (many_patients and found.patient_p < policy.max_p)
    ):
        verdict = "FAIL"
    elif is_short:
        verdict = "INCONCLUSIVE"
    else:
        verdict = "WARN" if found.excess >= policy.warn_excess or many_patients else "PASS"
    return Check(
        name="G2",
        verdict=verdict,
        measured={
            "samples": num_samples,
            "flagged": int(found.is_flagged.sum()),
            "flagged_of_control": found.num_controls,
            "excess": round(found.excess, 5),
            "p": float(f"{found.p:.3g}"),
            "patients_found": found.num_patients,
            "patient_excess": round(found.patient_excess, 5),
            "patient_p": float(f"{found.patient_p:.3g}"),
        },
        required=required,
        reason={
            "FAIL": f"the generator draws photographs of its patients; {_TRAIN_LESS}",
            "INCONCLUSIVE": f"too few samples were drawn; required {policy.num_samples:,}",
            "WARN": "a few samples are near to a patient; those that were flagged do not leave",
            "PASS": "samples are no nearer to the patients trained on than to held-out ones",
        }[verdict],
    )


def extraction(
    num_hits: int, num_confirmed_groups: int, num_groups: int, *, num_drawn: int, is_seen: bool, policy: Policy
) -> Check:
    """G3: does the generator give away the patients most at risk when asked for their very captions?"""
    required = "no sample as near to the photograph asked for as a second visit, no group of alike samples near to one"
    if not is_seen:
        return _no_eye("G3", required)
    is_bad = bool(num_hits or num_confirmed_groups)
    verdict: Verdict = "FAIL" if is_bad else "WARN" if num_groups else "PASS"
    return Check(
        name="G3",
        verdict=verdict,
        measured={
            "samples": num_drawn,
            "captions": policy.num_exposed,
            "as_near_as_a_second_visit": num_hits,
            "groups_near_to_a_photograph": num_confirmed_groups,
            "groups_alike": num_groups,
        },
        required=required,
        reason={
            "FAIL": f"a patient's photograph can be drawn from the generator; {_TRAIN_LESS}",
            "WARN": "the generator repeats itself for some captions, but near to no photograph that it was trained on",
            "PASS": "asked for its most exposed photographs, it draws others",
        }[verdict],
    )


def membership(told: Told, *, blind_auc: float, policy: Policy) -> Check:
    """G4: does the generator's loss tell who it was trained on?

    First of all the two sides must be alike: where a classifier that knows nothing of the generator tells them apart,
    the comparison means nothing.
    """
    verdict: Verdict
    if blind_auc > policy.max_blind_auc:
        verdict, reason = (
            "INCONCLUSIVE",
            (
                "the held-out photographs differ from the others without any generator (another camera, another time); "
                "contribute each camera as a site of its own"
            ),
        )
    elif told.auc.value > policy.fail_auc or told.tpr.value > policy.fail_tpr:
        verdict, reason = "FAIL", f"the generator's loss tells who it was trained on; {_TRAIN_LESS}"
    elif (
        told.auc.high > policy.max_auc_upper or told.tpr.value > policy.max_tpr or told.tpr.high > policy.max_tpr_upper
    ):
        verdict, reason = "INCONCLUSIVE", f"the figures leave room for a leak; hold out more patients, or {_TRAIN_LESS}"
    else:
        verdict, reason = "PASS", "the generator's loss does not tell who it was trained on"
    return Check(
        name="G4",
        verdict=verdict,
        measured={
            **_interval("auc", told.auc),
            **_interval("true_answers_at_1_percent", told.tpr),
            "auc_without_generator": round(blind_auc, 4),
        },
        required=(
            f"AUC at most {policy.max_auc_upper} (upper end of 95%), true answers at 1% false ones at most "
            f"{policy.max_tpr} (upper end {policy.max_tpr_upper}); without the generator at most {policy.max_blind_auc}"
        ),
        reason=reason,
    )


def captions(patients_by_caption: Mapping[str, int], scores: Mapping[str, float], policy: Policy) -> Check:
    """G6: is there a caption that stands for so few patients that it could call one of them up?

    Args:
        patients_by_caption: Patients trained on with each caption that tells something.
        scores: How strongly the generator answers to each (`exposure.caption_scores`).
        policy: Of the gate.
    """
    rare = sum(count < policy.min_patients_per_caption for count in patients_by_caption.values())
    return Check(
        name="G6",
        verdict="FAIL" if rare else "PASS",
        measured={
            "captions": len(patients_by_caption),
            "captions_of_few_patients": rare,
            "strongest_answer": round(max(scores.values(), default=0.0), 4),
            "median_answer": round(sorted(scores.values())[len(scores) // 2] if scores else 0.0, 4),
        },
        required=f"each caption is that of {policy.min_patients_per_caption} patients trained on, or more",
        reason="a caption stands for few patients; raise --min-patients-per-cell"
        if rare
        else "no caption stands for few patients; the strongest answers are on the page that stays here",
    )


def usefulness(kid: Interval, policy: Policy) -> Check:
    """G7: are samples photographs at all? A generator that draws nothing would pass every other check."""
    is_right = kid.value <= policy.max_kid
    return Check(
        name="G7",
        verdict="PASS" if is_right else "FAIL",
        measured=_interval("kid", kid),
        required=f"KID to held-out photographs at most {policy.max_kid:g}",
        reason="samples resemble held-out photographs"
        if is_right
        else "what it draws does not resemble the site's photographs; train longer, and contribute again",
    )


def _no_eye(name: str, required: str) -> Check:
    return Check(
        name=name,
        verdict="INCONCLUSIVE",
        measured={},
        required=required,
        reason="no eye can be believed, see G1",
    )


def _interval(name: str, found: Interval) -> dict[str, float | int | str]:
    return {name: round(found.value, 4), f"{name}_low": round(found.low, 4), f"{name}_high": round(found.high, 4)}
