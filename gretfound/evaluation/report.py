"""The report of an evaluation: `report.json`, one self-contained `report.html`, and `predictions.parquet`.

The page loads nothing from elsewhere: plots are SVG, photographs are embedded. It takes arrays and plain values and
opens no bucket. Photographs make it a page for the consortium, not for publication, and it says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from gretfound.evaluation import metrics, page
from gretfound.evaluation.protocol import BASELINES, ENCODERS, METRICS, Assessment, Outcome, Photographs
from gretfound.fundus import Photograph

COLOURS = {"pretrained": "#0b6a9e", "untrained": "#d9722b", "raw_pixels": "#7b8087"}
NAMES = {"pretrained": "pretrained", "untrained": "untrained", "raw_pixels": "raw pixels"}
METRIC_NAMES = {
    "auroc": "AUROC, linear probe",
    "average_precision": "average precision, linear probe",
    "knn_auroc": "AUROC, nearest neighbours",
    "knn_average_precision": "average precision, nearest neighbours",
}
JSON_NAME, HTML_NAME, PREDICTIONS_NAME = "report.json", "report.html", "predictions.parquet"
PREDICTIONS_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("set", pa.string()),
        ("task", pa.string()),
        ("fold", pa.int32()),
        ("encoder", pa.string()),
        ("probe", pa.string()),
        ("label", pa.int32()),
        ("score", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A photograph of a shard with its caption."""

    image: Photograph
    caption: str


@dataclass(frozen=True, kw_only=True)
class SiteSamples:
    """Some photographs that a site brought to the corpus; ``real`` is empty where they stay at the site."""

    site_id: str
    real: tuple[Sample, ...]
    synthetic: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A photograph of an evaluation set, what the encoder saw of it, and what pretraining's decoder made of that."""

    original: Photograph
    masked: Photograph
    reconstruction: Photograph


def write_report(
    folder_path: Path,
    content: Mapping[str, Any],
    *,
    assessments: Sequence[Assessment],
    outcomes: Mapping[tuple[str, str], Outcome],
    photographs: Mapping[str, Photographs],
    loss_curve: Sequence[tuple[int, float]] = (),
    site_samples: Sequence[SiteSamples] = (),
    reconstructions: Sequence[Reconstruction] = (),
) -> Path:
    """Writes the three files.

    Args:
        folder_path: Where to; made if absent.
        content: The report's JSON: `protocol.summarise`'s, with ``protocol``, ``evaluation_sets``, ``skipped_tasks``
            and ``lineage``.
        assessments: What was planned.
        outcomes: By the assessment's name and the encoder's.
        photographs: The evaluation sets by name.
        loss_curve: Images seen and loss, of the pretraining run.
        site_samples: Photographs of the corpus.
        reconstructions: Masked photographs.

    Returns:
        The page's path.
    """
    folder_path.mkdir(parents=True, exist_ok=True)
    (folder_path / JSON_NAME).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
    pq.write_table(_predictions(assessments, outcomes, photographs), folder_path / PREDICTIONS_NAME, compression="zstd")
    rocs = [
        {
            "name": assessment.name,
            "title": assessment.task.title,
            "svg": _roc_svg(
                {
                    encoder: metrics.roc_curve(
                        assessment.labels, outcomes[assessment.name, encoder].scores["linear"], assessment.folds
                    )
                    for encoder in ENCODERS
                }
            ),
        }
        for assessment in assessments
    ]
    text = page.render(
        HTML_NAME,
        content=content,
        colours=COLOURS,
        names=NAMES,
        metric_names=METRIC_NAMES,
        encoders=ENCODERS,
        baselines=BASELINES,
        metrics=tuple(METRICS),
        means=_means(content["encoders"]),
        forest=lambda task: _forest_svg({name: content["encoders"][name][task]["auroc"] for name in ENCODERS}),
        forest_axis=_forest_axis_svg(),
        rocs=rocs,
        loss_svg=page.loss_svg(loss_curve) if len(loss_curve) > 1 else None,
        loss_curve=loss_curve,
        site_samples=site_samples,
        reconstructions=reconstructions,
        num_unreadable=sum(len(entry["unreadable"]) for entry in content["evaluation_sets"].values()),
    )
    (folder_path / HTML_NAME).write_text(text)
    return folder_path / HTML_NAME


