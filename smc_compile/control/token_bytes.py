"""The bytes that each token of a tokenizer stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from smc_compile.errors import OptionError

SAMPLES = ("word and two  spaces\n\tx = [1, 22, 333]", "naïve Ω≈ç 你好 \U0001f600", '{"a": -1.5e+3}')
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte, in SentencePiece's form


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every token, by its number; None for special tokens, which are no text.

    Args:
        tokenizer: of tokenizers or transformers (byte-level BPE, or SentencePiece's with its space sign and its bytes),
            or the list itself.

    Raises:
        OptionError: it is none of these, or its tokens are not what it encodes texts to.
    """
    if isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str | bytes):
        return _listed(tokenizer)
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not callable(getattr(inner, "to_str", None)):
        raise OptionError(
            "the tokenizer does not tell the bytes of its tokens",
            f"{type(tokenizer).__name__} is no tokenizer of tokenizers or transformers",
            "pass such a tokenizer, or a list with the bytes of each token (None for special ones)",
        )
    told = json.loads(inner.to_str())
    special = {token["id"] for token in told.get("added_tokens", []) if token.get("special")}
    added = {token["id"]: token["content"] for token in told.get("added_tokens", [])}
    read = _reader(told)
    vocabulary = inner.get_vocab(with_added_tokens=True)
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for text, number in vocabulary.items():
        if number not in special:
            found[number] = added[number].encode() if number in added else read(text)
    _check(inner, found, special)
    return found


def _listed(tokens: Sequence[Any]) -> list[bytes | None]:
    wrong = next((t for t in tokens if t is not None and not isinstance(t, bytes)), None)
    if wrong is not None:
        raise OptionError(
            "a list of tokens must hold bytes", f"got {wrong!r}", "encode each, or None where it is no text"
        )
    return list(tokens)


def _reader(told: dict[str, Any]) -> Any:
    """From a token of the vocabulary to its bytes."""
    decoder = told.get("decoder") or {}
    kinds = [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))]
    if "ByteLevel" in kinds:
        return lambda text: bytes(_byte_of()[c] for c in text)
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        space = decoder.get("replacement", "▁")
        return lambda text: _piece(text, space)
    raise OptionError(
        "the tokenizer does not tell the bytes of its tokens",
        f"its decoder is {decoder.get('type') or 'missing'}, and byte-level BPE and SentencePiece are known",
        "pass a list with the bytes of each token (None for special ones) as the tokenizer",
    )


def _piece(text: str, space: str) -> bytes:
    byte = BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(space, " ").encode()


@cache
def _byte_of() -> dict[str, int]:
    """The signs by which byte-level BPE writes bytes (Radford et al., 2019): printable ones are themselves."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


def _check(inner: Any, found: list[bytes | None], special: set[int]) -> None:
    """The bytes of an encoded text are the text's: but for a space that SentencePiece puts in front."""
    for text in SAMPLES:
        ids = [i for i in inner.encode(text, add_special_tokens=False).ids if i not in special]
        spelled = b"".join(found[i] or b"" for i in ids)
        if spelled.removeprefix(b" ") != text.encode():
            raise OptionError(
                "the tokenizer changes the text that it encodes",
                f"{text!r} became {spelled.decode(errors='replace')!r}: what its tokens stand for is not known",
                "pass a list with the bytes of each token (None for special ones) as the tokenizer",
            )
