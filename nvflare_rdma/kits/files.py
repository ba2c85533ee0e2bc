"""The JSON files of a start-up kit that this package's settings are in, as FLARE finds them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.kits.errors import KitError
from nvflare_rdma.kits.find import RELAY, Kit
from nvflare_rdma.kits.layout import changed

COMM_CONFIG = "comm_config.json"
DEFAULT = ".default"
#: What FLARE reads first.
RESOURCES = ("resources.json", "resources.json.default")
#: Other formats of FLARE's that stand for comm_config.json where that is missing.
_OTHERS = tuple(
    f"comm_config.{form}" for form in ("conf", "yml", "yaml", "conf.default", "yml.default", "yaml.default")
)
_INDENT = 4  # FLARE's own


@dataclass(frozen=True)
class JsonFile:
    """A JSON object in a file.

    Attributes:
        path: the file.
        data: what is in it; None if it does not exist.
        content: the object; that of the file that it stands for, if it does not exist.
        like: the file whose mode and owner it is to have if it does not exist.
    """

    path: Path
    data: bytes | None
    content: dict[str, Any]
    like: Path | None = None

    def with_content(self, content: dict[str, Any]) -> bytes:
        """The file with another object, in the same layout."""
        text = (self.data or b"").decode()
        match = re.match(r"\s*\{\s*\n([ \t]+)\S", text)
        indent: str | int = match[1] if match else _INDENT
        if text and (new := changed(text, content, str(indent) if match else " " * _INDENT)) is not None:
            return new.encode()
        end = "" if self.data is not None and not text.endswith("\n") else "\n"
        return (json.dumps(content, indent=indent, ensure_ascii=text.isascii()) + end).encode()


def comm_config(kit: Kit) -> JsonFile:
    """The kit's `comm_config.json`, which need not exist.

    Raises:
        KitError: it can't be read, or FLARE reads another file in its place.
    """
    file = kit.local / COMM_CONFIG
    for folder in (kit.folder, kit.folder / "startup"):
        if (folder / COMM_CONFIG).exists():
            raise KitError(
                "OTHER_FILE",
                f"FLARE reads {folder / COMM_CONFIG} before {file}",
                f"move it to {kit.local}, and try again",
            )
    like = next((kit.local / name for name in RESOURCES if (kit.local / name).exists()), None)
    if file.exists():
        return read(file)
    if (other := next((kit.local / name for name in _OTHERS if (kit.local / name).exists()), None)) is not None:
        hint = f"write its settings to {file} as JSON, and try again"
        raise KitError("OTHER_FILE", f"{other} is in a format that can't be edited here", hint)
    default = kit.local / f"{COMM_CONFIG}{DEFAULT}"
    if default.exists():
        return JsonFile(file, None, read(default).content, default)
    return JsonFile(file, None, {}, like)


def resources(kit: Kit) -> JsonFile | None:
    """What FLARE reads of a kit's `resources.json` and `resources.json.default`; None for a relay, which has none.

    Raises:
        KitError: it can't be read, or there is none.
    """
    for name in RESOURCES:
        if (kit.local / name).exists():
            return read(kit.local / name)
    if kit.role == RELAY:
        return None
    raise KitError(
        "HALF_A_KIT", f"{kit.local} has neither {' nor '.join(RESOURCES)}", "take the whole kit, as FLARE has made it"
    )


def read(file: Path) -> JsonFile:
    """The object in a file.

    Raises:
        KitError: it can't be read, or has no JSON object.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise KitError("NO_ACCESS", f"{file} can't be read: {error.strerror}", "run this as whoever owns it") from error
    try:
        content: Any = json.loads(data.decode())
    except ValueError as error:
        raise KitError("BAD_JSON", f"{file} is no JSON: {error}", "mend it, and try again") from None
    if not isinstance(content, dict):
        raise KitError(
            "BAD_JSON", f"{file} has no JSON object, but a {type(content).__name__}", "mend it, and try again"
        )
    return JsonFile(file, data, content)
