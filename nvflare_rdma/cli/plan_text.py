"""`nvflare-rdma plan MODEL --site NAME=RATE,RTT[,LOSS] ...`: what it takes, as tables and as data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nvflare_rdma.cli.link_model import Line, Seconds
from nvflare_rdma.cli.models import read_model
from nvflare_rdma.cli.output import Result
from nvflare_rdma.cli.plan import USUAL, CodecPlan, Memory, Site, Way, choices_of, most_exact_within, plan
from nvflare_rdma.cli.policy import read_policies
from nvflare_rdma.cli.units import as_rate, parse_site, parse_time
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.settings import Settings

_GB, _MB = 1e9, 1e6
_LEAST_WIDTH = 60
_SITE_WIDTH, _BESIDE = 17, 3


@dataclass(frozen=True)
class Asked:
    """What is to be said of the plans: rounds of a run, the most seconds of a round, and what 10^9 bytes cost."""

    rounds: int = 1
    deadline: float | None = None
    cost_per_gb: float | None = None


def plan_result(
    model: str,
    sites: Sequence[str],
    codecs: Sequence[str] = (),
    config: str | None = None,
    deadline: str | None = None,
    rounds: int = 1,
    cost_per_gb: float | None = None,
) -> Result:
    """Tables and data of what rounds take; the exit code is 1 if no codec meets the deadline.

    Raises:
        ConfigError: something can't be read, or isn't known; the message says what, and how it is written.
    """
    wanted = Asked(rounds, None if deadline is None else parse_time(deadline, "deadline"), cost_per_gb)
    if wanted.rounds < 1:
        raise ConfigError(f"rounds {wanted.rounds} are none: give 1 or more")
    if wanted.cost_per_gb is not None and not 0 <= wanted.cost_per_gb < float("inf"):
        raise ConfigError(f"cost per GB {wanted.cost_per_gb} is no price: give 0 or more, as 0.09")
    all_sites = read_sites(sites)
    choices = choices_of(codecs or USUAL, None if config is None else read_policies(Path(config)))
    tensors = read_model(Path(model))
    if not tensors:
        raise ConfigError(f"{model} has no tensors: there is nothing to plan")
    plans = plan(tensors, all_sites, choices, Settings().rdma_memory_budget_bytes)
    chosen = None if wanted.deadline is None else most_exact_within(plans, wanted.deadline)
    missed = wanted.deadline is not None and chosen is None
    data = {
        "model": {"file": model, "tensors": len(tensors), "bytes": plans[0].server_memory.model},
        "sites": {site.name: _line_data(site.line) for site in all_sites},
        "rounds": wanted.rounds,
        "deadline_seconds": wanted.deadline,
        "cost_per_gb": wanted.cost_per_gb,
        "most_exact_in_time": chosen.name if chosen else None,
        "codecs": [_data(one, wanted) for one in plans],
    }
    return Result(data, _text(all_sites, plans, wanted, chosen), int(missed))


def read_sites(texts: Sequence[str]) -> list[Site]:
    """The sites of a command line. Raises ConfigError: one can't be read, or has the name of another."""
    sites: dict[str, Site] = {}
    for text in texts:
        name, rate, round_trip, loss = parse_site(text)
        if name in sites:
            raise ConfigError(f"site {text!r}: there is another site {name!r}; give each a name of its own")
        sites[name] = Site(name, Line(rate, round_trip, loss))
    return list(sites.values())


# -- data --------------------------------------------------------------------------------------------------


def _line_data(line: Line) -> dict[str, float]:
    return {"rate_bits_per_second": line.rate, "round_trip_seconds": line.round_trip, "lost_share": line.loss}


def _data(one: CodecPlan, asked: Asked) -> dict[str, Any]:
    cost = None if asked.cost_per_gb is None else one.wire_bytes / _GB * asked.cost_per_gb
    return {
        "codec": one.name,
        "each_site_down": _way_data(one.down),
        "each_site_up": _way_data(one.up),
        "round_seconds": one.seconds,
        "slowest_site": one.slowest,
        "all_rounds_seconds": one.seconds_of_rounds(asked.rounds),
        "round_wire_bytes": one.wire_bytes,
        "all_rounds_cost": None if cost is None else cost * asked.rounds,
        "meets_deadline": None if asked.deadline is None else one.seconds <= asked.deadline,
        "sites": {
            name: {
                "round_seconds": time.seconds,
                "opening_seconds": time.opening,
                "down": _seconds_data(time.down),
                "up": _seconds_data(time.up),
            }
            for name, time in one.sites.items()
        },
        "server_memory": _server_data(one.server_memory),
        "site_memory": _site_data(one.site_memory),
    }


def _way_data(way: Way) -> dict[str, Any]:
    """Of one site; all of them move the same."""
    return {
        "raw_bytes": way.message.raw_bytes,
        "sent_bytes": way.message.sent_bytes,
        "sent_bytes_are_the_most": way.is_most,
        "wire_bytes": way.message.wire_bytes,
        "loses_of_squares": way.loses,
        "needs_error_feedback": way.needs_feedback,
    }


def _seconds_data(seconds: Seconds) -> dict[str, float]:
    return {"seconds": seconds.total, **{f"{key}_seconds": value for key, value in asdict(seconds).items()}}


