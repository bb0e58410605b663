"""Examines a site's folder: what is there, what is wrong with it, and which form of contribution it is fit for.

It only reads. Its report stays at the site, so it may name files and rows; nothing of it is ever packed.
"""

import base64
import csv
import dataclasses
import logging
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from gretfound import capacity, deidentify, dicom, fundus, isolation, metadata
from gretfound.trial import Trial

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", *dicom.SUFFIXES)
FOLDER_NAME = "traindata"
METADATA_NAME = "metadata.csv"
DETAIL_PX = 48
ROWS_PER_BLOCK = 1024
# Correlation of vessel detail from which two photographs are taken for one. Measured on the real photographs of three
# cameras: different ones reach 0.84; re-encoded, resized, brightened and trimmed copies stay above 0.97.
MIN_COPY_CORRELATION = 0.93
MIN_PHOTOGRAPHS_FOR_POOL = 48
MAX_PAIRS_SHOWN = 12
DEIDENTIFY_CORE_S = 0.4  # a photograph of 1,072 x 712; measured, nearly all of it the search for text (docs/log.md)
THUMBNAIL_PX = 120


Detail = npt.NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What a site's folder must hold before a form of contribution makes sense; versioned, stamped on each package.

    Args:
        name: ``standard`` or ``demonstration``.
        version: Raised with every change of a number.
        min_images_to_send: Photographs needed for ``images``.
        min_patients_to_send: Patients needed for ``images``; 0 where photographs count alone.
        min_images_to_train: Photographs needed for ``weights`` and ``synthetic``.
        min_patients_to_train: Patients needed for them; 0 where photographs count alone.
    """

    name: str
    version: int
    min_images_to_send: int
    min_patients_to_send: int
    min_images_to_train: int
    min_patients_to_train: int

    @property
    def stamp(self) -> str:
        """The name and version that stand in a package's manifest."""
        return f"{self.name}/{self.version}"


# A generator of few patients remembers them: 1,000 to train on, beside the quarter that conf/gate/ holds out. From how
# many patients on a value may be told: conf/disclosure/.
STANDARD = SitePolicy(
    name="standard",
    version=1,
    min_images_to_send=50,
    min_patients_to_send=50,
    min_images_to_train=1334,
    min_patients_to_train=1334,
)
DEMONSTRATION = SitePolicy(
    name="demonstration",
    version=1,
    min_images_to_send=4,
    min_patients_to_send=0,
    min_images_to_train=8,
    min_patients_to_train=0,
)
POLICIES = {policy.name: policy for policy in (STANDARD, DEMONSTRATION)}


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One image file; ``fault`` says in words why it cannot be used, and then nothing else is known of it.

    ``cells`` are the canonical metadata cells that a DICOM header gives.
    """

    name: str
    size_bytes: int
    fault: str = ""
    image_id: str = ""
    width_px: int = 0
    height_px: int = 0
    has_field_of_view: bool = False
    quality: float = 0.0
    is_dicom: bool = False
    cells: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    detail: Detail | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that the data manager should know; an ``is_blocking`` one keeps the folder from every form."""

    headline: str
    advice: str
    details: tuple[str, ...] = ()
    is_blocking: bool = False


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """Whether the folder is fit for one form, and what it would need."""

    form: str
    is_fit: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class ColumnCount:
    """How the cells of one metadata column were understood."""

    name: str
    num_parsed: int
    num_blank: int
    num_not_understood: int


