"""nano's optimizer, its stages and its success rule."""

import copy
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from kontext_min import flow
from kontext_min.models.vae import VAE
from kontext_min.nano.evaluate import judge
from kontext_min.nano.model import AUTOENCODER, CLIP_TOKENS, LENGTH, Nano, tokenizers_of, write_clip, write_t5
from kontext_min.nano.pretrain import (
    PARTS,
    PHASES,
    Bucket,
    cached_buckets,
    distil_loss,
    flux_loss,
    orthogonalise,
    pretrain_flux,
    states,
    token_weights,
)

PROMPTS = ["Make the red circle blue.", "add a crimson dinosaur at the top", "", "  Put a hat on  the cat, please!"]


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonalise_brings_all_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert 0.6 < values.min() and values.max() < 1.25


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    write_t5(folder / "tokenizer_2")
    write_clip(folder / "tokenizer")
    return folder, tokenizers_of(folder)


def test_tokenizers_give_the_ids_of_transformers(tokenizers):
    transformers = pytest.importorskip("transformers")
    folder, own = tokenizers
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    t5 = transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    clip = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    ids = own(PROMPTS)
    assert torch.equal(ids[:, 0], t5(PROMPTS, **options).input_ids)
    assert torch.equal(ids[:, 1], clip(PROMPTS, **options).input_ids)
    assert ids[:, 1].max() == CLIP_TOKENS - 1


@pytest.mark.parametrize("bf16", [False, True])
def test_interrupted_pretraining_equals_uninterrupted_pretraining(bf16, tokenizers, tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae = VAE(AUTOENCODER).requires_grad_(False)
    phase = replace(PHASES[0], examples=40, steps=3, batch=2)
    phases = (phase, replace(phase, name="later", steps=2, own=0.5))

    def weights(name, stop=None):
        exported = []

        def export(folder, nano, vae):
            exported.append(torch.cat([tensor.flatten() for tensor in nano.state_dict().values()]))
            if len(exported) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr("kontext_min.nano.pretrain.export", export)
        pretrain_flux(tmp_path / name, vae, tokenizers[0], phases, 2, bf16)
        return exported[-1]

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = weights("whole")
    for stop in (1, 2, 3):  # after the first phase, before guidance is distilled, at the end
        with pytest.raises(KeyboardInterrupt):
            weights("parts", stop)
    assert torch.equal(whole, weights("parts"))


def test_only_missing_latents_are_made(tokenizers, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    vae, phase = VAE(AUTOENCODER).requires_grad_(False), replace(PHASES[0], examples=40)
    first = cached_buckets(tmp_path, vae, tokenizers[0], phase)
    assert f"{PARTS} of {PARTS} parts" in capsys.readouterr().out
    (tmp_path / "latents-64px.1").unlink()
    again = cached_buckets(tmp_path, vae, tokenizers[0], phase)
    assert f"1 of {PARTS} parts" in capsys.readouterr().out
    monkeypatch.setattr("kontext_min.nano.pretrain.ProcessPoolExecutor", None)  # not needed any more
    last = cached_buckets(tmp_path, vae, tokenizers[0], phase)
    assert capsys.readouterr().out == ""
    for buckets in (again, last):
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, buckets, strict=True))


