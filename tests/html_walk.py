"""What is on an HTML page, for tests."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Walk(HTMLParser):
    """Collects elements and the texts within them; asserts that tags are balanced."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[str], str]] = []  # classes of the open elements, text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(([str(attrs.get("class", "")) for _, attrs in self.open], data))

    def of_class(self, name: str) -> list[str]:
        """Texts that stand directly in an element with the class `name`."""
        return [text for classes, text in self.texts if classes and name in classes[-1].split()]
