"""Metadata: the dictionary of columns, how cells are parsed, captions, and the summary that leaves a site.

A cell is parsed into one canonical value or listed with its row; nothing is guessed. This room knows no pixels.
"""

import csv
import difflib
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Cells = dict[str, Any]
DR_WORDS = (
    "no diabetic retinopathy",
    "mild non-proliferative diabetic retinopathy",
    "moderate non-proliferative diabetic retinopathy",
    "severe non-proliferative diabetic retinopathy",
    "proliferative diabetic retinopathy",
)
DME_WORDS = ("no diabetic macular edema", "mild diabetic macular edema", "severe diabetic macular edema")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One known column of ``metadata.csv``.

    ``words`` maps each canonical value to the ways in which the field writes it; ``kind`` says how other text is read.
    """

    name: str
    key: str
    kind: str
    help: str
    words: Mapping[Any, tuple[str, ...]] = field(default_factory=dict)
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf


_YES = ("yes", "y", "true", "1", "present", "positive", "pos")
_NO = ("no", "n", "false", "0", "absent", "negative", "neg", "none", "normal", "healthy")


def _condition(name: str, key: str, help: str, *aliases: str, absent: tuple[str, ...] = ()) -> Column:
    named = tuple(alias.lower() for alias in aliases)
    absent = tuple(f"no {alias}" for alias in named) + tuple(f"non-{alias}" for alias in named) + absent
    return Column(name=name, key=key, kind="yes/no", help=help, words={True: _YES + named, False: _NO + absent})


COLUMNS: tuple[Column, ...] = (
    Column(name="Patient", key="patient", kind="text", help="any code for the person; leaves as a pseudonym only"),
    Column(
        name="Eye",
        key="eye",
        kind="word",
        help="which eye",
        words={
            "left": ("l", "os", "oculus sinister", "left eye", "le", "sin"),
            "right": ("r", "od", "oculus dexter", "right eye", "re", "dex"),
        },
    ),
    Column(name="Visit", key="visit", kind="text", help="any code for the visit"),
    Column(name="Age", key="age", kind="number", help="age at the photograph", unit="years", low=0, high=120),
    Column(
        name="Sex",
        key="sex",
        kind="word",
        help="sex",
        words={"female": ("f", "woman", "w", "girl"), "male": ("m", "man", "boy")},
    ),
    Column(name="Ethnicity", key="ethnicity", kind="short text", help="ethnicity, in the site's own words"),
    Column(name="Country", key="country", kind="short text", help="country of the site or the patient"),
    Column(name="Camera", key="camera", kind="short text", help="brand and model of the camera"),
    Column(
        name="FieldOfView",
        key="field_of_view",
        kind="number",
        help="the camera's field of view",
        unit="degrees",
        low=15,
        high=200,
    ),
    Column(
        name="Quality",
        key="quality_grade",
        kind="word",
        help="a grader's word on the photograph",
        words={
            "good": ("gradable", "excellent", "high", "2", "adequate"),
            "usable": ("acceptable", "fair", "moderate", "1"),
            "reject": ("ungradable", "bad", "poor", "low", "0", "inadequate"),
        },
    ),
    Column(
        name="DR",
        key="dr",
        kind="grade",
        help="diabetic retinopathy, ICDR grade 0 to 4 (R0 to R3 of the UK as 0, 1, 3, 4); 'diabetic retinopathy' alone "
        "is taken as present without a grade",
        words={
            0: (
                "no dr",
                "none",
                "no",
                "r0",
                "grade 0",
                "normal",
                "healthy",
                "no apparent retinopathy",
                "no retinopathy",
                "absent",
                "no diabetic retinopathy",
                "without diabetic retinopathy",
                "dr0",
            ),
            1: (
                "mild",
                "mild dr",
                "mild npdr",
                "npdr mild",
                "r1",
                "grade 1",
                "background",
                "background retinopathy",
                "mild diabetic retinopathy",
                "mild non-proliferative diabetic retinopathy",
                "mild nonproliferative",
                "dr1",
                "mild nonproliferative diabetic retinopathy",
                "background diabetic retinopathy",
            ),
            2: (
                "moderate",
                "moderate dr",
                "moderate npdr",
                "npdr moderate",
                "grade 2",
                "moderate diabetic retinopathy",
                "moderate non-proliferative diabetic retinopathy",
                "moderate nonproliferative diabetic retinopathy",
                "dr2",
            ),
            3: (
                "severe",
                "severe dr",
                "severe npdr",
                "npdr severe",
                "r2",
                "grade 3",
                "pre-proliferative",
                "dr3",
                "preproliferative",
                "pre-proliferative diabetic retinopathy",
                "severe diabetic retinopathy",
                "severe non-proliferative diabetic retinopathy",
                "severe nonproliferative diabetic retinopathy",
            ),
            4: (
                "proliferative",
                "proliferative dr",
                "pdr",
                "r3",
                "grade 4",
                "proliferative diabetic retinopathy",
                "dr4",
                "proliferative retinopathy",
                "r3a",
                "r3s",
            ),
            "present": (
                "diabetic retinopathy",
                "dr",
                "present",
                "yes",
                "positive",
                "npdr",
                "non-proliferative diabetic retinopathy",
                "nonproliferative diabetic retinopathy",
            ),
        },
        low=0,
        high=4,
    ),
    Column(
        name="DME",
        key="dme",
        kind="grade",
        help="diabetic macular edema: 0 none, 1 mild or moderate (off centre), 2 severe (centre involved). M0 is 0; "
        "the UK's M1 and a bare 'yes' name no grade and are not taken",
        words={
            0: (
                "no dme",
                "none",
                "no",
                "m0",
                "absent",
                "no macular edema",
                "no macular oedema",
                "grade 0",
                "normal",
                "no diabetic macular edema",
                "no diabetic macular oedema",
            ),
            1: (
                "mild",
                "mild dme",
                "moderate",
                "grade 1",
                "mild macular edema",
                "mild macular oedema",
                "moderate dme",
                "moderate macular edema",
                "mild diabetic macular edema",
                "mild diabetic macular oedema",
                "non-centre involving",
                "non-center involving",
            ),
            2: (
                "severe",
                "severe dme",
                "grade 2",
                "severe macular edema",
                "severe macular oedema",
                "centre involving",
                "center involving",
                "severe diabetic macular edema",
                "severe diabetic macular oedema",
                "ci-dme",
            ),
        },
        low=0,
        high=2,
    ),
    _condition("Glaucoma", "glaucoma", "glaucoma", "glaucoma", "glaucomatous", "poag", "open-angle glaucoma", "g"),
    _condition(
        "AMD",
        "amd",
        "age-related macular degeneration",
        "amd",
        "armd",
        "age-related macular degeneration",
        "macular degeneration",
        "early amd",
        "intermediate amd",
        "late amd",
        "wet amd",
        "dry amd",
    ),
    _condition("Cataract", "cataract", "cataract", "cataract"),
    _condition(
        "PathologicMyopia",
        "pathologic_myopia",
        "pathologic myopia",
        "pathologic myopia",
        "pathological myopia",
        "pm",
        "myopic maculopathy",
    ),
    _condition("Hypertension", "hypertension", "arterial hypertension", "hypertension", "hypertensive", "htn"),
    _condition(
        "Diabetes",
        "diabetes",
        "diabetes mellitus",
        "diabetes",
        "diabetic",
        "dm",
        "t1dm",
        "t2dm",
        "type 1 diabetes",
        "type 2 diabetes",
        "diabetes mellitus",
    ),
    Column(name="HbA1c", key="hba1c", kind="number", help="glycated haemoglobin", unit="%", low=3, high=20),
    Column(name="SBP", key="sbp", kind="number", help="systolic blood pressure", unit="mmHg", low=50, high=300),
    _condition("MI", "mi", "myocardial infarction", "mi", "myocardial infarction", "heart attack"),
    _condition("Stroke", "stroke", "stroke", "stroke", "ischaemic stroke", "ischemic stroke", "cva"),
    _condition("HeartFailure", "heart_failure", "heart failure", "heart failure", "hf", "chf"),
    _condition("CKD", "ckd", "chronic kidney disease", "ckd", "chronic kidney disease"),
    _condition(
        "Parkinsons",
        "parkinsons",
        "Parkinson's disease",
        "parkinsons",
        "parkinson's",
        "parkinson",
        "parkinson's disease",
        "pd",
    ),
    _condition("Dementia", "dementia", "dementia", "dementia", "alzheimer", "alzheimer's", "alzheimer's disease"),
)
BY_KEY = {column.key: column for column in COLUMNS}
_ARROW_TYPES = {"number": pa.float32(), "grade": pa.int8(), "yes/no": pa.bool_()}
ARROW_FIELDS: list[pa.Field] = [
    *(pa.field(column.key, _ARROW_TYPES.get(column.kind, pa.string())) for column in COLUMNS),
    pa.field("dr_present", pa.bool_()),
]
_MAX_TEXT = 64
_UNITS = {
    "age": ("years old", "year old", "years", "year", "yrs", "yr", "y/o", "yo", "y"),
    "field_of_view": ("degrees", "degree", "deg", "\N{DEGREE SIGN}"),
    "hba1c": ("%", "percent", "% ngsp"),
    "sbp": ("mmhg", "mm hg"),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A cell that was not understood; ``row`` is the line of the file, the header being line 1."""

    row: int
    column: str
    value: str
    reason: str
    suggestion: str | None = None


