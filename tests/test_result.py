"""A generation reads like a mapping, and knows the program that answered as long as it is kept."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import torch

from smc_compile.result import Generation, Stats


class Program:
    pass


def generation() -> Generation:
    tensors = {name: torch.zeros(1) for name in Generation.__annotations__ if name not in OTHERS}
    return Generation(**tensors, stats=Stats("smc", 1))


OTHERS = ("stats", "logits", "scores", "_program")


def test_the_program_is_no_entry() -> None:
    program = Program()
    result = replace(generation(), _program=weakref.ref(program))
    assert result.program is program
    assert result.keys() == [name for name in Generation.__annotations__ if name not in OTHERS[1:]]
    assert len(result.to_tuple()) == len(result) == len(result.keys())
    assert "_program" not in repr(result)
    assert replace(result, logits=(torch.ones(1),)).program is program


def test_a_result_does_not_keep_its_program() -> None:
    program = Program()
    result = replace(generation(), _program=weakref.ref(program))
    del program
    gc.collect()
    assert result.program is None
    assert generation().program is None


def test_copies_and_pickles_hold_the_tensors_alone() -> None:
    program = Program()
    result = replace(generation(), _program=weakref.ref(program))
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert twin.program is None
        assert torch.equal(twin.sequences, result.sequences)
        assert twin.keys() == result.keys()
