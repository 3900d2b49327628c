"""The state of a run as what files can hold: a tree for JSON, the tensors that hang in it, and the rows it names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgrl.rows import Rows

if TYPE_CHECKING:
    import torch

State = dict[str, Any]

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_DTYPES = {"bool", "float16", "bfloat16", "float32", "float64", "complex64", *_INTEGERS}


def split(state: State, with_rows: bool = True) -> tuple[Any, dict[str, torch.Tensor], list[Rows]]:
    """The state as a tree for JSON, the tensors and the rows it names; TypeError for what a checkpoint cannot hold."""
    import numpy as np
    import torch

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    tables: list[Rows] = []

    def put(tag: str, value: torch.Tensor, path: str) -> dict[str, str]:
        if value.layout is not torch.strided or value.is_meta or str(value.dtype)[6:] not in _DTYPES:
            kind = f"{value.dtype}, {value.layout}, {value.device}"
            raise TypeError(f"{path}: a checkpoint cannot hold a tensor of {kind}")
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses overlapping views of one storage
        storages.add(tensor.untyped_storage().data_ptr())
        while path in tensors:
            path += "'"
        tensors[path] = tensor
        return {tag: path}

    def visit(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value) if abs(value) < 2**63 else {"$int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, torch.Tensor):
            return put("$tensor", value, path)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            return put("$array", torch.from_numpy(array), path)
        if isinstance(value, np.generic) and not isinstance(value, np.longdouble):
            return visit(value.item(), path)
        if isinstance(value, list | tuple):
            return [visit(item, f"{path}/{index}") for index, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) and key[:1] != "$" for key in value):
            return {key: visit(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {"$items": [[key, visit(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, Rows):
            if not with_rows:
                return None
            tables.append(value)
            numbers = [[number, final] for number, final in value.segments().items()]
            return {"$rows": [len(tables) - 1, visit(value.info, path), numbers]}
        raise TypeError(f"{path}: a checkpoint cannot hold {type(value)}, or its keys")

    return visit(state, "state"), tensors, tables


def join(
    tree: Any, tensors: dict[str, torch.Tensor], take: Callable[[int, State, list[tuple[int, bool]]], Rows | None]
) -> State:
    """The inverse of `split`, which takes each tensor once; any exception means a foreign tree.

    take: gives the rows of a table, by its place in the list of `split`, their info, and what their `segments` were.
    """

    def visit(node: Any) -> Any:
        if isinstance(node, list):
            return [visit(item) for item in node]
        if not isinstance(node, dict):
            return node
        tag = next(iter(node), "")
        if not tag.startswith("$"):
            return {key: visit(item) for key, item in node.items()}
        (value,) = node.values()
        match tag:
            case "$tensor":
                return tensors.pop(value)
            case "$array":
                return tensors.pop(value).numpy()
            case "$int":
                return int(value, 16)
            case "$float":
                return float(value)
            case "$items":
                return {key: visit(item) for key, item in value}
            case "$rows":
                table, info, numbers = value
                return take(table, visit(info), numbers)
        raise ValueError(f"unknown tag {tag!r}")

    state = visit(tree)
    if not isinstance(state, dict) or tensors:
        raise ValueError("the tree does not fit the tensors and rows")
    return state
