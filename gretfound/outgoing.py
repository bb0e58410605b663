"""A site's photographs on their way out: each made anew, those that may not leave kept back and counted by reason.

Work that is done is found again, so an interruption costs the photographs that were in hand. Nothing here names a file:
a photograph is its line in metadata.csv.
"""

import datetime
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gretfound import deidentify, dicom, files, identifiers, isolation
from gretfound.examination import Finding, Usable

_TEXT_CELLS = ("camera", "country", "ethnicity")
_MAX_ROWS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one photograph; JSON in the work folder, so it holds pseudonyms only.

    ``place`` counts the photographs that were given, from 0; ``row`` is `Usable.row`. ``code`` is blank where it may
    leave, else a key of `deidentify.KEPT_BACK` or `deidentify.REFUSED`. ``study`` groups what is kept back together,
    ``visit`` is the pseudonym that leaves, blank where no header names a study.
    """

    place: int
    row: int
    source_sha256: str
    code: str
    study: str
    image_id: str = ""
    file_name: str = ""
    visit: str = ""
    shifted_year: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All outcomes, in the order of the photographs that were given, and the folder of those that may leave."""

    outcomes: tuple[Outcome, ...]
    folder_path: Path

    @property
    def leaving(self) -> list[Outcome]:
        """Those that may leave."""
        return [outcome for outcome in self.outcomes if not outcome.code]

    def findings(self) -> list[Finding]:
        """What was left out and why, in words for the data manager: counts and lines, no names."""
        counts = Counter(outcome.code for outcome in self.outcomes if outcome.code)
        words = deidentify.KEPT_BACK | deidentify.REFUSED
        findings = []
        for code, count in sorted(counts.items()):
            rows = [outcome.row for outcome in self.outcomes if outcome.code == code]
            shown = ", ".join(str(row) for row in rows[:_MAX_ROWS_SHOWN])
            more = f" and {len(rows) - _MAX_ROWS_SHOWN:,} more" if len(rows) > _MAX_ROWS_SHOWN else ""
            lane = "kept back" if code in deidentify.KEPT_BACK else "refused"
            findings.append(
                Finding(
                    headline=f"{count:,} photograph{'' if count == 1 else 's'} {lane}: {code}",
                    advice=f"{words[code][0].upper()}{words[code][1:]}.",
                    details=(f"lines of metadata.csv (without one, in the order of names): {shown}{more}",),
                )
            )
        return findings


