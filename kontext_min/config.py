"""Every knob of training on one page: name, type, default and reason. Names are SimpleTuner's where it has the knob.

A config file is JSON with comments and trailing commas; a leading `--` of a key is ignored. Only the doors (`train.py`)
and `training/` know this module. Unknown keys are errors, with the nearest known one.
"""

import difflib
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import json5
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from kontext_min.foreign import TABLES, Strict


def knob(default, meaning: str, **limits):  # a key with its meaning, as `--explain` and the schema tell it
    return Field(default, description=meaning, **limits)


Mapped = BeforeValidator(  # also `key=value,key=value`
    lambda v: dict(p.strip().partition("=")[::2] for p in v.split(",") if p.strip()) if isinstance(v, str) else v or {}
)
Listed = BeforeValidator(lambda v: v if isinstance(v, list) else [] if v is None else [v])  # one may lack its brackets
Read = BeforeValidator(lambda v: read_json5(Path(v)) if isinstance(v, str | Path) else v)  # a JSON file's path
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Positive, SizeText = Annotated[float, Field(gt=0)], Annotated[str, Field(coerce_numbers_to_str=True)]
Unit, Captions = Literal["pixel_area", "pixel", "area"], Literal["textfile", "filename", "instanceprompt"]
ModuleClass = Literal["Attention", "FeedForward"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"]
Optimizer = Literal["adamw", "adamw_bf16", "ao-adamw8bit", "optimi-adam", "optimi-adamw", "optimi-stableadamw",
                    "optimi-adan", "optimi-lion", "optimi-radam", "optimi-ranger", "optimi-sgd"]  # fmt: skip
Recompute, Several = Literal["block", "keep_attn", "keep_gemm", "none"], Literal["random", "combined"]
Base = Literal["no_change", "bf16", "int8-quanto", "int8-torchao", "int8-dynamic", "nf4", "fp8-torchao", "fp8-dynamic"]
Encoder = Literal["no_change", "int8-quanto", "int8-torchao", "nf4"]
Kind = Literal["reference_strict", "reference_loose", "mask"]


class Generator(BaseModel):
    """One entry of `conditioning`: references that are made by degrading the targets. Its other keys are parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    name: str | None = knob(None, "tells two generators of one type apart; default: the type")
    when: Literal["start", "step"] = knob("start", "made once and kept, or made anew at every use")
    captions: str | list[str] | Literal[False] | None = knob(None, "instead of the targets' own")
    instance_data_dir: Path | None = knob(None, "where made pictures are kept; default in cache_dir")
    conditioning_type: Literal["reference_strict"] = "reference_strict"
    params: dict = knob({}, "parameters may stand here or beside `type`")

    @property
    def parameters(self) -> dict:
        return {**(self.model_extra or {}), **self.params}


class Dataset(Strict):
    """One entry of the data list: targets (edited pictures), references, or the text cache's place."""

    LEFT_OUT, REFUSED = TABLES["DATASET_IGNORED"], TABLES["DATASET_REFUSED"]

    id: str
    type: Literal["local"] = "local"
    dataset_type: Literal["image", "conditioning", "eval", "text_embeds"] = knob("image", "eval: only validated on")
    disabled: bool = knob(False, "leave this entry out")

    # where the pictures are
    instance_data_dir: Path | None = knob(None, "folder of pictures, searched with its sub-folders")
    pairs_file: Path | None = knob(None, "instead: JSONL or CSV with target, reference(s), caption")
    side_by_side: Literal["reference_left", "reference_right"] | None = knob(None, "both are halves of every picture")
    reference_suffix: str | None = knob(None, "NAME_ref.png beside NAME.png in one folder: _ref")

    # what belongs to them
    conditioning_data: Annotated[list[str], Listed] = knob([], "ids of this target set's reference sets; none is T2I")
    conditioning_type: Kind | None = knob(None, "strict: the target's crop and size; loose: its own; mask: of the loss")
    conditioning: Annotated[list[Generator], Listed] = knob([], "references made from the targets by degrading them")
    caption_strategy: Captions | None = knob(None, "default textfile (NAME.txt, one a line), for references none")
    instance_prompt: Annotated[list[str], Listed] = knob([], "the captions of caption_strategy instanceprompt")

    # geometry
    resolution: float = knob(1024, "in units of resolution_type", gt=0)
    resolution_type: Unit = knob("pixel_area", "of it: square root of the area; pixel: shorter side; area: megapixels")
    crop: bool = knob(False, "cut to crop_aspect; else only what a bucket's size needs is cut")
    crop_aspect: Literal["square", "preserve"] = "square"
    crop_style: Literal["center", "centre", "random", "corner"] = "center"
    vae_cache_clear_each_epoch: bool = knob(False, "with crop_style random: cut anew in every epoch, nothing is kept")
    minimum_image_size: float | None = knob(None, "smaller targets are left out, with their references")
    maximum_image_size: float | None = knob(None, "larger pictures are first resized to the next key")
    target_downsample_size: float | None = None

    # how often
    repeats: int = knob(0, "further uses per epoch", ge=0)
    probability: float = knob(1.0, "share of the set that an epoch shows", gt=0, le=1)
    is_regularisation_data: bool = knob(False, "the target is the base model's own prediction")
    disable_validation: bool = knob(False, "never validated on")

    # where results are kept
    cache_dir: Path | None = knob(None, "text_embeds: of encoded captions; default cache_dir/text")
    cache_dir_vae: Path | None = knob(None, "latents of this set's pairs; default cache_dir/latents")
    default: Literal[True] = knob(True, "text_embeds: there is one such entry at most")

    @property
    def role(self) -> str:  # image, eval, conditioning or text_embeds
        return "conditioning" if self.conditioning_type and self.dataset_type == "image" else self.dataset_type

    @property
    def strategy(self) -> str | None:
        stated = "caption_strategy" in self.model_fields_set
        return self.caption_strategy if stated or self.role == "conditioning" else "textfile"


DataList = Annotated[  # the discriminator only keeps error messages to the form that was given
    Annotated[Path, Tag("<file>")] | Annotated[list[Dataset], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<file>"),
]


class ValidationItem(Strict):
    """One picture to validate on, beside the pairs of the data."""

    SAME = {"image": "images", "path": "images"}

    prompt: str
    images: Annotated[list[Path], Listed] | None = knob(None, "references; default the first pair's; [] is T2I")
    negative: str | None = knob(None, "default validation_negative_prompt")
    seed: Seed | None = knob(None, "default validation_seed")
    size: SizeText | None = knob(None, "of the picture, WxH or a square's side")
    name: str | None = knob(None, "for the sheets; default: the prompt")


class LoKrSize(Strict):
    """The size of LoKrs, of all of them or, in module_algo_map, of one class of modules."""

    REFUSED, SAME = TABLES["LYCORIS_REFUSED"], {"linear_dim": "dim", "linear_alpha": "alpha"}

    algo: Literal["lokr"] = knob("lokr", "of LyCORIS's kinds, this one is built")
    factor: int = knob(-1, "size of w1; -1: near to that of w2", ge=-1)
    full_matrix: bool = knob(False, "w1 and w2 are one matrix each")
    dim: int | None = knob(None, "rank of w2, where it is below half of its larger side", ge=1)
    alpha: float = knob(1.0, "strength is alpha / dim where there is a rank", gt=0)
    decompose_both: bool = knob(False, "w1 has a rank too")


class Preset(Strict):
    """Modules by their class in diffusers, as LyCORIS's presets name them."""

    REFUSED = TABLES["LYCORIS_REFUSED"]

    target_module: list[ModuleClass] = knob([], "instead of flux_lora_target")
    module_algo_map: dict[ModuleClass, LoKrSize] = {}


class LyCORIS(LoKrSize):
    """What SimpleTuner's lycoris_config.json may say, or the file's path."""

    multiplier: float = knob(1.0, "training is at full strength", ge=1, le=1)
    apply_preset: Preset = Preset()


class Config(Strict):
    """One training run."""

    LEFT_OUT = TABLES["CONFIG_IGNORED"] | TABLES["LYCORIS_IGNORED"]
    REFUSED, SAME = TABLES["CONFIG_REFUSED"], TABLES["RENAMED"]

    # model
    model_family: Literal["flux"] = "flux"
    model_flavour: Literal["kontext"] = knob("kontext", "given without a path it implies FLUX.1-Kontext-dev")
    model_type: Literal["lora", "full"] = knob("lora", "full: all parameters, spread over the ranks of torchrun")
    pretrained_model_name_or_path: str = knob("nano", "folder, hub id, or nano, which is embedded; see model_flavour")
    base_model_precision: Base = knob("no_change", "of the frozen base; -dynamic: of its inputs, too (torch_compile)")
    text_encoder_2_precision: Encoder = knob("no_change", "of T5, 9.5 GB in bf16, while captions are encoded")
    mixed_precision: Literal["bf16", "no"] = knob("bf16", "what is computed in; no is fp32")
    gradient_checkpointing: bool = knob(True, "recompute each block in backward: less memory, 4/3 the work")
    gradient_checkpointing_interval: int | None = knob(None, "recompute only every n-th block", ge=1)
    memory: Literal["auto"] | Positive = knob("auto", "GB to take, auto: the GPU's, by what is picked of the next five")
    recompute: Recompute | None = knob(None, "all of a block; keep_attn, keep_gemm, none: less of it, faster")
    recompute_less: int | None = knob(None, "of so many blocks, the last, what the next of these policies says", ge=0)
    modulation_on_cpu: bool | None = knob(None, "a quarter of the weights, which see no tokens, on the CPU")
    offload_activations: bool | None = knob(None, "the inputs of blocks wait in the host's memory for backward")
    stream_blocks: bool | None = knob(None, "so do their weights; three blocks' are on the GPU at a time")
    torch_compile: bool = knob(False, "compile each kind of block")
    fsdp_enable: bool = knob(False, "each of torchrun's ranks keeps a part of the frozen base; with full always so")
    fsdp_cpu_offload: bool = knob(False, "of model_type full: these parts, gradients and moments in the host's memory")
    distributed_timeout: float = knob(10.0, "minutes in which a rank must answer another", gt=0)

    # data
    data_backend_config: DataList = knob(..., "the data list or its file; default multidatabackend.json beside this")
    cache_dir: Path = knob(Path("cache"), "latents and encoded text, by content; safe to delete")
    aspect_bucket_alignment: int | None = knob(None, "of training sizes; default 64, nano's 16", gt=0, multiple_of=16)
    conditioning_multidataset_sampling: Several = knob("random", "of several reference sets: one a use, or all at once")
    # what sets that do not say it themselves have
    resolution: float | None = knob(None, "of sets", gt=0)
    resolution_type: Unit | None = None
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    caption_strategy: Captions | None = knob(None, "of targets")

    caption_dropout_probability: float = knob(0.0, "share of uses with an empty caption", ge=0, lt=1)
    reference_dropout_probability: float = knob(0.0, "share of batches without references", ge=0, lt=1)

    # adapter
    lora_type: Literal["standard", "lycoris"] = knob("standard", "LoRA, or LoKr by lycoris_config")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float | None = knob(None, "strength is alpha / rank; default: the rank", gt=0)
    lora_rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = knob({}, "pattern of modules -> rank; the first match")
    use_dora: bool = knob(False, "DoRA: the length of each row of a weight is trained beside the change of direction")
    lycoris_config: Annotated[LyCORIS | None, Read] = knob(None, "SimpleTuner's lycoris_config.json, or what it holds")
    lora_dropout: float = knob(0.0, "share of each adapter's inputs left out in a step", ge=0, lt=1)
    init_lora: Path | None = knob(None, "a LoRA or LoKr file to start from, of the same modules and sizes")
    flux_lora_target: str | list[str] = knob("all", "a set's name, or patterns of diffusers' module names")
    lora_format: Literal["diffusers", "comfyui", "kohya"] = knob("diffusers", "of a LoRA's file; LoKr's is LyCORIS'")

    # the step
    flow_schedule_shift: Literal["auto"] | Positive = knob("auto", "moves times to noise; auto: by size, as sampling")
    flow_sigmoid_scale: float = knob(1.0, "times are sigmoid(scale * normal), then shifted", gt=0)
    flow_use_uniform_schedule: bool = knob(False, "uniform times instead")
    flow_use_beta_schedule: bool = knob(False, "beta times instead")
    flow_beta_schedule_alpha: float = Field(2.0, gt=0)
    flow_beta_schedule_beta: float = Field(2.0, gt=0)
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    flux_guidance_value: float = knob(1.0, "the distilled guidance while training, if constant")
    flux_guidance_min: float = knob(0.0, "of a random range")
    flux_guidance_max: float = knob(4.0, "of a random range")
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    huber_c: float = knob(0.1, "error from which huber and smooth_l1 grow linearly", gt=0)
    masked_loss_probability: float = knob(1.0, "share of uses in which a mask counts", ge=0, le=1)
    masked_loss_weight: float = knob(0.0, "how much the black part of a mask counts", ge=0, le=1)
    train_batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = knob(1, "batches per optimizer step; the gradient is their mean", ge=1)
    max_train_steps: int = knob(1000, "optimizer steps", ge=1)
    seed: Seed = 42

    # optimizer
    optimizer: Optimizer = knob("adamw", "adamw_bf16 and ao-adamw8bit are AdamW in less memory")
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler: Schedule = knob("constant", "both constants are the same")
    lr_warmup_steps: int = knob(0, "steps in which the learning rate rises linearly from 0", ge=0)
    lr_end: float = knob(0.0, "learning rate that every schedule but the constant comes down to", ge=0)
    lr_power: float = knob(0.8, "of polynomial", gt=0)
    lr_num_cycles: int = knob(1, "cycles of cosine_with_restarts and sine", ge=1)
    adam_beta1: float = knob(0.9, "of AdamW's kinds alone; all but adamw have defaults of their own", ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(0.01, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    optimizer_beta1: float | None = knob(None, "of any optimizer with betas", ge=0, lt=1)
    optimizer_beta2: float | None = Field(None, ge=0, lt=1)
    optimizer_config: Annotated[dict[str, bool | float], Mapped] = knob({}, "its further arguments: key=value, …")
    max_grad_norm: float = knob(1.0, "the gradient is scaled down to this norm, never cut value by value", gt=0)
    skip_nonfinite_steps: int = knob(0, "steps without a finite loss that are left out, not fatal", ge=0)
    use_ema: bool = knob(False, "also keep and save the moving average of the adapter, in ema/")
    ema_decay: float = knob(0.995, "reached slowly: (1 + n) / (10 + n) after n updates", ge=0, lt=1)
    ema_update_interval: int = knob(1, "steps between updates of the average", ge=1)
    ema_validation: Literal["ema_only", "none"] = knob("ema_only", "none shows the last step instead")

    # what is left behind
    output_dir: Path = Path("output/run")
    checkpointing_steps: int = knob(500, "steps between checkpoints; 0: only when interrupted", ge=0)
    checkpoints_total_limit: int = knob(3, "checkpoints kept; the oldest go first", ge=1)
    resume_from_checkpoint: str | None = knob(None, "latest, or a checkpoint-N to go on from; newer ones are set aside")
    allow_changed_resume: bool = knob(False, "go on although settings or data have changed since")

    # validation pictures
    validation_steps: int = knob(500, "steps between validation pictures; 0: only at the end", ge=0)
    validation_disable: bool = knob(False, "no validation pictures")
    validation_on_startup: bool = knob(True, "the base model's pictures first, so that you see what is due")
    validation_split: float = knob(0.0, "share, or number from 1, of the pairs kept from training to validate on", ge=0)
    eval_dataset_id: str | None = knob(None, "only pairs of this set are validated on")
    num_eval_images: int = knob(4, "pairs of the data that are shown", ge=0)
    validation_using_datasets: bool = knob(True, "false: no pairs of the data are shown")
    validation: list[ValidationItem] = knob([], "further pictures, each of a prompt and maybe more")
    validation_prompt: str | None = knob(None, "one more prompt, on the first validation pair's references")
    user_prompt_library: Path | None = knob(None, "JSON file of more: name -> prompt, or name -> {prompt, …}")
    validation_negative_prompt: str = knob("", "what true CFG leads away from")
    validation_guidance: float = knob(2.5, "the distilled guidance of the pictures")
    validation_guidance_real: float = knob(1.0, "true CFG, twice the time; 1 is off", ge=1)
    validation_no_cfg_until_timestep: int = knob(0, "sampling steps before true CFG begins", ge=0)
    validation_num_inference_steps: int = Field(28, ge=1)
    validation_resolution: SizeText | None = knob(None, "area of what is no pair: WxH or a side, several by comma")
    validation_seed: Seed = 42

    # eval loss
    eval_steps_interval: int | None = knob(None, "steps between them; default validation_steps", ge=0)
    eval_timesteps: int = knob(8, "times at which the loss of a pair is taken, evenly spread", ge=1)
    eval_loss_disable: bool = knob(False, "no eval loss")
    num_eval_pairs: int = knob(8, "pairs that it is over; the time it takes grows with them", ge=1)

    # who is told
    report_to: Literal["none", "tensorboard", "wandb", "all"] = knob("none", "trackers, through their own libraries")
    tracker_project_name: str = knob("kontext_min", "the project at W&B")
    tracker_run_name: str | None = knob(None, "default: the name of output_dir")
    logging_dir: Path | None = knob(None, "trackers write to its folder of the run's name; default: output_dir/logs")

    @property
    def sharded(self) -> bool:
        return self.fsdp_enable or self.model_type == "full"

    @property
    def idle(self) -> set[str]:  # keys that say nothing of the kind of adapter that is trained, or of its optimizer
        lora, adam = ({key for key in Config.model_fields if key.startswith(stem)} for stem in ("lora_", "adam_"))
        idle = set() if self.optimizer == "adamw" else adam - self.model_fields_set
        if self.model_type == "full":
            return idle | lora | {"use_dora", "lycoris_config", "init_lora", "flux_lora_target"}
        if self.lora_type == "standard":
            return idle | {"lycoris_config"}
        preset = self.lycoris_config and self.lycoris_config.apply_preset.target_module
        idle |= {"lora_rank", "lora_alpha", "lora_rank_pattern", "use_dora"}
        return idle | {"flux_lora_target"} if preset else idle

    @model_validator(mode="after")
    def agree(self):
        """Settings that contradict each other; and the model that SimpleTuner takes by its flavour alone."""
        if "model_flavour" in self.model_fields_set and "pretrained_model_name_or_path" not in self.model_fields_set:
            self.__dict__["pretrained_model_name_or_path"] = "black-forest-labs/FLUX.1-Kontext-dev"
        idle = ", ".join(sorted(key for key in self.idle & self.model_fields_set if getattr(self, key)))
        lokr, form, split = self.lora_type == "lycoris", self.lora_format, self.validation_split
        flows, curve = self.flow_use_uniform_schedule + self.flow_use_beta_schedule, "constant" not in self.lr_scheduler
        precisions, fsdp = (self.base_model_precision, self.mixed_precision), self.fsdp_enable
        decay = self.optimizer_options().get("weight_decay", 0.0)
        planned = ("memory", "modulation_on_cpu", "offload_activations", "stream_blocks")
        plan = ", ".join(key for key in planned if getattr(self, key) not in ("auto", None))
        full, quantised = self.model_type == "full", self.base_model_precision not in ("no_change", "bf16")
        contradictions = {
            f"model_type full has no adapter; take out {idle}": full and idle,
            "model_type full trains in fp32: set base_model_precision to no_change": full and quantised,
            "model_type full keeps no average: take out use_ema": full and self.use_ema,
            "model_type full needs another optimizer than adamw_bf16": full and self.optimizer == "adamw_bf16",
            "fsdp_enable: a quantised base is kept whole; set base_model_precision to no_change": fsdp and quantised,
            f"a model in shards has no plan to choose; take out {plan}": self.sharded and plan,
            "offload_activations needs gradient_checkpointing": self.offload_activations
            and (not self.gradient_checkpointing or self.recompute == "none"),
            "use_dora needs whole weights: take out fsdp_enable": fsdp and self.use_dora,
            "use_dora needs a weight decay of at most 0.01, which else wears the base away": self.use_dora
            and decay > 0.01,
            "fsdp_cpu_offload needs model_type full": self.fsdp_cpu_offload and not full,
            'lora_type lycoris needs lycoris_config: {"full_matrix": true}': lokr and not self.lycoris_config,
            f"lora_type lycoris is described by lycoris_config; take out {idle}": lokr and idle,
            f"lora_format {form} is a LoRA's alone; convert it later": form != "diffusers" and (lokr or self.use_dora),
            "flow_use_uniform_schedule and flow_use_beta_schedule exclude each other": flows == 2,
            "flux_guidance_min is above flux_guidance_max": self.flux_guidance_min > self.flux_guidance_max,
            "lr_end is above learning_rate": self.lr_end > self.learning_rate and curve,
            "sine rises by itself: set lr_warmup_steps to 0": self.lr_scheduler == "sine" and self.lr_warmup_steps,
            "validation_split is a share below 1 or a whole number of pairs": split > 1 and split % 1,
            "base_model_precision bf16 needs mixed_precision bf16": precisions == ("bf16", "no"),
        }
        if found := [said for said, holds in contradictions.items() if holds]:
            raise ValueError("; ".join(found))
        return self

    def optimizer_options(self) -> dict[str, bool | float]:
        adam = {"eps": "adam_epsilon"} | {name: f"adam_{name}" for name in ("beta1", "beta2", "weight_decay")}
        said = self.model_fields_set if "adamw" in self.optimizer else ()
        options = {name: getattr(self, key) for name, key in adam.items() if key in said or self.optimizer == "adamw"}
        betas = {"beta1": self.optimizer_beta1, "beta2": self.optimizer_beta2}
        return options | self.optimizer_config | {key: beta for key, beta in betas.items() if beta is not None}

    def record(self) -> str:
        """JSON that is a config file again: every key in force, and of sets and LoKrs what they say themselves."""
        said = self.model_dump(mode="json", include={"data_backend_config", "lycoris_config"}, exclude_unset=True)
        return json.dumps(self.model_dump(mode="json", exclude=self.idle) | said, indent=2, ensure_ascii=False) + "\n"

    def datasets(self) -> list[Dataset]:
        """The data list, each set with this config's values for what it does not say. ValueError names file and key."""
        file = entries = self.data_backend_config
        if not isinstance(file, list):
            entries = read_json5(file, list, "a list of datasets, [...]")
            entries = [checked(Dataset, entry, f"{file}, entry {i}") for i, entry in enumerate(entries, 1)]
        named = {name for e in entries if not e.disabled for name in e.conditioning_data if name != e.id}
        return [self.completed(entry, named) for entry in entries]

    def completed(self, entry: Dataset, named: set[str]) -> Dataset:  # with this config's values for what it leaves out
        if entry.id in named and entry.role == "image" and not entry.conditioning_data:  # another's references
            entry = entry.model_copy(update={"conditioning_type": "reference_strict"})
        shared = {"resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size"}
        shared |= {"caption_strategy"} if entry.role in ("image", "eval") else set()
        return entry.model_copy(update=self.model_dump(include=shared - entry.model_fields_set, exclude_none=True))


def read_json5(path: Path, kind: type = object, what: str = ""):
    """JSON with comments and trailing commas. One sentence when it is missing, malformed or not `what` (a `kind`)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; ready configs are in configs/")
    try:
        value = json5.loads(Path(path).read_text(encoding="utf-8"), allow_duplicate_keys=False)
        value = json.loads(json.dumps(value))  # joins the halves of characters such as emoji
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} should hold {what}")
    return value


def read_config(path: Path, overrides: list[str]) -> Config:
    """A config file with KEY=VALUE overrides on top -> Config. Raises ValueError listing every problem at once."""
    values = {key.removeprefix("--"): value for key, value in read_json5(path, dict, "one object, {...}").items()}
    if (beside := Path(path).parent / "multidatabackend.json").is_file():
        values.setdefault("data_backend_config", beside)
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not KEY=VALUE, such as learning_rate=1e-4")
        try:
            values[key] = json5.loads(text)
        except ValueError:  # the text itself
            values[key] = text
    return checked(Config, values, str(path))


def checked(kind: type[Strict], values: dict, where: str):
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(problem(kind, entry) for entry in error.errors())) from error


def problem(kind: type[Strict], entry: dict) -> str:
    """One of pydantic's findings in one line."""
    place = [str(part) for part in entry["loc"] if part not in ("<file>", "<list>")]
    name, message = ".".join(place), entry["msg"].removeprefix("Value error, ")
    if not place:
        return message if entry["type"] == "value_error" else f"{entry['input']!r} should be one object, {{...}}"
    if entry["type"] == "extra_forbidden":
        owner = kind if len(place) == 1 else OWNERS.get(place[0], Dataset)
        if place[-1] in owner.REFUSED:
            return f"{name} is not used here: {owner.REFUSED[place[-1]]}"
        near = difflib.get_close_matches(place[-1], owner.model_fields, n=1, cutoff=0.6)
        return f"unknown key {name}" + (f", did you mean {near[0]}?" if near else "")
    if entry["type"] == "missing":
        return f"{name} is required"
    return f"{name} = {entry['input']!r}: {message[0].lower()}{message[1:]}"


OWNERS = {"validation": ValidationItem, "lycoris_config": LyCORIS}


def explain(config: Config) -> list[str]:
    lines = []
    for name in [key for key in Config.model_fields if key not in config.idle]:
        value, known = getattr(config, name), Config.model_fields[name]
        source = "given" if name in config.model_fields_set else "default" if value == known.default else "implied"
        value = "…" if name == "data_backend_config" else str(value) if isinstance(value, Path) else repr(value)
        lines.append(f"{name:36} {value:28} {source:8} {known.description or ''}".rstrip())
    return lines + [f"{name:36} {'ignored':28} {'given':8} {why}" for name, why in config.ignored.items()]


if __name__ == "__main__":
    if sys.argv[1:] != ["--schema"]:
        sys.exit("usage: python -m kontext_min.config --schema")
    print(json.dumps(Config.model_json_schema(), indent=2))
