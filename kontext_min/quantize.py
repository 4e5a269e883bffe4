"""The frozen transformer in 8 or 4 bits: a half or a quarter of bf16's memory, computed in the same dtype as before.

Every linear inside the blocks is kept as int8, fp8 (e4m3), one byte a number, or NF4, 0.516 bytes; that is 99 % of the
weights. The rest stays as it is: embeddings of image, text, time and guidance and the final layer are small, and their
errors reach every token; norms and biases are not worth it.
"""

import json
import math
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from kontext_min.checkpoints import load
from kontext_min.checkpoints.save import DTYPES
from kontext_min.checkpoints.tensors import open_safetensors, release
from kontext_min.data.cache import digest, weights_id
from kontext_min.models.flux import Flux

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of the forms with a scale a row
NF4 = (  # 16 quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FEWEST = 17  # tokens that torch's int8 product takes on CUDA
IN_FILE = DTYPES | {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
HEADER = 2**20  # bytes kept free for a file's header, which is known last; Kontext's takes 0.3 MB


def form_of(precision: str) -> str | None:
    """A `base_model_precision`, or infer.py's, -> int8, fp8 or nf4, maybe with -dynamic; None is not quantised."""
    kind, _, how = precision.partition("-")
    return None if kind in ("no_change", "bf16", "fp32") else f"{kind}-dynamic" if how == "dynamic" else kind


def parts_of(weight: Tensor, form: str) -> dict[str, Tensor]:
    """A weight (rows, in) -> what is kept of it, by name; made of some million numbers at a time."""
    kind, dtype, pieces = KINDS.get(form.partition("-")[0]), weight.dtype, []
    for rows in weight.split(max(1, 2**23 // weight.shape[1])):
        pieces.append(to_rows(rows.float(), dtype, kind) if kind else to_nf4(rows.float(), dtype))
    parts = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    if not kind:
        levels = torch.tensor(NF4, dtype=dtype, device=weight.device)
        parts["pairs"] = torch.cartesian_prod(levels, levels)  # (256, 2): the levels of every byte
    return parts


def to_rows(w: Tensor, dtype: torch.dtype, kind: torch.dtype) -> dict[str, Tensor]:
    """w (rows, n) in fp32 -> the same in int8 or fp8, with scales (rows, 1) by which a row uses the whole range."""
    largest = 127 if kind == torch.int8 else torch.finfo(kind).max
    scale = (w.abs().amax(dim=1, keepdim=True) / largest).clamp(min=1e-30).to(dtype)  # rounded, then used
    steps = w / scale.float()
    return {
        "weight": (steps.round() if kind == torch.int8 else steps).clamp(-largest, largest).to(kind),
        "scale": scale,
    }


def to_nf4(w: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """w (rows, n) in fp32 -> two levels a byte (rows, n / 2), scales (rows, 1), absmax of blocks of 64 (rows, n / 64):
    the square root of a block's share of the row's largest value, so that small blocks lose little in 8 bits."""
    blocks = w.unflatten(1, (-1, math.gcd(64, w.shape[1])))
    largest = blocks.abs().amax(dim=2)
    scale = largest.amax(dim=1, keepdim=True).clamp(min=1e-30).to(dtype)
    absmax = ((largest / scale.float()).sqrt() * 255).round().clamp(1, 255).to(torch.uint8)
    levels = torch.tensor(NF4, device=w.device)
    near = torch.bucketize(blocks / block_scales(scale, absmax).float(), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    near = near.flatten(1).to(torch.uint8)
    return {"weight": near[:, ::2] << 4 | near[:, 1::2], "scale": scale, "absmax": absmax}


def block_scales(scale: Tensor, absmax: Tensor) -> Tensor:
    """(rows, blocks, 1) in the scale's dtype."""
    return ((absmax.float() / 255).square() * scale.float()).to(scale.dtype)[..., None]


def from_nf4(weight: Tensor, scale: Tensor, absmax: Tensor, pairs: Tensor) -> Tensor:
    """The weight (rows, n); both levels of a byte are looked up as one number."""
    whole = pairs.view(torch.int32 if pairs.itemsize == 2 else torch.int64).flatten()
    levels = whole.index_select(0, weight.flatten().int()).view(pairs.dtype).view(*absmax.shape, -1)
    return levels.mul_(block_scales(scale, absmax)).flatten(1)  # (rows, blocks, 64) -> (rows, n)


def rounded_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (…, k) in fp32, rounded token by token to the dtype of weight (k, n), -> x weight * scale (n, 1), (…, n)."""
    tokens, step = to_rows(x.flatten(0, -2), torch.float32, weight.dtype).values()
    if weight.dtype == torch.int8:
        y = torch._int_mm(tokens, weight).float().mul_(step).mul_(scale.t())
    else:
        scales = {"scale_a": step, "scale_b": scale.t().float().contiguous()}
        y = torch._scaled_mm(tokens, weight, **scales, out_dtype=torch.bfloat16)  # the only one on CUDA
    return y.view(*x.shape[:-1], -1)


class QuantisedLinear(nn.Module):
    """A frozen linear with a low-bit form of its weight W (out, in) in buffers; W' is what that form stands for.

    x W'^T + bias and dX = dY W' are exact, in the model's dtype; a dynamic one rounds tokens to 8 bits, too.
    """

    def __init__(self, linear: nn.Linear, parts: dict[str, Tensor], dynamic: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.dynamic = dynamic
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self)

    def dequantised(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W', in the model's dtype."""
        parts = {name: part if name == "pairs" else part[rows] for name, part in self.named_buffers()}
        return from_nf4(**parts) if "pairs" in parts else parts["weight"].to(parts["scale"].dtype).mul_(parts["scale"])

    def rounds(self, x: Tensor) -> bool:
        """Whether these tokens are rounded: a few, such as the modulation's one, would gain nothing."""
        return self.dynamic and x.numel() // x.shape[-1] >= FEWEST

    def product(self, x: Tensor) -> Tensor:
        """x (…, in) -> x W'^T + bias."""
        if not self.rounds(x):
            return F.linear(x, self.dequantised(), self.bias)
        y = rounded_product(x.float(), self.weight.t(), self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def gradient(self, dy: Tensor) -> Tensor:
        """dY (…, out) -> dX = dY W'. The weight's scales lie on the summed axis: dY takes them before it is rounded."""
        if not self.rounds(dy):
            return dy @ self.dequantised()
        weight = self.weight if self.weight.dtype == torch.int8 else self.weight.t().contiguous().t()
        one = self.scale.new_ones(self.in_features, 1)
        return rounded_product(dy.float() * self.scale.t().float(), weight, one).to(dy.dtype)


class Product(torch.autograd.Function):
    """A quantised linear's product. Backward makes W' anew: no tensor is saved, for which a checkpoint would do it."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.gradient(dy), None


def is_quantised(name: str) -> bool:
    """Whether a tensor of the transformer, by our name, is a weight of a block's linears."""
    return name.startswith(("double_blocks.", "single_blocks.")) and name.endswith(".weight")


def open_flux(
    checkpoint: load.Checkpoint, device: torch.device, dtype: torch.dtype, precision: str, cache: Path
) -> Flux:
    """The transformer, frozen, in a `base_model_precision`, or infer.py's. A quantised one is read from folder `cache`,
    where it is made, once, or if it is damaged; either takes the memory of one tensor beside the model's own."""
    form = form_of(precision)
    if not form:
        return load.load_flux(checkpoint, device, dtype)
    weights = weights_id(checkpoint.components["transformer"], cache / "weights.json")
    file = cache / f"{digest(weights, form.partition('-')[0], str(dtype))}.safetensors"  # -dynamic has the same weights
    print(f"the blocks' weights in {form}, from {file}{'' if file.is_file() else ', which is made first'}")
    if file.is_file():
        try:
            return read_kept(load.empty_flux(checkpoint)[0], form, file, device)
        except (ValueError, SafetensorError) as error:
            print(f"{file} is damaged ({error}); it is made anew")
    keep(checkpoint, device, dtype, form, file)
    return read_kept(load.empty_flux(checkpoint)[0], form, file, device)


def keep(checkpoint: load.Checkpoint, device: torch.device, dtype: torch.dtype, form: str, file: Path):
    """Quantise a transformer tensor by tensor into a safetensors file, which appears whole or not at all."""
    header, sums, end = {}, {}, 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent) as folder:
        with open(Path(folder, file.name), "wb") as out:

            def write(flux: Flux, name: str):
                nonlocal end
                stem, _, leaf = name.rpartition(".")
                tensor = flux.get_parameter(name).detach()
                for part, kept in (parts_of(tensor, form) if is_quantised(name) else {leaf: tensor}).items():
                    kept, key, start = kept.cpu(), f"{stem}.{part}", end
                    end, sums[key] = end + kept.nbytes, checksum(kept)
                    header[key] = {"dtype": IN_FILE[kept.dtype], "shape": kept.shape, "data_offsets": [start, end]}
                    out.write(kept.flatten().view(torch.uint8).numpy())
                setattr(flux.get_submodule(stem), leaf, nn.Parameter(tensor.to("meta"), requires_grad=False))

            out.seek(8 + HEADER)
            load.load_flux(checkpoint, device, dtype, then=write)
            text = json.dumps({"__metadata__": {"checksums": json.dumps(sums)}, **header}).encode().ljust(HEADER)
            assert len(text) == HEADER
            out.seek(0)
            out.write(len(text).to_bytes(8, "little") + text)
        Path(folder, file.name).replace(file)


def read_kept(flux: Flux, form: str, file: Path, device: torch.device) -> Flux:
    """Fill a transformer on `meta` from what was kept. Raises ValueError or SafetensorError on damage."""
    handle = open_safetensors(file)
    for name, wanted in json.loads((handle.metadata() or {}).get("checksums", "")).items():
        (stem, _, leaf), tensor = name.rpartition("."), handle.get_tensor(name)
        if checksum(tensor) != wanted:
            raise ValueError(f"{name} is not as it was written")
        if is_quantised(name):
            flux.set_submodule(stem, QuantisedLinear(flux.get_submodule(stem), {}, form.endswith("-dynamic")))
        owner, copy = flux.get_submodule(stem), tensor.to(device, copy=True)
        release(tensor)
        if isinstance(owner, QuantisedLinear) and leaf != "bias":
            owner.register_buffer(leaf, copy)
        else:
            setattr(owner, leaf, nn.Parameter(copy, requires_grad=False))
    return flux.eval()


def checksum(tensor: Tensor) -> int:
    """Of form and bytes."""
    return zlib.crc32(tensor.view(torch.uint8).numpy(), zlib.crc32(f"{tensor.shape} {tensor.dtype}".encode()))
