r"""JSON texts of a schema as an automaton over bytes, where the schema cannot nest without end.

They are the texts that llguidance allows for the schema, written as ``json.dumps`` writes them: members in the order of
``properties``, ", " between members and items, ": " behind names. A schema must have one language, whoever reads it, so
that these are followed, too, though JSON Schema does not have them:

- Numbers with bounds have no exponents. Without bounds, or with two around it, -0 is an integer.
- Numbers of ``enum`` and ``const`` have one spelling, in decimals: 1.0 is 1, 1e-3 is 0.001.
- Names of ``properties`` have one spelling. In other strings, what must be escaped has all its escapes, and nothing
  else has one. Names of ``additionalProperties`` may come twice, and have the escapes of all characters, but these only
  beside names that are known.
- \d and \w of a pattern are those of ASCII, \s is that of Unicode.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache, reduce
from itertools import combinations
from typing import Any

import numpy as np

from smc_compile.control.byte_automata import ByteAutomaton, from_regex, from_texts, from_transitions, product
from smc_compile.errors import OptionError

MOST_STATES = 4096
MOST_PARTS = 2 * MOST_STATES  # of what an automaton is made from, before it is the least
EXACT, EXACT_POWER = 2**53, 22  # integers below, and powers of ten up to this one, are exact as floats


def json_language(schema: Mapping[str, Any] | bool) -> ByteAutomaton | None:
    """The texts of a JSON schema as an automaton.

    None where the schema has something that is not followed here: any JSON value, recursion, other keywords, more than
    ``MOST_STATES`` states; or where nothing fits it. A schema that llguidance refuses may still have an automaton.
    """
    try:
        piece = _Schemas(schema).piece(schema)
        language = None if piece is None else _automaton(piece)
    except (_NotFollowed, RecursionError, UnicodeEncodeError):  # what is no Unicode is no JSON
        return None
    return language if language is not None and len(language.successor) <= MOST_STATES else None


class _NotFollowed(Exception):
    """The schema has something that is not followed."""


class _States:
    """States that a text may be in at once: steps by byte, and states that are reached by no byte."""

    def __init__(self) -> None:
        self.steps: list[dict[int, int]] = []
        self.free: list[list[int]] = []

    def add(self, steps: dict[int, int] | None = None, free: Iterable[int] = ()) -> int:
        if len(self.steps) == MOST_PARTS:
            raise _NotFollowed
        self.steps.append(steps or {})
        self.free.append(list(free))
        return len(self.steps) - 1

    def reached(self, state: int) -> frozenset[int]:
        """The states with steps, and those that lead nowhere, that are reached by no byte."""
        found, todo = {state}, [state]
        while todo:
            fresh = [to for to in self.free[todo.pop()] if to not in found]
            found.update(fresh)
            todo += fresh
        return frozenset(s for s in found if self.steps[s] or not self.free[s])


# A language, as a part of a larger one: it adds states in front of a given one, and returns the first of them.
Piece = Callable[[_States, int], int]


def _automaton(piece: Piece) -> ByteAutomaton:
    states = _States()
    end = states.add()
    start = states.reached(piece(states, end))
    reached = lru_cache(None)(states.reached)
    number, sets, steps = {start: 0}, [start], {}
    for i, members in enumerate(sets):  # grows
        if i == MOST_PARTS:
            raise _NotFollowed
        found: dict[int, frozenset[int]] = {}
        for member in members:
            for byte, to in states.steps[member].items():
                found[byte] = found[byte] | reached(to) if byte in found else reached(to)
        for after in found.values():
            if after not in number:
                number[after] = len(sets)
                sets.append(after)
        steps[i] = {byte: number[after] for byte, after in found.items()}
    return from_transitions(0, steps, [i for i, members in enumerate(sets) if end in members])


def _text(text: bytes) -> Piece:
    return lambda states, to: reduce(lambda behind, byte: states.add({byte: behind}), reversed(text), to)


def _chain(*pieces: Piece) -> Piece:
    return lambda states, to: reduce(lambda behind, piece: piece(states, behind), reversed(pieces), to)


def _either(*pieces: Piece) -> Piece:
    return lambda states, to: states.add(free=[piece(states, to) for piece in pieces])


def _repeated(piece: Piece, least: int, most: int | None) -> Piece:
    def repeated(states: _States, to: int) -> int:
        behind = to
        if most is None:
            behind = states.add(free=[to])
            states.free[behind].append(piece(states, behind))
        for _ in range(0 if most is None else most - least):
            behind = states.add(free=[piece(states, behind), to])
        for _ in range(least):
            behind = piece(states, behind)
        return behind

    return repeated


def _embedded(language: ByteAutomaton, spelled: Iterable[int] = ()) -> Piece:
    """A language, in which some bytes are spelled by escapes."""
    escaped = frozenset(spelled)
    plain: list[dict[int, int]] = []  # steps, by state
    groups: list[dict[int, bytes]] = []  # what is spelled, by state and by where it leads
    for row in language.successor[:-1].tolist():
        steps = {byte: to for byte, to in enumerate(row) if to != language.sink}
        plain.append({byte: to for byte, to in steps.items() if byte not in escaped})
        spelt = sorted(escaped & steps.keys())
        groups.append({to: bytes(byte for byte in spelt if steps[byte] == to) for to in {steps[b] for b in spelt}})

    def embedded(states: _States, to: int) -> int:
        own = [states.add() for _ in plain]
        for state, here in enumerate(own):
            states.steps[here] = {byte: own[behind] for byte, behind in plain[state].items()}
            states.free[here] = [_escapes(some)(states, own[behind]) for behind, some in groups[state].items()]
            states.free[here] += [to] * bool(language.accepting[state])
        return own[0]

    return embedded


# Strings

SHORT = {0x08: b"\\b", 0x09: b"\\t", 0x0A: b"\\n", 0x0C: b"\\f", 0x0D: b"\\r", 0x22: b'\\"', 0x5C: b"\\\\"}
CONTROL = (*range(0x20), 0x7F)
ESCAPED = {*SHORT, *CONTROL}
CHARACTER = "(?s:.)"
HEX = "[0-9a-fA-F]"
CODE_POINT = rf"[0-9a-ce-fA-CE-F]{HEX}{{3}}|[dD][0-7]{HEX}{{2}}|[dD][89aAbB]{HEX}{{2}}\\u[dD][c-fC-F]{HEX}{{2}}"


@lru_cache(maxsize=256)
def _escapes(some: bytes) -> Piece:
    """The escapes of some bytes."""
    long = [f"\\u{byte:04{case}}".encode() for byte in some if byte in CONTROL for case in "xX"]
    return _embedded(from_texts([*long, *(SHORT[byte] for byte in some if byte in SHORT)]))


@lru_cache(maxsize=1)
def _character() -> ByteAutomaton:
    """One character of a string."""
    return _automaton(_embedded(_one(CHARACTER), ESCAPED))


@lru_cache(maxsize=1)
def _any_name() -> ByteAutomaton:
    r"""Names of members that may have \u escapes of any character."""
    return from_regex(rf'"([^"\\\x00-\x1f\x7f]|\\["\\bfnrt]|\\u({CODE_POINT}))*"')


def _quoted(piece: Piece) -> Piece:
    return _chain(_text(b'"'), piece, _text(b'"'))


def _constant(text: str) -> Piece:
    return _quoted(_embedded(from_texts([text.encode()]), ESCAPED))


def _string(rules: Mapping[str, Any]) -> Piece | None:
    least, most = _count(rules, "minLength") or 0, _count(rules, "maxLength")
    if most is not None and most < least:
        return None
    forms = [_searched(rules["pattern"])] if "pattern" in rules else []
    forms += [_format(rules["format"])] if "format" in rules else []
    if not forms:
        return _quoted(_repeated(_embedded(_character()), least, most))
    if least or most is not None:
        forms.append(_repeated(_embedded(_one(CHARACTER)), least, most))
    language = reduce(product, map(_automaton, forms))
    return _quoted(_embedded(language, ESCAPED)) if language.accepting.any() else None


# Patterns, as far as Python and Rust read them alike

SPACES = " \t\n\r\f\v\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
MARK = r"""\\[!-/:;=?@\[-`{-~]"""
ITEM = rf"[A-Za-z0-9]-[A-Za-z0-9]|\\[dwsnrtfv]|{MARK}|[^\[\]\\^&~\x00-\x1f\x7f-]"
TOKEN = re.compile(
    rf"(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<bar>\|)|(?P<count>(?:[*+?]|{{(\d+)(,?)(\d*)}})\??)"
    rf"|(?P<one>\.|\\[dwsDWSnrtfv]|{MARK}|\[\^?-?(?:{ITEM})+-?\]|[^\\^$.|?*+()\[\]{{}}\x00-\x1f\x7f])",
    re.ASCII,
)
COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
DATE = "[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|[12][0-9]))"
HOURS = "([01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{HOURS}:([0-5][0-9]|60)(\.[0-9]+)?([zZ]|[+-]{HOURS})"
OCTET = "([0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])"
IPV4 = rf"{OCTET}(\.{OCTET}){{3}}"
ATOM = r"[a-zA-Z0-9!#$%\&'*+/=?\^_`{|}\~-]+"
LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}[tT]{TIME}",
    "uuid": f"{HEX}{{8}}(-{HEX}{{4}}){{3}}-{HEX}{{12}}",
    "ipv4": IPV4,
    "email": rf"{ATOM}(\.{ATOM})*@({LABEL}(\.{LABEL})*|\[{IPV4}\])",
}


