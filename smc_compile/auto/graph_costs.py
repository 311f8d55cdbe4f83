"""What a pass of a cached model costs, as sympy expressions in its sizes: operations, bytes, kernels.

A graph is run on tensors without data (device "meta") at a few sizes, and every number that its kernels are made of is
interpolated: they are sums of products of the sizes (``TERMS``), and what is not is refused at sizes held back.

What a compiler fuses is approximated. Element-wise operations and reads by index (embeddings, tables) are computed
where they are used; a value is written where a product, a reduction or an operation of its own kind makes it or reads
it, and at the end. A kernel reads each of its operands once. Views cost nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smc_compile.errors import CacheError
from smc_compile.passes.ir import CachedLM

B, N, T, P, S = SYMBOLS = sympy.symbols("B N T P S", positive=True, integer=True)  # requests, particles, tokens, ...
KINDS = ("weights", "prompts", "suffixes", "activations")  # of what is read and written
META = torch.device("meta")
TERMS = ((sympy.Integer(1), B, B * N), (sympy.Integer(1), T), (sympy.Integer(1), P, S))  # numbers are sums of products
POINTS = (((2, 3), (2, 4), (3, 3)), ((4,), (5,)), ((7, 9), (8, 9), (7, 10)))  # sizes that tell them apart
HELD_BACK = ((4, 6, 7, 17, 11), (5, 2, 9, 10, 21))
TABLE_LENGTH = 32
INLINED = 4  # an expression of more tensors in memory is written down, so that none grows along the layers

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
ATTEND = "attend"  # smc_compile.kernels.attend
REDUCTIONS = {
    "sum", "mean", "amax", "amin", "any", "all", "argmax", "argmin", "max", "min", "prod", "var", "var_mean", "std",
    "_softmax", "_log_softmax", "logsumexp", "native_layer_norm", "native_group_norm", "linalg_vector_norm", "norm",
    "_fused_rms_norm",
}  # fmt: skip
READS = {"embedding", "index", "gather", "index_select", "take_along_dim"}  # some entries of the first operand
WRITES = {"index_copy_", "index_put_", "scatter_", "copy_"}  # the last tensor into some entries of the first
INLINE = {"cat", "stack", "where", "masked_fill", "_to_copy", "clone", "constant_pad_nd", "flip", "roll", "tril",
          "triu", "repeat", "one_hot", "lift_fresh_copy"}  # fmt: skip  # as element-wise ones
FILLS = ("new_", "empty", "full", "zeros", "ones")  # how names begin that only take the shape of what they are given


@dataclass(frozen=True)
class PassSizes:
    """Of a pass: requests B, particles N, new tokens T of each, positions P of a prompt and S of a suffix."""

    batch: int
    particles: int
    tokens: int
    prompt: int
    suffix: int

    @property
    def rows(self) -> int:
        return self.batch * self.particles


@dataclass(frozen=True)
class Kernel:
    """Kernels that are alike; each expression is of one of them.

    Attributes:
        kind: "linear" (rows times a weight), "attention" (scores, softmax and mix at once), "batched" (many small
            products: attention written as such) or "other".
        rows: of a linear product, else 0.
        operations: of products: a multiplication and an addition are two.
        bytes: read and written, by what they belong to (``KINDS``).
    """

    kind: str
    count: int
    rows: sympy.Expr
    operations: sympy.Expr
    bytes: dict[str, sympy.Expr]

    @property
    def weight_bytes(self) -> int:
        return int(self.bytes["weights"]) if self.kind == "linear" else 0


@dataclass(frozen=True)
class Costs:
    """Of one pass over B requests."""

    kernels: tuple[Kernel, ...]

    @property
    def operations(self) -> sympy.Expr:
        """Of matrix products, attention's included."""
        return sympy.expand(sum((k.count * k.operations for k in self.kernels), sympy.Integer(0)))

    def bytes(self, *kinds: str) -> sympy.Expr:
        """Read and written, of all ``KINDS`` or of some."""
        chosen = kinds or KINDS
        return sympy.expand(sum((k.count * k.bytes[kind] for k in self.kernels for kind in chosen), sympy.Integer(0)))

    @property
    def launches(self) -> int:
        """Kernels that remain after fusion, roughly."""
        return sum(k.count for k in self.kernels)


