"""How each ATen op carries axes from its inputs to its outputs: one small rule a family; without a rule, refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

import torch
from torch import fx

from smc_compile.errors import CacheError
from smc_compile.passes.ir import user_line
from smc_compile.passes.sequence_axes import (
    BATCH,
    KEY,
    OTHER,
    QUERY,
    REPEAT,
    Atom,
    Axes,
    Axis,
    K,
    Q,
    Typing,
    expression,
    refuse,
    split_atoms,
)

Rule = Callable[[Typing, fx.Node], Any]
RULES: dict[str, Rule] = {}
END = 2**62  # slices write "to the end" as a huge integer


def rule_for(node: fx.Node) -> Rule:
    """The rule of a node's op; pointwise ops share one, found by their tag."""
    if node.target is getitem:
        return _getitem
    name = op_name(node)
    if name in RULES:
        return RULES[name]
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    raise refuse(node, f"{name} has no position-by-position form")


def op_name(node: fx.Node) -> str:
    target = node.target
    return target._overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by schema name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def operand_axes(typing: Typing, value: fx.Node) -> list[Axis | None]:
    """Axes of an operand; for a token-free one None stands for an axis whose role its partner decides."""
    if typing.is_dependent(value):
        return list(typing.of(value))
    sizes = [expression(size) for size in value.meta["val"].shape]
    return [() if size == 1 else None for size in sizes]


def merge_axis(node: fx.Node, left: Axis | None, right: Axis | None) -> Axis | None:
    """The axis of a broadcast pair."""
    if left is None or right is None:
        return left if right is None else right
    if not left or not right or left == right:
        return left or right
    kinds = {atom.kind for atom in left + right}
    if kinds <= {OTHER, REPEAT}:
        return left if len(left) >= len(right) else right
    if QUERY in kinds and KEY in kinds:
        raise refuse(node, "a per-position value is combined with the positions that attention reads")
    raise refuse(node, f"axes {left} and {right} do not line up")


def broadcast(typing: Typing, node: fx.Node, operands: Iterable[fx.Node]) -> Axes:
    """Right-aligned broadcasting of operands."""
    merged: list[Axis | None] = []
    free_sizes: list[Any] = []
    for operand in operands:
        axes = operand_axes(typing, operand)
        sizes = [expression(size) for size in operand.meta["val"].shape]
        missing = len(axes) - len(merged)
        merged = [()] * missing + merged
        free_sizes = [None] * missing + free_sizes
        for i in range(1, len(axes) + 1):
            if axes[-i] is None:
                free_sizes[-i] = sizes[-i]
            old = merged[-i]
            merged[-i] = axes[-i] if old == () else old if axes[-i] == () else merge_axis(node, old, axes[-i])
    return tuple(_settle(typing, node, axis, size) for axis, size in zip(merged, free_sizes, strict=True))


def _settle(typing: Typing, node: fx.Node, axis: Axis | None, size: Any) -> Axis:
    """An axis which only token-free operands have is plain, unless its size is a sequence length."""
    if axis is not None:
        return axis
    if size.free_symbols:
        raise refuse(node, "a table over positions meets a value without positions")
    return (Atom(OTHER, int(size)),)


def tensors(values: Iterable[Any]) -> list[fx.Node]:
    return [v for v in values if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), torch.Tensor)]


@rule("clone", "contiguous", "_to_copy", "to", "detach", "alias", "lift_fresh_copy", "type_as", "where", "masked_fill",
      "rand_like", "randn_like", "empty_like", "zeros_like", "ones_like", "full_like", "exponential", "exponential_",
      "log_sigmoid", "nan_to_num", "float_power", "clamp", "clip", "isin", "uniform")  # fmt: skip
def pointwise(typing: Typing, node: fx.Node) -> Axes:
    return broadcast(typing, node, tensors([*node.args, *node.kwargs.values()]))


