"""Configuration: layers merge once, every fault is named at once, nothing is guessed."""

from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from gretfound.config import describe, load, setting, to_yaml
from gretfound.errors import ConfigError


@dataclass(frozen=True)
class Part:
    rate: float = setting(0.5, "a rate, images a second")
    names: list[str] = setting([], "names")


@dataclass(frozen=True)
class Whole:
    place: str = setting(help="where")
    number: int = setting(3, "how many")
    part: Part = setting(Part())

    def __post_init__(self) -> None:
        if self.number > 100:
            raise ConfigError("number > 100")


def test_load__later_layers_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("number: 5\npart: {rate: 1.5, names: [x]}\n")
    (tmp_path / "b.yaml").write_text("part: {rate: 2}\n")
    config = load(
        Whole, [str(tmp_path / "a.yaml"), "number=7", str(tmp_path / "b.yaml"), "place=here", "part.names=[y,z]"]
    )
    assert config == Whole(place="here", number=7, part=Part(rate=2.0, names=["y", "z"]))
    with pytest.raises(FrozenInstanceError):
        config.number = 8  # type: ignore[misc]


def test_load__all_faults_together(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("number: [1\n")
    with pytest.raises(ConfigError) as caught:
        load(Whole, ["part.rat=1", "number=many", "absent.yaml", "--fast", str(tmp_path / "bad.yaml")])
    message = str(caught.value)
    for part in ("part.rat", "number:", "absent.yaml", "--fast", "bad.yaml", "place: required", "6 fault(s)"):
        assert part in message


def test_load__checks_that_span_keys() -> None:
    with pytest.raises(ConfigError, match="number > 100"):
        load(Whole, ["place=x", "number=101"])


def test_describe__every_key_default_and_help() -> None:
    text = describe(Whole)
    for part in ("place", "required", "part.rate", "0.5", "a rate, images a second", "list[str]"):
        assert part in text


def test_to_yaml__loads_again(tmp_path: Path) -> None:
    config = load(Whole, ["place=x", "part.rate=0.25"])
    (tmp_path / "whole.yaml").write_text(to_yaml(config))
    assert load(Whole, [str(tmp_path / "whole.yaml")]) == config
