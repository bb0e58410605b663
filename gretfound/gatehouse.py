"""The gatehouse: the privacy gate at a site, around one training.

Before it: who is held out, and which captions are common enough. After it: samples are drawn for captions of the
released summary, the trial is held, and its report is written. What was drawn and found is kept in the work folder, so
that the same command goes on.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gretfound import fundus, lineage, matching, metadata, storage
from gretfound.errors import ConfigError
from gretfound.examination import Examination, Usable
from gretfound.fundus import Photograph
from gretfound.gate import canaries, checks
from gretfound.gate.canaries import Reveal
from gretfound.gate.policy import Policy
from gretfound.gate.report import Report
from gretfound.gate.report import make as make_report
from gretfound.gate.split import Candidate, Split, common_captions, split
from gretfound.gate.verdict import Check
from gretfound.generator import adapter
from gretfound.generator.spending import Ledger
from gretfound.metadata import Cells, MetadataSummary

if TYPE_CHECKING:
    from gretfound.gate.trial import Side


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Who is trained on and who is held out; ``cells`` are what each photograph's caption may say."""

    rules: Policy
    photographs: tuple[Usable, ...]
    cells: tuple[Cells, ...]
    split: Split
    first: Check

    @property
    def left_out(self) -> frozenset[str]:
        """The image ids of the photographs that are not trained on."""
        trained = {self.photographs[place].image_id for place in self.split.trained}
        return frozenset(each.image_id for each in self.photographs) - trained


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How photographs are drawn: as they would be from a contribution."""

    num_steps: int
    guidance_scale: float
    batch_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the gate found of one generator, and the samples that it drew.

    Args:
        report: What leaves with the package, if anything does.
        flagged: Places of the samples that do not leave, whatever the verdict.
        page: The page that stays at the site, as HTML.
        samples: What was drawn.
        cells: What each sample was drawn for.
    """

    report: Report
    flagged: frozenset[int]
    page: str
    samples: Sequence[Photograph]
    cells: tuple[Cells, ...]


def prepare(
    found: Examination, captioned: Sequence[Cells], *, rules: Policy, seed: int, epsilon: float | None = None
) -> Preparation:
    """Chooses who is held out, before the training.

    Args:
        found: The site's photographs.
        captioned: What disclosure control lets each one's caption say.
        rules: The gate's policy.
        seed: Decides who is held out.
        epsilon: Of a training with differential privacy.

    Returns:
        Beside the two sides the check G0, which says whether a training is worth while.
    """
    candidates = [
        Candidate(image_id=each.image_id, patient=each.cells.get("patient", ""), eye=each.cells.get("eye", ""))
        for each in found.usable
    ]
    id_of = {each.name: each.image_id for each in found.photographs}
    pairs = [(id_of[first], id_of[second]) for first, second in found.near_duplicates]
    sides = split(candidates, near_duplicates=pairs, policy=rules, seed=seed)
    people = [each.patient or each.image_id for each in candidates]
    captions = [metadata.caption(cells) for cells in captioned]
    is_common = common_captions(captions, people, sides.trained, least=rules.min_patients_per_caption)
    first = checks.preconditions(
        rules,
        num_held_out_images=len(sides.held_out),
        num_held_out_patients=len({people[place] for place in sides.held_out}),
        num_patients=len({people[place] for place in sides.trained}),
        epsilon=epsilon,
        num_near_duplicates_left_out=sides.num_near_duplicates,
        num_surplus_left_out=sides.num_surplus,
    )
    return Preparation(
        rules=rules,
        photographs=tuple(found.usable),
        cells=tuple(cells if common else {} for cells, common in zip(captioned, is_common, strict=True)),
        split=sides,
        first=first,
    )


def judge_canaries(
    reveal: Reveal,
    *,
    base_path: Path,
    adapter_path: Path,
    policy: str,
    ledger: Ledger | None,
    device: str,
    work_path: Path,
) -> Check:
    """Makes the check G5 of a training with canaries, as the hub will, or finds it made.

    The site knows its own coins, so it can: what fails here never leaves.

    Args:
        reveal: The canaries, and the coins of this training.
        base_path: The base's folder.
        adapter_path: What was trained.
        policy: The site policy.
        ledger: Of a training with differential privacy.
        device: ``cpu`` or ``cuda``.
        work_path: Where the result is kept.
    """
    weights_sha256 = storage.sha256_of(adapter_path / adapter.ADAPTER_TENSORS)
    key = lineage.digest_of([weights_sha256, reveal.model_dump(), policy, ledger.model_dump() if ledger else None])
    path = work_path / "gate" / f"canaries-{key[:16]}.json"
    if not path.exists():
        found = canaries.measure(base_path, adapter_path, reveal=reveal, policy=policy, ledger=ledger, device=device)
        storage.write_bytes(str(path), lineage.canonical_json(asdict(found)))
    return Check(**json.loads(path.read_bytes()))


