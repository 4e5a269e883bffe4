"""Tensors by name over memory-mapped safetensors files, and a module on `meta` filled from them, strictly."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kontext_min.checkpoints.keys import Source

Place = torch.device | Callable[[str], torch.device]
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")  # fp8 checkpoints of ComfyUI: weight = fp8 value * scale
UNUSED_BESIDE_FP8 = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")
PICKLES_BEGIN = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # of torch.save, whatever the name


def open_safetensors(path: Path):  # a memory-mapped safetensors file, or one sentence saying why it is none
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is the download complete?")
    with open(path, "rb") as file:
        start = file.read(8)  # of safetensors, its header's length, whose upper half is always zero
    if start.startswith(PICKLES_BEGIN) and any(start[4:]):
        raise ValueError(f"{path} is a pickle, which can run code when opened; convert it to .safetensors first")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); download or copy it again") from error


def json_object(text: str, path: Path) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are no JSON object but {text[:60]!r}; copy it again") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that then appears whole or not at all; several runs may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # as open as its folder: safetensors' are their owner's
        temporary.replace(path)
    except SafetensorError as error:  # of a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Tensors:
    """All tensors of one or more files, by the names that a rule makes of theirs; None leaves a tensor out.
    Nothing is read until `read`; scaled fp8 weights come back multiplied by their scale, exactly, in fp32.
    """

    def __init__(self, files: Sequence[Path], rule: Callable[[str], str | None] = str):
        self.title = ", ".join(str(path) for path in files)
        self.where, self.scales = {}, {}
        for handle in map(open_safetensors, files):
            self.where |= {rule(name): (handle, name) for name in handle.keys() if not name.endswith(UNUSED_BESIDE_FP8)}
        self.where.pop(None, None)
        for name in [name for name in self.where if name.endswith(SCALES)]:
            weight = f"{name.rpartition('.')[0]}.weight"
            if weight in self.where:  # else it stays, and `fill` refuses it as unexpected
                self.scales[weight] = self.where.pop(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:  # of all tensors, from the files' headers; nothing is read
        return {name: tuple(handle.get_slice(key).get_shape()) for name, (handle, key) in self.where.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, still a view of the memory-mapped file unless it had to be dequantised."""
        handle, key = self.where[name]
        tensor = handle.get_tensor(key)
        if not tensor.is_floating_point():
            raise ValueError(f"{self.title}: {name} is {tensor.dtype}, which cannot be read; use bf16 or fp8 files")
        if name in self.scales:
            handle, key = self.scales[name]
            scale = handle.get_tensor(key).float()
            if scale.numel() != 1:
                raise ValueError(f"{self.title}: {name} has {scale.numel()} fp8 scales; only one a tensor can be read")
            return tensor.float() * scale.reshape(())
        return tensor.float() if tensor.dtype in FP8 else tensor


def refuse(title: str, problem: str, names: Iterable[str]):
    if names := sorted(names):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{title}: {len(names)} {problem}: {', '.join(names[:5])}{more}")


def assembled(
    module: nn.Module, tensors: Tensors, table: Mapping[str, Source], dtype: torch.dtype, device: Place
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module built on `meta`, by our names, one at a time, all names and shapes checked beforehand.
    table: our name -> where it comes from, {} where the files have our names; device: one for all, or device(our name).
    Raises ValueError on missing, unexpected or mis-shaped tensors.
    """
    parameters = dict(module.named_parameters())
    table = table or {name: Source((name,)) for name in parameters}
    assert parameters.keys() == table.keys(), parameters.keys() ^ table.keys()
    cut = (source.disassemble(parameters[ours].to("meta")) for ours, source in table.items())
    expected = {name: tuple(part.shape) for parts in cut for name, part in parts.items()}
    found = tensors.shapes()
    refuse(tensors.title, "tensors missing", expected.keys() - found.keys())
    refuse(tensors.title, "unexpected tensors", found.keys() - expected.keys())
    wrong = [f"{n} is {list(found[n])}, expected {list(expected[n])}" for n in expected if found[n] != expected[n]]
    refuse(tensors.title, "tensors of the wrong shape", wrong)
    for ours, source in table.items():
        parts = [tensors.read(name) for name in source.names]
        place = device(ours) if callable(device) else device
        yield ours, source.assemble(parts).to(device=place, dtype=dtype, copy=True).contiguous()  # no view of the file


def fill(module: nn.Module, *source, then: Callable[[nn.Module, str], None] | None = None) -> nn.Module:
    """Give a module built on `meta` its parameters, `source` being the other arguments of `assembled`.
    then(module, our name) is called after each tensor, to change its form. -> the module, frozen and in eval mode.
    """
    for ours, tensor in assembled(module, *source):
        owner, _, leaf = ours.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        if then:
            then(module, ours)
    return module.eval()
