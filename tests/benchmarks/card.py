"""What training and edits take on this card, beside what was predicted: python tests/benchmarks/card.py [--help].

The model has the published sizes and random weights: nothing that is measured here depends on them. It is written once
(25 GB in FOLDER, with a T5 of one layer, and 11 to 15 for each form of quantised weights), and then train.py and what
infer.py calls run on it, each row in a process of its own. The peer, diffusers + peft, sees the same tokens.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import arms
import torch
from PIL import Image

from kontext_min.adapters.read import read_adapter
from kontext_min.checkpoints.save import save_model, write_json
from kontext_min.data.buckets import Size
from kontext_min.edit import edit, open_editor
from kontext_min.memory import attention_kernels, in_use
from kontext_min.models.clip import CLIPConfig, CLIPText
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.t5 import T5Config, T5Encoder
from kontext_min.models.vae import VAE, VAEConfig
from kontext_min.presets import WEIGHTS
from kontext_min.run_folder import RunFolder, read_lines
from kontext_min.sampler import Sampling

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
STEPS = 12  # of training; the first ones warm up
PROMPT = "make it night"


def write_model(folder: Path, tiny: bool):
    """A model folder in diffusers' layout; tiny: with a transformer of six blocks and 256 channels."""
    sizes = arms.sized(2, 2, 4, 4096) if tiny else FluxConfig()
    roomy = DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] > 30e9  # all networks at once are 25
    with DEVICE if roomy else torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        networks = {"flux": Flux(sizes), "vae": VAE(VAEConfig()), "clip": CLIPText(CLIPConfig())}
        networks["t5"] = T5Encoder(T5Config(num_layers=1))
        torch.set_default_dtype(torch.float32)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(WEIGHTS / "nano" / name, folder / name, dirs_exist_ok=True)
        (folder / name / "tokenizer_config.json").unlink()  # nano's texts are short
    save_model(folder, **networks)


def write_pair(folder: Path, side: int) -> list[dict]:
    """Two noisy pictures, as train.py's data list."""
    for part in ("target", "reference"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((side, side), 64).convert("RGB").save(folder / part / "a.png")
    (folder / "target" / "a.txt").write_text(PROMPT)
    target, reference = ({"id": part, "instance_data_dir": str(folder / part)} for part in ("target", "reference"))
    target |= {"conditioning_data": ["reference"], "resolution": side, "resolution_type": "pixel"}
    return [target, reference | {"conditioning_type": "reference_strict"}]


def training(folder: Path, side: int, precision: str, memory: str, compiled: bool) -> str:
    """A short run of train.py, and what its own record says of it."""
    out = folder / "run"
    base = "no_change" if precision == "bf16" else precision
    write_json(folder / "config.json", {
        "pretrained_model_name_or_path": str(folder / "model"), "base_model_precision": base, "output_dir": str(out),
        "data_backend_config": write_pair(folder / "pair", side), "cache_dir": str(folder / "cache"),
        "memory": memory if memory == "auto" else float(memory), "flux_lora_target": "all+ffs",
        "mixed_precision": "bf16" if DTYPE == torch.bfloat16 else "no", "torch_compile": compiled,
        "max_train_steps": STEPS, "validation_disable": True, "eval_loss_disable": True, "aspect_bucket_alignment": 16,
    })  # fmt: skip
    subprocess.run([sys.executable, ROOT / "train.py", folder / "config.json"], check=True, cwd=ROOT)
    lines = read_lines(RunFolder(out).metrics)
    seconds = statistics.median(line["seconds"] for line in lines[STEPS // 2 :])
    return f"{1 / seconds:.3f} it/s, {seconds:.3f} s a step, peak {max(line['memory'] for line in lines):.2f} GB"


def editing(folder: Path, side: int, precision: str, steps: int) -> str:
    """The second of two edits with the LoRA in the weights, as infer.py --merge makes them."""
    loras = [(read_adapter(folder / "run" / "pytorch_lora_weights.safetensors"), 1.0)]
    base = (precision, folder / "cache" / "base", "no_change")
    editor, texts = open_editor(str(folder / "model"), loras, [PROMPT], DEVICE, DTYPE, base, merge=True)
    picture = Image.effect_noise((side, side), 64).convert("RGB")
    with attention_kernels(DEVICE):
        for seed in range(2):
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            edit(editor, texts[PROMPT], [picture], Size(side, side), Sampling(steps=steps, guidance=2.5, seed=seed))
    return f"{time.perf_counter() - begun:.2f} s for {steps} steps, peak {in_use(DEVICE)['memory']:.2f} GB"


def peer(side: int, compiled: bool, tiny: bool) -> str:
    """Training steps of diffusers + peft with their gradient checkpointing on the same tokens."""
    shape = arms.Shape(arms.sized(2, 2, 4, 4096) if tiny else FluxConfig(), 512, (side // 16, side // 16))
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = arms.arm("peer", shape.config)
    torch.set_default_dtype(torch.float32)
    given = {name: value.to(DEVICE) for name, value in arms.inputs(shape, DTYPE).items()}
    if compiled:
        model.compile_repeated_blocks()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        loss = arms.loss(model, given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times[STEPS // 2 :])
    return f"{1 / seconds:.3f} it/s, {seconds:.3f} s a step, peak {in_use(DEVICE)['memory']:.2f} GB"


def rows(given: argparse.Namespace) -> dict[str, Callable[[], str]]:
    """What is measured, by name, in order: edits take the LoRA that training has left."""
    found = {}
    for side, precision, memory in product(given.sides, given.precisions, given.memories):
        found[f"train {side} px {precision} memory {memory}"] = lambda s=side, p=precision, m=memory: training(
            given.folder, s, p, m, given.compile
        )
        inference = "no_change" if precision == "bf16" else precision
        found[f"edit {side} px {precision}"] = lambda s=side, p=inference: editing(given.folder, s, p, given.edit_steps)
    for side in given.sides if given.peer else ():
        for how in ("eager", "compiled") if given.compile else ("eager",):
            found[f"peer {side} px {how}"] = lambda s=side, h=how: peer(s, h == "compiled", given.tiny)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("output/card"), help="where model and caches lie")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024], help="of target and reference, in pixels")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8-torchao", "nf4", "fp8-dynamic"])
    parser.add_argument("--memories", nargs="+", default=["auto"], help="GB, as the config's key")
    parser.add_argument("--edit-steps", type=int, default=28)
    parser.add_argument("--compile", action="store_true", help="torch_compile, and the peer's too")
    parser.add_argument("--peer", action="store_true", help="diffusers + peft as well (they must be installed)")
    parser.add_argument("--tiny", action="store_true", help="a small transformer, to try this script on any machine")
    parser.add_argument("--row", help="only this one, in this process")
    given = parser.parse_args()
    given.folder = given.folder.absolute()
    if given.row == "model":
        return write_model(given.folder / "model", given.tiny)
    if given.row:
        return print(f"\n{json.dumps({given.row: rows(given)[given.row]()})}")
    if not (given.folder / "model").exists():
        subprocess.run([sys.executable, *sys.argv, "--row", "model"], check=True)  # a process gives its memory back
    print(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "on the CPU, in fp32")
    for name in rows(given):
        answer = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True)
        said = answer.stdout.strip().splitlines() or [""]
        result = json.loads(said[-1])[name] if answer.returncode == 0 else f"failed: {answer.stderr.strip()[-600:]}"
        print(f"{name}: {result}", flush=True)
        for line in said:
            if "GB  in all" in line or line.startswith("measured"):
                print(f"    {line.strip()}", flush=True)


if __name__ == "__main__":
    main()