# (rows of logits, the sizes) -> what the region makes of them
Tail = Callable[[Tensor, PassSizes], Any]


def pass_costs(cached: CachedLM, weights: Sequence[Tensor], every_position: bool, tail: Tail | None = None) -> Costs:
    """Costs of ``cached.score`` (``every_position``) or ``cached.advance``, and of ``tail`` on the rows it gives.

    Raises:
        CacheError: when the graph does not run without data, or a size is no polynomial in B, N, T, P, S.
    """
    graph = _counted(cached.score if every_position else cached.advance)
    light = [w.detach().to(META) for w in weights]
    tables = _run(cached.tables, min(TABLE_LENGTH, cached.max_positions or TABLE_LENGTH), *light)

    def run(sizes: PassSizes) -> list[_Record]:
        tokens, places, prompts, suffixes = _inputs(cached, sizes)
        sized = [
            table.new_empty([sizes.prompt + sizes.suffix if d in axes else n for d, n in enumerate(table.shape)])
            for table, axes in zip(tables, cached.table_axes, strict=True)
        ]
        recorder = _Recorder(weights=light, prompts=prompts, suffixes=suffixes)
        with torch.no_grad(), recorder:
            rows = graph(recorder, tokens, *places, *prompts, *suffixes, *sized, *light)
            result = rows if tail is None else tail(rows, sizes)
        recorder.finish(result)
        return recorder.records

    return interpolate(run)


def _inputs(cached: CachedLM, z: PassSizes) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Tokens, places, prompts and suffixes as CachedLM documents them."""

    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=META)

    def cache(rows: int, length: int) -> list[Tensor]:
        return [torch.empty(rows, c.heads, length, c.width, dtype=c.dtype, device=META) for c in cached.sites]

    places = [ids(z.batch, z.tokens), ids(z.batch, z.tokens), ids(z.batch, z.prompt + z.suffix)]
    return ids(z.rows, z.tokens), places, cache(z.batch, z.prompt), cache(z.rows, z.suffix)


# ---- running without data -------------------------------------------------------------------------------------------


class _WithoutData(fx.Interpreter):
    """Runs a graph on the device "meta", whatever devices it names."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: META, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to(META) if isinstance(value, Tensor) else value


