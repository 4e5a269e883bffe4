"""The two tokenizers, from their standard files: strings -> token ids (B, length), padded and cut as FLUX expects.

T5 is SentencePiece's unigram (`tokenizer.json` or `spiece.model`), CLIP a lower-cased byte-pair encoding
(`tokenizer.json` or `vocab.json` + `merges.txt`).
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

T5_LENGTH = 512  # FLUX.1-dev and Kontext; a tokenizer_config.json with a smaller model_max_length lowers it
CLIP_LENGTH = 77
BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # of a text for CLIP


def text_length(folder: Path, most: int) -> int:
    """How many tokens a text has: `most`, or less if tokenizer_config.json says so."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return int(min(most, config.get("model_max_length", most)))


def read_json(path: Path, part: str) -> dict:
    """A tokenizer's file that has this part; the libraries do not say in a sentence that a file is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or part not in content:
        raise ValueError(f"{path} holds no tokenizer; copy it again from the model's repository")
    return content


def from_json(folder: Path) -> FastTokenizer:
    """tokenizer.json as an object of the tokenizers library, for texts of any length."""
    content = read_json(folder / "tokenizer.json", "model") | {"padding": None, "truncation": None}
    return FastTokenizer.from_str(json.dumps(content))


class Tokenizer:
    """Texts -> ids: what `encode` makes of each, cut so that the end fits behind it, and filled up."""

    def __init__(self, encode: Callable[[str], list[int]], length: int, end_id: int, pad_id: int):
        self.encode, self.length, self.end_id, self.pad_id = encode, length, end_id, pad_id

    def __call__(self, texts: list[str]) -> Tensor:  # (B, length) int64
        rows = [[*self.encode(text)[: self.length - 1], self.end_id] for text in texts]
        return torch.tensor([row + [self.pad_id] * (self.length - len(row)) for row in rows])

    def excess(self, text: str) -> int:  # how many tokens at its end are cut off
        return max(0, len(self.encode(text)) + 1 - self.length)


def t5_tokenizer(folder: Path) -> Tokenizer:
    """SentencePiece pieces and `</s>`, filled with `<pad>`. `folder` is the model's tokenizer_2/."""
    length = text_length(folder, T5_LENGTH)
    if (folder / "tokenizer.json").exists():
        fast = from_json(folder)
        ids = map(fast.token_to_id, ("</s>", "<pad>"))
        return Tokenizer(lambda text: fast.encode(text, add_special_tokens=False).ids, length, *ids)
    if not (folder / "spiece.model").exists():
        raise FileNotFoundError(f"no T5 tokenizer in {folder}: expected tokenizer.json or spiece.model")
    pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return Tokenizer(pieces.encode, length, pieces.eos_id(), pieces.pad_id())


def clip_tokenizer(folder: Path) -> Tokenizer:
    """Byte pairs between a begin and an end token, filled with the end's. `folder` is the model's tokenizer/."""
    bpe = from_json(folder) if (folder / "tokenizer.json").exists() else clip_bpe(folder)
    begin, end = map(bpe.token_to_id, (BEGIN, END))
    length = text_length(folder, CLIP_LENGTH)
    return Tokenizer(lambda text: [begin, *bpe.encode(text, add_special_tokens=False).ids], length, end, end)


def clip_bpe(folder: Path) -> FastTokenizer:
    """OpenAI's CLIP tokenizer from vocab.json and merges.txt: NFC, one space, lower case; words end in `</w>`."""
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise FileNotFoundError(f"no CLIP tokenizer in {folder}: expected vocab.json + merges.txt, or tokenizer.json")
    vocab = read_json(folder / "vocab.json", END)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    model = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END, continuing_subword_prefix="")
    bpe = FastTokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    word = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    split = pre_tokenizers.Split(word, behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    bpe.add_special_tokens([BEGIN, END])
    return bpe
