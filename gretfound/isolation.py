"""Work on bytes of unknown origin in processes of their own, with limits on memory, processor time and files.

A decoder that is fed a bomb, or crashes, takes such a process down and no more: its file is refused and the next one
gets a new process. What comes back is JSON and bytes, never a pickle. The environment is not handed on, but for
`OPENBLAS_*`, and the process shuts itself in (`gretfound.enclosure`) as far as the kernel allows: without Landlock it
can read what its user can, keys too, and a machine or container has to make up for that (docs/privacy.md).
"""

import contextlib
import importlib
import json
import os
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from gretfound import enclosure
from gretfound.errors import ConfigError

Answer = tuple[dict[str, Any], bytes]
Work = Callable[[dict[str, Any], bytes], Answer]
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_LENGTH = struct.Struct(">Q")
_MAX_JSON_BYTES = 32 * 2**20
_MAX_OPEN_FILES = 64
_READY = b"ready"
_MAX_PIECES = 256  # of one process: its hard limit of processor time has to be set before the first


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one piece of work may use.

    ``memory_bytes`` bounds the whole address space of the process, libraries included; ``cpu_s`` and ``wall_s`` are for
    one piece of work; ``answer_bytes`` bounds what it may hand back.
    """

    memory_bytes: int = 2 * 2**30
    cpu_s: int = 20
    wall_s: float = 300.0
    answer_bytes: int = 512 * 2**20


class BeyondLimits(Exception):
    """The process that did the work was ended or ended itself: too much memory or time, or a crash."""


class Pool:
    """Processes that do one kind of work; `run` may be called from several threads at once.

    Args:
        work: ``module:function`` of a function that takes a JSON-able dict and bytes and returns such a pair.
        num_processes: How many; each is started when it is first needed.
        limits: For each piece of work.
    """

    def __init__(self, work: str, *, num_processes: int, limits: Limits) -> None:
        self.num_processes = num_processes
        self._command = [sys.executable, "-P", "-s", "-m", "gretfound.isolation", work, str(limits.memory_bytes)]
        self._command.append(str(limits.cpu_s))
        self._limits = limits
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._idle.put(None)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(self.num_processes):
            process = self._idle.get()
            if process is not None:
                process.end()

    def run(self, request: dict[str, Any], content: bytes) -> Answer:
        """Does one piece of work.

        Raises:
            BeyondLimits: If its process did not survive it.
            ConfigError: If no such process can be started here.
        """
        process = self._idle.get()
        answer = None
        try:
            process = process or _Process(self._command, self._limits)
            answer = process.ask(request, content, self._limits)
            return answer
        finally:
            if process is not None and (answer is None or process.num_asked == _MAX_PIECES):
                # Whatever went wrong, it is not asked again.
                process.end()
                process = None
            self._idle.put(process)

    def map(self, function: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
        """Calls ``function``, which calls `run`, for each task; yields results in order, few ahead of the reader."""
        with ThreadPoolExecutor(self.num_processes) as threads:
            ahead: deque[Future[_Result]] = deque()
            try:
                for task in tasks:
                    ahead.append(threads.submit(function, task))
                    if len(ahead) > 2 * self.num_processes:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


class _Process:
    def __init__(self, command: list[str], limits: Limits) -> None:
        # One thread and one heap each: address space is what is limited, and the cores are shared out already.
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "ARROW_NUM_THREADS": "1",
        }
        self.num_asked = 0
        kept = {name: os.environ[name] for name in os.environ if name.startswith("OPENBLAS_")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=kept | environment
        )
        try:
            self._read_frame(self._process.stdout, len(_READY), time.monotonic() + limits.wall_s)
        except BeyondLimits:
            self.end()
            raise ConfigError(
                f"the process that opens photographs does not start within {limits.memory_bytes >> 20:,} MiB of "
                f"address space and {limits.wall_s:.0f} s; required a whole installation and a machine that has room"
            ) from None

    def ask(self, request: dict[str, Any], content: bytes, limits: Limits) -> Answer:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        ends_s = time.monotonic() + limits.wall_s
        self.num_asked += 1
        try:
            _write_frame(stdin, json.dumps(request).encode())
            _write_frame(stdin, content)
            stdin.flush()
        except BrokenPipeError as error:
            raise BeyondLimits("the process ended before it was given its work") from error
        answer = self._read_frame(stdout, _MAX_JSON_BYTES, ends_s)
        payload = self._read_frame(stdout, limits.answer_bytes, ends_s)
        try:
            parsed = json.loads(answer)
        except ValueError as error:
            raise BeyondLimits("the process did not answer in JSON") from error
        if not isinstance(parsed, dict):
            raise BeyondLimits("the process ran out of memory")
        return parsed, payload

    def _read_frame(self, stdout: Any, max_bytes: int, ends_s: float) -> bytes:
        (length,) = _LENGTH.unpack(self._read(stdout, _LENGTH.size, ends_s))
        if length > max_bytes:
            raise BeyondLimits("the process answered more than it may")
        return self._read(stdout, length, ends_s)

    def _read(self, stdout: Any, num_bytes: int, ends_s: float) -> bytes:
        parts = []
        while num_bytes:
            ready, _, _ = select.select([stdout], [], [], max(0.0, ends_s - time.monotonic()))
            part = os.read(stdout.fileno(), min(num_bytes, 2**20)) if ready else b""
            if not part:
                raise BeyondLimits("the process ended or took too long")
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)

    def end(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()


def _write_frame(stream: Any, content: bytes) -> None:
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)


def _read_whole_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def _serve(work_name: str, memory_bytes: int, cpu_s: int) -> None:
    """The process's own side: answers requests from its standard input until that ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # what a library prints is no answer
    most_cpu_s = (_MAX_PIECES + 1) * (cpu_s + 1)
    enclosure.limit(memory_bytes=memory_bytes, cpu_s=most_cpu_s, file_bytes=0, num_open_files=_MAX_OPEN_FILES)
    enclosure.shut_in(folder_path=None)
    module_name, _, function_name = work_name.partition(":")
    work: Work = getattr(importlib.import_module(module_name), function_name)
    _write_frame(answers, _READY)
    answers.flush()
    while (request := _read_whole_frame(requests)) is not None:
        content = _read_whole_frame(requests)
        if content is None:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        until_s = min(int(used.ru_utime + used.ru_stime) + 1 + cpu_s, most_cpu_s)
        resource.setrlimit(resource.RLIMIT_CPU, (until_s, most_cpu_s + 1))
        try:
            answer, payload = work(json.loads(request), content)
        except MemoryError:
            _write_frame(answers, b"null")
            _write_frame(answers, b"")
            answers.flush()
            return
        _write_frame(answers, json.dumps(answer).encode())
        _write_frame(answers, payload)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