@dataclass(frozen=True, kw_only=True)
class Usable:
    """A photograph that a contribution takes: readable, listed once, not a copy, not marked as a reject.

    ``cells`` are those of its row, and of its DICOM header where the row is blank. ``row`` is its line in
    ``metadata.csv``, the header being line 1; without such a file, its place in the order of names, from 1.
    """

    path: Path
    image_id: str
    cells: dict[str, Any]
    row: int
    is_dicom: bool = False


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that `examine` found. ``num_patients`` and ``num_eyes`` are None where the columns do not say."""

    folder_path: Path
    policy: SitePolicy
    photographs: tuple[Photograph, ...]
    findings: tuple[Finding, ...]
    columns: tuple[ColumnCount, ...]
    fitness: tuple[Fitness, ...]
    usable: tuple[Usable, ...]
    near_duplicates: tuple[tuple[str, str], ...]
    num_exact_duplicates: int
    num_patients: int | None
    num_eyes: int | None

    @property
    def num_readable(self) -> int:
        """Photographs that decode."""
        return sum(not photograph.fault for photograph in self.photographs)

    def is_fit_for(self, form: str | None) -> bool:
        """Tells whether the folder is fit for a form, or for at least one where none is given."""
        return any(fitness.is_fit for fitness in self.fitness if form in (None, fitness.form))


def examine(
    folder_path: Path,
    *,
    policy: SitePolicy,
    num_processes: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Examines a site's folder.

    Args:
        folder_path: The folder with ``traindata/`` and ``metadata.csv``.
        policy: The numbers to hold it against.
        num_processes: Processes that decode; 0 takes one a core.
        on_progress: Is told how many photographs of how many are done.
    """
    findings: list[Finding] = []
    paths = _image_paths(folder_path, findings)
    photographs = _measured(folder_path / FOLDER_NAME, paths, num_processes, on_progress)
    headers = {photograph.name: photograph.cells for photograph in photographs if photograph.is_dicom}
    table = _read_table(folder_path, findings, is_required=not headers)
    rows = _rows_by_image(table, findings) if table is not None else {name: {} for name in headers}
    names = {photograph.name for photograph in photographs}
    lines = {row.image: row.line for row in reversed(table.rows)} if table is not None else {}
    _note_photographs(photographs, findings)
    _note_rows(rows, names, has_table=table is not None, findings=findings)
    # A copy that the table does not list must not push out the one that it does.
    copies = _exact_duplicates(sorted(photographs, key=lambda photograph: photograph.name not in rows), findings)
    near_duplicates = _near_duplicates(photographs)
    if near_duplicates:
        findings.append(
            Finding(
                headline=f"{_counted(len(near_duplicates), 'pair')} of photographs that look almost the same",
                advice="They are kept. If one of a pair is an edited copy of the other, take the copy out.",
                details=tuple(f"{first}  and  {second}" for first, second in near_duplicates),
            )
        )
    if table is not None:
        _note_cells(table, findings)
    usable = tuple(
        Usable(
            path=folder_path / FOLDER_NAME / photograph.name,
            image_id=photograph.image_id,
            cells=photograph.cells | rows[photograph.name],
            row=lines.get(photograph.name, place),
            is_dicom=photograph.is_dicom,
        )
        for place, photograph in enumerate(photographs, start=1)
        if not photograph.fault
        and photograph.name not in copies
        and photograph.name in rows
        and rows[photograph.name].get("quality_grade") != "reject"
    )
    num_rejects = sum(cells.get("quality_grade") == "reject" for cells in rows.values())
    if num_rejects:
        findings.append(
            Finding(
                headline=f"{_counted(num_rejects, 'photograph')} marked as a reject in the column Quality",
                advice="They are left out of a contribution.",
            )
        )
    if any(photograph.is_dicom for photograph in usable):
        findings.append(
            Finding(
                headline=f"{_counted(sum(photograph.is_dicom for photograph in usable), 'DICOM photograph')}",
                advice="They are taken for the form images, and left out of weights and synthetic. What their headers "
                f"say is used where {METADATA_NAME} is blank.",
            )
        )
    num_patients, num_eyes = _people(usable)
    fitness = _fitness(usable, policy, is_blocked=any(finding.is_blocking for finding in findings))
    return Examination(
        folder_path=folder_path,
        policy=policy,
        photographs=tuple(photographs),
        findings=tuple(sorted(findings, key=lambda finding: not finding.is_blocking)),
        columns=_column_counts(table),
        fitness=fitness,
        usable=usable,
        near_duplicates=near_duplicates,
        num_exact_duplicates=len(copies),
        num_patients=num_patients,
        num_eyes=num_eyes,
    )


