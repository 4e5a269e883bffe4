"""infer.py against diffusers' FluxKontextPipeline, its flags, and what it says when it cannot."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import add_lora

import infer
import train
from kontext_min.adapters.inject import at_strength, matching_modules, updates
from kontext_min.adapters.merge import merge_into
from kontext_min.adapters.read import read_adapter
from kontext_min.adapters.write import write_adapter
from kontext_min.checkpoints.load import load_flux

PROMPT, OTHER = "make the sky red", "turn it into night, please!"


@pytest.fixture(scope="module")
def pipeline(kontext):
    """diffusers' pipeline of the tiny Kontext."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(kontext, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def small(kontext, tmp_path_factory):
    """The same model, but with nano's preferred sizes, so that automatic sizes stay small."""
    folder = Path(shutil.copytree(kontext, tmp_path_factory.mktemp("models") / "small"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_name_or_path": "nano"}))
    return folder


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A random picture with large shapes and fine grain."""
    generator = np.random.default_rng(seed)
    shapes = Image.fromarray(generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    grain = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
    Image.blend(shapes, grain, 0.5).save(path)
    return path


def run(*flags) -> list[Path]:
    """infer.py with --out's folder -> its pictures."""
    infer.main([str(flag) for flag in flags])
    out = Path(flags[flags.index("--out") + 1])
    return sorted(out.glob("*.png")) if out.is_dir() else [out]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=float)


def assert_same_picture(ours: Path, theirs: Image.Image):
    """Mean difference at most 0.05/255, no value more than 2/255 away."""
    difference = abs(pixels(ours) - np.asarray(theirs, dtype=float))
    assert difference.mean() <= 0.05 and difference.max() <= 2


def of_diffusers(
    pipeline, width: int, height: int, image: Path | None = None, seed: int = 0, **settings
) -> Image.Image:
    """Its picture at our settings."""
    call = {"prompt": PROMPT, "guidance_scale": 2.5, "num_inference_steps": 3, **settings}
    reference = None if image is None else Image.open(image).convert("RGB")
    return pipeline(
        image=reference, width=width, height=height, max_area=width * height, _auto_resize=False,
        generator=torch.Generator().manual_seed(seed), **call,
    ).images[0]  # fmt: skip


# ------------------------------------------------------------------------------------------------ parity

CASES = {  # picture, our flags, the pipeline's settings, output size
    "no reference": (None, ["--size", "64x48"], {}, (64, 48)),
    "reference": ((64, 48), [], {}, (64, 48)),
    "odd and wide": ((75, 50), [], {}, (64, 48)),
    "odd and tall": ((41, 103), [], {}, (32, 96)),
    "small": ((17, 31), [], {}, (16, 16)),
    "other size": ((64, 48), ["--size", "32x80"], {}, (32, 80)),
    "true cfg": ((75, 50), ["--cfg-scale", "3", "--negative-prompt", "blue hat"],
                 {"true_cfg_scale": 3.0, "negative_prompt": "blue hat"}, (64, 48)),
    "true cfg, no reference": (None, ["--size", "48x64", "--cfg-scale", "2"],
                               {"true_cfg_scale": 2.0, "negative_prompt": ""}, (48, 64)),
    "guidance, steps, seed": ((64, 48), ["--guidance", "4", "--steps", "5", "--seed", "7"],
                              {"guidance_scale": 4.0, "num_inference_steps": 5, "seed": 7}, (64, 48)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_picture_equals_that_of_diffusers(case, kontext, pipeline, tmp_path):  # trap 3, trap 10, trap 15
    shape, flags, settings, (width, height) = CASES[case]
    image = None if shape is None else picture(tmp_path / "photo.png", *shape)
    given = [] if image is None else ["--image", image]
    base = ["--model", kontext, "--prompt", PROMPT, "--steps", 3, "--precision", "fp32", "--device", "cpu"]
    (ours,) = run(*base, "--reference-size", "keep", *given, *flags, "--out", tmp_path / "ours.png")
    theirs = of_diffusers(pipeline, width, height, image, **settings)
    assert Image.open(ours).size == theirs.size == (width, height)
    assert_same_picture(ours, theirs)


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    """A LoRA of peft on every linear of the transformer, of mixed ranks and alphas, as the pipeline saves it."""
    peft = pytest.importorskip("peft")
    transformer = pipeline.transformer
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    ranks, alphas = {"attn.to_q": 2, r"transformer_blocks\.1\.ff\..*": 3}, {"proj_mlp": 1, "attn.to_q": 5}
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=linears, rank_pattern=ranks, alpha_pattern=alphas)
    transformer.add_adapter(config, adapter_name="made")
    for seed, (name, parameter) in enumerate(transformer.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.12 * tiny.random(*parameter.shape, seed=seed)
    folder = tmp_path_factory.mktemp("lora")
    layers = peft.get_peft_model_state_dict(transformer, adapter_name="made")
    settings = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    type(pipeline).save_lora_weights(folder, layers, transformer_lora_adapter_metadata=settings)
    transformer.delete_adapters("made")
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("scale", ["", ":0.5"])
def test_picture_with_a_lora_of_peft_equals_that_of_diffusers(scale, lora, kontext, pipeline, tmp_path):  # trap 13
    image = picture(tmp_path / "photo.png", 75, 50)
    base = ["--model", kontext, "--prompt", PROMPT, "--steps", 3, "--precision", "fp32", "--device", "cpu"]
    base += ["--reference-size", "keep", "--image", image]
    (ours,) = run(*base, "--lora", f"{lora}{scale}", "--out", tmp_path / "ours.png")
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="loaded")
    pipeline.set_adapters("loaded", 0.5 if scale else 1.0)
    try:
        theirs = of_diffusers(pipeline, 64, 48, image)
    finally:
        pipeline.unload_lora_weights()
    assert_same_picture(ours, theirs)
    (without,) = run(*base, "--out", tmp_path / "without.png")
    assert abs(pixels(ours) - pixels(without)).mean() > 2


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfy"])
def test_an_export_loads_in_diffusers_and_gives_infer_pys_picture(form, kontext, pipeline, tmp_path):  # trap 13
    """All linears of a block but `linear1`, whose size diffusers assumes to be FLUX.1's in these formats; alpha r/2."""
    flux = load_flux(tiny.part(kontext, "transformer"), tiny.CPU, tiny.FP32)
    inside = ["transformer_blocks.*", "single_transformer_blocks.*.proj_out", "single_transformer_blocks.*.norm.linear"]
    names = [name for name in matching_modules(flux.config, inside) if "_k_proj" not in name]  # one part is missing
    for seed, parameter in enumerate(add_lora(flux, names, 4, 2)):
        parameter.data = 0.2 * tiny.random(*parameter.shape, seed=seed)
    file, image = tmp_path / f"{form}.safetensors", picture(tmp_path / "photo.png", 75, 50)
    write_adapter(file, list(updates(flux)), {}, torch.float32, form)
    base = ["--model", kontext, "--prompt", PROMPT, "--steps", 3, "--precision", "fp32", "--device", "cpu"]
    base += ["--reference-size", "keep", "--image", image, "--out"]
    (ours,) = run("--lora", file, *base, tmp_path / "ours.png")
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    try:
        theirs = of_diffusers(pipeline, 64, 48, image)
    finally:
        pipeline.unload_lora_weights()
    assert_same_picture(ours, theirs)
    (without,) = run(*base, tmp_path / "without.png")
    assert abs(pixels(ours) - pixels(without)).mean() > 2


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("form, target", [("diffusers", "ai-toolkit"), ("kohya", "mmdit")])
def test_a_lora_of_train_py_loads_in_diffusers_and_gives_infer_pys_picture(form, target, kontext, pipeline, tmp_path):
    for i in range(2):
        for folder in ("t", "r"):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture(tmp_path / folder / f"{i}.png", 64, 64, seed=i + 5 * (folder == "r"))
        (tmp_path / "t" / f"{i}.txt").write_text(PROMPT)
    data = [
        {"id": "t", "instance_data_dir": str(tmp_path / "t"), "conditioning_data": "r", "resolution": 64},
        {"id": "r", "instance_data_dir": str(tmp_path / "r"), "conditioning_type": "reference_strict"},
    ]
    config = {"pretrained_model_name_or_path": str(kontext), "data_backend_config": data, "mixed_precision": "no"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = [
        "max_train_steps=3",
        "learning_rate=0.05",
        f"flux_lora_target={target}",
        f"lora_format={form}",
        "lora_alpha=5",
        "lora_rank=4",
    ]
    overrides += ["validation_num_inference_steps=1", "num_eval_images=1", f"cache_dir={tmp_path / 'cache'}"]
    train.main([str(tmp_path / "config.json"), f"output_dir={tmp_path / 'out'}", *overrides])
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    image = picture(tmp_path / "reference.png", 80, 64)
    base = of_diffusers(pipeline, 80, 64, image)
    pipeline.load_lora_weights(file)
    try:
        theirs = of_diffusers(pipeline, 80, 64, image)
    finally:
        pipeline.unload_lora_weights()
    ours = run(
        "--model", kontext, "--lora", file, "--image", image, "--prompt", PROMPT, "--steps", 3, "--precision", "fp32",
        "--reference-size", "keep", "--device", "cpu", "--out", tmp_path / "ours.png",
    )[0]  # fmt: skip
    assert_same_picture(ours, theirs)
    assert abs(np.asarray(base, float) - np.asarray(theirs, float)).mean() > 1


@pytest.fixture
def quick(small, tmp_path):
    """The flags of a quick run, ending in --out."""
    return ["--model", small, "--steps", 2, "--device", "cpu", "--out", tmp_path / "out"]


@pytest.mark.parametrize("reference_size", ["auto", "keep", "match", "32x64"])
@pytest.mark.parametrize("with_image", [True, False])
def test_every_flag_is_accepted_with_and_without_a_reference(with_image, reference_size, quick, lora, tmp_path):
    image = ["--image", picture(tmp_path / "photo.png", 75, 50)] if with_image else []
    flags = [
        "--lora",
        f"{lora}:0.5",
        "--negative-prompt",
        "blue",
        "--cfg-scale",
        2,
        "--cfg-range",
        "0-0.5",
        "--guidance",
        3,
    ]
    flags += ["--seed", 5, "--num-images", 1, "--size", "48x32", "--precision", "fp32", "--prompt", PROMPT]
    (made,) = run(*image, *flags, "--reference-size", reference_size, *quick)
    assert Image.open(made).size == (48, 32)


def test_what_does_nothing_without_true_cfg_is_said(quick, tmp_path, capsys):
    flags = ["--size", "48x32", "--prompt", PROMPT, *quick]
    run("--negative-prompt", "blue", *flags)
    assert "do nothing without a --cfg-scale above 1" in capsys.readouterr().out
    run("--negative-prompt", "blue", "--cfg-scale", 2, *flags)
    assert "do nothing" not in capsys.readouterr().out


def test_prompts_may_be_of_any_language(quick, tmp_path):
    prompts = ["하늘을 파랗게", "make it a 한복", "😀", r"C:\udon"]
    made = run(*(word for prompt in prompts for word in ("--prompt", prompt)), "--size", "16x16", *quick)
    assert [json.loads(Image.open(file).info["kontext_min"])["prompt"] for file in made] == [[p] for p in prompts]


def test_a_reference_whose_name_is_no_utf8_is_edited_again_and_again(quick, tmp_path):
    odd = tmp_path / "caf\udce9.png"
    odd.write_bytes(picture(tmp_path / "photo.png", 75, 50).read_bytes())
    (first,) = run("--image", odd, "--prompt", PROMPT, "--size", "48x32", *quick)
    (again,) = run("--again", first, *quick)[1:]
    assert np.array_equal(Image.open(again), Image.open(first))


def test_output_follows_the_references_aspect(quick, tmp_path, capsys):  # trap 15
    (made,) = run("--image", picture(tmp_path / "photo.png", 200, 100), "--prompt", PROMPT, *quick)
    assert Image.open(made).size == (128, 64)
    (made,) = run("--image", picture(tmp_path / "photo.png", 150, 110), "--prompt", PROMPT, *quick)[1:]
    assert Image.open(made).size == (112, 80)
    assert "150x110 -> 112x80, 2.6% cut off" in capsys.readouterr().out


def test_without_reference_the_output_has_the_presets_size(quick):
    (made,) = run("--prompt", PROMPT, *quick)
    assert Image.open(made).size == (96, 96)


def test_size_that_is_no_multiple_of_16_is_floored_aloud(quick, capsys):  # trap 15
    (made,) = run("--prompt", PROMPT, "--size", "50x47", *quick)
    assert Image.open(made).size == (48, 32)
    assert "size 50x47 is made 48x32" in capsys.readouterr().out


def test_several_prompts_and_pictures_are_what_single_runs_make(quick, tmp_path):
    flags = ["--size", "32x32", "--seed", 3]
    made = run("--prompt", PROMPT, "--prompt", OTHER, "--num-images", 2, *flags, *quick)
    assert len(made) == 4
    single = ["--size", "32x32", *quick[:-1], tmp_path / "single.png"]
    for path, (prompt, seed) in zip(made, [(PROMPT, 3), (PROMPT, 4), (OTHER, 3), (OTHER, 4)], strict=True):
        assert (pixels(path) == pixels(*run("--prompt", prompt, "--seed", seed, *single))).all()
    assert len({pixels(path).tobytes() for path in made}) == 4


def test_several_references_all_matter_in_their_order(quick, tmp_path):
    images = [picture(tmp_path / f"{i}.png", 64, 48 + 16 * i, seed=i) for i in range(2)]
    flags = ["--size", "48x48", "--reference-size", "keep", "--prompt", PROMPT, *quick[:-1]]
    orders = [images, images[:1], images[1:], images[::-1]]
    pictures = []
    for i, order in enumerate(orders):
        given = [flag for image in order for flag in ("--image", image)]
        pictures.append(pixels(*run(*given, *flags, tmp_path / f"out{i}.png")))
    assert len({made.tobytes() for made in pictures}) == 4


def test_cfg_range_chooses_the_steps(quick, tmp_path):
    flags = ["--prompt", PROMPT, "--size", "32x32", "--cfg-scale", 4, *quick[:-1]]
    made = {
        span: pixels(*run("--cfg-range", span, *flags, tmp_path / "x.png")) for span in ("0-1", "0-0.5", "0.5-1", "0-0")
    }
    assert len({picture.tobytes() for picture in made.values()}) == 4
    off = run("--prompt", PROMPT, "--size", "32x32", *quick[:-1], tmp_path / "off.png")
    assert (made["0-0"] == pixels(*off)).all()


def test_bf16_is_close_to_fp32(quick, tmp_path):
    flags = ["--prompt", PROMPT, "--size", "32x32", *quick[:-1]]
    fp32, bf16 = (pixels(*run(*flags, tmp_path / "x.png", "--precision", p)) for p in ("fp32", "bf16"))
    assert 0 < abs(fp32 - bf16).mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "I;16", "turned"])
def test_pictures_of_every_kind_are_references(mode, quick, tmp_path):  # trap 15
    original = Image.open(picture(tmp_path / "photo.png", 64, 48))
    path, equal = tmp_path / "kind.png", tmp_path / "equal.png"
    if mode == "turned":
        exif = original.getexif()
        exif[0x0112] = 6  # shown a quarter turn clockwise
        original.save(path, exif=exif)
        original.transpose(Image.Transpose.ROTATE_270).save(equal)
    elif mode == "I;16":
        grey = original.convert("L")
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 256).save(path)
        grey.convert("RGB").save(equal)
    else:
        path = path.with_suffix(".tif")
        original.convert(mode).save(path)
        Image.open(path).convert("RGB").save(equal)
    flags = ["--prompt", PROMPT, "--reference-size", "keep", *quick[:-1]]
    (a,), (b,) = (run("--image", p, *flags, tmp_path / f"{p.stem}-out.png") for p in (path, equal))
    assert Image.open(a).size == ((48, 64) if mode == "turned" else (64, 48))
    assert (pixels(a) == pixels(b)).all()


