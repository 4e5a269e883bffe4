"""The tokenizers against transformers', on vocabularies of a few words in the published files' forms."""

import json
import shutil
from pathlib import Path

import pytest

from kontext_min.models.tokenizers import clip_tokenizer, t5_tokenizer

TEXTS = [
    "", " ", "make the sky red", "MAKE the Sky ReD, please!", "  spaces \t and\nlines\r\n ",
    "don't it's we'll I'm THEY'RE o'clock", "123 4.5 2nd, 50%", "é ü ß ﬁ ½", "写真 🙂 Привет",
    "a-b_c/d (e) [f] \"g\" “h”", "...!!!???", "hat " * 600, "x" * 300, "<|endoftext|> in the middle",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_clip_tokens_equal_transformers(text, kontext):  # trap 9
    transformers = pytest.importorskip("transformers")
    oracle = transformers.CLIPTokenizer.from_pretrained(kontext / "tokenizer")
    expected = oracle(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert clip_tokenizer(kontext / "tokenizer")([text]).tolist() == [expected]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_t5_tokens_equal_transformers(text, kontext):  # trap 6
    transformers = pytest.importorskip("transformers")
    oracle = transformers.T5TokenizerFast.from_pretrained(kontext / "tokenizer_2")
    expected = oracle(text, padding="max_length", max_length=512, truncation=True).input_ids
    assert t5_tokenizer(kontext / "tokenizer_2")([text]).tolist() == [expected]


def test_sentencepiece_file_and_tokenizer_json_say_the_same(kontext, tmp_path):
    shutil.copy(kontext / "tokenizer_2/spiece.model", tmp_path)
    texts = [text for text in TEXTS if text.isascii()]
    assert (t5_tokenizer(tmp_path)(texts) == t5_tokenizer(kontext / "tokenizer_2")(texts)).all()


def test_text_is_always_77_and_512_tokens_long(kontext):  # trap 6
    clip, t5 = clip_tokenizer(kontext / "tokenizer"), t5_tokenizer(kontext / "tokenizer_2")
    assert clip(["red", "red " * 600]).shape == (2, 77) and t5(["red", "red " * 600]).shape == (2, 512)


def test_ends_are_kept_and_padding_is_as_published(kontext):
    clip, t5 = clip_tokenizer(kontext / "tokenizer"), t5_tokenizer(kontext / "tokenizer_2")
    start, end = (
        json.loads((kontext / "tokenizer/vocab.json").read_text())[f"<|{w}oftext|>"] for w in ("start", "end")
    )
    short, long = clip(["", "red " * 600]).tolist()
    assert short == [start] + 76 * [end] and long[0] == start and long[-1] == end and long.count(end) == 1
    short, long = t5(["", "red " * 600]).tolist()
    assert short == [1] + 511 * [0] and long[-1] == 1 and long.count(1) == 1


@pytest.mark.parametrize("tokenizer", [clip_tokenizer, t5_tokenizer])
def test_an_empty_folder_is_refused_with_the_names_of_the_files(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        tokenizer(Path(tmp_path))


def test_what_a_long_prompt_loses_is_counted(kontext):
    tokenize = t5_tokenizer(kontext / "tokenizer_2")
    words = "make the sky red " * 400
    kept = int((tokenize([words]) != tokenize.pad_id).sum())
    assert kept == tokenize.length == 512
    assert tokenize.excess(words) == len(tokenize.encode(words)) + 1 - 512 > 0
    assert tokenize.excess("make the sky red") == 0
