"""A contribution without a network: the site's command in a network namespace that has its loopback device alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gretfound import phantom, sealing
from tests import parties, tiny_generator
from tests.conftest import ROOT

NUM_IMAGES = 84  # the gate holds out 20 of those that are trained on
# Exits 9 where the namespace has another device than loopback, so that a run with a network cannot pass.
ALONE = 'ip link set lo up && [ "$(grep -c : /proc/net/dev)" = 1 ] || exit 9; exec "$@"'


def why_not() -> str:
    """Returns why no network namespace can be made here; empty where it can."""
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"unshare --net is not allowed here: {tried.stderr.decode().strip()}"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["images", "weights"])
def test_contribute__completes_with_loopback_alone(form: str, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    site_path = phantom.write_site(
        phantom.SITES["aster"], tmp_path / "aster", num_images=NUM_IMAGES, seed=0, size_px=72
    )
    hub = parties.hub_at(tmp_path)
    hub.join(tmp_path / "keys", "aster")
    arguments = ["contribute", str(site_path), "--form", form, "--site-id", "aster", "--policy", "demonstration"]
    arguments += ["--out", str(tmp_path / "out"), "--keys", str(tmp_path / "keys"), "--key", str(tmp_path / "site.key")]
    if form == "weights":
        arguments += ["--base", str(tiny_generator.write_base(tmp_path / "base"))]
        arguments += ["--images-seen", "32", "--batch-size", "8"]
    answer = subprocess.run(
        ["unshare", "--net", "sh", "-c", ALONE, "sh", sys.executable, "-m", "gretfound.site", *arguments],
        cwd=ROOT,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, f"exit code {answer.returncode}\n{answer.stderr[-2000:]}"
    (package_path,) = (tmp_path / "out").glob("*.age")
    found = sealing.read_sealed(package_path, identities=hub.identities).manifest
    assert (found.form, found.num_images) == (form, NUM_IMAGES)
