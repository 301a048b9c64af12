"""Tokenizers: lossless, exact byte counts, special tokens in the text are text."""

import json

import numpy as np
import pytest
from data_corpus import word_tokenizer

from maxlm.data.tokenizer import END_OF_TEXT, ByteTokenizer, HuggingFaceTokenizer, load_tokenizer, train_bpe
from maxlm.schema import ConfigError

TEXTS = ["def f(x):\n\treturn  x\r\n",
         "naïve café — 東京 🙂\u200d", f"a{END_OF_TEXT}b", " leading\n\n\n", "\ufeffbom", "x"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["def f(x):\n    return x\n", "for x in range(10):\n    print(x)\n"] * 20, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_exact_bytes(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        [(ids, widths)] = tokenizer.encode_batch_bytes([text])
        assert tokenizer.decode(ids) == text
        assert widths.sum() == len(text.encode())
        assert tokenizer.eot_id not in ids.tolist()
        np.testing.assert_array_equal(tokenizer.token_bytes[ids], widths)


def test_token_bytes_are_those_of_each_token(bpe):
    """Each token's count, not only the sum: checked on ASCII text, where a token decodes alone."""
    [ids] = bpe.encode_batch([TEXTS[0]])
    assert [len(bpe.decode([i])) for i in ids] == bpe.token_bytes[ids].tolist()


def test_trained_bpe_is_deterministic_and_loads_back(bpe, tmp_path):
    again = train_bpe(["for x in range(10):\n    print(x)\n", "def f(x):\n    return x\n"] * 20, 300)
    assert again.sha256 == bpe.sha256
    bpe.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.sha256, loaded.vocab_size, loaded.eot_id) == (bpe.sha256, bpe.vocab_size, bpe.eot_id)
    assert bpe.vocab_size <= 300 and train_bpe(["other text entirely"], 300).sha256 != bpe.sha256


def test_offsets_count_bytes_where_the_tokenizer_is_not_byte_level():
    tokenizer = HuggingFaceTokenizer(word_tokenizer(), "words")
    assert tokenizer.token_bytes is None
    text = "  Hello wörld 東京 world\n"
    [(ids, widths)] = tokenizer.encode_batch_bytes([text])
    assert widths.tolist() == [7, 7, 7, 7]  # white space counts with what follows, at the end with the last
    assert len(ids) == 4 and widths.sum() == len(text.encode())


def test_end_token_comes_from_the_config_beside(tmp_path):
    inner = word_tokenizer("<stop>")
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eot_id == 4
    word_tokenizer("<stop>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_tokenizer(str(tmp_path)).eot_id == 3
    (tmp_path / "saved").mkdir()
    HuggingFaceTokenizer(inner, "two ends", "<stop>").save(str(tmp_path / "saved" / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "saved")).eot_id == 3


@pytest.mark.parametrize("spec", ["bpe:12", "bpe:x", "nowhere.json", "bpe:512"])
def test_bad_tokenizer_is_one_line(spec):
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(spec)
    assert spec in str(caught.value) and "\n" not in str(caught.value)


def test_broken_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(path))