def _format(name: Any) -> Piece:
    if not isinstance(name, str) or name not in FORMATS:
        raise _NotFollowed
    return _pattern(FORMATS[name])


def _searched(pattern: Any) -> Piece:
    """The strings in which a pattern is found."""
    if not isinstance(pattern, str):
        raise _NotFollowed
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$\Z", pattern) is not None
    body = pattern[begins : len(pattern) - ends]
    anything = _repeated(_embedded(_one(CHARACTER)), 0, None)
    found = _pattern(body, alternatives=not (begins or ends))
    return _chain(*[anything] * (not begins), found, *[anything] * (not ends))


def _pattern(pattern: str, alternatives: bool = True) -> Piece:
    """The strings that a pattern matches as a whole; it may be refused alternatives outside of groups."""
    branches: list[Piece] = []
    pieces: list[Piece] = []
    outer: list[tuple[list[Piece], list[Piece]]] = []
    at, countable = 0, False
    while at < len(pattern):
        token = TOKEN.match(pattern, at)
        if token is None:
            raise _NotFollowed
        kind, at = token.lastgroup, token.end()
        if kind == "open":
            outer.append((branches, pieces))
            branches, pieces = [], []
        elif kind == "bar" and (outer or alternatives):
            branches.append(_chain(*pieces))
            pieces = []
        elif kind == "close" and outer:
            group = _either(*branches, _chain(*pieces))
            branches, pieces = outer.pop()
            pieces.append(group)
        elif kind == "count" and countable:
            pieces.append(_repeated(pieces.pop(), *_times(token)))
        elif kind == "one":
            pieces.append(_embedded(_one(token["one"])))
        else:
            raise _NotFollowed
        countable = kind in ("close", "one")
    if outer:
        raise _NotFollowed
    return _either(*branches, _chain(*pieces))


