"""A run's folder -> report.html in it: one page without network, made of files alone. python -m kontext_min.report RUN

Whatever a run has not written (it is early, or old) is missing from the page, which says so.
"""

import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TEMPLATE = Path(__file__).with_name("report.html")
FINEST = ((1024, 88), (768, 85), (512, 82), (384, 78), (256, 70), (192, 60))  # longest side in pixels, JPEG quality
BYTES = 8_000_000  # of all pictures together, by the mean of a sample
PAIRS, STEPS, POINTS = 24, 12, 600  # shown at most
GRID, UNUSED, FULL = 1.5, 1.01, 0.92  # from where on a finding is told
REMEDIES = {
    "reference": "Make sure that targets and references belong together: the same names, and the right set in "
    "conditioning_data; train.py CONFIG --check draws every pair.",
    "grid": "Use better pictures, a lower learning_rate, or an optimizer other than Lion.",
    "memory": "Use gradient_checkpointing, a smaller resolution (of the references first) or train_batch_size.",
    "loss": "Look at the pairs (train.py CONFIG --check), or change learning_rate: up if the curve is flat, down if it "
    "jumps.",
}


def write(run: Path) -> Path:
    """Read a run's folder and write its report.html. FileNotFoundError when it holds no run."""
    if not any((run / name).exists() for name in ("metrics.jsonl", "config.json")):
        raise FileNotFoundError(f"{run} holds no run: metrics.jsonl and config.json are not there; give an output_dir")
    blob = gather(run)
    data = json.dumps(blob, ensure_ascii=False, allow_nan=False)
    for character in "<>&":  # nothing in a prompt can end the script that holds it
        data = data.replace(character, f"\\u{ord(character):04x}")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__DATA__")
    page = head.replace("__TITLE__", html.escape(blob["title"])) + data + tail
    (run / "report.html").write_text(page, encoding="utf-8")
    return run / "report.html"


def gather(run: Path) -> dict:
    """Everything that the page shows."""
    config, metrics = (read(run / "config.json") or {}), lines(run / "metrics.jsonl")
    psnr, held_out = (lines(run / "validation" / f"{name}.jsonl") for name in ("psnr", "eval"))
    named = list(enumerate(read(run / "validation" / "items.json") or []))[:PAIRS]
    files = {i: files_of(run / "validation", i) for i, _ in named}
    steps = sorted({step for found in files.values() for step in found["lora"]})
    steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(len(steps), STEPS))]
    items = embedded([{**item, "psnr": psnr_of(psnr, i), **files[i]} for i, item in named], steps)
    absent = {"pictures (validation/items.json)": items, "loss (metrics.jsonl)": metrics, "PSNR": psnr}
    absent |= {"eval loss and reference probe (validation/eval.jsonl)": held_out, "settings (config.json)": config}
    done = f"step {metrics[-1]['step']} of {config.get('max_train_steps', '?')}" if metrics else "no step yet"
    model, rank = config.get("pretrained_model_name_or_path", "?"), config.get("lora_rank", "?")
    return {
        "title": run.resolve().name,
        "subtitle": f"{done} · LoRA of rank {rank} on {config.get('flux_lora_target', '?')} · {model}",
        "numbers": numbers(metrics, psnr),
        "findings": findings(metrics, held_out, named, files),
        "items": items,
        "steps": steps,
        "curves": curves(metrics, psnr, held_out),
        "missing": [name for name, value in absent.items() if not value],
        "config": config,
    }


# ------------------------------------------------------------------------------------------------ files


def read(path: Path):
    """JSON, or None where there is no such file."""
    return parse(path.read_text(encoding="utf-8")) if path.exists() else None


def lines(path: Path) -> list[dict]:
    """JSON lines; the last one may be cut off, when the run was killed."""
    texts = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [parse(text) for text in texts[:-1] if text]


def parse(text: str):
    """JSON with None for NaN and infinities, which browsers do not read."""
    return json.loads(text, parse_constant=lambda name: None)


