"""`nvflare-rdma policy CONFIG MODEL`: what each tensor of a model would travel as, and what that adds up to."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nvflare_rdma.cli.models import Tensor, read_json, read_model
from nvflare_rdma.cli.output import Result
from nvflare_rdma.codecs import Policy, role_of
from nvflare_rdma.errors import ConfigError

if TYPE_CHECKING:
    from nvflare_rdma.filters import Autopilot

_AUTO = "auto"
#: Of a quantizer, what decides how tensors travel; and with `auto`.
_ARGUMENTS = ("quantization_type", "policy")
_AUTO_ARGUMENTS = (
    *("max_relative_error", "round_seconds", "round_bytes"),
    *("error_feedback", "delta", "stochastic_rounding"),  # which it refuses
)
_SIDES = {"config_fed_server.json": "server to sites", "config_fed_client.json": "sites to server"}


@dataclass(frozen=True)
class Row:
    """One tensor of a model under a policy: its codec's name or `exact`, the reason, and the bytes on the way."""

    tensor: Tensor
    codec: str
    reason: str
    nbytes: int


def rows_of(policy: Policy, model: list[Tensor]) -> list[Row]:
    """What `policy` makes of each tensor. Sizes are those of codes and scales, without names and code tables."""
    rows = []
    for tensor in model:
        decision = policy.decide(tensor.name, tensor.dtype, tensor.shape)
        if tensor.tied is not None:
            rows.append(Row(tensor, "tied", f"sent as {tensor.tied}", 0))
        elif decision.codec is None:
            rows.append(Row(tensor, "exact", decision.reason, tensor.nbytes))
        else:
            # Where the size depends on the values, encoded_nbytes is the most, and then the tensor goes exact.
            nbytes = min(decision.codec.encoded_nbytes(math.prod(tensor.shape)), tensor.nbytes)
            rows.append(Row(tensor, decision.codec.name, decision.reason, nbytes))
    return rows


def read_policies(path: Path) -> dict[str, Policy]:
    """The policies in a config, by what they are for.

    Args:
        path: the folder of an exported job, one of its `config_fed_*.json`, or a JSON file with the arguments of a
            ModelQuantizer (`quantization_type`, `policy`).

    Raises:
        ConfigError: no such file, no JSON, sections that are not as FLARE has them, no quantizer in it, or one whose
            type each link chooses.
    """
    found: dict[str, Policy] = {}
    for where, policy in read_quantizers(path).items():
        if not isinstance(policy, Policy):
            raise ConfigError(
                f"{path} has quantization_type 'auto' ({where}), which is another type for each link: `nvflare-rdma "
                "policy` says which, by rate; to compare types, give a policy that names one"
            )
        found[where] = policy
    return found


def read_quantizers(path: Path) -> dict[str, Policy | Autopilot]:
    """As `read_policies`, with what chooses where quantization_type is `auto`."""
    files = sorted(p for name in _SIDES for p in path.rglob(name)) if path.is_dir() else [path]
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ConfigError(f"{file} is not a JSON object: give a job's config or {{'quantization_type': ...}}")
        if "quantization_type" in config:
            found["both directions"] = config
        for where, args in _quantizers(file, config):
            app = "" if len(files) <= len(_SIDES) else f" ({file.parent.parent.name})"
            keys = (*_ARGUMENTS, *_AUTO_ARGUMENTS) if _is_auto(args) else _ARGUMENTS
            found[where + app] = {key: args[key] for key in keys if key in args}
    if not found:
        looked = f"no {' or '.join(_SIDES)}" if not files else "no ModelQuantizer and no quantization_type"
        raise ConfigError(f"{path} has {looked}: give an exported job, its config file, or a small policy JSON")
    if len(found) > 1 and all(args == next(iter(found.values())) for args in found.values()):
        found = {"both directions": next(iter(found.values()))}
    return {where: _quantizer(args) for where, args in found.items()}


def _is_auto(args: dict[str, Any]) -> bool:
    return str(args.get("quantization_type")).lower() == _AUTO


def _quantizer(args: dict[str, Any]) -> Policy | Autopilot:
    if _is_auto(args):
        from nvflare_rdma.filters import autopilot_of  # with FLARE, which takes a while

        if (pilot := autopilot_of(args)) is not None:
            return pilot
    return Policy(args.get("quantization_type", "float16"), args.get("policy"))


