"""The frozen transformer in 8 or 4 bits: a half or a quarter of bf16's memory, computed in the same dtype as before.

Every linear inside the blocks is kept as int8 or fp8 (e4m3), a byte a number, or NF4, 0.531 bytes: 99 % of the weights.
The rest is small, and the errors of what embeds and of the final layer would reach every token: it stays as it is.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from kontext_min.checkpoints import load
from kontext_min.checkpoints.save import checksum, stream
from kontext_min.checkpoints.tensors import Place, assembled, open_safetensors
from kontext_min.data.cache import digest, weights_id
from kontext_min.models.flux import Flux

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.uint8: 1}
NF4 = (  # 16 quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, appendix E)
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
EMBEDDERS = ("time_in", "guidance_in", "vector_in")
MODULATION = ("mod.lin", "modulation.lin", "adaLN_modulation.1")  # endings of the linears that see one token
Hook = Callable[[nn.Module, str], None] | None  # what `fill` calls after each tensor


def form_of(precision: str) -> str | None:
    """A precision as train.py's keys and infer.py name it -> int8, fp8 or nf4, maybe with -dynamic; None is plain."""
    kind, _, how = precision.partition("-")
    return None if kind in ("no_change", "bf16", "fp32") else f"{kind}-dynamic" if how == "dynamic" else kind


def refuse_on(device: torch.device, precision: str):
    """ValueError where a device lacks the numbers of a precision, or their products."""
    kind, _, how = (form_of(precision) or "").partition("-")
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)  # before Ada
    if (kind == "fp8" and how and old) or (device.type == "mps" and (kind == "fp8" or how)):
        raise ValueError(f"this {device.type} device cannot multiply in {precision}; use int8 or nf4")


