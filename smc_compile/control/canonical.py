"""Which tokens may follow a token in what the tokenizer itself makes of a text.

A string of tokens is canonical where it is what its tokenizer encodes its text to: encode(decode(t)) == t ("Language
Models over Canonical Byte-Pair Encodings", arXiv 2506.07956). Byte-pair encoding (Sennrich et al., 2016) makes this a
property of neighbours: inside a pre-token, a string is canonical iff each pair of neighbours is, because tokens are
merged each for itself until the first merge across two of them. Where pre-tokens end can depend on all of the text. So
a pair is allowed iff, in some text, byte-pair encoding keeps it apart or a pre-token ends between the two.

Merges. The encoder always does the merge of the lowest rank, of equal ones the leftmost. While it builds a token, the
last part is one after another of the token's right spine, backwards (the token, its right part, that one's right part,
...), and the first part one of its left spine. A merge of rank k across a|b, of x from a's right spine and y from b's
left spine, takes place iff x and y are there at the same time and k comes before the merges that use them up. A token's
time is the highest rank among its merges: behind that one, those of lower ranks follow at once, which happens where a
token can be made in several ways.

Pre-tokens. Their regular expression is run as ordered threads (Pike's machine: Cox, "Regular Expression Matching: the
Virtual Machine Approach", 2009), each being what is left of the expression (partial derivatives: Antimirov, 1996), over
classes of characters that no part of the expression tells apart. It has finitely many states, so that following all of
them finds whatever some text brings about.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

from smc_compile.control.token_bytes import BYTE, token_bytes
from smc_compile.errors import OptionError

Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]

ROWS = 1024  # rows that are kept, of V bits each
NEVER = 2**40  # later than every merge
ENDLESS = 2**40  # repetitions
FAR = 0x40000  # where Unicode has nothing yet
MOST = 256  # classes of characters, and states of an expression
FEW = 32  # tokens before which a rare state of the pre-tokenizer is looked at more closely
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # Radford et al., 2019
DIGIT = "a digit, as the step Digits takes it"
GAP, BEGIN = "what not every match begins with", "what some match begins with"


class Followers:
    """Which tokens may follow a token in a canonical string.

    No canonical string is lost: what encode(text) gives passes for every text whose characters the vocabulary holds,
    whatever the normalizer does to it. Other strings pass if a canonical one could hold each pair of neighbours: where
    no pre-token can end between two tokens, exactly if byte-pair encoding keeps them apart. Where one can, nothing is
    known of the text before the pair, and each step of the pre-tokenizer is taken for itself, as if it met any text.
    A character with bytes too few or too many does not pass, unless it is the last one, which may go on.

    Special tokens, and all others that were added to the vocabulary, may follow everything and be followed by
    everything. Behind a token that the tokenizer never makes, everything may stand that it makes.

    Args:
        tokenizer: a byte-level BPE or SentencePiece-BPE tokenizer of tokenizers, or of transformers (a fast one).

    Raises:
        OptionError: it is none of these, or it splits texts in a way that is not followed.
    """

    def __init__(self, tokenizer: Any) -> None:
        told = _told(tokenizer)
        spelled = token_bytes(tokenizer)
        self._free = _free(spelled, told)
        self._merges = _Merges(told, len(spelled))
        self._words = _Words(_as_split(spelled, told))
        self._steps = [_Step(rule, self._words) for rule in _rules(told)]
        made = self._merges.made
        whole = bool(told["model"].get("ignore_merges"))  # pre-tokens that are tokens are not merged
        if self._steps:
            self._steps[-1].narrow(made, whole, self._merges.apart)
        fits = np.logical_and.reduce([self._words.valid, *(step.entered.any(1) for step in self._steps)])
        self._made = fits & (made | whole) & ~self._free  # [V], also what is a pre-token by itself
        self._row = lru_cache(ROWS)(self._packed)

    def after(self, token: int | None) -> Flags:
        """[V], what may follow; None is the beginning, behind a prompt that ends in any way."""
        return np.unpackbits(self._row(token), count=len(self._made)).view(np.bool_)

    def _packed(self, token: int | None) -> NDArray[np.uint8]:
        if token is None or not self._made[token]:
            return np.packbits(self._made | self._free)
        return np.packbits(self._made & (self._split(token) | self._kept(token)) | self._free)

    def _split(self, token: int) -> Flags:
        """[V], whether a pre-token may end between the token and the next one."""
        found = np.zeros(len(self._made), dtype=bool)
        for step in self._steps:
            found |= step.splits(token)
        return found & self._words.whole_character(token)

    def _kept(self, token: int) -> Flags:
        """[V], whether the two may stand in one pre-token."""
        found = self._merges.apart(token) & self._words.joined(token)
        for step in self._steps:
            found &= step.joins(token) | ~self._words.whole_character(token)
        return found


def _told(tokenizer: Any) -> dict[str, Any]:
    """What the tokenizer says of itself, if it is one that can be followed."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not callable(getattr(inner, "to_str", None)):
        raise _refusal(f"{type(tokenizer).__name__} does not tell its merges")
    told: dict[str, Any] = json.loads(inner.to_str())
    model = told["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"its model is {model.get('type')}, which encodes in another way than byte-pair encoding")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(f"its model has {name}={model[name]!r}")
    return told


def _refusal(why: str) -> OptionError:
    return OptionError(
        "which tokens a tokenizer would put behind one another is not known for this one",
        why,
        "use a byte-level BPE or SentencePiece-BPE tokenizer, or do without canonical tokens",
    )


def _free(spelled: Sequence[bytes | None], told: dict[str, Any]) -> Flags:
    """[V], tokens that are set apart before texts are split: special ones, added ones, and what is unknown."""
    free = np.array([token is None for token in spelled])
    free[[token["id"] for token in told.get("added_tokens", [])]] = True
    unknown = told["model"]["vocab"].get(told["model"].get("unk_token"))
    if unknown is not None:
        free[unknown] = True
    return free


# ---- merges ----------------------------------------------------------------------------------------------------------


class _Merges:
    """How byte-pair encoding builds its tokens, by their numbers.

    Attributes:
        made: [V], whether the letters of a token are merged to it.
        left, right: [V], the two parts of the last merge; -1 where there is none.
        time: [V], the highest rank of the merges that build a token; -1 without any.
        left_bound, right_bound: [V], the rank below which a merge across the token's border comes before the merge that
            uses up its left (right) part.
    """

    def __init__(self, told: dict[str, Any], size: int) -> None:
        vocabulary: dict[str, int] = told["model"]["vocab"]
        ranks = {(vocabulary[x], vocabulary[y]): rank for rank, (x, y) in enumerate(told["model"]["merges"])}
        letters = {number for text, number in vocabulary.items() if _is_letter(text, told)}
        tree = _trees(vocabulary, ranks, letters, size)
        self.made, self.left, self.right, self.time, self.left_bound, self.right_bound = tree
        self._index_rules(ranks, size)
        self._index_parts()

    def _index_rules(self, ranks: dict[tuple[int, int], int], size: int) -> None:
        """Merges by their left part: those of x are first_rule[x]: first_rule[x + 1]."""
        left, right = np.array(list(ranks), dtype=np.int64).reshape(-1, 2).T
        rank = np.array(list(ranks.values()), dtype=np.int64)
        order = np.argsort(left, kind="stable")
        self.first_rule = np.searchsorted(left[order], np.arange(size + 1))  # [V + 1]
        self.rule_right, self.rule_rank = right[order], rank[order]  # [merges]

    def _index_parts(self) -> None:
        """All left spines, by part: those that y is on are first_part[y]: first_part[y + 1]."""
        size = len(self.made)
        part = owner = np.flatnonzero(self.made)
        end = bound = np.full(len(part), NEVER)
        levels = []
        while len(part):
            levels.append((part, owner, end, bound))
            inner = self.left[part] >= 0
            part, owner = part[inner], owner[inner]
            part, end, bound = self.left[part], self.time[part], self.left_bound[part]
        parts, owners, ends, bounds = (np.concatenate(column) for column in zip(*levels, strict=True))
        order = np.argsort(parts, kind="stable")
        self.first_part = np.searchsorted(parts[order], np.arange(size + 1))  # [V + 1]
        self.owner, self.end, self.bound = owners[order], ends[order], bounds[order]  # [parts of all spines]

    def apart(self, token: int) -> Flags:
        """[V], the tokens that no merge joins to this one, nor to a part of it."""
        joined = np.zeros(len(self.made), dtype=bool)
        part, end, bound = token, NEVER, NEVER
        while part >= 0:
            rules = slice(self.first_rule[part], self.first_rule[part + 1])
            right, rank = self.rule_right[rules], self.rule_rank[rules]
            in_time = (rank < bound) & (self.time[right] < end)
            right, rank = right[in_time], rank[in_time]
            at, which = _ranges(self.first_part[right], self.first_part[right + 1])
            fires = (rank[which] <= self.bound[at]) & (self.time[part] <= self.end[at])
            joined[self.owner[at[fires]]] = True
            part, end, bound = int(self.right[part]), self.time[part], self.right_bound[part]
        return self.made & ~joined if self.made[token] else np.zeros_like(joined)


def _is_letter(text: str, told: dict[str, Any]) -> bool:
    """What merges begin with: single characters, and the bytes of those that the vocabulary has not."""
    byte = _byte(text, told["model"])
    if byte is None:
        return len(text) == 1
    return byte > 127 or not (chr(byte) in told["model"]["vocab"] or (byte == 32 and _writes_spaces(told)))


def _writes_spaces(told: dict[str, Any]) -> bool:
    """Whether a sign stands for each space."""
    steps = [*_parts(told.get("normalizer")), *_parts(told.get("pre_tokenizer"))]
    return any(step["type"] == "Metaspace" or _replaces_spaces(step) for step in steps)


def _replaces_spaces(step: dict[str, Any]) -> bool:
    return bool(step["type"] == "Replace" and step["pattern"] == {"String": " "})


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of a normalizer or a pre-tokenizer."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step.get("normalizers") or step["pretokenizers"] for part in _parts(inner)]
    return [step]


def _ranges(starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
    """The numbers from each start to its stop, one after another, and which start each belongs to."""
    counts = stops - starts
    which = np.repeat(np.arange(len(starts)), counts)
    return np.arange(counts.sum()) + (starts - counts.cumsum() + counts)[which], which


def _trees(
    vocabulary: dict[str, int], ranks: dict[tuple[int, int], int], letters: Iterable[int], size: int
) -> tuple[Any, ...]:
    """made, left, right, time, left_bound and right_bound of ``_Merges``, shorter tokens first."""
    made, left, right, time = [False] * size, [-1] * size, [-1] * size, [-1] * size
    left_bound, right_bound = [NEVER] * size, [NEVER] * size
    for letter in letters:
        made[letter] = True
    text = {number: text for text, number in vocabulary.items()}

    def crossed(a: int, b: int) -> bool:
        """Whether a merge across a|b comes before that of the two themselves."""
        x, x_end, x_bound = a, NEVER, NEVER
        while x >= 0:
            y, y_end, y_bound = b, NEVER, NEVER
            while y >= 0:
                rank = ranks.get((x, y), NEVER)
                meets = time[x] <= y_end and time[y] < x_end
                if rank < x_bound and rank <= y_bound and meets and (x, y) != (a, b):
                    return True
                y, y_end, y_bound = left[y], time[y], left_bound[y]
            x, x_end, x_bound = right[x], time[x], right_bound[x]
        return False

    for (a, b), rank in sorted(ranks.items(), key=lambda rule: len(text[rule[0][0]]) + len(text[rule[0][1]])):
        token = vocabulary[text[a] + text[b]]
        if made[a] and made[b] and not crossed(a, b):
            made[token], left[token], right[token] = True, a, b
            time[token] = max(rank, time[a], time[b])
            # Where the other part is the later one, this part waits for it, and is there until then.
            left_bound[token] = time[token] if time[b] >= time[a] else rank
            right_bound[token] = time[token] if time[a] > time[b] else rank
    return (np.array(made), *(np.array(x, dtype=np.int64) for x in (left, right, time, left_bound, right_bound)))


# ---- characters ------------------------------------------------------------------------------------------------------


class _Words:
    """What tokens spell: the bytes of a character begun before, whole characters, and the begin of another one.

    Attributes:
        valid: [V], whether UTF-8 may hold the bytes of a token.
        head: [V], how many bytes go on with the last character.
        characters, tails: the whole ones, and the bytes behind them.
        least, most: [V], bytes that the character at the end still lacks: most of them is not known inside of one.
    """

    def __init__(self, spelled: Sequence[bytes | None]) -> None:
        pieces = [_pieces(token or b"") for token in spelled]
        self.valid = np.array([piece is not None for piece in pieces])
        whole = [piece or (0, "", b"") for piece in pieces]
        self.head = np.array([head for head, _, _ in whole])
        self.characters = [characters for _, characters, _ in whole]
        self.tails = [tail for _, _, tail in whole]
        self._inside = np.array([head > 0 and not (characters or tail) for head, characters, tail in whole])
        self.least = np.array([_lacks(tail) for tail in self.tails])
        self.most = np.where(self._inside, 3 - self.head, self.least)

    def whole_character(self, token: int) -> Flags:
        """[V], whether a character may end between the token and the next one."""
        return (self.head == 0) & (self.least[token] == 0)

    def joined(self, token: int) -> Flags:
        """[V], whether the two may stand in UTF-8."""
        return (self.head <= self.most[token]) & (self._inside | (self.head >= self.least[token]))


def _pieces(token: bytes) -> tuple[int, str, bytes] | None:
    """(bytes that go on, whole characters, begin of a character), or None where that is no UTF-8."""
    head = next((i for i, byte in enumerate(token) if byte & 0xC0 != 0x80), len(token))
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        characters = decoder.decode(token[head:])
    except UnicodeDecodeError:
        return None
    return (head, characters, decoder.getstate()[0]) if head <= 3 else None


def _lacks(tail: bytes) -> int:
    """How many bytes a begun character lacks."""
    return sum(tail[0] >= first for first in (0xC0, 0xE0, 0xF0)) + 1 - len(tail) if tail else 0


def _code_points(tail: bytes) -> range:
    """The characters that begin so."""
    first, bits = tail[0] & (0x3F >> _lacks(tail[:1])), 6 * _lacks(tail)
    for byte in tail[1:]:
        first = first << 6 | byte & 0x3F
    return range(first << bits, min((first + 1) << bits, 0x110000))


def _as_split(spelled: Sequence[bytes | None], told: dict[str, Any]) -> list[bytes | None]:
    """The bytes by token as the steps of the pre-tokenizer meet them: SentencePiece has written spaces as a sign."""
    found = list(spelled)
    if not _is_byte_level(told):
        for text, number in told["model"]["vocab"].items():
            byte = _byte(text, told["model"])
            found[number] = None if found[number] is None else text.encode() if byte is None else bytes([byte])
    return found


def _byte(text: str, model: dict[str, Any]) -> int | None:
    """Of a token that is a byte of a character which the vocabulary has not."""
    byte = BYTE.fullmatch(text) if model.get("byte_fallback") else None
    return int(byte[1], 16) if byte else None


def _is_byte_level(told: dict[str, Any]) -> bool:
    decoder = told.get("decoder") or {}
    return "ByteLevel" in [decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", []))]


# ---- steps of the pre-tokenizer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sign:
    """One character. ``atom`` is the part of a regular expression that matches it."""

    atom: str


@dataclass(frozen=True)
class _Look:
    """The next character, or that it is none of ``atom``: also the end of the text."""

    atom: str
    negative: bool


@dataclass(frozen=True)
class _Either:
    """The first way that leads to a match."""

    ways: tuple[_Rule, ...]


@dataclass(frozen=True)
class _Repeat:
    """As often as it leads to a match."""

    body: _Rule
    least: int
    most: int


@dataclass(frozen=True)
class _Gap:
    """What lies before a match: it may end before a character that a match may begin with, or go on with others."""

    atom: str
    begin: str


_Rule = tuple[_Sign | _Look | _Either | _Repeat | _Gap, ...]
_Threads = tuple[_Rule, ...]  # what is left of the rule, the preferred way first
_Way = _Rule | Literal["done", "open"]  # behind a character; or the rule may (not) end before it


class _Step:
    """Where a step of the pre-tokenizer may split, for D states of its rule and U spellings of tokens.

    State 0 is dead, 1 the first one.

    Attributes:
        entered: [V, D], the states in which a token may leave the rule.
    """

    def __init__(self, rule: _Rule, words: _Words) -> None:
        classes, holds = _character_classes(rule)
        machine = _machine(rule, holds, int(classes.max()) + 1)
        wide = np.unique(machine.following[:, np.unique(classes[128:])])  # states behind characters of several bytes
        self._words = words
        self._spelling, spellings = _spellings(words, classes)
        self._final = _run(machine.following, machine.following, spellings)  # [D, U]
        self._joins = _joins(machine, self._final, spellings)  # [D, U]
        self._splits = _splits(machine, spellings)  # [D, U]
        begins = words.head == 0
        self._before = {state: begins | (state in wide) for state in range(2, len(self._final))}  # [V] each
        self.entered = self._entered()

    def narrow(self, made: Flags, whole: bool, apart: Callable[[int], Flags]) -> None:
        """For the last step, whose pieces are the pre-tokens: in their midst, tokens follow one that is kept apart.

        States that only a few tokens lead to, as those within "'re", are entered by what may follow one of these.
        """
        goes_on = self._words.head > 0
        for state, may_come in self._before.items():
            leading = np.flatnonzero(self.entered[:, state] & made & (self._words.least == 0))
            if whole:
                may_come &= made
            if len(leading) <= FEW:
                may_come &= goes_on | np.logical_or.reduce([np.zeros_like(made), *map(apart, leading.tolist())])
        self.entered = self._entered()

    def _entered(self) -> Flags:
        """By the tokens that may come in a state."""
        found = np.zeros((len(self._spelling), len(self._final)), dtype=bool)
        for state, may_come in {1: self._words.head == 0, **self._before}.items():
            tokens = np.flatnonzero(may_come & self._words.valid)
            found[tokens, self._final[state, self._spelling[tokens]]] = True
        found[:, 0] = False
        return found

    def splits(self, token: int) -> Flags:
        """[V], whether a pre-token may end between the two, in some text."""
        return self._splits[self.entered[token]].any(0)[self._spelling]

    def joins(self, token: int) -> Flags:
        """[V], whether the two may stand in one pre-token, in some text."""
        return self._joins[self.entered[token]].any(0)[self._spelling]


def _rules(told: dict[str, Any]) -> list[_Rule]:
    """The rule of each step of the pre-tokenizer. A text is split where any of them splits it."""
    steps = _parts(told.get("pre_tokenizer"))
    late = next((i for i, step in enumerate(steps) if step["type"] == "ByteLevel"), len(steps) - 1) + 1
    if late < len(steps) or (steps and _is_byte_level(told) and steps[-1]["type"] != "ByteLevel"):
        raise _refusal(f"its pre-tokenizer does {steps[-1]['type']} where texts are bytes already")
    if len(steps) > 1 and any(step.get("add_prefix_space") or step.get("prepend_scheme") == "always" for step in steps):
        raise _refusal("its pre-tokenizer puts a space before each piece that a step of it has split off")
    return [rule for rule in map(_rule, steps) if rule]


def _rule(step: dict[str, Any]) -> _Rule:
    """What a step matches; nothing where it splits nothing."""
    kind = step["type"]
    if kind == "ByteLevel":
        return _Reader(GPT2).rule if step.get("use_regex", True) else ()
    if kind == "Digits":
        return (_Sign(DIGIT),) if step["individual_digits"] else (_Repeat((_Sign(DIGIT),), 1, ENDLESS),)
    if kind == "Metaspace":
        return _Reader(_around(step["replacement"], "MergedWithNext")).rule if step.get("split", True) else ()
    if kind == "Split":
        return _split_rule(step)
    raise _refusal(f"its pre-tokenizer has a step {kind}; ByteLevel, Split, Digits and Metaspace are known")


def _split_rule(step: dict[str, Any]) -> _Rule:
    """Of a step that splits by a text or a regular expression."""
    (kind, pattern), behavior = next(iter(step["pattern"].items())), step["behavior"]
    if kind == "String" and len(pattern) == 1:
        return _Reader(_around(pattern, behavior)).rule
    rule = _Reader("".join(map(_escaped, pattern)) if kind == "String" else pattern).rule
    if behavior == "Isolated" or (behavior == "Removed" and step["invert"] and _covers(rule)):
        return rule
    raise _refusal(f"its pre-tokenizer splits by {pattern!r} with the behavior {behavior}; Isolated is known")


def _covers(rule: _Rule) -> bool:
    """Whether its matches leave nothing of a text over."""
    classes, holds = _character_classes(rule)
    return not _covering(rule, holds, int(classes.max()) + 1)[1][GAP]


def _around(sign: str, behavior: str) -> str:
    """The pieces around a sign, which is one character."""
    one, others = _escaped(sign), f"[^{_escaped(sign)}]"
    patterns = {
        "Isolated": one,
        "Contiguous": f"{one}+",
        "MergedWithNext": f"{one}{others}*|{others}+",
        "MergedWithPrevious": f"{others}*{one}|{others}+",
    }
    if behavior not in patterns:
        raise _refusal(f"its pre-tokenizer splits at {sign!r} with the behavior {behavior}, which loses it")
    return patterns[behavior]


def _escaped(character: str) -> str:
    return rf"\x{{{ord(character):x}}}"


CLASS = r"\[\^?(?:\\.|[^]\\[&]|&(?!&))+\]"
ESCAPE = r"\\[pP]\{\^?\w+\}|\\x\{[0-9A-Fa-f]+\}|\\[sSdDwWnrtfv]|\\[^\w\s]"
COUNT = r"\{\d+(?:,\d*)?\}|[?*+]"
GROUP = r"\(\?(?:i:|[:=!])|\((?!\?)|[)|]"
LEXEME = re.compile("|".join([GROUP, COUNT, CLASS, ESCAPE, r"[^]\\()[{}|?*+^$]"]))
BOUNDS = {"?": (0, 1), "*": (0, ENDLESS), "+": (1, ENDLESS)}
FOLDED = re.compile(r"ss|ff|fi|fl|st|[(\[\\]|[^\x00-\x7f]", re.IGNORECASE)  # where one character may match two


class _Reader:
    """A rule from a regular expression of Oniguruma, which tokenizers uses; ``rule`` holds it."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._left = LEXEME.findall(pattern)[::-1]
        if "".join(self._left[::-1]) != pattern:
            raise self._unknown("holds more than characters, classes, groups, alternatives and repetitions")
        for folded in re.findall(r"\(\?i:([^)]*)", pattern):
            if FOLDED.search(folded):
                raise self._unknown(f"ignores the case of {folded!r}, where one character may be two")
        self.rule = self._either(False)
        if self._left:
            raise self._unknown(f"has {self._left[-1]!r} too much")

    def _unknown(self, why: str) -> OptionError:
        return _refusal(f"its pre-tokenizer splits by {self._pattern!r}, which {why}")

    def _next_is(self, *lexemes: str) -> bool:
        return bool(self._left) and self._left[-1] in lexemes

    def _either(self, fold: bool) -> _Rule:
        ways = [self._sequence(fold)]
        while self._next_is("|"):
            self._left.pop()
            ways.append(self._sequence(fold))
        return ways[0] if len(ways) == 1 else (_Either(tuple(ways)),)

    def _sequence(self, fold: bool) -> _Rule:
        found: _Rule = ()
        while self._left and not self._next_is("|", ")"):
            found += self._repeated(self._item(self._left.pop(), fold))
        return found

    def _item(self, lexeme: str, fold: bool) -> _Rule:
        if lexeme[0] == "(":
            return self._group(lexeme, fold)
        if re.fullmatch(COUNT, lexeme):
            raise self._unknown(f"repeats nothing by {lexeme!r}")
        return (_Sign(f"(?i:{lexeme})" if fold else lexeme),)

    def _group(self, begin: str, fold: bool) -> _Rule:
        inner = self._either(fold or begin == "(?i:")
        if not self._next_is(")"):
            raise self._unknown("opens more groups than it closes")
        self._left.pop()
        if begin not in ("(?=", "(?!"):
            return inner
        if len(inner) == 1 and isinstance(inner[0], _Sign):
            return (_Look(inner[0].atom, begin == "(?!"),)
        raise self._unknown("looks at more than the next character")

    def _repeated(self, item: _Rule) -> _Rule:
        if not self._left or not re.fullmatch(COUNT, self._left[-1]):
            return item
        count = self._left.pop()
        if self._left and re.fullmatch(COUNT, self._left[-1]):
            raise self._unknown(f"has a lazy or possessive repetition {count + self._left[-1]!r}")
        if _may_be_empty(item):
            raise self._unknown("repeats what may be empty")
        least, most = BOUNDS.get(count) or _bounds(count)
        return (_Repeat(item, least, most),)


def _bounds(count: str) -> tuple[int, int]:
    """Of {2}, {2,} and {2,3}."""
    least, comma, most = count[1:-1].partition(",")
    return int(least), int(most) if most else ENDLESS if comma else int(least)


def _may_be_empty(rule: _Rule) -> bool:
    return all(
        isinstance(node, _Look)
        or (isinstance(node, _Either) and any(map(_may_be_empty, node.ways)))
        or (isinstance(node, _Repeat) and node.least == 0)
        for node in rule
    )


def _atoms(rule: _Rule) -> Iterator[str]:
    for node in rule:
        if isinstance(node, _Either):
            yield from (atom for way in node.ways for atom in _atoms(way))
        elif isinstance(node, _Repeat):
            yield from _atoms(node.body)
        else:
            yield node.atom


def _character_classes(rule: _Rule) -> tuple[NDArray[np.uint8], dict[str, frozenset[int]]]:
    """Those that the rule tells apart."""
    return _classes(tuple(dict.fromkeys(_atoms(rule))))


@lru_cache(8)
def _classes(atoms: tuple[str, ...]) -> tuple[NDArray[np.uint8], dict[str, frozenset[int]]]:
    """[1114112], the class of every character, and the classes that each atom holds.

    The engine of the tokenizer decides: Python's tables may be those of another version of Unicode.
    """
    points = np.arange(0x110000)
    taken = _told_apart(points, atoms)
    characters = points[taken].astype("<u4").tobytes().decode("utf-32-le")
    splitting = pre_tokenizers.Sequence([_splitting(atom) for atom in atoms])
    starts = [start for _, (start, _) in splitting.pre_tokenize_str(characters)]  # of runs that no atom tells apart
    held = np.array([[_holds(atom, characters[start]) for start in starts] for atom in atoms])  # [atoms, runs]
    columns, class_of = np.unique(held, axis=1, return_inverse=True)
    if columns.shape[1] > MOST:
        raise _refusal(f"its pre-tokenizer tells more than {MOST} kinds of characters apart")
    run_of = np.repeat(np.arange(len(starts)), np.diff([*starts, len(characters)]))
    classes = class_of.reshape(-1)[run_of][np.cumsum(taken) - 1].astype(np.uint8)  # others are as the one before
    return classes, {atom: frozenset(np.flatnonzero(row).tolist()) for atom, row in zip(atoms, columns, strict=True)}


def _told_apart(points: Integers, atoms: Iterable[str]) -> Flags:
    """Characters to look at: no surrogates, and few of the planes that are empty (4 to 13) or private (15 and 16)."""
    named = [int(code, 16) for code in re.findall(r"\\x\{(\w+)\}", " ".join(atoms))]
    if max([*named, *map(ord, "".join(atoms))]) < FAR:
        alike = (points >= FAR) & (points >> 16 != 14) & (points % 4096 != 0) & (points % 2**16 < 0xFFFE)
    else:
        alike = np.zeros(len(points), dtype=bool)
    return ~alike & ((points < 0xD800) | (points >= 0xE000))


def _splitting(atom: str) -> Any:
    """The step that takes runs of what an atom matches out of a text."""
    return pre_tokenizers.Digits() if atom == DIGIT else pre_tokenizers.Split(Regex(f"(?:{atom})+"), "isolated")


def _holds(atom: str, character: str) -> bool:
    if atom == DIGIT:
        return len(pre_tokenizers.Digits().pre_tokenize_str("0" + character)) == 1
    return not pre_tokenizers.Split(Regex(atom), "removed").pre_tokenize_str(character)


@dataclass(frozen=True)
class _Machine:
    """The states of a rule, for C classes of characters and the end of a text, which is the last column.

    Attributes:
        following: [D, C + 1], the state behind a character.
        may, must: [D, C + 1], whether a match may (must) end before a character, if no longer one is preferred.
    """

    following: NDArray[np.int16]
    may: Flags
    must: Flags


def _machine(rule: _Rule, holds: dict[str, frozenset[int]], count: int) -> _Machine:
    rule, holds = _covering(rule, holds, count)
    number: dict[_Threads, int] = {(): 0, (rule,): 1}
    rows = []
    for threads in (states := list(number)):  # grows
        row = [_after(threads, sign, holds) for sign in range(count + 1)]
        fresh = dict.fromkeys(to for to, _, _ in row if to not in number)
        number |= {to: len(number) + i for i, to in enumerate(fresh)}
        states += fresh
        if len(states) > MOST:
            raise _refusal(f"its pre-tokenizer splits by an expression of more than {MOST} states")
        rows.append([(number[to], may, must) for to, may, must in row])
    following, may, must = np.moveaxis(np.array(rows), 2, 0)
    return _Machine(following.astype(np.int16), may.astype(bool), must.astype(bool))


def _covering(rule: _Rule, holds: dict[str, frozenset[int]], count: int) -> tuple[_Rule, dict[str, frozenset[int]]]:
    """With the pieces between matches, which hold no character that always begins one."""
    if any(_after((rule,), sign, holds)[1] for sign in range(count + 1)):
        raise _refusal("its pre-tokenizer splits by an expression that matches the empty text")
    behind = [_after((rule,), sign, holds)[0] for sign in range(count)]
    always = {sign for sign in range(count) if all(_after(behind[sign], end, holds)[2] for end in range(count + 1))}
    sets = {GAP: set(range(count)) - always, BEGIN: {sign for sign in range(count) if behind[sign]}}
    rule = (_Either((rule, (_Sign(GAP), _Gap(GAP, BEGIN)))),)
    return rule, {**holds, **{name: frozenset(signs) for name, signs in sets.items()}}


def _after(threads: _Threads, sign: int, holds: dict[str, frozenset[int]]) -> tuple[_Threads, bool, bool]:
    """The threads behind a character, and whether a match may or must end before it: then no later ones matter."""
    found: dict[_Rule, None] = {}
    may = False
    for way in (way for thread in threads for way in _ways(thread, sign, holds)):
        if way == "done":
            return tuple(found), True, True
        if way == "open":
            may = True
        else:
            found[way] = None
    return tuple(found), may, False


def _ways(rule: _Rule, sign: int, holds: dict[str, frozenset[int]]) -> Iterator[_Way]:
    """What is left of a rule behind a character, in order of preference."""
    if not rule:
        yield "done"
        return
    node, rest = rule[0], rule[1:]
    match node:
        case _Sign(atom) if sign in holds[atom]:
            yield rest
        case _Look(atom, negative) if (sign in holds[atom]) != negative:
            yield from _ways(rest, sign, holds)
        case _Either(ways):
            for way in ways:
                yield from _ways(way + rest, sign, holds)
        case _Repeat(body, least, most):
            fewer = _Repeat(body, max(least - 1, 0), most if most == ENDLESS else most - 1)
            if most > 0:
                yield from _ways((*body, fewer, *rest), sign, holds)
            if least == 0:
                yield from _ways(rest, sign, holds)
        case _Gap(atom, begin):
            if sign in holds[begin]:
                yield "open"
            if sign in holds[atom]:
                yield rule


# ---- spellings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spellings:
    """U strings of classes, and the classes in one of which the character that is begun behind it may be.

    Attributes:
        signs: [U, longest].
        lengths: [U].
        begun: [U], a number of ``groups``; 0 where no character is begun.
        groups: sets of classes.
    """

    signs: NDArray[np.uint8]
    lengths: Integers
    begun: Integers
    groups: list[frozenset[int]]


def _spellings(words: _Words, classes: NDArray[np.uint8]) -> tuple[Integers, _Spellings]:
    """[V], the spelling of each token; and the spellings."""
    signs = classes[np.frombuffer("".join(words.characters).encode("utf-32-le"), dtype="<u4")].tobytes()
    groups = {frozenset[int](): 0}
    group_of = {b"": 0}
    for tail in set(words.tails) - {b""}:
        points = _code_points(tail)
        group = frozenset(np.unique(classes[points.start : points.stop]).tolist())
        group_of[tail] = groups.setdefault(group, len(groups))
    stops = np.cumsum([len(characters) for characters in words.characters])
    keys = [
        (signs[stop - len(characters) : stop], group_of[tail])
        for stop, characters, tail in zip(stops.tolist(), words.characters, words.tails, strict=True)
    ]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    lengths = np.array([len(text) for text, _ in number])
    padded = b"".join(text.ljust(lengths.max(), b"\0") for text, _ in number)
    table = np.frombuffer(padded, dtype=np.uint8).reshape(len(number), -1)
    begun = np.array([group for _, group in number])
    return np.array([number[key] for key in keys]), _Spellings(table, lengths, begun, list(groups))


def _run(first: NDArray[np.int16], later: NDArray[np.int16], spellings: _Spellings) -> NDArray[np.int16]:
    """[states, U], the state behind each spelling, from each state; the first step has a table of its own."""
    states = np.tile(np.arange(len(first), dtype=np.int16)[:, None], len(spellings.lengths))
    for i in range(spellings.signs.shape[1]):
        longer = np.flatnonzero(spellings.lengths > i)
        states[:, longer] = (later if i else first)[states[:, longer], spellings.signs[longer, i]]
    return states


def _any_of(table: Flags, groups: Iterable[frozenset[int]]) -> Flags:
    """[D, groups] from [D, C], whether it holds for a class of the group."""
    return np.stack([table[:, sorted(group)].any(1) for group in groups], 1)


def _joins(machine: _Machine, final: NDArray[np.int16], spellings: _Spellings) -> Flags:
    """[D, U], whether a pre-token may go on over a spelling."""
    goes_on = _any_of(machine.following != 0, spellings.groups)  # [D, groups]
    return np.where(spellings.begun == 0, final != 0, goes_on[final, spellings.begun])


def _splits(machine: _Machine, spellings: _Spellings) -> Flags:
    """[D, U], whether a match may end before a spelling: no preferred one, which is longer, must match in the end."""
    matched = len(machine.following)  # the state in which a preferred one has
    first = np.where(machine.may, machine.following, matched).astype(np.int16)
    later = np.where(machine.must, matched, machine.following).astype(np.int16)
    first, later = (np.vstack([table, np.full_like(table[:1], matched)]) for table in (first, later))
    fails = np.append(~machine.must.all(1), False)  # [D + 1], in some continuation
    last = _run(first, later, spellings)[:matched]
    within = _any_of(fails[later], spellings.groups)[last, spellings.begun]
    at_once = _any_of(fails[first], spellings.groups)[last, spellings.begun]
    begun = np.where(spellings.lengths == 0, at_once, within)
    return np.where(spellings.begun == 0, fails[last], begun)
