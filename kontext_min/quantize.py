"""The frozen transformer in 8 bits: half the memory of bf16, computed in the same dtype as before.

Every linear inside the blocks becomes int8, one scale per output row; that is 99 % of the weights. The rest stays as it
is: embeddings of image, text, time and guidance and the final layer are small, and their errors reach every token;
norms and biases are not worth it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext_min.models.flux import Flux

BLOCKS = ("double_blocks.", "single_blocks.")


class Int8Linear(nn.Module):
    """A frozen linear whose weight W (out, in) is kept as int8 times a scale per row: W' = weight * scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        w = linear.weight.detach()
        scale = (w.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30).to(w.dtype)  # rounded, then used
        self.register_buffer("scale", scale)  # (out, 1) in the model's dtype
        self.register_buffer("weight", (w.float() / scale.float()).round().clamp(-127, 127).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return Int8Product.apply(x, self.weight, self.scale, self.bias)

    def dequantised(self, rows: slice) -> Tensor:
        """These rows of W'."""
        return dequantise(self.weight[rows], self.scale[rows])


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 (out, in) and scale (out, 1) -> their product in the scale's dtype, rounded once."""
    return weight.to(scale.dtype).mul_(scale)


class Int8Product(torch.autograd.Function):
    """x W'^T + bias. Backward makes W' again from its int8 form: dX = dY W', exactly, and no bf16 copy is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantise(weight, scale), bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy @ dequantise(*ctx.saved_tensors), None, None, None


def quantize_int8(flux: Flux, name: str):
    """Make the linear that owns weight `name` int8, if it is one of the blocks'; for `load_flux(then=...)`."""
    if name.startswith(BLOCKS) and name.endswith(".weight"):
        linear = name.removesuffix(".weight")
        flux.set_submodule(linear, Int8Linear(flux.get_submodule(linear)))
