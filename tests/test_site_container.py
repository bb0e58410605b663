"""The site's image, as far as it can be held to its promises without building it: `make site-image` does the rest."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from gretfound import site
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "cluster" / "site.Dockerfile").read_text()
PAGE = (ROOT / "docs" / "container.md").read_text()
LOCK = (ROOT / "requirements.lock").read_text()


@pytest.fixture(scope="module")
def derivation() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "cluster" / "site_requirements.py"))


def locked(name: str) -> str:
    found = re.search(rf"^{name}==(.*)$", LOCK, re.MULTILINE)
    assert found is not None, name
    return found[1]


def test_site_requirements__are_what_the_command_imports_with_the_pins_of_the_lock(derivation: dict[str, Any]) -> None:
    found = [line for line in (ROOT / "cluster" / "site-requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert found == derivation["requirements"](), (
        "run: python cluster/site_requirements.py > cluster/site-requirements.txt"
    )
    assert set(found) <= set(LOCK.splitlines())


def test_third_party_imports__sees_into_functions_and_through_rooms(
    derivation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports = derivation["third_party_imports"]
    assert {"diffusers", "pydicom", "pyrage", "onnxruntime"} <= imports("gretfound.site")
    (tmp_path / "gretfound" / "deep").mkdir(parents=True)
    (tmp_path / "gretfound" / "__init__.py").touch()
    (tmp_path / "gretfound" / "site.py").write_text("import os\nfrom gretfound.deep import inner\n")
    (tmp_path / "gretfound" / "deep" / "__init__.py").write_text("import first\n")
    (tmp_path / "gretfound" / "deep" / "inner.py").write_text("def work():\n    from second.part import third\n")
    monkeypatch.setitem(imports.__globals__, "ROOT", tmp_path)
    assert imports("gretfound.site") == {"first", "second"}


def test_dockerfile__ends_as_an_ordinary_user_with_one_command() -> None:
    instructions = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE, re.MULTILINE)
    last_root = max(place for place, (verb, _) in enumerate(instructions) if verb in ("RUN", "COPY", "ADD"))
    users = [(place, user) for place, (verb, user) in enumerate(instructions) if verb == "USER"]
    assert [user for _, user in users] == ["gretfound"] and users[0][0] > last_root
    assert ("ENTRYPOINT", '["gretfound-site"]') in instructions
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "1"), ("XDG_CONFIG_HOME", "/keys")):
        assert re.search(rf"\b{name}={value}\b", DOCKERFILE), name


def test_dockerfile__copies_what_is_there_and_nothing_that_could_hold_a_secret() -> None:
    sources = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert set(sources) == {
        "requirements.lock", "cluster/site-requirements.txt", "LICENSE", "gretfound", "conf/disclosure", "conf/gate"
    }  # fmt: skip
    assert all((ROOT / source).exists() for source in sources)
    assert not re.search(r"^ADD ", DOCKERFILE, re.MULTILINE)


def test_dockerfile__torch_is_that_of_the_lock_and_python_that_of_the_project() -> None:
    assert f"ARG TORCH={locked('torch')}\n" in DOCKERFILE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "3.11" in Requirement(f"python{project['requires-python']}").specifier
    assert "python3.11/site-packages" in DOCKERFILE, "Debian 12 has Python 3.11"


def test_container_page__names_the_locked_torch_and_its_cuda() -> None:
    (row,) = re.findall(r"^\| default \| (\S+) of PyPI \| (\S+) \| 580 or newer", PAGE, re.MULTILINE)
    assert row[0] == locked("torch")
    assert locked("cuda-toolkit").startswith(f"{row[1]}.")


def test_container_page__each_engine_closes_the_network_and_mounts_photographs_read_only() -> None:
    commands = [line for line in PAGE.splitlines() if re.match(r"\$ (docker|podman|apptainer) run ", line)]
    assert [line.split()[1] for line in commands] == ["docker", "podman", "apptainer"]
    for command in commands:
        words = shlex.split(command.removeprefix("$ "), comments=True)
        assert words[words.index("--network") + 1] == "none"
        mounts = dict(word.split(":", 1) for word in words if re.search(r":/(data|base|out|keys)(:ro)?$", word))
        assert sorted(mounts.values()) == ["/base:ro", "/data:ro", "/keys", "/out"]
        assert not {"--privileged", "--cap-add", "host"} & set(words)
        image = next(place for place, word in enumerate(words) if word.startswith("gretfound-site"))
        arguments = site._parser().parse_args(words[image + 1 :])
        assert (arguments.folder, arguments.out, arguments.form) == (Path("/data"), Path("/out"), "weights")


def test_container_page__its_other_commands_parse() -> None:
    (block,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines():
        site._parser().parse_args(shlex.split(line))
