"""A DXO's data as flat names and values: params may be dicts in dicts (one dict per adapter, for example)."""

from __future__ import annotations

from typing import Any

from nvflare_rdma.errors import CodecError

_MAX_DEPTH = 8  # more is no model; keeps a forged message from exhausting the stack


def flatten(params: dict[str, Any]) -> dict[str, Any]:
    """Return every value by its name; those in inner dicts by `outer/inner`.

    Raises:
        CodecError: two values of one name, or dicts nested deeper than any model has them.
    """
    if not any(type(value) is dict for value in params.values()):
        return params
    flat: dict[str, Any] = {}
    _collect(params, "", 0, flat)
    return flat


def _collect(params: dict[str, Any], prefix: str, depth: int, flat: dict[str, Any]) -> None:
    if depth > _MAX_DEPTH:
        raise CodecError(f"the params '{prefix}' are nested more than {_MAX_DEPTH} deep")
    for key, value in params.items():
        name = f"{prefix}{key}" if prefix else key
        if type(value) is dict:
            _collect(value, f"{name}/", depth + 1, flat)
        elif name in flat:
            raise CodecError(f"two params have the name '{name}': rename one of them")
        else:
            flat[name] = value


def rebuild(params: dict[str, Any], flat: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return new dicts of the form of `params` with the values of `flat`, which `flatten` named."""
    new = {}
    for key, value in params.items():
        name = f"{prefix}{key}" if prefix else key
        new[key] = rebuild(value, flat, f"{name}/") if type(value) is dict else flat[name]
    return new