@dataclass(frozen=True, kw_only=True)
class MetadataRow:
    """One photograph's line: its file name and its canonical cells by column key; blanks are absent."""

    image: str
    cells: Cells
    line: int


@dataclass(frozen=True, kw_only=True)
class CellCounts:
    """How a column's cells were understood."""

    num_parsed: int = 0
    num_blank: int = 0
    num_not_understood: int = 0


@dataclass(frozen=True, kw_only=True)
class MetadataTable:
    """A parsed ``metadata.csv``."""

    rows: list[MetadataRow]
    problems: list[Problem]
    unknown_columns: list[str]
    counts_by_column: dict[str, CellCounts]


def parse_cell(column: Column, text: str) -> Any:
    """Parses one cell.

    Returns:
        The canonical value: int for a grade, float for a number, bool for yes/no, str otherwise; None where it is
        blank. A DR cell without a grade gives ``"present"``.

    Raises:
        ValueError: With the reason, if the text is not understood; it is never guessed.
    """
    plain = _plain(text)
    if plain in ("", "na", "n/a", "nan", "null", "unknown", "not known", "missing", "-", "?"):
        return None
    if column.kind in ("text", "short text"):
        if len(text.strip()) > _MAX_TEXT:
            raise ValueError(f"longer than {_MAX_TEXT} characters; required a short word or code")
        return _named(column.key, text.strip())
    if column.kind == "number":
        return _parse_number(column, plain)
    for value, words in column.words.items():
        if plain == _plain(str(value)) or plain in words:
            return value
    if column.kind == "grade" and re.fullmatch(r"\d+(\.0+)?", plain):
        grade = int(float(plain))
        if column.low <= grade <= column.high:
            return grade
        raise ValueError(f"required a grade from {column.low:g} to {column.high:g}")
    if column.kind == "yes/no" and re.fullmatch(r"[01]\.0+", plain):
        return plain.startswith("1")
    raise ValueError("not a known word of this column")


