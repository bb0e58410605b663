"""Tracking of a run: JSON lines in the hub always, Weights & Biases beside them, and neither can stop a run.

The JSON lines are the truth: they lie in the run's folder as numbered parts, survive restarts and are read back in
order. W&B runs online where `WANDB_API_KEY` is set and offline otherwise; any failure of it is logged once.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import wandb
from tqdm import tqdm

from gretfound import storage

log = logging.getLogger(__name__)
FLUSH_EVERY_S = 10.0
TELL_EVERY_S = 2.0
PROGRESS_NAME = "progress.json"
WANDB_INIT_TIMEOUT_S = 20.0


def wandb_mode() -> Any:
    """Returns W&B's mode: `WANDB_MODE` if set, online with a key, offline without."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


class Tracker:
    """Writes one run's metrics; use as a context manager.

    Args:
        run_uri: The run's folder in the hub; parts are written to its ``metrics`` folder.
        run_id: A stable id, so that a resumed run continues in W&B.
        project: The W&B project.
        group: The W&B group, for runs that belong together.
        settings: The merged configuration, shown in W&B.
        is_active: False on every worker but the first: metrics are taken and dropped.
    """

    def __init__(
        self,
        run_uri: str,
        *,
        run_id: str,
        project: str,
        group: str = "",
        settings: Mapping[str, Any] | None = None,
        is_active: bool = True,
    ) -> None:
        self._is_active, self._run_uri = is_active, run_uri
        self._folder_uri = storage.join(run_uri, "metrics")
        self._num_parts = len(storage.list_names(self._folder_uri))
        self._lines: list[str] = []
        self._flushed_at_s = time.monotonic()
        self._told_at_s = 0.0
        self._wandb_run = _start_wandb(run_id, project, group, settings or {}) if is_active else None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        if self._wandb_run is not None:
            try:
                self._wandb_run.finish(exit_code=0 if error is None else 1)
            except (wandb.Error, OSError, TimeoutError) as failure:
                log.warning("W&B could not finish the run: %s; the JSON lines in the hub are complete", failure)

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Records metrics at a point of progress, which they give as ``images_seen``."""
        if not self._is_active:
            return
        line = dict(metrics)
        self._lines.append(json.dumps(line, sort_keys=True))
        if self._wandb_run is not None:
            try:
                self._wandb_run.log(line)
            except (wandb.Error, OSError, TimeoutError) as failure:
                log.warning("W&B took no metrics: %s; going on with JSON lines only", failure)
                self._wandb_run = None
        if time.monotonic() - self._told_at_s > TELL_EVERY_S:
            storage.write_json(storage.join(self._run_uri, PROGRESS_NAME), line)
            self._told_at_s = time.monotonic()
        if time.monotonic() - self._flushed_at_s > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting lines as the next part."""
        if self._lines:
            content = ("\n".join(self._lines) + "\n").encode()
            storage.write_bytes(storage.join(self._folder_uri, f"{self._num_parts:06d}.jsonl"), content)
            self._num_parts, self._lines = self._num_parts + 1, []
        self._flushed_at_s = time.monotonic()


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """Reads a run's metrics in order of progress; where a restart repeated a stretch, the later attempt counts."""
    by_progress: dict[int, dict[str, Any]] = {}
    for name in storage.list_names(storage.join(run_uri, "metrics")):
        lines = storage.read_bytes(storage.join(run_uri, "metrics", name)).splitlines()
        part = [json.loads(line) for line in lines]
        if part:
            first = min(line["images_seen"] for line in part)
            by_progress = {seen: line for seen, line in by_progress.items() if seen < first}
        for line in part:
            by_progress[line["images_seen"]] = by_progress.get(line["images_seen"], {}) | line
    return [by_progress[images_seen] for images_seen in sorted(by_progress)]


def _start_wandb(run_id: str, project: str, group: str, settings: Mapping[str, Any]) -> Any:
    mode = wandb_mode()
    if mode == "disabled":
        return None
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return wandb.init(
                id=run_id,
                project=project,
                group=group or None,
                config=dict(settings),
                mode=attempt,
                resume="allow" if attempt == "online" else None,
                dir=os.environ.get("WANDB_DIR"),
                settings=wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT_S, silent=True, console="off"),
            )
        except (wandb.Error, OSError, TimeoutError) as failure:
            log.warning("W&B could not start %s: %s; the JSON lines in the hub go on", attempt, failure)
    return None


@contextlib.contextmanager
def progress_bar(run_uri: str, title: str) -> Iterator[None]:
    """Shows a run's progress on standard error while the block runs, wherever in the cluster the run is."""
    uri, stopped = storage.join(run_uri, PROGRESS_NAME), threading.Event()

    def show() -> None:
        with tqdm(desc=title, unit="image", unit_scale=True, leave=True, mininterval=1.0) as bar:
            while True:
                is_over = stopped.wait(TELL_EVERY_S)
                if storage.exists(uri):
                    progress = storage.read_json(uri)
                    bar.total = progress.get("num_images", bar.total)
                    bar.set_postfix(loss=f"{progress['loss']:.4f}", refresh=False)
                    bar.update(progress["images_seen"] - bar.n)
                if is_over:
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
