"""The options of a compilation: the same names in torch.compile, in @decode and in generate."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from smc_compile.errors import OptionError

RESAMPLING_METHODS = ("systematic", "stratified", "multinomial", "residual")
METHODS = ("smc", "autoregressive", "speculative", "auto")
INDUCTORS = ("inductor", "max-autotune")
COMPILERS = (*INDUCTORS, "aot_eager", "eager")
AUTO = "auto"
PARTICLES, CHAINS, LOOKAHEAD = 8, 1, 6  # where none are given
ESS_THRESHOLD = 0.75
MAX_KL = 0.02  # nats a token, for "auto"
OF_A_METHOD = ("n_particles", "lookahead", "ess_floor", "time_budget")  # who gives one of them has chosen SMC
MAX_DIVERGENCE = 0.35  # total variation, for "auto": a net for where a draft is confidently wrong


@dataclass(frozen=True)
class Options:
    """What a user may set.

    Attributes:
        draft: the draft model, ``ids [B, S] -> logits [B, S, V]``, or one that follows the step protocol.
        n_particles: N, particles per request; for "speculative" the chains that are drafted and tried in turn. "auto"
            chooses for "smc" when the program is first called, by the floors below (see ``smc_compile.auto.choice``).
            None: 8, with "speculative" 1, with "auto" what it chooses.
        lookahead: K, draft tokens per cycle; a cycle commits K+1 tokens ("speculative": 1 to K+1). "auto" chooses it.
            None: 6, with "auto" what it chooses.
        ess_floor: for "auto": effective particles that must be left at the end of a cycle.
        max_kl_per_token: nats a token by which the law of the texts may differ from the target's (see
            ``Generation.kl_bound``): what ``method="auto"`` keeps to, 0.02 where it is None, and a floor for "auto" N.
        time_budget: for "auto": milliseconds that a token of a request may take, prefill apart.
        max_divergence: end a block before the token at which draft and target part by more: the total variation
            distance, averaged over the particles (see ``runtime/execution/cuts.py``). 1 never does. Models that carry
            a state of their own cannot forget a token: they take 1 alone. None: 1, with ``method="auto"`` 0.35.
        ess_threshold: resample when the effective sample size falls below this share of N (0 never, 1 nearly always).
        resampling_method: "systematic", "stratified", "multinomial" or "residual".
        method: "smc"; "autoregressive" for the exact cached one-token loop; "speculative" for exact rejection
            sampling; "auto" for the fastest of these that keeps to ``max_kl_per_token``, which may change between
            "smc" and "speculative" within a text. Greedy loops under "smc" and "auto" run as "speculative" with a
            draft, else as "autoregressive". None: "smc" where n_particles, lookahead, ess_floor or time_budget is
            given, else "auto", or "smc" for models that cannot forget a token (``smc_compile.program.method``).
        eos_token_id: a sequence ends after this token; later tokens repeat it. None: no end of sequence.
        seed: 64-bit seed; request b of a batch uses seed + b. None draws one from torch's generator at each call.
        validate: compare the cached model with the original when compiling.
        cuda_graph: on a GPU, record a cycle ("speculative" apart) as one CUDA graph and replay it. Cycles in which text
            processors or stops run on the host are not recorded; with False none is.
        compiler: what lowers the regions: "inductor"; "max-autotune", Inductor that times several kernels for each
            product and keeps the fastest (minutes of compilation); or "aot_eager" and "eager" for debugging.
    """

    draft: Any = None
    n_particles: int | str = None  # type: ignore[assignment]  # never None once it is made
    lookahead: int | str = None  # type: ignore[assignment]
    ess_floor: float | None = None
    max_kl_per_token: float | None = None
    time_budget: float | None = None
    max_divergence: float = None  # type: ignore[assignment]
    ess_threshold: float = ESS_THRESHOLD
    resampling_method: str = "systematic"
    method: str = None  # type: ignore[assignment]
    eos_token_id: int | None = None
    seed: int | None = None
    validate: bool = True
    cuda_graph: bool = True
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        """Put numbers, or "auto", in the place of what was not given; all of it waits where the method is open."""
        if self.method is None:
            if all(getattr(self, name) is None for name in OF_A_METHOD):
                return
            object.__setattr__(self, "method", "smc")
        usual = {
            "n_particles": {"auto": AUTO, "speculative": CHAINS}.get(str(self.method), PARTICLES),
            "lookahead": AUTO if self.method == AUTO else LOOKAHEAD,
            "max_divergence": MAX_DIVERGENCE if self.method == AUTO else 1.0,
            "max_kl_per_token": MAX_KL if self.method == AUTO else None,
        }
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [field.name for field in fields(cls)]

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Check and build. Raises OptionError with the list of valid names and the nearest one."""
        given = dict(given or {})
        names = cls.names()
        for key in given:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1)
                raise OptionError(
                    f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                    f"valid options are {', '.join(names)}",
                    f"replace {key!r}" + (f" by {near[0]!r}" if near else " or leave it out"),
                )
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        for name in ("n_particles", "lookahead"):
            if getattr(self, name) not in (AUTO, None):
                _integer(name, getattr(self, name), 1, f'pass {name}=8 or {name}="{AUTO}"')
        if self.max_divergence is not None:
            _number("max_divergence", self.max_divergence, 0.0, 1.0)
        _number("ess_threshold", self.ess_threshold, 0.0, 1.0)
        _choice("resampling_method", self.resampling_method, RESAMPLING_METHODS)
        if self.method is not None:
            _choice("method", self.method, METHODS)
        _choice("compiler", self.compiler, COMPILERS)
        self._check_auto()
        if self.eos_token_id is not None:
            _integer("eos_token_id", self.eos_token_id, 0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63))
            if self.seed >= 2**63:
                raise OptionError("seed is too large", f"got {self.seed}", "use a signed 64-bit integer")
        for name in ("validate", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False", f"got {getattr(self, name)!r}")
        if self.draft is not None and not isinstance(self.draft, nn.Module) and not is_stateful(self.draft):
            raise OptionError(
                "draft must be a model",
                f"got {type(self.draft).__name__}",
                "pass an nn.Module mapping ids [B, S] to logits [B, S, V], or an object with step and initial_state",
            )

    @property
    def is_auto(self) -> bool:
        """Whether N or K is still to be chosen."""
        return AUTO in (self.n_particles, self.lookahead)

    def _check_auto(self) -> None:
        floors = [n for n in ("ess_floor", "max_kl_per_token", "time_budget") if getattr(self, n) is not None]
        for name in floors:
            _number(name, getattr(self, name), 0.0 if name == "max_kl_per_token" else 1e-6, 1e6)
        if self.method in (AUTO, None):
            if others := [name for name in floors if name != "max_kl_per_token"]:
                raise OptionError(
                    f'{others[0]} is not for method="auto"',
                    "it takes the fastest way that keeps to max_kl_per_token",
                    f'leave it out, or pass method="smc" and n_particles="auto" with {others[0]}',
                )
            return
        if floors and not self.is_auto:
            raise OptionError(
                f"{floors[0]} has no effect",
                "it bounds what is chosen, and n_particles and lookahead are both given",
                'pass lookahead="auto" or n_particles="auto", or leave it out',
            )
        poor = [name for name in floors if name != "time_budget"]
        if self.method == "speculative" and (self.n_particles == AUTO or poor):
            name = 'n_particles="auto"' if self.n_particles == AUTO else poor[0]
            raise OptionError(
                f'{name} is for method="smc"',
                "exact rejection sampling carries no weights: more chains cost time and change no distribution",
                'give n_particles as a number (1 is one chain), and choose the lookahead with "auto"',
            )
        if self.n_particles == AUTO and not floors:
            raise OptionError(
                'n_particles="auto" needs to know how good the answer must be',
                "fewer particles are always faster, and always worse",
                "pass max_kl_per_token=0.02 (nats), ess_floor=4 (effective particles at the end of a cycle) or "
                'time_budget=20 (milliseconds a token), or method="auto"',
            )


def option_parameters(names: Mapping[str, str]) -> list[inspect.Parameter]:
    """Options as keyword arguments of a function: ``names`` has those that are wanted, and how each is called there."""
    return [
        inspect.Parameter(names[f.name], inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Options)
        if f.name in names
    ]


def is_stateful(model: Any) -> bool:
    """Whether a model follows the explicit protocol ``step(tokens, pos, state)`` with ``initial_state(batch)``."""
    return callable(getattr(model, "step", None)) and callable(getattr(model, "initial_state", None))


def _integer(name: str, value: Any, low: int, fix: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        why = f"got {value!r} of type {type(value).__name__}"
        raise OptionError(f"{name} must be an integer", why, fix or f"pass {name}=8")
    if value < low:
        raise OptionError(f"{name} must be at least {low}", f"got {value}", f"raise {name}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name} must be a number", f"got {value!r} of type {type(value).__name__}")
    if not low <= value <= high:
        raise OptionError(f"{name} must lie between {low:g} and {high:g}", f"got {value}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        raise OptionError(
            f"{name} {value!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else ""),
            f"valid values are {', '.join(allowed)}",
        )
