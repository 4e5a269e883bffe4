"""A run's folder -> report.html in it: one page without network, made of files alone. python -m kontext_min.report RUN

Whatever a run has not written (it is early, or old) is missing from the page, which says so.
"""

import base64
import html
import io
import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from PIL import Image

from kontext_min.run_folder import RunFolder, read_lines

TEMPLATE = Path(__file__).with_name("report.html")
FINEST = ((1024, 88), (768, 85), (512, 82), (384, 78), (256, 70), (192, 60))  # longest side in pixels, JPEG quality
BYTES = 8_000_000  # of all pictures together, by the mean of a sample
PAIRS, STEPS, POINTS = 24, 12, 600  # shown at most
GRID, UNUSED, FULL = 1.5, 1.01, 0.92  # from where on a finding is told


def write(run: Path) -> Path:
    """Read a run's folder and write its report.html. FileNotFoundError when it holds no run."""
    folder = RunFolder(run)
    if not (folder.metrics.exists() or folder.config.exists()):
        raise FileNotFoundError(f"{run} holds no run: metrics.jsonl and config.json are not there; give an output_dir")
    blob = gather(folder)
    data = json.dumps(blob, ensure_ascii=False, allow_nan=False)
    for character in "<>&":  # nothing in a prompt can end the script that holds it
        data = data.replace(character, f"\\u{ord(character):04x}")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__DATA__")
    folder.report.write_text(head.replace("__TITLE__", html.escape(blob["title"])) + data + tail, encoding="utf-8")
    return folder.report


def gather(folder: RunFolder) -> dict:
    """Everything that the page shows."""
    config, items = read(folder.config, {}), read(folder.items, [])[:PAIRS]
    metrics, psnr, held_out = (read_lines(file) for file in (folder.metrics, folder.psnr, folder.eval))
    files = [folder.pictures(i) for i in range(len(items))]
    steps = sorted({kind for kinds in files for kind in kinds if kind.isdigit()})
    steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(len(steps), STEPS))]
    files = [{kind: file for kind, file in kinds.items() if kind in steps or not kind.isdigit()} for kinds in files]
    uris = embedded([file for kinds in files for file in kinds.values()])
    for i, item in enumerate(items):
        item["pictures"] = {kind: uris[file] for kind, file in files[i].items()}
        item["psnr"] = {f"{line['step']:06d}": line["pairs"][i] for line in psnr if i < len(line["pairs"])}
    absent = {"pictures (validation/items.json)": items, "loss (metrics.jsonl)": metrics, "PSNR": psnr}
    absent |= {"eval loss and reference probe (validation/eval.jsonl)": held_out, "settings (config.json)": config}
    done = f"step {metrics[-1]['step']} of {config.get('max_train_steps', '?')}" if metrics else "no step yet"
    model, kind = config.get("pretrained_model_name_or_path", "?"), "DoRA" if config.get("use_dora") else "LoRA"
    kind = "LoKr" if config.get("lora_type") == "lycoris" else f"{kind} of rank {config.get('lora_rank', '?')}"
    return {
        "title": folder.path.resolve().name,
        "subtitle": f"{done} · {kind} on {config.get('flux_lora_target', 'modules of a preset')} · {model}",
        "numbers": numbers(metrics, psnr),
        "findings": findings(metrics, held_out, files),
        "items": items,
        "steps": steps,
        "curves": curves(metrics, psnr, held_out),
        "missing": [name for name, value in absent.items() if not value],
        "config": config,
    }


def read(file: Path, without):
    """JSON, or what it is without the file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else without


def embedded(files: list[Path]) -> dict[Path, str]:
    """Pictures as data URIs, the finest that keep the page small, judged by a sample."""
    sample = files[:: len(files) // 12 or 1]
    for edge, quality in FINEST:
        if sum(len(uri(file, edge, quality)) for file in sample) * len(files) <= BYTES * len(sample):
            break
    return {file: uri(file, edge, quality) for file in files}


def uri(file: Path, edge: int, quality: int) -> str:
    """A picture as a data URI: small ones as they are, others as JPEG of at most `edge` pixels a side."""
    image, buffer = Image.open(file).convert("RGB"), io.BytesIO()
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    image.save(buffer, kind, quality=quality, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curves(metrics: list[dict], psnr: list[dict], held_out: list[dict]) -> dict:
    """Name -> points, for the page's charts; `times` has the eval loss by time of the first and the last step."""
    probes = [{"step": line["step"], **(line.get("probe") or {})} for line in held_out]
    timed = [(line["step"], line["per_timestep"]) for line in held_out if line.get("per_timestep")]
    made = {"loss": curve(metrics, "loss"), "lr": curve(metrics, "lr"), "eval": curve(held_out, "loss")}
    made |= {"smooth": smooth(made["loss"]), "base": curve(psnr, "base"), "lora": curve(psnr, "lora")}
    made |= {"shuffled": curve(probes, "shuffled"), "none": curve(probes, "none")}
    return {name: thinned(points) for name, points in made.items()} | {"times": timed[:1] + timed[1:][-1:]}


