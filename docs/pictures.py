"""The pictures of docs/design.md that are made of the code: floors, states, and two conversations.

    python docs/pictures.py            prints them
    python docs/pictures.py --write    puts them into docs/design.md, between its marks

`tests/test_docs.py` fails while what is in the page is not what this prints.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]
PACKAGE = ROOT / "nvflare_rdma"
PAGE = ROOT / "docs" / "design.md"
#: Everybody imports them.
EVERYBODYS = {"errors", "logs", "version"}
WIDTH = 28


def _load(path: str) -> ModuleType:
    """A module of the tests, which are no package that could be imported by name."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- floors ------------------------------------------------------------------------------------------------


def import_graph() -> dict[str, set[str]]:
    """Each folder and module of the package, and which others of the package it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found |= {full.split(".")[1] for full in imported if full.startswith("nvflare_rdma.")}
    del graph["__init__"]
    return {name: found - {name} - EVERYBODYS for name, found in graph.items() if name not in EVERYBODYS}


def floors_of(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How many steps lead down from each.

    Raises:
        ValueError: there is a circle.
    """
    floors: dict[str, int] = {}
    while len(floors) < len(graph):
        standing = {name: below for name, below in graph.items() if name not in floors and below <= floors.keys()}
        if not standing:
            raise ValueError(f"imports go in a circle: {sorted(graph.keys() - floors.keys())}")
        floors |= {name: max((floors[other] + 1 for other in below), default=0) for name, below in standing.items()}
    return floors


