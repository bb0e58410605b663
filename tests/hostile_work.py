"""What a confined process may be made to try; `tests/test_confinement.py` has it done."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gretfound.errors import ContributionRejected


def answer(request: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Tries one thing and says how far it came."""
    match request["attempt"]:
        case "nothing":
            return {"environment": sorted(os.environ), "folder": [path.name for path in Path().iterdir()]}
        case "reject":
            report({"passed": "FIRST"})
            raise ContributionRejected("BAD_THING", "found a bad thing")
        case "forge":
            for line in request["lines"]:
                report(line)
            return {"rejected": {}}
        case "raise":
            raise ValueError("patient Smith")
        case "memory":
            return {"bytes": len(bytearray(4 * 2**30))}
        case "cpu":
            while True:
                pass
        case "sleep":
            time.sleep(60)
        case "file":
            return {"bytes": Path("large").write_bytes(bytes(2 * 2**20))}
        case "files":
            return {"files": len([Path("many").open("w") for _ in range(100)])}
        case "abort":
            os.abort()
        case "flood":
            while True:
                report({"line": "x" * 1000})
        case "connect" | "send" as attempt:
            kind = socket.SOCK_STREAM if attempt == "connect" else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET, kind) as stranger:
                return _tried(lambda: stranger.connect(("127.0.0.1", request["port"])))
        case "write outside":
            return _tried(lambda: Path(request["path"]).write_bytes(b"x"))
        case "read outside":
            return _tried(lambda: Path(request["path"]).read_bytes())
        case "list outside":
            return _tried(lambda: list(Path(request["path"]).iterdir()))
        case "signal":
            return _tried(lambda: os.kill(request["pid"], 0))
        case "link":
            return _tried(lambda: Path("link").symlink_to("/etc/passwd"))
        case "weigh":
            return _weighed(Path(request["adapter_path"]), Path(request["base_path"]))
        case "execute":
            return _tried(lambda: subprocess.run(["/bin/true"], check=True))
    return {}


def _weighed(adapter_path: Path, base_path: Path) -> dict[str, Any]:
    from gretfound.generator import adapter

    def peak_bytes() -> int:
        (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])

    before_bytes, began_s, code = peak_bytes(), time.monotonic(), ""
    try:
        adapter.examine(adapter_path, base_path)
    except ContributionRejected as error:
        code = error.code
    return {"found": code, "seconds": time.monotonic() - began_s, "growth_bytes": peak_bytes() - before_bytes}


def _tried(attempt: Callable[[], object]) -> dict[str, Any]:
    try:
        attempt()
    except OSError as error:
        return {"errno": error.errno}
    return {"errno": 0}
