"""What no decode loop may hold, each named with its line and with what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import describe, mutated_inputs, op_name
from smc_compile.passes.loop.concretise import Concrete
from smc_compile.passes.loop.draws import is_draw, is_random
from smc_compile.passes.loop.lengths import symbolic_length
from smc_compile.passes.loop.needs_value import EndInLoop
from smc_compile.passes.loop.tensor_info import TOKEN_DTYPES, plain_tensor, tensor_info
from smc_compile.passes.loop.token_labels import may_be_prompt

# What to do instead.
NO_CACHE = (
    "call the model on all tokens so far, model(ids)[:, -1], without a KV cache (use_cache=False): "
    "the compiler inserts the cache itself"
)
NO_END = (
    "for an end of the text pass eos_token_id, or use @smc_compile.decode: there a token may leave the loop (if token "
    "== eos: break), and rows that have ended may be filled up (torch.where(done, pad, token)); what else reads the "
    "text goes to generate(..., logits_processor=[...])"
)
READS_TEXT = (
    "let what reads the text besides the model read all of it or its end, ids or ids[:, -8:], in a loop without a "
    "cache and without a window; other rules go to smc_compile.generate(model, draft, ids, logits_processor=[...])"
)
FROM_IDS = "make masks and positions inside of the function, torch.ones_like(ids) or torch.arange(ids.shape[1])"


def refuse_unrecognised_feedback(nodes: Sequence[fx.Node]) -> None:
    """Refuse a loop in which drawn tokens are looked up, though not in a sequence that starts with the prompt."""
    if not any(may_be_prompt(node) or is_random(node) for node in nodes):
        return  # no text: an argmax that is looked up in a codebook
    drawn: set[fx.Node] = set()  # depends on a draw
    looked_up: set[fx.Node] = set()  # depends on a look-up of something drawn
    writers: dict[int, fx.Node] = {}
    for node in nodes:
        sources = set(node.all_input_nodes)
        sources |= {writers[i.storage] for s in node.all_input_nodes if (i := tensor_info(s)) and i.storage in writers}
        if is_draw(node) and sources & looked_up:
            raise LoopError(
                "Tokens are drawn and fed back, but the decode loop could not be recovered.",
                f"{describe(node)} depends on an earlier draw, yet no node reads prompt + tokens as one sequence",
                "fill the buffer with a constant, torch.zeros instead of torch.empty: the model reads all of it"
                if any(_is_uninitialised(other) for other in nodes)
                else f"let the prompt be an integer tensor [B, P] given as an argument, and {NO_CACHE}",
            )
        lookup = op_name(node) in ("embedding", "index_select", "one_hot", "getitem")
        places = {a for a in node.all_input_nodes if (i := tensor_info(a)) and i.dtype in TOKEN_DTYPES}
        if sources & looked_up or (lookup and places & drawn and tensor_info(node) and _is_float(node)):
            looked_up.add(node)
        if is_draw(node) or sources & drawn:
            drawn.add(node)
            writers.update({i.storage: node for t in mutated_inputs(node) if (i := tensor_info(t))})
            drawn.update(mutated_inputs(node))


def _is_uninitialised(node: fx.Node) -> bool:
    info = tensor_info(node)
    return op_name(node) in ("empty", "new_empty", "empty_like") and info is not None and info.dtype in TOKEN_DTYPES


def _is_float(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and info.dtype.is_floating_point


def refuse_uncounted_tokens(concrete: Concrete, tokens: Sequence[fx.Node]) -> None:
    """Each iteration of a while_loop must append one token: those that were not unrolled count as one each."""
    found = [token.meta.get("iteration") for token in tokens]
    if concrete.unrolled and found != list(range(concrete.unrolled)):
        raise LoopError(
            "An iteration of torch.while_loop does not append one token to the sequence.",
            f"{len(tokens)} tokens follow the prompt after {concrete.unrolled} iterations, up to "
            f"{describe(tokens[-1])}",
            "carry (i, buf), write the token that is drawn at column i, and return buf",
        )


def without_idle_autocast(graph: fx.Graph) -> None:
    """Remove, in place, the autocasts that are off: where none is on, they change nothing."""
    for node in [node for node in graph.nodes if op_name(node) == "_exit_autocast"]:
        enter = node.args[0]
        if isinstance(enter, fx.Node) and enter.args[2] is False and not torch.is_autocast_enabled(str(enter.args[0])):
            graph.erase_node(node)
            if not enter.users:
                graph.erase_node(enter)


def without_idle_dropouts(graph: fx.Graph) -> None:
    """Remove, in place, the dropouts that drop nothing: each is its input itself, also where that is written to."""
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        idle = "dropout" in op_name(node) and not _active_dropout(node)
        if idle and node.op == "call_function" and isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def refuse_autocast(nodes: Sequence[fx.Node]) -> None:
    """Autocast is a state of the thread, of which the ops of the step would know nothing."""
    for node in nodes:
        if "autocast" in op_name(node):
            raise LoopError(
                "The decode loop switches autocast on inside.",
                f"{describe(node)} changes the precision of the operators after it",
                "put the autocast around the call of the compiled function, or convert the model with model.to(dtype)",
            )


def refuse_padding(
    nodes: Sequence[fx.Node], arguments: Sequence[Any], prompt: fx.Node, ones: Sequence[fx.Node]
) -> None:
    """A mask that is given and hides tokens of the prompt: padding, of which a loop's step knows nothing."""
    shape = tensor_info(prompt).shape  # type: ignore[union-attr]
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, arguments, strict=False):
        info, real = tensor_info(node), plain_tensor(value)
        if node is prompt or node in ones or info is None or info.shape != shape or not node.users or real is None:
            continue
        if info.dtype in (*TOKEN_DTYPES, torch.bool) and _hides(real):
            raise hidden_tokens(f"`{node.name}` {tuple(shape)}")


