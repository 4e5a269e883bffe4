"""A run's folder -> report.html in it: one page without network; what a run has not written is named as missing."""

import base64
import html
import io
import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.std import EMA

from kontext_min.run_folder import SMOOTHING, RunFolder, read_lines

TEMPLATE = Path(__file__).with_name("report.html")
PIXELS = 24_000_000  # of all pictures together: with JPEG's quality below about 8 MB of photographs
PAIRS, STEPS, POINTS = 24, 12, 600  # shown at most
GRID, FULL = 1.5, 0.92  # from where on a finding is told


def write(run: Path) -> Path:
    """Read a run's folder and write its report.html. FileNotFoundError when it holds no run."""
    folder = RunFolder(run)
    if not (folder.metrics.exists() or folder.config.exists()):
        raise FileNotFoundError(f"{run} holds no run: metrics.jsonl and config.json are not there; give an output_dir")
    blob = gather(folder)
    safe = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}  # no prompt can end its script
    data = json.dumps(blob, ensure_ascii=False, allow_nan=False).translate(safe)
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
    edge = min(1024, max(192, int((PIXELS / (sum(map(len, files)) or 1)) ** 0.5)))
    for i, item in enumerate(items):
        item["pictures"] = {kind: uri(file, edge) for kind, file in files[i].items()}
        item["psnr"] = {f"{line['step']:06d}": line["pairs"][i] for line in psnr if i < len(line["pairs"])}
    absent = {"pictures (validation/items.json)": items, "loss (metrics.jsonl)": metrics, "PSNR": psnr}
    absent |= {"eval loss and reference probe (validation/eval.jsonl)": held_out, "settings (config.json)": config}
    done = f"step {metrics[-1]['step']} of {config.get('max_train_steps', '?')}" if metrics else "no step yet"
    kind = f"{'DoRA' if config.get('use_dora') else 'LoRA'} of rank {config.get('lora_rank', '?')}"
    kind = "LoKr" if config.get("lora_type") == "lycoris" else kind
    kind += f" on {config.get('flux_lora_target', 'modules of a preset')}"
    what = f"{done} · {'all parameters' if config.get('model_type') == 'full' else kind}"
    return {
        "title": folder.path.resolve().name, "subtitle": f"{what} · {config.get('pretrained_model_name_or_path', '?')}",
        "items": items, "steps": steps, "numbers": numbers(metrics, psnr),
        "findings": findings(metrics, held_out, files), "config": config, "curves": curves(metrics, psnr, held_out),
        "missing": [name for name, value in absent.items() if not value],
    }  # fmt: skip


def read(file: Path, without):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else without


def uri(file: Path, edge: int) -> str:
    """A picture as a data URI: small ones as they are, others as JPEG of at most `edge` pixels a side."""
    image, buffer = Image.open(file).convert("RGB"), io.BytesIO()
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    image.save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curves(metrics: list[dict], psnr: list[dict], held_out: list[dict]) -> dict:
    """Name -> points, for the page's charts; `times` has the eval loss by time of the first and the last step."""
    probes = [{"step": line["step"], **(line.get("probe") or {})} for line in held_out]
    timed = [(line["step"], line["per_timestep"]) for line in held_out if line.get("per_timestep")]
    drawn = {"loss": (metrics, "loss"), "lr": (metrics, "lr"), "eval": (held_out, "loss"), "base": (psnr, "base")}
    drawn |= {"lora": (psnr, "lora"), "shuffled": (probes, "shuffled"), "none": (probes, "none")}
    made = {n: [(at["step"], at[key]) for at in lines if at.get(key) is not None] for n, (lines, key) in drawn.items()}
    mean = EMA(1 - SMOOTHING)
    made["smooth"] = [(step, mean(loss)) for step, loss in made["loss"]]
    for name, points in made.items():  # at most about POINTS of them, evenly taken, the last one always
        made[name] = points[:: -(-len(points) // POINTS) or 1] + (points[-1:] if len(points) > POINTS else [])
    return made | {"times": timed[:1] + timed[1:][-1:]}


def numbers(metrics: list[dict], psnr: list[dict]) -> list[tuple[str, str]]:
    found, seconds = {}, [line["seconds"] for line in metrics]
    if metrics:
        found["training, without validation"] = str(timedelta(seconds=round(sum(seconds))))
        found["a step"] = f"{np.median(seconds):.2f} s"
    if metrics and "memory" in metrics[-1]:
        most = max(line["memory"] for line in metrics)
        found["memory at most"] = f"{most:.1f} GB of {metrics[-1]['memory_limit']:.1f}"
    if psnr:
        found["to the target, without and with the LoRA"] = f"{psnr[-1]['base']:.1f} → {psnr[-1]['lora']:.1f} dB"
    return list(found.items())


def findings(metrics: list[dict], held_out: list[dict], files: list[dict[str, Path]]) -> list[tuple[str, str]]:
    """What is probably wrong: (what, what was seen and what to do), after the quickstart's troubleshooting table."""
    found = {}
    if held_out and "warning" in held_out[-1]:
        found["The reference is ignored"] = held_out[-1]["warning"]
    loras = [[file for kind, file in kinds.items() if kind.isdigit()] for kinds in files]
    plain = [[file for kind, file in kinds.items() if kind in ("base", "target")] for kinds in files]
    excess = [grid(a[-1]) / max(1.0, *map(grid, b)) for a, b in zip(loras, plain, strict=True) if a and b]
    if excess and np.median(excess) > GRID:
        found["Square grid artefacts"] = f"""
            The LoRA's pictures have {np.median(excess):.1f} times as strong edges at every 8th or 16th pixel.
            Use better pictures, a lower learning_rate, or an optimizer other than Lion."""
    most = max(metrics, key=lambda line: line.get("memory", 0), default={})
    if most.get("memory", 0) > FULL * most.get("memory_limit", 1):
        found["Memory is near the limit"] = f"""
            {most["memory"]:.1f} of {most["memory_limit"]:.1f} GB were in use at step {most["step"]}. Use
            gradient_checkpointing, a smaller resolution (of the references first) or train_batch_size."""
    return list(found.items())


def grid(file: Path) -> float:
    """How much stronger neighbouring pixels differ at every 8th or 16th line than elsewhere; about 1 without a grid."""
    x, ratios = np.asarray(Image.open(file).convert("L"), np.float64), []
    energies = [(np.diff(x, axis=axis) ** 2).mean(1 - axis) for axis in (0, 1)]  # of the lines between pixels
    for period in (8, 16):
        on = np.concatenate([energy[period - 1 :: period] for energy in energies])
        off = np.concatenate([np.delete(energy, np.s_[period - 1 :: period]) for energy in energies])
        # medians: a few strong edges of the scene do not count; 0.1: rounding to bytes
        ratios.append((np.median(on) + 0.1) / (np.median(off) + 0.1) if on.size else 1.0)
    return float(max(ratios))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m kontext_min.report RUN, a run's output_dir")
    try:
        print(write(Path(sys.argv[1])))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
