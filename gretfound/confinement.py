"""Confinement: work on bytes of strangers in a process of its own, without network, with limits and a private folder.

`run` starts a process, and that process shuts itself in before it imports what does the work: resource limits, an
empty network namespace, and Landlock (nothing can be executed; nothing outside its folder can be written). It answers
in JSON lines. It may be killed at any limit; the caller lives on and gets a reason code. It is no virtual machine: a
flaw of the kernel is a way out.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gretfound.errors import ConfigError, ContributionRejected, StorageError

log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
NAMESPACE, LANDLOCK_TCP, LANDLOCK_FILES = "network namespace", "landlock: no TCP", "landlock: files"
MAX_REPLY_BYTES = 2**20
CODE_PATTERN = re.compile(r"[A-Z][A-Z0-9_]{1,39}")
MAX_MESSAGE_LENGTH = 500
EXIT_CONFINED, EXIT_NOT_CONFINED, EXIT_NO_ROOM = 0, 3, 4
# linux/sched.h, linux/prctl.h, linux/landlock.h
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE = 1 << 0, 1 << 1, 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG, _MAKE_OTHERS = 1 << 7, 1 << 8, 1 << 6 | 0b1111 << 9  # others: devices, sockets, pipes, links
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_TCP_BIND_AND_CONNECT = 0b11


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
    """What a confined process said, and what it took.

    ``code`` is empty where it ended well; then the last of ``reports`` is its result. The codes of this room are
    ``LIMIT_MEMORY``, ``LIMIT_CPU``, ``LIMIT_FILE_SIZE``, ``LIMIT_OPEN_FILES``, ``LIMIT_TIME`` and ``CRASHED``.
    ``peak_bytes`` is the most memory that it held; 0 where it was killed and could not say.
    """

    code: str
    message: str
    reports: tuple[dict[str, Any], ...]
    held: tuple[str, ...]
    peak_bytes: int
    cpu_s: float


def run(
    module: str, request: dict[str, Any], *, folder_path: Path, limits: Limits, is_namespace_required: bool
) -> Reply:
    """Has ``module``'s function ``answer(request, report)`` called in a confined process.

    ``report`` may be called with JSON-able dicts on the way; what ``answer`` returns is reported last. Of errors only
    `ContributionRejected` and the limits are told apart; no other error's words leave the process.

    Args:
        module: The importable name of the module that does the work.
        request: What it is to do, JSON-able.
        folder_path: The one folder that it may write to; its current folder. The paths in ``request`` are absolute.
        limits: What it may use.
        is_namespace_required: Whether to refuse, before anything is opened, where the kernel gives no namespace.

    Raises:
        ConfigError: If a namespace is required and the kernel gives none.
        StorageError: If the folder's disk is full.
    """
    order = json.dumps(
        {"module": module, "request": request, "limits": asdict(limits), "is_namespace_required": is_namespace_required}
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
            "this node's kernel gives the intake no network namespace, which the standard policy requires; allow user "
            "namespaces (docs/operating.md, Intake), or use policy=demonstration on made-up data"
        )
    if process.returncode == EXIT_NO_ROOM:
        raise StorageError(f"the disk of {folder_path.parent} is full; free some room and run the command again")
    code, message = _ending(process.returncode, is_late.is_set(), cpu_s, limits, lines)
    log.info("%s ended with %s after %.1f CPU s and %.0f MiB; confined by %s and limits",
             module, code or "a result", cpu_s, peak_bytes / 2**20, ", ".join(held) or "nothing")  # fmt: skip
    return Reply(
        code=code,
        message=message,
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


def _ending(
    returncode: int, is_late: bool, cpu_s: float, limits: Limits, lines: list[dict[str, Any]]
) -> tuple[str, str]:
    last = lines[-1] if lines else {}
    if is_late:
        return "LIMIT_TIME", f"found no end after {limits.wall_s:.0f} s; required one within them"
    if returncode == -signal.SIGXCPU or (returncode == -signal.SIGKILL and cpu_s >= limits.cpu_s):
        return "LIMIT_CPU", f"found no end after {limits.cpu_s} CPU s; required one within them"
    if returncode != EXIT_CONFINED or len(lines) < 2:
        return "CRASHED", "the process that opened it did not end well; an operator has to look at the package"
    if "code" not in last:
        return "", ""
    code, message = str(last["code"]), str(last.get("message", ""))
    if not CODE_PATTERN.fullmatch(code) or not message.isprintable() or len(message) > MAX_MESSAGE_LENGTH:
        return "CRASHED", "the process that opened it gave no readable answer; an operator has to look at the package"
    return code, message


def main() -> int:
    """Reads an order from standard input, shuts this process in, does the work and answers on standard output."""
    order = json.loads(sys.stdin.buffer.read())
    _limit(Limits(**order["limits"]))
    held = _shut_in(Path.cwd())
    if order["is_namespace_required"] and NAMESPACE not in held:
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
        report({"code": error.code, "message": str(error).removeprefix(f"{error.code}: ")})
    except MemoryError:
        report({"code": "LIMIT_MEMORY", "message": "it needs more memory than a package may; send smaller parts"})
    except OSError as error:
        match error.errno:
            case errno.EFBIG:
                report({"code": "LIMIT_FILE_SIZE", "message": "it unpacks to a larger file than a package may hold"})
            case errno.EMFILE:
                report({"code": "LIMIT_OPEN_FILES", "message": "it needs more open files than a package may"})
            case errno.ENOMEM:
                report({"code": "LIMIT_MEMORY", "message": "it needs more memory than a package may"})
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


def _limit(limits: Limits) -> None:
    for kind, value in {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.num_open_files,
    }.items():
        hard = value + 1 if kind == resource.RLIMIT_CPU else value  # the soft one is told from a kill
        resource.setrlimit(kind, (value, hard))


def _shut_in(folder_path: Path) -> list[str]:
    """Gives up what this process does not need; returns what the kernel granted."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = []
    # With the right to (root) at once, otherwise within a user namespace of its own.
    if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        held.append(NAMESPACE)
    return held + _landlock(libc, folder_path)


def _landlock(libc: ctypes.CDLL, folder_path: Path) -> list[str]:
    """Forbids execution, and writing outside the folder; links, sockets and devices everywhere.

    Source: Linux, Documentation/userspace-api/landlock.rst. The process works on where the kernel has no Landlock.
    """
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return []
    within = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG
    within |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    has_tcp = version >= 4
    attributes = (ctypes.c_uint64 * 2)(within | _EXECUTE | _MAKE_OTHERS, _TCP_BIND_AND_CONNECT if has_tcp else 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes) if has_tcp else ctypes.sizeof(ctypes.c_uint64))
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, size, ctypes.c_uint32(0))
    if ruleset < 0:
        return []
    folder = os.open(folder_path, os.O_PATH)
    rule = within.to_bytes(8, sys.byteorder) + folder.to_bytes(4, sys.byteorder)
    has_rule = libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0)) == 0
    is_held = has_rule and libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    os.close(folder)
    os.close(ruleset)
    if not is_held:
        return []
    return [LANDLOCK_FILES, LANDLOCK_TCP] if has_tcp else [LANDLOCK_FILES]


if __name__ == "__main__":
    sys.exit(main())
