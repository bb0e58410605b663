"""Confinement: what a hostile process tries comes to nothing, and its caller lives on with a code."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gretfound import confinement
from gretfound.confinement import Limits, Reply
from gretfound.enclosure import LANDLOCK_FILES, LANDLOCK_SIGNALS, LANDLOCK_TCP, NAMESPACE
from gretfound.errors import ConfigError
from tests.conftest import ROOT

LIMITS = Limits(memory_bytes=2**30, cpu_s=2, file_bytes=2**20, num_open_files=32, wall_s=20)


def _run(
    folder_path: Path, attempt: str, *, limits: Limits = LIMITS, readable: Path | None = None, **more: Any
) -> Reply:
    folder_path.mkdir(exist_ok=True)
    return confinement.run(
        "tests.hostile_work",
        {"attempt": attempt, **more},
        folder_path=folder_path,
        readable_paths=[readable] if readable else [],
        limits=limits,
        is_strict=False,
    )


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return _run(tmp_path_factory.mktemp("held"), "nothing").held


def test_run__has_no_secrets_of_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    reply = _run(tmp_path / "work", "nothing")
    assert reply.code == ""
    assert not {"AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"} & set(reply.reports[-1]["environment"])
    assert reply.reports[-1]["folder"] == []
    assert 0 < reply.peak_bytes < LIMITS.memory_bytes and reply.cpu_s > 0


@pytest.mark.parametrize(
    ("attempt", "limits", "code"),
    [
        ("memory", LIMITS, "LIMIT_MEMORY"),
        ("cpu", Limits(cpu_s=1, wall_s=60), "LIMIT_CPU"),
        ("sleep", Limits(wall_s=1), "LIMIT_TIME"),
        ("file", LIMITS, "LIMIT_FILE_SIZE"),
        ("files", LIMITS, "LIMIT_OPEN_FILES"),
        ("abort", LIMITS, "CRASHED"),
        ("raise", LIMITS, "CRASHED"),
        ("reject", LIMITS, "BAD_THING"),
    ],
)
def test_run__ends_at_a_limit_with_its_code(tmp_path: Path, attempt: str, limits: Limits, code: str) -> None:
    began_s = time.monotonic()
    reply = _run(tmp_path / "work", attempt, limits=limits)
    assert reply.code == code
    assert "Smith" not in repr(reply) and "found a bad thing" not in repr(reply), "only codes leave"
    assert reply.peak_bytes < 200 * 2**20
    assert time.monotonic() - began_s < 15
    if attempt == "reject":
        assert reply.reports == ({"passed": "FIRST"}, {"code": "BAD_THING"})


def test_run__does_not_read_more_than_a_reply(tmp_path: Path) -> None:
    reply = _run(tmp_path / "work", "flood", limits=Limits(file_bytes=8 * 2**20, wall_s=20))
    assert reply.code != ""
    assert len(reply.reports) <= confinement.MAX_REPLY_BYTES // 1000


@pytest.mark.parametrize("kind", ["connect", "send"])
def test_run__reaches_no_network(tmp_path: Path, held: tuple[str, ...], kind: str) -> None:
    if NAMESPACE not in held and (LANDLOCK_TCP not in held or kind == "send"):
        pytest.skip("this kernel gives neither a network namespace nor Landlock for this")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        reply = _run(tmp_path / "work", kind, port=server.getsockname()[1])
    assert reply.reports[-1]["errno"] in (errno.ENETUNREACH, errno.EACCES)


def test_run__writes_links_and_executes_nothing_outside(tmp_path: Path, held: tuple[str, ...]) -> None:
    if LANDLOCK_FILES not in held:
        pytest.skip("this kernel has no Landlock")
    outside = tmp_path / "outside"
    reply = _run(tmp_path / "work", "write outside", path=str(outside))
    assert reply.reports[-1]["errno"] == errno.EACCES and not outside.exists()
    assert _run(tmp_path / "work", "write outside", path=str(tmp_path / "work" / "inside")).reports[-1]["errno"] == 0
    assert _run(tmp_path / "work", "link").reports[-1]["errno"] == errno.EACCES
    assert _run(tmp_path / "work", "execute").reports[-1]["errno"] == errno.EACCES


def test_run__reads_its_program_its_folder_and_what_it_is_given_alone(tmp_path: Path, held: tuple[str, ...]) -> None:
    if LANDLOCK_FILES not in held:
        pytest.skip("this kernel has no Landlock")
    secret_path = tmp_path / "identity.txt"
    secret_path.write_text("AGE-SECRET-KEY-1")
    beside_path = ROOT / "pyproject.toml"  # on the search path's own folder, but no module

    def errno_of(attempt: str, path: Path, readable: Path | None = None) -> int:
        reply = _run(tmp_path / "work", attempt, readable=readable, path=str(path))
        return int(reply.reports[-1]["errno"])

    assert errno_of("read outside", secret_path) == errno.EACCES
    assert errno_of("read outside", beside_path) == errno_of("list outside", ROOT) == errno.EACCES
    assert errno_of("read outside", Path("/proc") / str(os.getpid()) / "environ") == errno.EACCES
    assert errno_of("read outside", secret_path, readable=secret_path) == 0
    assert errno_of("read outside", ROOT / "gretfound" / "errors.py") == 0
    if LANDLOCK_SIGNALS in held:
        assert _run(tmp_path / "work", "signal", pid=os.getpid()).reports[-1]["errno"] == errno.EPERM


FULL_OF_LAYERS = """
import ctypes, sys
from pathlib import Path
from gretfound import confinement
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
for _ in range(16):  # LANDLOCK_MAX_NUM_LAYERS: there is none left for the process that opens
    ruleset = libc.syscall(444, (ctypes.c_uint64 * 1)(1 << 12), ctypes.c_size_t(8), ctypes.c_uint32(0))
    assert libc.syscall(446, ruleset, ctypes.c_uint32(0)) == 0