def suggestion_for(column: Column, text: str) -> str | None:
    """Returns the known word nearest to a text that was not understood, if one is near."""
    known = [str(value) for value in column.words] + [word for words in column.words.values() for word in words]
    near = difflib.get_close_matches(_plain(text), known, n=1, cutoff=0.6)
    return near[0] if near else None


def _parse_number(column: Column, plain: str) -> float:
    number, unit = _split_number(plain)
    if number is None:
        raise ValueError(f"not a number; required {column.help} in {column.unit}")
    if unit in ("mmol/mol",) and column.key == "hba1c":
        number = number * 0.09148 + 2.152  # IFCC to NGSP, https://ngsp.org/ifcc.asp
    elif unit and unit not in _UNITS.get(column.key, ()):
        raise ValueError(f"the unit {unit!r} is not known here; required {column.unit}")
    if not column.low <= number <= column.high:
        raise ValueError(f"out of range; required {column.low:g} to {column.high:g} {column.unit}")
    return round(number, 3)


def _split_number(plain: str) -> tuple[float | None, str]:
    found = re.fullmatch(r"([-+]?\d+(?:[.,]\d+)?)\s*(.*)", plain)
    return (float(found[1].replace(",", ".")), found[2].strip()) if found else (None, "")


def read_metadata(csv_path: Path) -> MetadataTable:
    """Reads ``metadata.csv``: comma, semicolon or tab, UTF-8 (with or without a mark) or Latin-1.

    Raises:
        ValueError: If the file has no header, or no column ``Image``.
    """
    content = csv_path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = text.splitlines()
    if not lines or not lines[0].strip():
        raise ValueError("the file is empty; required a header line with the column Image")
    delimiter = max(",;\t", key=lines[0].count)
    table = csv.reader(io.StringIO(text), delimiter=delimiter)
    header = next(table)
    known = {_squeezed(column.name): column for column in COLUMNS}
    image_places = [place for place, name in enumerate(header) if _squeezed(name) in ("image", "imagename", "filename")]
    if not image_places:
        raise ValueError(f"there is no column Image; found the columns {', '.join(name.strip() for name in header)}")
    places = {place: known[_squeezed(name)] for place, name in enumerate(header) if _squeezed(name) in known}
    unknown = [
        name.strip()
        for place, name in enumerate(header)
        if place not in places and place != image_places[0] and name.strip()
    ]
    repeated = [name for name, times in Counter(column.name for column in places.values()).items() if times > 1]
    if repeated or len(image_places) > 1:
        raise ValueError(
            f"the header has these columns more than once: {', '.join(repeated or ['Image'])}; required once each: "
            "nobody can tell which one counts"
        )
    rows: list[MetadataRow] = []
    problems: list[Problem] = []
    counts: Counter[tuple[str, str]] = Counter()
    for record in table:
        line = table.line_num
        if not any(cell.strip() for cell in record):
            continue
        image = record[image_places[0]].strip() if image_places[0] < len(record) else ""
        if not image:
            problems.append(Problem(row=line, column="Image", value="", reason="the file name is blank"))
            continue
        cells: Cells = {}
        num_surplus = len(record) - len(header)
        if num_surplus > 0 and any(cell.strip() for cell in record[len(header) :]):
            reason = f"the line has {num_surplus} cell(s) more than the header, so that its values may be shifted; "
            problems.append(
                Problem(row=line, column="", value="", reason=reason + "put quotes around values with separators")
            )
            counts.update((column.name, "not understood") for column in places.values())
            rows.append(MetadataRow(image=image, cells={}, line=line))
            continue
        for place, column in places.items():
            text = record[place] if place < len(record) else ""
            try:
                value = parse_cell(column, text)
            except ValueError as error:
                suggestion = suggestion_for(column, text)
                problems.append(
                    Problem(row=line, column=column.name, value=text.strip(), reason=str(error), suggestion=suggestion)
                )
                counts[column.name, "not understood"] += 1
                continue
            counts[column.name, "blank" if value is None else "parsed"] += 1
            if value is not None:
                cells |= _canonical(column.key, value)
        rows.append(MetadataRow(image=image, cells=cells, line=line))
    counts_by_column = {
        column.name: CellCounts(
            num_parsed=counts[column.name, "parsed"],
            num_blank=counts[column.name, "blank"],
            num_not_understood=counts[column.name, "not understood"],
        )
        for column in places.values()
    }
    return MetadataTable(rows=rows, problems=problems, unknown_columns=unknown, counts_by_column=counts_by_column)


