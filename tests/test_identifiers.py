"""Tokens are found wherever they stand, in each encoding; the search is held against Python's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gretfound import identifiers


def test_tokens_of__texts_and_bytes() -> None:
    assert identifiers.tokens_of("Doe^Jane-Marie 1958/04/12, MRN: A12345") == {"Jane", "Marie", "1958", "A12345"}
    assert "Smith" in identifiers.tokens_of(b"\x00\x08Smith0\x00\x01"), "a neighbouring field's byte looks like a digit"
    assert "M\xc3\xbcller" in identifiers.tokens_of("xx M\u00fcller".encode())
    assert "Smith" in identifiers.tokens_of("Smith".encode("utf-16-le"))
    assert identifiers.tokens_of("Ng 12/4") == set()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16-le", "utf-16-be"])
def test_encoded__each_form_is_found(encoding: str) -> None:
    needles = identifiers.encoded({"M\u00fcller"})
    assert identifiers.found_in(b"x" * 7 + "M\u00fcller".encode(encoding) + b"y", needles)


@given(
    content=st.binary(max_size=200),
    others=st.lists(st.binary(min_size=4, max_size=9), max_size=5),
    cuts=st.lists(st.tuples(st.integers(0, 199), st.integers(4, 9)), max_size=4),
)
def test_found_in__is_what_python_finds(content: bytes, others: list[bytes], cuts: list[tuple[int, int]]) -> None:
    needles = {*others, *(content[start : start + size] for start, size in cuts if start + size <= len(content))}
    assert identifiers.found_in(content, needles) == {needle for needle in needles if needle in content}


def test_found_in__many_needles_in_megabytes() -> None:
    content = bytearray(np.random.default_rng(0).bytes(4_000_001))
    content[-9:] = b"PATIENT77"
    needles = {b"%08dX" % number for number in range(5000)} | {b"PATIENT77"}
    assert identifiers.found_in(bytes(content), needles) == {b"PATIENT77"}


def test_found_in__refuses_short_needles() -> None:
    with pytest.raises(ValueError, match="fewer than 4"):
        identifiers.found_in(b"abcdef", {b"abc"})