def prepare(
    photographs: Sequence[Usable],
    *,
    root_path: Path,
    digests: Mapping[Path, str],
    key: bytes,
    work_path: Path,
    jpeg_quality: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """Makes photographs anew under the policy deid/1, several at a time, and goes on with work that was interrupted.

    Args:
        photographs: What the examination found usable; the cells hold the site's own patient codes.
        root_path: The folder that names of files are taken from, for the exit scan.
        digests: SHA-256 of each file, taken before anything was decoded: a decoder does not notice a changed byte.
        key: The site's key.
        work_path: Where the pictures and outcomes go.
        jpeg_quality: 0 gives PNG, 1 to 100 JPEG.
        on_progress: Is told how many are done.
    """
    # What was done with another key has other pseudonyms, so it is not found again.
    folder_path = work_path / f"deidentified-{deidentify.pseudonym(key, 'work')[:12]}"
    folder_path.mkdir(parents=True, exist_ok=True)
    num_processes = min(len(os.sched_getaffinity(0)), max(1, len(photographs)))
    outcomes = []
    with deidentify.pool(num_processes) as processes:

        def outcome_of(place: int) -> Outcome:
            photograph = photographs[place]
            known = digests[photograph.path]
            done_path = folder_path / f"{known}.json"
            if done_path.exists():
                return replace(Outcome(**json.loads(done_path.read_bytes())), place=place, row=photograph.row)
            outcome, picture = _outcome_of(
                processes,
                photograph,
                place=place,
                known_sha256=known,
                name=str(photograph.path.relative_to(root_path)),
                key=key,
                jpeg_quality=jpeg_quality,
            )
            if picture:
                files.write(folder_path / outcome.file_name, picture)  # two that look alike have one name
            if outcome.code != "CHANGED":  # that may be mended, and then has to be looked at again
                files.write(done_path, json.dumps(asdict(outcome)).encode())
            return outcome

        for outcome in processes.map(outcome_of, range(len(photographs))):
            outcomes.append(outcome)
            on_progress(len(outcomes))
    return Prepared(outcomes=tuple(_each_once(_with_whole_studies(outcomes))), folder_path=folder_path)


def sent_facts(outcome: Outcome, cells: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a shard's row that de-identification fills: shifted year and method codes."""
    return {
        "shifted_year": outcome.shifted_year,
        "deid_methods": deidentify.methods_of(cells, has_year=outcome.shifted_year is not None),
    }


def ledger_text(prepared: Prepared) -> str:
    """Returns what became of each photograph as CSV, by which the site finds a photograph again that it sent."""
    lines = ["row,source_sha256,outcome,image_id"]
    lines += [
        # Of a duplicate, too: it leads to the one that left.
        f"{each.row},{each.source_sha256},{each.code or 'LEAVES'},"
        f"{each.image_id if each.code in ('', 'DUPLICATE') else ''}"
        for each in prepared.outcomes
    ]
    return "\n".join(lines) + "\n"


def _outcome_of(
    processes: isolation.Pool,
    photograph: Usable,
    *,
    place: int,
    known_sha256: str,
    name: str,
    key: bytes,
    jpeg_quality: int,
) -> tuple[Outcome, bytes]:
    cells = photograph.cells
    patient, visit = str(cells.get("patient", "")), str(cells.get("visit", ""))
    own_study = "/".join([patient, visit]) if patient else known_sha256
    try:
        is_large = photograph.path.stat().st_size > dicom.MAX_ENCODED_BYTES
        encoded = b"" if is_large else photograph.path.read_bytes()
    except OSError:
        encoded = b""
    if hashlib.sha256(encoded).hexdigest() != known_sha256:
        return Outcome(place=place, row=photograph.row, source_sha256=known_sha256, code="CHANGED", study=""), b""
    made = deidentify.rematerialise(
        processes,
        encoded,
        tokens={token for text in (name, patient, visit) for token in identifiers.tokens_of(text)},
        texts=[str(cells[column]) for column in _TEXT_CELLS if column in cells],
        jpeg_quality=jpeg_quality,
    )
    taken = made.taken or _date_in(visit)
    suffix = "jpg" if jpeg_quality else "png"
    outcome = Outcome(
        place=place,
        row=photograph.row,
        source_sha256=known_sha256,
        code=made.code,
        study=deidentify.uid_pseudonym(key, made.study or own_study),
        image_id=made.image_id,
        file_name=f"{made.image_id}.{suffix}" if made.encoded else "",
        visit=deidentify.uid_pseudonym(key, made.study) if made.study else "",
        shifted_year=deidentify.shifted_date(key, patient, taken).year if taken and patient else None,
    )
    return outcome, made.encoded


def _with_whole_studies(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Keeps back all of a study of which one photograph had an identifier left."""
    studies = {outcome.study for outcome in outcomes if outcome.code == "IDENTIFIER_LEFT"}
    return [
        replace(outcome, code="SAME_STUDY") if outcome.study in studies and not outcome.code else outcome
        for outcome in outcomes
    ]


def _each_once(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Leaves out what has the same pixels as an earlier one that leaves: outside of the field of view all is alike."""
    leaving: set[str] = set()
    for outcome in outcomes:
        is_again = not outcome.code and outcome.image_id in leaving
        leaving |= set() if outcome.code else {outcome.image_id}
        yield replace(outcome, code="DUPLICATE") if is_again else outcome


def _date_in(visit: str) -> datetime.date | None:
    """The date that a visit's code is, if it is one: 2024-03-09 or 20240309."""
    if not re.fullmatch(r"(19|20)\d\d-?\d\d-?\d\d", visit):
        return None
    try:
        return datetime.datetime.strptime(visit.replace("-", ""), "%Y%m%d").date()
    except ValueError:
        return None
