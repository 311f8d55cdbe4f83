"""Inductor's code for a recorded graph: for this CPU, or for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from smc_compile.dev.kernel_audit.absent_device import CUDA, Target, absent_device
from smc_compile.dev.kernel_audit.graph_recorder import RecordedGraph
from smc_compile.errors import SMCError
from smc_compile.kernels import attend, skinny_linear, thresholds
from smc_compile.passes.torch_versions import NEWEST, OLDEST

# What each op with a kernel of ours is without it.
IN_TENSOR_CODE = attend.IN_TENSOR_CODE | skinny_linear.IN_TENSOR_CODE | thresholds.IN_TENSOR_CODE
# (code, flat arguments) -> outputs; arguments that the code changes are changed in place
Execute = Callable[[str, list[Any]], Sequence[Any]]


def lower(recorded: RecordedGraph, target: Target | None, execute: Execute) -> tuple[str, Callable[..., Any]]:
    """The Python that Inductor writes, kernels included, and the region run by handing it to ``execute``.

    For a target, ops with a CPU kernel of ours stand in their tensor code. Passes that ask the device itself (padding
    of products, autotuning) decide nothing here.

    Raises:
        SMCError: when this version of torch keeps elsewhere what is needed.
    """
    try:
        from torch._functorch.aot_autograd import aot_module_simplified
        from torch._inductor.decomposition import select_decomp_table
    except ImportError as error:
        raise _other_internals(error) from error
    codes: list[str] = []

    def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        code = _generate(gm, list(example_inputs), target)
        codes.append(code)

        def run(arguments: list[Any]) -> list[Any]:
            flat = list(arguments)
            arguments.clear()
            return list(execute(code, flat))

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    decompositions = dict(select_decomp_table())
    if target is not None:
        decompositions |= IN_TENSOR_CODE
    with torch.no_grad():
        compiled = aot_module_simplified(
            recorded.graph,
            recorded.inputs,
            fw_compiler=compile_graph,
            inference_compiler=compile_graph,
            decompositions=decompositions,
            keep_inference_input_mutations=True,
        )
    return codes[-1], compiled


def _generate(graph: fx.GraphModule, inputs: list[Any], target: Target | None) -> str:
    try:
        from torch._inductor.compile_fx import (
            _recursive_joint_graph_passes,
            _recursive_post_grad_passes,
            fake_tensor_prop,
            view_to_reshape,
        )
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V
    except ImportError as error:
        raise _other_internals(error) from error
    mode: Any = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with torch.no_grad(), V.set_debug_handler(DebugContext()), V.set_fake_mode(mode):
        _recursive_joint_graph_passes(graph)  # its patterns are made from real tensors: of the CPU
        with absent_device(target) if target is not None else nullcontext():
            if target is not None:
                inputs = _move(graph, inputs, mode)
            view_to_reshape(graph)
            fake_tensor_prop(graph, inputs, True)
            _recursive_post_grad_passes(graph, is_inference=True)
            lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
            lowering.freeze_runtime_asserts()
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                lowering.run(*inputs)
                code, _ = lowering.codegen()
    return str(getattr(code, "value", code))


def _move(graph: fx.GraphModule, inputs: list[Any], mode: Any) -> list[Any]:
    """Fake inputs on the GPU, and a graph that makes its tensors there."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    moved = []
    with mode:
        for value in inputs:
            if isinstance(value, Tensor):
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
            moved.append(value)
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), moved, strict=True):
        node.meta["val"] = value
    return moved


def _other_internals(error: Exception) -> SMCError:
    return SMCError(
        "this version of torch keeps the parts of Inductor elsewhere",
        f"torch {torch.__version__}: {error}",
        f"use torch {OLDEST} to {NEWEST}",
    )