def _canonical(key: str, value: Any) -> Cells:
    if key != "dr":
        return {key: value}
    return {"dr_present": True} if value == "present" else {"dr": value, "dr_present": value > 0}


def arrow_values(cells: Mapping[str, Any]) -> Cells:
    """Returns one value for each of `ARROW_FIELDS`, None where a cell is blank.

    Raises:
        ValueError: If ``cells`` has a key that is no column.
    """
    names = [each.name for each in ARROW_FIELDS]
    if odd := sorted(set(cells) - set(names)):
        raise ValueError(f"found cells that are no columns: {odd}")
    return {name: cells.get(name) for name in names}


_ADJECTIVES = {
    "australia": "Australian",
    "austria": "Austrian",
    "bangladesh": "Bangladeshi",
    "belgium": "Belgian",
    "brazil": "Brazilian",
    "canada": "Canadian",
    "chile": "Chilean",
    "china": "Chinese",
    "colombia": "Colombian",
    "czechia": "Czech",
    "denmark": "Danish",
    "egypt": "Egyptian",
    "ethiopia": "Ethiopian",
    "finland": "Finnish",
    "france": "French",
    "germany": "German",
    "ghana": "Ghanaian",
    "greece": "Greek",
    "hong kong": "Hong Kong",
    "india": "Indian",
    "indonesia": "Indonesian",
    "iran": "Iranian",
    "ireland": "Irish",
    "israel": "Israeli",
    "italy": "Italian",
    "japan": "Japanese",
    "kenya": "Kenyan",
    "malaysia": "Malaysian",
    "mexico": "Mexican",
    "nepal": "Nepali",
    "netherlands": "Dutch",
    "new zealand": "New Zealander",
    "nigeria": "Nigerian",
    "norway": "Norwegian",
    "pakistan": "Pakistani",
    "peru": "Peruvian",
    "philippines": "Filipino",
    "poland": "Polish",
    "portugal": "Portuguese",
    "rwanda": "Rwandan",
    "saudi arabia": "Saudi",
    "singapore": "Singaporean",
    "south africa": "South African",
    "south korea": "South Korean",
    "spain": "Spanish",
    "sri lanka": "Sri Lankan",
    "sweden": "Swedish",
    "switzerland": "Swiss",
    "tanzania": "Tanzanian",
    "thailand": "Thai",
    "turkey": "Turkish",
    "uganda": "Ugandan",
    "united kingdom": "British",
    "united states": "American",
    "vietnam": "Vietnamese",
    "zambia": "Zambian",
}
_COUNTRY_ALIASES = {
    "uk": "United Kingdom",
    "great britain": "United Kingdom",
    "england": "United Kingdom",
    "usa": "United States",
    "us": "United States",
    "united states of america": "United States",
    "czech republic": "Czechia",
    "korea": "South Korea",
    "republic of korea": "South Korea",
    "turkiye": "Turkey",
    "the netherlands": "Netherlands",
    "prc": "China",
}
_OCULAR = (
    ("glaucoma", "glaucoma"),
    ("amd", "age-related macular degeneration"),
    ("cataract", "cataract"),
    ("pathologic_myopia", "pathologic myopia"),
)
GRADED_KEYS = ("dr_present", *(key for key, _ in _OCULAR))  # yes or no, and a photograph may show it
_SYSTEMIC = (
    ("diabetes", "diabetes"),
    ("hypertension", "hypertension"),
    ("mi", "myocardial infarction"),
    ("stroke", "stroke"),
    ("heart_failure", "heart failure"),
    ("ckd", "chronic kidney disease"),
    ("parkinsons", "Parkinson's disease"),
    ("dementia", "dementia"),
)


