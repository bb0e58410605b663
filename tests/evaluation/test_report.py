import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from gretfound.evaluation import protocol, report

OPTIONS = {"min_patients_per_class": 3, "num_resamples": 100, "seed": 0}


class Balanced(HTMLParser):
    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def evaluated(num_rows, name="dune <script>"):
    random = np.random.default_rng(0)
    cells = tuple({"glaucoma": index % 2 == 0, "sex": ("female", "male")[index // 2 % 2]} for index in range(num_rows))
    found = protocol.Photographs(
        name=name,
        row_numbers=tuple(range(2, num_rows + 2)),
        image_ids=tuple(f"i{index}" for index in range(num_rows)),
        cells=cells,
        features={
            encoder: random.normal(0, 1, (num_rows, 6)).astype(np.float32) + np.arange(num_rows)[:, None] % 2
            for encoder in protocol.ENCODERS
        },
    )
    planned, skipped = protocol.plan(found, num_folds=3, min_patients_per_class=3, seed=0, is_named_by_set=False)
    outcomes = {
        (assessment.name, encoder): protocol.assess(assessment, found.features[encoder], num_resamples=100, seed=0)
        for assessment in planned
        for encoder in protocol.ENCODERS
    }
    rows = tuple(protocol.EvaluationRow(number=number, uri="", cells={}) for number in found.row_numbers)
    origin = protocol.EvaluationSet(name=name, digest="0" * 64, rows=rows, num_cells_not_understood=1)
    faults = [{"row": 99, "reason": "TRUNCATED: it ends too early"}]
    content = protocol.summarise(planned, outcomes, {name: found}, **OPTIONS) | {
        "skipped_tasks": skipped,
        "evaluation_sets": {name: protocol.describe_set(origin, found, faults, is_fitted_on=False)},
        "protocol": protocol.describe_protocol(
            num_folds=3, features="the mean", is_checked_against_corpus=False, **OPTIONS
        ),
        "lineage": {"encoder_id": "encoder-00", "records": []},
    }
    return content, {"assessments": planned, "outcomes": outcomes, "photographs": {name: found}}


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (24, 30, 3)).astype(np.uint8)


def test_write_report__page_is_whole_escaped_and_loads_nothing(tmp_path):
    content, figures = evaluated(30)
    sample = report.Sample(image=picture(0), caption="a caption & <b>")
    page_path = report.write_report(
        tmp_path,
        content,
        **figures,
        loss_curve=[(0, 1.0), (10, 0.5), (20, 0.25)],
        site_samples=[report.SiteSamples(site_id="aster", real=(), synthetic=(sample, sample))],
        reconstructions=[report.Reconstruction(original=picture(1), masked=picture(2), reconstruction=picture(3))],
    )
    page = Balanced()
    page.feed(page_path.read_text())
    assert page.open == []
    assert len(page.sources) == 5 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    text = " ".join(page.text)
    for expected in ("Glaucoma", "dune <script>", "a caption & <b>", "stay at the site", "0.2500", "99: TRUNCATED"):
        assert expected in text
    assert "<script" not in page_path.read_text()
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?https?:", page_path.read_text())


def test_write_report__json_has_the_fixed_form(tmp_path):
    content, figures = evaluated(30)
    report.write_report(tmp_path, content, **figures)
    written = json.loads((tmp_path / "report.json").read_text())
    for encoder in ("pretrained", "untrained", "raw_pixels"):
        for metric in ("auroc", "average_precision", "knn_auroc", "knn_average_precision"):
            figure = written["encoders"][encoder]["glaucoma"][metric]
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_write_report__predictions_give_the_reported_figures(tmp_path):
    content, figures = evaluated(40)
    report.write_report(tmp_path, content, **figures)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pandas()
    assert set(table.columns) == {"row", "set", "task", "fold", "encoder", "probe", "label", "score"}
    chosen = table[(table.task == "glaucoma") & (table.encoder == "untrained") & (table.probe == "linear")]
    assert sorted(chosen.row) == list(range(2, 42))
    total = pairs = 0.0
    for _, fold in chosen.groupby("fold"):
        weight = (fold.label == 1).sum() * (fold.label == 0).sum()
        total += weight * roc_auc_score(fold.label, [score[1] for score in fold.score])
        pairs += weight
    assert total / pairs == pytest.approx(content["encoders"]["untrained"]["glaucoma"]["auroc"]["value"], abs=1e-6)


def test_write_report__no_task_is_still_a_page(tmp_path):
    content, figures = evaluated(4)
    page_path = report.write_report(tmp_path, content, **figures)
    assert "No task had enough patients" in page_path.read_text()
    assert pq.read_table(tmp_path / "predictions.parquet").num_rows == 0
