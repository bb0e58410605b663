"""The report of a generator: a whole page that loads nothing, says every figure in plain words, and hides nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from gretfound.evaluation import appraisal, generator_report
from gretfound.evaluation.generator_report import Contrast, Drawn, Pictures, Sweep
from tests.evaluation.test_appraisal import appraised
from tests.evaluation.test_report import Balanced

PIXELS = np.full((32, 32, 3), 90, np.uint8)
DRAWN = Drawn(image=PIXELS, caption="colour fundus photograph")


def content_of(measured: dict, *, missing: str = "", num_held_out: int = 60) -> dict:
    return {
        **measured,
        "missing": missing,
        "site_id": "aster <script>",
        "generator_id": "generator-00",
        "base_id": "generator-11",
        "encoder_id": "",
        "form": "images",
        "training": {"method": "lora", "resolution_px": 64, "num_images": 540, "images_seen": 2400,
                     "final_loss": 0.125},
        "num_drawn": 70,
        "num_kept": 60,
        "num_copies": 3 if num_held_out else None,
        "rejected": {"blurred": 7, "near-duplicate": 3},
        "held_out": {"num_images": num_held_out, "num_patients": 30, "num_held_out": 62, "num_trained_on": 540,
                     "num_compared": 540, "num_near_duplicates": 2, "digest": "d1", "image_ids": []},
        "settings": {"num_images": 70, "attributes": ["dr"]},
        "lineage": [{"id": "generator-00", "kind": "generator", "parents": ["generator-11"], "summary": "lora"}],
    }  # fmt: skip


def written(tmp_path: Path, content: dict, *, has_real: bool = True, losses: int = 3) -> tuple[str, Balanced]:
    pictures = Pictures(
        contrasts=(
            Contrast(attribute="dr", words="no diabetic retinopathy", generated=(DRAWN,), real=(DRAWN,) * has_real),
        ),
        sweeps=(Sweep(attribute="dr", words=("none", "moderate"), rows=((PIXELS, PIXELS),), caption="a caption"),),
        rejected=(Drawn(image=PIXELS, caption="blurred"),),
    )
    curve = [(16 * step, 1.0 / step) for step in range(1, 1 + losses)]
    page = generator_report.write_report(tmp_path, content, pictures=pictures, loss_curve=curve).read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(source.startswith("data:image/jpeg;base64,") for source in parser.sources)
    return page, parser


def test_write_report__is_whole_and_explains_every_figure(tmp_path: Path) -> None:
    measured = appraised()
    measured["figures"] = {"scattering": measured["figures"]["plain"]}
    content = content_of(measured)
    page, parser = written(tmp_path, content)
    text = " ".join(" ".join(parser.text).split())
    assert "aster <script>" in text and "<script>" not in page
    for title, _, words in generator_report.FIGURES.values():
        assert title in text and words in text
    kid = measured["figures"]["scattering"]["generated"]["figures"]["kid"]
    assert f"{kid['low']:.3f} to {kid['high']:.3f}" in text
    assert "blurred 7 hardly any fine detail" in text
    assert "60 of 70 drawn photographs passed inspection" in text
    assert "10 of 70 drawn photographs would become no part of a corpus. These figures leave them out" in text
    assert "de-identified photographs of patients" in text
    assert json.loads((tmp_path / "report.json").read_text())["held_out"]["num_near_duplicates"] == 2


@pytest.mark.parametrize("losses", [0, 1, 5])
def test_write_report__without_real_photographs_says_why_and_warns_of_none(tmp_path: Path, losses: int) -> None:
    reason = "not measurable at the hub: the photographs stay at the site"
    content = content_of(appraisal.nothing(reason), missing=reason, num_held_out=0)
    page, parser = written(tmp_path, content, has_real=False, losses=losses)
    text = " ".join(" ".join(parser.text).split())
    assert f"{reason[:1].upper()}{reason[1:]}." in text
    assert "How close to real" not in text and "de-identified photographs of patients" not in text
    assert 'alt="real photograph"' not in page