def draw_floors() -> str:
    """The import graph, drawn from above; each folder is held against the table of `tests/test_layers.py`."""
    graph, allowed = import_graph(), _load("tests/test_layers.py").ALLOWED
    for layer, below in allowed.items():
        if above := graph.get(layer, set()) - below:
            raise ValueError(f"{layer} imports {sorted(above)}, which ALLOWED of tests/test_layers.py forbids")
    floors = floors_of(graph)
    width = max(map(len, graph))
    lines = []
    for floor in range(max(floors.values()), -1, -1):
        for n, name in enumerate(sorted(name for name in floors if floors[name] == floor)):
            mark = f"floor {floor}" if not n else ""
            below = sorted(graph[name], key=lambda other: (-floors[other], other))
            lines.append(f"{mark:8}  {name:{width}}  {'--> ' + ', '.join(below) if below else ''}".rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


# -- states ------------------------------------------------------------------------------------------------


def _transitions(table: Mapping[Any, Enum], first: Enum) -> Iterator[str]:
    """One line for each pair of states, beginning where a connection or message begins."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, happening), following in table.items():
        said = f"peer: {happening.name}" if happening.remote else happening.name
        arrows.setdefault((state.name, following.name), []).append(said)
    order = [state.name for state in type(first)]
    width = max(map(len, order))
    for (state, following), inputs in sorted(arrows.items(), key=lambda a: tuple(map(order.index, a[0]))):
        mark = "*" if state == first.name else " "
        if state == following:
            following = "(stays)"
        yield f"{mark} {state:{width}}  --[ {' | '.join(inputs)} ]-->  {following}"


def draw_states() -> str:
    """Every table of `nvflare_rdma/channel/protocol/state.py`."""
    from nvflare_rdma.channel.protocol import state

    def rails(role: state.Role) -> dict[Any, Enum]:
        return {(s, happening): after for (r, s, happening), after in state.RAILS.items() if r is role}

    tables = {
        "a connection": (state.PHASE, state.Phase.GREETING),
        "its rails, active side (which dials)": (rails(state.Role.ACTIVE), state.RailState.CHOOSING),
        "its rails, passive side (which chooses the fabric)": (rails(state.Role.PASSIVE), state.RailState.CHOOSING),
        "a message, at its sender": (state.SEND, state.Send.OFFERED),
        "a message, at its receiver": (state.RECEIVE, state.Receive.OFFERED),
    }
    blocks = ["\n".join([title, *(f"  {line}" for line in _transitions(*t))]) for title, t in tables.items()]
    return "\n\n".join(blocks)


# -- conversations -----------------------------------------------------------------------------------------


class _Chart:
    """Runs two protocol cores as the tests do, and notes what one tells the other."""

    def __init__(self) -> None:
        self.pair = importlib.import_module("tests.support.core_pair")
        self.active, self.passive = self.pair.make_pair()
        self.lines = [f"{'active side, sender':{WIDTH}}{'':{WIDTH}}passive side, receiver"]

    def note(self, text: str, to_the_right: bool) -> None:
        arrow = f"{text} ".ljust(WIDTH + 12, "-") + ">" if to_the_right else "<" + f" {text}".rjust(WIDTH + 12, "-")
        self.lines.append(f"{'':{WIDTH // 2}}{arrow}")

    def read(self, side: Any) -> None:
        from nvflare_rdma.channel.protocol import wire

        for message in wire.Parser(1 << 20, 1 << 20).feed(b"".join(side.wire)):
            self.note(_words(message), side is self.passive)
        side.read_wire(1 << 20)

    def run(self) -> None:
        """Until nothing moves. What is said comes before what is written."""
        while True:
            for side in (self.passive, self.active):
                if side.wire:
                    self.read(side)
                    break
            else:
                for side in (self.passive, self.active):
                    if side.writes:
                        write, data = side.writes[0]
                        chunk = f"rail {write.rail}: write {len(data)} bytes, notify {write.notification}"
                        self.note(chunk, side is self.active)
                    if self.pair.take_step(side):
                        break
                else:
                    return

    def text(self) -> str:
        return "\n".join(self.lines)


def _words(message: Any) -> str:
    name = type(message).__name__.upper()
    match name:
        case "OFFER":
            return f"OFFER {message.length} bytes"
        case "GRANT":
            return f"GRANT at {message.offset}: rail {message.rail}, notify {message.notification}"
        case "OPEN":
            return f"OPEN {message.fabric}"
        case "RAILS":
            return f"RAILS {message.count}"
        case "RAILDOWN":
            return f"RAIL DOWN {message.rail}"
    return name


def draw_transfer() -> str:
    """A connection opens over two rails, and a message of 4000 bytes goes over it: chunks of 1000, a window of 3."""
    chart = _Chart()
    chart.active.settle()
    chart.run()
    chart.lines.append("")
    chart.active.send(bytes(4000))
    chart.run()
    return chart.text()


def draw_broken_rail() -> str:
    """One of two rails breaks while chunks are granted over both."""
    chart = _Chart()
    chart.active.settle()
    chart.run()
    del chart.lines[1:]
    chart.active.send(bytes(3000))
    chart.read(chart.passive)
    chart.passive.take_memory()
    chart.read(chart.active)
    rail = chart.active.writes[0][0].rail
    chart.active.cut(rail)
    chart.lines.append(f"{'':{WIDTH}}-- rail {rail} breaks --")
    for side in (chart.active, chart.passive):
        side.break_rail(rail)
    chart.run()
    return chart.text()


PICTURES = {
    "floors": draw_floors,
    "states": draw_states,
    "transfer": draw_transfer,
    "broken-rail": draw_broken_rail,
}


def with_pictures(page: str) -> str:
    """``page`` with every picture as it is now.

    Raises:
        ValueError: a picture has no place in it.
    """
    for name, draw in PICTURES.items():
        place = re.compile(rf"(<!-- picture {name} -->\n```text\n).*?(\n```\n)", re.DOTALL)
        if len(place.findall(page)) != 1:
            raise ValueError(f"{PAGE} has to have one place for the picture {name!r}")
        text = draw()
        page = place.sub(lambda found, text=text: found[1] + text + found[2], page)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/design.md")
    if parser.parse_args().write:
        PAGE.write_text(with_pictures(PAGE.read_text()))
    else:
        print("\n\n".join(itertools.chain.from_iterable((name, draw()) for name, draw in PICTURES.items())))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