def caption(cells: Mapping[str, Any]) -> str:
    """Says the known cells in plain words, always in the same order; blanks are left out.

    The absence of an ocular disease is said, since a photograph shows it; that of a systemic one is not. Measurements
    are never said: they are in no summary, and a number may be one patient's alone.

    For example ``colour fundus photograph, moderate non-proliferative diabetic retinopathy, 62-year-old woman, British,
    Topcon``.
    """
    known = {key: value for key, value in cells.items() if value is not None}
    parts = ["colour fundus photograph"]
    if "dr" in known:
        parts.append(DR_WORDS[int(known["dr"])])
    elif known.get("dr_present"):
        parts.append("diabetic retinopathy")
    if "dme" in known:
        parts.append(DME_WORDS[int(known["dme"])])
    parts.extend(words if known[key] else f"no {words}" for key, words in _OCULAR if key in known)
    parts.extend(words for key, words in _SYSTEMIC if known.get(key))
    person = {"female": "woman", "male": "man"}.get(known.get("sex", ""))
    if "age" in known:
        parts.append(f"{int(known['age'])}-year-old {person or 'person'}")
    elif person:
        parts.append(person)
    if "ethnicity" in known:
        parts.append(str(known["ethnicity"]))
    if "country" in known:
        country = str(known["country"])
        parts.append(_ADJECTIVES.get(country.lower(), f"from {country}"))
    if "camera" in known:
        parts.append(str(known["camera"]))
    if "eye" in known:
        parts.append(f"{known['eye']} eye")
    return ", ".join(parts)