def _times(token: re.Match[str]) -> tuple[int, int | None]:
    sign, least, comma, most = token["count"], token[5], token[6], token[7]
    if sign[0] != "{":
        return COUNTS[sign[0]]
    if most and int(most) < int(least):
        raise _NotFollowed
    return int(least), int(most) if most else None if comma else int(least)


@lru_cache(maxsize=256)
def _one(sign: str) -> ByteAutomaton:
    """The characters that a sign of a pattern stands for."""
    if sign == r"\S":
        sign = f"[^{SPACES}]"
    elif sign == r"\s":
        sign = f"[{SPACES}]"
    elif sign[0] == "[":
        sign = re.sub(r"\\(.)", lambda escape: SPACES if escape[1] == "s" else escape[0], sign)
    try:
        # For llguidance, a class that leaves out one of these, but no control character, still has its escape.
        if sign[:2] == "[^" and not all(re.fullmatch(sign, mark) for mark in '"\\'):
            raise _NotFollowed
        return from_texts([sign.encode()]) if len(sign) == 1 and sign != "." else from_regex(sign)
    except (OptionError, re.error) as error:
        raise _NotFollowed from error


# Numbers


def _bound(rules: Mapping[str, Any], side: str) -> tuple[int | float, bool] | None:
    """The narrower of ``minimum`` and ``exclusiveMinimum``, or of those of the maximum, and whether it is left out."""
    names = {side.lower(): False, f"exclusive{side}": True}
    bounds = [(_number(rules[name]), strict) for name, strict in names.items() if name in rules]
    if not bounds:
        return None
    return max(bounds) if side == "Minimum" else min(bounds, key=lambda bound: (bound[0], not bound[1]))


