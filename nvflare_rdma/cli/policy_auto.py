"""What `nvflare-rdma policy` says of the type `auto`: what each tensor travels as, by the rate of a link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nvflare_rdma.cli.models import Tensor
from nvflare_rdma.cli.policy import Row, rows_of
from nvflare_rdma.filters import Autopilot, choose_type

#: Mbit/s.
_RATES = (10, 100, 1000)
_BYTES = 1e6 / 8


@dataclass(frozen=True)
class _Chosen:
    """What goes over a link of this rate."""

    mbit: int
    name: str
    reason: str
    rows: list[Row]
    nbytes: int

    @property
    def seconds(self) -> float:
        """One way."""
        return self.nbytes / (self.mbit * _BYTES)


def show_auto(where: str, pilot: Autopilot, tensors: list[Tensor], console: Console) -> dict[str, Any]:
    """Print a table of what is chosen, and return the data of it."""
    rows = {name: rows_of(policy, tensors) for name, policy in pilot.policies.items()}
    sizes = {name: sum(row.nbytes for row in of_type) for name, of_type in rows.items()}
    found = []
    for mbit in _RATES:
        choice = choose_type(sizes, pilot.limits, mbit * _BYTES)
        name = choice.quantization_type
        found.append(_Chosen(mbit, name, choice.reason, rows[name], sizes[name]))
    console.print(_table(where, found, tensors))
    for one in found:
        console.print(f"{one.mbit} Mbit/s: {one.reason}.", soft_wrap=True)
    smallest = list(sizes)[-1]
    if pilot.limits.seconds is not None:
        told = f"Rates are those that transfers get, less than a line's own. Before one has told, {smallest} is sent."
        console.print(told, soft_wrap=True)
    return {
        "quantization_type": "auto",
        "round_seconds": pilot.limits.seconds,
        "round_bytes": pilot.limits.nbytes,
        "bytes": sum(tensor.nbytes for tensor in tensors if tensor.tied is None),
        "before_a_rate_is_known": smallest if pilot.limits.seconds is not None else found[0].name,
        "rates": [
            {
                "mbit_per_second": one.mbit,
                "quantization_type": one.name,
                "sent_bytes": one.nbytes,
                "seconds_one_way": one.seconds,
                "because": one.reason,
                "tensors": {row.tensor.name: row.codec for row in one.rows},
            }
            for one in found
        ],
    }


def _table(where: str, found: list[_Chosen], tensors: list[Tensor]) -> Table:
    table = Table(title=f"{where}: auto", show_footer=True, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("tensor", f"{len(tensors)} tensors, sent bytes\nseconds, one way", overflow="fold")
    for header in ("dtype", "shape", "bytes"):
        raw = f"{sum(tensor.nbytes for tensor in tensors if tensor.tied is None):,}" if header == "bytes" else ""
        table.add_column(header, raw, justify="left" if header == "dtype" else "right", no_wrap=True)
    for one in found:
        table.add_column(f"{one.mbit} Mbit/s", f"{one.nbytes:,}\n{one.seconds:.3g}", justify="left", no_wrap=True)
    for number, tensor in enumerate(tensors):
        shape = "x".join(map(str, tensor.shape)) or "-"
        codecs = [one.rows[number].codec for one in found]
        table.add_row(tensor.name, tensor.dtype, shape, f"{tensor.nbytes:,}", *codecs)
    return table
