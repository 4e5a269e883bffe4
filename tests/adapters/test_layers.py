"""LoRA, DoRA and LoKr by themselves: against formulas, torch.kron, peft and LyCORIS."""

import math

import pytest
import tiny
import torch
from torch.nn import Linear, Sequential

from kontext_min.adapters.layers import Adapted, Kronecker, LoKr, LoRA, factors

KINDS = {  # Kronecker sizes for a weight of (48, 40), with what LyCORIS calls them
    "full": (Kronecker(4, full_matrix=True), {"factor": 4, "full_matrix": True, "lora_dim": 3, "alpha": 1}),
    "large dim": (Kronecker(4, dim=100, alpha=7), {"factor": 4, "lora_dim": 100, "alpha": 7}),
    "low rank": (Kronecker(4, dim=3, alpha=2), {"factor": 4, "lora_dim": 3, "alpha": 2}),
    "both": (
        Kronecker(-1, dim=2, alpha=1, decompose_both=True),
        {"factor": -1, "lora_dim": 2, "alpha": 1, "decompose_both": True},
    ),
    "w1 low": (
        Kronecker(8, dim=3, alpha=5, decompose_both=True),
        {"factor": 8, "lora_dim": 3, "alpha": 5, "decompose_both": True},
    ),
}


def spoilt(update):
    """With values that are not zero."""
    for i, parameter in enumerate(update.parameters()):
        parameter.data = 0.3 * tiny.random(*parameter.shape, seed=i)
    return update


def base_of(rows: int, inputs: int, bias: bool = True) -> Linear:
    return tiny.randomise(Linear(inputs, rows, bias=bias))


def gradients(output, *inputs):
    return torch.autograd.grad((output * tiny.random(*output.shape, seed=9)).sum(), inputs)


# ------------------------------------------------------------------------------------------------ LoKr


def lycoris_module(size, linear):
    """LyCORIS's own layer around a linear, with what it calls its weights."""
    lokr = pytest.importorskip("lycoris.modules.lokr")
    module = lokr.LokrModule("x", linear, 1.0, **size)
    return module, {name: value for name, value in module.named_parameters() if name.startswith("lokr_")}


def factors_of(update) -> dict:
    """Our factors by LyCORIS's names."""
    named = {}
    for side in ("w1", "w2"):
        parts = getattr(update, side)
        endings = ("",) if len(parts) == 1 else ("_a", "_b")
        named |= {f"lokr_{side}{ending}": part for ending, part in zip(endings, parts, strict=True)}
    return named


