"""Small corpora for the data tests."""

import random

from maxlm.data.prepare import prepare
from maxlm.data.tokenizer import END_OF_TEXT

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa ünïcode 東京 🙂 return def class".split()


def document(number, low=5, high=120):
    draw = random.Random(number)
    return f"# {number}\n" + " ".join(draw.choices(WORDS, k=draw.randint(low, high))) + "\n"


def write_folder(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document(number) for number in range(first, first + count)]
    for number, text in enumerate(texts, first):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return texts


def prepare_quietly(inputs, out, **changes):
    settings = {"tokenizer": "bytes", "seq_len": 64, "heldout_fraction": 0.2, "workers": 1} | changes
    return prepare([str(path) for path in inputs], out=str(out), show_progress=False, **settings)


def word_tokenizer(eot=END_OF_TEXT):
    """Lower-cases, and drops white space: neither byte-level nor lossless."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2, eot: 3}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([eot])
    return inner
