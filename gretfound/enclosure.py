"""Enclosure: what a process gives up before it reads a stranger's bytes: the network, other files, execution, excess.

`limit` bounds what it may use, and `shut_in` closes the network (an empty namespace) and the files (Landlock): it can
execute nothing, write in one folder or nowhere, and read its program, its libraries and what it is given. So the keys
of its user stay unread. Neither can be taken back. It is no virtual machine: a flaw of the kernel is a way out.
"""

import ctypes
import importlib.util
import os
import resource
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

NAMESPACE, LANDLOCK_TCP, LANDLOCK_FILES = "network namespace", "landlock: no TCP", "landlock: files"
LANDLOCK_SIGNALS = "landlock: no signals"
# linux/sched.h, linux/prctl.h, linux/landlock.h
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_OTHERS = 1 << 6 | 0b1111 << 9  # devices, sockets, pipes, links
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_CODE_SUFFIXES = (".py", ".so")
# What the C library, Python and OpenBLAS read as they start, and threads of them later.
_SYSTEM_PATHS = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system"),
)


def limit(*, memory_bytes: int, cpu_s: int, file_bytes: int, num_open_files: int) -> None:
    """Bounds this process, soft and hard, so that it cannot raise a bound again.

    Args:
        memory_bytes: Of the whole address space, libraries included.
        cpu_s: Of processor time; at the soft limit it gets SIGXCPU, one second later SIGKILL.
        file_bytes: Of one file.
        num_open_files: At a time.
    """
    for kind, value in {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: num_open_files,
    }.items():
        hard = value + 1 if kind == resource.RLIMIT_CPU else value  # the soft one is told from a kill
        resource.setrlimit(kind, (value, hard))


def shut_in(*, folder_path: Path | None, readable_paths: Iterable[Path] = ()) -> list[str]:
    """Closes the network and the files to this process, as far as the kernel does; call it before threads are started.

    Args:
        folder_path: The one folder that it may write to, and read; None for none.
        readable_paths: Files and folders that it may read, beside its program and libraries.

    Returns:
        What the kernel granted, of the names above.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = []
    # With the right to (root) at once, otherwise within a user namespace of its own.
    if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        held.append(NAMESPACE)
    importlib.util.find_spec("gretfound_none")  # lists every folder of the search path, which is closed afterwards
    return held + _landlock(libc, folder_path, [*_program_paths(), *readable_paths])


def has_landlock() -> bool:
    """Tells whether this kernel has Landlock (Linux 5.13, and not switched off)."""
    return _landlock_version(ctypes.CDLL(None, use_errno=True)) >= 1


def _landlock_version(libc: ctypes.CDLL) -> int:
    return int(libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _program_paths() -> Iterator[Path]:
    """Yields what has to be read to import modules.

    Of a folder on the search path that is no installation's, such as the one that a program was started in, only the
    packages and modules are, not what else lies there.
    """
    installed = [Path(sys.prefix), Path(sys.base_prefix), *map(Path, set(sysconfig.get_paths().values()))]
    yield from installed
    yield from map(Path, _SYSTEM_PATHS)
    yield Path(__file__).parents[1] / "conf" / "disclosure"
    for entry in map(Path, filter(None, sys.path)):
        if entry.name in ("site-packages", "dist-packages"):
            yield entry
        elif entry.is_dir() and not any(entry.is_relative_to(each) for each in installed):
            yield from (
                each for each in entry.iterdir() if each.suffix in _CODE_SUFFIXES or (each / "__init__.py").is_file()
            )


def _landlock(libc: ctypes.CDLL, folder_path: Path | None, readable_paths: Iterable[Path]) -> list[str]:
    """Closes the files. Source: Linux, Documentation/userspace-api/landlock.rst."""
    version = _landlock_version(libc)
    if version < 1:
        return []
    reading = _READ_FILE | _READ_DIR
    within = reading | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG
    within |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = [within | _EXECUTE | _MAKE_OTHERS]
    handled += [_TCP_BIND_AND_CONNECT] if version >= 4 else []
    handled += [_ABSTRACT_SOCKETS_AND_SIGNALS] if version >= 6 else []
    attributes = (ctypes.c_uint64 * len(handled))(*handled)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, size, ctypes.c_uint32(0))
    if ruleset < 0:
        return []
    allowed = [(path, reading) for path in readable_paths if path.exists()]
    allowed += [(folder_path, within)] if folder_path else []
    is_held = all(_allow(libc, ruleset, path, rights) for path, rights in allowed)
    is_held = is_held and libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    os.close(ruleset)
    return [LANDLOCK_FILES, LANDLOCK_TCP, LANDLOCK_SIGNALS][: len(handled)] if is_held else []


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> bool:
    handle = os.open(path, os.O_PATH)
    try:
        rights &= ~_READ_DIR if not path.is_dir() else ~0
        rule = rights.to_bytes(8, sys.byteorder) + handle.to_bytes(4, sys.byteorder)
        return bool(libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0)) == 0)
    finally:
        os.close(handle)
