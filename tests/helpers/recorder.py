"""A recorder of cycles that runs on any machine, in the place of CUDA graphs.

It notes every ATen op of a cycle with its tensors, and replays them at the same addresses without running any Python of
ours, as a CUDA graph does with kernels: a replay is right only if nothing in it is decided by the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smc_compile.program import from_model
from smc_compile.program.lru import LRU

Work = Callable[[], None]


class Recorder(TorchDispatchMode):
    """Ops as they run, and the values of tensors from outside that they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, ...]] = []
        self.own: set[int] = set()  # storages made while recording, kept alive by ``ops``
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in function.tags, f"the host reads a value: {function}"
        by_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in pytree.tree_leaves(args[1:]))
        dynamic = torch.Tag.dynamic_output_shape in function.tags
        assert not dynamic or (function is torch.ops.aten.index.Tensor and not by_mask), f"sizes are values: {function}"
        for tensor, argument in zip(args, function._schema.arguments, strict=False):
            if argument.is_write and isinstance(tensor, Tensor) and address(tensor) not in self.own:
                whole = tensor._base if tensor._base is not None else tensor
                self.before.setdefault(address(tensor), (whole, whole.clone()))
        out = function(*args, **(kwargs or {}))
        known = {address(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.own |= {address(x) for x in pytree.tree_leaves(out) if isinstance(x, Tensor)} - known
        self.ops.append((function, args, kwargs or {}, out, known))
        return out

    def restore(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def replay(self) -> None:
        for function, args, kwargs, out, known in self.ops:
            new = function(*args, **kwargs)
            for fixed, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
                if isinstance(fixed, Tensor) and address(fixed) not in known:
                    fixed.copy_(value)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Records(list[Recorder]):
    """Records as a GPU does: without doing what is recorded."""

    def __call__(self, work: Work) -> Work:
        recorder = Recorder()
        with recorder:
            work()
        recorder.restore()
        self.append(recorder)
        return recorder.replay


def set_recorder(monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    monkeypatch.setattr("smc_compile.program.build.recorder_for", lambda *_: record)
    monkeypatch.setattr(from_model, "programs", LRU(from_model.KEPT))
