"""Call a model for its logits, whatever it wraps them in; no model library is imported here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from smc_compile.errors import InputError


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """``model(ids [B, S])`` as logits [B, S, V], or [B, 1, V] of the last position.

    They are the result itself, its ``logits``, or the first of what it holds: ``(logits, loss)``, ``(logits, cache)``.
    A forward that names a parameter ``use_cache`` is called with False there.

    Raises:
        InputError: when what comes back holds no logits.
    """
    result = model(ids, use_cache=False) if _takes(model, "use_cache") else model(ids)
    logits = _held_logits(result)
    if isinstance(logits, Tensor) and logits.dim() == 3:
        return logits
    found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(result).__name__
    raise InputError(
        'a model must return logits [B, S, V], or hold them as .logits, as ["logits"] or as the first of a tuple',
        f"it returned {found}",
        "wrap the model in a module whose forward returns the logits",
    )


def _held_logits(result: Any) -> Any:
    if isinstance(result, Mapping):
        return result.get("logits")
    if isinstance(result, tuple | list) and not hasattr(result, "logits"):
        wide = [part for part in result if isinstance(part, Tensor) and part.is_floating_point() and part.dim() == 3]
        if any(part.shape[:2] == wide[0].shape[:2] for part in wide[1:]):
            raise InputError(
                "a model returns several tensors that could be its logits",
                f"shapes {', '.join(str(tuple(part.shape)) for part in wide)}",
                "wrap it in a module whose forward returns the logits [B, S, V] alone",
            )
        return result[0] if result else None
    return result if isinstance(result, Tensor) else getattr(result, "logits", None)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward names a parameter; ``**kwargs`` does not count."""
    try:
        return name in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward without a signature
        return False


@contextmanager
def traceable(model: nn.Module, caches: bool = False) -> Iterator[None]:
    """Inside, a model makes no cache and its experts are chosen in a way whose shapes depend on no token.

    ``config.use_cache`` is switched off, for forwards that do not name it, unless the caller hands ``caches`` around.
    Everything is switched back at the end.
    """
    with ExitStack() as stack:
        for module in model.modules() if not caches else ():
            config = getattr(module, "config", None)
            if config is not None and getattr(config, "use_cache", None) is True:
                config.use_cache = False
                stack.callback(setattr, config, "use_cache", True)
        stack.enter_context(gathered_experts(model))
        yield


@contextmanager
def gathered_experts(model: nn.Module) -> Iterator[None]:
    """Inside, mixtures of experts that offer a choice gather the weights of each token's experts.

    Sorting tokens by expert, the usual way, has shapes that depend on the tokens, and kernels for few dtypes. The
    choice is the method ``set_experts_implementation``; it is switched back at the end.
    """
    with ExitStack() as stack:
        for module in model.modules():
            switch, current = (getattr(module, f"{verb}_experts_implementation", None) for verb in ("set", "get"))
            if callable(switch) and callable(current):
                stack.callback(switch, current())
                switch("batched_mm")
                break  # the outermost module switches those below it
        yield
