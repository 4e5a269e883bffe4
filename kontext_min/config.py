"""Every knob of training on one page: name, type, default and reason. Names are SimpleTuner's where it has the knob.

A config file is JSON with comments and trailing commas; a leading `--` of a key is ignored. Only the doors (`train.py`)
and `training/` know this module. Unknown keys are errors, with the nearest known one.
"""

import difflib
import json
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import json5
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from kontext_min import foreign


class Strict(BaseModel):
    """Frozen, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    LEFT_OUT: ClassVar[dict[str, str]] = {}  # key without a meaning here that does no harm -> why
    REFUSED: ClassVar[dict[str, str]] = {}  # key that is not used here, unless it is off -> what to do instead
    SAME: ClassVar[dict[str, str]] = {}  # another name of a key -> ours

    ignored: dict[str, str] = Field({}, description="not to be set: keys that were left out, and why")

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, values):
        """Take out the keys of LEFT_OUT, and those of REFUSED that ask for nothing, remembering them."""
        if not isinstance(values, dict):
            return values
        values = {cls.SAME.get(key, key): value for key, value in values.items()}
        ignored = {key: why for key, why in cls.LEFT_OUT.items() if key in values}
        off = [key for key in cls.REFUSED if key in values and str(values[key]).lower() in foreign.OFF]
        ignored |= dict.fromkeys(off, "what it says is always so here")
        return {key: value for key, value in values.items() if key not in ignored} | {"ignored": ignored}


class Generator(BaseModel):
    """One entry of `conditioning`: references that are made by degrading the targets. Its other keys are parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    name: str | None = Field(None, description="tells two generators of one type apart; default: the type")
    when: Literal["start", "step"] = Field("start", description="made once and kept, or made anew at every use")
    captions: str | list[str] | Literal[False] | None = Field(None, description="instead of the targets' own")
    instance_data_dir: Path | None = Field(None, description="where made pictures are kept; default in cache_dir")
    conditioning_type: Literal["reference_strict"] = "reference_strict"
    params: dict = Field({}, description="parameters may stand here or beside `type`")

    @property
    def parameters(self) -> dict:
        """What the generator function takes."""
        return {**(self.model_extra or {}), **self.params}


