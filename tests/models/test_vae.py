"""The autoencoder against diffusers' AutoencoderKL."""

import pytest
import tiny
import torch
from tiny import CPU, FP32, error, random

from kontext_min.checkpoints.load import load_vae
from kontext_min.memory import counted
from kontext_min.models import vae
from kontext_min.models.vae import VAE, VAEConfig

SIZES = {
    "tiny kontext": {},
    "two resnets": {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 2},
    "three levels": {"block_out_channels": (16, 32, 48), "norm_num_groups": 8, "latent_channels": 4},
}


def both(folder, change=lambda oracle: None, **settings):
    """diffusers' model and ours, read from the file that it wrote."""
    oracle = tiny.vae(**settings)
    change(oracle)
    oracle.save_pretrained(folder / "vae")
    return oracle, load_vae(tiny.part(folder, "vae"), CPU, FP32)


def normalised(oracle, x):
    """What the pipeline makes of diffusers' latents."""
    return (oracle.encode(x).latent_dist.mode() - oracle.config.shift_factor) * oracle.config.scaling_factor


@pytest.mark.parametrize("strip", [vae.STRIP, 9000, 100], ids=["whole", "strips", "row by row"])
@pytest.mark.parametrize("height, width", [(32, 32), (48, 80), (88, 24)])
@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_autoencoder_equals_diffusers(name, height, width, strip, tmp_path, monkeypatch):  # trap 10
    monkeypatch.setattr(vae, "STRIP", strip)
    oracle, ours = both(tmp_path, **SIZES[name])
    x = random(1, 3, height, width).clamp(-1, 1)
    z = ours.encode(x)
    assert error(z, normalised(oracle, x)) < 1e-5
    decoded = oracle.decode(z / 0.3611 + 0.1159, return_dict=False)[0]
    assert error(ours.decode(z), decoded) < 5e-5


@torch.no_grad()
def test_encoding_takes_the_mode_not_a_sample(tmp_path):  # trap 10
    _, ours = both(tmp_path)
    x = random(1, 3, 32, 32)
    assert torch.equal(ours.encode(x), ours.encode(x))
    mean, _ = ours.moments(x)
    assert torch.allclose(ours.encode(x), (mean - 0.1159) * 0.3611)


def symmetric_padding(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.ZeroPad2d):
            module.padding = (1, 0, 1, 0)


def scale_before_shift(vae, patch):
    patch.setattr(VAE, "encode", lambda self, x: self.moments(x)[0] * 0.3611 - 0.1159)


@pytest.mark.parametrize("mistake", [symmetric_padding, scale_before_shift], ids=lambda mistake: mistake.__name__)
@torch.no_grad()
def test_parity_would_notice(mistake, tmp_path, monkeypatch):  # trap 10
    oracle, ours = both(tmp_path)
    x = random(1, 3, 32, 48)
    mistake(ours, monkeypatch)
    assert error(ours.encode(x), normalised(oracle, x)) > 1e-2


def faint(oracle):
    """The first convolution leaves about 1e-3, where an eps of 1e-6 matters."""
    oracle.encoder.conv_in.weight.data *= 1e-3
    oracle.encoder.conv_in.bias.data.zero_()


@torch.no_grad()
def test_group_norm_has_an_eps_of_1e_minus_6(tmp_path):  # trap 8
    oracle, ours = both(tmp_path, faint)
    x = random(1, 3, 32, 32)
    expected = normalised(oracle, x)
    assert error(ours.encode(x), expected) < 1e-5
    for module in ours.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    assert error(ours.encode(x), expected) > 1e-3


def test_flux_vae_has_83_819_683_parameters_in_244_tensors():
    with torch.device("meta"):
        model = VAE(VAEConfig())
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (83_819_683, 244)


@torch.no_grad()
def test_a_large_picture_by_strips_takes_less(monkeypatch):
    """Beside the first block of 256 channels at 1024 px, its input, only two of 128 channels are there whole."""
    with torch.device("meta"):
        model, latents, picture = VAE(VAEConfig()), torch.empty(1, 16, 128, 128), torch.empty(1, 3, 1024, 1024)
    channel, strips = 1024**2 * 4, 4 * vae.STRIP * 4  # bytes
    assert (256 + 2 * 128) * channel < counted(lambda: model.decode(latents)).peak < 512 * channel + strips
    assert 3 * 128 * channel < counted(lambda: model.encode(picture)).peak < 3 * 128 * channel + strips
    monkeypatch.setattr(vae, "STRIP", 1024**4)
    assert counted(lambda: model.decode(latents)).peak >= 3 * 256 * channel
