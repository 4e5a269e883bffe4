"""The CLIP text tower against transformers' CLIPTextModel."""

import pytest
import tiny
import torch
from tiny import CPU, FP32, error

from kontext_min.checkpoints.load import load_clip
from kontext_min.models import clip as clip_module
from kontext_min.models.clip import CLIPConfig, CLIPText

END = 79  # the largest id of a vocabulary of 80


def both(folder, change=lambda oracle: None, **settings):
    """transformers' model and ours, read from the file that it wrote."""
    oracle = tiny.clip(80, **settings)
    change(oracle)
    oracle.save_pretrained(folder / "text_encoder")
    return oracle, load_clip(tiny.part(folder, "text_encoder"), CPU, FP32)


def prompts() -> torch.Tensor:
    """A prompt of 5 tokens and one of 40, padded to 77 with their end token as CLIP's are."""
    ids = torch.randint(3, 70, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 6:], ids[1, 41:] = 78, END, END
    return ids


@pytest.mark.parametrize("eos", [2, END], ids=["legacy eos_token_id", "eos_token_id"])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}])
@torch.no_grad()
def test_pooled_text_equals_transformers(eos, sizes, tmp_path):  # trap 8, trap 9
    oracle, ours = both(tmp_path, eos_token_id=eos, **sizes)
    assert error(ours(prompts()), oracle(input_ids=prompts()).pooler_output) < 1e-5


@torch.no_grad()
def test_pooled_text_does_not_see_the_padding(tmp_path):  # trap 9
    _, ours = both(tmp_path)
    ids = prompts()
    short = ours(ids[:1, :7])
    assert error(ours(ids)[:1], short) < 1e-6
    ids[0, 20:] = 5  # anything but a larger id
    assert error(ours(ids)[:1], short) < 1e-6


def exact_gelu(clip, patch):  # trap 8
    for layer in clip.text_model.encoder.layers:
        layer.activation = torch.nn.functional.gelu


def last_token(clip, patch):  # trap 9
    patch.setattr(clip_module, "LEGACY_EOS", -1)
    patch.setattr(torch.Tensor, "argmax", lambda self, dim: torch.full(self.shape[:1], 76))


def lookup_of_token_2(clip, patch):  # trap 9
    patch.setattr(clip_module, "LEGACY_EOS", -1)


def not_causal(clip, patch):  # trap 9
    attention = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(clip_module.F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attention(q, k, v))


@pytest.mark.parametrize(
    "mistake", [exact_gelu, last_token, lookup_of_token_2, not_causal], ids=lambda mistake: mistake.__name__
)
@torch.no_grad()
def test_parity_would_notice(mistake, tmp_path, monkeypatch):
    oracle, ours = both(tmp_path)
    expected = oracle(input_ids=prompts()).pooler_output
    mistake(ours, monkeypatch)
    assert error(ours(prompts()), expected) > 1e-3


def small_embeddings(oracle):
    for name, parameter in oracle.named_parameters():
        parameter.data *= 3e-4 if "embedding" in name else 1


@torch.no_grad()
def test_layer_norm_has_an_eps_of_1e_minus_5(tmp_path):  # trap 8
    oracle, ours = both(tmp_path, small_embeddings)
    expected = oracle(input_ids=prompts()).pooler_output
    assert error(ours(prompts()), expected) < 1e-5
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    assert error(ours(prompts()), expected) > 1e-3


def test_clip_l_has_123_060_480_parameters_in_196_tensors():
    with torch.device("meta"):
        clip = CLIPText(CLIPConfig())
    assert (sum(p.numel() for p in clip.parameters()), len(clip.state_dict())) == (123_060_480, 196)
