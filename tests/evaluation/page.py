"""Reading a report's page."""

from html.parser import HTMLParser

BOXES = frozenset({"h1", "h2", "h3", "p", "b", "dt", "dd", "figcaption", "pre", "svg", "section"})
CELLS = frozenset({"value", "number"})  # classes of table cells that hold something


class _Boxes(HTMLParser):
    """The boxes that were opened and closed with nothing in them; a picture is something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[list[str]] = []  # tag, name, content
        self.empty: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "img" or (tag == "path" and known.get("d")):
            self._add("picture")
        elif tag in BOXES or (tag == "td" and known.get("class") in CELLS):
            self.open.append([tag, f"{tag} after '{self.last}'", ""])

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            _, name, content = self.open.pop()
            if not content.strip():
                self.empty.append(name)
            if tag not in ("h2", "h1"):  # a title alone is no content
                self._add(content)

    last = ""

    def handle_data(self, data: str) -> None:
        self.last = data.strip() or self.last
        self._add(data)

    def _add(self, content: str) -> None:
        if self.open:
            self.open[-1][2] += content


def empty_boxes(page: str) -> list[str]:
    """Titles, facts, values, captions, commands, charts and sections of a page that hold nothing."""
    boxes = _Boxes()
    boxes.feed(page)
    return boxes.empty
