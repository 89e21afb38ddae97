"""Text on its way into a page: what is not our own markup is escaped, whoever wrote it."""

from __future__ import annotations

import html


class Html(str):
    """Markup that is safe to put into a page as it is. Everything else goes through `escaped`."""

    __slots__ = ()


EMPTY = Html("")


def escaped(text: object) -> Html:
    """Any text as HTML that shows it, in an element or in a quoted attribute; markup stays as it is.

    Control characters, which neither HTML nor XML may hold, are shown as the replacement character.
    """
    if isinstance(text, Html):
        return text
    allowed = "".join(c if c in "\t\n" or c.isprintable() or ord(c) >= 160 else "�" for c in str(text))
    return Html(html.escape(allowed, quote=True))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """`<name attribute="value">content</name>`; `class_` is the attribute class. All that is no markup is escaped."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(escaped(part) for part in content)}</{name}>")
