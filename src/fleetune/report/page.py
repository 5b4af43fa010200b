"""Build the parts of a report page: one HTML file with its style and plots inside, that asks the network for nothing.

All text is escaped, for samples and names are untrusted.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fleetune.report.runlog import Number
from fleetune.report.svg import WIDTH, escape


def esc(value: object) -> str:
    """Return a value as escaped text."""
    return escape(str(value))


class TableCell(NamedTuple):
    """A table cell with its class: "r" stands right (numbers), "r good" and "r bad" colour it as well."""

    text: str
    kind: str = "r"


def verdict(better: bool | None) -> tuple[str, str]:
    """Return the class of a table cell, and the word, for a change that is better, worse or neither (None)."""
    if better is None:
        return "r", ""
    return ("r good", "better") if better else ("r bad", "worse")


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str | TableCell]], kind: str = ""
) -> str:
    """Return a table whose first column names the rows; a column's head goes right when one of its cells does.

    Where it is narrow, each row of a table of five columns or more becomes a card with the heads beside its cells.
    """
    kind = f"{kind} cards".strip() if len(head) >= 5 else kind
    right = [any(_stands_right(row[i]) for row in rows) for i in range(len(head))]
    top = "".join(f'<th scope="col"{_css(r)}>{esc(h)}</th>' for h, r in zip(head, right, strict=True))
    labels = head if len(head) >= 5 else [""] * len(head)
    body = "".join(
        f"<tr>{''.join(_cell(c, i == 0, labels[i]) for i, c in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{esc(caption)}"><table class="{kind}">'
        f"<caption>{esc(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _css(right: bool) -> str:
    return ' class="r"' if right else ""


def _stands_right(cell: str | TableCell) -> bool:
    return isinstance(cell, TableCell) and "r" in cell.kind.split()


def _cell(cell: str | TableCell, first: bool, label: str = "") -> str:
    text, css = (cell.text, f' class="{cell.kind}"') if isinstance(cell, TableCell) else (cell, "")
    css += f' data-label="{esc(label)}"' if label else ""
    return f'<th scope="row"{css}>{esc(text)}</th>' if first else f"<td{css}>{esc(text)}</td>"


def fact_list(rows: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    """Return a list of names and values without those that are empty; nothing when all are."""
    pairs = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in rows if v)
    return f'<dl class="{kind}">{pairs}</dl>' if pairs else ""


def figure(drawing: str, title: str, words: str, data: str = "") -> str:
    """Return a drawing with its caption, and `data`, its numbers as a table, folded away below it."""
    more = folded("the numbers", data)
    caption = f"<figcaption><strong>{esc(title)}</strong> <span>{esc(words)}</span></figcaption>"
    return f"<figure>{caption}{drawing}{more}</figure>"


def folded(summary: str, body: str, *, shut: bool = True) -> str:
    """Return a part of the page that opens at a click, `shut` at first; nothing when it is empty."""
    return (
        f"<details{'' if shut else ' open'}><summary>{esc(summary)}</summary>{body}</details>" if body else ""
    )


def section(ident: str, title: str, body: str) -> str:
    """Return a section of the page; nothing when it is empty."""
    return f'<section id="{ident}"><h2>{esc(title)}</h2>{body}</section>' if body else ""


def document(title: str, body: str) -> str:
    """Return the page around `body`: its policy forbids every request."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def framed(html: str, height: int = 480) -> str:
    """Return a document as a notebook shows it: in a frame, where its style stays and no script runs."""
    return f'<iframe sandbox="" title="fleetune" srcdoc="{esc(html)}" style="width:100%;height:{height}px;border:0"></iframe>'


def framed_table(
    title: str, facts: Iterable[tuple[str, str]], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """Return names with values, and a table of any rows, as a notebook shows them; the first column names the rows."""
    cells: list[list[str | TableCell]] = [[row[0], *map(TableCell, row[1:])] for row in rows]
    about = fact_list(facts)
    height = 190 + 27 * about.count("<dt>") + 31 * len(rows)
    return framed(document(title, about + (table(title, head, cells) if cells else "")), height)


class Drawing(str):
    """A plot as SVG text with its style; a notebook shows it."""

    def _repr_svg_(self) -> str:
        return str(self)


def drawing(svg: str) -> Drawing:
    """Return a plot of a page as one that stands by itself."""
    style = f"<style>svg{{background:var(--card)}}{_style().partition('*{')[0]}</style>"
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" '
    return Drawing(svg.replace("<svg ", size, 1).replace("<title", f"{style}<title", 1))


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def short_name(text: str) -> str:
    """Return a hub id or a name as it is; of a path only its last part, without this machine's folders."""
    parts = re.split(r"[/\\]", text.rstrip("/\\"))
    return parts[-1] or text if re.match(r"[/.~\\]|[A-Za-z]:[/\\]", text) else text


def true_minus(text: str) -> str:
    """Return `text` with a minus sign in place of a leading hyphen."""
    return "\u2212" + text[1:] if text.startswith("-") and len(text) > 1 else text


def span(values: Sequence[Number]) -> str:
    """Return the range of values: "3 to 12", or one number where all are equal."""
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
