"""Elements of a page. What is no element already is text, and escaped: nobody can add markup with a peer's name."""

from __future__ import annotations

import html
from collections.abc import Iterable

from nvflare_rdma.logs import escaped

#: Elements without content, that have no end tag.
_VOID = {"meta", "link", "br", "col"}


class Html(str):
    """Markup, which goes onto the page as it is."""

    __slots__ = ()


def element(tag: str, /, *content: object, **attributes: object) -> Html:
    """An element with what is in it. Attributes that are None are left out; `class_` is `class`, and `_` is `-`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(escaped(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{join(content)}</{tag}>")


def join(content: Iterable[object], between: str = "") -> Html:
    """Several elements and texts, one after the other."""
    return Html(between.join(c if isinstance(c, Html) else html.escape(escaped(c), quote=False) for c in content))
