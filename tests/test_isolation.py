"""A process that is fed a bomb dies alone: its work is refused, the next piece is done."""

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from gretfound import enclosure, isolation
from gretfound.errors import ConfigError

LIMITS = isolation.Limits(memory_bytes=2**30, cpu_s=2, wall_s=90.0)
TINY = isolation.Limits(memory_bytes=2**25)


def answer(request: dict[str, Any], content: bytes) -> isolation.Answer:
    """Work of the isolated process: does as it is told."""
    match request["do"]:
        case "reverse":
            return {"pid": os.getpid(), "secrets": sorted(set(os.environ) & {"HOME", "SECRET"})}, content[::-1]
        case "print":
            os.write(1, b"chatter")
        case "allocate":
            return {"size": len(bytes(2 * 2**30))}, b""
        case "compute":
            while True:
                pass
        case "sleep":
            time.sleep(60)
        case "write":
            try:
                with open(content, "wb") as stream:  # noqa: PTH123
                    stream.write(b"x")
            except OSError:
                return {"written": False}, b""
            return {"written": True}, b""
        case "read":
            try:
                return {"read": len(Path(request["path"]).read_bytes())}, b""
            except OSError:
                return {"read": -1}, b""
        case "limit":
            return {"hard": resource.getrlimit(resource.RLIMIT_CPU)[1]}, b""
        case "die":
            os._exit(1)
    return {}, b""


def test_run__answers_with_json_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    with isolation.Pool("tests.test_isolation:answer", num_processes=1, limits=LIMITS) as pool:
        facts, content = pool.run({"do": "reverse"}, b"abc" * 100_000)
        assert content == b"cba" * 100_000
        assert facts["pid"] != os.getpid() and facts["secrets"] == []
        assert pool.run({"do": "print"}, b"") == ({}, b"")  # what a library prints is no answer
        assert pool.run({"do": "reverse"}, b"ab")[0]["pid"] == facts["pid"], "one process does many pieces"


def test_run__ends_what_goes_beyond_its_limits(tmp_path: Path) -> None:
    with isolation.Pool("tests.test_isolation:answer", num_processes=1, limits=LIMITS) as pool:
        for hostile in ("allocate", "compute", "die"):
            began_s = time.monotonic()
            with pytest.raises(isolation.BeyondLimits):
                pool.run({"do": hostile}, b"")
            assert time.monotonic() - began_s < 60, "its own limit ends it, not that on the time of waiting"
            assert pool.run({"do": "reverse"}, b"ab")[1] == b"ba", "the next piece of work is done"
        assert pool.run({"do": "write"}, bytes(tmp_path / "x"))[0] == {"written": False}


def test_run__reads_no_key_of_its_user(tmp_path: Path) -> None:
    if not enclosure.has_landlock():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "site.key").write_bytes(b"secret")
    with isolation.Pool("tests.test_isolation:answer", num_processes=1, limits=LIMITS) as pool:
        assert pool.run({"do": "read", "path": str(tmp_path / "site.key")}, b"")[0] == {"read": -1}
        assert pool.run({"do": "read", "path": isolation.__file__}, b"")[0]["read"] > 0


def test_run__a_process_is_replaced_before_its_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_MAX_PIECES", 2)
    with isolation.Pool("tests.test_isolation:answer", num_processes=1, limits=LIMITS) as pool:
        pids = [pool.run({"do": "reverse"}, b"")[0]["pid"] for _ in range(4)]
        assert pids[0] == pids[1] != pids[2] == pids[3]
        assert 0 < pool.run({"do": "limit"}, b"")[0]["hard"] < 10_000, "it could raise its own limit"


def test_run__ends_what_takes_too_long() -> None:
    limits = isolation.Limits(wall_s=1.0)
    with isolation.Pool("tests.test_isolation:answer", num_processes=1, limits=limits) as pool:
        pool.run({"do": "reverse"}, b"")
        began_s = time.monotonic()
        with pytest.raises(isolation.BeyondLimits):
            pool.run({"do": "sleep"}, b"")
        assert time.monotonic() - began_s < 10


def test_run__a_process_that_cannot_start_is_no_refused_photograph() -> None:
    for work, limits in (("tests.absent:answer", LIMITS), ("gretfound.deidentify:answer", TINY)):
        pool = isolation.Pool(work, num_processes=1, limits=limits)
        with pool, pytest.raises(ConfigError, match="does not start"):
            pool.run({"do": "reverse"}, b"")


def test_map__keeps_the_order_and_does_not_run_ahead() -> None:
    taken: list[int] = []

    def tasks():
        for index in range(40):
            taken.append(index)
            yield index

    with isolation.Pool("tests.test_isolation:answer", num_processes=2, limits=LIMITS) as pool:
        results = pool.map(lambda index: int(pool.run({"do": "reverse"}, b"%d" % index)[1][::-1]), tasks())
        assert next(results) == 0
        assert len(taken) <= 6, "photographs pile up in memory if nobody reads the results"
        assert list(results) == list(range(1, 40))
