"""JSON schemas and context-free grammars, read on the host by the package llguidance."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from smc_compile.control.byte_automata import ByteAutomaton
from smc_compile.control.json_language import json_language
from smc_compile.control.potentials import Hard, Language, as_bytes
from smc_compile.errors import InputError, OptionError

# What JSON looks like: as json.dumps writes it.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where only one text may follow, llguidance allows one spelling of it. The model's law has all.
UNFORCED = '%llguidance {"no_forcing": true}\n'
# Keywords of a schema that are followed, and how schemas stand in them; all others are refused by name.
ONE, MANY, NAMED = ("additionalProperties", "items"), ("anyOf", "allOf", "oneOf", "prefixItems"), (
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
)  # fmt: skip
FOLLOWED = {
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", *ONE, *MANY, *NAMED),
}
REMARKS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "readOnly", "writeOnly"}
REMARKS |= {"deprecated", "id", "$anchor"}


class Grammar(Hard):
    """Texts of a grammar of llguidance."""

    def __init__(self, lark: str) -> None:
        self._lark = lark
        self._require_valid()

    def matcher(self, tokenizer: Any) -> Any:
        """An ``LLMatcher`` at the beginning of a text, over the tokens of an ``LLTokenizer``."""
        return llguidance().LLMatcher(tokenizer, self._lark, log_level=0)

    def prefix(self, text: str | bytes) -> float:
        """0 where a whole text can begin so, else -inf."""
        return 0.0 if self._after(as_bytes(text)) is not None else -math.inf

    def complete(self, text: str | bytes) -> float:
        """0 where the text is whole, else -inf."""
        matcher = self._after(as_bytes(text))
        return 0.0 if matcher is not None and matcher.is_accepting() else -math.inf

    def _after(self, text: bytes) -> Any:
        """The matcher behind a text; None where no whole text begins so."""
        matcher = self.matcher(tokens_for_grammars([bytes([b]) for b in range(256)]))
        return matcher if all(matcher.consume_token(byte) for byte in text) else None

    def _require_valid(self) -> None:
        error = llguidance().LLMatcher.validate_grammar(self._lark, tokens_for_grammars([b"a"]))
        if error:
            lines = [line.strip() for line in error.splitlines()]
            told = itertools.takewhile(lambda line: not re.match(r"\d+ \|", line), lines)  # behind it: the grammar
            raise OptionError(f"{self.name} cannot be compiled", " ".join(filter(None, told)))


class JsonSchema(Grammar):
    """JSON texts that a schema describes, as ``json.dumps`` writes them: members in the order of ``properties``, one
    space behind commas and colons.

    Args:
        schema: of JSON Schema; a dict, a JSON text, or a class of pydantic.
        lenient: leave out keywords that cannot be followed; ``ignored`` names them, and so does the report.

    Raises:
        OptionError: it is no schema, or has keywords that cannot be followed, which are named.
    """

    def __init__(self, schema: Any, lenient: bool = False) -> None:
        self.schema = _parsed(schema)
        unknown = sorted({keyword for keyword in keywords(self.schema) if keyword not in FOLLOWED | REMARKS})
        if unknown and not lenient:
            raise OptionError(
                "the schema has keywords that cannot be followed",
                ", ".join(unknown),
                "leave them out, or pass lenient=True, which ignores them",
            )
        self.ignored = tuple(unknown)
        style = {**JSON_STYLE, "lenient": True} if lenient else JSON_STYLE
        schema = self.schema if isinstance(self.schema, dict) else ({} if self.schema else {"enum": []})
        told = json.dumps({**schema, "x-guidance": style})
        super().__init__(f"start: %json {told}\n{UNFORCED}")

    @cached_property
    def regular(self) -> Language | None:
        """The same texts as an automaton; None where the schema nests without end or is not followed there."""
        language = None if self.ignored else json_language(self.schema)
        return None if language is None else RegularJson(self.name, language)

    @property
    def name(self) -> str:
        title = self.schema.get("title") if isinstance(self.schema, dict) else None
        ignored = f", {', '.join(self.ignored)} ignored" if self.ignored else ""
        return f"JsonSchema({title or json.dumps(self.schema)[:40]}{ignored})"


class RegularJson(Language):
    """JSON texts of an automaton."""

    def __init__(self, name: str, language: ByteAutomaton) -> None:
        self._name, self._language = name, language

    @property
    def name(self) -> str:
        return self._name

    @property
    def language(self) -> ByteAutomaton:
        return self._language


class Lark(Grammar):
    """Texts of a context-free grammar in Lark's form, as llguidance knows it; it begins with the rule ``start``.

    Raises:
        OptionError: it cannot be compiled.
    """

    def __init__(self, grammar: str) -> None:
        if not isinstance(grammar, str):
            raise OptionError("a grammar must be a string", f"got {type(grammar).__name__}")
        if "%llguidance" in grammar:
            why = "it would decide which tokens may spell a text"
            raise OptionError("a grammar cannot have a line %llguidance", why, "leave it out")
        self.grammar = grammar
        super().__init__(f"{grammar}\n{UNFORCED}")

    @property
    def name(self) -> str:
        return f"Lark({self.grammar.strip().splitlines()[0][:40] if self.grammar.strip() else ''})"


def llguidance() -> Any:
    """The package.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        why, way = str(error), 'pip install "smc_compile[control]"'
        raise OptionError("a JSON schema or a grammar needs the package llguidance", why, way) from error
    return llguidance


def tokens_for_grammars(tokens: Sequence[bytes | None]) -> Any:
    """An ``LLTokenizer``; tokens that are None, and one more behind all others, are no text."""
    package = llguidance()
    none = [i for i, token in enumerate(tokens) if not token]
    end = len(tokens)  # it needs an end token of its own

    def spell(text: str | bytes) -> list[int]:
        raise InputError("a grammar asked to spell a text", "no token may be forced", "report this as a mistake")

    of = SimpleNamespace(
        eos_token_id=end, bos_token_id=None, tokens=[t or b"" for t in tokens] + [b""], special_token_ids=[*none, end],
        is_tokenizer_wrapper=True,
    )  # fmt: skip
    return package.LLTokenizer(_Wrapper(of, spell))


class _Wrapper:
    """What llguidance reads of a tokenizer."""

    def __init__(self, of: SimpleNamespace, spell: Any) -> None:
        self.__dict__.update(vars(of))
        self._spell = spell

    def __call__(self, text: str | bytes) -> list[int]:
        return self._spell(text)  # type: ignore[no-any-return]


def _parsed(schema: Any) -> Any:
    if callable(getattr(schema, "model_json_schema", None)):
        return schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise OptionError("the schema is no JSON", str(error)) from error
    if not isinstance(schema, Mapping | bool):
        raise OptionError("a schema must be a dict", f"got {type(schema).__name__}", "pass one, or its JSON text")
    return dict(schema) if isinstance(schema, Mapping) else schema


def keywords(schema: Any) -> Iterator[str]:
    """All keywords of a schema and of those in it."""
    if not isinstance(schema, Mapping):
        return
    yield from schema
    inner = [schema[name] for name in ONE if name in schema]
    inner += [one for name in MANY if isinstance(schema.get(name), Sequence) for one in schema[name]]
    inner += [one for name in NAMED if isinstance(schema.get(name), Mapping) for one in schema[name].values()]
    for one in inner:
        yield from keywords(one)