def _hides(mask: torch.Tensor) -> bool:
    """Whether a mask is one, of zeros and ones, and hides something."""
    return bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 0).any())


def hidden_tokens(where: str) -> LoopError:
    return LoopError(
        "A mask of the decode loop hides tokens of the prompt.",
        f"{where} holds zeros; a loop is compiled for a mask of ones, as prompts of one length have it",
        "prompts of several lengths: smc_compile.generate(model, draft, ids, attention_mask=mask)",
    )


def refuse_other_randomness(nodes: Sequence[fx.Node], token: fx.Node) -> None:
    """The token of an iteration is drawn, and nothing else is random: no dropout, no other noise."""
    for node in nodes:
        if _active_dropout(node):
            raise LoopError(
                "The model is in training mode with dropout.",
                f"{describe(node)} drops values at random",
                "call model.eval() before compiling",
            )
    noise = [node for node in nodes if is_random(node)]
    if len(noise) > 1:
        raise LoopError(
            "An iteration of the decode loop draws random numbers more than once.",
            f"{describe(noise[0])} and {describe(noise[1])}; only the draw of the token may be random",
            "remove the other noise, or call model.eval()",
        )
    if not any(is_draw(node) for node in nodes):
        raise LoopError(
            "The tokens of the decode loop are not drawn.",
            f"{describe(token)} follows the prompt, but depends on no sampling and no argmax",
            "draw each token with torch.multinomial(probs, 1) or logits.argmax(-1)",
        )
    if mutated_inputs(token):
        raise EndInLoop(
            "A token is changed after it was drawn.",
            f"{describe(token)} writes to it in place, at places that depend on values",
            NO_END,
        )


def _active_dropout(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        rate = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        return rate not in (0, 0.0)
    if "dropout" not in name:
        return False
    rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    training = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True))
    return bool(training) and rate not in (0, 0.0)


def refuse_counted_cache(concrete: Concrete) -> None:
    """The body of a while_loop that carries a cache is traced for one new token, never for a whole prompt."""
    if concrete.unrolled:
        raise LoopError(
            "A torch.while_loop carries a cache.",
            "its iterations are traced as one graph, which never shows the model on a whole prompt",
            "write the loop with `for`, and compile it with @smc_compile.decode",
        )


def refuse_long_inputs(inputs: Sequence[fx.Node], prompt: fx.Node) -> None:
    """An input as long as the prompt has no value for the tokens behind it."""
    size = symbolic_length(prompt)
    for node in inputs:
        example = node.meta.get("example_value")
        shape = example.shape if isinstance(example, torch.Tensor) else ()
        if any(isinstance(s, torch.SymInt) and size in s.node.expr.free_symbols for s in shape):
            raise LoopError(
                "An input of a loop with a cache is as long as the prompt.",
                f"`{node.name}` {tuple(shape)}: what it holds for the tokens behind the prompt is not known",
                FROM_IDS,
            )