@rule("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def dropout(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if bound.get("train") and bound.get("p"):
        raise CacheError(
            "the model is in training mode with dropout", f"active dropout at {node.name}", "call model.eval() first"
        )
    return typing.of(bound["input"])


def _getitem(typing: Typing, node: fx.Node) -> Axes:
    return typing.axes[node.args[0]][node.args[1]]


def axis_index(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _require_plain(node: fx.Node, axis: Axis, keys_allowed: bool = False) -> None:
    """An op that mixes along an axis may do so only along one without positions or requests."""
    allowed = {OTHER, REPEAT} | ({KEY} if keys_allowed else set())
    for atom in axis:
        if atom.kind not in allowed:
            what = {QUERY: "positions", BATCH: "requests", KEY: "the positions that attention reads"}[atom.kind]
            raise refuse(node, f"{op_name(node)} mixes {what}")


def _dims(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [axis_index(d, rank) for d in (value if isinstance(value, (list, tuple)) else [value])]


@rule("mean", "sum", "var", "std", "amax", "amin", "logsumexp", "prod", "any", "all", "norm", "linalg_vector_norm",
      "argmax", "argmin", "count_nonzero", "max", "min", "var_mean", "std_mean", "aminmax", "median")  # fmt: skip
def reduction(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    if len(tensors(node.args)) == 2:  # max(a, b) is pointwise
        return pointwise(typing, node)
    source = typing.of(bound.get("self", bound.get("input")))
    dims = _dims(bound.get("dim"), len(source))
    for d in dims:
        _require_plain(node, source[d], keys_allowed=True)
    axes = [() if i in dims else axis for i, axis in enumerate(source) if i not in dims or bound.get("keepdim")]
    return [tuple(axes)] * len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else tuple(axes)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "logcumsumexp", "cumprod", "sort", "argsort",
      "flip", "roll", "scatter", "scatter_add", "scatter_reduce", "cummax")  # fmt: skip
def along_axis(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    source = typing.of(bound.get("self", bound.get("input"))) if typing.is_dependent(bound.get("self")) else None
    if source is None:
        source = broadcast(typing, node, tensors([bound.get("self"), bound.get("index")]))
    for d in _dims(bound.get("dim", bound.get("dims", -1)), len(source)):
        _require_plain(node, source[d], keys_allowed="softmax" in op_name(node))
    return [source] * len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else source


@rule("topk", "kthvalue")
def topk(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    source = list(typing.of(bound["self"]))
    d = axis_index(bound["dim"], len(source))
    _require_plain(node, source[d])
    if op_name(node) == "kthvalue":
        kept = [*source[:d], *([()] if bound["keepdim"] else []), *source[d + 1 :]]
    else:
        kept = [*source[:d], plain(int(bound["k"])), *source[d + 1 :]]
    return [tuple(kept)] * 2


def plain(size: int) -> Axis:
    return () if size == 1 else (Atom(OTHER, size),)


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def normalise(typing: Typing, node: fx.Node) -> Any:
    bound = arguments(node)
    source = typing.of(bound["input"])
    for axis in source[-len(bound["normalized_shape"]) :]:
        _require_plain(node, axis)
    if isinstance(node.meta["val"], (tuple, list)):
        reduced = source[: -len(bound["normalized_shape"])] + ((),) * len(bound["normalized_shape"])
        return [source] + [reduced] * (len(node.meta["val"]) - 1)
    return source


@rule("embedding")
def embedding(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if typing.is_dependent(bound["weight"]):
        raise refuse(node, "an embedding table depends on the tokens")
    return (*typing.of(bound["indices"]), plain(node.meta["val"].shape[-1]))


@rule("one_hot")
def one_hot(typing: Typing, node: fx.Node) -> Axes:
    return (*typing.of(node.args[0]), plain(int(node.meta["val"].shape[-1])))


@rule("linear")
def linear(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    if typing.is_dependent(bound["weight"]):
        raise refuse(node, "a linear layer's weight depends on the tokens")
    source = typing.of(bound["input"])
    _require_plain(node, source[-1])
    return (*source[:-1], plain(node.meta["val"].shape[-1]))


@rule("matmul", "mm", "bmm")
def matmul(typing: Typing, node: fx.Node) -> Axes:
    return contract(typing, node, node.args[0], node.args[1])


@rule("addmm", "baddbmm")
def addmm(typing: Typing, node: fx.Node) -> Axes:
    result = contract(typing, node, node.args[1], node.args[2])
    if node in typing.attention:
        raise refuse(node, f"{op_name(node)} adds to attention scores", "write it as a matmul followed by an addition")
    return result


def contract(typing: Typing, node: fx.Node, left: Any, right: Any) -> Axes:
    """``left [..., m, c] @ right [..., c, n]``; a contraction that meets positions is attention and marks a cache."""
    a, b = _matrix_axes(typing, left), _matrix_axes(typing, right)
    if len(a) < 2 or len(b) < 2:
        return _vector_product(typing, node, a, b)
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b
    batch = tuple(_batch_axis(node, x, y) for x, y in zip(a[:-2], b[:-2], strict=True))
    if a[-1] == (K,) and b[-2] == (Q,):
        typing.attention[node] = "mix"
    elif a[-2] and b[-1] == (Q,) and Q in a[-2]:
        _require_plain(node, a[-1])
        typing.attention[node] = "score"
        return (*batch, a[-2], (K,))
    else:
        _require_plain(node, a[-1])
        _require_plain(node, b[-2])
    return (*batch, a[-2], b[-1])


def _matrix_axes(typing: Typing, value: fx.Node) -> Axes:
    if typing.is_dependent(value):
        return typing.of(value)
    sizes = [expression(size) for size in value.meta["val"].shape]
    if any(size.free_symbols for size in sizes):
        raise refuse(value, "a matrix product with a table over positions mixes positions")
    return tuple(plain(int(size)) for size in sizes)


def _vector_product(typing: Typing, node: fx.Node, a: Axes, b: Axes) -> Axes:
    if len(b) != 1 or len(a) < 1:
        raise refuse(node, "a product with a vector on the left")
    _require_plain(node, a[-1])
    return a[:-1]


def _batch_axis(node: fx.Node, left: Axis, right: Axis) -> Axis:
    """The query side's axis names the result: repeated key heads are the query's own heads."""
    if not left:
        return tuple(Atom(OTHER, atom.size) if atom.kind == REPEAT else atom for atom in right)
    kinds = {atom.kind for atom in right} - {OTHER, REPEAT}
    if not kinds <= {atom.kind for atom in left} or {QUERY, KEY} & kinds:
        raise refuse(node, f"axes {left} and {right} of a batched product do not line up")
    return left


@rule("scaled_dot_product_attention")
def attention(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    query, key, value = (_matrix_axes(typing, bound[name]) for name in ("query", "key", "value"))
    if bound["dropout_p"]:
        raise CacheError("the model is in training mode with dropout", user_line(node), "call model.eval() first")
    if query[-2] != (Q,) or key[-2] != (Q,) or value[-2] != (Q,):
        raise refuse(node, "attention does not run over the positions of the sequence")
    if typing.is_dependent(bound["attn_mask"]):
        raise refuse(node, "the attention mask depends on the tokens", "build the mask from positions alone")
    typing.attention[node] = "sdpa"
    return (*query[:-1], value[-1])


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_copy")
def view(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(arguments(node).get("self", node.args[0]))
    sizes = [expression(size) for size in node.meta["val"].shape]
    axes = split_atoms([atom for axis in source for atom in axis], sizes, typing)
    if axes is None:
        raise refuse(node, f"a reshape to {sizes} cuts across positions")
    return tuple(axes)


@rule("expand", "expand_as", "broadcast_to")
def expand(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(node.args[0])
    sizes = [expression(size) for size in node.meta["val"].shape]
    source = ((),) * (len(sizes) - len(source)) + source
    return tuple(axis or _repeated(node, size) for axis, size in zip(source, sizes, strict=True))


def _repeated(node: fx.Node, size: Any) -> Axis:
    if size.free_symbols:
        raise refuse(node, "a value is expanded over positions")
    return () if size == 1 else (Atom(REPEAT, int(size)),)


@rule("repeat_interleave")
def repeat_interleave(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    source = list(typing.of(bound["self"]))
    if not isinstance(bound["repeats"], int) or bound["dim"] is None:
        raise refuse(node, "repeat_interleave with a tensor of repeats, or without dim")
    d = axis_index(bound["dim"], len(source))
    _require_plain(node, source[d])
    source[d] = source[d] + _repeated(node, expression(bound["repeats"]))
    return tuple(source)


@rule("repeat")
def repeat(typing: Typing, node: fx.Node) -> Axes:
    source, repeats = typing.of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    source = ((),) * (len(repeats) - len(source)) + source
    for axis, count in zip(source, repeats, strict=True):
        if count != 1:
            _require_plain(node, axis)
    return tuple(_repeated(node, expression(count)) + axis for axis, count in zip(source, repeats, strict=True))


@rule("permute")
def permute(typing: Typing, node: fx.Node) -> Axes:
    source = typing.of(node.args[0])
    return tuple(source[d] for d in node.args[1])  # type: ignore[union-attr, index]


@rule("transpose", "swapaxes", "swapdims")
def transpose(typing: Typing, node: fx.Node) -> Axes:
    axes = list(typing.of(node.args[0]))
    i, j = (axis_index(d, len(axes)) for d in node.args[1:3])  # type: ignore[arg-type]
    axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


@rule("t", "numpy_T", "mT", "adjoint", "matrix_H")
def matrix_transpose(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    return (*axes[:-2], axes[-1], axes[-2]) if len(axes) > 1 else axes


@rule("movedim", "moveaxis")
def movedim(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    sources, targets = _dims(node.args[1], len(axes)), _dims(node.args[2], len(axes))
    rest = [i for i in range(len(axes)) if i not in sources]
    placed = [-1] * len(axes)
    for s, t in zip(sources, targets, strict=True):
        placed[t] = s
    remaining = iter(rest)
    return tuple(axes[p if p >= 0 else next(remaining)] for p in placed)


@rule("unsqueeze")
def unsqueeze(typing: Typing, node: fx.Node) -> Axes:
    axes = list(typing.of(node.args[0]))
    axes.insert(axis_index(node.args[1], len(axes) + 1), ())  # type: ignore[arg-type]
    return tuple(axes)


@rule("squeeze")
def squeeze(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    dims = _dims(node.args[1] if len(node.args) > 1 else None, len(axes))
    if len(node.args) < 2 and any(axis and typing.axis_size(axis) == 1 for axis in axes):
        raise refuse(node, "squeeze() without dim would drop the batch axis", "write squeeze(dim)")
    return tuple(axis for i, axis in enumerate(axes) if i not in dims or axis)


@rule("slice")
def slice_axis(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    axes = list(typing.of(bound["self"]))
    d = axis_index(bound["dim"], len(axes))
    start, end, step = bound["start"] or 0, bound["end"], bound["step"]
    whole = step == 1 and start == 0 and (end is None or _covers(typing, end, axes[d]))
    if whole:
        return tuple(axes)
    if axes[d] == (Q,) and step == 1 and start == -1 and (end is None or _covers(typing, end, axes[d])):
        return _select_last(typing, node, (*axes[:d], (), *axes[d + 1 :]))
    if len(axes[d]) == 1 and axes[d][0].kind == KEY:
        axes[d] = (_without_extra(typing, node, axes[d][0], start, end),)
        return tuple(axes)
    _require_sliceable(node, axes[d])
    axes[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(axes)


def _require_sliceable(node: fx.Node, axis: Axis) -> None:
    if any(atom.kind == QUERY for atom in axis):
        raise refuse(node, "a slice reads some positions only, so positions mix")
    _require_plain(node, axis)


def _covers(typing: Typing, end: Any, axis: Axis) -> bool:
    end = expression(end)
    return bool(end == typing.axis_size(axis)) or (end.is_Integer and int(end) >= END)


def _without_extra(typing: Typing, node: fx.Node, atom: Atom, start: Any, end: Any) -> Atom:
    """Scores over keys and ``size`` sink columns, cut back to the keys."""
    to_end = end is None or (expression(end).is_Integer and int(expression(end)) >= END)
    drops_after = atom.size > 0 and start == 0 and not to_end and expression(end) in (-atom.size, typing.length)
    drops_before = atom.size < 0 and to_end and start == -atom.size
    if not (drops_after or drops_before):
        raise refuse(node, "a slice reads some of the keys only")
    return K


def _select_last(typing: Typing, node: fx.Node, axes: Axes) -> Axes:
    typing.last.append(node)
    typing.after_last.add(node)
    return axes


@rule("select")
def select(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    d = axis_index(node.args[1], len(axes))  # type: ignore[arg-type]
    rest = (*axes[:d], *axes[d + 1 :])
    if axes[d] == (Q,):
        if expression(node.args[2]) not in (-1, typing.length - 1):
            raise refuse(node, "the loop samples from a position that is not the last", "sample from logits[:, -1]")
        return _select_last(typing, node, rest)
    _require_plain(node, axes[d])
    return rest


@rule("split", "chunk", "unbind", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(typing: Typing, node: fx.Node) -> list[Axes]:
    axes = list(typing.of(node.args[0]))
    bound = arguments(node)
    d = axis_index(bound.get("dim", 0), len(axes))
    _require_sliceable(node, axes[d])
    pieces = []
    for value in node.meta["val"]:
        middle = () if op_name(node) == "unbind" else (plain(int(value.shape[d])),)
        pieces.append((*axes[:d], *middle, *axes[d + 1 :]))
    return pieces


@rule("cat", "concat", "concatenate")
def cat(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    operands = bound["tensors"]
    d = axis_index(bound["dim"], node.meta["val"].dim())
    columns = [operand_axes(typing, operand)[d] for operand in operands]
    merged: list[Axis] = []
    for i in range(node.meta["val"].dim()):
        axis: Axis | None = None
        if i != d:
            for operand in operands:
                axis = merge_axis(node, axis, operand_axes(typing, operand)[i])
            axis = _settle(typing, node, axis, expression(node.meta["val"].shape[i]))
        merged.append(axis or ())
    key = [i for i, axis in enumerate(columns) if axis == (K,)]
    if key:
        merged[d] = (_with_extra(typing, node, operands, key, d),)
        return tuple(merged)
    for axis in columns:
        _require_plain(node, axis or ())
    merged[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(merged)


def _with_extra(typing: Typing, node: fx.Node, operands: Any, key: list[int], d: int) -> Atom:
    """Sink columns beside the scores: after the keys (positive) or before them (negative)."""
    if len(key) != 1 or len(operands) != 2:
        raise refuse(node, "scores are concatenated with more than one other value")
    extra = expression(operands[1 - key[0]].meta["val"].shape[d])
    if extra.free_symbols:
        raise refuse(node, "scores over two sequences are concatenated")
    return Atom(KEY, int(extra) if key[0] == 0 else -int(extra))


@rule("stack")
def stack(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    axes = list(broadcast(typing, node, bound["tensors"]))
    axes.insert(axis_index(bound["dim"], len(axes) + 1), plain(len(bound["tensors"])))
    return tuple(axes)


@rule("gather", "take_along_dim")
def gather(typing: Typing, node: fx.Node) -> Axes:
    bound = arguments(node)
    d = axis_index(bound["dim"], node.meta["val"].dim())
    source, index = operand_axes(typing, bound["self"]), operand_axes(typing, bound["index"])
    _require_plain(node, source[d] or ())
    _require_plain(node, index[d] or ())
    axes = [merge_axis(node, x, y) for x, y in zip(source, index, strict=True)]
    axes[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(
        _settle(typing, node, axis, expression(size)) for axis, size in zip(axes, node.meta["val"].shape, strict=True)
    )


@rule("index_select")
def index_select(typing: Typing, node: fx.Node) -> Axes:
    source, d, index = node.args
    if typing.is_dependent(index):
        raise refuse(node, "index_select with token ids", "use an embedding")
    axes = list(typing.of(source))
    d = axis_index(d, len(axes))  # type: ignore[arg-type]
    _require_sliceable(node, axes[d])
    axes[d] = plain(int(node.meta["val"].shape[d]))
    return tuple(axes)


@rule("index")
def index(typing: Typing, node: fx.Node) -> Axes:
    source, indices = node.args
    used = [(i, value) for i, value in enumerate(indices) if value is not None]  # type: ignore[union-attr, arg-type]
    if len(used) != 1:
        raise refuse(node, "indexing with several tensors at once")
    d, value = used[0]
    sizes = source.meta["val"].shape  # type: ignore[union-attr]
    axes = list(typing.of(source)) if typing.is_dependent(source) else [plain(int(s)) for s in sizes]
    if value.meta["val"].dtype == torch.bool:  # type: ignore[union-attr]
        raise refuse(node, "indexing with a boolean mask has a data-dependent shape")
    _require_sliceable(node, axes[d])
    inner = operand_axes(typing, value)
    found = [_settle(typing, node, axis, expression(s)) for axis, s in zip(inner, value.meta["val"].shape, strict=True)]
    return (*axes[:d], *found, *axes[d + 1 :])


@rule("constant_pad_nd", "pad")
def pad(typing: Typing, node: fx.Node) -> Axes:
    axes = list(typing.of(node.args[0]))
    amounts = list(node.args[1])  # type: ignore[arg-type]
    for i in range(len(amounts) // 2):
        if amounts[2 * i] or amounts[2 * i + 1]:
            _require_plain(node, axes[-1 - i])
            axes[-1 - i] = plain(int(node.meta["val"].shape[-1 - i]))
    return tuple(axes)


@rule("multinomial")
def multinomial(typing: Typing, node: fx.Node) -> Axes:
    axes = typing.of(node.args[0])
    return (*axes[:-1], plain(int(node.meta["val"].shape[-1])))