def test_again_makes_the_same_picture(quick, small, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)
    photo = picture(tmp_path / "photo.png", 64, 48)
    flags = [
        "--image",
        os.path.relpath(photo),
        "--lora",
        f"{os.path.relpath(lora.parent)}:0.5",
        "--cfg-scale",
        2,
        "--reference-size",
        "keep",
        "--seed",
        9,
    ]
    first, second = run(*flags, "--num-images", 2, "--prompt", PROMPT, *quick, "--model", small.name)
    for made in (first, second):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        monkeypatch.chdir(elsewhere)  # paths in the picture do not depend on where one stands
        (again,) = run("--again", made, "--out", tmp_path / "again.png")
        assert (pixels(again) == pixels(made)).all()
    (other,) = run("--again", made, "--seed", 1, "--out", tmp_path / "other.png")
    assert (pixels(other) != pixels(made)).any()


def test_a_reference_is_never_written_over(quick, tmp_path):
    image = picture(tmp_path / "photo.png", 64, 48)
    before = image.read_bytes()
    with pytest.raises(ValueError, match="photo.png would replace a reference"):
        run("--image", image, "--prompt", PROMPT, "--size", "32x32", *quick[:-1], image)
    assert image.read_bytes() == before


def test_again_names_a_file_that_is_gone(quick, tmp_path):
    image = picture(tmp_path / "photo.png", 64, 48)
    (made,) = run("--image", image, "--prompt", PROMPT, "--size", "32x32", *quick)
    image.unlink()
    with pytest.raises(FileNotFoundError, match="photo.png does not exist"):
        run("--again", made, *quick)