NUM_SHORTENED = 10  # ways to shorten captions, so that a share of cells is dropped in tenths
_PERSON = re.compile(r"(\d+-year-old) (\w+)")


def shortened(caption: str, way: int, *, cell_dropout: float) -> str:
    """Leaves cells out of a caption, so that a generator learns to be asked for one thing without the others.

    Of the `NUM_SHORTENED` ways each leaves another set of cells out, and every cell is left out in as many of them as
    its share says, whatever the other cells. So few captions come of many photographs, and each is encoded once.

    Args:
        caption: As `caption` says it.
        way: 0 to below `NUM_SHORTENED`.
        cell_dropout: Share of the ways in which a cell is left out, in tenths.
    """
    first, *phrases = caption.split(", ")
    kept = [first]
    for phrase in phrases:
        words = [phrase]
        if person := _PERSON.fullmatch(phrase):
            words = [person[1], *({person[2]} - {"person"})]
        left = [word for word in words if not _is_dropped(word, way, cell_dropout)]
        if left and left[0].endswith("-year-old"):
            left = [f"{left[0]} {left[1] if len(left) > 1 else 'person'}"]
        kept += left
    return ", ".join(kept)


def _is_dropped(word: str, way: int, cell_dropout: float) -> bool:
    order = sorted(range(NUM_SHORTENED), key=lambda each: hashlib.sha256(f"{each} {word}".encode()).digest())
    return order.index(way) < round(cell_dropout * NUM_SHORTENED)


def caption_words() -> list[str]:
    """Returns the words that captions are made of, for a tokenizer of one's own; names of cameras are spelled out."""
    phrases = [
        "colour fundus photograph",
        *DR_WORDS,
        "diabetic retinopathy",
        *DME_WORDS,
        "no",
        "from",
        "left eye",
        "right eye",
    ]
    phrases += [words for _, words in (*_OCULAR, *_SYSTEMIC)] + [*_ADJECTIVES.values()]
    phrases += ["HbA1c percent", "systolic blood pressure", "year-old woman man person"]
    phrases += [str(number) for number in range(120)]
    words = [word for phrase in phrases for word in re.findall(r"[\w']+|-", phrase.lower())]
    return sorted(set(words))


