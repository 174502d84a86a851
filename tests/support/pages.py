"""Reading a page as a browser does, as far as tests ask."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "input", "hr"}
_FETCHING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tables: of each table its rows, of each row its cells' text.
        terms: what `<dt>` says -> what its `<dd>` says.
        text: all text, blanks as one.
        tags: names of the elements.
        addresses: whatever an attribute could have fetched.
        ids: of elements.
        open: elements that were not closed, or closed out of order.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.terms: dict[str, str] = {}
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self._pieces: list[str] = []
        self._cell: list[str] | None = None
        self._term: list[str] = []
        self._value: list[str] | None = None
        self._which = ""
        self.feed(source)
        self.close()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._pieces).split())

    @property
    def addresses(self) -> list[str]:
        return [value for _, key, value in self.attributes if key in _FETCHING]

    def rows(self, label: str) -> list[list[str]]:
        """Cells of the rows that begin with `label`, in all tables, without the first."""
        rows = [row for table in self.tables for row in table]
        return [row[1:] for row in rows if row and row[0].startswith(label)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self._cell = []
        elif tag in ("dt", "dd"):
            self._which = tag
            self._value = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)
        if tag in ("th", "td") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None
        elif tag in ("dt", "dd") and self._value is not None:
            said = " ".join("".join(self._value).split())
            if tag == "dt":
                self._term = [said]
            else:
                self.terms.setdefault(self._term[0], said)
            self._value = None

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)
        if self._cell is not None:
            # Parts of a cell stand apart.
            self._cell.append(f" {data} ")
        if self._value is not None:
            self._value.append(data)


def check(source: str) -> Page:
    """The page, which is well-formed and fetches nothing."""
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert page.open == []
    assert page.wrong == []
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "img"} & set(
        page.tags
    )
    assert all(one.startswith(("data:image/jpeg;base64,", "#")) for one in page.addresses)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert len(set(page.ids)) == len(page.ids)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in source
    return page