def _quantizers(file: Path, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each ModelQuantizer and PeerQuantizer in a job's config is for, and its arguments."""
    for i, entry in enumerate(_expect(list, config.get("components"), file, "components")):
        entry = _expect(dict, entry, file, f"components[{i}]")
        if str(entry.get("path")).endswith("PeerQuantizer"):
            yield "site to site", _expect(dict, entry.get("args"), file, f"components[{i}].args")
    for section in ("task_data_filters", "task_result_filters"):
        for i, chain in enumerate(_expect(list, config.get(section), file, section)):
            where = f"{section}[{i}]"
            filters = _expect(dict, chain, file, where).get("filters")
            for j, entry in enumerate(_expect(list, filters, file, f"{where}.filters")):
                key = f"{where}.filters[{j}]"
                entry = _expect(dict, entry, file, key)
                if str(entry.get("path") or entry.get("name")).endswith("ModelQuantizer"):
                    yield _SIDES.get(file.name, file.name), _expect(dict, entry.get("args"), file, f"{key}.args")


def _expect(kind: type[Any], value: Any, file: Path, key: str) -> Any:
    """`value`, if it is of the `kind` (dict or list) that FLARE's config has at `key`. Null stands for an empty one,
    except among others in a list."""
    if value is None and not key.endswith("]"):
        return kind()
    if isinstance(value, kind):
        return value
    expected = "an object" if kind is dict else "a list of objects"
    raise ConfigError(f"{file}: {key} is {value!r}; {expected} is expected")


def policy_result(config: str, model: str) -> Result:
    """A table for each direction that has a policy of its own."""
    quantizers, tensors = read_quantizers(Path(config)), read_model(Path(model))
    console = Console(width=max(shutil.get_terminal_size((80, 24)).columns, 60), highlight=False, markup=False)
    data = {}
    with console.capture() as text:
        for where, quantizer in quantizers.items():
            if isinstance(quantizer, Policy):
                rows = rows_of(quantizer, tensors)
                data[where] = _data(quantizer, rows)
                console.print(_table(where, quantizer, rows))
            else:
                from nvflare_rdma.cli.policy_auto import show_auto

                data[where] = show_auto(where, quantizer, tensors, console)
    return Result(data, text.get().rstrip("\n"))


def _data(policy: Policy, rows: list[Row]) -> dict[str, Any]:
    tensors = [
        {
            "name": row.tensor.name,
            "dtype": row.tensor.dtype,
            "shape": list(row.tensor.shape),
            "role": role_of(row.tensor.name, row.tensor.shape),
            "travels_as": row.codec,
            "because": row.reason,
            "bytes": row.tensor.nbytes,
            "sent_bytes": row.nbytes,
        }
        for row in rows
    ]
    before, after = _sums(rows)
    return {"quantization_type": policy.codec.name, "bytes": before, "sent_bytes": after, "tensors": tensors}


def _sums(rows: list[Row]) -> tuple[int, int]:
    return sum(row.tensor.nbytes for row in rows), sum(row.nbytes for row in rows)


def _table(where: str, policy: Policy, rows: list[Row]) -> Table:
    before, after = _sums(rows)
    table = Table(title=f"{where}: {policy.codec.name}", show_footer=True, title_justify="left", box=SIMPLE_HEAD)
    ratio = f"{after / before:.2%}" if before else "-"
    for header, footer, justify in (
        ("tensor", f"{len(rows)} tensors", "left"),
        ("dtype", "", "left"),
        ("shape", "", "right"),
        ("travels as", ratio, "left"),
        ("because", "", "left"),
        ("bytes", f"{before:,}", "right"),
        ("sent", f"{after:,}", "right"),
    ):
        folds = header in ("tensor", "because")
        table.add_column(header, footer, justify=justify, overflow="fold", no_wrap=not folds)  # type: ignore[arg-type]
    for row in rows:
        tensor = row.tensor
        shape = "x".join(map(str, tensor.shape)) or "-"
        sizes = f"{tensor.nbytes:,}", f"{row.nbytes:,}"
        table.add_row(tensor.name, tensor.dtype, shape, row.codec, row.reason, *sizes)
    return table
