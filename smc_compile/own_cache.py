"""A model's own cache object as the state that particles permute: for models whose cache the compiler cannot derive.

Recurrent and hybrid models mix positions in ways of their own, but come with a cache. Nothing is assumed about it
except that the forward takes it and returns it under one name. Its tensors are found by walking it; what the walk finds
is then checked against the model without a cache, in the model's own precision, before anything is generated.
"""

from __future__ import annotations

import inspect
import io
import pickle
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import CacheError
from smc_compile.passes.closeness import allowed_error, coarsest_dtype, relative_error

# What is no tensor, pickled [R, bytes] uint8; then the tensors of the cache, rows first.
PackedCache = tuple[Tensor, list[Tensor]]
KNOWN = ("past_key_values", "cache_params", "cache", "state")  # where the result is a tuple (logits, cache)
PROMPT, BLOCKS = 5, (3, 2)  # lengths of the check at construction
NEAR = 1.25  # blocks may be so many times further from the model than single tokens
FINEST = 1e-6  # models compute parts of a float64 pass in float32
HELD = (nn.Module, types.FunctionType, types.BuiltinFunctionType, types.MethodType, torch.Generator)


class OwnCache(nn.Module):
    """``model`` behind the step protocol, with the cache it makes itself as the state.

    Attributes:
        model: the wrapped model; its weights are read at every call.
        cache_name: the parameter of its forward that takes the cache, and the field of its result that returns it.
        positions: whether the forward is given the positions of its tokens (``position_ids``). Some models count from
            0 at every call without them.
        blocks: whether several tokens may be fed at once to a cache that is not empty; else they go one by one.
        error: largest relative difference of the logits with and without the cache, measured at construction.
        traceable: a cache of Python objects is not traced, so the regions of a session leave the step to Python.
    """

    traceable = False
    one_length = True  # the cache counts the same tokens for every row

    def __init__(self, model: nn.Module, make_cache: Callable[[], Any] | None = None) -> None:
        """Find the cache, and which axis of its tensors counts rows, and check what comes out.

        Args:
            model: ``ids [B, S]`` to logits, or an object that holds them; its forward takes a cache and returns it.
            make_cache: makes an empty cache, for a forward that takes one and fills it in place but returns none.

        Raises:
            CacheError: when the model has no cache, or its logits with the cache are not those without it.
        """
        super().__init__()
        self.model = model
        self._make_cache = make_cache
        self.cache_name = _cache_name(model, make_cache is not None)
        self._options = {"use_cache": True} if "use_cache" in _parameters(model) else {}
        self._held: dict[int, Any] = {}
        self._row_axes: list[int] | None = None
        self.blocks = self.positions = False
        with torch.no_grad():
            self._row_axes = self._find_row_axes()
            self.error = self._check()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] without the cache."""
        options = {"use_cache": False} if self._options else {}
        return _logits(self.model(ids, **options))

    def initial_state(self, batch: int) -> PackedCache:
        """No tensors yet: the model makes them when it sees the prompt."""
        return self._pack(self._make_cache() if self._make_cache else None, batch, is_empty=True)

    @torch._dynamo.disable
    @torch.no_grad()
    def step(self, tokens: Tensor, pos: Any, state: PackedCache) -> tuple[Tensor, PackedCache]:
        """Logits [R, T, V] of ``tokens`` [R, T] after ``state``, and the state after them; ``state`` is not changed."""
        cache, is_empty = self._unpack(state), not state[1]
        pieces = (tokens,) if is_empty or self.blocks else tokens.split(1, 1)
        logits = []
        for piece in pieces:
            rows, cache = self._run(piece, cache, pos)
            logits.append(rows)
            pos = pos + piece.shape[1]
        return torch.cat(logits, 1), self._pack(cache, tokens.shape[0])

    def _run(self, tokens: Tensor, cache: Any, pos: Any) -> tuple[Tensor, Any]:
        given = {} if cache is None else {self.cache_name: cache}
        if self.positions:
            given["position_ids"] = (pos + torch.arange(tokens.shape[1], device=tokens.device)).expand(tokens.shape)
        result = self.model(tokens, **given, **self._options)
        logits = _logits(result)
        if logits.shape[:2] != tokens.shape:
            raise _refusal(
                "the model's own cache does not reproduce the model",
                f"logits of shape {tuple(logits.shape)} came out for tokens of shape {tuple(tokens.shape)}",
            )
        new = result[1] if isinstance(result, tuple) else getattr(result, self.cache_name, None)
        return logits, cache if new is None else new

    # ---- the state as tensors -----------------------------------------------------------------------------------

    def _pack(self, cache: Any, rows: int, is_empty: bool = False) -> PackedCache:
        """A cache as tensors with rows first; what is no tensor, or has no rows, is the same for all rows."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, self._held, apart=not is_empty)
        try:
            pickler.dump(cache)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise _refusal("the model's cache holds an object that cannot be copied", str(error)) from error
        axes = [0] * len(pickler.tensors) if self._row_axes is None else self._row_axes
        if not is_empty and len(axes) != len(pickler.tensors):
            raise _refusal(
                "the model's cache changes its layout as text grows",
                f"{len(axes)} tensors after a prompt, {len(pickler.tensors)} now",
            )
        rest = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        device = pickler.tensors[0].device if pickler.tensors else "cpu"
        leaves = [
            (leaf[None].expand(rows, *leaf.shape) if axis < 0 else leaf.movedim(axis, 0)).contiguous()
            for leaf, axis in zip(pickler.tensors, axes, strict=False)
        ]
        return rest.to(device).repeat(rows, 1), leaves

    def _unpack(self, state: PackedCache) -> Any:
        """The cache that a state stands for, with tensors of its own: models write into them."""
        rest, leaves = state
        axes = self._row_axes or [0] * len(leaves)
        tensors = [
            leaf[0].clone() if axis < 0 else leaf.clone().movedim(0, axis)
            for leaf, axis in zip(leaves, axes, strict=False)
        ]
        return _Unpickler(io.BytesIO(rest[0].cpu().numpy().tobytes()), self._held, tensors).load()

    # ---- checked at construction -------------------------------------------------------------------------------------

    def _tokens(self, rows: int, length: int) -> Tensor:
        """Random text [rows, length] without padding tokens: some models count positions by what is no padding."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        one = torch.ones(1, 1, dtype=torch.int64, device=device)
        vocabulary = _logits(self.model(one, **self._options)).shape[-1]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return ids if padding is None else torch.where(ids == padding, (padding + 1) % vocabulary, ids)

    def _find_row_axes(self) -> list[int]:
        """For each tensor of the cache the axis whose size is the number of rows, -1 for none: two batches compared."""
        found = [self._sizes(rows) for rows in (2, 3)]
        if len(found[0]) != len(found[1]):
            raise _refusal("the layout of the model's cache depends on the batch", f"{found[0]} and {found[1]}")
        return [_differing_axis(two, three) for two, three in zip(*found, strict=True)]

    def _sizes(self, rows: int) -> list[tuple[int, ...]]:
        """Sizes of the cache's tensors after a prompt of ``rows`` rows."""
        cache = self._unpack(self.initial_state(rows))
        _, cache = self._run(self._tokens(rows, PROMPT), cache, 0)
        pickler = _Pickler(io.BytesIO(), self._held)
        pickler.dump(cache)
        return [tuple(tensor.shape) for tensor in pickler.tensors]

    def _check(self) -> float:
        """Logits with the cache against those without; sets ``blocks``; returns the largest relative difference."""
        total = PROMPT + sum(BLOCKS)
        ids = self._tokens(2, total)
        expected = self(ids)
        tolerance = max(allowed_error(coarsest_dtype([*self.model.parameters(), expected])), FINEST)
        singly = float("inf")
        for given in (True, False) if "position_ids" in _parameters(self.model) else (False,):
            self.positions = given
            singly = max(
                relative_error(self._replay(ids, [length] + [1] * (total - length)), expected)
                for length in (1, 2, PROMPT)
            )
            if singly <= tolerance:
                break
        if not singly <= tolerance:
            raise _refusal(
                "the model's own cache does not reproduce the model",
                f"largest relative difference {singly:.2e} one by one, allowed {tolerance:.0e} over {total} positions",
            )
        together = self._check_blocks(ids, expected, tolerance)
        permuted = self._check_rows(ids, tolerance)
        return max(singly, together if self.blocks else 0.0, permuted)

    def _check_blocks(self, ids: Tensor, expected: Tensor, tolerance: float) -> float:
        """Sets ``blocks``: blocks must be as near to the model as single tokens are, or they go one by one.

        The tolerance of a narrow type alone would let a block pass that reads a part of the state only.
        """
        single = self._replay(ids, [PROMPT] + [1] * sum(BLOCKS))
        self.blocks = True
        try:
            block = self._replay(ids, [PROMPT, *BLOCKS])
        except Exception:  # a model that takes one token at a time may fail in any way on more
            self.blocks = False
            return float("inf")
        noise, distance = ((x - expected)[:, PROMPT:].double().square().mean().sqrt() for x in (single, block))
        spread, error = expected.double().std(), relative_error(block, expected)
        self.blocks = error <= tolerance and bool(distance <= NEAR * noise + FINEST * spread)
        return error

    def _replay(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits [B, S, V] of ``ids`` fed in blocks of ``lengths``."""
        state, logits, start = self.initial_state(ids.shape[0]), [], 0
        for length in lengths:
            rows, state = self.step(ids[:, start : start + length], start, state)
            logits.append(rows)
            start += length
        return torch.cat(logits, 1)

    def _check_rows(self, ids: Tensor, tolerance: float) -> float:
        """Check that the model keeps nothing outside of the state; returns the largest relative difference.

        A step that is repeated must give the same logits, and one whose state's rows are exchanged the exchanged ones.
        """
        (rest, leaves), swapped = self.step(ids[:, :PROMPT], 0, self.initial_state(2))[1], ids.flip(0)
        later = ids[:, PROMPT : PROMPT + 1]
        first, _ = self.step(later, PROMPT, (rest, leaves))
        again, _ = self.step(later, PROMPT, (rest, leaves))
        other, _ = self.step(swapped[:, PROMPT : PROMPT + 1], PROMPT, (rest, [leaf.flip(0) for leaf in leaves]))
        error = max(relative_error(again, first), relative_error(other.flip(0), first))
        if not error <= tolerance:
            raise _refusal(
                "the model keeps a part of its state outside its cache",
                f"a step repeated, or with its rows exchanged, gives other logits: relative difference {error:.2e}",
            )
        return error


class _Pickler(pickle.Pickler):
    """Writes an object; tensors ``apart`` are collected, not written; modules and functions are kept by reference."""

    def __init__(self, file: Any, held: dict[int, Any], apart: bool = True) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._apart = apart
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._held = held

    def persistent_id(self, obj: Any) -> tuple[str, int] | None:
        if isinstance(obj, Tensor) and self._apart:
            if id(obj) not in self._places:
                self._places[id(obj)] = len(self.tensors)
                self.tensors.append(obj.detach())
            return ("tensor", self._places[id(obj)])
        if isinstance(obj, HELD):
            self._held[id(obj)] = obj
            return ("held", id(obj))
        return None


class _Unpickler(pickle.Unpickler):
    """Reads what ``_Pickler`` wrote, with other tensors in place of those it collected."""

    def __init__(self, file: Any, held: dict[int, Any], tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._held, self._tensors = held, tensors

    def persistent_load(self, pid: tuple[str, int]) -> Any:
        kind, at = pid
        return self._tensors[at] if kind == "tensor" else self._held[at]


def _parameters(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a forward without a signature
        return []


def _cache_name(model: nn.Module, is_given: bool) -> str:
    """The name under which the forward takes a cache, and returns it if none ``is_given``.

    Raises:
        CacheError: when there is none.
    """
    names = _parameters(model)
    known = [name for name in KNOWN if name in names]
    if is_given and known:
        return known[0]
    options = {"use_cache": True} if "use_cache" in names else {}
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        result = model(torch.ones(1, 2, dtype=torch.int64, device=place), **options)
    if isinstance(result, tuple):
        found = known if len(result) == 2 else []
    else:
        found = [name for name in names if getattr(result, name, None) is not None and name != "logits"]
    if len(found) == 1:
        return found[0]
    what = f"takes and returns {', '.join(found)}" if found else "takes no value that it also returns"
    raise _refusal("the model has no cache of its own that could be found", f"{type(model).__name__}.forward {what}")


def _logits(result: Any) -> Tensor:
    if isinstance(result, tuple):
        return result[0]
    return result if isinstance(result, Tensor) else result.logits


def _differing_axis(two: tuple[int, ...], three: tuple[int, ...]) -> int:
    """The axis of a tensor that counts rows: 2 with two rows, 3 with three; -1 where all sizes agree."""
    changed = [i for i, sizes in enumerate(zip(two, three, strict=True)) if sizes[0] != sizes[1]]
    if not changed:
        return -1
    if len(changed) > 1 or (two[changed[0]], three[changed[0]]) != (2, 3):
        raise _refusal("a tensor of the model's cache has no axis of rows", f"{two} with two rows, {three} with three")
    return changed[0]


def _refusal(what: str, why: str) -> CacheError:
    return CacheError(
        what, why, "write the step protocol: step(tokens, pos, state) -> (logits, state), initial_state(batch)"
    )
