"""Standard model files -> our modules: diffusers folders, folders of single files (ComfyUI), hub ids.

`find` says where each part of a model lies; `load_flux`, `load_vae`, `load_t5` and `load_clip` build one part on `meta`
and stream its weights in. Sizes come from config.json, or from the tensors' shapes where single files have none.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kontext_min import flow
from kontext_min.checkpoints import keys
from kontext_min.checkpoints.keys import Source
from kontext_min.checkpoints.tensors import Place, Tensors, fill, json_object
from kontext_min.models.clip import ACTIVATIONS, CLIPConfig, CLIPText
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.t5 import T5Config, T5Encoder
from kontext_min.models.vae import VAE, VAEConfig

Shapes = dict[str, tuple[int, ...]]  # of a file's tensors, by name
HUB_FILES = ["model_index.json", "scheduler/*", *(f"{part}/*" for part in keys.FILES), "tokenizer/*", "tokenizer_2/*"]
ODD_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
NOT_READ = (".bin", ".pt", ".ckpt", ".pth", ".gguf")
NOT_USED = ("embeddings.position_ids", "text_projection.weight", "logit_scale")  # of CLIP files


class Component(NamedTuple):
    """The files of one network and its config.json as a mapping ({} where there is none)."""

    files: tuple[Path, ...]
    config: dict


class Checkpoint(NamedTuple):
    """Where the parts of a model lie, and what its scheduler says about time."""

    folder: Path
    components: dict[str, Component]
    shift: flow.Shift


def find(model: str | Path, download: bool = True) -> Checkpoint:
    """A folder (diffusers layout or single files) or a hub id -> its parts; FileNotFoundError says what to do."""
    folder = Path(model).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give its folder, which holds the rest of the model, too")
    if not folder.is_dir():
        folder = hub_folder(str(model), download)
    if absent := [name for name in ("tokenizer", "tokenizer_2") if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{folder} has no folder {' and '.join(absent)}; copy it from the model's repository")
    components = {part: find_component(folder, part) for part in keys.FILES}
    return Checkpoint(folder, components, read_shift(folder / "scheduler" / "scheduler_config.json"))


def hub_folder(repo_id: str, download: bool) -> Path:
    """A hub id -> its folder in the local cache, downloaded if need be and allowed."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id) or Path(repo_id).parent.is_dir():
        raise FileNotFoundError(f"{repo_id} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    last = "a part of it is missing"
    for local in (True, False) if download else (True,):
        try:
            folder = Path(snapshot_download(repo_id, allow_patterns=HUB_FILES, local_files_only=local))
            if not local or all((folder / part).is_dir() for part in keys.FILES):
                return folder
        except OSError as error:
            last = str(error).strip().partition("\n")[0]
    why = f"is not on this machine, and is gated, private, unknown or out of reach ({last})"
    remedy = f"accept its licence on its hub page, run `hf auth login` and `hf download {repo_id} --local-dir weights/"
    raise FileNotFoundError(f"{repo_id} {why}; {remedy}{repo_id.partition('/')[2]}`")


def find_component(folder: Path, part: str) -> Component:
    """One network's files: the part's own folder (sharded with an index, or one file), else a single file beside it."""
    own = folder / part
    config = read_json(own / "config.json") if (own / "config.json").exists() else {}
    if indices := sorted(own.glob("*.safetensors.index.json")):
        shards = sorted(set(read_json(indices[0]).get("weight_map", {}).values()))
        return Component(tuple(own / name for name in shards), config)
    for place, pattern in [(own, "*.safetensors"), *((folder, pattern) for pattern in keys.FILES[part])]:
        matches = sorted(place.glob(pattern), key=lambda path: (path.name.count("."), len(path.name), path.name))
        if matches:
            return Component((matches[0],), config)
    others = [path for path in (*own.glob("*"), *folder.glob("*.gguf")) if path.suffix in NOT_READ]
    found = f"; {others[0].relative_to(folder)} is not read: use the .safetensors instead" if others else ""
    raise FileNotFoundError(f"{folder} has no {part}: expected {part}/*.safetensors or {keys.FILES[part][0]}{found}")


def read_json(path: Path) -> dict:  # a JSON file with an object, or one sentence naming it
    return json_object(path.read_text(encoding="utf-8", errors="replace"), path)


def read_shift(path: Path) -> flow.Shift:
    """scheduler_config.json -> how sampling times are shifted; without a file, FLUX.1's."""
    if not path.exists():
        return flow.Shift()
    config = read_json(path)
    odd = [name for name in ODD_SCHEDULES if config.get(name)]
    if odd or config.get("time_shift_type", "exponential") != "exponential":
        raise ValueError(f"{path}: {', '.join(odd) or 'time_shift_type'} is not how FLUX is sampled; remove it")
    if not config.get("use_dynamic_shifting"):
        return flow.Shift(static=float(config.get("shift", 1.0)))
    return flow.Shift(**settings(keys.SETTINGS["scheduler"], config))


def settings(table: dict[str, str], config: dict) -> dict:
    return {o: tuple(v) if isinstance(v, list) else v for t, o in table.items() if (v := config.get(t)) is not None}


def flux_config(config: dict, shapes: Shapes) -> FluxConfig:
    """Sizes of the transformer, from config.json or (single file) from the shapes of its tensors."""
    if config:
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"transformer/config.json: patch_size {config['patch_size']}; FLUX has 1")
        values = {"out_channels": config["in_channels"], **settings(keys.SETTINGS["transformer"], config)}
        return FluxConfig(**values, hidden_size=config["num_attention_heads"] * config["attention_head_dim"])
    hidden, head_dim = shapes["img_in.weight"][0], shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    if head_dim % 32:  # the axes are 1/8, 7/16 and 7/16 of it, all even
        raise ValueError(f"rotary axes for heads of {head_dim} channels are unknown; put a config.json in transformer/")
    return FluxConfig(
        vec_in_dim=shapes["vector_in.in_layer.weight"][1], context_in_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden, mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        num_heads=hidden // head_dim, axes_dim=(head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
        depth=count(shapes, "double_blocks"), depth_single_blocks=count(shapes, "single_blocks"),
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )  # fmt: skip


