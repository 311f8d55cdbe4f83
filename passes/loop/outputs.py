"""What a loop returns: how each output is put together from the prompt and the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import describe
from smc_compile.passes.loop.iterations import Iterations
from smc_compile.passes.loop.tensor_info import tensor_info


@dataclass(frozen=True)
class OutputLayout:
    """How one output of the loop is put together.

    Attributes:
        segments: what follows what along time: "prompt", "tokens".
        axes: the axes of the output, of "batch", "time" and "one" (an axis of size 1).
        padding: constants in the columns after the segments.
        dtype: of the output.
    """

    segments: tuple[str, ...]
    axes: tuple[str, ...] = ("batch", "time")
    padding: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64

    def build(self, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The output for prompt [B, P] and tokens [B, n]."""
        parts = {"prompt": prompt, "tokens": tokens}
        columns = [parts[segment] for segment in self.segments]
        if self.padding:
            columns.append(tokens.new_tensor(self.padding).expand(tokens.shape[0], -1))
        value = torch.cat(columns, dim=1).to(self.dtype)  # [B, time]
        if "batch" not in self.axes:
            value = value.squeeze(0)
        elif self.axes.index("time") < self.axes.index("batch"):
            value = value.t()
        for axis, name in enumerate(self.axes):
            if name == "one":
                value = value.unsqueeze(axis)
        return value


def output_nodes(nodes: Sequence[fx.Node]) -> list[Any]:
    """What a graph of these nodes returns, as a list."""
    returned = nodes[-1].args[0]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def output_layout(iterations: Iterations, output: Any, remaining: int = 0) -> OutputLayout:
    """How an output is put together.

    Args:
        remaining: tokens that iterations outside of the graph will write over the output's padding.

    Raises:
        LoopError: the output is not made of tokens, or is only a part of the sequence.
    """
    layouts = iterations.layouts
    labels = layouts.outputs.get(output) if isinstance(output, fx.Node) else None
    if labels is None:
        found = describe(output) if isinstance(output, fx.Node) else repr(output)
        what, fix = "Only tokens can be returned from a decode loop.", "return the token ids and nothing else"
        raise LoopError(what, f"{found} is returned, which is not made of tokens", fix)
    info = tensor_info(output)
    assert info is not None
    parts = dict(zip(("prompt", "tokens"), layouts.labels(iterations.tokens), strict=True))
    for segments in (("prompt", "tokens"), ("tokens",), ("prompt",)):
        length = sum(parts[segment].shape[1] for segment in segments)
        for axes in _axes(tuple(labels.shape), layouts.batch, length):
            pads = labels.shape[axes.index("time")] - length
            last_row = labels.movedim(axes.index("time"), -1).reshape(-1, labels.shape[axes.index("time")])[-1]
            padding = last_row[len(last_row) - pads :].tolist()
            layout = OutputLayout(segments, axes, tuple(padding))
            same = not any(layouts.source(value) for value in padding) and torch.equal(
                layout.build(parts["prompt"], parts["tokens"]), labels
            )
            if same and ("tokens" not in segments or pads >= remaining):  # later iterations write over padding
                rest = padding[remaining:] if "tokens" in segments else padding
                return OutputLayout(segments, axes, tuple(rest), info.dtype)
    columns = _columns_in_words(iterations, labels)
    raise LoopError(
        "An output of the decode loop is not the whole sequence.",
        f"{describe(output)} of shape {tuple(labels.shape)} holds {columns}",
        "return prompt + tokens, or all tokens as one tensor (torch.stack or torch.cat a list of tokens)",
    )


def _columns_in_words(iterations: Iterations, labels: torch.Tensor) -> str:
    by_row = labels.reshape(iterations.layouts.batch, -1) if labels.ndim else labels.reshape(1, 1)
    return iterations.spell(tuple(by_row[0].tolist()))


def _axes(shape: tuple[int, ...], batch: int, length: int) -> Iterator[tuple[str, ...]]:
    """All ways to name the axes of ``shape`` as batch, time or one (size 1) that fit its sizes."""
    if len(shape) > 4:
        return
    for axes in itertools.product(("batch", "time", "one"), repeat=len(shape)):
        if axes.count("time") != 1 or axes.count("batch") > 1 or (batch > 1 and "batch" not in axes):
            continue
        if axes.count("one") and "batch" not in axes:
            continue
        sizes = {"batch": batch, "one": 1}
        pairs = list(zip(axes, shape, strict=True))
        if all(size >= length if axis == "time" else size == sizes[axis] for axis, size in pairs):
            yield axes
