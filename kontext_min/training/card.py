"""The LoRA's model card: README.md in the run's folder, as the hub shows it. It says only what the run knows."""

import json
import shlex
from functools import partial
from pathlib import Path

from kontext_min import presets
from kontext_min.config import Config
from kontext_min.data.examples import Examples
from kontext_min.run_folder import LORA, RunFolder

LICENCES = {  # name of a published model -> what the hub asks for
    "nano": "license: apache-2.0",
    "FLUX.1-Kontext-dev": """\
base_model: black-forest-labs/FLUX.1-Kontext-dev
base_model_relation: adapter
license: other
license_name: flux-1-dev-non-commercial-license
license_link: https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev/blob/main/LICENSE.md""",
}
NO_DIFFUSERS = "For diffusers: `python -m kontext_min.adapters convert {lora} OUT --to diffusers --rank 64`"
CARD, DIFFUSERS = (Path(__file__).with_name(name).read_text("utf-8") for name in ("card.md", "card_diffusers.md"))
quoted = partial(json.dumps, ensure_ascii=False)  # as a Python string


def write_card(config: Config, recipe: dict, examples: Examples):
    """README.md beside the LoRA; recipe: what the LoRA's header holds."""
    folder, model, prompt = RunFolder(config.output_dir), config.pretrained_model_name_or_path, recipe["prompt"][0]
    sheet, pairs = folder.sheet(recipe["trained_steps"]), sum(bool(e.references) for e in examples.examples)
    places, (width, height) = {"data_backend_config", "output_dir", "cache_dir"}, recipe["size"].split("x")
    values = recipe | {
        "kind": "LoKr" if config.lycoris_config else "DoRA" if config.use_dora else "LoRA", "lora": LORA,
        "model": model, "licence": LICENCES.get(Path(model).name, ""), "pairs": pairs, "alone": len(examples) - pairs,
        "base": quoted("weights/nano" if model == "nano" else model),  # a folder of kontext_min's repository
        "dtype": "float32" if recipe["precision"] == "fp32" else "bfloat16", "width": width, "height": height,
        "picture": f"load_image({quoted(Path(recipe['image'][0]).name)})" if recipe["image"] else None,
        "tokens": presets.preset_of(examples.checkpoint.folder).text_shape[0],
        "instruction": quoted(prompt), "argument": shlex.quote(prompt),
        "sheet": f"\n![input, base, LoRA, target](validation/{sheet.name})\n" if sheet.exists() else "",
        "settings": config.model_dump_json(indent=2, exclude_unset=True, exclude=places),
    }  # fmt: skip
    values["diffusers"] = (NO_DIFFUSERS if config.lycoris_config else DIFFUSERS).format(**values)
    folder.card.write_text(CARD.format(**values), encoding="utf-8")
