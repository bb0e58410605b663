"""Canonical JSON: the one text of a content, which digests and signatures are of.

There are two spellings, since neither can change: ids of records that lie in hubs are digests of the one, and what is
signed, and so read by others' programs, is in the other. Of whole numbers up to 2**53, printable ASCII, true, false and
null they are the same bytes; they differ in fractions, in other characters, and in the order of keys beyond ASCII.
"""

import json
from typing import Any, Literal

import rfc8785

Spelling = Literal["record", "standard"]


def to_bytes(content: Any, *, spelling: Spelling) -> bytes:
    """Returns the one JSON text of a content: sorted keys, no spaces, no NaN.

    Args:
        content: What JSON can say.
        spelling: ``standard`` is RFC 8785, in UTF-8. ``record`` is Python's: fractions as ``repr`` writes them, ASCII
            with escapes, keys sorted by code points.

    Raises:
        ValueError: If a number is not finite or, in the standard spelling, a whole number is beyond 2**53.
    """
    match spelling:
        case "standard":
            return rfc8785.dumps(content)
        case "record":
            text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
            return text.encode()
