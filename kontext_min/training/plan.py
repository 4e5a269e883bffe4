"""What a run will take, counted before it begins, and what gives way where that is more than there is."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from kontext_min import flow, memory, parallel, presets
from kontext_min.adapters.inject import updates
from kontext_min.checkpoints import load
from kontext_min.config import Config, read_json5
from kontext_min.data.buckets import Size
from kontext_min.data.check import histogram
from kontext_min.data.examples import Example, Examples
from kontext_min.edit import TOKEN, Editor
from kontext_min.memory import FUSED, FUSED_BACKWARD, GB, LESS, POLICIES, size_of
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.vae import VAE, VAEConfig
from kontext_min.quantize import QuantisedLinear, form_of, is_modulation, is_quantised, parts_of
from kontext_min.training.adapter import add_adapter
from kontext_min.training.optim import make_optimizer

CARDS = read_json5(Path(__file__).parents[1] / "cards.json5")
SPARE, WORKSPACE = 1.0, 0.9  # GB: left free of a budget; CUDA's own, and gaps between tensors


@dataclass(frozen=True)
class Plan:
    """What may be chosen of a run without changing what it learns."""

    recompute: str = "block"  # a policy of `apply_checkpointing`
    recompute_less: int = 0  # blocks, the last, have the next policy
    modulation_on_cpu: bool = False
    offload_activations: bool = False  # the checkpointed blocks' inputs wait in the host's memory
    stream_blocks: bool = False  # so do the blocks' weights

    def possible(self) -> bool:  # where nothing is computed again, no inputs wait
        return not (self.offload_activations and self.recompute == "none")

    def __str__(self) -> str:
        less = [f"{LESS[self.recompute]} of the last {self.recompute_less} blocks"] * (self.recompute_less > 0)
        return ", ".join([self.recompute, *less, *(name for name, chosen in vars(self).items() if chosen is True)])


PLANS = [Plan(policy, 0, cpu) for policy in reversed(POLICIES) for cpu in (False, True)]  # the fastest first
PLANS += [Plan("block", 0, True, True), *(Plan(policy, 0, True, True, True) for policy in reversed(POLICIES[:-1]))]
CHANGES = [  # of a config, that save memory, those that cost the least time first
    {"modulation_on_cpu": True}, {"gradient_checkpointing": True, "recompute": "keep_attn"},
    {"offload_activations": True}, {"gradient_checkpointing": True, "recompute": "block"},
    {"base_model_precision": "int8-torchao"}, {"base_model_precision": "nf4"}, {"stream_blocks": True},
]  # fmt: skip


class Forecast:
    """What a config's run takes by any plan, by a batch of its largest use, counted on meta.
    cuda: whether it runs there; plan: what is chosen; card: an entry of CARDS, or None.
    """

    def __init__(self, config: Config, examples: list[Example], cuda: bool, plan: Plan | None = None, card=None):
        self.config, self.examples, self.cuda, self.card, self.counts = config, examples, cuda, card, {}
        self.plan = plan or Plan(**named(config))
        several = None if config.conditioning_multidataset_sampling == "combined" else -1
        uses = [[e.target.size, *sorted((v.size for v in e.references), key=math.prod)[several:]] for e in examples]
        self.sizes = max(uses, key=lambda sizes: sum(map(math.prod, sizes)))
        self.text = presets.preset_of(config.pretrained_model_name_or_path).text_shape[0]
        self.tokens = config.train_batch_size * (self.text + sum(map(math.prod, self.sizes)) // TOKEN**2)
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.flux = flux = on_meta(config, self.dtype)
        tensors, width = [*flux.named_parameters(), *flux.named_buffers()], flux.config.hidden_size
        sizes = {name: size_of(tensor) for name, tensor in tensors if not tensor.requires_grad}
        self.modulation = sum(size for name, size in sizes.items() if is_modulation(name))
        rest = {name: size for name, size in sizes.items() if "_blocks." in name and not is_modulation(name)}
        largest = sum(size for name, size in rest.items() if name.startswith("double_blocks.0."))
        self.kept = sum(sizes.values()) if form_of(config.base_model_precision) else 0  # bytes on disk
        self.blocks, self.away = sum(rest.values()), max(0, sum(rest.values()) - 3 * largest)
        blocks = [*flux.double_blocks, *flux.single_blocks]
        self.again = max(1, len(blocks[: -1 : config.gradient_checkpointing_interval]))  # those computed again
        inputs = [self.tokens * width * self.dtype.itemsize] * max(0, self.again - 2)  # two are on the device
        self.inputs, both = sum(inputs), (inputs, rest.values())
        self.pinned = [sum(1 << (size - 1).bit_length() for size in sizes) for sizes in both]  # as torch takes it

    def work(self, policy: str) -> memory.Counted:
        """A batch, forward and backward, by a policy of `apply_checkpointing`, or none."""
        if policy not in self.counts:
            flux = on_meta(self.config.model_copy(update={"model_type": "lora"}), self.dtype)
            memory.apply_checkpointing(flux, policy, self.config.gradient_checkpointing_interval)
            sizes, uses = flux.config, self.config.train_batch_size
            with torch.device("meta"):
                shapes = [(uses, sizes.in_channels // 4, 2 * h // TOKEN, 2 * w // TOKEN) for w, h in self.sizes]
                x, *references = map(torch.empty, shapes)
                txt = torch.empty(uses, self.text, sizes.context_in_dim, dtype=self.dtype)
                seen = flow.Condition(txt, torch.empty(uses, sizes.vec_in_dim, dtype=self.dtype), references)
                t = torch.empty(uses)
                found = memory.counted(lambda: flow.velocity(flux, x, t, seen, t).float().square().mean())
            self.counts[policy] = found
        return self.counts[policy]

    def step(self, plan: Plan) -> tuple[float, dict]:
        """Bytes at most, and work, of a batch; of two policies their shares, within 5 % of what it is."""
        one, share = self.work(plan.recompute), min(1, plan.recompute_less / self.again)
        two = self.work(LESS[plan.recompute]) if share else one
        works = [{**counts.flops, "moved": counts.moved} for counts in (one, two)]
        work = {what: count + share * (works[1][what] - count) for what, count in works[0].items()}
        return one.peak + share * (two.peak - one.peak), work

    def parts(self, plan: Plan) -> dict[str, float]:  # bytes on the device, by what they are
        config = self.config
        vae, picture = decoding(config.pretrained_model_name_or_path, self.sizes[0])
        step = self.step(plan)[0] - plan.offload_activations * self.inputs
        parts = memory.held(self.flux, bytes_of_one(config), self.dtype, parallel.world(), config.sharded)
        parts["transformer"] -= plan.modulation_on_cpu * self.modulation + plan.stream_blocks * self.away
        parts |= {f"a batch of {self.tokens} tokens, forward and backward": step, "VAE": vae}
        parts["a picture in the VAE, beyond a batch"] = max(0, picture - step)
        return parts | {"CUDA's own, and gaps": self.cuda * WORKSPACE * GB}

    def total(self, plan: Plan) -> float:  # GB on the device
        return sum(self.parts(plan).values()) / GB

    def host(self, plan: Plan) -> float:  # GB in the host's memory
        inputs, blocks = self.pinned
        streamed = plan.offload_activations * inputs + plan.stream_blocks * blocks
        return (plan.modulation_on_cpu * self.modulation + streamed) / GB

    def seconds(self, plan: Plan, card: dict) -> float:
        (_, work), (kind, _, how) = self.step(plan), self.config.base_model_precision.partition("-")
        rates = {FUSED: card["attention"], FUSED_BACKWARD: card["attention_backward"], "moved": card["memory_rate"]}
        linears = (how == "dynamic" and card[kind]) or card["bf16"]
        times = sum(count / rates.get(operator, linears) for operator, count in work.items())
        copied = 2 * (plan.offload_activations * self.inputs + plan.stream_blocks * self.blocks)
        return max(times / 1e12, copied / GB / card["pcie"]) * self.config.gradient_accumulation_steps

    def fitting(self, budget: float) -> Plan | None:
        """The first of PLANS, with what the config names, that fits so many GB, and then some blocks by less."""
        own = named(self.config)
        plans = filter(Plan.possible, (replace(plan, **own) for plan in PLANS))
        plan = next((plan for plan in plans if self.total(plan) + SPARE <= budget), None)
        faster = plan and replace(plan, recompute=LESS[plan.recompute])
        if faster in (None, plan) or "recompute_less" in own or not faster.possible():
            return plan
        room, more = budget - SPARE - self.total(plan), self.total(faster) - self.total(plan)
        return replace(plan, recompute_less=min(self.again, int(self.again * room / max(more, 1e-9))))

    def lines(self) -> list[str]:
        lines = [f"{size / GB:8.3f} GB  {name}" for name, size in self.parts(self.plan).items() if size]
        lines.append(f"{self.total(self.plan):8.3f} GB  in all, by {self.plan}")
        lines += [f"{self.host(self.plan):8.3f} GB  of the host's memory"] * (self.host(self.plan) > 0)
        return lines + ([self.time(self.plan, self.card)] if self.card else [])

    def time(self, plan: Plan, card: dict) -> str:
        seconds = self.seconds(plan, card)
        return f"{seconds:.2f} s a step, {seconds * self.config.max_train_steps / 3600:.1f} hours in all"

    def cards(self) -> list[str]:
        lines = [f"{self.config.cache_dir / 'base'} will take {self.kept / GB:.1f} GB"] * (self.kept > 0)
        lines.append(f"on one GPU, a batch of {self.tokens} tokens:")
        for name, card in CARDS.items():
            plan = self.fitting(card["memory"])
            said = plan and f"{self.total(plan):5.1f} GB, {self.time(plan, card)}, by {plan}"
            lines.append(f"  {name}, {card['memory']:3} GB: {said or 'does not fit'}")
        return lines

    def beside(self, lines: list[dict]) -> str:
        told = f"{self.total(self.plan) - self.cuda * WORKSPACE:.1f} GB"
        told += f", {self.seconds(self.plan, self.card):.2f} s a step" if self.card else ""
        seconds = statistics.median(line["seconds"] for line in lines)
        return f"measured {max(line['memory'] for line in lines):.1f} GB, {seconds:.2f} s a step; predicted {told}"

    def remedies(self) -> str:
        """The three cheapest changes of the config that would take less memory, and how much less."""
        found, now = [], self.total(self.plan)
        for change in CHANGES:
            changed = {key: value for key, value in change.items() if getattr(self.config, key) != value}
            config = self.config.model_copy(update=changed)
            other = Forecast(config, self.examples, self.cuda, replace(self.plan, **named(config)))
            other.counts = self.counts
            if (saved := now - other.total(other.plan)) > 0.01 * now:
                found.append(" ".join(f"{key}={value}" for key, value in changed.items()) + f" saves {saved:.2g} GB")
            if len(found) == 3:
                break
        return ", ".join(found) or "use a smaller resolution"


def named(config: Config) -> dict[str, str | bool]:
    said = config.model_dump(include=set(vars(Plan())), exclude_none=True)
    said |= {} if config.gradient_checkpointing else {"recompute": "none"}
    return {"recompute_less": 0} | said if "recompute" in said else said


def choose(config: Config, examples: list[Example], device: torch.device) -> Forecast:
    """What a config's run takes on a device, its plan fitting `memory`, auto being what is free; or ValueError.
    Where there is neither a number nor CUDA, and of a model in shards, nothing is chosen that is not named.
    """
    found, budget = Forecast(config, examples, device.type == "cuda"), config.memory
    if found.cuda:
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
        found.card = next((card for key, card in CARDS.items() if key in name), None)
        budget = (free + torch.cuda.memory_reserved(device)) / GB if budget == "auto" else budget
    if budget != "auto" and not config.sharded:
        if not (plan := found.fitting(budget)):
            found.plan = replace(PLANS[-1], **named(config))
            least = f"{found.total(found.plan) + SPARE:.1f} GB by {found.plan}; {found.remedies()}"
            raise ValueError(f"memory: {budget:.1f} GB are too few. The run needs {least}, a smaller resolution more")
        found.plan = plan
    return found


@cache
def decoding(model: str, size: Size) -> tuple[int, int]:
    _, vae = networks(model)
    latents = (1, vae.config.latent_channels, *(side // vae.config.factor for side in size))
    with torch.no_grad():
        peak = memory.counted(lambda: vae.decode(torch.empty(latents, device="meta"))).peak
    return sum(map(size_of, vae.parameters())), peak


def networks(model: str) -> tuple[Flux, VAE]:
    try:
        found = load.find(presets.locate(model), download=False)
        return load.empty_flux(found)[0], load.on_meta(VAE, load.vae_config, found.components["vae"])[0]
    except FileNotFoundError:
        with torch.device("meta"):
            return Flux(FluxConfig()), VAE(VAEConfig())


def on_meta(config: Config, dtype: torch.dtype) -> Flux:
    """The config's transformer without weights, as it would be trained."""
    flux, form, parts = networks(config.pretrained_model_name_or_path)[0], form_of(config.base_model_precision), {}
    if config.model_type == "full":
        return flux
    flux.to(dtype).requires_grad_(False)
    for stem in [name.removesuffix(".weight") for name, _ in flux.named_parameters() if form and is_quantised(name)]:
        linear = flux.get_submodule(stem)
        of = parts[linear.weight.shape] = parts.get(linear.weight.shape) or parts_of(linear.weight, form)
        own = {name: part.clone() for name, part in of.items()}
        flux.set_submodule(stem, QuantisedLinear(linear, own, form.endswith("-dynamic")))
    with torch.device("meta"):
        add_adapter(config, flux)
    return flux


