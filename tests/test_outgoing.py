"""What may leave and what is kept back: by reason and place, whole studies, and going on after an interruption."""

import datetime
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from gretfound import deidentify, examination, lettering, outgoing
from gretfound.errors import ConfigError
from tests import dicoms
from tests.test_deidentify import KEY, font_path


def folder(path: Path) -> list[examination.Usable]:
    """Six DICOM photographs of three patients, two studies of the first; one more with writing on the retina."""
    made = []
    for place, (patient, study, date) in enumerate(
        [("P1", "11", "20190311"), ("P1", "11", "20190311"), ("P1", "12", "20200229"), ("P2", "21", "20190311"),
         ("P2", "21", "20190311"), ("P3", "31", "")]
    ):  # fmt: skip
        pixels = dicoms.photograph()
        pixels[80, 60 : 70 + place] = 255
        dataset = dicoms.ophthalmic(
            pixels, PatientID=patient, StudyInstanceUID=f"1.2.826.0.1.{study}", AcquisitionDate=date, StudyDate=date
        )
        file_path = path / "traindata" / f"Quillfeather{place}.dcm"
        file_path.parent.mkdir(parents=True, exist_ok=True)
        file_path.write_bytes(dicoms.encoded(dataset))
        made.append(
            examination.Usable(
                path=file_path, image_id="", cells={"patient": patient, "camera": "Topcon"}, row=place + 2
            )
        )
    lettered = Image.fromarray(dicoms.photograph(480, 600))
    ImageDraw.Draw(lettered).text((200, 220), "DOE JANE", fill="white", font=ImageFont.truetype(str(font_path()), 28))
    lettered.save(path / "traindata" / "7.png")
    made.append(examination.Usable(path=path / "traindata" / "7.png", image_id="", cells={"patient": "P4"}, row=8))
    return made


def prepared(path: Path, photographs: list[examination.Usable]) -> outgoing.Prepared:
    digests = {each.path: hashlib.sha256(each.path.read_bytes()).hexdigest() for each in photographs}
    return outgoing.prepare(
        photographs, root_path=path, digests=digests, key=KEY, work_path=path / "work", jpeg_quality=0
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[examination.Usable], outgoing.Prepared]:
    path = tmp_path_factory.mktemp("outgoing")
    photographs = folder(path)
    return path, photographs, prepared(path, photographs)


def test_prepare__pictures_pseudonyms_and_years(
    first: tuple[Path, list[examination.Usable], outgoing.Prepared],
) -> None:
    path, _, result = first
    assert [outcome.code for outcome in result.outcomes] == [""] * 6 + ["TEXT_FOUND"]
    visits = [outcome.visit for outcome in result.leaving]
    assert visits[0] == visits[1] == deidentify.uid_pseudonym(KEY, "1.2.826.0.1.11") != visits[2]
    taken = datetime.date(2019, 3, 11), datetime.date(2020, 2, 29)
    assert [outcome.shifted_year for outcome in result.leaving] == [
        *[deidentify.shifted_date(KEY, "P1", date).year for date in (taken[0], *taken)],
        *[deidentify.shifted_date(KEY, "P2", taken[0]).year] * 2,
        None,
    ]
    for outcome in result.leaving:
        picture = (result.folder_path / outcome.file_name).read_bytes()
        assert outcome.file_name == f"{outcome.image_id}.png"
        deidentify.require_bare(picture)
    work = b"".join(file_path.read_bytes() for file_path in (path / "work").rglob("*.json"))
    for word in ("Quillfeather", "P1", "20190311", "1.2.826.0.1.11"):
        assert word.encode() not in work, "the work folder needs no names"


def test_prepare__findings_count_by_reason_and_name_nobody(
    first: tuple[Path, list[examination.Usable], outgoing.Prepared],
) -> None:
    _, _, result = first
    (finding,) = result.findings()
    assert finding.headline == "1 photograph kept back: TEXT_FOUND"
    assert finding.details == ("lines of metadata.csv (without one, in the order of names): 8",)
    text = outgoing.ledger_text(result)
    assert text.splitlines()[0] == "row,source_sha256,outcome,image_id"
    assert text.splitlines()[7].startswith("8,") and text.splitlines()[7].endswith(",TEXT_FOUND,")
    assert "Quillfeather" not in text and "P1" not in text