def _predictions(
    assessments: Sequence[Assessment],
    outcomes: Mapping[tuple[str, str], Outcome],
    photographs: Mapping[str, Photographs],
) -> pa.Table:
    tables = []
    for assessment in assessments:
        numbers = photographs[assessment.set_name].row_numbers
        num_rows = len(assessment.rows)
        for encoder in ENCODERS:
            for probe, score_NC in outcomes[assessment.name, encoder].scores.items():
                columns = {
                    "row": [numbers[row] for row in assessment.rows.tolist()],
                    "set": [assessment.set_name] * num_rows,
                    "task": [assessment.name] * num_rows,
                    "fold": assessment.folds.tolist(),
                    "encoder": [encoder] * num_rows,
                    "probe": [probe] * num_rows,
                    "label": assessment.labels.tolist(),
                    "score": score_NC.tolist(),
                }
                tables.append(pa.Table.from_pydict(columns, PREDICTIONS_SCHEMA))
    return pa.concat_tables(tables) if tables else PREDICTIONS_SCHEMA.empty_table()


def _means(encoders: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name, tasks in encoders.items():
        values = [figures["auroc"]["value"] for figures in tasks.values()]
        means[name] = float(np.mean(values)) if values else None
    return means


FOREST_WIDTH, FOREST_LOW, FOREST_HIGH = 210, 0.3, 1.0


def _forest_x(value: float) -> float:
    inner = FOREST_WIDTH - 12
    return 6 + inner * (min(max(value, FOREST_LOW), FOREST_HIGH) - FOREST_LOW) / (FOREST_HIGH - FOREST_LOW)


def _forest_svg(figures: Mapping[str, Mapping[str, float]]) -> Markup:
    chance = _forest_x(0.5)
    parts = [
        f'<svg class="forest" viewBox="0 0 {FOREST_WIDTH} 46" width="{FOREST_WIDTH}" height="46" role="img">',
        f'<line x1="{chance:.1f}" y1="0" x2="{chance:.1f}" y2="46" class="chance"/>',
    ]
    for index, (name, figure) in enumerate(figures.items()):
        y = 9 + 14 * index
        parts.append(page.range_svg(figure, y=y, name=NAMES[name], colour=COLOURS[name], place=_forest_x))
    return Markup("".join([*parts, "</svg>"]))


def _forest_axis_svg() -> Markup:
    ticks = "".join(
        f'<text x="{_forest_x(tick):.1f}" y="11" text-anchor="middle">{tick:.1f}</text>'
        for tick in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    )
    return Markup(f'<svg class="axis" viewBox="0 0 {FOREST_WIDTH} 14" width="{FOREST_WIDTH}" height="14">{ticks}</svg>')


def _roc_svg(curves: Mapping[str, tuple[metrics.Floats, metrics.Floats]]) -> Markup:
    side, left, top = 190, 34, 6
    parts = [f'<svg class="plot" viewBox="0 0 {side + 46} {side + 40}" role="img">', _grid(side, left, top)]
    for name in reversed(tuple(curves)):
        points = " ".join(
            f"{left + side * x:.1f},{top + side * (1 - y):.1f}" for x, y in zip(*curves[name], strict=True)
        )
        width = 2.4 if name == "pretrained" else 1.6
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="{width}"/>')
    parts.append(
        f'<text x="{left + side / 2}" y="{top + side + 30}" text-anchor="middle">false positive rate</text>'
        f'<text transform="translate(9 {top + side / 2}) rotate(-90)" text-anchor="middle">true positive rate</text>'
    )
    return Markup("".join([*parts, "</svg>"]))


def _grid(side: int, left: int, top: int) -> str:
    parts = [f'<line class="chance" x1="{left}" y1="{top + side}" x2="{left + side}" y2="{top}"/>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + side * tick, top + side * (1 - tick)
        parts.append(f'<line class="grid" x1="{x}" y1="{top}" x2="{x}" y2="{top + side}"/>')
        parts.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{left + side}" y2="{y}"/>')
        if tick in (0.0, 0.5, 1.0):
            parts.append(f'<text x="{x}" y="{top + side + 14}" text-anchor="middle">{tick:g}</text>')
            parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    return "".join(parts)
