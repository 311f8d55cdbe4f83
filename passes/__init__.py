"""The compiler: passes that turn a plain decode loop into graphs with a cache.

    loop/ -> capture/ -> axes/ -> cache/ -> lower/        run in this order by ``pipeline``

Rules that hold here:

- ``pipeline`` calls every pass. A pass takes one type and gives one type (those of ``ir``) and calls no other pass; the
  axis analysis, which changes nothing, is asked by whoever needs it.
- The graph of a CausalLM is functional ATen: no op writes in place, and every node has its value, without data, in
  ``meta["val"]``. The graphs of a CachedLM carry no values; they write in place at one op, ``write_cache``.
- What a pass does not understand it refuses, with the user's source line and a way out. It never guesses.
- A cached form counts only after ``validate`` has compared it with the original on random tokens.
- Nodes are read with ``fx_tools``; a rewrite of one op is registered in ``rewrites``.

Nothing here imports ``smc_compile.runtime``. From outside import ``pipeline``, ``ir`` and ``closeness``.
"""