# The summary that leaves a site.

_COUNTED_KINDS = ("word", "grade", "yes/no", "short text")
SUMMARY_KEYS = (*(column.key for column in COLUMNS if column.kind in _COUNTED_KINDS), "dr_present", "age_band")
MEASUREMENTS = ("hba1c", "sbp", "field_of_view")  # leave as measured, with a real photograph alone
AGE_BANDS = ("<20", *(f"{age}-{age + 4}" for age in range(20, 90, 5)), "90+")
BLANK = ""
SUMMARY_SCHEMA = "metadata-summary/2"


@dataclass(frozen=True, kw_only=True)
class MetadataSummary:
    """What a site tells about its patients, as `disclosure.release` made it and `attacker.audit` attacks it.

    Every count is of distinct patients, each counted once in a table, and rounded. None stands for a suppressed one: of
    fewer than ``min_patients`` (none at all included), or withheld so that such a one cannot be computed. Patients
    whose value is blank, or too rare to be listed, are what a table leaves of ``num_patients``.

    Args:
        policy: The disclosure policy and its version, ``sdc/1``.
        variant: ``standard`` or ``demonstration``.
        min_patients: The fewest patients that a count may be of.
        rounding: Counts are multiples of it, each rounded from the truth.
        num_patients: All patients; None where they are too few to tell.
        patients_below: Where ``num_patients`` is None: how many there would have to be; then there is no table.
        num_images: Their photographs; 0 where there is no table.
        country: That of most patients; empty where it is not known of ``min_patients``.
        counts: Counts by value (as text) by column key.
        pair_counts: Counts by two values by two keys joined by ``*``.
    """

    policy: str
    variant: str
    min_patients: int
    rounding: int
    num_patients: int | None
    patients_below: int | None
    num_images: int
    country: str
    counts: dict[str, dict[str, int | None]]
    pair_counts: dict[str, list[tuple[str, str, int | None]]]


def age_band(age: float) -> str:
    """Returns the 5-year band of an age, with the ends merged: ``<20``, ``20-24``, ..., ``90+``."""
    if age < 20:
        return "<20"
    return "90+" if age >= 90 else f"{int(age) // 5 * 5}-{int(age) // 5 * 5 + 4}"


def values_of(key: str) -> tuple[str, ...] | None:
    """Returns the values, as text, that a column of the summary can have; None where the site writes its own words.

    A photograph of the quality ``reject`` is in no contribution.
    """
    if key == "age_band":
        return AGE_BANDS
    match "yes/no" if key == "dr_present" else BY_KEY[key].kind:
        case "yes/no":
            return ("yes", "no")
        case "grade":
            return tuple(str(value) for value in BY_KEY[key].words if isinstance(value, int))
        case "word":
            return tuple(str(value) for value in BY_KEY[key].words if value != "reject")
        case _:
            return None


def named_countries() -> tuple[str, ...]:
    """Returns the countries that captions have an adjective for, as rows write them."""
    return tuple(sorted(plain.title() for plain in _ADJECTIVES))


def summary_texts(cells: Mapping[str, Any]) -> dict[str, str]:
    """Returns a photograph's values as the summary's tables write them, by column key; blanks are absent."""
    texts = {key: _as_text(cells[key]) for key in SUMMARY_KEYS if cells.get(key) is not None}
    if cells.get("age") is not None:
        texts["age_band"] = age_band(float(cells["age"]))
    return texts


def _as_text(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool | np.bool_) else str(value)


def cells_told(cells: Mapping[str, Any], keys: Set[str]) -> Cells:
    """Keeps the cells of these columns of a summary; an age becomes the middle of its band."""
    kept = {key: cells[key] for key in keys if key != "age_band"}
    return kept | {"age": _middle_of(age_band(float(cells["age"])))} if "age_band" in keys else kept