def narrowed(examination: Examination, usable: Sequence[Usable], findings: Sequence[Finding] = ()) -> Examination:
    """Returns the examination of a folder as if it held no other usable photographs, and its fitness judged again.

    Args:
        examination: What `examine` found.
        usable: Those of its usable photographs that stay.
        findings: Why the others do not, to be told beside the rest.
    """
    is_blocked = any(finding.is_blocking for finding in examination.findings)
    num_patients, num_eyes = _people(usable)
    return dataclasses.replace(
        examination,
        usable=tuple(usable),
        findings=(*examination.findings, *findings),
        fitness=_fitness(usable, examination.policy, is_blocked=is_blocked),
        num_patients=num_patients,
        num_eyes=num_eyes,
    )


def estimates(
    examination: Examination, trial: Trial | None, *, images_seen: int, num_drawn: int
) -> tuple[tuple[str, str], ...]:
    """Tells for each form how long a contribution takes and whether memory is enough, and where that is from.

    Args:
        examination: What `examine` found.
        trial: A few steps, timed on this machine with the chosen base; None where no base was given.
        images_seen: Photographs that the training looks at, repeats counted.
        num_drawn: Photographs that ``synthetic`` draws.
    """
    num_cores = len(os.sched_getaffinity(0))
    duration = _duration(len(examination.usable) * DEIDENTIFY_CORE_S / num_cores)
    told = [
        (
            "images",
            f"{duration} on this machine's {num_cores} cores, if a photograph takes a core {DEIDENTIFY_CORE_S} s: "
            "measured elsewhere, with photographs of 1,072 x 712 pixels",
        )
    ]
    for form, drawn in (("weights", 0), ("synthetic", num_drawn)):
        if trial is None:
            words = "not measured: give --base DIR, and --device cuda for the GPU, and a few steps are timed here"
        elif not trial.has_enough_memory:
            words = (
                f"out of memory at --batch-size {trial.batch_size}: the device has {_gib(trial.total_bytes)}; "
                f"halve --batch-size"
            )
        else:
            work = f"{images_seen:,} photographs at {trial.trained_per_s:.3g} a second"
            work += f", then {drawn:,} drawn at {trial.drawn_per_s:.3g} a second" if drawn else ""
            words = (
                f"{_duration(trial.duration_s(images_seen=images_seen, num_drawn=drawn))}: {work}, measured just now "
                f"on this machine's {trial.device} with this base; memory {_gib(trial.peak_bytes)} of "
                f"{_gib(trial.total_bytes)} at --batch-size {trial.batch_size}"
            )
        told.append((form, words))
    return tuple(told)


def _duration(seconds: float) -> str:
    for unit, size_s in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size_s:
            return f"about {seconds / size_s:.0f} {unit}"
    return "less than two minutes"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / capacity.GIB:.1f} GiB"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _image_paths(folder_path: Path, findings: list[Finding]) -> list[Path]:
    root = folder_path / FOLDER_NAME
    if not root.is_dir():
        findings.append(
            Finding(
                headline=f"there is no folder {FOLDER_NAME} in {folder_path}",
                advice=f"Put the photographs into {folder_path / FOLDER_NAME} and run the check again.",
                is_blocking=True,
            )
        )
        return []
    files = sorted(path for path in root.rglob("*") if path.is_file())
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES or _is_unnamed_dicom(path)]
    others = [path.relative_to(root).as_posix() for path in sorted(set(files) - set(paths))]
    if others:
        findings.append(
            Finding(
                headline=f"{_counted(len(others), 'file')} in {FOLDER_NAME} in no known image format",
                advice=f"They are left out. Known formats: {', '.join(IMAGE_SUFFIXES)} (upper case is fine).",
                details=tuple(others),
            )
        )
    if not paths:
        findings.append(
            Finding(
                headline=f"there is no photograph in {FOLDER_NAME}",
                advice=f"Put photographs ({', '.join(IMAGE_SUFFIXES)}) there and run the check again.",
                is_blocking=True,
            )
        )
    return paths


def _is_unnamed_dicom(path: Path) -> bool:
    """Archives export DICOM files without an ending."""
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with path.open("rb") as stream:
        return dicom.is_dicom(stream.read(132))