class Dataset(Strict):
    """One entry of the data list: targets (edited pictures), references, or the text cache's place."""

    LEFT_OUT, REFUSED = foreign.DATASET_IGNORED, foreign.DATASET_REFUSED

    id: str
    type: Literal["local"] = "local"
    dataset_type: Literal["image", "conditioning", "eval", "text_embeds"] = Field(
        "image", description="eval: targets that are only validated on; conditioning is implied by conditioning_type"
    )
    disabled: bool = Field(False, description="leave this entry out")

    # where the pictures are
    instance_data_dir: Path | None = Field(None, description="folder of pictures, searched with its sub-folders")
    pairs_file: Path | None = Field(None, description="instead: JSONL or CSV with target, reference(s), caption")
    side_by_side: Literal["reference_left", "reference_right"] | None = Field(
        None, description="every picture holds both, cut in two halves"
    )
    reference_suffix: str | None = Field(None, description="NAME_ref.png beside NAME.png in one folder: _ref")

    # what belongs to them
    conditioning_data: list[str] = Field([], description="ids of the reference sets of this target set; none is T2I")
    conditioning_type: Literal["reference_strict", "reference_loose", "mask"] | None = Field(
        None, description="strict: the target's crop and size; loose: a size of its own; mask: white where loss counts"
    )
    conditioning: list[Generator] = Field([], description="references made from the targets by degrading them")
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] | None = Field(
        None, description="default textfile for targets (NAME.txt, one caption a line), none for references"
    )
    instance_prompt: list[str] = Field([], description="the captions of caption_strategy instanceprompt")

    # geometry
    resolution: float = Field(1024, gt=0, description="in units of resolution_type")
    resolution_type: Literal["pixel_area", "pixel", "area"] = Field(
        "pixel_area", description="pixel_area: square root of the area; pixel: shorter side; area: megapixels"
    )
    crop: bool = Field(False, description="cut to crop_aspect; else only what a bucket's size needs is cut")
    crop_aspect: Literal["square", "preserve"] = "square"
    crop_style: Literal["center", "centre", "random", "corner"] = "center"
    vae_cache_clear_each_epoch: bool = Field(
        False, description="with crop_style random: cut anew in every epoch, with latents that are not kept"
    )
    minimum_image_size: float | None = Field(None, description="smaller targets are left out, with their references")
    maximum_image_size: float | None = Field(None, description="larger pictures are first resized to the next key")
    target_downsample_size: float | None = None

    # how often
    repeats: int = Field(0, ge=0, description="further uses per epoch")
    probability: float = Field(1.0, gt=0, le=1, description="share of the set that an epoch shows")
    is_regularisation_data: bool = Field(False, description="the target is the base model's own prediction")
    disable_validation: bool = Field(False, description="never validated on")

    # where results are kept
    cache_dir: Path | None = Field(None, description="text_embeds: of encoded captions; default cache_dir/text")
    cache_dir_vae: Path | None = Field(None, description="latents of this set's pairs; default cache_dir/latents")
    default: Literal[True] = Field(True, description="text_embeds: there is one such entry at most")

    @field_validator("conditioning_data", "instance_prompt", "conditioning", mode="before")
    @classmethod
    def as_list(cls, value):
        """One of something may stand without brackets."""
        return value if isinstance(value, list) else [] if value is None else [value]

    @property
    def role(self) -> str:
        """image, eval, conditioning or text_embeds."""
        return "conditioning" if self.conditioning_type and self.dataset_type == "image" else self.dataset_type

    @property
    def strategy(self) -> str | None:
        """The caption strategy in force: targets have text files unless something else is said."""
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
    images: list[Path] | None = Field(None, description="references; default the first pair's; [] is text-to-image")
    negative: str | None = Field(None, description="default validation_negative_prompt")
    seed: int | None = Field(None, description="default validation_seed")
    size: str | None = Field(None, coerce_numbers_to_str=True, description="of the picture, WxH or a square's side")
    name: str | None = Field(None, description="for the sheets; default: the prompt")

    @field_validator("images", mode="before")
    @classmethod
    def as_list(cls, value):
        """One path may stand without brackets."""
        return value if isinstance(value, list) or value is None else [value]