reply = confinement.run("tests.hostile_work", {"attempt": "nothing"}, folder_path=Path(sys.argv[1]),
                        limits=confinement.Limits(), is_strict=sys.argv[2] == "yes")
print(*reply.held, sep=";")
"""


def test_run__refuses_where_the_kernel_has_landlock_and_does_not_apply_it(
    tmp_path: Path, held: tuple[str, ...]
) -> None:
    if not {LANDLOCK_FILES, NAMESPACE} <= set(held):
        pytest.skip("this kernel gives no Landlock or no network namespace")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def tried(is_strict: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FULL_OF_LAYERS, str(tmp_path), is_strict]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    without = tried("no")
    assert without.stdout.strip() == NAMESPACE and "no Landlock on this node" in without.stderr
    refused = tried("yes")
    assert refused.returncode != 0 and "has Landlock and does not apply it" in refused.stderr


def test_run__refuses_where_a_required_namespace_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a user namespace with no namespaces left to give, as in a container that forbids them.
    program = (
        "import sys; from pathlib import Path; from gretfound import confinement\n"
        "sys.argv[1] and Path(sys.argv[1]).mkdir(exist_ok=True)\n"
        "reply = confinement.run('tests.hostile_work', {'attempt': 'connect', 'port': 9},"
        " folder_path=Path(sys.argv[1]), limits=confinement.Limits(), is_strict=sys.argv[2] == 'yes')\n"
        "print(*reply.held, reply.reports[-1]['errno'], sep=';')\n"
    )
    shut = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "bash", "-c", shut, "-", sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def tried(required: str) -> subprocess.CompletedProcess[str]:
        arguments = [*command, str(tmp_path / "work"), required]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    without = tried("no")
    if "max_net_namespaces" in without.stderr or "unshare" in without.stderr:
        pytest.skip("user namespaces are not given here, so the case cannot be made")
    assert NAMESPACE not in without.stdout
    if LANDLOCK_TCP in without.stdout:
        assert int(without.stdout.strip().rpartition(";")[2]) == errno.EACCES, "Landlock alone closes TCP"
    refused = tried("yes")
    assert refused.returncode != 0 and ConfigError.__name__ in refused.stderr
    assert "no network namespace" in refused.stderr


def test_run__its_process_dies_with_its_caller(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from gretfound import confinement\n"
        "confinement.run('tests.hostile_work', {'attempt': 'sleep'}, folder_path=Path(sys.argv[1]),"
        " limits=confinement.Limits(), is_strict=False)\n"
    )
    (tmp_path / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    caller = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "work")], env=environment)

    def confined() -> list[str]:
        found = [path for path in Path("/proc").glob("[0-9]*/cwd") if _target(path) == str(tmp_path / "work")]
        return [path.parent.name for path in found]

    deadline_s = time.monotonic() + 30
    while not confined() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert confined()
    time.sleep(1.0)  # it asks to die with its caller in its first moments
    caller.kill()
    caller.wait()
    while confined() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not confined()


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def test_run__in_threads(tmp_path: Path) -> None:
    codes: list[str] = []
    threads = [
        threading.Thread(target=lambda index=index: codes.append(_run(tmp_path / str(index), "reject").code))
        for index in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == ["BAD_THING"] * 3
