"""Train a LoRA on picture pairs: python train.py configs/nano.json [KEY=VALUE …]. The recipe, top to bottom.

--explain      print every key in force, where it comes from and what it means
--check        say all about the data, without weights or a GPU, and draw a contact sheet of every set
--prune-cache  remove from this config's caches what its data no longer uses, and stop
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kontext_min import parallel, presets, report
from kontext_min.adapters.inject import start_from
from kontext_min.adapters.read import AdapterFile, read_adapter
from kontext_min.checkpoints import load
from kontext_min.config import Config, explain, read_config
from kontext_min.data.check import contact_sheet, summary
from kontext_min.data.examples import Examples, make_all
from kontext_min.edit import Editor
from kontext_min.memory import apply_checkpointing, attention_kernels
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.offload import Ahead, Inputs, open_apart, unneeded
from kontext_min.quantize import open_flux, refuse_on
from kontext_min.run_folder import RunFolder, checkpoints
from kontext_min.training import state, track
from kontext_min.training.adapter import add_adapter, sizes
from kontext_min.training.evaluate import Evaluator
from kontext_min.training.items import Item
from kontext_min.training.optim import make_optimizer
from kontext_min.training.plan import Forecast, Plan, choose, per_rank, screen
from kontext_min.training.run import Run
from kontext_min.training.sets import Sets, mix_of, read_sets, text_cache
from kontext_min.training.validate import Validator, items_of, sampling_of

OPTIONS = {"--explain", "--check", "--prune-cache"}
SMALLER = "text_encoder_2_precision=nf4 takes less to encode, a smaller memory all else"  # but the steps, counted
NO_PATH = str.maketrans("/\\:", "___")  # an id in a file name


def check(config: Config, model: bool = True) -> tuple[Sets, load.Checkpoint | None, AdapterFile | None]:
    """Settings, init_lora, data and, if asked, the model, before anything slow. Raises ValueError with all problems."""
    problems, name = track.missing(config), config.pretrained_model_name_or_path

    def tried(make: Callable, *arguments, **more):
        try:
            return make(*arguments, **more)
        except (ValueError, OSError) as error:
            problems.append(str(error))

    tried(sizes, config, FluxConfig())  # the largest model's modules
    tried(make_optimizer, config.optimizer, [nn.Parameter(torch.zeros(1))], 1.0, **config.optimizer_options())
    trained = tried(read_adapter, config.init_lora) if config.init_lora and state.chosen(config) is None else None
    sets = tried(read_sets, config, presets.preset_of(name).bucket_step)
    if sets and config.sharded and any(e.regularise for e in sets.training):
        problems.append("is_regularisation_data would leave ranks waiting: take out fsdp_enable, or model_type full")
    checkpoint = tried(load.find, presets.locate(name), download=not problems) if model else None
    if problems:
        raise ValueError("\n".join(problems))
    return sets, checkpoint, trained


def report_data(config: Config):
    """--check: all that can be said of the data without weights or a GPU; a contact sheet per set in output_dir."""
    sets, *_ = check(config, model=False)
    shape = presets.preset_of(config.pretrained_model_name_or_path).text_shape
    text = (*shape, 2 if config.mixed_precision == "bf16" else 4)
    print(*sets.notes, *summary(sets.training, text), sep="\n")
    seen = Forecast(config, sets.training, cuda=True)
    print(*seen.cards(), *per_rank(seen), sep="\n")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    examples = sets.training + (sets.validation if sets.unseen else [])
    for set_id in dict.fromkeys(example.set_id for example in examples):
        page, warnings = contact_sheet([e for e in examples if e.set_id == set_id], mix_of(config))
        file = config.output_dir / f"check-{set_id.translate(NO_PATH)}.png"
        page.save(file)
        print(*warnings, f"look at {file}", sep="\n")


def encode(config: Config, sets: Sets, items: list[Item], checkpoint: load.Checkpoint, place: tuple) -> list[Examples]:
    """Make what is made once, then text and latents, cached by content. -> what is trained and what is validated on."""
    (device, dtype), mix, texts = place, mix_of(config), text_cache(config)
    negatives = [item.negative for item in items if config.validation_guidance_real != 1]
    prompts = (*(item.prompt for item in items), *negatives)
    with parallel.first_alone():
        make_all([view for e in (*sets.training, *sets.validation) for view in e.views()])
        t5 = config.text_encoder_2_precision
        examples = Examples(sets.training, checkpoint, texts, dtype, mix, t5=t5)
        validation = Examples(sets.validation, checkpoint, texts, dtype, mix.complete(), prompts=prompts, t5=t5)
    captions, pictures = (sum(made) for made in zip(examples.encode(device), validation.encode(device), strict=True))
    print(f"encoded {captions} captions and {pictures} pictures; all else was cached")
    return [examples, validation]


def load_model(
    config: Config, checkpoint: load.Checkpoint, device: torch.device, dtype: torch.dtype, plan: Plan
) -> tuple[Flux, Ahead]:
    """The transformer, frozen; if all of it is trained, its parameters are kept in fp32 and it computes in dtype."""
    full, offloaded = config.model_type == "full", config.fsdp_cpu_offload
    kept, home = torch.float32 if full else dtype, torch.device("cpu") if offloaded else device
    if config.sharded:
        then = parallel.sharding(full, dtype, offloaded)
        flux = load.load_flux(checkpoint, home, kept, then).requires_grad_(full)
        parallel.shard(flux, dtype, offloaded)
        return flux, unneeded
    base = (checkpoint, device, dtype, config.base_model_precision, config.cache_dir / "base")
    with parallel.first_alone():
        if not (plan.modulation_on_cpu or plan.stream_blocks):
            return open_flux(*base), unneeded
        return open_apart(torch.device("cpu") if plan.modulation_on_cpu else device, plan.stream_blocks, *base)


def main(argv: list[str]):
    overrides, plain = [a for a in argv if "=" in a], [a for a in argv if "=" not in a]
    options, files = {a for a in plain if a.startswith("-")}, [a for a in plain if not a.startswith("-")]
    if not argv or {"-h", "--help"} & options:
        return print(__doc__.strip())
    if len(files) != 1 or options - OPTIONS:
        raise ValueError(f"one config file is needed, and of options {', '.join(sorted(OPTIONS))}; got {plain}")
    config = read_config(Path(files[0]), overrides)
    if "--explain" in options:
        return print(*explain(config), sep="\n")
    if "--check" in options:
        return report_data(config)
    parallel.join(config.distributed_timeout, anyway=config.sharded)
    if parallel.RESTARTS and checkpoints(config.output_dir):
        config = config.model_copy(update={"resume_from_checkpoint": "latest"})
    try:
        run(config, "--prune-cache" in options)
    except RuntimeError as error:
        if not parallel.lost(error):
            raise
        what = f"a rank died, or was silent for {config.distributed_timeout:g} minutes; {state.last(config.output_dir)}"
        remedy = "go on with resume_from_checkpoint=latest, or let torchrun do it: --max-restarts=3; a rank that makes"
        remedy += " what all will read, such as a quantised base, on a slow disk needs a larger distributed_timeout"
        raise ConnectionError(f"{what}; {remedy}") from error
    parallel.leave()


def run(config: Config, prune: bool = False):
    """The recipe; prune: stop before the model, with the caches tidied up."""
    sets, checkpoint, trained = check(config)
    print(*(f"{key} is ignored: {why}" for key, why in config.ignored.items()), *sets.notes, sep="\n")
    folder = RunFolder(config.output_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device, dtype = torch.device(name), torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    refuse_on(device, config.base_model_precision)
    items = items_of(config, sets, presets.preset_of(checkpoint.folder))
    examples, validation = encode(config, sets, items, checkpoint, (device, dtype))
    if prune:
        return print(parallel.by_first(examples.prune)(validation))
    with parallel.first_alone():
        own = (chosen := state.chosen(config)) and chosen.parent.resolve() == folder.path.resolve()
        if not own and (aside := folder.set_aside()):
            print(f"what an earlier run left in {config.output_dir} was moved to {aside}")

    seen = choose(config, sets.training, device)

    # model: load, and quantise or shard, as it streams -> freeze -> adapt -> checkpoint
    flux, ahead = load_model(config, checkpoint, device, dtype, seen.plan)
    torch.manual_seed(config.seed)
    parameters = [*flux.parameters()] if config.model_type == "full" else add_adapter(config, flux)
    if trained:
        start_from(flux, trained.updates)
        print(f"init_lora {trained.path}: {trained.title}")
    apply_checkpointing(flux, seen.plan.recompute, config.gradient_checkpointing_interval, seen.plan.recompute_less)
    if seen.plan.offload_activations:
        Inputs(flux, device)
    if config.torch_compile and (seen.plan.offload_activations or seen.plan.stream_blocks):
        print("torch_compile is left out: blocks whose inputs or weights come and go would hardly be compiled")
    elif config.torch_compile:
        torch._dynamo.config.recompile_limit = 256  # graphs of a kind of block; torch's own 8 are soon used up
        for block in (*flux.double_blocks, *flux.single_blocks):
            block.compile(dynamic=False)  # one graph for each kind of block and size of batch

    # loop
    vae = examples.vae = validation.vae = load.load_vae(checkpoint, device, torch.float32)
    editor = Editor(flux, vae, checkpoint.shift, presets.preset_of(checkpoint.folder), ahead)
    print(*screen(config, editor, examples, seen), sep="\n")
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate, **config.optimizer_options())
    validator = Validator(editor, validation, items, sampling_of(config), folder)
    evaluator = Evaluator(config, flux, validation, sets.unseen)
    with attention_kernels(device):
        print(Run(config, examples, validator, evaluator, seen).go(optimizer))
    print(parallel.by_first(report.write)(config.output_dir))


if __name__ == "__main__":
    with parallel.errors_in_one_line("train.py", SMALLER):
        main(sys.argv[1:])