def bytes_of_one(config: Config) -> float:
    """What a trained parameter takes with its gradient, the optimizer's state and the average: asked of a step."""
    probe = nn.Parameter(torch.zeros(64, 64))  # where 8-bit moments begin
    optimizer = make_optimizer(config.optimizer, [probe], 0.0, **config.optimizer_options())
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    state = [value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor)]
    return sum(map(size_of, (probe, probe.grad, *state))) / probe.numel() + 4 * config.use_ema


def screen(config: Config, editor: Editor, examples: Examples, forecast: Forecast) -> list[str]:
    """One screen, line by line."""
    flux, ranks = editor.flux, parallel.world()
    frozen = sum(p.numel() for p in flux.parameters() if not p.requires_grad)
    frozen += sum(m.in_features * m.out_features for m in flux.modules() if isinstance(m, QuantisedLinear))
    trained = sum(p.numel() for p in flux.parameters() if p.requires_grad)
    kinds = Counter(update.kind for update in updates(flux)).items()
    batches, share = examples.epoch(0, config.train_batch_size), config.gradient_accumulation_steps * ranks
    steps, uses = len(batches) / share, sum(map(len, batches))
    pairs, epochs = sum(bool(e.references) for e in examples.examples), config.max_train_steps / max(1e-9, steps)
    adapter = ", ".join(f"{kind} on {n} modules" for kind, n in kinds) or "none"
    return [
        f"model    {config.pretrained_model_name_or_path}: {frozen:,} frozen parameters, on {editor.device}",
        *[f"ranks    {ranks}, each with batches of its own"] * (ranks > 1),
        f"adapter  {adapter}: {trained:,} trainable parameters",
        f"data     {pairs} pairs and {len(examples.examples) - pairs} pictures without a reference",
        f"epoch    {uses} uses in {len(batches)} batches: {steps:.6g} steps; "
        f"max_train_steps {config.max_train_steps} is {epochs:.1f} epochs",
        *histogram(examples.examples),
        "memory:" if ranks == 1 else "memory of each rank:",
        *forecast.lines(),
    ]


def per_rank(forecast: Forecast) -> list[str]:  # what one GPU of several would hold, in GB: a table of ways to train
    config, peak = forecast.config, forecast.work("block").peak
    kept = "" if config.base_model_precision == "no_change" else f", {config.base_model_precision}"
    plain = config.model_copy(update={"base_model_precision": "no_change"})
    ways = {f"LoRA, the base{kept} on every GPU": config, "LoRA, the base in shards (fsdp_enable)": plain}
    ways["all parameters, in shards (model_type full)"] = plain.model_copy(update={"model_type": "full"})
    lines = [f"GB on each GPU, {forecast.tokens} tokens a step, recompute block; GPUs:{'':13}1      2      4      8"]
    for way, asked in ways.items():
        flux, each = on_meta(asked, forecast.dtype), bytes_of_one(config)
        found = [memory.held(flux, each, forecast.dtype, ranks, asked is not config) for ranks in (1, 2, 4, 8)]
        lines.append(f"  {way:74}" + "".join(f"{(sum(parts.values()) + peak) / memory.GB:7.1f}" for parts in found))
    return lines