def _measured(
    root: Path, paths: Sequence[Path], num_processes: int, on_progress: Callable[[int, int], None] | None
) -> list[Photograph]:
    cores = num_processes or len(os.sched_getaffinity(0))
    num_processes = 1 if len(paths) < MIN_PHOTOGRAPHS_FOR_POOL else cores
    photographs: list[Photograph] = []
    with isolation.Pool(
        "gretfound.examination:answer", num_processes=num_processes, limits=deidentify.LIMITS
    ) as processes:
        for photograph in processes.map(lambda path: _measure(processes, root, path), paths):
            photographs.append(photograph)
            if on_progress is not None:
                on_progress(len(photographs), len(paths))
    return photographs


def _measure(processes: isolation.Pool, root: Path, path: Path) -> Photograph:
    name, size_bytes = path.relative_to(root).as_posix(), path.stat().st_size
    if size_bytes > dicom.MAX_ENCODED_BYTES:
        return Photograph(name=name, size_bytes=size_bytes, fault=deidentify.REFUSED["TOO_LARGE"])
    try:
        facts, detail = processes.run({}, path.read_bytes())
    except isolation.BeyondLimits:
        return Photograph(name=name, size_bytes=size_bytes, fault=deidentify.REFUSED["BEYOND_LIMITS"])
    except OSError as error:
        return Photograph(name=name, size_bytes=size_bytes, fault=error.strerror or "cannot be opened")
    found = np.frombuffer(detail, dtype=np.float16) if detail else None
    return Photograph(name=name, size_bytes=size_bytes, detail=found, **facts)


def answer(_: dict[str, Any], encoded: bytes) -> isolation.Answer:
    """The work of the isolated process: measures one photograph; the fields of `Photograph`, and its detail's bytes."""
    try:
        image, header = deidentify.read_source(encoded)
    except fundus.UnreadablePhotograph as error:
        return {"fault": str(error).partition(": ")[2]}, b""
    field_of_view = fundus.find_field_of_view(image)
    return {
        "image_id": fundus.pixel_digest(image),
        "width_px": image.shape[1],
        "height_px": image.shape[0],
        "has_field_of_view": field_of_view is not None,
        "quality": fundus.quality_score(image, field_of_view),
        "is_dicom": dicom.is_dicom(encoded),
        "cells": header.cells,
    }, _detail(image, field_of_view).tobytes()


def _detail(image: fundus.Photograph, field_of_view: fundus.FieldOfView | None) -> Detail:
    """Returns the fine structure of the central field as a unit vector.

    A difference hash does not tell fundus photographs apart, since the disc, the macula and the falling light look
    alike in all of them; vessels do not.
    """
    green = Image.fromarray(fundus.to_square(image, field_of_view, DETAIL_PX)[:, :, 1])
    smooth = green.filter(ImageFilter.GaussianBlur(DETAIL_PX / 16))
    y, x = np.ogrid[:DETAIL_PX, :DETAIL_PX]
    centre = (DETAIL_PX - 1) / 2
    within = (x - centre) ** 2 + (y - centre) ** 2 <= (0.36 * DETAIL_PX) ** 2
    detail = (np.asarray(green, np.float32) - np.asarray(smooth, np.float32))[within]
    detail -= detail.mean()
    norm = np.linalg.norm(detail)
    unit: Detail = (detail / norm if norm > 0 else detail).astype(np.float16)
    return unit


def _note_photographs(photographs: Sequence[Photograph], findings: list[Finding]) -> None:
    faulty = [photograph for photograph in photographs if photograph.fault]
    if faulty:
        findings.append(
            Finding(
                headline=_counted(len(faulty), "unreadable photograph"),
                advice="They are left out. Export them again from the camera's archive if you want them in.",
                details=tuple(f"{photograph.name}: {photograph.fault}" for photograph in faulty),
            )
        )
    without = [
        photograph.name for photograph in photographs if not photograph.fault and not photograph.has_field_of_view
    ]
    if without:
        findings.append(
            Finding(
                headline=f"{_counted(len(without), 'photograph')} without a round field of view",
                advice="Please look at them: are they fundus photographs? Their surround cannot be blacked out "
                "in them, so make sure that no name or date is printed in the picture.",
                details=tuple(without),
            )
        )


