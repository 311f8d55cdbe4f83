"""Kinds of values that the source of a loop speaks of: whether they change from iteration to iteration."""

from __future__ import annotations

import enum
import inspect
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


class Kind(enum.Enum):
    """What is known of a value while the loop runs."""

    FIXED = "a Python value that is the same in every iteration"
    NONE = "None"
    SIZE = "a size of the text"
    CHOICE = "a truth value that depends on a size of the text"
    COUNT = "a number that changes from iteration to iteration"
    TEXT = "the prompt, or the text that grows from it"
    ROW = "a tensor whose shape is the same in every iteration"
    TENSOR = "another tensor"
    OUTPUT = "what a model returns"
    CACHE = "a cache of transformers"
    LIST = "a list that the function builds"
    UNKNOWN = "an object that code unknown here may change"


@dataclass(frozen=True)
class Known:
    """A module, function, class or plain object, the same in every iteration."""

    value: Any


Fact: TypeAlias = Kind | Known
TENSORS = frozenset([Kind.TEXT, Kind.ROW, Kind.TENSOR, Kind.OUTPUT])
SAME = frozenset([Kind.FIXED, Kind.NONE])
ODD = frozenset([Kind.UNKNOWN, Kind.CACHE, Kind.CHOICE])  # no tensor code is known to take these
STILL = frozenset([Kind.FIXED, Kind.NONE, Kind.ROW])
PLAIN = (int, float, complex, bool, str, bytes, type(...), torch.dtype, torch.device, torch.Size)


def kind_of(value: Any) -> Fact:
    """The kind of a value that exists before the loop."""
    if value is None:
        return Kind.NONE
    if isinstance(value, Tensor):
        return Kind.ROW
    if isinstance(value, PLAIN):
        return Kind.FIXED
    if hasattr(value, "get_seq_length"):
        return Known(value) if isinstance(value, type) else Kind.CACHE
    if isinstance(value, list | tuple | dict | set) or inspect.isgenerator(value):
        return Kind.UNKNOWN
    return Known(value)


def joined_kind(one: Fact, other: Fact) -> Fact:
    """What is known of a value that is one or the other."""
    if one == other:
        return one
    kinds = {one, other}
    for kind in (Kind.UNKNOWN, Kind.CACHE, Kind.CHOICE, Kind.LIST):
        if kind in kinds:
            return kind if kinds - {kind} <= {Kind.NONE} else Kind.UNKNOWN
    if any(isinstance(kind, Known) for kind in kinds):
        return Kind.UNKNOWN
    tensors = kinds & TENSORS
    if tensors:
        return tensors.pop() if len(tensors) == 1 and kinds - TENSORS <= {Kind.NONE} else Kind.TENSOR
    return next(kind for kind in (Kind.COUNT, Kind.SIZE, Kind.FIXED) if kind in kinds)


def changing(kind: Fact) -> Fact:
    """A variable that a loop assigns, at the beginning of an iteration."""
    if kind is Kind.ROW:
        return Kind.TENSOR
    if isinstance(kind, Known) or kind is Kind.CHOICE:
        return Kind.UNKNOWN
    return Kind.COUNT if kind in (Kind.FIXED, Kind.SIZE) else kind


def handed_on(before: Fact, after: Fact) -> Fact:
    """A variable at the beginning of an iteration: as it was before the loop, or as the last iteration left it."""
    if before is Kind.COUNT and after in (*TENSORS, Kind.CACHE):
        return changing(after)  # a None at first; that the first iteration differs is seen
    return joined_kind(before, changing(after))


def in_words(kind: Fact) -> str:
    if isinstance(kind, Known):
        return f"{getattr(kind.value, '__name__', type(kind.value).__name__)}"
    return kind.value
