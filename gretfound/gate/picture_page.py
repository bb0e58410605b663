"""The page of the most similar pairs, for the site's security officer: it holds photographs and never leaves."""

from collections.abc import Callable
from pathlib import Path

import jinja2

from gretfound.evaluation import page
from gretfound.fundus import Photograph
from gretfound.gate.report import Report
from gretfound.gate.trial import Trial


def to_html(
    report: Report,
    trial: Trial,
    *,
    sample_at: Callable[[int], Photograph],
    trained_at: Callable[[int], Photograph],
) -> str:
    """Returns the page as one self-contained file.

    Args:
        report: What leaves.
        trial: What stays.
        sample_at: The drawn photograph at a place.
        trained_at: The photograph trained on at a place.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pairs = [
        (pair, page.picture(sample_at(pair.sample)), page.picture(trained_at(pair.trained))) for pair in trial.pairs
    ]
    return environment.get_template("picture_page.html").render(report=report, pairs=pairs, reviewed=trial.reviewed)
