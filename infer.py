"""Edit pictures from the command line: python infer.py --model nano --image photo.jpg --prompt "make it grayscale".

Every setting comes from the command line, else from --again's picture, else from the LoRA file, else from DEFAULTS.
"""

import argparse
import json
import math
from pathlib import Path
from zlib import crc32

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from kontext_min import presets
from kontext_min.adapters.read import AdapterFile, read_adapter, split_lora
from kontext_min.data.buckets import Size, open_image, parse_size, share_cut
from kontext_min.edit import TOKEN, Editor, edit, open_editor, output_size, prepare_reference
from kontext_min.memory import attention_kernels
from kontext_min.parallel import errors_in_one_line
from kontext_min.quantize import form_of, refuse_on
from kontext_min.sampler import Sampling

PRECISIONS = ("auto", "fp32", "bf16", "int8", "nf4", "fp8", "int8-dynamic", "fp8-dynamic")
CHUNK = "kontext_min"  # the PNG text chunk that holds a picture's settings as JSON
OPTIONS = {  # setting -> default, help, and what else argparse should know
    "model": ("nano", "model folder, hub id, or 'nano', the tiny model in this repository", {}),
    "lora": ([], "LoRA file with its strength (1); repeatable", {"metavar": "FILE[:SCALE]"}),
    "merge": (False, "add the LoRAs to the weights, before these are quantised: faster", {}),
    "image": ([], "reference picture; repeatable; none is text-to-image", {"metavar": "PATH"}),
    "prompt": ([], "the instruction; repeatable", {"metavar": "TEXT"}),
    "negative_prompt": ("", "what true CFG leads away from", {"metavar": "TEXT"}),
    "cfg_scale": (1.0, "true CFG, twice the time; 1 is off", {}),
    "cfg_range": ("0-1", "share of the steps with true CFG, from 0 to 1: 0-0.5 is the first half", {"metavar": "A-B"}),
    "guidance": (2.5, "the distilled guidance", {}),
    "steps": (28, "sampling steps", {}),
    "seed": (0, "of the first picture; the next ones count up", {}),
    "num_images": (1, "pictures per prompt", {}),
    "size": ("auto", "of the output, WxH; auto: as the first reference", {"metavar": "SIZE"}),
    "reference_size": ("auto", "auto: nearest preferred size; keep: its own; match: --size; WxH", {"metavar": "SIZE"}),
    "precision": ("auto", "auto: bf16 on a GPU, else fp32; others: of the base's weights", {"choices": PRECISIONS}),
    "text_encoder_2_precision": ("no_change", "of T5", {"choices": ["no_change", "int8", "nf4"]}),
    "device": ("auto", "auto: the best there is", {"choices": ["auto", "cpu", "cuda", "mps"]}),
}
DEFAULTS = {name: default for name, (default, _, _) in OPTIONS.items()}
OF_THE_SAMPLE = ("image", "size", "reference_size", "seed")  # of what a LoRA file says
SMALLER = "try --precision int8 or nf4, --text-encoder-2-precision nf4, a smaller --size"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    for name, (default, text, more) in OPTIONS.items():
        kind = {list: {"action": "append"}, bool: {"action": "store_true"}}.get(type(default), {"type": type(default)})
        said = "" if default in ([], "", False) else f" (default {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text + said, **kind, **more)
    parser.add_argument("--out", metavar="FILE|DIR", help="a .png, or a folder (default output/infer)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where a quantised base is kept (default cache)")
    parser.add_argument("--again", metavar="PNG", help="make a picture of this program again, with its settings")
    return parser.parse_args(argv)


def recall(path: Path) -> dict:  # the settings of a picture of this program
    try:
        kept = json.loads(Image.open(path).info[CHUNK])
        files, settings = dict(kept.pop("checksums", {})), known(kept, f"{path}: its header")
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a PNG made by infer.py: it is missing or carries no settings") from error
    for file, before in files.items():
        if Path(file).is_file() and crc32(Path(file).read_bytes()) != before:
            print(f"warning: {file} is not what it was when {path} was made; this will be another picture")
    return settings


def valid(key: str, value) -> bool:
    default, _, more = OPTIONS[key]
    if isinstance(default, list):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    kinds = (float, int) if isinstance(default, float) else type(default)
    return isinstance(value, kinds) and value in more.get("choices", [value])