def _number(value: Any) -> int | float:
    """A number that llguidance reads as Python does: it has few digits, and is not -0.0."""
    if type(value) is int and abs(value) < EXACT:
        return value
    if type(value) is not float or not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0):
        raise _NotFollowed
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    if int("".join(map(str, digits))) >= EXACT or abs(int(exponent)) > EXACT_POWER:
        raise _NotFollowed
    return value


def _integer(rules: Mapping[str, Any]) -> Piece | None:
    least, most = _bound(rules, "Minimum"), _bound(rules, "Maximum")
    low = None if least is None else math.floor(least[0]) + 1 if least[1] else math.ceil(least[0])
    high = None if most is None else math.ceil(most[0]) - 1 if most[1] else math.floor(most[0])
    if low is not None and high is not None and low > high:
        return None
    ways = []
    if low is None or low < 0:
        zero = (low is None) == (high is None)  # -0 is an integer, but not with a single bound
        near = -high if high is not None and high < 0 else 0 if zero else 1
        ways.append("-" + _naturals(near, None if low is None else -low))
    if high is None or high >= 0:
        ways.append(_naturals(max(low or 0, 0), high))
    return _pattern("|".join(ways))


def _real(rules: Mapping[str, Any]) -> Piece | None:
    least, most = _bound(rules, "Minimum"), _bound(rules, "Maximum")
    if least is None and most is None:
        return _pattern(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
    if any(bound is not None and bound[0] != int(bound[0]) for bound in (least, most)):
        raise _NotFollowed
    low, from_low = (None, False) if least is None else (int(least[0]), not least[1])
    high, to_high = (None, False) if most is None else (int(most[0]), not most[1])
    if low is not None and high is not None and (low > high or (low == high and not (from_low and to_high))):
        return None
    ways = []
    if low is None or low < 0:
        near, from_near = (-high, to_high) if high is not None and high < 0 else (0, False)
        ways.append("-" + _reals(near, None if low is None else -low, from_near, from_low))
    if high is None or high > 0 or (high == 0 and to_high):
        ways.append(_reals(max(low or 0, 0), high, from_low or low is None or low < 0, to_high))
    return _pattern("|".join(ways))


def _reals(low: int, high: int | None, from_low: bool, to_high: bool) -> str:
    """A pattern of the numbers from ``low`` >= 0 to ``high``, which may be left out."""
    if low == high:
        return str(low)
    ways = [] if from_low else [rf"{low}\.[0-9]*[1-9]"]
    first = low if from_low else low + 1
    if high is None:
        digits = len(str(low))
        ways += [_reals(low, 10**digits, from_low, False), rf"[1-9][0-9]{{{digits},}}(\.[0-9]+)?"]
    elif first < high:
        ways.append(rf"{_naturals(first, high - 1)}(\.[0-9]+)?")
    ways += [rf"{high}(\.0+)?"] * to_high
    return f"({'|'.join(ways)})"


def _naturals(low: int, high: int | None) -> str:
    """A pattern of the integers from ``low`` >= 0 to ``high``."""
    digits = len(str(low))
    last = 10**digits - 1
    if high is None:
        return f"({_naturals(low, last)}|[1-9][0-9]{{{digits},}})"
    if high > last:
        return f"({_naturals(low, last)}|{_naturals(last + 1, high)})"
    if low == high:
        return str(low)
    (first, a), (final, b) = divmod(low, 10), divmod(high, 10)
    if first == final:
        return f"{first or ''}[{a}-{b}]"
    between = [f"{_naturals(first + 1, final - 1)}[0-9]"] if first + 1 < final else []
    return f"({'|'.join([f'{first}[{a}-9]', *between, f'{final}[0-{b}]'])})"


# Values, lists and objects

COMMA, COLON = b", ", b": "
SCALARS: dict[str, Callable[[Mapping[str, Any]], Piece | None]] = {
    "null": lambda _: _text(b"null"),
    "boolean": lambda _: _either(_text(b"true"), _text(b"false")),
    "integer": _integer,
    "number": _real,
    "string": _string,
}
TYPE_OF = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}
TYPE_OF |= {list: "array", tuple: "array", dict: "object"}


def _any_value(states: _States, to: int) -> int:
    """Any JSON value, which nests without end: no automaton has it."""
    raise _NotFollowed