def curve(lines: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of a number, where it is there."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The running mean over about fifty steps."""
    total, weight, made = 0.0, 0.0, []
    for step, value in points:
        total, weight = 0.98 * total + value, 0.98 * weight + 1
        made.append((step, total / weight))
    return made


def thinned(points: list) -> list:
    """At most about POINTS of them, evenly taken, the last one always."""
    return points[:: -(-len(points) // POINTS) or 1] + (points[-1:] if len(points) > POINTS else [])


def numbers(metrics: list[dict], psnr: list[dict]) -> list[tuple[str, str]]:
    """The few figures at the top."""
    found = []
    if metrics:
        seconds = [line["seconds"] for line in metrics]
        found.append(("training, without validation", str(timedelta(seconds=round(sum(seconds))))))
        found.append(("a step", f"{np.median(seconds):.2f} s"))
    if metrics and "memory" in metrics[-1]:
        most = max(line["memory"] for line in metrics)
        found.append(("memory at most", f"{most:.1f} GB of {metrics[-1]['memory_limit']:.1f}"))
    if psnr:
        change = f"{psnr[-1]['base']:.1f} → {psnr[-1]['lora']:.1f} dB"
        found.append(("to the target, without and with the LoRA", change))
    return found


def findings(metrics: list[dict], held_out: list[dict], files: list[dict[str, Path]]) -> list[tuple[str, str]]:
    """What is probably wrong: (what, what was seen and what to do), after the quickstart's troubleshooting table."""
    found = []
    probe = next((line["probe"] for line in reversed(held_out) if line.get("probe")), {})
    if probe.get("own") and probe.get("shuffled") and probe["shuffled"] < UNUSED * probe["own"]:
        text = f"""The eval loss is {probe["own"]:.4g} with the own reference, {probe["shuffled"]:.4g} with another's.
            Make sure that targets and references belong together: the same names, and the right set in
            conditioning_data; train.py CONFIG --check draws every pair."""
        found.append(("The reference is ignored", text))
    excess = []
    for kinds in files:
        lora = [file for kind, file in kinds.items() if kind.isdigit()]
        plain = [grid(kinds[kind]) for kind in ("base", "target") if kind in kinds]
        if lora and plain:
            excess.append(grid(lora[-1]) / max(1.0, *plain))
    if excess and np.median(excess) > GRID:
        text = f"""The LoRA's pictures have {np.median(excess):.1f} times as strong edges at every 8th or 16th pixel.
            Use better pictures, a lower learning_rate, or an optimizer other than Lion."""
        found.append(("Square grid artefacts", text))
    most = max(metrics, key=lambda line: line.get("memory", 0), default={})
    if most.get("memory", 0) > FULL * most.get("memory_limit", 1):
        text = f"""{most["memory"]:.1f} of {most["memory_limit"]:.1f} GB were in use at step {most["step"]}.
            Use gradient_checkpointing, a smaller resolution (of the references first) or train_batch_size."""
        found.append(("Memory is near the limit", text))
    return found


def grid(file: Path) -> float:
    """How much stronger neighbouring pixels differ at every 8th or 16th line than elsewhere; about 1 without a grid.

    The median over lines of the mean squared difference, so that a few strong edges of the scene do not count.
    """
    x = np.asarray(Image.open(file).convert("L"), np.float64)
    ratios = []
    for period in (8, 16):
        on, off = [], []
        for axis in (0, 1):
            energy = (np.diff(x, axis=axis) ** 2).mean(1 - axis)  # of the line between pixels j and j + 1
            at = np.arange(1, len(energy) + 1) % period == 0
            on, off = [*on, *energy[at]], [*off, *energy[~at]]
        ratios.append((np.median(on) + 0.1) / (np.median(off) + 0.1) if on else 1.0)  # 0.1: rounding to bytes
    return float(max(ratios))


def main(argv: list[str]):
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        raise ValueError("usage: python -m kontext_min.report RUN, a run's output_dir")
    print(write(Path(argv[0])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
