"""A page of one file: style, pictures and plots inside it, nothing fetched, no script. Every text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ldm.evaluation.page_style import STYLE
from ldm.evaluation.page_text import EMPTY, Html, escaped, tag

LARGEST = 288
"""Pixels on the longer side of a picture in a gallery; larger ones are reduced."""
SMALL = 128
"""Up to this side pictures are kept losslessly and shown with square pixels."""

# The browser is told too: nothing may be fetched and nothing may run, should a text ever slip through.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Shown:
    """A picture of a gallery with its words; `flag` is what is wrong with it, in red."""

    image: Image.Image
    caption: str = ""
    flag: str = ""


def data_uri(image: Image.Image, largest: int = LARGEST) -> str:
    """The picture as a data: address, reduced to `largest` on the longer side: PNG where it is small, else WebP."""
    image = image.convert("RGB")
    if max(image.size) > largest:
        share = largest / max(image.size)
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= SMALL
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="WEBP", quality=85, method=4)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: Image.Image, words: str, largest: int = LARGEST) -> Html:
    """An img element; `words` are read where the picture is not seen."""
    pixels = ' class="pixels"' if max(image.size) <= SMALL else ""
    return Html(f'<img{pixels} src="{data_uri(image, largest)}" alt="{escaped(words)}">')


def gallery(shown: Sequence[Shown], cell: int = 124, largest: int = LARGEST) -> Html:
    """Pictures in as many columns as fit, at least `cell` pixels wide; one that is clicked fills the window."""
    figures = []
    for one in shown:
        flag = tag("div", one.flag, class_="flag") if one.flag else EMPTY
        caption = tag("figcaption", one.caption, flag) if one.caption or one.flag else EMPTY
        words = f"{one.caption} {one.flag}".strip() or "picture"
        figures.append(
            Html(f'<figure class="shown" tabindex="0">{picture(one.image, words, largest)}{caption}</figure>')
        )
    return Html(f'<div class="gallery" style="--cell:{int(cell)}px">{"".join(figures)}</div>')


def columns(rows: Sequence[Sequence[Shown]], heads: Sequence[str], first: Sequence[str] = ()) -> Html:
    """A table of pictures under `heads`; `first` are the words that begin each row, under no head."""
    lead = [""] if first else []
    head = "".join(tag("th", word) for word in [*lead, *heads])
    lines = []
    for number, row in enumerate(rows):
        cells = [tag("td", first[number], class_="small")] if first else []
        cells += [tag("td", Html(gallery([one], 96))) for one in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return Html(f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>')


def paragraph(text: object) -> Html:
    """Words, at reading width."""
    return tag("p", text)


def note(text: object) -> Html:
    """Words that explain, smaller."""
    return tag("p", text, class_="note")


def missing(what: str, line: str) -> Html:
    """The one line that stands where something could not be made."""
    return tag("p", tag("b", f"{what} left out: "), line, class_="missing")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> Html:
    """A table; the columns `numbers` are set to the right."""
    head = "".join(
        tag("th", word, class_="number") if i in numbers else tag("th", word) for i, word in enumerate(heads)
    )
    lines = []
    for row in rows:
        cells = (tag("td", cell, class_="number") if i in numbers else tag("td", cell) for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return Html(f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>')


def plots(*drawn: Html) -> Html:
    """Plots beside each other as far as there is room."""
    return Html(f'<div class="plots">{"".join(drawn)}</div>')


def details(summary: str, *content: Html) -> Html:
    """What is folded up until it is asked for."""
    return Html(f"<details><summary>{escaped(summary)}</summary>{''.join(content)}</details>")


def page(
    title: str, subtitle: str, verdicts: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str, Html]]
) -> str:
    """The whole page: verdicts as (what, words), then sections as (anchor, title, content)."""
    lines = [tag("li", tag("b", f"{what}:"), words) for what, words in verdicts]
    listed = tag("ul", *lines, class_="verdicts") if lines else EMPTY
    links = "".join(tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{escaped(anchor)}">{tag("h2", name)}{content}</section>' for anchor, name, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"{tag('h1', title)}{tag('p', subtitle, class_='sub')}"
        f"{listed}<nav>{links}</nav>\n{body}\n"
        "<footer>Made by ldm. This file holds all that it shows. Click a picture to enlarge it.</footer>"
        "</body></html>\n"
    )