def known(given: dict, where: str) -> dict:  # the settings that a file asks for; ValueError if one cannot be so
    settings = {key: value for key, value in given.items() if key in DEFAULTS}
    if odd := [f"{key} {value!r}" for key, value in settings.items() if not valid(key, value)]:
        raise ValueError(f"{where} asks to be shown with {', '.join(odd)}, which is no such setting")
    return settings


def sample_of(lora: AdapterFile, given: dict) -> dict:
    """What a LoRA file says of how to show it; its sample picture and sizes count only where nothing else is asked."""
    recipe = known(lora.recipe, f"{lora.path}: its header")
    if "image" in given or "prompt" in given:
        return {key: value for key, value in recipe.items() if key not in OF_THE_SAMPLE}
    images = []
    for name in map(Path, recipe.get("image", [])):
        beside = lora.path.parent / name.name  # where the folder was moved to
        images.append(str(beside if beside.is_file() else name))
        if not Path(images[-1]).is_file():
            raise FileNotFoundError(f"{lora.path}: its sample picture {name} is not here; give yours with --image")
    return {**recipe, "image": images}


def gather(given: argparse.Namespace) -> dict:
    """All settings, from the most to the least particular source, with `adapters`: (LoRA, strength) of each."""
    given = vars(given).copy()
    again = recall(Path(given.pop("again"))) if "again" in given else {}
    named = map(split_lora, given.get("lora", again.get("lora", [])))
    adapters = [(read_adapter(file), strength) for file, strength in named]
    recipe = {} if again else {key: value for lora, _ in adapters for key, value in sample_of(lora, given).items()}
    settings = {**DEFAULTS, **recipe, **again, **given, "adapters": adapters}
    if not settings["prompt"]:
        raise ValueError('nothing to do: give an instruction with --prompt "…"')
    if any("\ud7ff" < c < "\ue000" for c in "".join((*settings["prompt"], settings["negative_prompt"]))):  # halves
        raise ValueError("a prompt is not UTF-8 text; write it again, or set the terminal to UTF-8")
    steps, seed, count = (settings[key] for key in ("steps", "seed", "num_images"))
    if min(steps, count) < 1 or not 0 <= seed <= 2**63 - count:
        raise ValueError("--steps and --num-images must be at least 1, --seed from 0 to 2^63 - 1")
    if not all(map(math.isfinite, (settings["guidance"], settings["cfg_scale"], *(scale for _, scale in adapters)))):
        raise ValueError("--guidance, --cfg-scale and the strengths of LoRAs must be finite numbers")
    for text, words in ((settings["size"], ["auto"]), (settings["reference_size"], ["auto", "keep", "match"])):
        text in words or parse_size(text)  # what is wrong with it is said now, not after the model is loaded
    return settings


def other_base(lora: AdapterFile, precision: str) -> str:
    trained = form_of(str(lora.recipe.get("base_model_precision", precision)))
    said = f"\nwarning: it was trained on a base as --precision {trained or 'auto'} gives it, not {precision}"
    return "" if trained == form_of(precision) else said


def parse_range(text: str) -> tuple[float, float]:  # '0-0.5' -> (0.0, 0.5)
    try:
        first, last = map(float, text.split("-"))
    except ValueError:
        first, last = 1.0, 0.0
    if not 0 <= first <= last <= 1:
        raise ValueError(f"--cfg-range is a share of the steps such as 0-0.5, both from 0 to 1; got {text!r}")
    return first, last


def choose_device(name: str) -> torch.device:
    """'auto' -> the best there is. Raises ValueError when the asked one is missing."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind, there in usable.items() if there) if name == "auto" else name
    if not usable[name]:
        raise ValueError(f"--device {name}: this machine or this build of torch has none; use --device cpu")
    return torch.device(name)


def prepare(settings: dict, images: list[Image.Image], editor: Editor) -> tuple[list[Image.Image], Size]:
    """The references as the model will see them, and the output's size; says what is cut off or rounded."""
    rule = settings["reference_size"]
    size = output_size([Size(*i.size) for i in images], settings["size"], rule, editor.preset)
    if settings["size"] not in ("auto", str(size)):
        print(f"size {settings['size']} is made {size}: sides are multiples of {TOKEN}")
    if not images:
        print(f"no --image: text-to-image, {size}")
    prepared = [prepare_reference(image, size, rule, editor.preset) for image in images]
    for path, before, after in zip(settings["image"], images, prepared, strict=True):
        cut = 0.0 if rule == "keep" else share_cut(Size(*before.size), Size(*after.size))
        print(f"reference {path}: {Size(*before.size)} -> {Size(*after.size)}, {cut:.1%} cut off")
    return prepared, size


