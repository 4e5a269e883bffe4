"""The two tokenizers, from their standard files: strings -> token ids (B, length), padded and cut as FLUX expects.

T5 is SentencePiece's unigram (`tokenizer.json` or `spiece.model`), CLIP a lower-cased byte-pair encoding
(`tokenizer.json` or `vocab.json` + `merges.txt`). Both libraries are imported where they are used.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

T5_LENGTH = 512  # FLUX.1-dev and Kontext; a tokenizer_config.json with a smaller model_max_length lowers it
CLIP_LENGTH = 77


def read_config(folder: Path) -> dict:
    """tokenizer_config.json, or {} where there is none."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check_vocabulary(path: Path, key: str | None = None):
    """One sentence for a tokenizer file that is not what the tokenizers library could read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again from the model's repository") from error
    if not isinstance(content, dict) or not content or (key and key not in content):
        raise ValueError(f"{path} holds no tokenizer; copy it again from the model's repository")


def token_text(entry: str | dict | None, default: str) -> str:
    """A special token as tokenizer_config.json writes it: a string, or a mapping with `content`."""
    if isinstance(entry, dict):
        return entry["content"]
    return entry or default


def pad(rows: list[list[int]], length: int, pad_id: int, end_id: int) -> Tensor:
    """Cut every row to `length`, keeping its end token last, and fill with pad_id -> (B, length) int64."""
    ids = torch.full((len(rows), length), pad_id)
    for i, row in enumerate(rows):
        kept = row if len(row) <= length else row[: length - 1] + [end_id]
        ids[i, : len(kept)] = torch.tensor(kept)
    return ids


class T5Tokenizer:
    """SentencePiece pieces, `</s>` appended, padded with 0. `folder` is the model's tokenizer_2/."""

    def __init__(self, folder: Path):
        self.length = int(min(T5_LENGTH, read_config(folder).get("model_max_length", T5_LENGTH)))
        if (folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer

            check_vocabulary(folder / "tokenizer.json", "model")
            fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
            fast.no_padding()
            fast.no_truncation()
            self.encode = lambda text: fast.encode(text, add_special_tokens=False).ids
            self.pad_id, self.end_id = fast.token_to_id("<pad>"), fast.token_to_id("</s>")
        elif (folder / "spiece.model").exists():
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
            self.encode = pieces.encode
            self.pad_id, self.end_id = pieces.pad_id(), pieces.eos_id()
        else:
            raise FileNotFoundError(f"no T5 tokenizer in {folder}: expected tokenizer.json or spiece.model")

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, length) int64."""
        return pad([[*self.encode(text), self.end_id] for text in texts], self.length, self.pad_id, self.end_id)

    def excess(self, text: str) -> int:
        """How many tokens at its end are cut off."""
        return max(0, len(self.encode(text)) + 1 - self.length)


class CLIPTokenizer:
    """Byte-pair encoding between begin and end tokens, padded to 77. `folder` is the model's tokenizer/."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        config = read_config(folder)
        self.length = int(min(CLIP_LENGTH, config.get("model_max_length", CLIP_LENGTH)))
        if (folder / "tokenizer.json").exists():
            check_vocabulary(folder / "tokenizer.json", "model")
            self.bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.bpe.no_padding()
            self.bpe.no_truncation()
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            check_vocabulary(folder / "vocab.json")
            self.bpe = clip_bpe(folder)
        else:
            raise FileNotFoundError(
                f"no CLIP tokenizer in {folder}: expected vocab.json + merges.txt, or tokenizer.json"
            )
        begin = token_text(config.get("bos_token"), "<|startoftext|>")
        end = token_text(config.get("eos_token"), "<|endoftext|>")
        padding = token_text(config.get("pad_token"), end)
        self.begin_id, self.end_id, self.pad_id = (self.bpe.token_to_id(t) for t in (begin, end, padding))

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, length) int64."""
        rows = [[self.begin_id, *self.bpe.encode(t, add_special_tokens=False).ids, self.end_id] for t in texts]
        return pad(rows, self.length, self.pad_id, self.end_id)


def clip_bpe(folder: Path):
    """OpenAI's CLIP tokenizer from vocab.json and merges.txt: NFC, one space, lower case; words end in `</w>`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bpe = Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>", continuing_subword_prefix="")
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    word = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(word, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return bpe