def files_of(folder: Path, i: int) -> dict:
    """The pictures of a validation pair: inputs, base, target (None where absent), and the LoRA's by step."""
    one = {kind: next(iter(folder.glob(f"{kind}/{i:02d}.png")), None) for kind in ("base", "target")}
    lora = {int(path.parent.name): path for path in sorted(folder.glob(f"[0-9]*/{i:02d}.png"))}
    return {"inputs": sorted(folder.glob(f"input/{i:02d}-*.png")), **one, "lora": lora}


def embedded(items: list[dict], steps: list[int]) -> list[dict]:
    """Pictures as data URIs instead of files: the finest that keep the page small. Only these steps' are kept."""
    items = [{**item, "lora": {step: file for step, file in item["lora"].items() if step in steps}} for item in items]
    files = [f for item in items for f in (*item["inputs"], item["base"], item["target"], *item["lora"].values()) if f]
    sample = files[:: len(files) // 12 or 1]
    for edge, quality in FINEST:
        if sum(len(uri(file, edge, quality)) for file in sample) * len(files) <= BYTES * len(sample):
            break
    uris = {file: uri(file, edge, quality) for file in files}
    made = []
    for item in items:
        inputs, lora = [uris[f] for f in item["inputs"]], {step: uris[f] for step, f in item["lora"].items()}
        one = {kind: item[kind] and uris[item[kind]] for kind in ("base", "target")}
        made.append({**item, **one, "inputs": inputs, "input": inputs[0] if inputs else None, "lora": lora})
    return made


def uri(file: Path, edge: int, quality: int) -> str:
    """A picture as a data URI: small ones as they are, others as JPEG of at most `edge` pixels a side."""
    image, buffer = Image.open(file).convert("RGB"), io.BytesIO()
    small = max(image.size) <= 128
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG" if small else "JPEG", quality=quality, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------ numbers


def psnr_of(psnr: list[dict], i: int) -> dict:
    """step -> (base, LoRA) of one pair, in dB."""
    kept = {line["step"]: line["pairs"][i] for line in psnr if i < len(line.get("pairs") or [])}
    return {step: [pair[kind] and round(pair[kind], 1) for kind in ("base", "lora")] for step, pair in kept.items()}


def curve(entries: list[dict], *path: str) -> list[tuple[int, float]]:
    """(step, value) of a number, where it is there; at most about POINTS, evenly taken, the last one always."""
    points = []
    for entry in entries:
        value = entry
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            points.append((entry["step"], value))
    return points[:: -(-len(points) // POINTS) or 1] + (points[-1:] if len(points) > POINTS else [])


def smooth(metrics: list[dict]) -> list[dict]:
    """Lines with the running mean of the loss over about fifty steps."""
    total, weight, made = 0.0, 0.0, []
    for line in metrics:
        total, weight = 0.98 * total + line["loss"], 0.98 * weight + 1
        made.append({"step": line["step"], "loss": total / weight})
    return made


def curves(metrics: list[dict], psnr: list[dict], held_out: list[dict]) -> dict:
    """Name -> points, for the page's charts; `times` has the eval loss by time of the first and the last step."""
    made = {name: curve(metrics, name) for name in ("loss", "grad_norm", "lr", "seconds", "memory")}
    made |= {"smooth": curve(smooth(metrics), "loss"), "eval": curve(held_out, "loss")}
    made |= {name: curve(psnr, name) for name in ("base", "lora")}
    made |= {name: curve(held_out, "probe", name) for name in ("own", "shuffled", "none")}
    timed = [(line["step"], line["per_timestep"]) for line in held_out if line.get("per_timestep")]
    return {**made, "times": timed[:1] + timed[1:][-1:]}


def numbers(metrics: list[dict], psnr: list[dict]) -> list[tuple[str, str]]:
    """The few figures at the top."""
    found = []
    if seconds := [line["seconds"] for line in metrics if "seconds" in line]:
        minutes, rest = divmod(round(sum(seconds)), 60)
        total = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
        found.append(("training, without validation", total))
        found.append(("a step", f"{np.median(seconds):.2f} s"))
    if memory := [line["memory"] for line in metrics if line.get("memory")]:
        limit = metrics[-1].get("memory_limit")
        found.append(("memory at most", f"{max(memory):.1f} GB" + (f" of {limit:.1f}" if limit else "")))
    if psnr and psnr[-1]["base"] and psnr[-1]["lora"]:
        found.append(
            ("to the target, without and with the LoRA", f"{psnr[-1]['base']:.1f} → {psnr[-1]['lora']:.1f} dB")
        )
    return found


# ------------------------------------------------------------------------------------------------ findings


def grid(image: Image.Image) -> float:
    """How much stronger neighbouring pixels differ at every 8th or 16th line than elsewhere; about 1 without a grid.

    The median over lines of the mean squared difference, so that a few strong edges of the scene do not count.
    """
    x = np.asarray(image.convert("L"), np.float64)
    ratios = []
    for period in (8, 16):
        on, off = [], []
        for axis in (0, 1):
            energy = (np.diff(x, axis=axis) ** 2).mean(1 - axis)  # of the line between pixels j and j + 1
            at = np.arange(1, len(energy) + 1) % period == 0
            on, off = [*on, *energy[at]], [*off, *energy[~at]]
        ratios.append((np.median(on) + 0.1) / (np.median(off) + 0.1) if on else 1.0)  # 0.1: rounding to bytes
    return float(max(ratios))


def findings(metrics: list[dict], held_out: list[dict], named: list, files: dict) -> list[tuple[str, str]]:
    """What is probably wrong: (what, what was seen and what to do), after the quickstart's troubleshooting table."""
    found, fifth = [], len(metrics) // 5
    probe = next((line["probe"] for line in reversed(held_out) if line.get("probe")), {})
    if probe.get("own") and probe.get("shuffled") and probe["shuffled"] < UNUSED * probe["own"]:
        seen = (
            f"The eval loss is {probe['own']:.4g} with a pair's own reference, {probe['shuffled']:.4g} with another's."
        )
        found.append(("The reference is ignored", f"{seen} {REMEDIES['reference']}"))
    excess = []
    for i, _ in named:
        lora, plain = files[i]["lora"], [file for file in (files[i]["base"], files[i]["target"]) if file]
        if lora and plain:
            excess.append(grid(Image.open(lora[max(lora)])) / max(1.0, *(grid(Image.open(file)) for file in plain)))
    if excess and np.median(excess) > GRID:
        seen = f"The LoRA's pictures have {np.median(excess):.1f} times as strong edges at every 8th or 16th pixel."
        found.append(("Square grid artefacts", f"{seen} {REMEDIES['grid']}"))
    full = [line for line in metrics if line.get("memory_limit") and line["memory"] > FULL * line["memory_limit"]]
    if full:
        most = max(full, key=lambda line: line["memory"])
        seen = f"{most['memory']:.1f} of {most['memory_limit']:.1f} GB were in use at step {most['step']}."
        found.append(("Memory is near the limit", f"{seen} {REMEDIES['memory']}"))
    held = [line["loss"] for line in held_out if line.get("loss")]
    first, last = (np.mean([line["loss"] for line in part] or [0]) for part in (metrics[:fifth], metrics[-fifth:]))
    if fifth >= 20 and last >= first and (not held or held[-1] >= held[0]):
        seen = f"Its mean was {first:.4g} over the first fifth of the steps and is {last:.4g} over the last."
        found.append(("The loss is not falling", f"{seen} {REMEDIES['loss']}"))
    return found


def main(argv: list[str]):
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        raise ValueError("usage: python -m kontext_min.report RUN, a run's output_dir")
    print(write(Path(argv[0])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
