"""The T5 encoder against transformers' T5EncoderModel."""

import pytest
import tiny
import torch
from tiny import CPU, FP32, error

from kontext_min.checkpoints.load import load_t5
from kontext_min.models import t5 as t5_module
from kontext_min.models.t5 import T5Config, T5Encoder, position_buckets

SIZES = {
    "tiny": {},
    "wide keys": {"d_model": 32, "d_kv": 24, "num_heads": 2, "num_layers": 3},
    "few buckets": {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 64},
}


def both(folder, change=lambda oracle: None, **settings):
    """transformers' model and ours, read from the files that it wrote."""
    oracle = tiny.t5(60, **settings)
    change(oracle)
    oracle.save_pretrained(folder / "text_encoder_2")
    return oracle, load_t5(tiny.part(folder, "text_encoder_2"), CPU, FP32)


def padded_ids(real: int = 150, total: int = 230) -> torch.Tensor:
    """Two texts of different length, ended by 1 and padded with 0."""
    ids = torch.randint(3, 60, (2, total), generator=torch.Generator().manual_seed(0))
    ids[0, real:], ids[1, real // 2 :] = 0, 0
    ids[0, real], ids[1, real // 2] = 1, 1
    return ids


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_text_tokens_equal_transformers_without_a_mask(name, tmp_path):  # trap 6, trap 7, trap 8
    oracle, ours = both(tmp_path, **SIZES[name])
    ids = padded_ids()
    assert error(ours(ids), oracle(input_ids=ids)[0]) < 1e-5


@torch.no_grad()
def test_a_mask_over_the_padding_would_change_the_text(tmp_path):  # trap 6
    oracle, ours = both(tmp_path)
    ids = padded_ids()
    masked = oracle(input_ids=ids, attention_mask=(ids != 0).long())[0]
    assert error(ours(ids)[0, :150], masked[0, :150]) > 0.02


def scaled_scores(patch):
    attention = torch.nn.functional.scaled_dot_product_attention
    wrong = lambda *args, scale, **kwargs: attention(*args, **kwargs)  # noqa: E731
    patch.setattr(t5_module.F, "scaled_dot_product_attention", wrong)


def sign_of_the_bias(patch):
    patch.setattr(t5_module, "position_buckets", lambda *args: position_buckets(*args).T)


def erf_gelu(patch):
    gelu = torch.nn.functional.gelu
    patch.setattr(t5_module.F, "gelu", lambda x, approximate: gelu(x))


def bias_in_the_first_layer_only(patch):
    forward, first = (
        t5_module.Block.forward,
        lambda block: hasattr(block.layer[0].SelfAttention, "relative_attention_bias"),
    )
    patch.setattr(t5_module.Block, "forward", lambda self, x, bias: forward(self, x, bias if first(self) else 0 * bias))


MISTAKES = {scaled_scores: 0.01, sign_of_the_bias: 0.01, bias_in_the_first_layer_only: 0.01, erf_gelu: 5e-5}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@torch.no_grad()
def test_parity_would_notice(mistake, tmp_path, monkeypatch):  # trap 7, trap 8
    oracle, ours = both(tmp_path)
    ids = padded_ids()
    expected = oracle(input_ids=ids)[0]
    mistake(monkeypatch)
    assert error(ours(ids), expected) > MISTAKES[mistake]


def small_embeddings(oracle):
    oracle.shared.weight.data *= 3e-4


@torch.no_grad()
def test_norm_has_an_eps_of_1e_minus_6(tmp_path):  # trap 8
    oracle, ours = both(tmp_path, small_embeddings)
    ids = padded_ids()
    expected = oracle(input_ids=ids)[0]
    assert error(ours(ids), expected) < 1e-5
    for module in ours.modules():
        if isinstance(module, t5_module.T5LayerNorm):
            module.eps = 1e-5
    assert error(ours(ids), expected) > 1e-3


def test_position_buckets_are_the_golden_ones():  # trap 7
    golden = {-1: 1, 0: 0, 1: 17, -8: 8, -9: 8, -10: 8, -11: 8, -12: 9, -64: 14, -91: 15, 7: 23, 8: 24, 16: 26, 23: 27,
              32: 28, 46: 29, 64: 30, 91: 31, 140: 31}  # fmt: skip
    buckets = position_buckets(300, 32, 128, CPU)
    assert {key: int(buckets[150, 150 + key]) for key in golden} == golden


def test_t5_xxl_has_4_762_310_656_parameters_in_219_tensors():
    with torch.device("meta"):
        t5 = T5Encoder(T5Config())
    assert (sum(p.numel() for p in t5.parameters()), len(t5.state_dict())) == (4_762_310_656, 219)
