"""A folder written by us is one that diffusers, transformers and we read alike."""

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import CPU, FP32

from kontext_min.checkpoints import load
from kontext_min.checkpoints.save import save_model
from kontext_min.checkpoints.tensors import whole_file
from kontext_min.models.clip import CLIPConfig, CLIPText
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.t5 import T5Config, T5Encoder
from kontext_min.models.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def models():
    """Our own models, of sizes that are not the defaults."""
    heads = {"hidden_size": 64, "num_heads": 2, "axes_dim": (4, 14, 14), "vec_in_dim": 32, "context_in_dim": 24}
    made = {
        "flux": Flux(FluxConfig(depth=1, depth_single_blocks=2, guidance_embed=False, **heads)),
        "vae": VAE(VAEConfig(channels=(16, 32), layers_per_block=1, latent_channels=16, groups=8, scaling_factor=0.5)),
        "t5": T5Encoder(T5Config(60, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, num_buckets=16)),
        "clip": CLIPText(CLIPConfig(80, 32, 48, num_layers=2, num_heads=2, max_positions=20, eos_token_id=79)),
    }
    return {name: tiny.randomise(model, seed) for seed, (name, model) in enumerate(made.items())}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder, **models, dtype=torch.float32)
    return folder


def test_who_may_read_a_folder_may_read_the_weights_in_it(tmp_path):
    """safetensors alone makes files that other users, such as a server's, cannot read."""
    for mode in (0o755, 0o700):
        folder = tmp_path / f"{mode}"
        folder.mkdir()
        folder.chmod(mode)
        with whole_file(folder / "a.safetensors") as file:
            save_file({"a": torch.zeros(1)}, file)
        assert (folder / "a.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"a.safetensors could not be written: .*No space left"):
        with whole_file(tmp_path / "a.safetensors") as file:
            file.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")  # a bare Exception
    assert not [*tmp_path.iterdir()]


def test_we_read_back_what_we_wrote_to_the_last_bit(models, folder):
    parts = {"flux": "transformer", "vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
    for name, part in parts.items():
        read = getattr(load, f"load_{name}")(tiny.part(folder, part), CPU, FP32)
        assert read.config == models[name].config
        assert all(torch.equal(read.state_dict()[key], value) for key, value in models[name].state_dict().items())


@torch.no_grad()
def test_diffusers_reads_the_transformer(models, folder):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    img, txt, y, t = tiny.random(1, 6, 64), tiny.random(1, 5, 24), tiny.random(1, 32), torch.tensor([0.4])
    ids, zeros = torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(3.0)), torch.zeros(5, 3)
    ours = models["flux"](img, ids, txt, zeros, timesteps=t, y=y, guidance=t)
    theirs = oracle(img, txt, y, t, ids, zeros, None, return_dict=False)[0]
    assert tiny.error(ours, theirs) < 1e-5


@torch.no_grad()
def test_diffusers_reads_the_autoencoder(models, folder):
    diffusers = pytest.importorskip("diffusers")
    oracle, x = diffusers.AutoencoderKL.from_pretrained(folder / "vae"), tiny.random(1, 3, 16, 24)
    mode = oracle.encode(x).latent_dist.mode()
    assert tiny.error(models["vae"].encode(x), (mode - oracle.config.shift_factor) * 0.5) < 1e-5
    z = tiny.random(1, 16, 8, 6)
    decoded = oracle.decode(z / 0.5 + oracle.config.shift_factor, return_dict=False)[0]
    assert tiny.error(models["vae"].decode(z), decoded) < 5e-5


@torch.no_grad()
def test_transformers_reads_both_text_encoders(models, folder):
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[78, 5, 6, 79, 79], [78, 7, 8, 9, 79]])
    t5 = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2")
    clip = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert tiny.error(models["t5"](ids % 60), t5(input_ids=ids % 60)[0]) < 1e-5
    assert tiny.error(models["clip"](ids), clip(input_ids=ids).pooler_output) < 1e-5
