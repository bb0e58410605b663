"""The dictionary of columns, captions and the summary, against hand-made truths and the real sites."""

import json
from pathlib import Path

import pytest

from gretfound import metadata
from tests.conftest import REAL_PHOTOGRAPHS
from tests.summaries import summary_of

COLUMN = {column.name: column for column in metadata.COLUMNS}


def read(folder: Path, content: str | bytes) -> metadata.MetadataTable:
    path = folder / "metadata.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return metadata.read_metadata(path)


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ("DR", "R0", 0), ("DR", "R1", 1), ("DR", "R2", 3), ("DR", "R3", 4), ("DR", "2", 2), ("DR", "2.0", 2),
        ("DR", "NPDR", "present"), ("DR", "PDR", 4), ("DR", "NPDR mild", 1), ("DR", "mild diabetic retinopathy", 1),
        ("DR", "diabetic retinopathy", "present"), ("DR", "", None), ("DR", "n/a", None),
        ("DME", "M0", 0), ("DME", "severe macular edema", 2), ("DME", "mild macular oedema", 1),
        ("Eye", "od", "right"), ("Eye", "OS", "left"), ("Eye", "R", "right"), ("Eye", "Left", "left"),
        ("Sex", "F", "female"), ("Sex", "woman", "female"), ("Sex", "Male", "male"),
        ("Age", "62 years", 62.0), ("Age", "62,5", 62.5),
        ("HbA1c", "7.2 %", 7.2), ("SBP", "135 mmHg", 135.0), ("FieldOfView", "45 degrees", 45.0),
        ("Glaucoma", "glaucoma", True), ("Glaucoma", "healthy", False), ("Glaucoma", "no glaucoma", False),
        ("AMD", "yes", True), ("Stroke", "0", False), ("CKD", "absent", False), ("Dementia", "present", True),
    ],
)  # fmt: skip
def test_parse_cell__as_the_field_writes(column, text, value) -> None:
    parsed = metadata.parse_cell(COLUMN[column], text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(("ifcc", "ngsp"), [(42, 6.0), (48, 6.5), (53, 7.0), (64, 8.0), (75, 9.0)])
def test_parse_cell__hba1c_of_the_published_table(ifcc, ngsp) -> None:
    assert metadata.parse_cell(COLUMN["HbA1c"], f"{ifcc} mmol/mol") == pytest.approx(ngsp, abs=0.05)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("Age", "130"), ("Age", "-3"), ("Age", "old"), ("HbA1c", "55"), ("SBP", "20"), ("FieldOfView", "300"),
        ("DR", "5"), ("DR", "perhaps"), ("Glaucoma", "suspect"), ("Sex", "3"), ("Age", "62 kg"),
    ],
)  # fmt: skip
def test_parse_cell__never_guesses(column, text) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        metadata.parse_cell(COLUMN[column], text)


def test_columns__are_those_of_the_design() -> None:
    assert len(metadata.COLUMNS) == 26
    assert len({column.key for column in metadata.COLUMNS}) == 26


def test_read_metadata__header_is_forgiven_and_unknown_columns_reported(tmp_path) -> None:
    table = read(tmp_path, "IMAGE, heart_failure ,field of view,Shoe Size\na.jpg,yes,45,43\n")
    assert table.rows[0].cells == {"heart_failure": True, "field_of_view": 45.0}
    assert table.unknown_columns == ["Shoe Size"]


@pytest.mark.parametrize(
    "content",
    ["\ufeffImage,Age\na.jpg,62.5\n", "Image;Age\na.jpg;62,5\n", "Image\tAge\r\na.jpg\t62.5\r\n"],
    ids=["byte-order-mark", "semicolon", "tab"],
)
def test_read_metadata__spreadsheet_dialects(tmp_path, content) -> None:
    table = read(tmp_path, content)
    assert [(row.image, row.cells) for row in table.rows] == [("a.jpg", {"age": 62.5})]
    assert not table.problems


def test_read_metadata__problem_has_row_value_and_nearest_word(tmp_path) -> None:
    table = read(tmp_path, "Image,DR,Sex\na.jpg,mild,F\nb.jpg,modderate,F\nc.jpg,,M\n")
    (problem,) = table.problems
    assert (problem.row, problem.column, problem.value, problem.suggestion) == (3, "DR", "modderate", "moderate")
    assert "dr" not in table.rows[1].cells and table.rows[1].cells["sex"] == "female"
    counts = table.counts_by_column["DR"]
    assert (counts.num_parsed, counts.num_blank, counts.num_not_understood) == (1, 1, 1)


@pytest.mark.parametrize("content", ["", "Age,DR\n62,mild\n"], ids=["empty", "no-image-column"])
def test_read_metadata__says_what_is_required(tmp_path, content) -> None:
    with pytest.raises(ValueError, match="Image"):
        read(tmp_path, content)


def test_read_metadata__ungraded_retinopathy_is_present(tmp_path) -> None:
    table = read(tmp_path, "Image,DR\na.jpg,diabetic retinopathy\nb.jpg,R0\nc.jpg,2\n")
    assert [row.cells for row in table.rows] == [
        {"dr_present": True},
        {"dr": 0, "dr_present": False},
        {"dr": 2, "dr_present": True},
    ]


