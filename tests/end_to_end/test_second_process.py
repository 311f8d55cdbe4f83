"""A second process finds every region in Inductor's cache: keys depend on what is compiled, not on who compiles it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Repeated layers, so that a layer is compiled apart; products by our own op, and a threshold by another one. The C++
# that Inductor writes is not built, which would take a minute: so the one step that runs computes nothing, and its
# tokens mean nothing. What is asked is whether the graphs are known.
PROGRAM = """
import json
import torch
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile

AsyncCompile.cpp_pybinding = lambda *_, **__: lambda *arguments: None
from helpers.models import CACHEABLE
from smc_compile import GenerationError, generate
from smc_compile.kernels import skinny_linear as own_products, thresholds
from smc_compile.passes.lower import outline_layers, skinny_products

own_products.cpp_kernel = thresholds.cpp_kernel = lambda *_: None
skinny_products.SMALLEST[torch.float32] = 1
outline_layers.MIN_REPEATS = 2
model = CACHEABLE["llama"](vocab=17, layers=3)
options = {"method": "autoregressive", "seed": 0, "temperature": 0.7, "top_k": 5, "validate": False}
try:
    generate(model, None, torch.arange(12).view(4, 3), max_new_tokens=2, **options)
except GenerationError:
    pass
caches = {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache_")}
ours = {k: counters["smc_compile"][k] for k in ("layers_outlined", "skinny_products")}
print(json.dumps({"caches": caches, "ours": ours}))
"""


def run(cache: Path) -> dict:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    graphs = first["caches"].pop("fxgraph_cache_miss")
    assert graphs == 4, "head, layer and tail of the model, and the choice of the token"
    assert first["caches"] == {}, "nothing bypasses the cache"
    assert second["caches"] == {"fxgraph_cache_hit": graphs}
    assert first["ours"] == second["ours"]
    assert min(first["ours"].values()) > 0
