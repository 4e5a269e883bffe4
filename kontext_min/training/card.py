"""The LoRA's model card: README.md in the run's folder, as the hub shows it. It says only what the run knows."""

import json
from pathlib import Path

from kontext_min import presets
from kontext_min.config import Config
from kontext_min.data.examples import Examples

KONTEXT = "FLUX.1-Kontext-dev"
LICENCES = {  # name of a published model -> the hub's fields
    "nano": {"license": "apache-2.0"},
    KONTEXT: {
        "base_model": f"black-forest-labs/{KONTEXT}",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": f"https://huggingface.co/black-forest-labs/{KONTEXT}/blob/main/LICENSE.md",
    },
}


def write_card(config: Config, recipe: dict, examples: Examples) -> Path:
    """README.md beside the LoRA; recipe: what the LoRA's header holds."""
    folder, model = config.output_dir, config.pretrained_model_name_or_path
    step, prompt = recipe["trained_steps"], recipe["prompt"][0]
    sheet = Path("validation") / f"{step:06d}.png"
    known = LICENCES.get(Path(model).name, {})
    front = {**known, "library_name": "diffusers", "pipeline_tag": "image-to-image"}
    front["tags"] = ["flux", "flux-kontext", "lora", "image-to-image", "kontext_min"]
    front["widget"] = widget(folder, step)
    pictures = f"![input, base, LoRA and target of the validation pairs]({sheet.as_posix()})\n"
    given = config.model_fields_set - {"data_backend_config", "ignored", "output_dir", "cache_dir"}
    sections = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items() if value),
        "---\n",
        f"# {recipe['title']}\n",
        f"A LoRA for `{model}`, trained for {step} steps on the data below with kontext_min.\n",
        pictures if (folder / sheet).exists() else "",
        "## Use\n",
        f"The instruction of its sample: {json.dumps(prompt, ensure_ascii=False)}\n",
        usage(model, recipe, presets.preset_of(examples.checkpoint.folder)),
        "## Data\n",
        *data_rows(examples),
        "\n## Settings\n",
        "| key | value |\n|---|---|",
        *(f"| {key} | {cell(getattr(config, key))} |" for key in type(config).model_fields if key in given),
        "\nEvery other key has its default; `config.json` lists all.\n",
        "## Licence\n",
        f"{known.get('license_name', known['license'])}, that of the base model." if known else
        "That of the base model; look there.",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(sections) + "\n", encoding="utf-8")
    return folder / "README.md"


def widget(folder: Path, step: int) -> list[dict]:
    """The LoRA's pictures at a step with their instructions, as the hub's gallery takes them."""
    file = folder / "validation" / "items.json"
    items = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    named = [(item["prompt"], Path("validation") / f"{step:06d}" / f"{i:02d}.png") for i, item in enumerate(items)]
    return [{"text": text, "output": {"url": path.as_posix()}} for text, path in named if (folder / path).exists()]


def data_rows(examples: Examples) -> list[str]:
    """A table of the sets."""
    rows = ["| set | targets | with references | sizes |", "|---|---|---|---|"]
    for name in dict.fromkeys(example.set_id for example in examples.examples):
        own = [example for example in examples.examples if example.set_id == name]
        sizes = ", ".join(sorted({str(example.target.size) for example in own}))
        rows.append(f"| {cell(name)} | {len(own)} | {sum(bool(e.references) for e in own)} | {sizes} |")
    return rows


def cell(value) -> str:
    """Text that stays in its cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def usage(model: str, recipe: dict, preset: presets.Preset) -> str:
    """Commands and code that make the sample again, run in the folder of the LoRA."""
    width, height = recipe["size"].split("x")
    prompt = json.dumps(recipe["prompt"][0], ensure_ascii=False)
    shell = "'" + recipe["prompt"][0].replace("'", "'\\''") + "'"
    references = [Path(name).name for name in recipe["image"]]
    image = f'image=load_image("{references[0]}"), ' if references else ""
    base = "weights/nano" if model == "nano" else model  # a folder of kontext_min's repository
    text = f"""With kontext_min, the sample and one's own picture:

    python infer.py --lora pytorch_lora_weights.safetensors
    python infer.py --lora pytorch_lora_weights.safetensors --image mine.jpg --prompt {shell}
"""
    if len(references) <= 1:  # its pipeline takes one
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[recipe["precision"]]
        text += f"""
With diffusers:

```python
import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import load_image

pipe = FluxKontextPipeline.from_pretrained({json.dumps(base)}, torch_dtype=torch.{dtype})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
image = pipe(
    {image}prompt={prompt},
    width={width}, height={height}, max_area={width} * {height}, _auto_resize=False,
    guidance_scale={recipe["guidance"]}, num_inference_steps={recipe["steps"]},
    max_sequence_length={preset.text_shape[0]}, generator=torch.Generator().manual_seed({recipe["seed"]}),
).images[0]
image.save("edited.png")
```
"""
    if preset.name == presets.KONTEXT_DEV.name:
        text += f"""
In ComfyUI: copy the file into `models/loras`, put a `LoraLoaderModelOnly` node with strength 1 after the node that
loads the model in a FLUX.1 Kontext workflow, and give {prompt} as the prompt with a guidance of {recipe["guidance"]}.
"""
    return text