def parts_of(weight: Tensor, form: str) -> dict[str, Tensor]:
    """A weight (rows, in) -> what is kept of it, by name; made of some million numbers at a time."""
    kind, dtype, step, wholes = KINDS[form.partition("-")[0]], weight.dtype, max(1, 2**21 // weight.shape[1]), []
    for start in range(0, len(weight), step):
        pieces = rounded(weight[start : start + step].float(), dtype, kind)
        wholes = wholes or [piece.new_empty(len(weight), piece.shape[1]) for piece in pieces]  # pieces would scatter
        for whole, piece in zip(wholes, pieces, strict=True):
            whole[start : start + step] = piece
    parts = dict(zip(("weight", "scale"), wholes, strict=True))
    levels = torch.tensor(NF4, dtype=dtype, device=weight.device)
    return parts | ({"pairs": torch.cartesian_prod(levels, levels)} if form == "nf4" else {})  # (256, 2): of every byte


def rounded(w: Tensor, dtype: torch.dtype, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """w (rows, n) in fp32 -> low-bit numbers, of NF4 two a byte, and scales of rows, (rows, 1), or blocks of 64."""
    blocks = w.unflatten(1, (-1, math.gcd(64, w.shape[1]) if kind == torch.uint8 else w.shape[1]))
    scale = (blocks.abs().amax(dim=2) / LARGEST[kind]).clamp(min=1e-30).to(dtype)  # rounded, then used
    steps = (blocks / scale.float()[..., None]).flatten(1).clamp(-LARGEST[kind], LARGEST[kind])
    if kind == torch.uint8:
        levels = torch.tensor(NF4, device=w.device)
        near = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2, out_int32=True).byte()
        return near[:, ::2] << 4 | near[:, 1::2], scale
    return (steps.round() if kind == torch.int8 else steps).to(kind), scale


def rounded_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (…, k) in fp32, rounded token by token to the dtype of weight (k, n), -> x weight * scale (1, n), (…, n)."""
    tokens, step = rounded(x.flatten(0, -2), torch.float32, weight.dtype)
    if weight.dtype == torch.int8:
        y = torch._int_mm(tokens, weight).float().mul_(step).mul_(scale)
    else:  # of row-wise products in fp8 CUDA has no other
        y = torch._scaled_mm(tokens, weight, scale_a=step, scale_b=scale, out_dtype=torch.bfloat16)
    return y.view(*x.shape[:-1], -1)


class QuantisedLinear(nn.Module):
    """A frozen linear with a low-bit form of its weight, which stands for W' (out, in) in the model's dtype.
    Products with W' are exact. A dynamic one rounds tokens to 8 bits, too. Without a scale the weight is W' itself.
    """

    def __init__(self, linear: nn.Linear, parts: dict[str, Tensor], dynamic: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.dynamic = dynamic
        for name in ("weight", "scale", "pairs"):
            self.register_buffer(name, parts.get(name))

    def stored(self) -> tuple[Tensor, Tensor | None]:  # weight and scale; `Ring` puts another in its place
        return self.weight, self.scale

    def forward(self, x: Tensor, change: Tensor | None = None) -> Tensor:
        """x (…, in) W'^T plus the bias; or plus a change (…, out), as `Adapted` asks for it, without the bias."""
        return Product.apply(x, self, self.bias if change is None else change)

    def dequantised(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W', in the scale's dtype, rounded once; both levels of a byte are looked up as one number."""
        (weight, scale), pairs = self.stored(), self.pairs
        if scale is None:
            return weight[rows]
        weight, scale = weight[rows], scale[rows]
        if pairs is not None:
            whole = pairs.view(torch.int32 if pairs.itemsize == 2 else torch.int64).flatten()
            weight = whole.index_select(0, weight.flatten().int()).view(pairs.dtype).view(len(scale), -1)
        return weight.to(scale.dtype).unflatten(1, (scale.shape[1], -1)).mul_(scale[..., None]).flatten(1)

    def rounds(self, x: Tensor) -> bool:
        """Whether tokens are rounded: a few, which torch's product would refuse on CUDA, would gain nothing."""
        return self.dynamic and x.numel() // x.shape[-1] > 16


class Product(torch.autograd.Function):
    """x (…, in) -> x W'^T + more, (out,) or (…, out).
    Backward makes W' anew: no tensor is saved, for which a checkpoint would compute the product again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantisedLinear, more: Tensor | None) -> Tensor:
        ctx.linear = linear
        if not linear.rounds(x):
            if more is None or more.ndim == 1:
                return F.linear(x, linear.dequantised(), more)
            return torch.addmm(more.flatten(0, -2), x.flatten(0, -2), linear.dequantised().t()).view(more.shape)
        weight, scale = linear.stored()
        y = rounded_product(x.float(), weight.t(), scale.t().float()).to(x.dtype)
        return y if more is None else y + more

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, Tensor | None]:
        more = dy if ctx.needs_input_grad[2] else None
        if not ctx.linear.rounds(dy):
            return dy @ ctx.linear.dequantised(), None, more
        weight, scale = ctx.linear.stored()
        scale = scale.t().float()  # (1, out): of the axis that is summed over
        weight = weight.t().contiguous().t()  # column by column, as CUDA's products like it or want it
        return rounded_product(dy.float() * scale, weight, scale.new_ones(1, weight.shape[1])).to(dy.dtype), None, more


def is_modulation(name: str) -> bool:
    return name.startswith(EMBEDDERS) or any(f"{ending}." in name for ending in MODULATION)


def is_quantised(name: str) -> bool:  # whether a tensor is a weight of a block's other linears: of FLUX, 72 %
    return "block" in name and name.endswith(".weight") and not is_modulation(name)


def quantising(precision: str) -> Hook:
    """For `then` of `load_flux` and `load_t5`: the blocks' linears are quantised as soon as their weight is there."""
    form = form_of(precision)

    def then(model: nn.Module, name: str):
        stem, linear = name.removesuffix(".weight"), model.get_submodule(name.rpartition(".")[0])
        if is_quantised(name) and isinstance(linear, nn.Linear):
            parts = parts_of(linear.weight, form)
            model.set_submodule(stem, QuantisedLinear(linear, parts, form.endswith("-dynamic")))

    return then if form else None


def open_flux(
    model: load.Checkpoint, place: Place, dtype: torch.dtype, precision: str, cache: Path, merge=None
) -> Flux:
    """The transformer, frozen, in a `base_model_precision`, or infer.py's. A quantised one is read from folder `cache`,
    where it is made, once, or if it is damaged; either takes the memory of one tensor beside the model's own.
    place: a device, or one for each tensor's name.
    merge: changes each weight when it is there, before it is quantised; what is made of changed weights is not kept.
    """
    form = form_of(precision)
    if not form or merge:
        steps = [step for step in (merge, quantising(precision)) if step]
        return load.load_flux(model, place, dtype, then=lambda *tensor: [step(*tensor) for step in steps])
    weights = weights_id(model.components["transformer"], cache / "weights.json")
    kind = form.partition("-")[0]  # -dynamic has the same weights
    file = cache / f"{digest(weights, kind, str(dtype), 'but the modulation')}.safetensors"
    print(f"the blocks' weights in {form}, from {file}{'' if file.is_file() else ', which is made first'}")
    if file.is_file():
        try:
            return read_kept(load.empty_flux(model)[0], form, file, place)
        except (ValueError, SafetensorError) as error:
            print(f"{file} is damaged ({error}); it is made anew")
    stream(file, kept(model, place, dtype, form))
    return read_kept(load.empty_flux(model)[0], form, file, place)


def kept(model: load.Checkpoint, place: Place, dtype: torch.dtype, form: str) -> Iterator:
    for name, tensor in assembled(*load.empty_flux(model), dtype, place):
        stem, _, leaf = name.rpartition(".")
        for part, value in (parts_of(tensor, form) if is_quantised(name) else {leaf: tensor}).items():
            yield f"{stem}.{part}", value.cpu()


def read_kept(flux: Flux, form: str, file: Path, place: Place) -> Flux:
    """Fill a transformer on `meta` from what was kept. Raises ValueError or SafetensorError on damage."""
    handle = open_safetensors(file)
    for name, wanted in json.loads((handle.metadata() or {}).get("checksums", "")).items():
        (stem, _, leaf), tensor = name.rpartition("."), handle.get_tensor(name)
        if checksum(tensor) != wanted:
            raise ValueError(f"{name} is not as it was written")
        if is_quantised(name):
            flux.set_submodule(stem, QuantisedLinear(flux.get_submodule(stem), {}, form.endswith("-dynamic")))
        owner, copy = flux.get_submodule(stem), tensor.to(place(name) if callable(place) else place, copy=True)
        buffer = isinstance(owner, QuantisedLinear) and leaf != "bias"
        setattr(owner, leaf, copy if buffer else nn.Parameter(copy, requires_grad=False))
    return flux.eval()
