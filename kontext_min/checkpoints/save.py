"""Our modules -> model folders: in diffusers' layout, as nano is shipped, or in that of the model that was trained."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kontext_min import flow, parallel
from kontext_min.checkpoints import keys
from kontext_min.checkpoints.keys import Source
from kontext_min.checkpoints.load import Checkpoint, empty_flux, same_names
from kontext_min.models.clip import CLIPText
from kontext_min.models.flux import Flux
from kontext_min.models.t5 import T5Encoder
from kontext_min.models.vae import VAE

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them


def save_model(
    folder: Path, *, flux: Flux, vae: VAE, t5: T5Encoder, clip: CLIPText, dtype: torch.dtype = torch.bfloat16
):
    """Write everything but the two tokenizer folders, which are files already. No scheduler setting but FLUX.1's."""
    write_json(folder / "model_index.json", keys.INDEX)
    shift = {**keys.FIXED["scheduler"], **in_file(flow.Shift(), keys.SETTINGS["scheduler"])}
    write_json(folder / "scheduler" / "scheduler_config.json", shift)
    sizes, levels = in_file(flux.config, keys.SETTINGS["transformer"]), len(vae.config.channels)
    sizes["attention_head_dim"] = flux.config.hidden_size // flux.config.num_heads
    save_component(folder / "transformer", flux, keys.flux_diffusers(flux.config), sizes, dtype)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    sizes = {**in_file(vae.config, keys.SETTINGS["vae"]), "out_channels": vae.config.in_channels, **blocks}
    save_component(folder / "vae", vae, keys.vae_diffusers(vae.config, list(vae.state_dict())), sizes, dtype)
    for name, module in {"text_encoder": clip, "text_encoder_2": t5}.items():
        save_component(folder / name, module, same_names(module), in_file(module.config, keys.SETTINGS[name]), dtype)


def save_component(folder: Path, module: nn.Module, table: dict[str, Source], sizes: dict, dtype: torch.dtype):
    """config.json and one safetensors file; the file appears whole or not at all."""
    write_json(folder / "config.json", {**keys.FIXED[folder.name], **sizes})
    tensors = {}
    for name, tensor in module.state_dict().items():
        tensors.update(table[name].disassemble(tensor.detach().to("cpu", dtype)))
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    save_file(tensors, folder / f"{stem}.tmp", metadata={"format": "pt"})
    (folder / f"{stem}.tmp").rename(folder / f"{stem}.safetensors")


def stream(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]):
    """A safetensors file of tensors that `read` gives one after another, so that only one of them is in memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(read(name).to(dtype).contiguous().flatten().view(torch.uint8).numpy())


def save_trained(flux: Flux, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype):
    """A model folder with this transformer in its file's layout, in one file; all else is linked from its checkpoint.

    All ranks call it, since the tensors may lie in shards. Rank 0 writes, one tensor after another.
    """
    *_, table = empty_flux(checkpoint)
    tensors, old = dict(flux.named_parameters()), checkpoint.components["transformer"].files
    places = {name: ours for ours, source in table.items() for name in source.names}
    cut = (source.disassemble(tensors[ours].detach().to("meta")) for ours, source in table.items())
    shapes = {name: tuple(part.shape) for parts in cut for name, part in parts.items()}

    def read(name: str) -> Tensor:
        source = table[places[name]]
        return source.disassemble(parallel.whole(tensors[places[name]].detach()).to("cpu", dtype))[name]

    if parallel.rank():
        for name in shapes:
            read(name)  # rank 0 needs this one's shards
        return
    shutil.rmtree(folder, ignore_errors=True)
    alone = old[0].parent == checkpoint.folder  # a single file among others
    target = folder / old[0].name if alone else folder / "transformer" / "diffusion_pytorch_model.safetensors"
    target.parent.mkdir(parents=True)
    for path in checkpoint.folder.iterdir():
        if path not in old and path.name != "transformer":
            (folder / path.name).symlink_to(path.resolve())
    for path in () if alone else old[0].parent.glob("config.json"):
        shutil.copy(path, target.parent)
    stream(target.with_suffix(".tmp"), shapes, dtype, read)
    target.with_suffix(".tmp").rename(target)


def write_json(path: Path, value: dict):
    """Indented JSON, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_file(config, table: dict[str, str]) -> dict:
    """Our settings under the file's names."""
    return {theirs: getattr(config, ours) for theirs, ours in table.items()}
