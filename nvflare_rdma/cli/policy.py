"""`nvflare-rdma policy CONFIG MODEL`: what each tensor of a model would travel as, and what that adds up to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.codecs import Policy, role_of
from nvflare_rdma.errors import ConfigError

_SIDES = {"config_fed_server.json": "server to sites", "config_fed_client.json": "sites to server"}


@dataclass(frozen=True)
class Tensor:
    """One entry of a model: `tied` names an earlier one that has the same memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values, at the dtype's own width; of odd widths rounded up."""
        return -(-math.prod(self.shape) * _bits(self.dtype) // 8)


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
        ConfigError: no such file, no JSON, sections that are not as FLARE has them, or no quantizer in it.
    """
    files = sorted(p for name in _SIDES for p in path.rglob(name)) if path.is_dir() else [path]
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        config = _read_json(file)
        if not isinstance(config, dict):
            raise ConfigError(f"{file} is not a JSON object: give a job's config or {{'quantization_type': ...}}")
        if "quantization_type" in config:
            found["both directions"] = config
        for where, args in _quantizers(file, config):
            app = "" if len(files) <= len(_SIDES) else f" ({file.parent.parent.name})"
            found[where + app] = {key: args[key] for key in ("quantization_type", "policy") if key in args}
    if not found:
        looked = f"no {' or '.join(_SIDES)}" if not files else "no ModelQuantizer and no quantization_type"
        raise ConfigError(f"{path} has {looked}: give an exported job, its config file, or a small policy JSON")
    if len(found) > 1 and all(args == next(iter(found.values())) for args in found.values()):
        found = {"both directions": next(iter(found.values()))}
    return {
        where: Policy(args.get("quantization_type", "float16"), args.get("policy")) for where, args in found.items()
    }


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


def read_model(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, a torch file with a state dict, or a JSON of name to dtype and shape.

    Raises:
        ConfigError: the file isn't there or isn't what its name says. Only headers are read, and a torch file is
            opened with `weights_only=True`, so that nothing in it runs.
    """
    if not path.is_file():
        raise ConfigError(f"there is no model file {path}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_json_model(path) if path.suffix == ".json" else _read_torch(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} can't be read as a model: {type(error).__name__}: {error}") from None


def _read_json_model(path: Path) -> list[Tensor]:
    return [_tensor(name, str(item["dtype"]), item["shape"]) for name, item in _read_json(path).items()]


def _read_safetensors(path: Path) -> list[Tensor]:
    from nvflare_rdma.codecs import read_header

    with path.open("rb") as file:

        def read_into(memory: memoryview, offset: int) -> None:
            file.seek(offset)
            file.readinto(memory)

        stored = read_header(path.stat().st_size, read_into, complete=False)
    # Codes of the format that this package has no names for are told in small letters, as all other dtypes.
    return [Tensor(tensor.name, tensor.dtype.lower(), tensor.shape) for tensor in stored]


def _read_torch(path: Path) -> list[Tensor]:
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(f"{path} can't be read as a torch state dict: {str(error).splitlines()[0]}") from None
    from nvflare_rdma.codecs import dtype_name, identity

    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None  # FLARE's persistor adds a level
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    first: dict[Any, str] = {}
    model = []
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            key = identity(value)
            other = name if key is None else first.setdefault(key, name)
            model.append(Tensor(name, dtype_name(value), tuple(value.shape), None if other == name else other))
    return model


def _tensor(name: str, dtype: str, shape: Any) -> Tensor:
    if not all(type(d) is int and d >= 0 for d in shape):
        raise ConfigError(f"the shape of '{name}' is {shape!r}, not a list of sizes")
    return Tensor(name, dtype, tuple(shape))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} can't be read as JSON: {error}") from None


def _bits(dtype: str) -> int:
    if dtype == "bool":
        return 8
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise ConfigError(f"dtype {dtype!r} is unknown; write it as float32, bfloat16, int64, bool ...")
    return int(digits[0])


def print_policy(config: str, model: str) -> int:
    """Print one table per direction that has a policy of its own. Returns the exit code."""
    policies, tensors = read_policies(Path(config)), read_model(Path(model))
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for where, policy in policies.items():
        rows = rows_of(policy, tensors)
        before = sum(row.tensor.nbytes for row in rows)
        after = sum(row.nbytes for row in rows)
        table = Table(title=f"{where}: {policy.codec.name}", show_footer=True, title_justify="left")
        ratio = f"{after / before:.2%}" if before else "-"
        for header, footer, justify in (
            ("tensor", f"{len(rows)} tensors", "left"),
            ("dtype", "", "left"),
            ("shape", "", "right"),
            ("role", "", "left"),
            ("travels as", ratio, "left"),
            ("because", "", "left"),
            ("bytes", f"{before:,}", "right"),
            ("sent", f"{after:,}", "right"),
        ):
            table.add_column(header, footer, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            tensor = row.tensor
            shape, role = "x".join(map(str, tensor.shape)) or "-", role_of(tensor.name, tensor.shape)
            sizes = f"{tensor.nbytes:,}", f"{row.nbytes:,}"
            table.add_row(tensor.name, tensor.dtype, shape, role, row.codec, row.reason, *sizes)
        console.print(table)
    return 0
