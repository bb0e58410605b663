"""Site states: how far each site of a run over many is, readable from object storage at any time.

The run's driver writes HUB/runs/RUN/states.json whenever a site's state changes, and every `HEARTBEAT_S` as a sign of
life. What a site's own run has written since is read beside it: its record, or the progress of its training. So the
table is right while the run goes on, after it, and when its driver was killed.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from gretfound import storage
from gretfound.lineage import Generator
from gretfound.tracking import PROGRESS_NAME

FILE_NAME = "states.json"
HEARTBEAT_S = 10.0
SILENT_S = 60.0
STATES = ("waiting", "running", "interrupted", "finished", "failed")
_READERS = 16
_MESSAGE_LETTERS = 72


@dataclass(frozen=True, kw_only=True)
class State:
    """How far one site is: ``waiting``, ``running``, ``finished`` or ``failed``, as its driver knows it."""

    state: str
    generator_id: str = ""
    message: str = ""
    wall_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One site of the table.

    Args:
        site_id: The site.
        recipe_id: Its own run.
        state: Of `STATES`; ``interrupted`` was running when the driver's signs of life ended.
        images_seen: Photographs seen, repeats counted; 0 before the first sign of progress.
        num_images: Photographs to see; 0 where that is not known.
        loss: The last one, or None.
        images_per_s: While it runs, else None.
        wall_s: Of a run that ended.
        message: Why it failed; else its generator's id.
    """

    site_id: str
    recipe_id: str
    state: str
    images_seen: int = 0
    num_images: int = 0
    loss: float | None = None
    images_per_s: float | None = None
    wall_s: float = 0.0
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """All sites of one run; ``silent_s`` seconds have passed since its driver's last sign of life."""

    run_id: str
    silent_s: float
    lines: tuple[Line, ...]

    @property
    def is_over(self) -> bool:
        """Tells whether every site has finished or failed."""
        return all(line.state in ("finished", "failed") for line in self.lines)

    @property
    def is_driven(self) -> bool:
        """Tells whether the driver is alive, by its signs of life."""
        return self.silent_s < SILENT_S


def write(hub_uri: str, run_id: str, states: Mapping[str, tuple[str, State]]) -> None:
    """Writes how far every site of a run is, with the time.

    Args:
        hub_uri: The hub.
        run_id: Of the run over all sites.
        states: By the recipe id of a site's own run: the site and its state.
    """
    sites = [
        {"site_id": site_id, "recipe_id": recipe_id, **asdict(state)} for recipe_id, (site_id, state) in states.items()
    ]
    uri = storage.join(storage.run_uri(hub_uri, run_id), FILE_NAME)
    storage.write_json(uri, {"told_at_s": time.time(), "sites": sites})


@contextlib.contextmanager
def telling(hub_uri: str, run_id: str, states: Mapping[str, tuple[str, State]]) -> Iterator[None]:
    """Keeps writing the same states, as signs of life, while the block does what all sites wait for."""
    stopped = threading.Event()

    def tell() -> None:
        while True:
            write(hub_uri, run_id, states)
            if stopped.wait(HEARTBEAT_S):
                return

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def read(hub_uri: str, *, job: str) -> list[Table]:
    """Reads the tables of all runs of a job, the one with the latest sign of life last."""
    found: list[tuple[float, Table]] = []
    for run_id in storage.list_names(storage.join(hub_uri, "runs")):
        uri = storage.join(storage.run_uri(hub_uri, run_id), FILE_NAME)
        if run_id.rpartition("-")[0] == job and storage.exists(uri):
            content = storage.read_json(uri)
            silent_s = max(0.0, time.time() - content["told_at_s"])
            with ThreadPoolExecutor(_READERS) as readers:
                lines = tuple(readers.map(partial(_line, hub_uri, silent_s), content["sites"]))
            found.append((content["told_at_s"], Table(run_id=run_id, silent_s=silent_s, lines=lines)))
    return [table for _, table in sorted(found, key=lambda each: (each[0], each[1].run_id))]


def _line(hub_uri: str, silent_s: float, site: Mapping[str, Any]) -> Line:
    state = State(**{field.name: site[field.name] for field in fields(State)})
    line = Line(
        site_id=site["site_id"],
        recipe_id=site["recipe_id"],
        state=state.state,
        wall_s=state.wall_s,
        message=state.message,
    )
    record = storage.finished_record(hub_uri, line.recipe_id, Generator)
    if record is not None:  # it may have finished after the driver was gone
        return replace(
            line,
            state="finished",
            images_seen=record.images_seen,
            num_images=record.images_seen,
            loss=record.final_loss,
            message=record.id,
        )
    progress_uri = storage.join(storage.run_uri(hub_uri, line.recipe_id), PROGRESS_NAME)
    if storage.exists(progress_uri):
        progress = storage.read_json(progress_uri)
        line = replace(
            line,
            images_seen=progress["images_seen"],
            num_images=progress["num_images"],
            loss=progress["loss"],
            images_per_s=progress["images_per_s"] if state.state == "running" else None,
        )
    if state.state == "running" and silent_s >= SILENT_S:
        return replace(line, state="interrupted", images_per_s=None)
    return line


def to_text(table: Table) -> str:
    """Returns the table, a line a site, with the counts above it and reasons that are too long for a line below it."""
    counts = {state: sum(line.state == state for line in table.lines) for state in STATES}
    told = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    head = f"{table.run_id}: {told or 'no site'}"
    if not table.is_over:
        age = _duration(table.silent_s)
        head += f"; driver seen {age} ago" if table.is_driven else f"; no driver for {age}: run the same command again"
    rows = [("site", "state", "photographs seen", "loss", "a second", "time", ""), *map(_row, table.lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    long = [f"\n{line.site_id}: {line.message}" for line in table.lines if len(line.message) > _MESSAGE_LETTERS]
    return "\n".join([head, "", *(_aligned(row, widths) for row in rows), *long])


def _row(line: Line) -> tuple[str, ...]:
    seen = f"{line.images_seen:,} of {line.num_images:,}" if line.num_images else ""
    message = line.message if len(line.message) <= _MESSAGE_LETTERS else f"{line.message[: _MESSAGE_LETTERS - 3]}..."
    return (
        line.site_id,
        line.state,
        seen,
        "" if line.loss is None else f"{line.loss:.4f}",
        "" if line.images_per_s is None else f"{line.images_per_s:.1f}",
        _duration(line.wall_s) if line.wall_s else "",
        message.replace("\n", " "),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    is_number = (False, False, True, True, True, True, False)
    cells = [
        text.rjust(width) if right else text.ljust(width)
        for text, width, right in zip(row, widths, is_number, strict=True)
    ]
    return "  ".join(cells).rstrip()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
