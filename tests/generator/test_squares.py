"""Squares: what cannot be read is left out, and the mirror image of a right eye is a left one."""

import numpy as np
import pytest

from gretfound import fundus
from gretfound.errors import ConfigError
from gretfound.generator import squares


def test_squares_of__unreadable_ones_are_left_out_and_mirrored_eyes_change_sides() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    good = (fundus.encode_png(image), {"eye": "right", "age": 60.0})
    found = list(squares.squares_of([good, (b"no photograph", {}), good], resolution_px=16))
    assert [square.pixels.shape for square in found] == [(16, 16, 3)] * 2
    assert "right eye" in found[0].caption
    assert found[0].mirrored_caption == found[0].caption.replace("right eye", "left eye")
    with pytest.raises(ConfigError, match="no readable photograph"):
        list(squares.squares_of([(b"no photograph", {})], resolution_px=16))
