"""Reasons: the hub has words for every code that a confined process may answer, and no others."""

import ast

from gretfound import reasons
from tests.conftest import ROOT

# What `gretfound.opening` reaches with a stranger's bytes, and the process around it.
ROOMS = (
    *("archive", "confinement", "contribution", "disclosure", "opening", "roster", "screening", "sealing"),
    *("generator/adapter", "generator/spending", "gate/canaries", "gate/statement"),
)
# Of `sealing.take_number`, and of `statement`, where it judges what a confined process read.
HUB_ALONE = {"PREVIOUS_MISSING", "REPLAYED", "GATE_POLICY", "GATE_VERDICT", "GATE_WEIGHTS", "FEW_PATIENTS"}
NOT_OF_PACKAGES = {"TRUNCATED"}  # a damaged photograph is left out and counted


def _codes(room: str, names: set[str]) -> set[str]:
    """The codes that a room passes to these errors' constructors, as text."""
    tree = ast.parse((ROOT / "gretfound" / f"{room}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    firsts = [node.args[0] for node in calls if isinstance(node.func, ast.Name) and node.func.id in names]
    return {each.value for each in firsts if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def test_words__are_there_for_every_code_of_the_rooms_that_open() -> None:
    raised = set().union(*(_codes(room, {"ContributionRejected", "_rejected"}) for room in ROOMS)) - HUB_ALONE
    images = {f"IMAGE_{code}" for code in _codes("fundus", {"UnreadablePhotograph"}) - NOT_OF_PACKAGES}
    assert len(raised) > 40 and len(images) > 4
    assert raised | images <= set(reasons.WORDS)
    own = {code for code in reasons.WORDS if code.startswith("LIMIT_")} | {"CRASHED"}
    assert {code for code in own if code not in (ROOT / "gretfound" / "confinement.py").read_text()} == set()
    # Codes that are chosen at run time: an envelope that cannot be read, a manifest that cannot.
    chosen = {"BAD_ENVELOPE", "SAME_KEY_TWICE", "BAD_MANIFEST", "UNKNOWN_VERSION"}
    assert set(reasons.WORDS) - raised - images - own <= chosen, "words for a code that nothing raises"


def test_words__are_printable_and_end_in_what_to_do() -> None:
    for words in reasons.WORDS.values():
        assert words.isprintable() and "; " in words