def judge(
    prepared: Preparation,
    summary: MetadataSummary,
    *,
    base_path: Path,
    adapter_path: Path,
    drawing: Drawing,
    num_drawn: int,
    seed: int,
    work_path: Path,
    eye_path: Path,
    extra: Sequence[Check] = (),
    on_drawn: Callable[[int], object] | None = None,
) -> Outcome:
    """Draws samples and holds the trial, or finds it held.

    Args:
        prepared: What `prepare` chose.
        summary: The released one: samples follow it, never a patient's row.
        base_path: The base's folder.
        adapter_path: What was trained.
        drawing: How samples are drawn.
        num_drawn: Samples that are to leave; the policy may ask for more to look at.
        seed: Of the samples' captions and of what is planted.
        work_path: Where samples and the result are kept.
        eye_path: Where the learned eye is kept, for the site's next contribution as well.
        extra: Checks of other rooms.
        on_drawn: Told how many photographs were drawn, each time.
    """
    from gretfound.gate import eyes, picture_page, trial
    from gretfound.generator import families, pipeline, sampling

    rules = prepared.rules
    num_samples = max(num_drawn, rules.num_samples)
    groups = matching.fit_groups(summary, balance={})
    cells = matching.draw_cells(groups, num=num_samples, seed=seed)
    weights_sha256 = storage.sha256_of(adapter_path / adapter.ADAPTER_TENSORS)
    key = lineage.digest_of([weights_sha256, asdict(rules), asdict(drawing), cells, seed, [asdict(e) for e in extra]])
    folder_path = work_path / "gate" / key[:16]

    def draw(generator: Any, name: str, captions: Sequence[str], seeds: Sequence[int]) -> _Drawn:
        """Draws what is not there yet, batch by batch: a photograph does not depend on where a run was killed."""
        drawn = _Drawn(folder_path / name, len(captions))
        for start in range(0, len(captions), drawing.batch_size):
            places = range(start, min(start + drawing.batch_size, len(captions)))
            if not all(drawn.path(place).exists() for place in places):
                images = sampling.draw_photographs(
                    pipeline=generator,
                    captions=[captions[place] for place in places],
                    seeds=[seeds[place] for place in places],
                    num_steps=drawing.num_steps,
                    guidance_scale=drawing.guidance_scale,
                    batch_size=drawing.batch_size,
                )
                for place, image in zip(places, images, strict=True):
                    drawn.keep(place, image)
            if on_drawn is not None:
                on_drawn(len(places))
        return drawn

    result_path = folder_path / "outcome.json"
    samples = _Drawn(folder_path / "samples", num_samples)
    if not result_path.exists():
        generator = pipeline.load_pipeline(base_path, adapter_path=adapter_path, device=drawing.device)
        size_px = families.native_px(generator)
        draw(generator, "samples", [metadata.caption(each) for each in cells], range(num_samples))
        trained = _side(prepared, prepared.split.trained, size_px)
        held = trial.hold(
            trained=trained,
            held_out=_side(prepared, prepared.split.held_out, size_px),
            samples=samples,
            eyes=[
                eyes.trained_eye(num_drawings=rules.eye_drawings, num_steps=rules.eye_steps, cache_path=eye_path),
                eyes.DetailEye(),
                eyes.VesselEye(),
            ],
            generator=generator,
            draw=lambda captions, seeds: draw(generator, f"exposed-{seeds[0]}", captions, seeds),
            policy=rules,
            first=prepared.first,
            extra=extra,
            seed=seed,
        )
        report = make_report(held.checks, policy_stamp=rules.stamp, weights_sha256=weights_sha256)
        page = picture_page.to_html(
            report,
            held,
            sample_at=lambda place: samples[place],
            trained_at=lambda place: next(trained.read([place])),
        )
        content = {"report": report.to_bytes().decode(), "flagged": held.flagged, "page": page}
        storage.write_bytes(str(result_path), json.dumps(content).encode())
    content = json.loads(result_path.read_bytes())
    return Outcome(
        report=Report.model_validate_json(content["report"]),
        flagged=frozenset(content["flagged"]),
        page=content["page"],
        samples=samples,
        cells=tuple(cells),
    )


