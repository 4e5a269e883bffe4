"""Our modules -> model folders: in diffusers' layout, as nano is shipped, or in that of the model that was trained."""

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kontext_min import flow, parallel
from kontext_min.checkpoints import keys
from kontext_min.checkpoints.keys import Source
from kontext_min.checkpoints.load import Checkpoint, empty_flux
from kontext_min.checkpoints.tensors import whole_file
from kontext_min.models.clip import CLIPText
from kontext_min.models.flux import Flux
from kontext_min.models.t5 import T5Encoder
from kontext_min.models.vae import VAE

DTYPES = {  # as safetensors calls them
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
HEADER = 2**20  # bytes kept free for a file's header, which is known last; Kontext's takes 0.3 MB


def save_model(folder: Path, *, flux: Flux, vae: VAE, t5: T5Encoder, clip: CLIPText, dtype=torch.bfloat16):
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
        save_component(folder / name, module, {}, in_file(module.config, keys.SETTINGS[name]), dtype)


def save_component(folder: Path, module: nn.Module, table: dict[str, Source], sizes: dict, dtype: torch.dtype):
    """config.json and one safetensors file; the file appears whole or not at all."""
    write_json(folder / "config.json", {**keys.FIXED[folder.name], **sizes})
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    with whole_file(folder / f"{stem}.safetensors") as file:
        save_file(dict(as_in_file(module, table, dtype)), file, metadata={"format": "pt"})


def as_in_file(module: nn.Module, table: dict[str, Source], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors by the file's names, one after another. Of one in shards, all ranks must take them."""
    for ours, tensor in module.named_parameters():
        source = table[ours] if table else Source((ours,))
        yield from source.disassemble(parallel.whole(tensor.detach()).to("cpu", dtype)).items()


def stream(path: Path, tensors: Iterable[tuple[str, Tensor]]):
    """A safetensors file of tensors that come one after another, so that only one of them need be in memory.
    It appears whole or not at all, with a checksum of every tensor in its header.
    """
    header, sums, end = {}, {}, 0
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.seek(8 + HEADER)
        for name, tensor in tensors:
            start, end = end, end + file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
            sums[name] = checksum(tensor)
        header["__metadata__"] = {"format": "pt", "checksums": json.dumps(sums)}
        text = json.dumps(header).encode().ljust(HEADER)
        assert len(text) == HEADER
        file.seek(0)
        file.write(len(text).to_bytes(8, "little") + text)


def checksum(tensor: Tensor) -> int:  # of form and bytes
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(data, zlib.crc32(f"{tensor.shape} {tensor.dtype}".encode()))


def save_trained(flux: Flux, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype):
    """A model folder with this transformer in its file's layout, in one file; all else is linked from its checkpoint.
    All ranks call it, since the tensors may lie in shards. Rank 0 writes, one tensor after another.
    """
    *_, table = empty_flux(checkpoint)
    tensors, old = as_in_file(flux, table, dtype), checkpoint.components["transformer"].files
    if parallel.rank():
        for _ in tensors:
            pass  # rank 0 needs this one's shards
        return
    shutil.rmtree(folder, ignore_errors=True)
    alone = old[0].parent == checkpoint.folder  # a single file among others
    target = folder / old[0].name if alone else folder / "transformer" / "diffusion_pytorch_model.safetensors"
    stream(target, tensors)
    for path in checkpoint.folder.iterdir():
        if path not in old and (alone or path.name != "transformer"):
            (folder / path.name).symlink_to(path.resolve())
    for path in () if alone else old[0].parent.glob("config.json"):
        shutil.copy(path, target.parent)


def write_json(path: Path, value: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_file(config, table: dict[str, str]) -> dict:
    return {theirs: getattr(config, ours) for theirs, ours in table.items()}