def paths_for(out: Path, count: int) -> list[Path]:
    """Where the pictures go: the named .png (numbered if several), or the next free numbers of a folder."""
    taken = next((parent for parent in (out, *out.parents) if parent.exists()), out)
    if not taken.is_dir() and not (taken == out and out.suffix.lower() == ".png"):
        raise ValueError(f"--out {out}: {taken} is a file; name a .png or a folder")
    if out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out}: pictures are written as .png, which keeps how they were made")
        return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]
    used = [int(path.stem) for path in out.glob("*.png") if path.stem.isdecimal()]
    return [out / f"{max(used, default=0) + i + 1:04d}.png" for i in range(count)]


def save(image: Image.Image, path: Path, settings: dict):
    """A PNG that keeps in a chunk all that `--again` needs to make it again."""
    kept = {key: settings[key] for key in DEFAULTS} | {"num_images": 1}
    kept["image"] = [str(Path(path).resolve()) for path in settings["image"]]
    loras = [(str(lora.path.resolve()), strength) for lora, strength in settings["adapters"]]
    kept["lora"] = [f"{file}:{strength!r}" for file, strength in loras]
    files = [*kept["image"], *(file for file, _ in loras)]
    kept["checksums"] = {file: crc32(Path(file).read_bytes()) for file in files}
    if presets.locate(kept["model"]) == kept["model"] and Path(kept["model"]).is_dir():
        kept["model"] = str(Path(kept["model"]).resolve())
    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(kept, ensure_ascii=False).encode(errors="backslashreplace").decode())
    image.save(path, pnginfo=info)
    print(path)


def main(argv: list[str] | None = None):
    given = parse_arguments(argv)
    out, cache = (Path(vars(given).pop(key, usual)) for key, usual in (("out", "output/infer"), ("cache_dir", "cache")))
    settings = gather(given)
    images = [open_image(Path(path)) for path in settings["image"]]  # unreadable ones are said before models are loaded
    device = choose_device(settings["device"])
    plain = "fp32" if device.type == "cpu" else "bf16"
    if settings["precision"] == "auto":  # kept as it is chosen here, for another machine
        settings["precision"] = plain
    refuse_on(device, settings["precision"])
    span = parse_range(settings["cfg_range"])
    paths = paths_for(out, len(settings["prompt"]) * settings["num_images"])
    if {path.resolve() for path in paths} & {Path(image).resolve() for image in settings["image"]}:
        raise ValueError(f"--out {out} would replace a reference; give another name")
    texts = [*settings["prompt"]] + ([settings["negative_prompt"]] if settings["cfg_scale"] != 1 else [])
    if settings["cfg_scale"] == 1 and (settings["negative_prompt"], settings["cfg_range"]) != ("", "0-1"):
        print("warning: --negative-prompt and --cfg-range do nothing without a --cfg-scale above 1")
    for lora, strength in settings["adapters"]:
        print(f"LoRA {lora.path}: {lora.title} at strength {strength:g}{other_base(lora, settings['precision'])}")
    dtype = DTYPES.get(settings["precision"], DTYPES[plain])
    base, merge = (settings["precision"], cache / "base", settings["text_encoder_2_precision"]), settings["merge"]
    editor, encoded = open_editor(settings["model"], settings["adapters"], texts, device, dtype, base, merge)
    paths[0].parent.mkdir(parents=True, exist_ok=True)  # what is wrong with it is said before there are pictures
    references, size = prepare(settings, images, editor)
    negative = encoded.get(settings["negative_prompt"]) if settings["cfg_scale"] != 1 else None
    for prompt in settings["prompt"]:
        for seed in range(settings["seed"], settings["seed"] + settings["num_images"]):
            sampling = Sampling(settings["steps"], settings["guidance"], settings["cfg_scale"], span, seed)
            bar = tqdm(total=sampling.steps, desc=prompt[:40], unit="step", leave=False)
            with bar, attention_kernels(device):
                image = edit(editor, encoded[prompt], references, size, sampling, negative, lambda _: bar.update())  # noqa: B023
            save(image, paths.pop(0), {**settings, "prompt": [prompt], "seed": seed})


if __name__ == "__main__":
    with errors_in_one_line("infer.py", SMALLER):
        main()
