"""nano's parts: the four networks, their sizes and first weights, its two tokenizers, and the model folder."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, pre_tokenizers
from torch import Tensor, nn

from kontext_min.checkpoints.keys import INDEX
from kontext_min.checkpoints.save import save_model, write_json
from kontext_min.data.buckets import Size
from kontext_min.flow import Condition
from kontext_min.models.clip import CLIPConfig, CLIPText
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.t5 import T5Config, T5Encoder
from kontext_min.models.tokenizers import BEGIN, END, clip_tokenizer, t5_tokenizer
from kontext_min.models.vae import VAE, VAEConfig
from kontext_min.nano.edits import HELD_OUT, example
from kontext_min.presets import NANO

LENGTH = 24  # tokens of a prompt, T5 and CLIP alike
T5_PIECES, CLIP_TOKENS = 1120, 1280  # the embeddings of the usual 32,128 and 49,408 would be 15 MB
WORDS = Path(__file__).with_name("words.txt")

FLUX = FluxConfig(vec_in_dim=64, context_in_dim=128, hidden_size=192, num_heads=3, depth=2, depth_single_blocks=4,
                  axes_dim=(8, 28, 28))  # fmt: skip
T5 = T5Config(vocab_size=T5_PIECES, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, max_distance=32)
CLIP = CLIPConfig(vocab_size=CLIP_TOKENS, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2,
                  max_positions=LENGTH, eos_token_id=CLIP_TOKENS - 1)  # fmt: skip
AUTOENCODER = VAEConfig(channels=(16, 32, 64, 64), layers_per_block=2, groups=8, scaling_factor=1.0, shift_factor=0.0)


class Nano(nn.Module):
    """The trainable networks; the autoencoder stands beside them, frozen."""

    def __init__(self):
        super().__init__()
        self.flux, self.t5, self.clip = Flux(FLUX), T5Encoder(T5), CLIPText(CLIP)
        for parameter in self.flux.final_layer.linear.parameters():
            nn.init.zeros_(parameter)
        for block in self.t5.encoder.block:
            nn.init.normal_(block.layer[0].SelfAttention.q.weight, std=(T5.d_model * T5.d_kv) ** -0.5)
        for table in self.clip.text_model.embeddings.parameters():
            nn.init.normal_(table, std=0.1)

    def condition(self, ids: Tensor, references: list[Tensor]) -> Condition:
        """Ids of T5 and CLIP (B, 2, LENGTH) and normalised reference latents -> what `flow.velocity` takes."""
        return Condition(txt=self.t5(ids[:, 0]), vec=self.clip(ids[:, 1]), references=references)


def tokenizers_of(folder: Path) -> Callable[[list[str]], Tensor]:
    """Both tokenizers of a model folder: prompts -> ids of T5 and CLIP, (B, 2, LENGTH)."""
    t5, clip = t5_tokenizer(folder / "tokenizer_2"), clip_tokenizer(folder / "tokenizer")
    return lambda prompts: torch.stack([t5(prompts), clip(prompts)], dim=1)


def export(folder: Path, nano: Nano, vae: VAE) -> None:
    """Write the standard model folder (bf16); the tokenizers are there already. The index names the preset."""
    save_model(folder, flux=nano.flux, vae=vae, t5=nano.t5, clip=nano.clip)
    write_json(folder / "model_index.json", INDEX | {"_name_or_path": NANO.name})


def corpus() -> list[str]:
    """Prompts of pretraining, a few prompts of each held-out edit (only for its spelling), and every English word."""
    prompts = [example("train", i, Size(16, 16)).prompt for i in range(1500)]
    held_out = [example("train", i, Size(16, 16), edit).prompt for edit in HELD_OUT for i in range(3)]
    words = WORDS.read_text().split()
    return prompts + held_out + 3 * words + [word.capitalize() for word in words]


def write_t5(folder: Path) -> None:  # SentencePiece's unigram with T5's special ids: pad 0, </s> 1, <unk> 2
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": LENGTH, "extra_ids": 0, "legacy": False}
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", settings | special)
    with open(folder / "spiece.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=file, model_type="unigram", vocab_size=T5_PIECES,
            normalization_rule_name="identity", required_chars="".join(map(chr, range(33, 127))),
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip


def clip_merges(count: int) -> list[tuple[str, str]]:
    """The first `count` byte-pair merges: always the most frequent pair, the alphabet's first among equals."""
    split = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # a word is its byte symbols with spaces between, the last one with </w>
    words = Counter(" ".join(word) + "</w>" for text in corpus() for word, _ in cut.pre_tokenize_str(text.lower()))
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, times in words.items():
            pairs.update({pair: n * times for pair, n in Counter(pairwise(word.split())).items()})
        merges.append(best := min(pairs, key=lambda pair: (-pairs[pair], pair)))
        whole = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        words = Counter({whole.sub(lambda match: match[0].replace(" ", ""), word): n for word, n in words.items()})
    return merges


def write_clip(folder: Path) -> None:  # CLIP's files in CLIP's order: bytes, bytes that end a word, merges, begin, end
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = clip_merges(CLIP_TOKENS - 2 * len(alphabet) - 2)
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), BEGIN, END]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "tokenizer_config.json", settings | special)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
