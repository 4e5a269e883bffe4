"""docs/study.md: every block runs, and makes the pictures that stand below it.

STUDY_PICTURES=1 copies them into docs/, with the LoRA of `train.py configs/nano.json`; else a random one stands in.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CPU, FP32, add_lora, random

from kontext_min.adapters.inject import updates
from kontext_min.adapters.write import write_adapter
from kontext_min.checkpoints.load import find, load_flux
from kontext_min.study.__main__ import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```\n\n((?:!\[[^\n]*\n)+)", TEXT, flags=re.DOTALL)
LORA = "output/nano/pytorch_lora_weights.safetensors"
REMAKE = bool(os.environ.get("STUDY_PICTURES"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like the repository, with a LoRA in it."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("configs", "docs", "weights"):
        (folder / name).symlink_to(ROOT / name)
    (folder / LORA).parent.mkdir(parents=True)
    if REMAKE:
        shutil.copy(ROOT / LORA, folder / LORA)
        return folder
    flux = load_flux(find(ROOT / "weights" / "nano"), CPU, FP32)
    for seed, parameter in enumerate(add_lora(flux, ["transformer_blocks.0.attn.to_q"], rank=2, alpha=2)):
        parameter.data = 0.1 * random(*parameter.shape, seed=seed)
    write_adapter(folder / LORA, list(updates(flux)), {}, torch.float32)
    return folder


def test_there_are_eight_things_each_with_a_picture():
    assert len(BLOCKS) == 8 == TEXT.count("```") // 2
    files = [path for path in (ROOT / "docs" / "study").rglob("*") if path.is_file()]
    named = re.findall(r"!\[.+?\]\((study/.+?)\)", TEXT)
    assert sorted(named) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in files)
    assert sum(path.stat().st_size for path in files) <= 400_000


@pytest.mark.parametrize("number", range(8))
def test_the_block_makes_its_pictures(number, place, monkeypatch):
    kind, code, links = BLOCKS[number]
    monkeypatch.chdir(place)
    if kind == "python":
        assert len(code.strip().splitlines()) <= 16
        exec(compile(code, f"docs/study.md, block {number + 1}", "exec"), {})
    else:
        command = shlex.split(code)
        assert command[:3] == ["python", "-m", "kontext_min.study"]
        main(command[3:])
    for link in re.findall(r"\((.+?)\)", links):
        made, shown = place / (f"output/{link}" if kind == "sh" else Path(link).name), ROOT / "docs" / link
        if REMAKE:
            shown.parent.mkdir(exist_ok=True)
            Image.open(made).quantize(256, kmeans=10, dither=Image.Dither.NONE).save(shown, optimize=True)
        assert min(Image.open(made).size) > 50
