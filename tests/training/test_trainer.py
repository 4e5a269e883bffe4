"""The training step against diffusers + peft, and what a run leaves behind."""

import json
from dataclasses import replace
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CPU, FP32, add_lora, error, read_part
from torch import nn
from torch._dynamo.utils import counters

import train as train_py
from kontext_min.adapters.inject import TARGETS, matching_modules, updates
from kontext_min.adapters.read import read_adapter
from kontext_min.checkpoints.load import find, load_flux
from kontext_min.config import Config, Dataset
from kontext_min.data.examples import Batch, Examples
from kontext_min.edit import Editor
from kontext_min.flow import Shift, mix, velocity
from kontext_min.memory import apply_checkpointing
from kontext_min.presets import NANO
from kontext_min.run_folder import read_lines
from kontext_min.training.sets import mix_of, read_sets, text_cache
from kontext_min.training.trainer import Draw, batches, draw, flow_loss, shift_factor, time_of, train


@pytest.fixture
def config(kontext, tmp_path):
    """A run of ten steps on four small pairs of two aspects."""
    for folder in ("target", "reference"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            size = (64, 64) if i < 2 else (80, 48)
            Image.effect_noise(size, 80 + i).convert("RGB").save(tmp_path / folder / f"{i}.png")
            (tmp_path / "target" / f"{i}.txt").write_text("make the sky red" if i % 2 else "a photo of cat")
    return Config(
        pretrained_model_name_or_path=str(kontext), output_dir=tmp_path / "out", cache_dir=tmp_path / "cache",
        mixed_precision="no", max_train_steps=10, learning_rate=1e-3, train_batch_size=2, lora_rank=4, lora_alpha=6,
        gradient_checkpointing=False, validation_num_inference_steps=2, validation_steps=5, num_eval_images=1,
        lr_warmup_steps=3, data_backend_config=[
            {"id": "t", "instance_data_dir": tmp_path / "target", "conditioning_data": "r", "resolution": 64},
            {"id": "r", "instance_data_dir": tmp_path / "reference", "conditioning_type": "reference_loose"},
        ],
    )  # fmt: skip


def editor(flux):
    return Editor(flux, None, Shift(), NANO)


def prepared(config):
    """The model with fresh adapters, and the encoded examples."""
    checkpoint = find(config.pretrained_model_name_or_path)
    examples = Examples(read_sets(config, 16).training, checkpoint, text_cache(config), FP32, mix_of(config))
    examples.encode(CPU)
    config.output_dir.mkdir(exist_ok=True)
    flux = load_flux(checkpoint, CPU, FP32)
    torch.manual_seed(config.seed)
    parameters = add_lora(flux, matching_modules(flux.config, TARGETS["all"]), config.lora_rank, config.lora_alpha)
    return flux, parameters, examples


def adamw(config, parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.adam_weight_decay)


def losses(config, flux, parameters, examples) -> list[float]:
    """Train to the end."""
    return [values["loss"] for _, values in train(config, editor(flux), adamw(config, parameters), examples)]


def peft_twin(config, flux):
    """diffusers' transformer with peft's LoRA, started from our adapters' values."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    twin = diffusers.FluxTransformer2DModel.from_pretrained(Path(config.pretrained_model_name_or_path) / "transformer")
    twin = twin.to(FP32).requires_grad_(False)
    ours = {update.name: update for update in updates(flux)}
    twin.add_adapter(peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(ours)))
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            module, _, half = name.removesuffix(".default.weight").rpartition(".lora_")
            parameter.data = getattr(ours[module], half).detach().clone()
    return twin.train()


def twin_losses(config, twin, examples) -> list[float]:
    """The same ten steps with diffusers, peft and torch's AdamW, written out."""
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    found, shift = [], Shift()
    for number, uses in zip(range(config.max_train_steps), batches(examples, config), strict=False):
        batch = examples.batch(uses, CPU)
        b, c, h, w = batch.target.shape
        noise, t, guidance = draw(batch, uses, number, config, shift)
        assert torch.equal(guidance, torch.ones(b))
        x_t = (1 - t)[:, None, None, None] * batch.target + t[:, None, None, None] * noise

        def tokens(z):
            z = z.view(*z.shape[:2], z.shape[2] // 2, 2, z.shape[3] // 2, 2).permute(0, 2, 4, 1, 3, 5)
            return z.reshape(z.shape[0], z.shape[1] * z.shape[2], -1)

        def ids(z, index):
            rows, columns = torch.meshgrid(torch.arange(z.shape[2] // 2), torch.arange(z.shape[3] // 2), indexing="ij")
            return torch.stack([torch.full_like(rows, index), rows, columns], -1).view(-1, 3).float()

        reference = batch.condition.references[0]
        prediction = twin(
            hidden_states=torch.cat([tokens(x_t), tokens(reference)], 1),
            encoder_hidden_states=batch.condition.txt,
            pooled_projections=batch.condition.vec,
            timestep=t,
            img_ids=torch.cat([ids(x_t, 0), ids(reference, 1)]),
            txt_ids=torch.zeros(batch.condition.txt.shape[1], 3),
            guidance=guidance,
        ).sample[:, : (h // 2) * (w // 2)]
        loss = (prediction - tokens(noise - batch.target)).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (number + 1) / config.lr_warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_ten_steps_equal_diffusers_peft_and_adamw(config):
    flux, parameters, examples = prepared(config)
    twin = peft_twin(config, flux)
    expected = twin_losses(config, twin, examples)
    assert losses(config, flux, parameters, examples) == pytest.approx(expected, rel=1e-5)
    assert expected[0] != expected[-1]
    trained = dict(twin.named_parameters())
    for update in updates(flux):
        assert error(update.B, trained[f"{update.name}.lora_B.default.weight"]) < 1e-3
        assert update.B.abs().max() > 0


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {}])
def test_a_run_can_be_repeated_to_the_last_bit_and_checkpointing_does_not_change_it(config, change):
    results = []
    for variant in (config, config.model_copy(update=change)):
        flux, parameters, examples = prepared(variant)
        if variant.gradient_checkpointing:
            apply_checkpointing(flux)
        found = losses(variant, flux, parameters, examples)
        results.append((found, [p.detach().clone() for p in parameters]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_compiled_blocks_stay_compiled_beyond_four_sizes_of_batches(kontext, tmp_path, monkeypatch):
    """Of one example each, and learn the same. torch goes on without a word where a function has 8 graphs, two a size.
    This backend makes graphs, not code.
    """
    for i in range(5):
        for folder in ("target", "reference"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.effect_noise((64 + 16 * i, 64), 80).convert("RGB").save(tmp_path / folder / f"{i}.png")
        (tmp_path / "target" / f"{i}.txt").write_text("make it darker")
    target = {"id": "t", "instance_data_dir": tmp_path / "target", "conditioning_data": "r", "resolution": 64}
    reference = {"id": "r", "instance_data_dir": tmp_path / "reference", "conditioning_type": "reference_strict"}
    config = Config(
        data_backend_config=[target | {"resolution_type": "pixel"}, reference], output_dir=tmp_path / "out",
        cache_dir=tmp_path / "cache", pretrained_model_name_or_path=str(kontext), aspect_bucket_alignment=16,
        mixed_precision="no", max_train_steps=5, validation_disable=True, eval_loss_disable=True,
    )  # fmt: skip
    train_py.run(config)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    counters.clear()
    train_py.run(config.model_copy(update={"output_dir": tmp_path / "compiled", "torch_compile": True}))
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 5 * 2 * 2  # kinds of blocks, graphs of each
    plain, compiled = (read_lines(tmp_path / run / "metrics.jsonl") for run in ("out", "compiled"))
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_accumulated_batches_give_the_mean_of_their_gradients(config):
    flux, parameters, examples = prepared(config)
    parts = []
    for number, uses in zip(range(2), batches(examples, config), strict=False):
        batch = examples.batch(uses, CPU)
        loss = flow_loss(flux, batch, draw(batch, uses, number, config, Shift()))
        (loss / 2).backward()
        parts.append(loss.item())
    norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
    flux, parameters, examples = prepared(config)
    run = config.model_copy(update={"gradient_accumulation_steps": 2, "max_train_steps": 1})
    ((step, values),) = train(run, editor(flux), adamw(run, parameters), examples)
    assert step == 1 and values["loss"] == pytest.approx(sum(parts) / 2, rel=1e-6)
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-6)


def spoil(flux, steps):
    """Make the gradient of these steps NaN, counted from 1, by a hook that looks at how often it was called."""
    first = next(updates(flux))
    calls = iter(range(1, 1000))
    first.B.register_hook(lambda grad: grad * float("nan") if next(calls) in steps else grad)


def test_a_loss_that_is_not_finite_stops_the_run_with_one_sentence(config):
    flux, parameters, examples = prepared(config)
    parameters[1].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 1: the loss is nan.*; lower learning_rate"):
        losses(config, flux, parameters, examples)


def test_a_gradient_that_is_not_finite_is_said_with_items_and_times(config):
    flux, parameters, examples = prepared(config)
    spoil(flux, {3})
    with pytest.raises(ValueError) as raised:
        losses(config, flux, parameters, examples)
    said = str(raised.value)
    uses = next(islice(batches(examples, config), 2, None))
    times = draw(examples.batch(uses, CPU), uses, 2, config, Shift()).t
    for part in (f"{use.example.name} at t = {t:.4f}" for use, t in zip(uses, times.tolist(), strict=True)):
        assert part in said
    assert "step 3: the loss is 0." in said or "step 3: the loss is 1." in said or "step 3: the loss is 2." in said
    assert "gradient's norm nan" in said and all(torch.isfinite(p).all() for p in parameters)


def test_as_many_steps_as_asked_are_skipped_and_counted_and_not_one_more(config, capsys):
    run = config.model_copy(update={"skip_nonfinite_steps": 2, "max_train_steps": 5})
    flux, parameters, examples = prepared(run)
    spoil(flux, {2, 4})
    steps = [(*line, parameters[1].tolist()) for line in train(run, editor(flux), adamw(run, parameters), examples)]
    seen = [values for *_, values in steps]
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    assert [step for step, values, _ in steps if values.get("skipped") and values["loss"] is None] == [2, 4]
    assert "skipped, 2 of 2" in capsys.readouterr().out
    spoil(flux, {1})
    with pytest.raises(ValueError, match="step 5: the loss"):
        next(train(run, editor(flux), adamw(run, parameters), examples, start=4, skipped=2))


def test_the_door_leaves_lora_metrics_config_and_pictures(config, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text("// a comment\n" + config.model_dump_json(exclude_defaults=True))
    train_py.main([str(path), "max_train_steps=6", f"--output_dir={tmp_path / 'named'}"])
    out, said = tmp_path / "named", capsys.readouterr().out
    modules = 2 * 8 + 2 * 3  # attention of two double blocks and two single ones, 64 x 64 each
    for part in (
        f"on {modules} modules: {modules * 4 * 128:,} trainable",
        "data     4 pairs and 0 pictures",
        "epoch    4 uses in 2 batches: 2 steps; max_train_steps 6 is 3.0 epochs",
        "GB  transformer",
    ):
        assert part in said, said
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "config.json").read_text())["max_train_steps"] == 6
    assert (out / "README.md").is_file() and said.endswith(f"{out / 'report.html'}\n")
    assert (out / "report.html").stat().st_size > 10_000
    assert sorted(p.name for p in (out / "validation").glob("*.png")) == ["000005.png", "000006.png"]
    adapter = read_adapter(out / "pytorch_lora_weights.safetensors")
    names = matching_modules(load_flux(find(config.pretrained_model_name_or_path), CPU, FP32).config, TARGETS["all"])
    assert {update.name for update in adapter.updates} == set(names)
    assert adapter.recipe["prompt"] and Path(adapter.recipe["image"][0]).is_file()
    assert all(update.scale == 1 for update in adapter.updates)


def test_model_and_data_problems_are_said_together(config, tmp_path):
    (tmp_path / "reference" / "1.png").unlink()
    broken = config.model_copy(update={"pretrained_model_name_or_path": "nobody/nothing", "flux_lora_target": "some"})
    with pytest.raises(ValueError) as raised:
        train_py.check(broken)
    for part in ("flux_lora_target 'some'", "1 targets without a reference", "hf download nobody/nothing"):
        assert part in str(raised.value)


def test_the_tiny_model_is_not_changed_by_training(config, kontext):
    before = read_part(kontext / "transformer")
    flux, parameters, examples = prepared(config)
    losses(config, flux, parameters, examples)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_part(kontext / "transformer").items())
    assert not any(p.requires_grad for name, p in flux.named_parameters() if "updates" not in name)


def test_regularisation_learns_the_base_models_own_prediction_at_the_same_time(config):
    flux, parameters, examples = prepared(config)
    batch = examples.batch(examples.uses(0)[:1], CPU)
    noise, t = torch.randn_like(batch.target), torch.tensor([0.4])
    regular = replace(batch, regularise=True)
    assert flow_loss(flux, regular, Draw(noise, t, torch.ones(1))).item() == 0  # fresh adapters change nothing
    for p in parameters:
        p.data += 0.05
    base = load_flux(find(config.pretrained_model_name_or_path), CPU, FP32)
    x_t, guidance = mix(batch.target, noise, t), torch.ones(1)
    wanted = velocity(base, x_t, t, batch.condition, guidance)
    expected = (velocity(flux, x_t, t, batch.condition, guidance) - wanted).pow(2).mean()
    loss = flow_loss(flux, regular, Draw(noise, t, torch.ones(1)))
    assert expected > 0 and torch.allclose(loss, expected)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_text_to_image_data_trains_beside_pairs_and_alone(config, tmp_path):
    alone = Dataset(id="alone", instance_data_dir=tmp_path / "target", resolution=48)
    for datasets in ([alone], [alone, *config.data_backend_config]):
        run = config.model_copy(update={"data_backend_config": datasets, "max_train_steps": 4})
        flux, parameters, examples = prepared(run)
        assert len(losses(run, flux, parameters, examples)) == 4
    shapes = {len(use.references) for use in examples.uses(0)}
    assert shapes == {0, 1}


DENSITIES = [  # settings, mean, standard deviation (logit-normals by quadrature, the others by formula)
    ({}, 0.5, 0.2083),
    ({"flow_sigmoid_scale": 2.0}, 0.5, 0.3140),
    ({"flow_use_uniform_schedule": True}, 0.5, 12**-0.5),
    ({"flow_use_beta_schedule": True}, 0.5, 20**-0.5),
    ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 4.0}, 2 / 3, (8 / 252) ** 0.5),
]


@pytest.mark.parametrize("settings, mean, spread", DENSITIES)
def test_times_have_the_asked_density_and_are_the_same_again(config, settings, mean, spread):
    drawn = partial(time_of, config.model_copy(update=settings))
    times = torch.cat([drawn(torch.Generator().manual_seed(i)) for i in range(4000)])
    assert times.mean().item() == pytest.approx(mean, abs=0.015)
    assert times.std().item() == pytest.approx(spread, abs=0.012)
    assert torch.equal(times[7:8], drawn(torch.Generator().manual_seed(7)))


def test_shift_is_a_number_or_by_the_targets_tokens(config):
    for size, by_tokens in ((512, 1.878), (768, 2.332), (1024, 3.158)):
        batch = Batch(torch.empty(1, 16, size // 8, size // 8, device="meta"), None)
        assert shift_factor(config, Shift(), batch) == pytest.approx(by_tokens, abs=1e-3)
        assert shift_factor(config.model_copy(update={"flow_schedule_shift": 3.0}), Shift(), batch) == 3.0


def test_guidance_of_a_random_range_and_huber_loss_do_what_they_say(config):
    flux, _, examples = prepared(config)
    uses = examples.epoch(0, 2)[0]
    batch = examples.batch(uses, CPU)
    ranged = config.model_copy(update={"flux_guidance_mode": "random-range", "flux_guidance_min": 1.0})
    draws = [draw(batch, uses, number, ranged, Shift()) for number in range(30)]
    scales = torch.cat([d.guidance for d in draws])
    assert 1 <= scales.min() < 1.5 and 3.5 < scales.max() <= 4
    noise, t, scale = draws[0]
    error = velocity(flux, mix(batch.target, noise, t), t, batch.condition, scale) - (noise - batch.target)
    huber = torch.where(error.abs() < 0.5, error**2 / 2, 0.5 * (error.abs() - 0.25)).mean()
    torch.testing.assert_close(flow_loss(flux, batch, draws[0], "huber", 0.5), huber)
    torch.testing.assert_close(flow_loss(flux, batch, draws[0], "smooth_l1", 0.5), 2 * huber)


def test_dropout_is_the_same_again_in_every_run_and_off_where_nothing_is_learned(config):
    results = []
    for checkpointing in (False, True):
        dropping = config.model_copy(update={"lora_dropout": 0.3, "max_train_steps": 4})
        flux, _, examples = prepared(dropping)
        for update in updates(flux):
            update.dropout = dropping.lora_dropout
        if checkpointing:
            apply_checkpointing(flux)
        torch.manual_seed(len(results))  # what was drawn before does not count
        parameters = [p for p in flux.parameters() if p.requires_grad]
        found = losses(dropping, flux, parameters, examples)
        results.append((found, [p.detach().clone() for p in parameters]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    uses = examples.uses(0)[:1]
    batch = examples.batch(uses, CPU)
    drawn = draw(batch, uses, 0, dropping, Shift())
    assert flow_loss(flux, batch, drawn).item() != flow_loss(flux, batch, drawn).item()
    with torch.no_grad():
        assert flow_loss(flux, batch, drawn).item() == flow_loss(flux, batch, drawn).item()
