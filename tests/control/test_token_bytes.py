"""The bytes of a tokenizer's tokens: joined, they are the text that was encoded."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smc_compile.control.token_bytes import token_bytes
from smc_compile.errors import OptionError
from smc_compile.pairs.shipped import load_pair

TEXTS = ["def add(a, b):\n    return a + b\n", "naïve 你好 \U0001f600 é", "  two  spaces\t", '{"a": [1, 2.5e-3]}']


def sentencepiece() -> Tokenizer:
    """BPE with SentencePiece's sign for a space, and its bytes for what no token spells."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], initial_alphabet=list("abc"))
    tokenizer.train_from_iterator(["the quick brown fox 12 [ ] x = word and two spaces"], trainer)
    vocabulary = {**tokenizer.get_vocab()}
    for byte in bytes_:
        vocabulary.setdefault(byte, len(vocabulary))
    told = json.loads(tokenizer.to_str())
    told["model"]["vocab"] = vocabulary
    told["decoder"] = json.loads(Tokenizer(models.BPE()).to_str())["decoder"]
    rebuilt = Tokenizer.from_str(json.dumps(told))
    rebuilt.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return rebuilt


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    found = token_bytes(tokenizer)
    return b"".join(found[i] or b"" for i in tokenizer.encode(text, add_special_tokens=False).ids)


def test_byte_level_tokens_are_their_bytes():
    tokenizer = load_pair()[2]
    for text in TEXTS:
        assert joined(tokenizer, text) == text.encode()


def test_pieces_are_their_letters_with_spaces_and_single_bytes():
    tokenizer = sentencepiece()
    for text in TEXTS:
        assert joined(tokenizer, text) in (text.encode(), b" " + text.encode())


def test_special_tokens_are_no_text_and_added_words_are():
    tokenizer = Tokenizer.from_str(load_pair()[2].to_str())
    tokenizer.add_special_tokens(["<|stop|>"])
    tokenizer.add_tokens(["hello world"])
    found = token_bytes(tokenizer)
    assert found[tokenizer.token_to_id("<|stop|>")] is None
    assert found[tokenizer.token_to_id("hello world")] == b"hello world"


def test_a_list_is_taken_as_it_is():
    assert token_bytes([b"a", None, b"bc"]) == [b"a", None, b"bc"]
    with pytest.raises(OptionError, match="must hold bytes"):
        token_bytes([b"a", "b"])


def test_a_tokenizer_that_changes_its_text_is_refused():
    tokenizer = Tokenizer.from_str(load_pair()[2].to_str())
    tokenizer.normalizer = normalizers.Replace("n", "m")
    with pytest.raises(OptionError, match="changes the text that it encodes"):
        token_bytes(tokenizer)


def test_a_decoder_that_is_not_known_is_refused():
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(OptionError, match="its decoder is WordPiece"):
        token_bytes(tokenizer)
    with pytest.raises(OptionError, match="no tokenizer of tokenizers or transformers"):
        token_bytes(object())


def test_random_texts_of_many_letters():
    tokenizer, drawn = load_pair()[2], random.Random(0)
    for _ in range(50):
        text = "".join(chr(drawn.choice([*range(32, 127), 233, 0x4F60, 0x1F600, 10, 9])) for _ in range(20))
        assert joined(tokenizer, text) == text.encode()