def _note_rows(rows: dict[str, dict[str, Any]], names: set[str], *, has_table: bool, findings: list[Finding]) -> None:
    missing = sorted(set(rows) - names)
    if missing:
        findings.append(
            Finding(
                headline=f"{_counted(len(missing), 'file')} named in {METADATA_NAME} but missing in {FOLDER_NAME}",
                advice="Their rows are left out. Check the spelling, also of the ending (.jpg is not .JPG).",
                details=tuple(missing),
            )
        )
    unlisted = sorted(names - set(rows))
    if has_table and unlisted:
        findings.append(
            Finding(
                headline=f"{_counted(len(unlisted), 'photograph')} without a row in {METADATA_NAME}",
                advice="They are left out. Add a row with the file's name; all other cells may stay empty.",
                details=tuple(unlisted),
            )
        )


def _exact_duplicates(photographs: Sequence[Photograph], findings: list[Finding]) -> set[str]:
    first_by_id: dict[str, str] = {}
    copies: dict[str, str] = {}
    for photograph in photographs:
        if not photograph.fault:
            first = first_by_id.setdefault(photograph.image_id, photograph.name)
            if first != photograph.name:
                copies[photograph.name] = first
    if copies:
        findings.append(
            Finding(
                headline=f"{_counted(len(copies), 'photograph')} exactly like another",
                advice="Only the first of each is used. Is one patient listed under two numbers?",
                details=tuple(f"{copy}  is the same picture as  {first}" for copy, first in copies.items()),
            )
        )
    return set(copies)


def _near_duplicates(photographs: Sequence[Photograph]) -> tuple[tuple[str, str], ...]:
    readable = [photograph for photograph in photographs if photograph.detail is not None]
    if not readable:
        return ()
    details = np.stack([np.asarray(photograph.detail) for photograph in readable]).astype(np.float32)
    pairs = []
    for start in range(0, len(readable), ROWS_PER_BLOCK):
        similar = details[start : start + ROWS_PER_BLOCK] @ details[start:].T >= MIN_COPY_CORRELATION
        for row, column in np.argwhere(np.triu(similar, 1)):
            first, second = readable[start + row], readable[start + column]
            if first.image_id != second.image_id:
                pairs.append((first.name, second.name))
    return tuple(pairs)


def _column_counts(table: metadata.MetadataTable | None) -> tuple[ColumnCount, ...]:
    return tuple(
        ColumnCount(
            name=name,
            num_parsed=counts.num_parsed,
            num_blank=counts.num_blank,
            num_not_understood=counts.num_not_understood,
        )
        for name, counts in (table.counts_by_column if table else {}).items()
    )


def _read_table(folder_path: Path, findings: list[Finding], *, is_required: bool) -> metadata.MetadataTable | None:
    path = folder_path / METADATA_NAME
    if not path.is_file() and not is_required:
        findings.append(
            Finding(
                headline=f"there is no {METADATA_NAME}: every DICOM photograph is taken, as its header describes it",
                advice="Put one there if some of them may not be used, or if you know more than the headers say.",
            )
        )
        return None
    if not path.is_file():
        findings.append(
            Finding(
                headline=f"there is no {METADATA_NAME} in {folder_path}",
                advice="Put one there: the first line names the columns, then one line a photograph. Only the column "
                "Image is required.",
                is_blocking=True,
            )
        )
        return None
    try:
        table = metadata.read_metadata(path)
    except OSError as error:
        findings.append(
            Finding(
                headline=f"the table {METADATA_NAME} cannot be opened: {error.strerror or error}",
                advice="Make it readable for whoever runs this command; in a container that is the user after --user.",
                is_blocking=True,
            )
        )
        return None
    except (ValueError, csv.Error) as error:
        findings.append(
            Finding(
                headline=f"{METADATA_NAME} cannot be read: {error}",
                advice="Save it as CSV (comma or semicolon, UTF-8) with a column Image.",
                is_blocking=True,
            )
        )
        return None
    if not table.rows:
        findings.append(
            Finding(
                headline=f"{METADATA_NAME} is empty: it lists no photograph",
                advice="Add one line for each photograph, with its file name in the column Image.",
                is_blocking=True,
            )
        )
    return table


