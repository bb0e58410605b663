"""Weights as a stranger may send them: a safetensors writer without the library, and ways to spoil a file.

`FAULTS` names for each way the check that has to find it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.float32]]
FAULTS = {
    "header of 2^64-1": "W0_HEADER",
    "header of 99 MB": "W0_HEADER",
    "300,000 tensors": "W0_HEADER",
    "100,000 dimensions": "W0_HEADER",
    "five dimensions": "W2_SHAPE",
    "nested": "W0_HEADER",
    "no JSON": "W0_HEADER",
    "a pickle": "W0_HEADER",
    "key twice": "W1_DUPLICATE_KEY",
    "extra tensor": "W1_COUNT",
    "another name": "W2_TENSORS",
    "another shape": "W2_SHAPE",
    "NaN": "W3_NOT_FINITE",
    "infinity": "W3_NOT_FINITE",
    "hole": "W2_OFFSETS",
    "overlap": "W2_OFFSETS",
    "negative offset": "W2_SHAPE",
    "odd format": "W7_DTYPE",
    "truncated": "W2_OFFSETS",
    "bytes behind": "W2_OFFSETS",
    "words": "W6_METADATA",
    "float32": "W7_DTYPE",
}


def write_safetensors(path: Path, arrays: Arrays, *, dtype: str = "BF16") -> Path:
    """Writes what the format's page says."""
    header: dict[str, Any] = {}
    content = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array, "<f4")
        stored = (raw.view("<u4") >> 16).astype("<u2").tobytes() if dtype == "BF16" else raw.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(content), len(content) + len(stored)],
        }
        content += stored
    return _write(path, header, content)


def _write(path: Path, header: Any, content: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def spoil(path: Path, fault: str) -> None:
    """Spoils a bfloat16 file of at least two tensors in one way of `FAULTS`."""
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header, content = json.loads(whole[8:begin]), whole[begin:]
    header.pop("__metadata__", None)
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    first, second, last = header[names[0]], header[names[1]], header[names[-1]]
    match fault:
        case "header of 2^64-1":
            path.write_bytes(b"\xff" * 8 + whole[8:])
        case "header of 99 MB":
            _write(path, b"{" + b" " * 99_000_000 + b"}", content)
        case "300,000 tensors":
            entries = (b'"t%06d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (index, index, index + 1)
                       for index in range(300_000))  # fmt: skip
            _write(path, b"{" + b",".join(entries) + b"}", bytes(300_000))
        case "a pickle":
            path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os")
        case "nested":
            _write(path, b"[" * 900, content)
        case "no JSON":
            _write(path, b"\x80\x04" * 20, content)
        case "key twice":
            _write(path, json.dumps(header).encode().replace(names[1].encode(), names[0].encode(), 1), content)
        case "truncated":
            path.write_bytes(whole[:-1])
        case "bytes behind":
            path.write_bytes(whole + b"\0")
        case "NaN":
            _write(path, header, b"\xc0\x7f" + content[2:])
        case "infinity":
            _write(path, header, b"\x80\x7f" + content[2:])
        case "float32":
            wide = (np.frombuffer(content, "<u2").astype("<u4") << 16).tobytes()
            for entry in header.values():
                entry.update(dtype="F32", data_offsets=[2 * offset for offset in entry["data_offsets"]])
            _write(path, header, wide)
        case _:
            match fault:
                case "100,000 dimensions":
                    first["shape"] = [1] * 100_000
                case "five dimensions":
                    first["shape"] += [1] * 3
                case "extra tensor":
                    header["zz"] = {"dtype": "BF16", "shape": [1], "data_offsets": [len(content), len(content) + 2]}
                    content += b"\0\0"
                case "another name":
                    header["patient_smith"] = header.pop(names[0])
                case "another shape":
                    first["shape"] = first["shape"][::-1]
                case "hole":
                    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]
                    content += bytes(8)
                case "overlap":
                    second["data_offsets"] = [0, second["data_offsets"][1] - second["data_offsets"][0]]
                case "negative offset":
                    first["data_offsets"][0] = -1
                case "odd format":
                    first["dtype"] = ["BF16"]
                case "words":
                    header["__metadata__"] = {"note": "MRN 12345"}
            _write(path, header, content)
