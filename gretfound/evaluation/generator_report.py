"""The report of a generator: `report.json` and one self-contained `report.html`, as `report` is that of an encoder.

Held-out real photographs are on the page only where the hub holds them already; the page then says whom it is for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gretfound.evaluation import appraisal, page
from gretfound.evaluation.fidelity import NOT_STATED
from gretfound.fundus import Photograph

JSON_NAME, HTML_NAME = "report.json", "report.html"
TEMPLATE_NAME = "generator_report.html"
COLOURS = {"generated": page.ACCENT, "base": "#d9722b", "trained_on": "#7b8087"}
NAMES = {"generated": "this generator", "base": "its base, before fine-tuning", "trained_on": "real, from the training"}
SPACES = {
    "scattering": "Fine structure: wavelet scattering (82 numbers: colours by place, detail of each size, its pattern)",
    "thumbnail": "Colour and light by place: thumbnails (108 numbers)",
    "encoder": "Features of an encoder of this hub",
}
FIGURES = {
    "kid": ("KID", "lower is better", "How far apart real and drawn photographs are as two crowds; 0 means that no one "
            "could tell the crowds apart."),
    "fid": ("FID", "lower is better", "The same question, asked of the crowds' averages and spread alone; it reads too "
            "high for few photographs."),
    "precision": ("precision", "higher is better", "The share of drawn photographs that look like some real one: "
                  "realism."),
    "recall": ("recall", "higher is better", "The share of real photographs that the drawn ones could pass for: "
               "variety."),
    "density": ("density", "higher is better", "How close drawn photographs lie to where real ones are common; about 1 "
                "is as good as real."),
    "coverage": ("coverage", "higher is better", "The share of real photographs that have a drawn one nearby: is any "
                 "kind of eye left out?"),
}  # fmt: skip
STATISTICS = {
    "density": ("vessel density", "The share of the picture that vessels cover."),
    "fractal_dimension": ("fractal dimension", "How richly the vessels branch: 1 is a line, 2 fills the picture."),
    "tortuosity": ("tortuosity", "How much the vessels wind: 1 is straight."),
}
REASONS = {
    "blank": "next to one grey level",
    "no field of view": "no round field of view was found",
    "underexposed": "too dark to see anything",
    "overexposed": "white where something should be seen",
    "low contrast": "no vessels, disc or lesions stand out",
    "blurred": "hardly any fine detail",
    "noisy": "more noise than detail",
    "near-duplicate": "nearly the same as an earlier one",
}
ATTRIBUTES = {
    "dr": "diabetic retinopathy",
    "dr_present": "any diabetic retinopathy",
    "dme": "diabetic macular edema",
    "amd": "age-related macular degeneration",
    "age_band": "age",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A photograph with what is written below it."""

    image: Photograph
    caption: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """Photographs of one value of an attribute: drawn ones, and held-out real ones where they are at the hub."""

    attribute: str
    words: str
    generated: tuple[Drawn, ...]
    real: tuple[Drawn, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """One attribute changed with the seed fixed: a row a seed, a column a value; ``caption`` is the first one's."""

    attribute: str
    words: tuple[str, ...]
    rows: tuple[tuple[Photograph, ...], ...]
    caption: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """All photographs of a report."""

    contrasts: tuple[Contrast, ...]
    sweeps: tuple[Sweep, ...]
    rejected: tuple[Drawn, ...]


def write_report(
    folder_path: Path,
    content: Mapping[str, Any],
    *,
    pictures: Pictures,
    loss_curve: Sequence[tuple[int, float]],
) -> Path:
    """Writes the two files.

    Args:
        folder_path: Where to; made if absent.
        content: The report's JSON, as `gretfound.generator_evaluation.publish` makes it.
        pictures: What is shown.
        loss_curve: Images seen and loss of the fine-tuning.

    Returns:
        The page's path.
    """
    folder_path.mkdir(parents=True, exist_ok=True)
    (folder_path / JSON_NAME).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
    shown = [each.attribute for each in pictures.contrasts] + [each.attribute for each in pictures.sweeps]
    attributes = {*shown, *content["conditions"]}
    text = page.render(
        TEMPLATE_NAME,
        content=content,
        pictures=pictures,
        colours=COLOURS,
        names=NAMES,
        spaces=SPACES,
        figures=FIGURES,
        statistics=STATISTICS,
        reasons=REASONS,
        attribute_names={key: ATTRIBUTES.get(key, key.replace("_", " ")) for key in attributes},
        words_of=lambda key, text: text if text == NOT_STATED else appraisal.words_of(key, text),
        ranges=_ranges_svg,
        loss_curve=loss_curve,
        loss_svg=page.loss_svg(loss_curve) if len(loss_curve) > 1 else None,
    )
    (folder_path / HTML_NAME).write_text(text)
    return folder_path / HTML_NAME


RANGE_WIDTH, RANGE_LINE = 230, 14


def _ranges_svg(intervals: Mapping[str, Mapping[str, float]]) -> Markup:
    """Draws intervals on one scale that holds 0, which is marked: a row each, in the colours of their sides."""
    low = min(0.0, *(each["low"] for each in intervals.values()))
    high = max(*(each["high"] for each in intervals.values()), low + 1e-9)
    height = RANGE_LINE * len(intervals) + 4

    def place(value: float) -> float:
        return float(6 + (RANGE_WIDTH - 12) * (np.clip(value, low, high) - low) / (high - low))

    parts = [
        f'<svg class="forest" viewBox="0 0 {RANGE_WIDTH} {height}" width="{RANGE_WIDTH}" height="{height}" role="img">',
        f'<line x1="{place(0.0):.1f}" y1="0" x2="{place(0.0):.1f}" y2="{height}" class="chance"/>',
    ]
    for index, (name, each) in enumerate(intervals.items()):
        y = 9 + RANGE_LINE * index
        parts.append(page.range_svg(each, y=y, name=NAMES[name], colour=COLOURS[name], place=place))
    return Markup("".join([*parts, "</svg>"]))