def _server_data(memory: Memory) -> dict[str, int]:
    return {
        "global_model_bytes": memory.model,
        "sum_bytes": memory.result,
        "results_that_wait_bytes": memory.waiting,
        "budget_bytes": memory.budget,
        "total_bytes": memory.total,
    }


def _site_data(memory: Memory) -> dict[str, int]:
    return {
        "received_model_bytes": memory.model,
        "result_bytes": memory.result,
        "budget_bytes": memory.budget,
        "total_bytes": memory.total,
    }


# -- for people --------------------------------------------------------------------------------------------


def _text(sites: Sequence[Site], plans: Sequence[CodecPlan], asked: Asked, chosen: CodecPlan | None) -> str:
    width = max(shutil.get_terminal_size((80, 24)).columns, _LEAST_WIDTH)
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as text:
        console.print(_traffic(plans, asked))
        for some in _columns(plans, width):
            console.print(_times(sites, some))
        console.print(_memory(plans))
        for line in _notes(plans, asked, chosen):
            console.print(line)
    # Cells are filled up with blanks, also at the end of a line.
    return "\n".join(line.rstrip() for line in text.get().strip("\n").splitlines())


def _table(title: str, first: str, *headers: str, folds_first: bool = False) -> Table:
    """Names of codecs stay whole, in the first column or as headers; what else is too wide is folded."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold", no_wrap=not folds_first)
    for header in headers:
        table.add_column(header, justify="right", overflow="fold", no_wrap=folds_first)
    return table


def _traffic(plans: Sequence[CodecPlan], asked: Asked) -> Table:
    alike = all(one.down == one.up for one in plans)
    headers = ["loses", *(["MB each way"] if alike else ["MB down", "MB up"]), "s a round"]
    if asked.deadline is not None:
        headers.append("in time")
    if asked.rounds > 1:
        headers.append("s in all")
    if asked.cost_per_gb is not None:
        headers.append("cost")
    rounds = f"; cost and s in all: {asked.rounds} rounds" if asked.rounds > 1 else ""
    table = _table(f"Each site's traffic in a round{rounds}", "codec", *headers)
    for one in plans:
        sizes = [_sent(way) for way in ((one.down,) if alike else (one.down, one.up))]
        cells = [_loses(max(one.down.loses, one.up.loses)), *sizes, _number(one.seconds)]
        if asked.deadline is not None:
            cells.append("yes" if one.seconds <= asked.deadline else "no")
        if asked.rounds > 1:
            cells.append(_number(one.seconds_of_rounds(asked.rounds)))
        if asked.cost_per_gb is not None:
            cells.append(f"{asked.rounds * one.wire_bytes / _GB * asked.cost_per_gb:,.2f}")
        table.add_row(one.name, *cells)
    return table


def _columns(plans: Sequence[CodecPlan], width: int) -> Iterator[Sequence[CodecPlan]]:
    """Plans that have room for a column each, beside the sites."""
    some: list[CodecPlan] = []
    for one in plans:
        if some and sum(len(other.name) + _BESIDE for other in [*some, one]) > width - _SITE_WIDTH:
            yield some
            some = []
        some.append(one)
    yield some


def _times(sites: Sequence[Site], plans: Sequence[CodecPlan]) -> Table:
    table = _table("Seconds of a round's traffic, down and up", "site", *(one.name for one in plans), folds_first=True)
    for site in sites:
        line = site.line
        loss = f", {_share(line.loss)} lost" if line.loss else ""
        label = f"{site.name}: {as_rate(line.rate)}, {line.round_trip * 1e3:g} ms{loss}"
        table.add_row(label, *(_number(one.sites[site.name].seconds) for one in plans))
    return table


def _memory(plans: Sequence[CodecPlan]) -> Table:
    table = _table("Memory, MB", "codec", "server", "of it results that wait", "each site")
    for one in plans:
        server, site = one.server_memory, one.site_memory
        table.add_row(one.name, *(f"{nbytes / _MB:,.1f}" for nbytes in (server.total, server.waiting, site.total)))
    return table


def _notes(plans: Sequence[CodecPlan], asked: Asked, chosen: CodecPlan | None) -> Iterator[str]:
    budget = plans[0].server_memory.budget / _MB
    yield (
        f"Memory is model, sum, results that wait and a budget of {budget:.0f} MB at the server; model, result and "
        "budget at a site. Python, torch, training, and copies of a workflow come on top."
    )
    ways = [(one.name, way) for one in plans for way in (one.down, one.up)]
    if most := dict.fromkeys(name for name, way in ways if way.is_most):
        yield f"The sizes of {', '.join(most)} depend on the values: these are the most that they can be."
    if needy := dict.fromkeys(name for name, way in ways if way.needs_feedback):
        yield f"{', '.join(needy)}: needs error feedback, and differences; the first round travels lossless."
    if asked.deadline is None:
        return
    if chosen:
        yield f"{chosen.name} is the most exact that takes no more than {asked.deadline:g} s a round."
    else:
        best = min(plans, key=lambda one: one.seconds)
        yield f"None takes no more than {asked.deadline:g} s a round; {best.name} takes {_number(best.seconds)} s."


def _sent(way: Way) -> str:
    return f"{'<' if way.is_most else ''}{way.message.wire_bytes / _MB:,.1f}"


def _loses(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.001 else _share(share)


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share else "0"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
