"""The report as one HTML page, which needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources

from hwnas.report.contents import Contents


def page(contents: Contents) -> str:
    """The page. What comes from outside is in it as JSON only, and the script puts it on the page as text.

    The content security policy allows the page's own style and script, by their hashes, and nothing else.
    """
    template = resources.files("hwnas.report").joinpath("template")
    layout, style, script = (
        template.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    values = {
        "title": html.escape(contents.title),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "style": style,
        "script": script,
        "contents": _embedded(contents),
    }
    first, *parts = layout.split("{{")
    filled = [first]
    for part in parts:  # each value once, so that none is looked at for further places
        name, _, text = part.partition("}}")
        filled += [values[name], text]
    return "".join(filled)


def _embedded(contents: Contents) -> str:
    """JSON inside a script element: without `<` nothing in it can end the element or start another."""
    return json.dumps(contents.to_dict(), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
