"""Tokenizers behind one small interface: raw bytes, any Hugging Face `tokenizer.json`, a BPE trained on the corpus.

Every tokenizer knows how many UTF-8 bytes of source text each token stands for, so that bits per byte is exact: from
a table where it is byte-level and lossless, from character offsets otherwise. `<|endoftext|>` in the source text is
ordinary text; only the packer writes the token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from maxlm.schema import ConfigError, require

END_OF_TEXT = "<|endoftext|>"
_CONFIG = "tokenizer_config.json"
_KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer.

    name: 'bytes', or how the `tokenizer.json` came about. sha256: of what determines the ids.
    token_bytes: UTF-8 bytes each id stands for, int32 [vocab_size], or None where that depends on the text.
    """

    name: str
    vocab_size: int
    eot_id: int
    sha256: str
    token_bytes: np.ndarray | None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without begin or end tokens."""
        ...

    def encode_batch_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids of each text, and the UTF-8 bytes each id stands for; these sum to the text's length."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. EOT decodes to nothing; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, path: str) -> None:
        """Writes `path`, and its end-of-text token into a tokenizer_config.json beside it. Nothing for 'bytes'."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 is end of text."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_batch_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, np.ones(len(ids), np.int32)) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def save(self, path: str) -> None:
        del path


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer`. `eot` names its end-of-text token; None looks for a known one."""

    def __init__(self, inner: Any, name: str, eot: str | None = None):
        self._inner = inner
        self.name = name
        self.sha256 = hashlib.sha256(inner.to_str().encode()).hexdigest()
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        found = [token for token in ((eot,) if eot else _KNOWN_END_TOKENS) if token in vocabulary]
        require(bool(found), f"tokenizer {name!r} has no end-of-text token: add one of {', '.join(_KNOWN_END_TOKENS)}")
        self._eot = found[0]
        self.eot_id = vocabulary[self._eot]
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # a special token spelt out in the source text is text
        self.token_bytes = _byte_level_table(json.loads(inner.to_str()), vocabulary, self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def encode_batch_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self.token_bytes is not None:
            return [(ids, self.token_bytes[ids]) for ids in self.encode_batch(texts)]
        encodings = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.asarray(encoding.ids, np.uint32), _bytes_by_offset(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode([int(i) for i in ids if i != self.eot_id], skip_special_tokens=False)

    def save(self, path: str) -> None:
        config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eot}, indent=1)
        beside = os.path.join(os.path.dirname(path), _CONFIG)
        for name, text in ((beside, config), (path, self._inner.to_str())):
            with open(f"{name}.tmp", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(f"{name}.tmp", name)


def _byte_level_table(spec: dict[str, Any], vocabulary: dict[str, int], vocab_size: int) -> np.ndarray | None:
    """UTF-8 bytes of each id where the tokenizer maps bytes to characters one to one and drops none, else None."""
    pre = spec.get("pre_tokenizer") or {}
    stages = pre.get("pretokenizers", [pre])
    lossless = all(
        (stage.get("type") == "ByteLevel" and not stage.get("add_prefix_space"))
        or (stage.get("type") == "Split" and stage.get("behavior") != "Removed")
        or stage.get("type") == "Digits"
        for stage in stages
    ) and any(stage.get("type") == "ByteLevel" for stage in stages)
    alphabet = all(chr(c) in vocabulary for c in (*range(0x100, 0x144), *range(0x21, 0x7F)))
    if spec.get("normalizer") is not None or not lossless or not alphabet:
        return None
    table = np.zeros(vocab_size, np.int32)
    for token, i in vocabulary.items():
        table[i] = len(token)  # in the byte alphabet, a character is a byte
    for added in spec.get("added_tokens", []):  # these are spelt in plain text, and special ones never come from text
        table[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return table


def _bytes_by_offset(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes a token, from character offsets: from the end of the token before to its own end.

    Tokens that share a character give its bytes to the first; text dropped by the normalizer goes to the token after
    it, or to the last one. So the sum is always the length of the text.
    """
    if not offsets:
        return np.zeros(0, np.int32)
    widths = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (widths >= 0x80).astype(np.int64) + (widths >= 0x800) + (widths >= 0x10000)
    byte_of_character = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(byte_of_character[np.array([end for _, end in offsets])])
    ends[-1] = byte_of_character[-1]
    return np.diff(ends, prepend=0).astype(np.int32)


def bpe_size(spec: str) -> int | None:
    """SIZE of 'bpe:SIZE', None for any other tokenizer. Raises ConfigError for a size that cannot be."""
    if not spec.startswith("bpe:"):
        return None
    size = spec.removeprefix("bpe:")
    require(
        size.isdecimal() and 257 <= int(size) <= 1_000_000,
        f"tokenizer {spec!r}: SIZE of 'bpe:SIZE' must be a whole number from 257 (bytes and end of text) to 1000000",
    )
    return int(size)


def train_bpe(texts: Iterable[str], size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of at most `size` ids; the same texts in any order
    give the same tokenizer. Fewer ids come out where the texts hold no more repeated pairs."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(inner, f"bpe:{size}", END_OF_TEXT)


def load_tokenizer(spec_or_path: str, name: str | None = None) -> Tokenizer:
    """'bytes', or the path of a Hugging Face `tokenizer.json` (or of the folder that holds it).

    The end-of-text token is the `eos_token` of a `tokenizer_config.json` beside it, or a well-known name.
    Raises ConfigError when there is no such file, it cannot be parsed, or it has no end-of-text token.
    """
    if spec_or_path == "bytes":
        return ByteTokenizer()
    require(bpe_size(spec_or_path) is None, f"tokenizer {spec_or_path!r} is trained by `maxlm data prepare`: "
            "load the tokenizer.json in the prepared folder")
    path = os.path.join(spec_or_path, "tokenizer.json") if os.path.isdir(spec_or_path) else spec_or_path
    require(os.path.isfile(path), f"tokenizer {spec_or_path!r} is not 'bytes', 'bpe:SIZE' or a tokenizer.json")
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"tokenizer {path!r} is not a Hugging Face tokenizer.json: {error}") from None
    return HuggingFaceTokenizer(inner, name or os.path.basename(path), _configured_end_token(path))


def _configured_end_token(path: str) -> str | None:
    beside = os.path.join(os.path.dirname(path), _CONFIG)
    if not os.path.isfile(beside):
        return None
    try:
        with open(beside, encoding="utf-8") as file:
            token = json.load(file).get("eos_token")
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"tokenizer: {beside!r} beside the tokenizer.json is not readable JSON") from None
    return token.get("content") if isinstance(token, dict) else token
