"""What every job's command line shares: ``--help``, configuration errors, logging, and the id as the last line."""

import ast
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gretfound.config import describe
from gretfound.errors import GretfoundError

# glibc hands arrays of more than 32 MiB back to the system at once, and in the heap of any thread but the first, where
# Ray Train's loop runs, those of 64 MiB whatever one asks for. Pages that are new again cost more than what is done
# with them (docs/log.md); so workers keep theirs, in one heap.
KEEPS_PAGES = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}

# Ray ends a process that has been idle for a second while every CPU is given out; so in a long stream reading processes
# would come and go all the time, and each imports PyTorch anew (docs/log.md). cluster/ sets the same.
KEEPS_WORKERS = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}


def run(schema: type, main: Callable[[list[str]], str]) -> NoReturn:
    """Runs a job as a command and exits; the record's id is the last line of stdout.

    Args:
        schema: The job's configuration schema, for ``--help``.
        main: The job: takes the arguments, returns the record's id.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(f"{_docstring()}\n\nKeys (key=value, or in a .yaml layer; later ones win):\n{describe(schema)}")
        sys.exit(0)
    set_up_logging()
    try:
        record_id = main(arguments)
    except GretfoundError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.stderr.flush()
    print(record_id, flush=True)
    sys.exit(0)


def set_up_logging() -> None:
    """Sends the library's log to standard error, one line an event."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of every autoencoder but its largest one
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for name in ("gretfound", "jobs", "serve"):
        logging.getLogger(name).setLevel(os.environ.get("GRETFOUND_LOG", "INFO"))


def start_ray(**settings: Any) -> None:
    """Joins the cluster of `RAY_ADDRESS`, or starts one on this machine; does nothing if joined.

    Without the variable, which `ray job submit` sets, Ray itself would join the newest cluster on the machine and end
    with it, whoever's it is.

    Args:
        settings: Further ones of `ray.init`.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it tells every execution's plan otherwise
    if not ray.is_initialized():
        root = str(Path(__file__).parents[1])
        for name, value in KEEPS_WORKERS.items():
            os.environ.setdefault(name, value)  # taken by the cluster that is started here, if one is
        search_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init(
            address=None if os.environ.get("RAY_ADDRESS") else "local",
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": search_path, **KEEPS_PAGES}},
            **settings,
        )


def _docstring() -> Any:
    path = Path(sys.modules["__main__"].__file__ or "")
    return ast.get_docstring(ast.parse(path.read_text()))