class Config(Strict):
    """One training run."""

    LEFT_OUT, REFUSED, SAME = foreign.CONFIG_IGNORED, foreign.CONFIG_REFUSED, foreign.RENAMED

    # model
    model_family: Literal["flux"] = "flux"
    model_flavour: Literal["kontext"] = "kontext"
    model_type: Literal["lora"] = "lora"
    pretrained_model_name_or_path: str = Field("nano", description="model folder, hub id, or nano, the embedded model")
    base_model_precision: Literal["no_change", "bf16", "int8-quanto", "int8-torchao"] = Field(
        "no_change", description="of the frozen base; both int8 are the same: weights in int8, half the memory of bf16"
    )
    mixed_precision: Literal["bf16", "no"] = Field("bf16", description="what is computed in; no is fp32")
    gradient_checkpointing: bool = Field(
        True, description="recompute each block in backward: less memory, 4/3 the work"
    )
    gradient_checkpointing_interval: int | None = Field(None, ge=1, description="recompute only every n-th block")

    # data
    data_backend_config: DataList = Field(
        description="the data list, or the path of its JSON file; default multidatabackend.json beside the config"
    )
    cache_dir: Path = Field(Path("cache"), description="latents and encoded text, by content; safe to delete")
    aspect_bucket_alignment: int | None = Field(
        None, gt=0, multiple_of=16, description="training sizes are multiples of it, in pixels; default 64, nano's 16"
    )
    conditioning_multidataset_sampling: Literal["random", "combined"] = Field(
        "random", description="of several reference sets: one per use by a seeded draw, or all of them at once"
    )
    # what sets that do not say it themselves have
    resolution: float | None = Field(None, gt=0)
    resolution_type: Literal["pixel_area", "pixel", "area"] | None = None
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] | None = Field(None, description="of targets")

    caption_dropout_probability: float = Field(0.0, ge=0, lt=1, description="share of uses with an empty caption")
    reference_dropout_probability: float = Field(0.0, ge=0, lt=1, description="share of uses without references")

    # adapter
    lora_type: Literal["standard"] = "standard"
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float | None = Field(None, gt=0, description="strength is alpha / rank; default: the rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of each adapter's inputs left out in a step")
    init_lora: Path | None = Field(None, description="a LoRA file to start from, of the same modules and rank")
    flux_lora_target: str | list[str] = Field(
        "all", description="which linears are adapted: a set's name, or patterns of diffusers' module names"
    )

    # the step
    flow_schedule_shift: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto", description="factor that moves times towards noise; auto: by the target's size, as in sampling"
    )
    flow_sigmoid_scale: float = Field(1.0, gt=0, description="times are sigmoid(scale * normal), then shifted")
    flow_use_uniform_schedule: bool = Field(False, description="uniform times instead")
    flow_use_beta_schedule: bool = Field(False, description="beta times instead")
    flow_beta_schedule_alpha: float = Field(2.0, gt=0)
    flow_beta_schedule_beta: float = Field(2.0, gt=0)
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    flux_guidance_value: float = Field(1.0, description="the distilled guidance while training, if constant")
    flux_guidance_min: float = Field(0.0, description="of a random range")
    flux_guidance_max: float = Field(4.0, description="of a random range")
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    huber_c: float = Field(0.1, gt=0, description="error from which huber and smooth_l1 grow linearly")
    masked_loss_probability: float = Field(1.0, ge=0, le=1, description="share of uses in which a mask counts")
    masked_loss_weight: float = Field(0.0, ge=0, le=1, description="how much the black part of a mask counts")
    train_batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="batches per optimizer step; the gradient is their mean"
    )
    max_train_steps: int = Field(1000, ge=1, description="optimizer steps")
    seed: int = 42

    # optimizer
    optimizer: Literal[
        "adamw", "adamw_bf16", "ao-adamw8bit", "optimi-adam", "optimi-adamw", "optimi-stableadamw", "optimi-adan",
        "optimi-lion", "optimi-radam", "optimi-ranger", "optimi-sgd",
    ] = Field("adamw", description="adamw_bf16 and ao-adamw8bit are AdamW in less memory")  # fmt: skip
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = Field("constant", description="both constants are the same")
    lr_warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises linearly from 0")
    lr_end: float = Field(0.0, ge=0, description="learning rate that every schedule but the constant comes down to")
    lr_power: float = Field(0.8, gt=0, description="of polynomial")
    lr_num_cycles: int = Field(1, ge=1, description="cycles of cosine_with_restarts and sine")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="of adamw alone: the others have defaults of their own")
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(0.01, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    optimizer_beta1: float | None = Field(None, ge=0, lt=1, description="of any optimizer with betas")
    optimizer_beta2: float | None = Field(None, ge=0, lt=1)
    optimizer_config: dict[str, bool | float] = Field({}, description="further arguments of it: key=value,key=value")
    max_grad_norm: float = Field(
        1.0, gt=0, description="the gradient is scaled down to this norm; never cut value by value, as SimpleTuner does"
    )
    skip_nonfinite_steps: int = Field(0, ge=0, description="steps without a finite loss that are left out, not fatal")
    use_ema: bool = Field(False, description="also keep and save the moving average of the adapter, in ema/")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="reached slowly: (1 + n) / (10 + n) after n updates")
    ema_update_interval: int = Field(1, ge=1, description="steps between updates of the average")
    ema_validation: Literal["ema_only", "none"] = Field("ema_only", description="none shows the last step instead")

    # what is left behind
    output_dir: Path = Path("output/run")
    checkpointing_steps: int = Field(500, ge=0, description="steps between checkpoints; 0: only when interrupted")
    checkpoints_total_limit: int = Field(3, ge=1, description="checkpoints kept; the oldest go first")
    resume_from_checkpoint: str | None = Field(None, description="latest, or a checkpoint-N folder to go on from")
    allow_changed_resume: bool = Field(False, description="go on although settings or data have changed since")

    # validation pictures
    validation_steps: int = Field(500, ge=0, description="steps between validation pictures; 0: only at the end")
    validation_disable: bool = Field(False, description="no validation pictures")
    validation_on_startup: bool = Field(
        True, description="the base model's pictures first, so that you see what is due"
    )
    validation_split: float = Field(
        0.0, ge=0, description="share, or number from 1, of the pairs that are kept from training to validate on"
    )
    eval_dataset_id: str | None = Field(None, description="only pairs of this set are validated on")
    num_eval_images: int = Field(4, ge=0, description="pairs of the data that are shown")
    validation_using_datasets: bool = Field(True, description="false: no pairs of the data are shown")
    validation: list[ValidationItem] = Field([], description="further pictures, each of a prompt and maybe more")
    validation_prompt: str | None = Field(
        None, description="one more prompt, on the first validation pair's references"
    )
    user_prompt_library: Path | None = Field(
        None, description="JSON file of more: name -> prompt, or name -> {prompt, …}"
    )
    validation_prompt_library: bool | Path = Field(False, description="likewise a file; there is no built-in library")
    validation_negative_prompt: str = Field("", description="what true CFG leads away from")
    validation_guidance: float = 2.5
    validation_guidance_real: float = Field(1.0, ge=1, description="true CFG, twice the time; 1 is off")
    validation_no_cfg_until_timestep: int = Field(0, ge=0, description="sampling steps before true CFG begins")
    validation_num_inference_steps: int = Field(28, ge=1)
    validation_resolution: str | None = Field(  # pairs have their training size, and other pictures infer.py's default
        None, coerce_numbers_to_str=True, description="area of what is no pair: WxH or a side, several by comma"
    )
    validation_seed: int = 42

    # eval loss
    eval_steps_interval: int | None = Field(None, ge=0, description="steps between them; default validation_steps")
    eval_timesteps: int = Field(8, ge=1, description="times at which the loss of a pair is taken, evenly spread")
    eval_loss_disable: bool = Field(False, description="no eval loss")
    num_eval_pairs: int = Field(8, ge=1, description="pairs that it is over; the time it takes grows with them")

    # who is told
    report_to: Literal["none", "tensorboard", "wandb", "all"] = Field(
        "none", description="trackers beside metrics.jsonl, through their own libraries"
    )
    tracker_project_name: str = Field("kontext_min", description="the project at W&B")
    tracker_run_name: str | None = Field(None, description="default: the name of output_dir")
    logging_dir: Path | None = Field(
        None, description="trackers write to a folder in it of the run's name; default: output_dir/logs"
    )

    @field_validator("base_model_precision", mode="before")
    @classmethod
    def built(cls, value):
        """Other precisions have names too."""
        if value not in ("no_change", "bf16", "int8-quanto", "int8-torchao"):
            raise ValueError(f"{value} is not built yet; int8-quanto is, or no_change")
        return value

    @field_validator("optimizer_config", mode="before")
    @classmethod
    def as_pairs(cls, value):
        """`key=value,key=value` -> a mapping."""
        if not isinstance(value, str):
            return value or {}
        return dict(part.strip().partition("=")[::2] for part in value.split(",") if part.strip())

    @model_validator(mode="after")
    def agree(self):
        """Settings that contradict each other."""
        if self.flow_use_uniform_schedule and self.flow_use_beta_schedule:
            raise ValueError("flow_use_uniform_schedule and flow_use_beta_schedule exclude each other")
        if self.flux_guidance_min > self.flux_guidance_max:
            raise ValueError("flux_guidance_min is above flux_guidance_max")
        if self.lr_end > self.learning_rate and not self.lr_scheduler.startswith("constant"):
            raise ValueError("lr_end is above learning_rate")
        if self.lr_scheduler == "sine" and self.lr_warmup_steps:
            raise ValueError("sine rises by itself: set lr_warmup_steps to 0 and its number of waves as lr_num_cycles")
        if self.base_model_precision == "bf16" and self.mixed_precision == "no":
            raise ValueError("base_model_precision bf16 needs mixed_precision bf16")
        if self.validation_split > 1 and self.validation_split % 1:
            raise ValueError("validation_split is a share below 1 or a whole number of pairs")
        return self

    def optimizer_options(self) -> dict[str, bool | float]:
        """What is said of the optimizer beside its learning rate, the general after the particular."""
        options = {**self.optimizer_config, "beta1": self.optimizer_beta1, "beta2": self.optimizer_beta2}
        options = {key: value for key, value in options.items() if value is not None}
        if self.optimizer != "adamw":
            return options
        betas = {"beta1": self.adam_beta1, "beta2": self.adam_beta2}
        return {**betas, "weight_decay": self.adam_weight_decay, "eps": self.adam_epsilon, **options}

    def datasets(self) -> list[Dataset]:
        """The data list. Raises ValueError naming file and key."""
        if isinstance(self.data_backend_config, list):
            return [self.completed(entry) for entry in self.data_backend_config]
        entries = read_json5(self.data_backend_config)
        if not isinstance(entries, list):
            raise ValueError(f"{self.data_backend_config} should hold a list of datasets, [...]")
        where = f"{self.data_backend_config}, entry"
        return [self.completed(checked(Dataset, entry, f"{where} {i + 1}")) for i, entry in enumerate(entries)]

    def completed(self, entry: Dataset) -> Dataset:
        """A set with this config's values for what it does not say itself."""
        shared = ("resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size")
        captions = ("caption_strategy",) if entry.role in ("image", "eval") else ()
        said = {key: getattr(self, key) for key in (*shared, *captions) if key not in entry.model_fields_set}
        return entry.model_copy(update={key: value for key, value in said.items() if value is not None})


