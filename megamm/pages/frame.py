"""Beginning and end of a page."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from megamm.pages.style import BASE
from megamm.pages.text import escaped


def head(title: str, style: str, script: str = "") -> str:
    """The page up to the beginning of its body.

    The page's own policy forbids whatever would be fetched and every script but `script`, so that hostile
    text could do nothing even where it were not escaped.

    Args:
        style: CSS beside what all pages share.
        script: JavaScript that the page will hold in one <script> element, character for character.
    """
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{BASE}{style}</style>\n</head>\n<body>\n"
    )


def foot() -> str:
    """The end of the page."""
    return "</body>\n</html>\n"