def count(shapes: Shapes, stem: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))})


def vae_config(config: dict, shapes: Shapes) -> VAEConfig:
    """Sizes of the autoencoder, from config.json or (single file) from the shapes of its tensors."""
    if config:
        if config.get("use_quant_conv", True) or config.get("use_post_quant_conv", True):
            raise ValueError("vae/config.json: use_quant_conv and use_post_quant_conv must be false, as in FLUX")
        return VAEConfig(**{"layers_per_block": 1, **settings(keys.SETTINGS["vae"], config)})
    levels = range(count(shapes, "encoder.down") or 1)  # of a file in another layout the first is missed, by name
    channels = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels)
    return VAEConfig(
        channels=channels, layers_per_block=count(shapes, "encoder.down.0.block"), groups=math.gcd(32, *channels),
        latent_channels=shapes["decoder.conv_in.weight"][1],
    )  # fmt: skip


def t5_config(config: dict, shapes: Shapes) -> T5Config:
    """Sizes of T5, from config.json or (single file) from the shapes of its tensors."""
    if config:
        if config.get("feed_forward_proj") != "gated-gelu":
            raise ValueError("text_encoder_2/config.json: feed_forward_proj must be 'gated-gelu', as in FLUX")
        return T5Config(**settings(keys.SETTINGS["text_encoder_2"], config))
    first, (vocab, width) = "encoder.block.0.layer", shapes["shared.weight"]
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return T5Config(
        vocab_size=vocab, d_model=width, d_kv=shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads, num_heads=heads,
        d_ff=shapes[f"{first}.1.DenseReluDense.wo.weight"][1], num_layers=count(shapes, "encoder.block"),
        num_buckets=buckets,
    )  # fmt: skip


def clip_config(config: dict, shapes: Shapes) -> CLIPConfig:
    """Sizes of CLIP, from config.json or (single file) from the shapes of its tensors; heads are 64 wide there."""
    config = config.get("text_config", config)
    if config:
        if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
            raise ValueError(f"text_encoder/config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}")
        return CLIPConfig(**settings(keys.SETTINGS["text_encoder"], config))
    vocab, hidden = shapes["text_model.embeddings.token_embedding.weight"]
    return CLIPConfig(
        vocab_size=vocab, hidden_size=hidden, num_layers=count(shapes, "text_model.encoder.layers"),
        num_heads=max(1, hidden // 64), intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        max_positions=shapes["text_model.embeddings.position_embedding.weight"][0],
    )  # fmt: skip


def on_meta(
    kind: type[nn.Module], config_of: Callable, component: Component, rule: Callable[[str], str | None] = str
) -> tuple[nn.Module, Tensors]:
    """A network without weights, and the tensors of its files by the names that `rule` gives them.
    ValueError when a tensor or a setting that tells the network's sizes is not there.
    """
    tensors = Tensors(component.files, rule)
    where = component.files[0].parent / "config.json" if component.config else tensors.title
    try:
        config = config_of(component.config, tensors.shapes())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is not the file it should be; missing or malformed: {error}") from error
    if not component.config and config != type(config)():  # sizes of one's own, which tensors do not tell in full
        print(f"{tensors.title}: no config.json and not the published sizes, so heads, groups and scales are guessed")
    with torch.device("meta"):
        return kind(config), tensors


def bare(name: str) -> str:  # the name of a transformer's tensor without ComfyUI's prefix, a norm's as BFL has it now
    return re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", name.removeprefix("model.diffusion_model."))


def empty_flux(checkpoint: Checkpoint) -> tuple[Flux, Tensors, dict[str, Source]]:
    """The transformer without weights, the tensors of its files, and our name -> theirs ({} where they are ours)."""
    flux, tensors = on_meta(Flux, flux_config, checkpoint.components["transformer"], bare)
    return flux, tensors, keys.flux_diffusers(flux.config) if "x_embedder.weight" in tensors.where else {}


def load_flux(checkpoint: Checkpoint, device: Place, dtype: torch.dtype, then: Callable | None = None) -> Flux:
    """The transformer, frozen and in eval mode, in `dtype`; device and then as in `fill`, to quantise on the way."""
    return fill(*empty_flux(checkpoint), dtype, device, then=then)


def load_vae(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> VAE:
    vae, tensors = on_meta(VAE, vae_config, checkpoint.components["vae"])
    ours = "encoder.conv_norm_out.weight" not in tensors.where
    return fill(vae, tensors, {} if ours else keys.vae_diffusers(vae.config, [*vae.state_dict()]), dtype, device)


def load_t5(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, then=None) -> T5Encoder:
    """T5's encoder, frozen and in eval mode; `then` as in `fill`. Its embedding may have either name, or both."""
    part = checkpoint.components["text_encoder_2"]
    t5, tensors = on_meta(T5Encoder, t5_config, part, lambda name: name.replace("encoder.embed_tokens.", "shared."))
    return fill(t5, tensors, {}, dtype, device, then=then)


def load_clip(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> CLIPText:
    """CLIP's text tower, frozen and in eval mode, from files with or without the `text_model.` prefix."""

    def rule(name: str) -> str | None:
        stem = name.removeprefix("text_model.")
        return None if stem in NOT_USED else f"text_model.{stem}"

    return fill(*on_meta(CLIPText, clip_config, checkpoint.components["text_encoder"], rule), {}, dtype, device)
