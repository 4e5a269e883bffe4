"""Tiny random models of the oracles (diffusers, transformers), written to disk as the published files are.

Every weight is random, norms and biases too, so that no mistake hides behind a one or a zero.
"""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kontext_min import flow
from kontext_min.adapters.inject import adapt
from kontext_min.adapters.layers import Adapted, Kronecker
from kontext_min.checkpoints.load import Checkpoint, find_component
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.quantize import QuantisedLinear, is_quantised, parts_of

CPU, FP32 = torch.device("cpu"), torch.float32
WORDS = "make the sky red blue a photo of cat turn it into night remove hat please".split()
FLUX = {  # FluxTransformer2DModel's settings; heads of 32 channels, so that single files tell the rotary axes
    "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
    "axes_dims_rope": (4, 14, 14), "in_channels": 64, "joint_attention_dim": 48, "pooled_projection_dim": 64,
    "guidance_embeds": True,
}  # fmt: skip
VAE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 16}
T5 = {"d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 3}
CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices keep the size of what goes through them, biases are about 0.1, norms about 1 +- 0.3."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 1 + 0.3 * noise if bool((parameter == 1).all()) else 0.1 * noise
    return module.eval().requires_grad_(False)


def random(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal values of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 error; the shapes must be the same."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def quantised(linear: nn.Linear, form: str) -> QuantisedLinear:
    """The same in a low-bit form."""
    return QuantisedLinear(linear, parts_of(linear.weight.detach(), form), form.endswith("-dynamic"))


def quantise(form: str) -> Callable[[nn.Module, str], None]:
    """For `load_flux(then=...)`: the blocks in a low-bit form, without a file."""

    def then(flux, name):
        if is_quantised(name):
            stem = name.removesuffix(".weight")
            flux.set_submodule(stem, quantised(flux.get_submodule(stem), form))

    return then


# ------------------------------------------------------------------------------------------------ oracles


def flux(seed: int = 0, **settings) -> nn.Module:
    """diffusers' transformer."""
    diffusers = pytest.importorskip("diffusers")
    return randomise(diffusers.FluxTransformer2DModel(patch_size=1, **{**FLUX, **settings}), seed)


def vae(seed: int = 0, **settings) -> nn.Module:
    """diffusers' autoencoder with FLUX's settings."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {**VAE, **settings}
    levels = len(sizes["block_out_channels"])
    return randomise(
        diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            **sizes,
        ),
        seed,
    )


def t5(vocab: int, seed: int = 0, **settings) -> nn.Module:
    """transformers' T5 encoder, v1.1."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=vocab, feed_forward_proj="gated-gelu", **{**T5, **settings})
    model = randomise(transformers.T5EncoderModel(config), seed)
    model.shared.weight.data *= 3
    return model


def clip(vocab: int, seed: int = 0, eos_token_id: int = 2, **settings) -> nn.Module:
    """transformers' CLIP text tower; eos_token_id 2 is what the published config.json says."""
    transformers = pytest.importorskip("transformers")
    ids = {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 1}
    model = randomise(
        transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=vocab, **ids, **{**CLIP, **settings})), seed
    )
    for name, parameter in model.named_parameters():
        parameter.data *= 8 if "embedding" in name else 1
    return model


def flux_inputs(config: FluxConfig, dtype=FP32, t=(0.9, 0.3), guidance=(2.5, 3.5)) -> dict:
    """What the transformer takes: a 6 x 8 target with an 8 x 10 reference (latents) and 7 text tokens; batch 2."""
    ids = flow.sequence_ids(torch.zeros(2, 16, 6, 8), [torch.zeros(2, 16, 8, 10)])
    return {
        "img": random(2, len(ids), config.in_channels, seed=3).to(dtype),
        "img_ids": ids,
        "txt": random(2, 7, config.context_in_dim, seed=4).to(dtype),
        "txt_ids": torch.zeros(7, 3),
        "timesteps": torch.tensor(t),
        "y": random(2, config.vec_in_dim, seed=5).to(dtype),
        "guidance": torch.tensor(guidance),
    }


def run_flux(oracle: nn.Module, *, img, img_ids, txt, txt_ids, timesteps, y, guidance) -> Tensor:
    """diffusers' transformer on these inputs."""
    guidance = guidance.to(img.dtype) if oracle.config.guidance_embeds else None
    return oracle(img, txt, y, timesteps.to(img.dtype), img_ids, txt_ids, guidance, return_dict=False)[0]


# ------------------------------------------------------------------------------------------------ files


def part(folder: Path, name: str) -> Checkpoint:
    """A checkpoint of which only one network is there: `name` is transformer, vae, text_encoder or text_encoder_2."""
    return Checkpoint(folder, {name: find_component(folder, name)}, flow.Shift())