@pytest.mark.skipif(not REAL_PHOTOGRAPHS.is_dir(), reason="the real photographs are not on this machine")
@pytest.mark.parametrize(("site", "num_rows"), [("chasedb1", 28), ("hrf", 45), ("idrid", 413), ("idrid_test", 103)])
def test_read_metadata__real_sites(site, num_rows) -> None:
    table = metadata.read_metadata(REAL_PHOTOGRAPHS / site / "metadata.csv")
    assert (len(table.rows), table.problems, table.unknown_columns) == (num_rows, [], [])


def test_caption__of_the_memo() -> None:
    cells = {"camera": "Topcon", "country": "United Kingdom", "sex": "female", "age": 62.0, "dr": 2}
    assert metadata.caption(cells) == (
        "colour fundus photograph, moderate non-proliferative diabetic retinopathy, 62-year-old woman, British, Topcon"
    )
    assert metadata.caption({}) == "colour fundus photograph"


def test_caption__absence_is_said_of_ocular_disease_only() -> None:
    said = metadata.caption({"glaucoma": False, "stroke": False, "ckd": True})
    assert "no glaucoma" in said and "stroke" not in said and "chronic kidney disease" in said


def test_shortened__each_cell_is_left_out_in_its_share_of_the_ways_whatever_the_others() -> None:
    cells = {"camera": "Topcon", "sex": "female", "age": 62.0, "dr": 2, "glaucoma": False, "eye": "left"}
    whole = metadata.caption(cells)
    ways = [metadata.shortened(whole, way, cell_dropout=0.3) for way in range(metadata.NUM_SHORTENED)]
    for words in ("Topcon", "62-year-old", "woman", "moderate non-proliferative", "no glaucoma", "left eye"):
        assert sum(words in way for way in ways) == 7
    assert len(set(ways)) > 6, "not all cells at once"
    without_age = metadata.caption({name: value for name, value in cells.items() if name != "age"})
    without_sex = metadata.caption({name: value for name, value in cells.items() if name != "sex"})
    for way, said in enumerate(ways):
        if "62-year-old" not in said:
            assert said == metadata.shortened(without_age, way, cell_dropout=0.3)
        elif "woman" not in said:
            assert said == metadata.shortened(without_sex, way, cell_dropout=0.3)
    assert {metadata.shortened(whole, way, cell_dropout=0.0) for way in range(10)} == {whole}


def test_arrow_values__every_field_and_no_other() -> None:
    values = metadata.arrow_values({"dr": 2})
    assert list(values) == [field.name for field in metadata.ARROW_FIELDS]
    assert [name for name, value in values.items() if value is not None] == ["dr"]
    with pytest.raises(ValueError, match="no columns"):
        metadata.arrow_values({"shoe_size": 43})


@pytest.mark.parametrize(("age", "band"), [(3, "<20"), (19.9, "<20"), (20, "20-24"), (89.5, "85-89"), (97, "90+")])
def test_age_band__ends_are_merged(age, band) -> None:
    assert metadata.age_band(age) == band


def test_summary_from_json__round_trip() -> None:
    rows: list[metadata.Cells] = [
        {"sex": "female" if place % 3 else "male", "age": 20.0 + place} for place in range(60)
    ]
    summary = summary_of(rows)
    assert summary.counts["sex"] == {"female": 40, "male": 20} and summary.pair_counts["sex*age_band"]
    text = metadata.to_bytes(summary)
    again = metadata.summary_from_json(json.loads(text))
    assert again == summary and metadata.to_bytes(again) == text


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": "metadata-summary/1"}, {"rows": []}, {"num_patients": -1}, {"num_patients": True},
        {"min_patients": None}, {"counts": {"sex": {"female": 1.5}}}, {"counts": []}, {"country": "x" * 65},
        {"pair_counts": {"dr*sex": [["0", "female"]]}}, {"counts": {"camera": {"a\nb": 20}}},
    ],
)  # fmt: skip
def test_summary_from_json__refuses_what_is_no_summary(damage: dict[str, object]) -> None:
    content = metadata.summary_to_json(summary_of([{"sex": "female"}] * 20))
    with pytest.raises(ValueError, match="summary"):
        metadata.summary_from_json(content | damage)


def test_caption__says_no_measurement() -> None:
    assert metadata.caption({"hba1c": 7.25, "sbp": 141.0, "diabetes": True}) == "colour fundus photograph, diabetes"


def test_read_metadata__a_column_given_twice_is_an_error(tmp_path: Path) -> None:
    for header in ("Image,Age,age", "Image,image,Age"):
        with pytest.raises(ValueError, match=r"more than once: (Age|Image); required once"):
            read(tmp_path, f"{header}\na.jpg,50,60\n")


def test_read_metadata__a_line_with_too_many_cells_is_named_and_not_believed(tmp_path: Path) -> None:
    table = read(tmp_path, "Image,Age,Sex\na.jpg,50,female\nb.jpg,Smith, 61,male\nc.jpg,62,male,,\n")
    assert [(row.image, row.cells) for row in table.rows] == [
        ("a.jpg", {"age": 50.0, "sex": "female"}),
        ("b.jpg", {}),
        ("c.jpg", {"age": 62.0, "sex": "male"}),
    ]
    (problem,) = table.problems
    assert problem.row == 3 and "1 cell(s) more than the header" in problem.reason
    assert table.counts_by_column["Age"].num_not_understood == 1
