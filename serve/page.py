"""The page at `/` for people: one self-contained file, and the policy that lets the browser run it and nothing else."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html").read_text(encoding="ascii")


def _source(element: str) -> str:
    """Returns the Content-Security-Policy source of the page's one inline script or style: its digest."""
    content = re.findall(rf"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
    if len(content) != 1:
        raise AssertionError(f"page.html has {len(content)} inline {element} elements, not 1")
    return f"'sha256-{base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()}'"


SECURITY_POLICY = (
    f"default-src 'none'; script-src {_source('script')}; style-src {_source('style')}; connect-src 'self'; "
    "img-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