def _rows_by_image(table: metadata.MetadataTable, findings: list[Finding]) -> dict[str, dict[str, Any]]:
    counts = Counter(row.image for row in table.rows)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        findings.append(
            Finding(
                headline=f"{_counted(len(repeated), 'photograph')} with more than one row in {METADATA_NAME}",
                advice="The first row is used. Take the others out if the first is not the right one.",
                details=tuple(repeated),
            )
        )
    rows: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        rows.setdefault(row.image, dict(row.cells))
    return rows


def _note_cells(table: metadata.MetadataTable, findings: list[Finding]) -> None:
    if table.unknown_columns:
        findings.append(
            Finding(
                headline=_counted(len(table.unknown_columns), "unknown column"),
                advice="They are ignored and never leave. `gretfound-site columns` lists the known ones.",
                details=tuple(table.unknown_columns),
            )
        )
    if table.problems:
        findings.append(
            Finding(
                headline=f"{_counted(len(table.problems), 'cell')} not understood",
                advice="They count as blank. Correct them if you want them used.",
                details=tuple(_problem_in_words(problem) for problem in table.problems),
            )
        )


def _problem_in_words(problem: metadata.Problem) -> str:
    if not problem.column:  # of the whole line
        return f"line {problem.row}: {problem.reason}"
    suggestion = f"; did you mean {problem.suggestion!r}?" if problem.suggestion else ""
    return f"line {problem.row}, column {problem.column}: {problem.value!r}: {problem.reason}{suggestion}"


def _people(usable: Sequence[Usable]) -> tuple[int | None, int | None]:
    patients = {photograph.cells.get("patient") for photograph in usable}
    if not usable or None in patients:
        return None, None
    eyes = {(photograph.cells["patient"], photograph.cells.get("eye")) for photograph in usable}
    return len(patients), None if any(eye is None for _, eye in eyes) else len(eyes)


def _fitness(usable: Sequence[Usable], policy: SitePolicy, *, is_blocked: bool) -> tuple[Fitness, ...]:
    needs = {
        "weights": (policy.min_images_to_train, policy.min_patients_to_train),
        "images": (policy.min_images_to_send, policy.min_patients_to_send),
        "synthetic": (policy.min_images_to_train, policy.min_patients_to_train),
    }
    verdicts = []
    for form, (min_images, min_patients) in needs.items():
        taken = [photograph for photograph in usable if form == "images" or not photograph.is_dicom]
        num_patients, _ = _people(taken)
        faults = []
        if is_blocked:
            faults.append("Something essential is missing; see below.")
        elif len(taken) < min_images:
            faults.append(f"Found {len(taken):,} usable photographs; needs {min_images:,}.")
        elif min_patients and num_patients is None:
            faults.append(f"Needs {min_patients:,} patients; the column Patient does not say how many there are.")
        elif num_patients is not None and num_patients < min_patients:
            faults.append(f"Found {num_patients:,} patients; needs {min_patients:,}.")
        people = f" of {num_patients:,} patients" if num_patients is not None else ""
        reason = " ".join(faults) or f"{len(taken):,} photographs{people} can be used."
        verdicts.append(Fitness(form=form, is_fit=not faults, reason=reason))
    return tuple(verdicts)


FORM_WORDS = {
    "weights": "A generator learns here; only its numbers and counts leave.",
    "images": "De-identified photographs and their metadata leave.",
    "synthetic": "A generator learns here; photographs that it draws leave.",
}