def test_again_says_if_a_file_is_not_what_it_was(quick, tmp_path, capsys):
    image = picture(tmp_path / "photo.png", 64, 48)
    (made,) = run("--image", image, "--prompt", PROMPT, "--size", "32x32", *quick)
    run("--again", made, *quick)
    assert "warning" not in capsys.readouterr().out
    Image.open(image).rotate(180).save(image)
    run("--again", made, *quick)
    assert f"warning: {image} is not what it was when {made} was made" in capsys.readouterr().out


def test_a_lora_file_alone_says_everything_else(small, tmp_path):
    image, file = picture(tmp_path / "photo.png", 100, 50), tmp_path / "lora.safetensors"
    flux = load_flux(tiny.part(small, "transformer"), tiny.CPU, tiny.FP32)
    for parameter in add_lora(flux, ["transformer_blocks.0.attn.to_q", "proj_out"], 4, 4):
        parameter.data = 0.2 * tiny.random(*parameter.shape)
    recipe = {"model": str(small), "prompt": [PROMPT], "image": [str(image)], "steps": 2, "guidance": 3.0, "title": "x"}
    write_adapter(file, list(updates(flux)), recipe, torch.float32)
    (alone,) = run("--lora", file, "--out", tmp_path / "alone.png")
    full = ["--model", small, "--prompt", PROMPT, "--image", image, "--steps", 2, "--guidance", 3, "--lora", file]
    (spelled,) = run(*full, "--out", tmp_path / "spelled.png")
    assert (pixels(alone) == pixels(spelled)).all()
    (own,) = run("--lora", file, "--prompt", OTHER, "--out", tmp_path / "own.png")
    assert Image.open(own).size == (96, 96)  # a prompt of one's own is not about the sample picture
    image.unlink()
    with pytest.raises(FileNotFoundError, match="sample picture .*photo.png is not here"):
        run("--lora", file, "--out", tmp_path / "x.png")


