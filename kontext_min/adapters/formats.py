"""What adapter files call their tensors: one table of formats, used in both directions.

A tensor's name is a prefix, a module's name and an ending. Where a format spells module names with underscores they
are looked up in `modules`, never parsed: `img_mlp_0` could be several things.
"""

from typing import NamedTuple

from kontext_min.checkpoints.keys import flux_linears
from kontext_min.models.flux import FluxConfig


class Format(NamedTuple):
    """How a format makes a tensor's name of a module's."""

    prefix: str
    separator: str  # of the words of a module's name
    names: str  # whose: "bfl", with fused linears, or "diffusers", with their parts
    a: str  # ending of a LoRA's A (rank, in)
    b: str  # ending of its B (rows, rank)

    def stem(self, module: str) -> str:
        """A module's name -> what its tensors' names begin with."""
        return self.prefix + module.replace(".", self.separator)


# fmt: off
PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FORMATS = {
    "diffusers":       Format("transformer.",       ".", "diffusers", *PEFT),  # also ai-toolkit, its LoKr too
    "kohya":           Format("lora_unet_",         "_", "bfl",       *KOHYA),  # also musubi, LyCORIS with kohya
    "comfy":           Format("diffusion_model.",   ".", "bfl",       *KOHYA),  # lora_A there is nothing to diffusers
    "bfl":             Format("",                   ".", "bfl",       *PEFT),
    "lycoris":         Format("lycoris_",           "_", "diffusers", *KOHYA),  # SimpleTuner, LyCORIS by itself
    "onetrainer":      Format("lora_transformer_",  "_", "diffusers", *KOHYA),
    "fal":             Format("base_model.model.",  ".", "bfl",       *PEFT),
    "peft":            Format("base_model.model.",  ".", "diffusers", *PEFT),
    "diffsynth":       Format("",                   ".", "diffusers", "lora_A.default.weight", "lora_B.default.weight"),
    "comfy-diffusers": Format("diffusion_model.",   ".", "diffusers", *PEFT),
    "kohya-diffusers": Format("lora_unet_",         "_", "diffusers", *KOHYA),
}
ENDINGS = {  # of a tensor's name, after the dot -> what it is of its module; read under any prefix
    "lora_A.weight": "lora_A", "lora_down.weight": "lora_A", "lora_A.default.weight": "lora_A",
    "lora_B.weight": "lora_B", "lora_up.weight": "lora_B", "lora_B.default.weight": "lora_B",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b",
    "alpha": "alpha",
    "dora_scale": "dora_scale",  # kohya and LyCORIS: (rows, 1)
    "lora_magnitude_vector": "dora_scale",  # PEFT: (rows,)
}
# fmt: on
CONFIG_KEY = "lora_adapter_metadata"  # in the file's header: PEFT's LoraConfig as JSON, keys prefixed `transformer.`
RECIPE_KEY = "kontext_min"  # in the file's header: what infer.py needs to show this LoRA
SWAPPED_THEIRS = "norm_out.linear"  # diffusers' name of keys.SWAPPED


def modules(form: Format) -> dict[str, str]:
    """Stem of tensors' names -> module's name, for every linear of the largest model, in the model's order."""
    table = flux_linears(FluxConfig())
    names = table if form.names == "bfl" else [part.name for parts in table.values() for part in parts]
    return {form.stem(name): name for name in names}
