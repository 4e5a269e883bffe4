"""Masks of the loss: white counts, black does not, and both lie exactly where the target's pixels do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CPU, FP32

import train
from kontext_min import flow
from kontext_min.checkpoints.load import find, load_flux
from kontext_min.config import Config, checked
from kontext_min.data.examples import Examples, use_of
from kontext_min.encoders import mask_weights
from kontext_min.training.sets import mix_of, read_sets, text_cache
from kontext_min.training.trainer import Draw, flow_loss


def noise(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def values(kontext, tmp_path):
    """Two pairs with masks whose left half is white."""
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    for i in range(2):
        for folder, picture in (("target", noise(i)), ("reference", noise(9 + i)), ("mask", half)):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{i}.png")
        (tmp_path / "target" / f"{i}.txt").write_text("make it night")
    data = [
        {"id": "t", "instance_data_dir": str(tmp_path / "target"), "conditioning_data": ["r", "m"], "resolution": 64},
        {"id": "r", "instance_data_dir": str(tmp_path / "reference"), "conditioning_type": "reference_strict"},
        {"id": "m", "instance_data_dir": str(tmp_path / "mask"), "conditioning_type": "mask"},
    ]
    return {
        "pretrained_model_name_or_path": str(kontext), "data_backend_config": data, "mixed_precision": "no",
        "cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "aspect_bucket_alignment": 16,
    }  # fmt: skip


def sets_of(values, **more):
    return read_sets(checked(Config, {**values, **more}, "test"), 16)


def encoded(values, **more):
    config = checked(Config, {**values, **more}, "test")
    made = Examples(sets_of(values, **more).training, find(values["pretrained_model_name_or_path"]),
                    text_cache(config), FP32, mix_of(config))  # fmt: skip
    made.encode(CPU)
    return made


def drawn(batch):
    generator = torch.Generator().manual_seed(1)
    count = len(batch.target)
    return Draw(torch.randn(batch.target.shape, generator=generator), torch.full((count,), 0.4), torch.ones(count))


def errors(flux, batch, draw):
    """The squared error at every latent, written out."""
    with torch.no_grad():
        v = flow.velocity(flux, 0.6 * batch.target + 0.4 * draw.noise, draw.t, batch.condition, draw.guidance)
    return (v - (draw.noise - batch.target)) ** 2


@pytest.fixture(scope="module")
def flux(kontext):
    return load_flux(find(kontext), CPU, FP32)


def test_a_white_mask_is_no_mask_to_the_last_bit(values, tmp_path, flux):
    for i in range(2):
        Image.new("L", (64, 64), 255).save(tmp_path / "mask" / f"{i}.png")
    made = encoded(values)
    batch = made.batch(made.uses(0), CPU)
    assert torch.equal(batch.weight, torch.ones_like(batch.weight))
    for kind in ("l2", "huber", "smooth_l1"):
        plain = flow_loss(flux, replace(batch, weight=None), drawn(batch), kind)
        assert torch.equal(flow_loss(flux, batch, drawn(batch), kind), plain)


def test_the_loss_is_that_of_the_white_half(values, flux):
    made = encoded(values)
    batch = made.batch(made.uses(0), CPU)
    assert batch.target.shape[-1] == 8 and batch.weight.shape[:2] == (2, 1)
    draw = drawn(batch)
    found, every = flow_loss(flux, batch, draw), errors(flux, batch, draw)
    torch.testing.assert_close(found, every[..., :4].mean())
    assert abs(found - every.mean()) > 1e-3


def test_black_can_count_a_little(values, flux):
    made = encoded(values, masked_loss_weight=0.25)
    batch = made.batch(made.uses(0), CPU)
    draw = drawn(batch)
    every = errors(flux, batch, draw)
    expected = (every[..., :4].mean() + 0.25 * every[..., 4:].mean()) / 1.25
    torch.testing.assert_close(flow_loss(flux, batch, draw), expected)


def test_a_batch_is_the_mean_of_its_uses_masked_or_not(values, flux):
    made = encoded(values)
    first, second = made.uses(0)
    second = replace(second, mask=None)
    batch = made.batch([first, second], CPU)
    draw = drawn(batch)
    every = errors(flux, batch, draw)
    torch.testing.assert_close(flow_loss(flux, batch, draw), (every[0, ..., :4].mean() + every[1].mean()) / 2)
    assert made.batch([second], CPU).weight is None


def test_a_mask_is_reduced_to_latents_by_area():
    picture = Image.new("L", (24, 16), 0)
    picture.paste(255, (4, 4, 12, 16))
    assert mask_weights(picture, 8).tolist() == [[[[0.25, 0.25, 0], [0.5, 0.5, 0]]]]


@pytest.mark.parametrize("style", ["center", "corner", "random"])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_is_cut_exactly_like_its_target(values, tmp_path, style, scale):
    """A target that is its own mask: after the crop they are still the same picture."""
    spots = Image.new("L", (160, 80), 0)
    for x, y in ((10, 10), (70, 30), (120, 50)):
        spots.paste(255, (x, y, x + 24, y + 20))
    for i in range(2):
        spots.convert("RGB").save(tmp_path / "target" / f"{i}.png")
        spots.resize((160 * scale, 80 * scale), Image.Resampling.NEAREST).save(tmp_path / "mask" / f"{i}.png")
    target, _, mask = values["data_backend_config"]
    target |= {"crop": True, "crop_style": style, "vae_cache_clear_each_epoch": True, "conditioning_data": "m"}
    (example, _) = sets_of(values, data_backend_config=[target, mask]).training
    boxes = set()
    for epoch in range(4):
        use = use_of(0, example, mix_of(checked(Config, values, "test")), epoch)
        assert use.mask.transform == use.target.transform and use.references == ()
        boxes.add(use.mask.transform.box)
        shown, cut = (np.asarray(view.open().convert("L"), float) for view in (use.target, use.mask))
        assert shown.shape == cut.shape == (64, 64) and np.abs(shown - cut).mean() < 4
        assert scale == 2 or np.array_equal(shown, cut)
    assert len(boxes) == (4 if style == "random" else 1)


def test_masks_are_shown_as_often_as_asked(values):
    example = sets_of(values).training[0]
    mixes = [mix_of(checked(Config, {**values, "masked_loss_probability": p}, "test")) for p in (0.0, 0.3, 1.0)]
    shares = [np.mean([use_of(0, example, mix, epoch).mask is not None for epoch in range(400)]) for mix in mixes]
    assert shares[0] == 0 and shares[1] == pytest.approx(0.3, abs=0.07) and shares[2] == 1
    assert mixes[0].complete().masked == 1
    assert [use_of(0, example, mix, 7).caption for mix in mixes] == ["make it night"] * 3


def test_what_is_transparent_in_a_mask_is_black(values, tmp_path):
    cut_out = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    cut_out.paste((255, 255, 255, 255), (0, 0, 32, 64))
    cut_out.save(tmp_path / "mask" / "0.png")
    mask = sets_of(values).training[0].mask.open()
    assert mask.getpixel((5, 5)) == (255, 255, 255) and mask.getpixel((60, 5)) == (0, 0, 0)


def test_masks_that_are_missing_black_or_of_another_shape_are_named(values, tmp_path):
    (tmp_path / "mask" / "0.png").unlink()
    with pytest.raises(ValueError, match="1 targets without a reference:\n.*0.png: no 0 in m"):
        sets_of(values)
    Image.new("L", (64, 64), 0).save(tmp_path / "mask" / "0.png")
    with pytest.raises(ValueError, match="1 masks without white:\n.*0.png"):
        sets_of(values)
    assert len(sets_of(values, masked_loss_weight=0.1).training) == 2
    Image.new("L", (64, 48), 255).save(tmp_path / "mask" / "0.png")
    with pytest.raises(ValueError, match="1 masks of another aspect:\n.*0.png is 64x48, .*crop them alike$"):
        sets_of(values)
    target, reference, mask = values["data_backend_config"]
    both = [{**target, "conditioning_data": ["r", "m", "n"]}, reference, mask, {**mask, "id": "n"}]
    with pytest.raises(ValueError, match="names 2 sets of masks"):
        sets_of(values, data_backend_config=both)


def test_a_crop_without_white_teaches_nothing(values, flux):
    made = encoded(values)
    batch = made.batch(made.uses(0)[:1], CPU)
    made.latents = lambda *_: torch.zeros(1, 1, 8, 8)
    weight = made.weight(made.uses(0)[0], batch.target.shape[-2:])
    assert flow_loss(flux, replace(batch, weight=weight), drawn(batch)) == 0


def test_a_run_with_masks_and_its_check_sheet(values, tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        checked(Config, {**values, "max_train_steps": 2, "lora_rank": 2, "num_eval_images": 0}, "test")
        .model_dump_json(exclude_unset=True)
    )  # fmt: skip
    train.main([str(tmp_path / "config.json")])
    assert "reference m: 2 pictures, the loss counts where they are white" in capsys.readouterr().out
    train.main([str(tmp_path / "config.json"), "--prune-cache"])
    assert "removed 0 unused entries" in capsys.readouterr().out
    train.main([str(tmp_path / "config.json"), "--check"])
    assert (tmp_path / "out" / "check-t.png").is_file()