def test_the_base_may_be_quantised_the_lora_stays_beside_it_and_another_precision_than_its_own_is_said(
    small, tmp_path, capsys
):
    image, file = picture(tmp_path / "photo.png", 64, 48), tmp_path / "lora.safetensors"
    flux = load_flux(tiny.part(small, "transformer"), tiny.CPU, tiny.FP32)
    for parameter in add_lora(flux, ["transformer_blocks.0.attn.to_q", "proj_out"], 4, 4):
        parameter.data = 0.2 * tiny.random(*parameter.shape)
    write_adapter(file, list(updates(flux)), {"base_model_precision": "int8-quanto"}, torch.float32)
    base = ["--model", small, "--prompt", PROMPT, "--image", image, "--steps", 2, "--device", "cpu"]
    base += ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "out.png", "--precision"]
    (exact,) = (pixels(path) for path in run(*base, "fp32", "--lora", file))
    assert capsys.readouterr().out.count("trained on a base as --precision int8 gives it, not fp32") == 1
    far = {}
    for precision in ("int8", "fp8", "nf4", "int8-dynamic", "fp8-dynamic"):
        (without,) = (pixels(path) for path in run(*base, precision))
        (made,) = run(*base, precision, "--lora", file)
        far[precision] = abs(pixels(made) - exact).mean()
        assert abs(pixels(made) - without).mean() > 2 * far[precision] > 0
        assert ("trained on a base as" in capsys.readouterr().out) == (precision != "int8")
        (again,) = run("--again", made, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "again.png")
        assert (pixels(again) == pixels(made)).all() and capsys.readouterr()
    assert far["int8"] < far["fp8"] < far["nf4"]
    assert len(list((tmp_path / "cache" / "base").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-dynamic"])
def test_a_merged_lora_gives_the_picture_of_a_merged_base(precision, small, lora, quick, tmp_path, capsys):
    merged = Path(shutil.copytree(small, tmp_path / "merged"))
    updates = [at_strength(update, 0.5) for update in read_adapter(lora).updates]
    shutil.rmtree(merged / "transformer")
    merge_into(small, updates, merged / "transformer", torch.float32)
    flags = ["--prompt", PROMPT, "--image", picture(tmp_path / "photo.png", 64, 48), "--precision", precision]
    flags += ["--steps", 2, "--device", "cpu", "--cache-dir", tmp_path / "cache", "--out"]
    (theirs,) = run("--model", merged, *flags, tmp_path / "theirs.png")
    (ours,) = run("--model", small, "--lora", f"{lora}:0.5", "--merge", *flags, tmp_path / "ours.png")
    assert (pixels(ours) == pixels(theirs)).all()
    (beside,) = run("--model", small, "--lora", f"{lora}:0.5", *flags, tmp_path / "beside.png")
    assert abs(pixels(ours) - pixels(beside)).max() <= (2 if precision == "fp32" else 40)
    (again,) = run("--again", ours, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "again.png")
    assert (pixels(again) == pixels(ours)).all()


def test_t5_may_be_quantised(quick):
    exact, int8, nf4 = (
        pixels(run(*quick, "--size", "32x32", "--prompt", PROMPT, "--text-encoder-2-precision", precision)[-1])
        for precision in ("no_change", "int8", "nf4")
    )
    assert 0 < abs(int8 - exact).mean() < abs(nf4 - exact).mean() < 40


def test_out_is_a_png_or_a_folder_whose_pictures_are_kept(quick, tmp_path):
    flags = ["--prompt", PROMPT, "--size", "16x16", *quick]
    assert [path.name for path in run(*flags)] == ["0001.png"]
    assert [path.name for path in run(*flags, "--num-images", "2")] == ["0001.png", "0002.png", "0003.png"]
    run(*flags[:-1], tmp_path / "new" / "named.png", "--num-images", "2")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["named-1.png", "named-2.png"]
    with pytest.raises(ValueError, match="written as .png"):
        run(*flags[:-1], tmp_path / "x.jpg")


# ------------------------------------------------------------------------------------------------ refused

ABSENT_DEVICE = "mps" if not torch.backends.mps.is_available() else "cuda"
REFUSED = {
    "no prompt": ([], "--prompt"),
    "absent image": (["--prompt", "x", "--image", "gone.png"], "gone.png does not exist"),
    "absent lora": (["--prompt", "x", "--lora", "gone.safetensors"], "gone.safetensors does not exist"),
    "bad size": (["--prompt", "x", "--size", "64"], "WIDTHxHEIGHT.*'64'"),
    "bad reference size": (["--prompt", "x", "--reference-size", "big", "--image", "photo.png"], "WIDTHxHEIGHT.*'big'"),
    "bad reference size without a reference": (["--prompt", "x", "--reference-size", "big"], "WIDTHxHEIGHT.*'big'"),
    "bad range": (["--prompt", "x", "--cfg-range", "0.5"], "cfg-range"),
    "backward range": (["--prompt", "x", "--cfg-range", "0.5-0.2"], "cfg-range"),
    "absent device": (["--prompt", "x", "--device", ABSENT_DEVICE], f"--device {ABSENT_DEVICE}"),
    "no steps": (["--prompt", "x", "--steps", "0"], "--steps"),
    "no model": (["--prompt", "x", "--model", "./gone"], "neither a folder nor a hub id"),
    "text as image": (["--prompt", "x", "--image", "text.png"], "text.png is not a readable picture"),
    "again of another program": (["--again", "photo.png"], "photo.png is not a PNG made by infer.py"),
    "again of nothing": (["--again", "gone.png"], "gone.png is not a PNG made by infer.py: it is missing"),
    "again of text": (["--again", "text.png"], "text.png is not a PNG made by infer.py"),
    "again with odd steps": (["--again", "odd.png"], "odd.png: its header asks to be shown with steps 'x'"),
    "again of a list": (["--again", "list.png"], "list.png is not a PNG made by infer.py"),
    "a large size": (["--prompt", "x", "--size", "16x20000"], "below 10000; got '16x20000'"),
    "a prompt that is no UTF-8": (["--prompt", "caf\udce9"], "a prompt is not UTF-8 text"),
    "seeds that end too late": (["--prompt", "x", "--seed", str(2**63 - 1), "--num-images", "2"], "--seed from 0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_in_one_sentence(case, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(Path("photo.png"), 32, 32)
    Path("text.png").write_text("not a picture")
    for name, kept in (("odd.png", {"prompt": ["x"], "steps": "x"}), ("list.png", [1])):
        info = PngInfo()
        info.add_itxt("kontext_min", json.dumps(kept))
        Image.new("RGB", (32, 32)).save(name, pnginfo=info)
    flags, sentence = REFUSED[case]
    model = [] if "--model" in flags else ["--model", str(small)]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as refusal:
        infer.main([*model, "--steps", "1", *flags, "--out", "out"])
    assert "\n" not in str(refusal.value)
    assert not Path("out").exists()


def test_a_gpu_that_is_too_small_is_told_what_takes_less(small, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.50 GiB.")

    monkeypatch.setattr("kontext_min.edit.open_editor", full)
    monkeypatch.setattr(
        "sys.argv", ["infer.py", "--model", str(small), "--prompt", "x", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match="^infer.py: the GPU's memory is too small: try --precision int8 or nf4"):
        runpy.run_path(infer.__file__, run_name="__main__")
    monkeypatch.setattr("kontext_min.data.examples.Examples.encode", full)
    nano = str(Path(train.__file__).parent / "configs" / "nano.json")
    folders = [f"{key}={tmp_path / key}" for key in ("output_dir", "cache_dir")]
    monkeypatch.setattr("sys.argv", ["train.py", nano, *folders])
    with pytest.raises(SystemExit, match="^train.py: the GPU's memory is too small: text_encoder_2_precision=nf4"):
        runpy.run_path(train.__file__, run_name="__main__")


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path):
    program = [sys.executable, infer.__file__, "--prompt", "x", "--image", "gone.png"]
    result = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "infer.py: gone.png does not exist or is not a file\n"
