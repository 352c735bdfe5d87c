"""Finds the relative links of a Markdown page, and the anchors of its headings as GitHub and the site name them."""

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Code keeps its place, so that a match outside of it has the position of the original text.
FENCE = r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[^\n]*$"
CODE = re.compile(rf"{FENCE}|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
LINK = re.compile(r"(?P<label>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?P<target>[^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(?P<text>.+?) *#*$", re.M)


@dataclass(frozen=True)
class Link:
    """A relative link of a page.

    Attributes:
        label: the text in brackets, with the brackets and an image's `!`.
        target: what the page says.
        path: the file that it names, relative to the root of the repository.
        anchor: the part behind `#`, or an empty string.
    """

    label: str
    target: str
    path: str
    anchor: str


def relative_links(text: str, page: str) -> Iterator[Link]:
    """Yields the relative links of a page; `page` is its path in the repository."""
    for match in LINK.finditer(without_code(text)):
        if link := _link(match, page):
            yield link


def rewrite(text: str, page: str, replace: Callable[[Link], str]) -> str:
    """Returns the text of a page with each relative link replaced by what `replace` returns for it."""
    parts, position = [], 0
    for match in LINK.finditer(without_code(text)):
        if link := _link(match, page):
            label = text[match.start("label") : match.end("label")]
            parts += [text[position : match.start()], replace(Link(label, link.target, link.path, link.anchor))]
            position = match.end()
    return "".join([*parts, text[position:]])


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, numbered where a heading occurs twice."""
    found: set[str] = set()
    for match in HEADING.finditer(re.sub(FENCE, "", text, flags=re.M | re.S)):
        slug = base = slugify(match["text"])
        count = 0
        while slug in found:
            count += 1
            slug = f"{base}-{count}"
        found.add(slug)
    return found


def slugify(heading: str, separator: str = "-") -> str:
    """Returns the anchor of a heading by GitHub's rule; mkdocs uses it as well (`toc` in mkdocs.yml)."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", separator)


def without_code(text: str) -> str:
    """Returns the text with code blanked out, and everything else where it was."""
    return CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _link(match: re.Match[str], page: str) -> Link | None:
    target = match["target"]
    if re.match(r"[a-z]+:|//", target):
        return None
    name, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), name)) if name else page
    return Link(match["label"], target, path, anchor)