def test_prepare__goes_on_without_decoding_again(
    first: tuple[Path, list[examination.Usable], outgoing.Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, photographs, result = first
    monkeypatch.setattr(deidentify, "rematerialise", None)  # what was done is not done again
    assert prepared(path, photographs) == result


def test_prepare__a_file_that_changed_since_its_digest_was_taken(tmp_path: Path) -> None:
    photographs = folder(tmp_path)[:2]
    damaged = bytearray(photographs[0].path.read_bytes())
    place = len(damaged) // 2  # in the pixels: it decodes without complaint
    damaged[place : place + 20] = bytes(20)
    digests = {each.path: hashlib.sha256(each.path.read_bytes()).hexdigest() for each in photographs}
    photographs[0].path.write_bytes(damaged)
    result = outgoing.prepare(
        photographs, root_path=tmp_path, digests=digests, key=KEY, work_path=tmp_path / "w", jpeg_quality=0
    )
    assert [outcome.code for outcome in result.outcomes] == ["CHANGED", ""]


def test_prepare__an_identifier_left_keeps_back_the_whole_study(tmp_path: Path) -> None:
    photographs = folder(tmp_path)[:4]
    photographs[0] = replace(
        photographs[0], cells={"patient": "P1", "camera": f"Dr {dicoms.PLACES['physician']}'s own"}
    )
    result = prepared(tmp_path, photographs)
    assert [outcome.code for outcome in result.outcomes] == ["IDENTIFIER_LEFT", "SAME_STUDY", "", ""]
    assert "Goldsworthy" not in "".join(f"{finding}" for finding in result.findings())
    assert len(result.leaving) == 2


def test_prepare__what_is_alike_within_the_field_of_view_leaves_once(tmp_path: Path) -> None:
    photographs = []
    for place, level in enumerate((0, 9, 9)):
        pixels = dicoms.photograph()
        pixels[:3, :3] = level  # in the corner, which is blackened
        pixels[80, 60:70] = 255 if place < 2 else 200
        path = tmp_path / "traindata" / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        photographs.append(examination.Usable(path=path, image_id="", cells={"patient": f"P{place}"}, row=place + 2))
    result = prepared(tmp_path, photographs)
    assert [outcome.code for outcome in result.outcomes] == ["", "DUPLICATE", ""]
    assert result.outcomes[0].image_id == result.outcomes[1].image_id != result.outcomes[2].image_id
    assert "same pixels" in result.findings()[0].advice
    lines = outgoing.ledger_text(result).splitlines()
    assert lines[2].endswith(f",DUPLICATE,{result.outcomes[0].image_id}"), "its patient's photograph did leave"


def test_prepare__with_another_key_there_are_other_pseudonyms(tmp_path: Path) -> None:
    photographs = folder(tmp_path)[:1]
    digests = {each.path: hashlib.sha256(each.path.read_bytes()).hexdigest() for each in photographs}
    for key in (KEY, b"another key, of 32 bytes at least"):
        result = outgoing.prepare(
            photographs, root_path=tmp_path, digests=digests, key=key, work_path=tmp_path / "work", jpeg_quality=0
        )
        assert result.outcomes[0].visit == deidentify.uid_pseudonym(key, "1.2.826.0.1.11")


def test_prepare__visit_that_is_a_date(tmp_path: Path) -> None:
    picture = tmp_path / "traindata" / "a.png"
    picture.parent.mkdir()
    Image.fromarray(np.roll(dicoms.photograph(), 3, axis=0)).save(picture)
    for visit, date in (
        ("2021-07-04", datetime.date(2021, 7, 4)),
        ("20210704", datetime.date(2021, 7, 4)),
        ("V1", None),
    ):
        usable = examination.Usable(path=picture, image_id="", cells={"patient": "P9", "visit": visit}, row=2)
        digests = {picture: hashlib.sha256(picture.read_bytes()).hexdigest()}
        result = outgoing.prepare(
            [usable], root_path=tmp_path, digests=digests, key=KEY, work_path=tmp_path / visit, jpeg_quality=90
        )
        (outcome,) = result.leaving
        assert outcome.shifted_year == (deidentify.shifted_date(KEY, "P9", date).year if date else None)
        assert outcome.visit == "" and outcome.file_name.endswith(".jpg")


def test_prepare__without_the_networks_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for digests in ({"absent.onnx": "0"}, {lettering.DETECTOR_NAME: "0"}):
        monkeypatch.setattr(lettering, "NETWORK_DIGESTS", digests)
        with pytest.raises(ConfigError, match="rapidocr"):
            prepared(tmp_path, folder(tmp_path)[:1])
