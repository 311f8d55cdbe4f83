"""What Dynamo leaves out of its guards, and where it gives up, for functions that hold decode loops."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo import callback_handler, config
from torch._guards import CompileContext

log = logging.getLogger(__name__)
NO_LIMIT = 1 << 30


@contextmanager
def without_limit() -> Iterator[None]:
    """Inside, no function is compiled too often: it would run as plain Python, or fail where the whole is asked for."""
    with config.patch(recompile_limit=NO_LIMIT, accumulated_recompile_limit=NO_LIMIT):
        yield


def allow_another_variant() -> None:
    """Raise Dynamo's limits where the function that is being compiled would not be compiled once more.

    At the limit Dynamo runs a function as plain Python: at plain speed, and what a backend refuses would run.
    """
    number = CompileContext.current_compile_id()
    variants = (number.frame_compile_id or 0) + 1 if number is not None else 0
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if variants >= getattr(config, name):
            setattr(config, name, variants + 1)
            log.info("variant %d of one function: torch._dynamo.config.%s is now %d", variants, name, variants + 1)


def guard_hooks() -> None:
    """Have hooks that are added to a module later noticed by the code that is being compiled: Dynamo skips them."""
    if not config.skip_nnmodule_hook_guards:
        return
    config.skip_nnmodule_hook_guards = False

    def restore(_: Any) -> None:
        config.skip_nnmodule_hook_guards = True
        callback_handler.remove_end_callback(restore)

    callback_handler.register_end_callback(restore)
