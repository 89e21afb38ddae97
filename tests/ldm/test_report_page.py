"""Pages: whatever a text holds is shown and not obeyed, nothing is fetched, pictures survive."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.measurement import Estimate, Measurement, Setting
from ldm.evaluation.page import LARGEST, Shown, columns, data_uri, gallery, missing, note, page, paragraph, table
from ldm.evaluation.page_charts import Bar, bar_chart, heat_map
from ldm.evaluation.page_text import Html, escaped, tag
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.report import Report, Section, attempt, figures_table, to_json

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(1)>" onload="x" \'</style></svg>&lt;\x00\x1b'


class Parsed(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def picture(side: int = 8) -> Image.Image:
    return Image.fromarray(np.arange(side * side * 3, dtype=np.uint32).astype(np.uint8).reshape(side, side, 3))


def everything(words: str) -> str:
    """A page with `words` at every place that takes text."""
    series = Series(label=words, x=[1, 2], y=[1, 2], dots=True, names=[words, words])
    setting = Setting(n=3, resolution=8, extractor=words, resize_filter=words, reference=words, reference_n=2)
    figure = Measurement("fid", words, "lower", Estimate(1.0, 0.5, 2.0, (words,)), setting, words)
    content = [
        paragraph(words),
        note(words),
        missing(words, words),
        table([words], [[words]]),
        gallery([Shown(picture(), words, words)]),
        columns([[Shown(picture(), words)]], [words], [words]),
        line_plot([series, series], title=words, x_label=words, y_label=words),
        bar_chart([Bar(words, 1.0, 0.5, 2.0)], title=words, x_label=words),
        heat_map({words: {words: 1, "x": 2}}, title=words, row_label=words, column_label=words, last=words),
        figures_table([figure]),
    ]
    return page(words, words, [(words, words)], [("anchor", words, Html("".join(content)))])


def check(source: str) -> Parsed:
    """The elements are ours alone, nothing runs and nothing is fetched."""
    parsed = Parsed(source)
    names = {name for name, _ in parsed.elements}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "video", "foreignobject"}
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on")], (name, attributes)
        if name == "img":
            assert str(attributes["src"]).startswith("data:image/")
        for key in ("href", "xlink:href", "action", "srcset"):
            assert str(attributes.get(key, "#")).startswith("#")
    without_pictures = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", source)
    assert "url(" not in without_pictures and "@import" not in without_pictures
    assert not re.search(r"(?:src|href|action)\s*=\s*[\"']?\s*(?:https?:)?//", without_pictures)
    return parsed


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    parsed = check(everything(HOSTILE))
    shown = HOSTILE.replace("\x00", "�").replace("\x1b", "�")
    assert parsed.text.count(shown) >= 12
    assert sum(name == "img" for name, _ in parsed.elements) == 2  # ours alone
    assert {str(attributes["alt"]) for name, attributes in parsed.elements if name == "img"} == {
        f"{shown} {shown}",
        shown,
    }


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="<>&\"'/= ;#abconeimgsrt\n\x00\u2028é", max_size=40))
def test_no_text_makes_an_element_or_an_attribute(words: str) -> None:
    reference = [(name, sorted(attributes)) for name, attributes in Parsed(str(tag("p", "w", title="w"))).elements]
    parsed = Parsed(str(tag("p", words, title=words)))
    assert [(name, sorted(attributes)) for name, attributes in parsed.elements] == reference
    assert parsed.text == words.replace("\x00", "�")


def test_markup_of_ours_is_not_escaped_twice() -> None:
    assert escaped(tag("b", "a & b")) == "<b>a &amp; b</b>"
    assert tag("p", tag("b", "x"), " < y") == "<p><b>x</b> &lt; y</p>"


def test_a_page_forbids_the_browser_to_fetch_or_run_anything() -> None:
    source = everything("words")
    policy = [a["content"] for name, a in Parsed(source).elements if name == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme:dark" in source and "@media print" in source


def test_a_small_picture_keeps_every_pixel_and_a_large_one_is_reduced() -> None:
    small = Image.open(io.BytesIO(base64.b64decode(data_uri(picture(32)).split(",")[1])))
    assert small.format == "PNG" and small.tobytes() == picture(32).tobytes()
    large = Image.open(io.BytesIO(base64.b64decode(data_uri(Image.new("RGB", (1000, 500), "red")).split(",")[1])))
    assert large.format == "WEBP" and large.size == (LARGEST, LARGEST // 2)


# --- Reports ---------------------------------------------------------------------------------------------------------


def report(*sections: Section) -> Report:
    return Report(title="t", subtitle="s", settings={"model": "m", "guidance": {"text": 4.0}}, sections=sections)


def test_metrics_hold_every_figure_with_its_setting() -> None:
    setting = Setting(n=3, resolution=8, extractor="e", resize_filter="r", reference="x", reference_n=2)
    figure = Measurement("fid", "FID", "lower", Estimate(1.5, 0.5, float("nan"), ("warning: few",)), setting)
    made = report(
        Section(
            name="images",
            title="I",
            content=figures_table([figure]),
            figures=(figure,),
            verdict="v",
            values={"more": 1},
        ),
        Section(name="clip", title="C", missing="no weights"),
    )
    values = made.to_json()
    assert values["format"] == 1 and values["model"] == "m"
    assert values["figures"] == [{"section": "images", **figure.to_json()}]
    assert values["missing"] == {"clip": "no weights"} and values["verdicts"] == {"images": "v"}
    assert values["images"] == {"more": 1}
    assert '"interval": [\n        0.5,\n        null' in to_json(values)  # JSON has no NaN
    text = Parsed(made.to_html()).text
    assert "C left out: no weights" in text and "warning: few" in text and "x (2 images)" in text


def test_what_cannot_be_made_is_a_line() -> None:
    def fails() -> Section:
        raise UserError("found nothing;\nput it there")

    assert attempt("a", "A", fails) == Section(name="a", title="A", missing="found nothing; put it there")
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        attempt("a", "A", lambda: Section(name=str(1 // 0), title=""))
