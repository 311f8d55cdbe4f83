"""Masks and positions that do not depend on tokens, though they grow with the text: as sizes, not as values.

    mask = torch.ones_like(ids)                                     full([B, S], 1)
    mask = torch.cat([mask, torch.ones_like(token)], 1)     becomes full([B, S], 1)
    positions = mask.cumsum(-1) - 1                                 arange(S)[None].expand(B, S)

A mask that the function is given counts as ones where it holds ones; `DecodeLoop.check_ones` looks at it in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.passes.fx_tools import mutated_inputs, op_name
from smc_compile.passes.loop.tensor_info import TOKEN_DTYPES, TensorInfo, plain_tensor, tensor_info
from smc_compile.passes.loop.token_labels import TokenInterpreter

_PLAIN = frozenset(["full", "ones", "zeros", "arange", "expand", "unsqueeze", "getitem"])  # sizes already


def ones_inputs(nodes: Sequence[fx.Node], arguments: Sequence[Any], prompt: fx.Node) -> list[fx.Node]:
    """The inputs beside the prompt that have its shape and hold ones."""
    shape = tensor_info(prompt).shape  # type: ignore[union-attr]
    placeholders = [node for node in nodes if node.op == "placeholder"]
    found = []
    for node, value in zip(placeholders, arguments, strict=False):
        info, real = tensor_info(node), plain_tensor(value)
        whole = info is not None and info.dtype in (*TOKEN_DTYPES, torch.bool) and info.shape == shape
        if node is not prompt and whole and real is not None and bool((real == 1).all()):
            found.append(node)
    return found


def fold_known_masks(graph: fx.Graph, prompt: fx.Node, ones: Sequence[fx.Node]) -> int:
    """Rewrites, in place, integers [B, L] whose values are known to be all alike, or 0, 1, 2, ...; returns how many."""
    nodes = list(graph.nodes)
    known = _known_values(nodes, prompt, ones)
    folded = 0
    first = next(node for node in nodes if node.op != "placeholder")
    for node in nodes:
        value = known.get(node)
        if value is None or (node.op != "placeholder" and op_name(node) in _PLAIN):
            continue
        with graph.inserting_before(first if node.op == "placeholder" else node):
            made = _emit(graph, node, value)
        if made is not None:
            node.replace_all_uses_with(made)
            folded += 1
    for node in reversed(nodes):  # writes that change nothing
        if node in known and mutated_inputs(node) and not node.users:
            graph.erase_node(node)
    return folded


def _known_values(nodes: Sequence[fx.Node], prompt: fx.Node, ones: Sequence[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The values [B, L] of the nodes that are known; of those that are written to, if writing changes nothing."""
    info = tensor_info(prompt)
    assert info is not None
    rows, length = (1, info.shape[0]) if len(info.shape) == 1 else (info.shape[0], info.shape[1])
    interpreter = TokenInterpreter(nodes, prompt, rows, length)
    known: dict[fx.Node, torch.Tensor] = {}
    changed: set[int] = set()  # storages whose values differ in time
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        for node in nodes:
            targets = mutated_inputs(node)
            before = [(t, known[t].clone()) for t in targets if t in known]
            changed |= {i.storage for t in targets if t not in known and (i := tensor_info(t)) is not None}
            if node in ones:
                interpreter.values[node] = torch.ones(tensor_info(node).shape, dtype=torch.int64)  # type: ignore[union-attr]
            else:
                interpreter.step(node)
            value = interpreter.constant_value(node)
            for target, old in before:
                now = interpreter.constant_value(target)
                if now is None or not torch.equal(now, old):
                    changed.add(tensor_info(target).storage)  # type: ignore[union-attr]
            if value is not None and value.dim() == 2 and node.op != "get_attr":
                known[node] = value.clone()
    return {node: value for node, value in known.items() if tensor_info(node).storage not in changed}  # type: ignore[union-attr]


def _emit(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> fx.Node | None:
    """A node for the value, made from its sizes; None for other values."""
    info = tensor_info(node)
    assert info is not None
    rows, length = value.shape
    example = node.meta.get("example_value")
    device = example.device if isinstance(example, torch.Tensor) else torch.device("cpu")
    if length > 1 and torch.equal(value, torch.arange(length).expand(rows, length)) and info.dtype != torch.bool:
        line = graph.call_function(torch.arange, (length,), {"dtype": info.dtype, "device": device})
        row = graph.call_method("unsqueeze", (line, 0))
        made = graph.call_method("expand", (row, rows, length))
        for part, shape in ((line, (length,)), (row, (1, length)), (made, (rows, length))):
            _describe_like(part, node, shape)
        return made
    if value.numel() == 0 or bool((value != value.flatten()[0]).any()):
        return None
    fill: Any = bool(value.flatten()[0]) if info.dtype == torch.bool else int(value.flatten()[0])
    kwargs = {"dtype": info.dtype, "device": device}
    made = (
        graph.call_function(torch.ones, ((rows, length),), kwargs)
        if fill == 1
        else graph.call_function(torch.full, ((rows, length), fill), kwargs)
    )
    _describe_like(made, node, (rows, length))
    return made


def _describe_like(made: fx.Node, node: fx.Node, shape: tuple[int, ...]) -> None:
    """Give a new node what is known of the one that it replaces, and a storage of its own."""
    info = tensor_info(node)
    assert info is not None
    made.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
    made.meta["tensor"] = TensorInfo(shape, info.dtype, hash((id(made), shape)))
