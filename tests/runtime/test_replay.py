"""Recorded cycles: what a CUDA graph would replay, by a recorder that runs on any machine.

The recorder notes every ATen op of a cycle with its tensors, and replays them at the same addresses without running
any Python of ours, as a CUDA graph does with kernels. So a replay can be right only if nothing is decided by the host.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import MiniGPT, RoPELM, TableLM, TinyTransformerLM, perturbed
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smc_compile import Generation, compile, generate
from smc_compile.errors import GenerationError
from smc_compile.runtime.replay import ANSWERS, KEPT, PROMPTS, Replay
from smc_compile.runtime.session import MAX_TRIES