def _run(graph: Any, *arguments: Any) -> Any:
    try:
        return _WithoutData(graph).run(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        raise CacheError(
            "the cost of this model cannot be counted",
            f"its graph does not run on tensors without data: {str(error).strip().splitlines()[0]}",
            "give n_particles and lookahead as numbers",
        ) from error


def _counted(graph: Any) -> Callable[..., Any]:
    """The graph as a function of a recorder and its inputs; of repeated layers one runs for all."""
    if not hasattr(graph, "with_pieces"):
        return lambda recorder, *arguments: _run(graph, *arguments)

    def run(recorder: _Recorder, *arguments: Any) -> Any:
        head, layer, tail = graph.pieces
        once = recorder.repeated(lambda *inputs: _run(layer, *inputs))
        return graph.with_pieces((lambda *i: _run(head, *i), once, lambda *i: _run(tail, *i)))(*arguments)

    return run


@dataclass
class _Value:
    """What a storage holds: in memory, or an expression over values that are."""

    kind: str
    size: int  # bytes
    reads: dict[int, int] | None = None  # storage -> bytes; None: in memory


@dataclass
class _Record:
    """One kernel at one size. ``numbers``: rows, operations, and bytes by kind."""

    name: str
    kind: str
    numbers: list[int]
    count: int = 1


@dataclass
class _Recorder(TorchDispatchMode):
    """Every operation that reaches the dispatcher, sorted into kernels. Storages are told apart by their address."""

    weights: Sequence[Tensor]
    prompts: Sequence[Tensor]
    suffixes: Sequence[Tensor]
    records: list[_Record] = field(default_factory=list)
    _values: dict[int, _Value] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)  # an address must not be given away twice

    def __post_init__(self) -> None:
        super().__init__()
        for kind in KINDS[:3]:
            for tensor in getattr(self, kind):
                self._hold(tensor, _Value(kind, _size(tensor)))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        outputs = list(_tensors(result))
        inputs = [*_tensors(args), *_tensors((kwargs or {}).values())]
        if outputs:
            self._note(op, op._schema.name.partition("::")[2], inputs, outputs)
        return result

    def repeated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A wrapper of which only the first call runs; later ones return its result and add its costs again."""
        done: list[Any] = []

        def run(*inputs: Any) -> Any:
            if not done:
                start = len(self.records)
                done.extend((function(*inputs), self.records[start:]))
            else:
                for record in done[1]:
                    record.count += 1
            return done[0]

        return run

    def finish(self, result: Any) -> None:
        """What is returned must be in memory."""
        for tensor in _tensors(result):
            self._materialise(tensor)

    # -- what an operation is ----------------------------------------------------------------------------------------

    def _note(self, op: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for tensor in inputs:
            if _storage(tensor) not in self._values:  # an input of the pass that is no weight and no cache
                self._hold(tensor, _Value("activations", _size(tensor)))
        held = {_storage(t) for t in inputs}
        if name in WRITES:
            self._write(name, inputs)
        elif name in PRODUCTS:
            self._product(name, inputs, outputs[0])
        elif name == ATTEND:
            self._attend(name, inputs, outputs[0])
        elif name in REDUCTIONS:
            self._kernel(name, "other", self._reads(inputs), outputs)
        elif name in READS:
            self._inline(outputs, {**self._reads(inputs[1:]), **self._reads(inputs[:1], _size(outputs[0]))})
        elif name.startswith(FILLS):
            self._inline(outputs, {})
        elif not inputs or torch.Tag.pointwise in op.tags or name in INLINE:
            self._inline(outputs, self._reads(inputs))
        elif not all(_storage(t) in held for t in outputs):  # else a view
            for tensor in inputs:
                self._materialise(tensor)
            self._kernel(name, "other", self._reads(inputs), outputs)

    def _inline(self, outputs: list[Tensor], reads: dict[int, int]) -> None:
        for tensor in outputs:
            self._hold(tensor, _Value("activations", _size(tensor), reads))
            if len(reads) > INLINED:
                self._materialise(tensor)

    def _write(self, name: str, inputs: list[Tensor]) -> None:
        into, new = inputs[0], inputs[-1]
        self._materialise(into)
        reads = self._reads(inputs[1:])
        self._record(name, "other", reads, {_storage(into): _size(new)})

    def _product(self, name: str, inputs: list[Tensor], out: Tensor) -> None:
        left, right = inputs[-2:]
        for tensor in inputs:
            self._materialise(tensor)
        held = self._values[_storage(right)]
        linear = held.kind == "weights"
        operations = 2 * out.numel() * left.shape[-1]
        # How often each number of the weight is used: a weight may come expanded, or as one for each expert.
        rows = operations * right.itemsize // (2 * min(_size(right), held.size)) if linear else 0
        self._kernel(name, "linear" if linear else "batched", self._reads(inputs), [out], rows, operations)

    def _attend(self, name: str, inputs: list[Tensor], out: Tensor) -> None:
        query, hidden = inputs[0], inputs[-1]
        for tensor in inputs:
            self._materialise(tensor)
        operations = 2 * (query.numel() + out.numel()) * hidden.shape[-1]  # each of [R, H, G, T] with each key
        self._kernel(name, "attention", self._reads(inputs), [out], 0, operations)

    # -- kernels -----------------------------------------------------------------------------------------------------

    def _kernel(
        self, name: str, kind: str, reads: dict[int, int], outputs: list[Tensor], rows: int = 0, operations: int = 0
    ) -> None:
        for tensor in outputs:
            self._hold(tensor, _Value("activations", _size(tensor)))
        self._record(name, kind, reads, {_storage(t): _size(t) for t in outputs}, rows, operations)

    def _record(
        self, name: str, kind: str, reads: dict[int, int], writes: dict[int, int], rows: int = 0, operations: int = 0
    ) -> None:
        moved = Counter[str]()
        for traffic in (reads, writes):
            for storage, size in traffic.items():
                moved[self._values[storage].kind] += size
        self.records.append(_Record(name, kind, [rows, operations, *(moved[kind] for kind in KINDS)]))

    def _materialise(self, tensor: Tensor) -> None:
        value = self._values[_storage(tensor)]
        if value.reads is None:
            return
        reads, value.reads = value.reads, None
        self._record("elementwise", "other", reads, {_storage(tensor): value.size})

    def _reads(self, tensors: Sequence[Tensor], size: int | None = None) -> dict[int, int]:
        """Bytes of each storage in memory that these need; ``size`` where only some entries are read."""
        found: dict[int, int] = {}
        for tensor in tensors:
            storage = _storage(tensor)
            value = self._values[storage]
            read = min(_size(tensor), value.size) if size is None else size
            for source, count in ({storage: read} if value.reads is None else value.reads).items():
                found[source] = max(found.get(source, 0), count)
        return found

    def _hold(self, tensor: Tensor, value: _Value) -> None:
        self._alive.append(tensor.untyped_storage())
        self._values[_storage(tensor)] = value


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


# ---- interpolation --------------------------------------------------------------------------------------------------


def interpolate(run: Callable[[PassSizes], list[_Record]]) -> Costs:
    """The kernels that ``run`` records at any size, from those at a few; checked at others.

    Raises:
        CacheError: when the kernels differ between sizes, or their numbers are no such sums.
    """
    basis = [sympy.Mul(*terms) for terms in itertools.product(*TERMS)]
    points = [sum(parts, ()) for parts in itertools.product(*POINTS)]
    runs = [run(PassSizes(*point)) for point in (*points, *HELD_BACK)]
    first = runs[0]
    if any([(r.name, r.count) for r in other] != [(r.name, r.count) for r in first] for other in runs[1:]):
        raise _not_polynomial("which kernels run depends on the sizes")
    values = np.array([[record.numbers for record in records] for records in runs], dtype=object)
    known, others = values[: len(points)], values[len(points) :]  # [points, records, 6]
    at = sympy.lambdify(SYMBOLS, basis, "math")
    inverse = sympy.Matrix([at(*point) for point in points]).inv()
    coefficients = np.tensordot(np.array(inverse.tolist()), known, 1)  # [terms, records, 6]
    for point, found in zip(HELD_BACK, others, strict=True):
        if (np.tensordot(np.array(at(*point), dtype=object), coefficients, 1) != found).any():
            raise _not_polynomial("a size of a tensor is no sum of products of B or B*N, T, and P or S")
    groups = Counter[tuple[Any, ...]]()
    for i, record in enumerate(first):
        groups[record.kind, tuple(map(tuple, coefficients[:, i].T))] += record.count
    return Costs(tuple(_kernel(kind, numbers, count, basis) for (kind, numbers), count in groups.items()))


def _kernel(kind: str, numbers: Sequence[Sequence[Any]], count: int, basis: Sequence[sympy.Expr]) -> Kernel:
    rows, operations, *sizes = (sympy.Add(*(c * term for c, term in zip(row, basis, strict=True))) for row in numbers)
    return Kernel(kind, count, rows, operations, dict(zip(KINDS, sizes, strict=True)))


def _not_polynomial(why: str) -> CacheError:
    return CacheError(
        "the cost of this model cannot be counted", why, "give n_particles and lookahead as numbers, not as 'auto'"
    )
