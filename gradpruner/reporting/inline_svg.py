"""Puts matplotlib's SVG files into a page: the page's colours, distinct ids, a title for screen readers."""

import re
from pathlib import Path

from markupsafe import Markup, escape

# Colours of a figure -> variables of the page, which are lighter in the dark. Black without a mark is the text colour,
# because matplotlib leaves out `fill: #000000`. Colours that must stay, such as letters on marks, differ by a digit.
VARIABLES = {
    "#000000": "currentColor",
    "#ffffff": "var(--back)",
    "#0072b2": "var(--kept)",
    "#e69f00": "var(--merged)",
    "#009e73": "var(--narrowed)",
    "#cc79a7": "var(--dense)",
    "#56b4e9": "var(--sky)",
    "#d55e00": "var(--red)",
    "#cccccc": "var(--pruned)",
    "#888888": "var(--grey)",
    "#666666": "var(--muted)",
    "#b0b0b0": "var(--grid)",  # matplotlib's grid
}
COLOR = re.compile("|".join(VARIABLES), re.IGNORECASE)
ROOT = re.compile(r"<svg\b[^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)
ID = re.compile(r"(\bid=\"|url\(#|href=\"#)")
UNUSED_ID = re.compile(r"<g id=\"[^\"]+\">")
TITLES = re.compile(r"<metadata>.*?</metadata>|<title>.*?</title>", re.DOTALL)


def inline_svg(path: Path, name: str, alt: str) -> Markup:
    """Returns the file as an element of a page.

    Args:
        path: file that `figures.save_figure` wrote.
        name: prefix of its ids, distinct in the page.
        alt: what it shows, with its numbers.

    Raises:
        ValueError: if the file is no SVG.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".svg" or (root := ROOT.search(text)) is None:
        raise ValueError(f"A page shows figures as SVG files, got {path}. Draw it with the suffix .svg.")
    body = TITLES.sub("", text[root.end() : text.rindex("</svg>")])
    body = ID.sub(rf"\g<1>{name}-", UNUSED_ID.sub("<g>", body))
    body = COLOR.sub(lambda found: VARIABLES[found[0].lower()], body)
    body = re.sub(r"\n\s*", "\n", body)
    attributes = f'viewBox="{root[1]}" role="img" aria-labelledby="{name}-title" fill="currentColor"'
    title = escape(alt)
    return Markup(f'<svg {attributes}><title id="{name}-title">{title}</title>{body}</svg>')
