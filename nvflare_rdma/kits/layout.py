"""A JSON text with another content in which everything that stays has its layout: spaces, line ends and inline lists.

FLARE's own files are laid out by hand, so that a file written anew would differ from them in most lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def changed(text: str, content: Mapping[str, Any], indent: str) -> str | None:
    """The text of an object with another content. Keys may be new, gone, or have another value, and lists that stay may
    have more at their end; None if it can't be done that way.

    Args:
        text: JSON, with an object at its top level.
        content: what it is to have.
        indent: one step of what is new.
    """
    for name in [name for name in _members(text) if name not in content]:
        text = _without(text, name)
    for name, value in content.items():
        members = _members(text)
        if name not in members:
            text = _with(text, members, name, _dump(value, indent, indent))
            continue
        start, end = members[name]
        known = json.loads(text[start:end])
        if known == value:
            continue
        if isinstance(value, list) and isinstance(known, list) and known and value[: len(known)] == known:
            text = text[:start] + _extended(text[start:end], value[len(known) :], indent) + text[end:]
        else:
            text = text[:start] + _dump(value, indent, indent) + text[end:]
    return text if json.loads(text) == content else None


def _dump(value: Any, indent: str, already: str) -> str:
    return json.dumps(value, indent=indent).replace("\n", "\n" + already)


def _members(text: str) -> dict[str, tuple[int, int]]:
    """Where the values of an object are, by their keys."""
    found: dict[str, tuple[int, int]] = {}
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        start = _skip(text, text.index(":", at) + 1)
        _, end = _DECODER.raw_decode(text, start)
        found[name] = start, end
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _with(text: str, members: Mapping[str, tuple[int, int]], name: str, value: str) -> str:
    """An object with one key more, after the last one."""
    entry = f"{json.dumps(name)}: {value}"
    if not members:
        return text[: text.index("{") + 1] + f"\n{_first_step(value)}{entry}\n" + text[text.rindex("}") :]
    begin, last = text.index("{") + 1, max(end for _, end in members.values())
    gap = text[begin : _skip(text, begin)] or " "
    return f"{text[:last]},{gap}{entry}{text[last:]}"


def _first_step(value: str) -> str:
    match = re.search(r"\n([ \t]+)", value)
    return match[1] if match else "    "


def _without(text: str, name: str) -> str:
    """An object without a key, and without the comma that it takes."""
    members = _members(text)
    names = list(members)
    at, (_, end) = names.index(name), members[name]
    if at:
        start = members[names[at - 1]][1]
        return text[:start] + text[end:]
    if len(names) > 1:
        begin = text.index("{") + 1
        return text[:begin] + text[text.index(",", end) + 1 :]
    return text[: text.index("{") + 1] + text[text.rindex("}") :]


def _extended(text: str, more: list[Any], indent: str) -> str:
    """A list with more at its end, one below the other if its items are."""
    at = end = _skip(text, 1)
    gap = text[1:at]
    while text[at] != "]":
        _, end = _DECODER.raw_decode(text, at)
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at
    step = gap.rpartition("\n")[2] if "\n" in gap else ""
    gap = gap if "\n" in gap else " "
    items = "".join(f",{gap}{_dump(item, indent, step) if step else json.dumps(item)}" for item in more)
    return text[:end] + items + text[end:]
