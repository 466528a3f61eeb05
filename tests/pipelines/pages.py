"""Reading the report's page in tests."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr", "col"}
SELF_CLOSED_SVG = {"line", "rect", "circle", "path"}


class Page(HTMLParser):
    """Reads a page strictly: every opened tag is closed in order; collects ids, links, texts and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.styles: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th", "small"):
            self.pieces.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSED_SVG | VOID, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.styles if self.open and self.open[-1] == "style" else self.pieces).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags for key, value in attrs.items() if key == name and value is not None]


def check_alone(page: Page) -> None:
    """The page loads nothing and runs nothing."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for attribute in ("src", "srcset", "xlink:href", "action", "poster", "data"):
        assert page.attributes(attribute) == []
    assert all(link.startswith("#") for link in page.attributes("href"))
    styles = "".join(page.styles) + "".join(page.attributes("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


def check_links(page: Page) -> None:
    """Ids are unique, and links lead to them."""
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.attributes("href")} <= set(ids)