def read_json5(path: Path):
    """JSON with comments and trailing commas. One sentence when the file is missing or malformed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; ready configs are in configs/")
    try:
        return json5.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_config(path: Path, overrides: list[str]) -> Config:
    """A config file with KEY=VALUE overrides on top -> Config. Raises ValueError listing every problem at once."""
    values = read_json5(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold one object, {{...}}")
    values = {key.removeprefix("--"): value for key, value in values.items()}
    values = {Config.SAME.get(key, key): value for key, value in values.items()}
    if (beside := Path(path).parent / "multidatabackend.json").is_file():
        values.setdefault("data_backend_config", beside)
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not KEY=VALUE, such as learning_rate=1e-4")
        values[Config.SAME.get(key, key)] = parse_value(text)
    return checked(Config, values, str(path))


def parse_value(text: str):
    """The value of an override: JSON if it is, else the text itself."""
    try:
        return json5.loads(text)
    except ValueError:
        return text


def checked(kind: type[Strict], values: dict, where: str):
    """Validate; every problem becomes one line, unknown keys with their nearest match."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [problem(kind, entry) for entry in error.errors()]
        raise ValueError(f"{where}: " + "; ".join(lines)) from error


def problem(kind: type[Strict], entry: dict) -> str:
    """One of pydantic's findings in one line."""
    name = ".".join(str(part) for part in entry["loc"] if part not in ("<file>", "<list>"))
    if entry["type"] == "value_error" and not name:
        return str(entry["ctx"]["error"])
    if not name:
        return f"{entry['input']!r} should be one object, {{...}}"
    if entry["type"] == "extra_forbidden":
        key = str(entry["loc"][-1])
        owner = kind if len(entry["loc"]) == 1 else ValidationItem if entry["loc"][0] == "validation" else Dataset
        if key in owner.REFUSED:
            return f"{name} is not used here: {owner.REFUSED[key]}"
        known = owner.model_fields.keys() - {"ignored"}
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        return f"unknown key {name}" + (f", did you mean {near[0]}?" if near else "")
    if entry["type"] == "missing":
        return f"{name} is required"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{name} = {entry['input']!r}: {message[0].lower()}{message[1:]}"


def explain(config: Config) -> list[str]:
    """Every key in force: its value, whether it was given, and what it means; then what was left out, and why."""
    lines = []
    for name, field in Config.model_fields.items():
        if name != "ignored":
            value = getattr(config, name)
            value = "…" if name == "data_backend_config" else str(value) if isinstance(value, Path) else repr(value)
            source = "given" if name in config.model_fields_set else "default"
            lines.append(f"{name:36} {value:28} {source:8} {field.description or ''}".rstrip())
    return lines + [f"{name:36} {'ignored':28} {'given':8} {why}" for name, why in config.ignored.items()]


def schema() -> str:
    """JSON Schema of a config file, by which an editor completes and checks it."""
    whole = Config.model_json_schema()
    for part in (whole, *whole["$defs"].values()):
        part["properties"].pop("ignored", None)
    return json.dumps(whole, indent=2)


if __name__ == "__main__":
    if sys.argv[1:] != ["--schema"]:
        sys.exit("usage: python -m kontext_min.config --schema")
    print(schema())