def _value(value: Any) -> Piece:
    """One value, as ``enum`` and ``const`` have them."""
    kind = _type_of(value)
    if kind == "array":
        return _listed(b"[", b"]", [(_value(item), True) for item in value])
    if kind == "object":
        return _listed(b"{", b"}", [(_member(name, _value(of)), True) for name, of in value.items()])
    if kind == "string":
        return _constant(value)
    if kind in ("integer", "number"):
        return _text(format(Decimal(repr(_number(value))), "f").removesuffix(".0").encode())
    return _text(json.dumps(value).encode())


def _type_of(value: Any) -> str:
    if type(value) not in TYPE_OF:
        raise _NotFollowed
    return TYPE_OF[type(value)]


def _has_type(value: Any, kind: str) -> bool:
    own = _type_of(value)
    if own == "number" and kind == "integer":
        return bool(_number(value) == int(value))
    return kind == own or (own == "integer" and kind == "number")


def _member(name: Any, value: Piece) -> Piece:
    return _chain(_text(_name(name) + COLON), value)


def _name(name: Any) -> bytes:
    if not isinstance(name, str):
        raise _NotFollowed
    return json.dumps(name, ensure_ascii=False).encode()


def _other_name(taken: Sequence[bytes]) -> Piece:
    """The names that ``additionalProperties`` are for."""
    if not taken:
        return _quoted(_repeated(_embedded(_character()), 0, None))
    known = from_texts(taken)
    beyond = np.full((1, 256), known.sink + 1, dtype=np.int32)  # a sink behind the one that is none any more
    others = ByteAutomaton(np.concatenate([known.successor, beyond]), np.append(~known.accepting, False))
    return _embedded(product(_any_name(), others))


def _listed(
    opening: bytes, closing: bytes, parts: Sequence[tuple[Piece, bool]], more: Piece | None = None, skip: bool = False
) -> Piece:
    """Parts in order, with commas, some of which must be there.

    Args:
        more: may follow, any number of times.
        skip: a part that need not be there may be left out before others; else, all that follow are left out, too.
    """

    def listed(states: _States, to: int) -> int:
        close = _text(closing)(states, to)
        begin = behind = close  # from where the rest of the parts follows: the first of all, or behind another
        if more is not None:
            behind = states.add()
            first = more(states, behind)
            states.free[behind] = [close, _text(COMMA)(states, first)]
            begin = states.add(free=[close, first])
        for part, needed in reversed(parts):
            first = part(states, behind)
            comma = _text(COMMA)(states, first)
            if needed:
                begin, behind = first, comma
            else:
                begin = states.add(free=[first, begin if skip else close])
                behind = states.add(free=[comma, behind if skip else close])
        return _text(opening)(states, begin)

    return listed


# Schemas

