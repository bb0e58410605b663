"""The check of a site's folder: what is wrong is named, nothing is written, and the verdict follows the policy."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gretfound import examination, phantom
from gretfound.examination import DEMONSTRATION, STANDARD, Examination
from tests import dicoms

SIZE_PX = 96
NUM_IMAGES = 14


@pytest.fixture(scope="module")
def drawn_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sites") / "aster"
    return phantom.write_site(phantom.SITES["aster"], path, num_images=NUM_IMAGES, seed=0, size_px=SIZE_PX)


@pytest.fixture
def site_path(drawn_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn_path, tmp_path / "site"))


def _files(folder_path: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder_path.rglob("*") if path.is_file()}


def _names(folder_path: Path) -> list[str]:
    return sorted(path.name for path in (folder_path / "traindata").iterdir())


def _details_of(found: Examination, words: str) -> tuple[str, ...]:
    return next(finding.details for finding in found.findings if words in finding.headline)


def test_examine__a_sound_folder(drawn_path: Path) -> None:
    before = _files(drawn_path)
    found = examination.examine(drawn_path, policy=DEMONSTRATION)
    assert found.findings == ()
    assert [len(found.photographs), found.num_readable, len(found.usable)] == [NUM_IMAGES] * 3
    rows = (drawn_path / "metadata.csv").read_text().splitlines()[1:]
    assert found.num_patients == len({row.split(",")[1] for row in rows})
    assert found.num_eyes == NUM_IMAGES
    assert all(photograph.has_field_of_view for photograph in found.photographs)
    assert {column.name: column.num_parsed for column in found.columns}["Age"] == NUM_IMAGES
    assert found.is_fit_for("images") and found.is_fit_for(None)
    assert _files(drawn_path) == before


def test_examine__names_everything_that_is_wrong(site_path: Path) -> None:
    names = _names(site_path)
    photographs_path = site_path / "traindata"
    corrupt, missing, doubled, upper = names[:4]
    (photographs_path / corrupt).write_bytes((photographs_path / corrupt).read_bytes()[:500])
    (photographs_path / missing).unlink()
    shutil.copy(photographs_path / doubled, photographs_path / "copy.jpg")
    (photographs_path / upper).rename(photographs_path / "UPPER.JPG")
    (photographs_path / "notes.txt").write_text("not a photograph")
    text = (site_path / "metadata.csv").read_text().replace(upper, "UPPER.JPG")
    header, first, second, *rows = text.splitlines()
    age = header.split(",").index("Age")
    cells = second.split(",")
    cells[age] = "about sixty"
    rows = [first, ",".join(cells), *rows, "copy.jpg" + first[first.index(",") :]]
    (site_path / "metadata.csv").write_text("\n".join([header + ",Colour", *(row + ",blue" for row in rows)]) + "\n")
    before = _files(site_path)

    found = examination.examine(site_path, policy=DEMONSTRATION)

    assert [detail.partition(":")[0] for detail in _details_of(found, "unreadable")] == [corrupt]
    assert _details_of(found, "missing") == (missing,)
    assert len(_details_of(found, "exactly like")) == 1
    assert {"copy.jpg", doubled} <= set(_details_of(found, "exactly like")[0].split("  "))
    assert _details_of(found, "no known image format") == ("notes.txt",)
    assert _details_of(found, "unknown column") == ("Colour",)
    problem = _details_of(found, "not understood")[0]
    assert "line 3" in problem and "Age" in problem and "about sixty" in problem
    assert {column.name: column.num_not_understood for column in found.columns}["Age"] == 1
    assert "UPPER.JPG" in {photograph.path.name for photograph in found.usable}
    assert len(found.usable) == NUM_IMAGES - 2
    for report in (examination.to_text(found), examination.to_html(found)):
        for word in (corrupt, missing, "copy.jpg", "notes.txt", "Colour", "about sixty"):
            assert word in report
    assert _files(site_path) == before


def test_examine__a_photograph_without_a_row_is_left_out(site_path: Path) -> None:
    lines = (site_path / "metadata.csv").read_text().splitlines()
    (site_path / "metadata.csv").write_text("\n".join(lines[:-1]) + "\n")
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert _details_of(found, "without a row") == (lines[-1].split(",")[0],)
    assert len(found.usable) == NUM_IMAGES - 1


def test_examine__a_copy_without_a_row_does_not_push_out_the_listed_photograph(site_path: Path) -> None:
    listed = _names(site_path)[0]
    shutil.copy(site_path / "traindata" / listed, site_path / "traindata" / "000-copy.jpg")
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert {usable.path.name for usable in found.usable} == set(_names(site_path)) - {"000-copy.jpg"}


def test_examine__a_reject_is_left_out(site_path: Path) -> None:
    lines = (site_path / "metadata.csv").read_text().splitlines()
    lines = [lines[0] + ",Quality", lines[1] + ",reject", *(line + ",good" for line in lines[2:])]
    (site_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    assert len(examination.examine(site_path, policy=DEMONSTRATION).usable) == NUM_IMAGES - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("Image,Age\n", "is empty"),
        ("Age,Sex\n61,f\n", "column Image"),
        (None, "no metadata.csv"),
    ],
)
def test_examine__metadata_that_cannot_be_used_is_blocking(site_path: Path, content: str | None, words: str) -> None:
    if content is None:
        (site_path / "metadata.csv").unlink()
    else:
        (site_path / "metadata.csv").write_text(content)
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert words in next(finding.headline for finding in found.findings if finding.is_blocking)
    assert not found.is_fit_for(None)


def test_examine__no_photographs_are_blocking(site_path: Path) -> None:
    shutil.rmtree(site_path / "traindata")
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert "no folder traindata" in found.findings[0].headline
    assert not found.is_fit_for(None)
    (site_path / "traindata").mkdir()
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert "no photograph" in found.findings[0].headline


def test_examine__standard_policy_needs_patients(site_path: Path) -> None:
    found = examination.examine(site_path, policy=STANDARD)
    assert not found.is_fit_for(None)
    assert all("needs" in fitness.reason for fitness in found.fitness)
    assert "demonstration" not in examination.to_text(found)
    assert "refuses" in examination.to_text(examination.examine(site_path, policy=DEMONSTRATION))


@pytest.mark.parametrize("change", ["re-encoded", "smaller", "brighter", "trimmed"])
def test_examine__finds_an_edited_copy_and_no_other_pair(site_path: Path, change: str) -> None:
    # Drawn at a size where the vessels survive the editing, as they do in real photographs.
    phantom.write_site(phantom.SITES["birch"], site_path, num_images=6, seed=1, size_px=384)
    for path in sorted((site_path / "traindata").glob("aster*")):
        path.unlink()
    original = _names(site_path)[0]
    with Image.open(site_path / "traindata" / original) as opened:
        image = opened.convert("RGB")
    match change:
        case "re-encoded":
            edited = image
        case "smaller":
            edited = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)
        case "brighter":
            edited = Image.fromarray(np.clip(np.asarray(image, np.float32) * 1.1, 0, 255).astype(np.uint8))
        case _:
            edited = image.crop((2, 2, image.width - 2, image.height - 2))
    edited.save(site_path / "traindata" / "edited.jpg", quality=70)
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert {frozenset(pair) for pair in found.near_duplicates} == {frozenset({original, "edited.jpg"})}


def test_examine__many_processes_give_the_same(drawn_path: Path, tmp_path: Path) -> None:
    path = phantom.write_site(phantom.SITES["cedar"], tmp_path / "cedar", num_images=50, seed=3, size_px=64)
    assert examination.examine(path, policy=DEMONSTRATION, num_processes=2) == examination.examine(
        path, policy=DEMONSTRATION, num_processes=1
    )


def test_examine__dicom_of_an_archive(tmp_path: Path) -> None:
    photographs_path = tmp_path / "traindata" / "DIR001"
    photographs_path.mkdir(parents=True)
    kinds = [{}, {"ImageLaterality": "L"}, {}, {}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}]
    for place, attributes in enumerate(kinds):
        pixels = dicoms.photograph()
        pixels[80, 60 : 70 + place] = 255
        name = f"IM{place}" if place else "IM0.dcm"  # archives give no ending
        (photographs_path / name).write_bytes(dicoms.encoded(dicoms.ophthalmic(pixels, **attributes)))
    (photographs_path / "DICOMDIR.txt").write_text("a list")
    found = examination.examine(tmp_path, policy=DEMONSTRATION)
    assert [len(found.photographs), len(found.usable), found.num_patients, found.num_eyes] == [5, 4, 1, 2]
    assert _details_of(found, "unreadable") == (
        "DIR001/IM4: it is a screenshot (secondary capture); required a photograph of the camera",
    )
    assert found.is_fit_for("images") and not found.is_fit_for("weights")
    assert found.usable[0].cells["camera"] == "Topcon TRC-NW8" and found.usable[1].cells["eye"] == "left"

    (tmp_path / "metadata.csv").write_text("Image,Eye,DR\nDIR001/IM2,,\nDIR001/IM1,right,2\n")
    assert [each.row for each in found.usable] == [1, 2, 3, 4], "the place in order of names"
    listed = examination.examine(tmp_path, policy=DEMONSTRATION).usable
    assert [each.row for each in listed] == [3, 2], "the line of the table"
    assert [each.cells["eye"] for each in listed] == ["right", "right"], "the table goes before the header"
    assert listed[0].cells["dr"] == 2 and listed[0].cells["sex"] == "female"


def test_narrowed__is_judged_again(drawn_path: Path) -> None:
    found = examination.examine(drawn_path, policy=DEMONSTRATION)
    few = examination.narrowed(found, found.usable[:3])
    assert len(few.usable) == 3 and found.is_fit_for("images") and not few.is_fit_for("images")


def test_examine__a_bomb_is_a_file_that_cannot_be_used(site_path: Path) -> None:
    names = _names(site_path)
    Image.new("L", (9000, 9000)).save(site_path / "traindata" / names[0], "PNG")
    Image.new("L", (90, 90)).save(site_path / "traindata" / names[1], "GIF")
    found = examination.examine(site_path, policy=DEMONSTRATION)
    assert len(found.usable) == NUM_IMAGES - 2
    faults = "".join(_details_of(found, "unreadable"))
    assert "81,000,000" in faults or "9,000 x 9,000" in faults
    assert "none of JPEG" in faults


def test_examine__real_photographs(real_photographs: Path) -> None:
    found = examination.examine(real_photographs / "hrf", policy=DEMONSTRATION)
    assert [len(found.photographs), len(found.usable), len(found.near_duplicates)] == [45, 45, 0]
    assert found.findings == ()