def find_copies(
    found: Examination,
    drawn: Sequence[Photograph],
    *,
    rules: Policy,
    size_px: int,
    on_progress: Callable[[int], object],
    seed: int = 0,
) -> list[int]:
    """Finds the drawn photographs that the untrained eyes take for any of a site's, by the gate's G1 and G2.

    Args:
        found: The site's photographs, all of which are compared with.
        drawn: At ``size_px``.
        rules: The gate's policy.
        size_px: Side of the squares that are compared.
        on_progress: Told how many of the site's photographs were read, each time.
        seed: Decides whose photographs tell how alike different patients are.

    Returns:
        Their places.

    Raises:
        ConfigError: If there are too few patients, or the eyes do not find planted copies: then finding none means
            nothing.
    """
    from gretfound.gate import eyes, trial

    prepared = prepare(found, [{}] * len(found.usable), rules=rules, seed=seed)
    sides = prepared.split
    if prepared.first.verdict != "PASS":
        raise ConfigError(
            f"{prepared.first.reason}; found {prepared.first.measured}, required {prepared.first.required}"
        )
    looking = {eye.name: eye for eye in (eyes.DetailEye(), eyes.VesselEye())}
    others = sorted(set(range(len(prepared.photographs))) - set(sides.trained))
    copies = trial.look_for_copies(
        trained=_side(prepared, sides.trained, size_px),
        held_out=_side(prepared, sides.held_out, size_px),
        samples=drawn,
        eyes=list(looking.values()),
        policy=rules,
        seed=seed,
    )
    first = copies.checks[0]
    if first.verdict != "PASS":
        raise ConfigError(f"{first.reason}; found {first.measured}, required {first.required}")
    on_progress(len(sides.trained))
    flagged = set(copies.flagged)
    seen = {name: looking[name].look(drawn) for name in copies.limits}
    for start in range(0, len(others), 64):  # held out, or left out of both sides: the gate flags by none of them
        block = others[start : start + 64]
        squares = list(_side(prepared, block, size_px).read(range(len(block))))
        for name, (tau, _) in copies.limits.items():
            near_SM = looking[name].similarity(seen[name], looking[name].look(squares)) > tau
            flagged |= {place for place, near_M in enumerate(near_SM) if near_M.any()}
        on_progress(len(block))
    return sorted(flagged)


def _side(prepared: Preparation, places: Sequence[int], size_px: int) -> "Side":
    from gretfound.gate.trial import Side

    chosen = [prepared.photographs[place] for place in places]

    def read(rows: Sequence[int]) -> Iterator[Photograph]:
        for row in rows:
            try:
                image = fundus.decode_photograph(chosen[row].path.read_bytes())
            except (OSError, fundus.UnreadablePhotograph) as error:
                raise ConfigError(
                    "a photograph changed while the contribution was made; run the command again"
                ) from error
            yield fundus.to_square(image, fundus.find_field_of_view(image), size_px)

    return Side(
        patients=tuple(each.cells.get("patient", each.image_id) for each in chosen),
        eyes=tuple(each.cells.get("eye", "") for each in chosen),
        captions=tuple(metadata.caption(prepared.cells[place]) for place in places),
        read=read,
    )


class _Drawn(Sequence[Photograph]):
    """Photographs that were drawn, one file each."""

    def __init__(self, folder_path: Path, num: int) -> None:
        self._folder_path, self._num = folder_path, num

    def path(self, place: int) -> Path:
        return self._folder_path / f"{place:06d}.png"

    def keep(self, place: int, image: Photograph) -> None:
        self._folder_path.mkdir(parents=True, exist_ok=True)
        partial = self.path(place).with_suffix(".partial")
        partial.write_bytes(fundus.encode_png(image))
        partial.replace(self.path(place))

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, place: int) -> Photograph: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Photograph]: ...
    def __getitem__(self, place: int | slice) -> Photograph | Sequence[Photograph]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self._num))]
        if not 0 <= place < self._num:
            raise IndexError(f"found place {place}; required below {self._num}")
        return fundus.decode_photograph(self.path(place).read_bytes())