def to_text(examination: Examination, *, estimated: Sequence[tuple[str, str]] = (), max_details: int = 10) -> str:
    """Returns the report for a terminal.

    Args:
        examination: What `examine` found.
        estimated: What `estimates` tells.
        max_details: Files or rows listed under each finding; the HTML page lists all.
    """
    lines = [f"Check of {examination.folder_path}   (policy {examination.policy.stamp})"]
    if examination.policy.name != STANDARD.name:
        lines.append(
            "This policy has lower numbers, for trying things out; a hub that runs the standard policy refuses it."
        )
    lines.append("")
    lines += [
        f"  {fitness.form:<10} {'FIT' if fitness.is_fit else 'NOT FIT':<8} {fitness.reason}"
        for fitness in examination.fitness
    ]
    lines += ["", "What was found"]
    lines += [f"  {value:>10}  {label}" for label, value in _numbers(examination)]
    for title, bars in _charts(examination):
        lines += ["", title, *(f"  {label:<16} {count:>6}  {'#' * round(share * 40)}" for label, count, share in bars)]
    if estimated:
        lines += ["", "Time and memory"]
        lines += [textwrap.fill(f"  {form:<10} {words}", 100, subsequent_indent=" " * 13) for form, words in estimated]
    if examination.columns:
        lines += ["", f"Metadata {'understood':>18} {'blank':>7} {'not understood':>15}"]
        lines += [
            f"  {column.name:<17} {column.num_parsed:>7} {column.num_blank:>7} {column.num_not_understood:>15}"
            for column in examination.columns
        ]
    lines += ["", "Please look at" if examination.findings else "Nothing needs your attention."]
    for index, finding in enumerate(examination.findings, start=1):
        lines += [f"  {index}. {finding.headline[0].upper()}{finding.headline[1:]}.", f"     {finding.advice}"]
        lines += [f"       - {detail}" for detail in finding.details[:max_details]]
        if len(finding.details) > max_details:
            lines.append(f"       ... and {len(finding.details) - max_details} more; --html FILE lists all")
    return "\n".join(lines) + "\n"


def to_html(examination: Examination, *, estimated: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the report as one self-contained page, with the pictures of the most similar pairs.

    Args:
        examination: What `examine` found.
        estimated: What `estimates` tells.
    """
    import jinja2  # here, as the terminal report and --help need no template

    template = (Path(__file__).parent / "site_report.html").read_text()
    pairs = examination.near_duplicates[:MAX_PAIRS_SHOWN]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        folder=str(examination.folder_path),
        policy=examination.policy,
        forms=examination.fitness,
        form_words=FORM_WORDS,
        numbers=_numbers(examination),
        estimated=estimated,
        findings=examination.findings,
        pairs=[[_side(examination.folder_path, name) for name in pair] for pair in pairs],
        num_pairs_hidden=len(examination.near_duplicates) - len(pairs),
        charts=[
            (
                title,
                [{"label": label, "count": count, "percent": round(100 * share, 1)} for label, count, share in bars],
            )
            for title, bars in _charts(examination)
        ],
        columns=examination.columns,
    )


def _numbers(examination: Examination) -> list[tuple[str, str]]:
    def people(noun: str, count: int | None) -> tuple[str, str]:
        return (f"{noun} (not stated)", "-") if count is None else (noun, f"{count:,}")

    readable = [photograph for photograph in examination.photographs if not photograph.fault]
    return [
        ("photographs found", f"{len(examination.photographs):,}"),
        ("readable", f"{len(readable):,}"),
        ("with a field of view", f"{sum(photograph.has_field_of_view for photograph in readable):,}"),
        ("exact copies", f"{examination.num_exact_duplicates:,}"),
        ("usable", f"{len(examination.usable):,}"),
        people("patients", examination.num_patients),
        people("eyes", examination.num_eyes),
    ]


def _charts(examination: Examination) -> list[tuple[str, list[tuple[str, int, float]]]]:
    readable = [photograph for photograph in examination.photographs if not photograph.fault]
    if not readable:
        return []
    sizes = Counter(f"{photograph.width_px} x {photograph.height_px}" for photograph in readable)
    common = sizes.most_common(6)
    rest = len(readable) - sum(count for _, count in common)
    bars = [*common, *([("other sizes", rest)] if rest else [])]
    quality = Counter(min(4, int(photograph.quality * 5)) for photograph in readable)
    bands = [(f"{band / 5:.1f} to {(band + 1) / 5:.1f}", quality[band]) for band in range(5)]
    return [
        ("Size in pixels", [(label, count, count / len(readable)) for label, count in bars]),
        ("Technical quality (0 to 1)", [(label, count, count / len(readable)) for label, count in bands]),
    ]


def _side(folder_path: Path, name: str) -> dict[str, str]:
    image, _ = deidentify.read_source((folder_path / FOLDER_NAME / name).read_bytes())
    step = max(1, min(image.shape[:2]) // THUMBNAIL_PX)
    small = np.ascontiguousarray(image[::step, ::step])
    return {"name": name, "jpeg": base64.b64encode(fundus.encode_jpeg(small, quality=85)).decode()}