def write_clip_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt in OpenAI's form: bytes, bytes that end a word, merges, two specials. -> vocab size."""
    folder.mkdir(parents=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = []
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        pairs = [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
        merges += [pair for pair in pairs if pair not in merges]
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special |= {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    return len(vocab)


def write_t5_tokenizer(folder: Path) -> int:
    """spiece.model trained on a few words and the tokenizer.json of the same. -> vocab size with 100 extra ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True)
    model = io.BytesIO()
    alphabet = "abcdefghijklmnopqrstuvwxyz ,.!'0123456789"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4 + [alphabet]),
        model_writer=model, vocab_size=90, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    unigram_json(vocab).save(str(folder / "tokenizer.json"))
    config = {"model_max_length": 512, "tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(vocab)


def unigram_json(vocab: list[tuple[str, float]]):
    """T5's tokenizer.json, made with the `tokenizers` library."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    fast = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    fast.pre_tokenizer = pre_tokenizers.Sequence(words)
    fast.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    fast.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return fast


def write_kontext(folder: Path) -> Path:
    """A tiny Kontext as the real one is published: bf16, sharded, prefixed CLIP, legacy eos_token_id, scheduler."""
    diffusers = pytest.importorskip("diffusers")
    clip_vocab = write_clip_tokenizer(folder / "tokenizer")
    t5_vocab = write_t5_tokenizer(folder / "tokenizer_2")
    parts = {
        "transformer": flux(seed=1),
        "vae": vae(seed=2),
        "text_encoder": clip(clip_vocab, seed=3),
        "text_encoder_2": t5(t5_vocab, seed=4),
    }
    for name, model in parts.items():
        size = {"transformer": "200KB", "text_encoder_2": "40KB"}.get(name, "1GB")
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size=size)
    prefix_clip(folder / "text_encoder" / "model.safetensors")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "FluxKontextPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def prefix_clip(path: Path):
    """transformers 5 leaves `text_model.` out of the names; the published files have it."""
    tensors = load_file(path)
    prefixed = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in tensors.items()}
    save_file(prefixed, path, metadata={"format": "pt"})


def read_part(folder: Path) -> dict[str, Tensor]:
    """All tensors of one network, from all of its shards."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# ------------------------------------------------------------------------------------------------ single files


def table(name: str) -> list[dict[str, str]]:
    """A table of names and shapes of the published files, from tests/checkpoints/tables."""
    path = Path(__file__).parent / "checkpoints" / "tables" / f"{name}.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def single_file(tensors: dict[str, Tensor], rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """diffusers' tensors -> BFL's, by a table: its `op` says how each diffusers tensor comes from BFL's."""
    parts: dict[str, list] = {}
    for row in rows:
        if row["diffusers_name"] in tensors:
            parts.setdefault(row["bfl_name"], []).append((row["op"], tensors[row["diffusers_name"]]))
    made = {}
    for name, found in parts.items():
        found.sort(key=lambda item: int(item[0][5:].split(":")[0]) if item[0].startswith("rows") else 0)
        tensor = torch.cat([tensor for _, tensor in found])
        if found[0][0].startswith("cat"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        made[name] = tensor[:, :, None, None] if found[0][0].startswith("squeeze") else tensor
    return made


def write_single_files(kontext: Path, folder: Path) -> Path:
    """The same model as ComfyUI users have it: BFL's names, one file a network, two tokenizer folders."""
    folder.mkdir(parents=True)
    transformer = single_file(read_part(kontext / "transformer"), table("transformer_map"))
    save_file(transformer, folder / "flux1-kontext-dev.safetensors")
    save_file(single_file(read_part(kontext / "vae"), table("vae_map")), folder / "ae.safetensors")
    save_file(read_part(kontext / "text_encoder"), folder / "clip_l.safetensors")
    save_file(read_part(kontext / "text_encoder_2"), folder / "t5xxl_fp16.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(kontext / name, folder / name)
    return folder


def write_pairs(folder: Path, count: int, size: tuple[int, int], caption: str, noise: int = 80) -> list[dict]:
    """Strict pairs of noise under target/ and reference/, with `caption` ({i} is the number) -> the data list."""
    for part in ("target", "reference"):
        (folder / part).mkdir()
        for i in range(count):
            Image.effect_noise(size, noise + i).convert("RGB").save(folder / part / f"{i}.png")
            (folder / "target" / f"{i}.txt").write_text(caption.format(i=i), encoding="utf-8")
    return [
        {"id": "t", "instance_data_dir": str(folder / "target"), "conditioning_data": "r", "resolution": 48},
        {"id": "r", "instance_data_dir": str(folder / "reference"), "conditioning_type": "reference_strict"},
    ]


def detach_all(flux: Flux):  # take every update off: the model is the very one that it was
    for name, module in list(flux.named_modules()):
        if isinstance(module, Adapted):
            flux.set_submodule(name, module.base)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], metadata: dict | None = None):
    """Read a safetensors file, change its tensors, write it in the same place."""
    save_file(change(load_file(path)), path, metadata=metadata)


def add_lora(flux: Flux, names: list[str], rank: int, alpha: float, dropout=0.0, dora=False) -> list[nn.Parameter]:
    return adapt(flux, dict.fromkeys(names, (rank, alpha)), dropout, dora)


def add_lokr(flux: Flux, names: list[str], size: Kronecker) -> list[nn.Parameter]:
    return adapt(flux, dict.fromkeys(names, size))