def test_sizes_split_as_in_lycoris():
    lycoris = pytest.importorskip("lycoris.functional.general")
    for size in (*range(1, 130), 250, 3072, 4096, 9216, 12288, 15360, 18432, 21504):
        for factor in (-1, 0, *range(1, 20), 48, 64, 100, 5000):
            assert factors(size, factor) == lycoris.factorization(size, factor), (size, factor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_lokr_is_the_one_that_lycoris_draws(kind):
    size, theirs = KINDS[kind]
    linear = base_of(48, 40)
    torch.manual_seed(3)
    module, values = lycoris_module(theirs, linear)
    torch.manual_seed(3)
    ours = LoKr.fresh("x", (48, 40), size)
    assert ours.shape == (48, 40) and ours.scale == module.scale
    assert factors_of(ours).keys() == values.keys()
    assert all(torch.equal(values[name], value) for name, value in factors_of(ours).items())
    assert not ours.delta().any()


@pytest.mark.parametrize("kind", KINDS)
def test_lokr_and_its_gradients_are_lycoris(kind):
    size, theirs = KINDS[kind]
    linear = base_of(48, 40)
    module, values = lycoris_module(theirs, linear)
    ours = spoilt(LoKr.fresh("x", (48, 40), size))
    for name, value in factors_of(ours).items():
        values[name].data.copy_(value.data)
    x = tiny.random(2, 5, 40, seed=4).requires_grad_()
    mine, their = linear(x) + ours(x), module(x)
    torch.testing.assert_close(mine, their)
    pairs = [(x, x), *((value, values[name]) for name, value in factors_of(ours).items())]
    for a, b in zip(gradients(mine, *(p for p, _ in pairs)), gradients(their, *(p for _, p in pairs)), strict=True):
        torch.testing.assert_close(a, b)


SHAPES = [((4, 6), (12, 10)), ((6, 4), (3, 9)), ((1, 1), (8, 5)), ((2, 8), (7, 1)), ((3, 3), (40, 4))]  # (a, c), (b, d)


@pytest.mark.parametrize(("w1", "w2"), SHAPES)
@pytest.mark.parametrize("rank", [None, 1, 5])
def test_without_the_product_the_output_and_all_gradients_are_those_of_torch_kron(w1, w2, rank):
    (b, d), sides = w2, [tiny.random(*w1, seed=1)]
    sides += (
        [tiny.random(b, d, seed=2)] if rank is None else [tiny.random(b, rank, seed=2), tiny.random(rank, d, seed=3)]
    )
    lokr = LoKr("x", (sides[0],), tuple(sides[1:]), 0.7).double()
    x = tiny.random(2, 3, w1[1] * d, seed=4).double().requires_grad_()
    everything = [x, *lokr.parameters()]
    full = lokr.w2[0] if rank is None else lokr.w2[0] @ lokr.w2[1]
    expected = x @ (0.7 * torch.kron(lokr.w1[0], full)).T
    torch.testing.assert_close(lokr(x), expected, rtol=1e-5, atol=1e-5)  # w1 and w2 are put together in fp32
    for ours, theirs in zip(gradients(lokr(x), *everything), gradients(expected, *everything), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lokr.delta().double(), 0.7 * torch.kron(lokr.w1[0], full), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, inputs", [(3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (9216, 3072)])
def test_for_the_real_model_two_small_products_are_always_cheaper_than_the_full_one(rows, inputs):
    for factor in (-1, 2, 4, 8, 16, 32, 64):
        (a, b), (c, d) = factors(rows, factor), factors(inputs, factor)
        share = (c * b * d + c * b * a) / (rows * inputs)  # w2 first, then w1
        assert share == pytest.approx(1 / a + 1 / d) and share < 0.51


# ------------------------------------------------------------------------------------------------ DoRA


def peft_layer(base, **settings):
    """peft's layer around a linear, spoilt, and its weights (A, B, magnitude)."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **settings)
    model = peft.get_peft_model(Sequential(base), config).train()
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data = 0.3 * tiny.random(*b.shape, seed=5)
    if not config.use_dora:
        return model, [a, b]
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= 1 + 0.2 * tiny.random(len(magnitude), seed=6)
    return model, [a, b, magnitude]


def adapted(base, values, start: int = 0, dropout: float = 0.0) -> Adapted:
    """Ours with copies of peft's weights."""
    a, b, *magnitude = (value.detach().clone() for value in values)
    ours = Adapted(base)
    update = LoRA("0", a, b, 6 / 4, start)
    update.dropout = dropout
    if magnitude:
        update.magnitude = torch.nn.Parameter(magnitude[0])
    ours.updates.append(update)
    return ours


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_gradients_and_dropout_are_pefts(dora, bias, dropout):
    base = base_of(24, 40, bias)
    theirs, values = peft_layer(base, use_dora=dora, lora_dropout=dropout)
    ours, x = adapted(base, values, dropout=dropout), tiny.random(3, 7, 40, seed=2).requires_grad_()
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    mine = gradients(outputs[0], x, *ours.updates.parameters())
    for a, b in zip(mine, gradients(outputs[1], x, *values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4", "int8-dynamic", "fp8-dynamic"])
def test_dora_on_some_rows_of_a_quantised_linear_is_pefts_on_those_rows_dequantised(form):
    low_bit = tiny.quantised(base_of(60, 40), form)
    rows = slice(20, 44)
    twin = Linear(40, 24).requires_grad_(False)
    twin.load_state_dict({"weight": low_bit.dequantised(rows), "bias": low_bit.bias[rows]})
    theirs, values = peft_layer(twin, use_dora=True)
    ours, x = adapted(low_bit, values, start=20), tiny.random(3, 40, seed=2).requires_grad_()
    y, plain, expected = ours(x), low_bit(x), theirs(x)
    torch.testing.assert_close(y[:, rows], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[:, :20], plain[:, :20]) and torch.equal(y[:, 44:], plain[:, 44:])
    mine = gradients(y[:, rows], x, *ours.updates.parameters())
    for a, b in zip(mine, gradients(expected, x, *values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda: LoRA.fresh("x", (48, 40), 4, 6), lambda: LoKr.fresh("x", (48, 40), Kronecker(4, dim=3))]
)
def test_dora_at_a_strength_is_that_share_of_the_way_from_the_base(make):
    base, update, x = base_of(48, 40), spoilt(make()), tiny.random(5, 40)
    update.magnitude = torch.nn.Parameter(tiny.random(48).abs())
    layer = Adapted(base)
    layer.updates.append(update)
    weight = base.weight + update.delta()
    turned = update.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(update.lengths(base.weight), weight.norm(dim=1))
    for update.strength in (0.0, 0.5, 1.0, -1.0):
        weight = base.weight + update.strength * (turned - base.weight)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, base.bias), rtol=1e-5, atol=1e-5)
    update.strength = 0.0
    assert torch.equal(layer(x), base(x))


def test_lengths_in_bf16_are_within_its_rounding():
    weight, lora = base_of(64, 256).weight, spoilt(LoRA.fresh("x", (64, 256), 4, 6))
    rounded = lora.lengths(weight.bfloat16())
    assert rounded.dtype == torch.float32
    assert tiny.error(rounded, lora.lengths(weight)) < 2**-8 / math.sqrt(2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: LoRA.fresh("x", (24, 40), 4, 6), lambda: LoKr.fresh("x", (24, 40), Kronecker(4, dim=3))]
)
def test_compiled_forward_and_backward_are_the_same_without_a_break(make, dora):
    layer, update, x = (
        Adapted(tiny.quantised(base_of(48, 40), "int8")),
        spoilt(make()),
        tiny.random(5, 40).requires_grad_(),
    )
    update.start, update.magnitude = 12, torch.nn.Parameter(tiny.random(24).abs()) if dora else None
    layer.updates.append(update)
    outputs = [layer(x), torch.compile(layer, backend="aot_eager", fullgraph=True)(x)]
    torch.testing.assert_close(*outputs)
    for a, b in zip(*(gradients(output, x, *update.parameters()) for output in outputs), strict=True):
        torch.testing.assert_close(a, b)