def cells_of(key: str, text: str) -> Cells:
    """Returns the cells that a value of a summary's table stands for; none for a blank.

    The inverse of `summary_texts`, but that an age is the middle of its band, as in `cells_told`.
    """
    if text == BLANK:
        return {}
    if key == "age_band":
        return {"age": _middle_of(text)}
    match "yes/no" if key == "dr_present" else BY_KEY[key].kind:
        case "yes/no":
            return _canonical(key, text == "yes")
        case "grade":
            return _canonical(key, int(text))
        case _:
            return {key: text}


def _middle_of(band: str) -> float:
    if band == "<20":
        return 14.0
    return 92.0 if band == "90+" else float(int(band[:2]) + 2)


def summary_to_json(summary: MetadataSummary) -> dict[str, Any]:
    """Returns the summary as plain JSON-able values."""
    pair_counts = {name: [list(row) for row in rows] for name, rows in summary.pair_counts.items()}
    return {"schema": SUMMARY_SCHEMA} | asdict(summary) | {"pair_counts": pair_counts}


def summary_from_json(content: Mapping[str, Any]) -> MetadataSummary:
    """Rebuilds a summary.

    Raises:
        ValueError: If the content is not a summary of this version.
    """
    names = {"schema", *(each.name for each in fields(MetadataSummary))}
    if not isinstance(content, Mapping) or content.get("schema") != SUMMARY_SCHEMA or set(content) != names:
        raise ValueError(f"not a metadata summary of version {SUMMARY_SCHEMA}")
    is_right = isinstance(content["counts"], dict) and all(
        isinstance(each, dict) for each in content["counts"].values()
    )
    is_right &= isinstance(content["pair_counts"], dict) and all(
        isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows)
        for rows in content["pair_counts"].values()
    )
    if not is_right:
        raise ValueError("a damaged metadata summary: its tables are not of values and counts")
    return MetadataSummary(
        policy=_text(content["policy"]),
        variant=_text(content["variant"]),
        min_patients=_count(content["min_patients"]),
        rounding=_count(content["rounding"]),
        num_patients=_count_or_none(content["num_patients"]),
        patients_below=_count_or_none(content["patients_below"]),
        num_images=_count(content["num_images"]),
        country=_text(content["country"]),
        counts={
            _text(key): {_text(value): _count_or_none(count) for value, count in table.items()}
            for key, table in content["counts"].items()
        },
        pair_counts={
            _text(name): [(_text(first), _text(second), _count_or_none(count)) for first, second, count in rows]
            for name, rows in content["pair_counts"].items()
        },
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"a metadata summary holds something that is no text of up to {_MAX_TEXT} characters")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 10**9:
        raise ValueError("a metadata summary holds something that is no count")
    return value


def _count_or_none(value: Any) -> int | None:
    return None if value is None else _count(value)


def dictionary_text() -> str:
    """Returns the dictionary of columns as a table in words."""
    lines = [f"{'column':<18}{'kind':<12}{'unit':<9}what, and examples of what is understood", "-" * 110]
    lines.append(f"{'Image':<18}{'file name':<12}{'':<9}required; every other column and cell may be blank")
    for column in COLUMNS:
        examples = ", ".join(str(word) for words in column.words.values() for word in words[:2])
        text = f"{column.help}{': ' + examples if examples else ''}"
        lines.append(f"{column.name:<18}{column.kind:<12}{column.unit:<9}{text}")
    return "\n".join(lines)


def _named(key: str, text: str) -> str:
    if key != "country":
        return " ".join(text.split())
    plain = _plain(text)
    alias = _COUNTRY_ALIASES.get(plain)
    if alias:
        return alias
    return plain.title() if plain in _ADJECTIVES else " ".join(text.split())


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").lower().split())


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name).lower()


def to_bytes(summary: MetadataSummary) -> bytes:
    """Returns the summary as the one JSON text that stands for it."""
    return json.dumps(summary_to_json(summary), sort_keys=True, indent=1).encode()
