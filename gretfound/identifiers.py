"""Tokens that may identify somebody: gathered from a file's header and name, and looked for in what is about to leave.

A token is a run of at least four letters or digits. It is searched for as bytes, in each encoding that it may have.
"""

import re
from collections.abc import Collection, Iterable

import numpy as np

MIN_LENGTH = 4
_IN_TEXT = re.compile(r"[^\W_]{4,}")
_IN_BYTES = (
    re.compile(rb"[0-9A-Za-z\x80-\xff]{4,}"),
    # A number or name that stands next to a binary field's letters: both parts by themselves.
    re.compile(rb"[A-Za-z\x80-\xff]{4,}"),
    re.compile(rb"[0-9]{4,}"),
)
_IN_UTF16 = re.compile(rb"(?:[0-9A-Za-z]\x00){4,}")


def tokens_of(value: str | bytes) -> set[str]:
    """Returns the tokens of a text, or of bytes of any kind; those of bytes stand one character for one byte."""
    if isinstance(value, str):
        return set(_IN_TEXT.findall(value))
    found = {run for pattern in _IN_BYTES for run in pattern.findall(value)}
    found |= {run[::2] for run in _IN_UTF16.findall(value)}
    return {run.decode("latin-1") for run in found}


def encoded(tokens: Iterable[str]) -> set[bytes]:
    """Returns the bytes that the tokens may appear as: Latin-1 (where it can), UTF-8 and UTF-16."""
    forms = set()
    for token in tokens:
        forms |= {token.encode("utf-8"), token.encode("utf-16-le"), token.encode("utf-16-be")}
        if token.isascii() or all(ord(letter) < 256 for letter in token):
            forms.add(token.encode("latin-1"))
    return forms


def found_in(content: bytes, needles: Collection[bytes]) -> set[bytes]:
    """Returns the needles, each of at least four bytes, that stand anywhere in ``content``.

    One pass over the content however many needles there are: every four bytes are looked up in a table of the needles'
    first four, and only what is met there is compared whole.

    Raises:
        ValueError: If a needle is shorter than four bytes.
    """
    if any(len(needle) < MIN_LENGTH for needle in needles):
        raise ValueError(f"found a needle of fewer than {MIN_LENGTH} bytes; required at least that many")
    by_head: dict[int, list[bytes]] = {}
    for needle in needles:
        by_head.setdefault(int.from_bytes(needle[:4], "little"), []).append(needle)
    heads = np.fromiter(by_head, dtype=np.uint32, count=len(by_head))
    table = np.zeros(2**16, dtype=bool)
    table[_folded(heads)] = True
    found = set()
    for shift in range(min(4, max(0, len(content) - 3))):
        words = np.frombuffer(content, dtype="<u4", offset=shift, count=(len(content) - shift) // 4)
        candidates = np.flatnonzero(table[_folded(words)])
        for index in candidates[np.isin(words[candidates], heads)]:
            for needle in by_head[int(words[index])]:
                if content.startswith(needle, 4 * int(index) + shift):
                    found.add(needle)
    return found


def _folded(
    words: "np.ndarray[tuple[int, ...], np.dtype[np.uint32]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint32]]":
    return (words ^ (words >> np.uint32(16))) & np.uint32(0xFFFF)
