"""Confinement: work on bytes of strangers in a process of its own, without network, with limits and a private folder.

`run` starts a process, and that process shuts itself in (`gretfound.enclosure`) before it imports what does the work.
It answers in JSON lines. It may be killed at any limit; the caller lives on and gets a reason code.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gretfound import enclosure
from gretfound.errors import ConfigError, ContributionRejected, StorageError

log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
MAX_REPLY_BYTES = 2**20
CODE_PATTERN = re.compile(r"[A-Z][A-Z0-9_]{1,39}")
EXIT_CONFINED, EXIT_NOT_CONFINED, EXIT_NO_ROOM = 0, 3, 4
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the process may use: address space, CPU seconds, one file's bytes, open files, seconds of waiting."""

    memory_bytes: int = 2 * 2**30
    cpu_s: int = 60
    file_bytes: int = 4 * 2**30
    num_open_files: int = 64
    wall_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a confined process said, and what it took; none of its words are the process's own.

    ``code`` is empty where it ended well; then the last of ``reports`` is its result. The codes of this room are
    ``LIMIT_MEMORY``, ``LIMIT_CPU``, ``LIMIT_FILE_SIZE``, ``LIMIT_OPEN_FILES``, ``LIMIT_TIME`` and ``CRASHED``.
    ``peak_bytes`` is the most memory that it held; 0 where it was killed and could not say.
    """

    code: str
    reports: tuple[dict[str, Any], ...]
    held: tuple[str, ...]
    peak_bytes: int
    cpu_s: float


def run(
    module: str,
    request: dict[str, Any],
    *,
    folder_path: Path,
    readable_paths: Sequence[Path] = (),
    limits: Limits,
    is_strict: bool,
) -> Reply:
    """Has ``module``'s function ``answer(request, report)`` called in a confined process.

    ``report`` may be called with JSON-able dicts on the way; what ``answer`` returns is reported last. Of errors only
    `ContributionRejected` and the limits are told apart, by code; no error's words leave the process.

    Args:
        module: The importable name of the module that does the work.
        request: What it is to do, JSON-able.
        folder_path: The one folder that it may write to; its current folder. The paths in ``request`` are absolute.
        readable_paths: What it may read, beside that folder, the program and its libraries.
        limits: What it may use.
        is_strict: Whether to refuse, before anything is opened, where the kernel gives no network namespace, or has
            Landlock and does not apply it. A kernel without Landlock is warned of.

    Raises:
        ConfigError: If it is strict and the kernel does not hold it.
        StorageError: If the folder's disk is full.
    """
    order = json.dumps(
        {
            "module": module,
            "request": request,
            "readable_paths": [str(path) for path in readable_paths],
            "limits": asdict(limits),
            "is_strict": is_strict,
        }
    )
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "ignore",
        "HOME": str(folder_path),
        "TMPDIR": str(folder_path),
        # Threads, heaps and pools reserve address space, which is what RLIMIT_AS counts.
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "ARROW_NUM_THREADS": "1",
    }
    said_path = folder_path / ".said"
    with said_path.open("w+b") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-m", "gretfound.confinement"],
            cwd=folder_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
        )
        said_path.unlink()  # only the two processes have it, so nothing can stand in its place
        is_late = threading.Event()
        handle = os.pidfd_open(process.pid)  # its number may be another process's once it is waited for
        timer = threading.Timer(limits.wall_s, _kill, (handle, is_late))
        timer.start()
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(order.encode())
                process.stdin.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            timer.join()
            os.close(handle)
            if process.returncode is None:
                process.kill()
                process.wait()
        lines = _read_lines(said)
    cpu_s = usage.ru_utime + usage.ru_stime
    peak_bytes = 0
    if process.returncode == EXIT_CONFINED and lines and type(lines[-1].get("peak_bytes")) is int:
        peak_bytes = lines.pop()["peak_bytes"]
    held = tuple(str(each) for each in lines[0].get("held", [])) if lines else ()
    if process.returncode == EXIT_NOT_CONFINED:
        raise ConfigError(
            "this node's kernel gives the intake no network namespace, or has Landlock and does not apply it; the "
            "standard policy requires both: allow user namespaces and Landlock (docs/operating.md, Intake), or use "
            "policy=demonstration on made-up data"
        )
    if process.returncode == EXIT_NO_ROOM:
        raise StorageError(f"the disk of {folder_path.parent} is full; free some room and run the command again")
    if enclosure.LANDLOCK_FILES not in held:
        log.warning("no Landlock on this node: what opens a package can read what its user can, keys included")
    code = _ending(process.returncode, is_late.is_set(), cpu_s, limits, lines)
    log.info("%s ended with %s after %.1f CPU s and %.0f MiB; confined by %s and limits",
             module, code or "a result", cpu_s, peak_bytes / 2**20, ", ".join(held) or "nothing")  # fmt: skip
    return Reply(
        code=code,
        reports=tuple(lines[1:]),
        held=held,
        peak_bytes=peak_bytes,
        cpu_s=cpu_s,
    )


def _kill(handle: int, is_late: threading.Event) -> None:
    is_late.set()
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)


def _read_lines(said: BinaryIO) -> list[dict[str, Any]]:
    """Reads what the process wrote, as far as it is whole: nothing of it is trusted beyond being a JSON object."""
    said.seek(0)
    lines: list[dict[str, Any]] = []
    for line in said.read(MAX_REPLY_BYTES).split(b"\n")[:-1]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict):
            break
        lines.append(found)
    return lines


def _ending(returncode: int, is_late: bool, cpu_s: float, limits: Limits, lines: list[dict[str, Any]]) -> str:
    if is_late:
        return "LIMIT_TIME"
    if returncode == -signal.SIGXCPU or (returncode == -signal.SIGKILL and cpu_s >= limits.cpu_s):
        return "LIMIT_CPU"
    if returncode != EXIT_CONFINED or len(lines) < 2:
        return "CRASHED"
    code = str(lines[-1].get("code", ""))
    return code if not code or CODE_PATTERN.fullmatch(code) else "CRASHED"


def main() -> int:
    """Reads an order from standard input, shuts this process in, does the work and answers on standard output."""
    order = json.loads(sys.stdin.buffer.read())
    limits = Limits(**order["limits"])
    enclosure.limit(
        memory_bytes=limits.memory_bytes,
        cpu_s=limits.cpu_s,
        file_bytes=limits.file_bytes,
        num_open_files=limits.num_open_files,
    )
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    held = enclosure.shut_in(folder_path=Path.cwd(), readable_paths=[Path(each) for each in order["readable_paths"]])
    has_files = enclosure.LANDLOCK_FILES in held or not enclosure.has_landlock()
    if order["is_strict"] and not (enclosure.NAMESPACE in held and has_files):
        return EXIT_NOT_CONFINED
    said = sys.stdout

    def report(line: dict[str, Any]) -> None:
        said.write(json.dumps(line, allow_nan=False) + "\n")
        said.flush()

    report({"held": held})
    answer = importlib.import_module(order["module"]).answer
    try:
        report(answer(order["request"], report))
    except ContributionRejected as error:
        report({"code": error.code})
    except MemoryError:
        report({"code": "LIMIT_MEMORY"})
    except OSError as error:
        match error.errno:
            case errno.EFBIG:
                report({"code": "LIMIT_FILE_SIZE"})
            case errno.EMFILE:
                report({"code": "LIMIT_OPEN_FILES"})
            case errno.ENOMEM:
                report({"code": "LIMIT_MEMORY"})
            case errno.ENOSPC:
                return EXIT_NO_ROOM
            case _:
                raise
    report({"peak_bytes": _peak_bytes()})
    return EXIT_CONFINED


def _peak_bytes() -> int:
    # Not getrusage: what it says begins with what the caller held when it started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


if __name__ == "__main__":
    sys.exit(main())
