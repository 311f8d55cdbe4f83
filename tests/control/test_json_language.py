"""JSON schemas as automata: byte by byte, they allow what llguidance allows, and are not built where they might not."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from smc_compile.control import json_language as module
from smc_compile.control.json_language import json_language
from smc_compile.control.token_automata import distances

llguidance = pytest.importorskip("llguidance")

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NULL, TEXT, WHOLE = {"type": "null"}, {"type": "string"}, {"type": "integer"}
MEMBERS = {"a": NULL, "b": {"type": "boolean"}, "c": TEXT}


def text(**rules):
    return {"type": "string", **rules}


def whole(**rules):
    return {"type": "integer", **rules}


def number(**rules):
    return {"type": "number", **rules}


def array(**rules):
    return {"type": "array", **rules}


def members(more=False, **rules):
    return {"type": "object", "additionalProperties": more, **rules}


FOLLOWED = {
    "null": NULL,
    "boolean": {"type": "boolean"},
    "integers have no leading zeros": WHOLE,
    "numbers may have exponents": number(),
    "some types": {"type": ["string", "null", "boolean"], "maxLength": 1},
    "integers from 3": whole(minimum=3),
    "integers from -12": whole(minimum=-12),
    "integers to 0": whole(maximum=0),
    "integers to -5": whole(exclusiveMaximum=-5),
    "integers between": whole(minimum=-7, maximum=1234),
    "integers between negative ones": whole(exclusiveMinimum=-120, maximum=-8.5),
    "integers between fractions": whole(minimum=0.5, exclusiveMaximum=10.5),
    "the narrower bound": whole(minimum=3, exclusiveMinimum=3, maximum=9, exclusiveMaximum=20),
    "the narrower of equal bounds": whole(minimum=3, maximum=9, exclusiveMaximum=9),
    "numbers from 0": number(minimum=0),
    "numbers over 0": number(exclusiveMinimum=0),
    "numbers to 0": number(maximum=0),
    "numbers under -3": number(exclusiveMaximum=-3),
    "numbers between": number(minimum=-15, maximum=100),
    "numbers between others": number(exclusiveMinimum=-15, exclusiveMaximum=100),
    "numbers between 0 and 1": number(exclusiveMinimum=0, exclusiveMaximum=1),
    "one number": number(minimum=-2, maximum=-2),
    "strings with escapes": TEXT,
    "short strings": text(maxLength=2),
    "strings of characters, not bytes": text(minLength=2, maxLength=3),
    "long strings": text(minLength=1),
    "a pattern": text(pattern="^[a-z]+$"),
    "a pattern anywhere": text(pattern="ab|c"),
    "a pattern in front": text(pattern="^a.b"),
    "a pattern at the end": text(pattern=r"\$a?$"),
    "a pattern with what must be escaped": text(pattern=r'^[\\"/]\n?\t*$'),
    "classes of patterns": text(pattern=r"^\d\w\s\S\D\W[^a-c-]$"),
    "groups and counts": text(pattern="^(a|(?:bc){2}|d{1,3}|e{2,}|f*?)+$"),
    "an empty pattern": text(pattern=""),
    "a pattern of a length": text(pattern=r"^\w+(, \w+)*$", minLength=3, maxLength=7),
    **{f"format {name}": text(format=name) for name in module.FORMATS},
    "a format and a pattern": text(format="date", pattern="^20"),
    "values": {"enum": ["a", 1, None, True, "é\n\x1f\x7f\"\\/", -2.5, 1.0, 1e-7, [], {}]},
    "nested values": {"const": {"b": [1, [2, {"é\n\x7f": "\t"}]], "a": {}}},
    "values of a type": {"enum": ["1", 1, 2.0, 2.5, True, None], "type": "integer"},
    "values of types": {"type": ["number", "null"], "enum": ["1", 1, 2.5, True, None]},
    "a value of a type": {"const": [1], "type": "array"},
    "items": array(items=WHOLE),
    "some items": array(items=WHOLE, minItems=2, maxItems=4),
    "many items": array(items=NULL, minItems=2),
    "no items": array(maxItems=0),
    "items in order": array(prefixItems=[NULL, WHOLE], items=False),
    "items in order, and more": array(prefixItems=[NULL, WHOLE], items=TEXT, minItems=1),
    "items in order, all needed": array(prefixItems=[NULL, WHOLE], minItems=2, maxItems=2),
    "items up to one that nothing fits": array(prefixItems=[NULL, False, NULL], items=NULL),
    "items of items": array(items=array(items=array(items=NULL), maxItems=2)),
    "members": members(properties=MEMBERS, required=["a", "b", "c"]),
    "members that may be left out": members(properties=MEMBERS),
    "some members are needed": members(properties=MEMBERS, required=["b"]),
    "no members": members(),
    "names with escapes": members(properties={"é\n\x01\x7f\"\\/": NULL, "": NULL}),
    "a member that nothing fits": members(properties={"a": False, "b": NULL}),
    "any names": members(NULL),
    "other names": members(NULL, properties={"a": NULL, "ab": WHOLE}, required=["a"]),
    "other names than that of a member nothing fits": members(NULL, properties={"a\n": False}),
    "needed names without a schema of their own": members(WHOLE, properties={"a": NULL}, required=["z", "y"]),
    "members in members": members(properties={"a": members(properties=MEMBERS), "b": array(items=members())}),
    "any of some": {"anyOf": [NULL, WHOLE, array(items=TEXT), members(properties=MEMBERS), False]},
    "one of some": {"oneOf": [{"const": "a"}, {"const": "b"}, members(properties=MEMBERS)]},
    "all of one": {"allOf": [text(maxLength=1)]},
    "definitions": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://a.b/c",
        "$defs": {"a": array(items={"$ref": "#/definitions/b"}, maxItems=2), "unused": {"not": {}}},
        "definitions": {"b": {"title": "B", "anyOf": [NULL, WHOLE]}},
        **members(properties={"x": {"$ref": "#/$defs/a"}, "y": {"$ref": "#/$defs/a", "description": "again"}}),
    },
    "an older draft": {"$schema": "http://json-schema.org/draft-07/schema#", **array(items={"const": 1})},
    "remarks": {"title": 1, "description": "a", "default": {}, "examples": [1], "deprecated": True, **NULL},
}  # fmt: skip

NOT_FOLLOWED = {
    "any value": True,
    "no value": False,
    "an empty schema": {},
    "remarks alone": {"title": "a"},
    "any members": {"type": "object"},
    "any items": array(),
    "any items behind some": array(prefixItems=[NULL]),
    "any member": members(properties={"a": {}}),
    "no type": {"minimum": 3},
    "recursion": {"$ref": "#/$defs/a", "$defs": {"a": array(items={"$ref": "#/$defs/a"})}},
    "recursion to the whole": array(items={"$ref": "#"}),
    "references elsewhere": {"$ref": "https://a.b/c"},
    "references to nothing": {"$ref": "#/$defs/a"},
    "a reference to what nothing fits": {"anyOf": [NULL, {"$ref": "#/$defs/a"}], "$defs": {"a": False}},
    "unknown keywords": {"type": "null", "colour": 1},
    "multiples": whole(multipleOf=3),
    "unique items": array(items=NULL, uniqueItems=True),
    "numbers of members": members(NULL, minProperties=1),
    "members by pattern": members(patternProperties={"^a": NULL}),
    "all of two": {"allOf": [WHOLE, whole(minimum=3)]},
    "one of some that may both fit": {"oneOf": [WHOLE, number(minimum=3)]},
    "rules beside others": {"anyOf": [WHOLE, NULL], "minimum": 3, "type": "integer"},
    "values beside rules": text(enum=["a", "bc"], maxLength=1),
    "formats": text(format="ipv6"),
    "numbers with fractions as bounds": number(minimum=0.5),
    "bounds of an old draft": whole(minimum=0, exclusiveMinimum=True),
    "numbers that floats are too short for": {"const": 2**53},
    "numbers that llguidance reads otherwise": {"const": 919.0774244290001},
    "small numbers": {"const": 1e-23},
    "a negative zero": {"const": -0.0},
    "no numbers": {"enum": [float("nan")]},
    "what is no Unicode": {"const": "\ud800"},
    "lengths that are no integers": text(maxLength=1.0),
    "items by an old draft": array(items=[NULL, NULL]),
    "an older draft with prefixItems": {
        "$schema": "http://json-schema.org/draft-07/schema#", **array(prefixItems=[NULL], items=NULL),
    },
    "an unknown draft": {"$schema": "http://json-schema.org/draft-04/schema#", "const": 1},
    "an address within": members(properties={"a": {"$id": "b", **NULL}}),
    "values that are none": {"enum": []},
    "values of another type": {"const": 1, "type": "string"},
    "bounds that leave nothing": whole(minimum=3, exclusiveMaximum=3),
    "a needed member that nothing fits": members(required=["a"]),
    "a needed item that nothing fits": array(items=False, minItems=1),
    "numbers of items that leave nothing": array(items=NULL, minItems=2, maxItems=1),
    "lengths that leave nothing": text(minLength=2, maxLength=1),
    "a pattern that leaves nothing": text(pattern="^a{3}$", maxLength=2),
    "long repetitions": text(maxLength=1000),
    "endless repetitions": array(items=NULL, maxItems=10**9),
    "many nestings of one": {"$ref": "#/$defs/19", "$defs": {"0": NULL} | {
        str(i): array(prefixItems=[{"$ref": f"#/$defs/{i - 1}"}] * 2, items=False) for i in range(1, 20)
    }},
}  # fmt: skip
PATTERNS_NOT_FOLLOWED = [
    "^a|b$", "a^b", r"\bab", "(?=a)", "(?i)a", "(?P<n>a)", r"(a)\1", "a**", "a++", "a{2}{3}", "a{,3}", "a{3,2}", "{",
    "]", "(", ")", "*", "[a", "[]", "[]a]", "[[:alpha:]]", "[a&&b]", "[a--b]", "[z-a]", r"[\w-z]", '[^"]', r"[^\\]",
    "[^!-~]", r"\p{L}", r"\x41", r"\u0041", r"\A", r"\<", "a.{20}b", "\x01",
]  # fmt: skip


NAMED = {  # texts by schema that a walk hardly finds
    "other names": ['{"ab": 1, "a": null}', '{"a": null, "ab": null}', '{"a": null, "a": null}', '{"\\u0061": null}'],
    "other names than that of a member nothing fits": ['{"a\\n": null}', '{"a\\u000a": null}', '{"a": null}'],
    "needed names without a schema of their own": ['{"z": 1, "y": 1, "z": 1}', '{"y": 1, "z": 1}'],
    "names with escapes": [r'{"é\u000a', r'{"é\n\u0001\u007f'],
}


def matcher(schema):
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=STYLE)
    found = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert found.get_error() == ""
    return found


def agreed(language, state: int, matcher, text: bytes) -> list[int]:
    """The bytes that may follow a text; both must allow the same, and both or none an end."""
    ways = np.flatnonzero(language.successor[state] != language.sink).tolist()
    allowed = {byte for byte, bias in enumerate(matcher.compute_logit_bias()[:256]) if bias}
    assert (text, allowed) == (text, set(ways))
    assert (text, matcher.is_accepting()) == (text, language.accepting[state])
    return ways


def walk(language, rest: np.ndarray, matcher, drawn: random.Random) -> bytes:
    """A text of the language, along which both agree.

    Args:
        rest: [Q], the bytes from each state to an end, at least.
    """
    state, text, size = 0, b"", drawn.randint(0, 40)
    while ways := agreed(language, state, matcher, text):
        if language.accepting[state] and len(text) >= size:
            break
        if len(text) > size:
            ways = [byte for byte in ways if rest[language.successor[state, byte]] < rest[state]]
        text += bytes([drawn.choice(ways)])
        state = int(language.successor[state, text[-1]])
        assert matcher.consume_token(text[-1])
    return text


def by_successor(language, state: int, ways: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for byte in ways:
        found.setdefault(int(language.successor[state, byte]), []).append(byte)
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_automaton_allows_what_llguidance_allows(name: str):
    """All bytes that may come next, and whether a text may end, along ten walks."""
    language, start, drawn = json_language(FOLLOWED[name]), matcher(FOLLOWED[name]), random.Random(name)
    rest = distances(language.successor, language.accepting)
    for _ in range(10):
        json.loads(walk(language, rest, start.deep_copy(), drawn))


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_automaton_allows_what_llguidance_allows_behind_each_step(name: str):
    """From every state to all that follow, by the first, the last and one more byte that lead there."""
    language, drawn = json_language(FOLLOWED[name]), random.Random(name)
    found = {0: (matcher(FOLLOWED[name]), b"")}
    for state in (order := [0]):  # grows
        here, text = found[state]
        for to, ways in by_successor(language, state, agreed(language, state, here, text)).items():
            for byte in {ways[0], ways[-1], drawn.choice(ways)}:
                behind = here.deep_copy()
                assert behind.consume_token(byte)
                agreed(language, to, behind, text + bytes([byte]))
                if to not in found:
                    found[to] = behind, text + bytes([byte])
                    order.append(to)
    assert len(found) == language.sink


@pytest.mark.parametrize("name", NAMED)
def test_names_are_those_that_llguidance_allows(name: str):
    language = json_language(FOLLOWED[name])
    for text in NAMED[name]:
        here, state = matcher(FOLLOWED[name]), 0
        for i, byte in enumerate(text.encode()):
            if byte not in agreed(language, state, here, text.encode()[:i]):
                break
            state = int(language.successor[state, byte])
            assert here.consume_token(byte)
        agreed(language, state, here, text.encode())


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_not_followed_has_no_automaton(name: str):
    assert json_language(NOT_FOLLOWED[name]) is None


@pytest.mark.parametrize("pattern", PATTERNS_NOT_FOLLOWED)
def test_a_pattern_that_llguidance_may_read_otherwise_has_no_automaton(pattern: str):
    assert json_language(text(pattern=pattern)) is None


VALUES = [
    None, True, 0, -12, 2.5, "a", "é你\U0001f600/", "\n\x00\"\\", [], [1, [2.5, None]], {},
    {"b": [1], "a": {"é\n": "\t"}},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_may_be_written_as_json_dumps_writes_it(value):
    language = json_language({"const": value})
    assert language.accepting[language.after(json.dumps(value, ensure_ascii=False).encode())]


def test_members_are_written_as_json_dumps_writes_them():
    language = json_language(members(properties=MEMBERS, required=["b"]))
    for value in ({"a": None, "b": True, "c": "x, y"}, {"b": False}, {"b": True, "c": ""}):
        assert language.accepting[language.after(json.dumps(value).encode())]
    for broken in ({"a": None}, {"c": "", "b": True}, {"b": 1}, {"b": True, "d": 1}):
        assert not language.accepting[language.after(json.dumps(broken).encode())]