REMARKS = {"title", "description", "default", "examples", "$comment", "readOnly", "writeOnly", "deprecated"}
REMARKS |= {"$defs", "definitions"}
OF_TYPES = {
    *("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "pattern"),
    *("format", "items", "prefixItems", "minItems", "maxItems", "properties", "required", "additionalProperties"),
}
DRAFTS = {"https://json-schema.org/draft/2020-12/schema": True}  # and whether they have prefixItems
DRAFTS |= {"https://json-schema.org/draft/2019-09/schema": False, "http://json-schema.org/draft-07/schema": False}
REFERENCE = re.compile(r"#/(\$defs|definitions)/([A-Za-z0-9_.-]+)")


class _Schemas:
    """The pieces of schemas, which may refer to the definitions of the outermost one. None is one that nothing fits."""

    def __init__(self, root: Mapping[str, Any] | bool) -> None:
        self._root = root if isinstance(root, Mapping) else {}
        self._known: dict[str, Piece] = {}
        self._open: set[str] = set()
        draft = self._root.get("$schema", next(iter(DRAFTS)))
        if not isinstance(draft, str) or draft.removesuffix("#") not in DRAFTS:
            raise _NotFollowed
        self._keywords = OF_TYPES if DRAFTS[draft.removesuffix("#")] else OF_TYPES - {"prefixItems"}

    def piece(self, schema: Any) -> Piece | None:
        if isinstance(schema, bool):
            return _any_value if schema else None
        if not isinstance(schema, Mapping):
            raise _NotFollowed
        remarks = REMARKS | {"$schema", "$id"} if schema is self._root else REMARKS
        rules = {keyword: value for keyword, value in schema.items() if keyword not in remarks}
        names = set(rules)
        if not rules:
            return _any_value
        if "type" in rules and names <= self._keywords:
            return _union([self._of_type(kind, rules) for kind in _types(rules)])
        if names - {"type"} == {"enum"}:
            return _values(_sequence(rules["enum"]), rules)
        if names - {"type"} == {"const"}:
            return _values([rules["const"]], rules)
        if names == {"anyOf"}:
            return _union([self.piece(one) for one in _sequence(rules["anyOf"])])
        if names == {"oneOf"}:
            return _union(_apart([self.piece(one) for one in _sequence(rules["oneOf"])]))
        if names == {"allOf"} and len(_sequence(rules["allOf"])) == 1:
            return self.piece(rules["allOf"][0])
        if names == {"$ref"}:
            return self._referred(rules["$ref"])
        raise _NotFollowed

    def _referred(self, to: Any) -> Piece:
        found = REFERENCE.fullmatch(to) if isinstance(to, str) else None
        if found is None or to in self._open:
            raise _NotFollowed
        if to not in self._known:
            definitions = self._root.get(found[1])
            if not isinstance(definitions, Mapping) or found[2] not in definitions:
                raise _NotFollowed
            self._open.add(to)
            piece = self.piece(definitions[found[2]])
            self._open.remove(to)
            if piece is None:  # llguidance refuses it, even where it need not fit
                raise _NotFollowed
            self._known[to] = piece
        return self._known[to]

    def _of_type(self, kind: str, rules: Mapping[str, Any]) -> Piece | None:
        if kind == "array":
            return self._array(rules)
        return self._object(rules) if kind == "object" else SCALARS[kind](rules)

    def _array(self, rules: Mapping[str, Any]) -> Piece | None:
        least, most = _count(rules, "minItems") or 0, _count(rules, "maxItems")
        items = [self.piece(one) for one in _sequence(rules.get("prefixItems", ()))]
        more = self.piece(rules.get("items", True))
        length = max(len(items), least) if most is None else most
        if length > MOST_PARTS:
            raise _NotFollowed
        items = (items + [more] * (length - len(items)))[:length]
        fitting = items.index(None) if None in items else length
        if fitting < least:
            return None
        endless = most is None and fitting == length
        parts = [(item, place < least) for place, item in enumerate(items[:fitting]) if item is not None]
        return _listed(b"[", b"]", parts, more if endless else None)

    def _object(self, rules: Mapping[str, Any]) -> Piece | None:
        properties, required = rules.get("properties", {}), _sequence(rules.get("required", ()))
        if not isinstance(properties, Mapping) or not all(isinstance(name, str) for name in required):
            raise _NotFollowed
        more = self.piece(rules.get("additionalProperties", True))
        values = {name: self.piece(one) for name, one in properties.items()}
        values |= {name: more for name in required if name not in values}
        if any(values[name] is None for name in required):
            return None
        members = [(_member(name, of), name in required) for name, of in values.items() if of is not None]
        taken = [_name(name) for name in values]
        other = None if more is None else _chain(_other_name(taken), _text(COLON), more)
        return _listed(b"{", b"}", members, other, skip=True)


def _types(rules: Mapping[str, Any]) -> Sequence[str]:
    kinds = [rules["type"]] if isinstance(rules["type"], str) else _sequence(rules["type"])
    if not all(isinstance(kind, str) and kind in TYPE_OF.values() for kind in kinds):
        raise _NotFollowed
    return kinds


def _values(values: Sequence[Any], rules: Mapping[str, Any]) -> Piece | None:
    """Those of the values that are of a type, if one is asked for."""
    kinds = _types(rules) if "type" in rules else None
    pieces = [_value(value) for value in values]
    of_kind = [kinds is None or any(_has_type(value, kind) for kind in kinds) for value in values]
    return _union([piece for piece, fits in zip(pieces, of_kind, strict=True) if fits])


def _union(pieces: Sequence[Piece | None]) -> Piece | None:
    fitting = [piece for piece in pieces if piece is not None]
    return _either(*fitting) if fitting else None


def _apart(pieces: Sequence[Piece | None]) -> Sequence[Piece | None]:
    """The same, if no text is of two of them."""
    languages = [_automaton(piece) for piece in pieces if piece is not None]
    if any(product(a, b).accepting.any() for a, b in combinations(languages, 2)):
        raise _NotFollowed
    return pieces


def _sequence(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _NotFollowed
    return value


def _count(rules: Mapping[str, Any], name: str) -> int | None:
    if name not in rules:
        return None
    if type(rules[name]) is not int or rules[name] < 0:
        raise _NotFollowed
    return int(rules[name])
