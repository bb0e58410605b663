"""What the reports' pages are made of: one environment for the templates, and pictures, figures and plots inside them.

A page loads nothing from elsewhere: plots are SVG, photographs are embedded.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from gretfound import fundus

ACCENT = "#0b6a9e"
PICTURE_SIZE_PX = 144
MAX_LOSS_POINTS = 400


def render(template_name: str, **values: Any) -> str:
    """Renders a template of this room, in which ``picture``, ``figure`` and ``signed`` are filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": picture, "figure": figure, "signed": signed}
    return environment.get_template(template_name).render(**values)


def picture(image: npt.NDArray[np.uint8], size_px: int = PICTURE_SIZE_PX) -> Markup:
    """Returns a photograph as the ``src`` of an image whose longer side has ``size_px``."""
    resized = Image.fromarray(image)
    resized.thumbnail((size_px, size_px), Image.Resampling.BICUBIC)
    if max(resized.size) < size_px:
        scale = size_px / max(resized.size)
        resized = resized.resize(
            (round(resized.width * scale), round(resized.height * scale)), Image.Resampling.BICUBIC
        )
    encoded = base64.b64encode(fundus.encode_jpeg(np.asarray(resized), quality=88)).decode()
    return Markup("data:image/jpeg;base64,{}").format(encoded)


def figure(interval: Mapping[str, float]) -> Markup:
    """Returns a figure with its interval."""
    return Markup('<b>{:.3f}</b> <span class="ci">{:.3f} to {:.3f}</span>').format(
        interval["value"], interval["low"], interval["high"]
    )


def signed(interval: Mapping[str, float]) -> Markup:
    """Returns a difference with its interval, coloured where that does not span zero."""
    kind = "up" if interval["low"] > 0 else "down" if interval["high"] < 0 else "even"
    return Markup('<span class="{}"><b>{:+.3f}</b> <span class="ci">{:+.3f} to {:+.3f}</span></span>').format(
        kind, interval["value"], interval["low"], interval["high"]
    )


def range_svg(interval: Mapping[str, float], *, y: int, name: str, colour: str, place: Callable[[float], float]) -> str:
    """Returns a dot with its interval as a line, at the height ``y`` of an SVG; ``place`` gives a value's x."""
    low, value, high = (place(interval[key]) for key in ("low", "value", "high"))
    return (
        f"<g><title>{name}: {interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})</title>"
        f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{colour}" stroke-width="2.4"/>'
        f'<circle cx="{value:.1f}" cy="{y}" r="4.2" fill="{colour}"/></g>'
    )


def loss_svg(loss_curve: Sequence[tuple[int, float]]) -> Markup:
    """Returns the plot of a loss over images seen: thin as logged, thick smoothed; two points or more."""
    width, height, left, top = 640, 200, 58, 8
    points = loss_curve[:: -(-len(loss_curve) // MAX_LOSS_POINTS)]
    last_seen = max(seen for seen, _ in points) or 1
    losses = np.array([loss for _, loss in points])
    low, high = float(losses.min()), float(losses.max())
    padding = (high - low) * 0.06 or 0.5
    low, high = low - padding, high + padding

    def place(seen: float, loss: float) -> str:
        return f"{left + width * seen / last_seen:.1f},{top + height * (high - loss) / (high - low):.1f}"

    reach = max(1, len(losses) // 40)
    smoothed = [losses[max(0, i - reach) : i + reach + 1].mean() for i in range(len(losses))]
    raw = " ".join(place(seen, loss) for seen, loss in points)
    mean = " ".join(place(seen, loss) for (seen, _), loss in zip(points, smoothed, strict=True))
    parts = [f'<svg class="plot wide" viewBox="0 0 {left + width + 34} {top + height + 40}" role="img">']
    for step in range(5):
        loss = low + (high - low) * step / 4
        y = top + height * (high - loss) / (high - low)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.3f}</text>')
        seen = last_seen * step / 4
        x = left + width * step / 4
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{seen:,.0f}</text>')
    parts.append(f'<polyline points="{raw}" fill="none" stroke="{ACCENT}" stroke-opacity="0.3"/>')
    parts.append(f'<polyline points="{mean}" fill="none" stroke="{ACCENT}" stroke-width="2.2"/>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">images seen</text>')
    return Markup("".join([*parts, "</svg>"]))