def test_distilled_guidance_is_the_teachers_true_cfg():
    torch.manual_seed(3)
    teacher = Nano()
    torch.nn.init.normal_(teacher.flux.final_layer.linear.weight, std=0.1)
    data = Bucket(torch.randn(2, 2, 16, 4, 4), torch.randint(3, 90, (2, 2, 8)))
    empty = torch.tensor([[[0] * 8, [1] * 8]])
    generator = torch.Generator().manual_seed(1)
    student = copy.deepcopy(teacher)
    asked = []

    def perfect(img, guidance, **inputs):  # a student that is the teacher with true classifier-free guidance
        asked.append(guidance)
        nothing = teacher.condition(empty.expand(2, -1, -1), [])
        one = torch.ones_like(guidance)
        v = teacher.flux(img=img, guidance=one, **inputs)
        plain = teacher.flux(img=img, guidance=one, **inputs | {"txt": nothing.txt, "y": nothing.vec})
        return plain + guidance.view(-1, 1, 1) * (v - plain)

    student.flux.forward = perfect
    assert distil_loss(student, teacher, PHASES[0], empty, data, generator).item() < 1e-9
    assert asked[0].min() == 1 < asked[0].max() <= 4
    assert (
        distil_loss(copy.deepcopy(teacher), teacher, PHASES[0], empty, data, generator).item() > 1e-4
    )  # it ignores guidance


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_states_are_noise_mixed_with_the_target_or_with_what_nano_makes_of_it(own):
    torch.manual_seed(4)
    nano, target, made, count = Nano(), torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4), round(4 * own)
    seen = nano.condition(torch.randint(3, 90, (4, 2, 8)), [torch.randn(4, 16, 4, 4)])

    scale, asked = torch.tensor([1.0, 2.0, 3.0, 4.0]), []

    def erring(img, timesteps, wanted, guidance, **_):  # it is on the straight way to another picture
        asked.append(guidance)
        return (img[:, :wanted] - flow.pack(made[: len(img)])) / timesteps.view(-1, 1, 1)

    nano.flux.forward = erring
    t, x_t = states(nano, target, seen, scale, own, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    torch.randn(4, generator=generator)  # the times
    noise = torch.randn(target.shape, generator=generator)
    assert torch.allclose(x_t[:count], flow.mix(made, noise, t)[:count], atol=1e-5)
    assert torch.equal(x_t[count:], flow.mix(target, noise, t)[count:])
    assert len(set(t.tolist())) == 4 - max(0, count - 1)  # a share of the batch goes one way together
    assert all(0 < time < 1 for time in t.tolist())
    assert all(torch.equal(guidance, scale[:count]) for guidance in asked)
    assert len(asked) <= 9 and bool(asked) == bool(own)


def test_the_loss_is_zero_where_one_step_leads_from_every_state_to_the_target():
    torch.manual_seed(6)
    nano, erring = Nano(), Nano()
    torch.nn.init.normal_(erring.flux.final_layer.linear.weight, std=0.1)
    data, empty = (
        Bucket(torch.randn(4, 2, 16, 4, 4), torch.randint(3, 90, (4, 2, 8))),
        torch.tensor([[[0] * 8, [1] * 8]]),
    )

    def perfect(img, timesteps, wanted, **inputs):
        if not torch.is_grad_enabled():  # while it samples, it errs
            return erring.flux(img=img, timesteps=timesteps, wanted=wanted, **inputs)
        return (img[:, :wanted] - flow.pack(data.latents[:, 0])) / timesteps.view(-1, 1, 1)

    nano.flux.forward = perfect
    loss = flux_loss(nano, replace(PHASES[0], own=0.75), empty, data, torch.Generator().manual_seed(7))
    assert loss.item() < 1e-9


def test_changed_tokens_weigh_more_and_text_to_image_tokens_alike():
    target = torch.zeros(1, 16, 4, 4)
    reference = target.clone()
    reference[..., :2, :2] = 1
    assert token_weights(target, [reference], 2.0).flatten().tolist() == [2, 1, 1, 1]
    assert token_weights(target, [], 2.0).flatten().tolist() == [1, 1, 1, 1]
    reference[:] = 1
    reference[..., 2:, 2:] = 0  # a new background: what stays is the harder part
    assert token_weights(target, [reference], 2.0).flatten().tolist() == [2, 2, 2, 2]


def test_success_needs_the_change_done_and_the_rest_left():
    reference = Image.new("RGB", (8, 8), "gray")
    target = reference.copy()
    target.paste("white", (0, 0, 8, 4))
    spoilt = target.copy()
    spoilt.paste((190, 190, 190), (0, 4, 8, 8))
    assert judge(target, reference, target)[0] and not judge(reference, reference, target)[0]
    assert not judge(spoilt, reference, target)[0]
    assert judge(reference, reference, reference)[0] and not judge(spoilt, reference, reference)[0]
    everywhere = Image.new("RGB", (8, 8), "white")
    assert judge(everywhere, reference, everywhere)[0] and math.isnan(judge(everywhere, reference, everywhere)[1])
    assert judge(target, reference, target)[1] == 99


@pytest.mark.parametrize(("x", "far"), [(20, False), (40, True)])
def test_elsewhere_is_more_than_a_token_away_from_what_changes(x, far):
    reference = Image.new("RGB", (64, 64), "gray")
    target = reference.copy()
    target.paste("white", (0, 0, 8, 64))
    spoilt = target.copy()
    spoilt.putpixel((x, 32), (0, 0, 0))
    _, outside, elsewhere = judge(spoilt, reference, target)
    assert outside < 50 and elsewhere == pytest.approx(psnr_of_one(64 * (64 - 8 - 16)) if far else 99)


def psnr_of_one(pixels: int) -> float:  # dB where one of so many gray pixels is black
    return 10 * math.log10(255**2 * pixels / 128**2)


@pytest.mark.slow
def test_smoke_pretraining_writes_a_whole_model_folder(tmp_path):
    command = [sys.executable, "-m", "kontext_min.nano", "pretrain", "--smoke"]
    subprocess.run([*command, "--folder", tmp_path / "model", "--work", tmp_path / "work"], check=True, timeout=300)
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    assert all((tmp_path / "model" / part).is_dir() for part in parts)
    assert (tmp_path / "model" / "metrics.json").exists()
