"""What a run will take, counted before it begins, and what gives way where that is more than there is."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import json5
import torch
from torch import Tensor, nn

from kontext_min import memory, parallel, presets
from kontext_min.checkpoints import load
from kontext_min.config import Config
from kontext_min.data.buckets import Size
from kontext_min.data.examples import Batch, Example
from kontext_min.encoders import tile
from kontext_min.flow import Condition
from kontext_min.memory import FUSED, FUSED_BACKWARD, GB, size_of
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.vae import VAE, VAEConfig
from kontext_min.quantize import QuantisedLinear, form_of, is_quantised, parts_of
from kontext_min.training.adapter import add_adapter
from kontext_min.training.items import TOKEN
from kontext_min.training.optim import make_optimizer
from kontext_min.training.trainer import Draw, flow_loss

CARDS = json5.loads((Path(__file__).parents[1] / "cards.json5").read_text(encoding="utf-8"))
SPARE, WORKSPACE = 1.0, 0.9  # GB: left free of a budget; CUDA's context and libraries, and gaps between tensors
RING = 3  # blocks on the device at once where they are streamed
MODULATION = ("mod.lin.", "modulation.", "time_in.", "guidance_in.", "vector_in.")  # in names of what sees no tokens


@dataclass(frozen=True)
class Plan:
    """What may be chosen of a run without changing what it learns."""

    recompute: str = "block"  # a policy of `apply_checkpointing`, or none
    modulation_on_cpu: bool = False
    offload_activations: bool = False  # the checkpointed blocks' inputs wait in the host's memory
    stream_blocks: bool = False  # the blocks' weights, too
    vae_tiling: bool = False

    def __str__(self) -> str:
        return ", ".join([self.recompute, *(name for name, chosen in vars(self).items() if chosen is True)])


POLICIES = ("keep_gemm", "keep_attn", "block")
PLANS = [Plan(policy, on_cpu) for policy in POLICIES for on_cpu in (False, True)]
PLANS += [Plan("block", True, True), Plan("block", True, True, True)]  # from the fastest to the smallest


class Forecast:
    """What a config's run takes by any plan, its largest batch counted on meta; `choose` sets `plan` and `card`.

    sizes: of the target and the references that a use shows; cuda: whether it runs there.
    """

    def __init__(self, config: Config, sizes: list[Size], cuda: bool):
        self.config, self.sizes, self.cuda, self.plan, self.card = config, sizes, cuda, Plan(), None
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.text = presets.named(config.pretrained_model_name_or_path).text_shape[0]
        self.tokens = config.train_batch_size * (self.text + sum(map(math.prod, sizes)) // TOKEN**2)
        self.flux, self.counts, self.pictures = on_meta(config, self.dtype, config.model_type == "full"), {}, {}
        self.modulation, self.host_modulation, blocks = 0, 0, Counter()  # bytes
        for name, module in self.flux.named_modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            frozen = sum(size_of(tensor) for tensor in tensors if not tensor.requires_grad)
            if any(part in f"{name}." for part in MODULATION):
                self.modulation += frozen
                numbers = module.in_features * module.out_features if hasattr(module, "out_features") else 0
                self.host_modulation += numbers * self.dtype.itemsize  # never quantised there
            elif "_blocks." in name:
                blocks[".".join(name.split(".")[:2])] += frozen
        self.streamed, self.ring = sum(blocks.values()), RING * max(blocks.values())
        inputs = len([*blocks][: -1 : config.gradient_checkpointing_interval or 1]) - 2  # two are on the device
        self.inputs = max(0, inputs) * self.tokens * self.flux.config.hidden_size * self.dtype.itemsize

    def plans(self) -> list[Plan]:
        """All that may be chosen, from the fastest to the smallest; what the config names is so in each."""
        both = [
            replace(plan, **{"vae_tiling": tiling} | named(self.config)) for plan in PLANS for tiling in (False, True)
        ]
        return list(dict.fromkeys(both))

    def fitting(self, budget: float) -> Plan | None:
        """The first plan that leaves something of so many GB."""
        return next((plan for plan in self.plans() if self.total(plan) + SPARE <= budget), None)

    def work(self, policy: str) -> memory.Counted:
        """A batch, forward and backward, by a policy of `apply_checkpointing`, or none. Gradients are there before."""
        if policy not in self.counts:
            flux = on_meta(self.config, self.dtype, full := self.config.model_type == "full")
            for parameter in (flux.to(self.dtype) if full else flux).parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            if policy != "none":
                memory.apply_checkpointing(flux, policy, self.config.gradient_checkpointing_interval or 1)
            with torch.device("meta"):
                self.counts[policy] = memory.counted(partial(self.loss, flux))
        return self.counts[policy]

    def loss(self, flux: Flux) -> Tensor:
        """Of the batch, without values."""
        uses, sizes = self.config.train_batch_size, flux.config
        shapes = [(uses, sizes.in_channels // 4, 2 * h // TOKEN, 2 * w // TOKEN) for w, h in self.sizes]
        target, *references = map(torch.empty, shapes)
        txt = torch.empty(uses, self.text, sizes.context_in_dim, dtype=self.dtype)
        vec, t = torch.empty(uses, sizes.vec_in_dim, dtype=self.dtype), torch.empty(uses)
        return flow_loss(
            flux, Batch(target, Condition(txt, vec, references)), Draw(target, t, t), self.config.loss_type
        )

    def picture(self, tiling: bool) -> tuple[int, int]:
        """Bytes of the VAE, and of what decoding a target takes."""
        if tiling not in self.pictures:
            vae, (width, height) = networks(self.config)[1], self.sizes[0]
            latents = torch.empty(1, vae.config.latent_channels, 2 * height // TOKEN, 2 * width // TOKEN, device="meta")
            vae = tile(vae) if tiling else vae
            peak = memory.counted(torch.no_grad()(partial(vae.decode, latents))).peak
            self.pictures[tiling] = sum(map(size_of, vae.parameters())), peak
        return self.pictures[tiling]

    def parts(self, plan: Plan) -> dict[str, float]:
        """Bytes on the device, by what they are."""
        config, step, vae, picture = self.config, self.work(plan.recompute).peak, *self.picture(plan.vae_tiling)
        parts = memory.held(self.flux, bytes_of_one(config), self.dtype, parallel.world(), config.sharded)
        parts["transformer"] -= plan.modulation_on_cpu * self.modulation
        parts["transformer"] -= plan.stream_blocks * max(0, self.streamed - self.ring)
        step -= plan.offload_activations * self.inputs
        parts |= {f"a batch of {self.tokens} tokens, forward and backward": step, "VAE": vae}
        parts["what decoding a picture takes beyond that"] = max(0, picture - step)
        return parts | {"CUDA, and what lies between tensors": self.cuda * WORKSPACE * GB}

    def total(self, plan: Plan) -> float:
        """GB on the device."""
        return sum(self.parts(plan).values()) / GB

    def host(self, plan: Plan) -> tuple[float, float]:
        """GB in the host's memory, and GB that cross to the device or back in a batch."""
        moved = plan.stream_blocks * self.streamed + plan.offload_activations * self.inputs
        return (plan.modulation_on_cpu * self.host_modulation + moved) / GB, 2 * moved / GB

    def seconds(self, plan: Plan, card: dict) -> float:
        """Of a step on a card of CARDS: its FLOPs, or what is copied meanwhile if that takes longer."""
        flops, precision = self.work(plan.recompute).flops, self.config.base_model_precision
        rate = card[precision.removesuffix("-dynamic") if precision.endswith("-dynamic") else "bf16"] or card["bf16"]
        linears = flops.total() - flops[FUSED] - flops[FUSED_BACKWARD]
        attention = flops[FUSED] / card["attention"] + flops[FUSED_BACKWARD] / card["attention_backward"]
        batch = max((linears / rate + attention) / 1e12, self.host(plan)[1] / card["pcie"])
        return batch * self.config.gradient_accumulation_steps

    def lines(self) -> list[str]:
        """The memory of the plan, part by part, and on a known card its time."""
        lines = [f"{size / GB:8.3f} GB  {name}" for name, size in self.parts(self.plan).items() if size]
        lines.append(
            f"{self.total(self.plan):8.3f} GB  in all, by {self.plan}; of the host's {self.host(self.plan)[0]:.1f} GB"
        )
        return lines + ([f"time     {self.time(self.plan, self.card)}"] if self.card else [])

    def time(self, plan: Plan, card: dict) -> str:
        """Of a step, and of the run."""
        seconds = self.seconds(plan, card)
        return f"{seconds:.2f} s a step, {seconds * self.config.max_train_steps / 3600:.1f} hours in all"

    def beside(self, lines: list[dict]) -> str:
        """What was measured, by lines of metrics.jsonl, beside what was predicted, where something was."""
        seconds = statistics.median(line["seconds"] for line in lines)
        tensors = self.total(self.plan) - self.cuda * WORKSPACE
        said = f"measured: {max(line.get('memory', 0) for line in lines):.1f} GB"
        said += f" (predicted {tensors:.1f})" if self.cuda else ""
        said += f", {seconds:.2f} s a step"
        return said + (f" (predicted {self.seconds(self.plan, self.card):.2f})" if self.card else "")

    def cards(self) -> list[str]:
        """What every card of CARDS would do."""
        lines = [f"one card, by `memory` auto, a batch of {self.tokens} tokens:"]
        for name, card in CARDS.items():
            plan = self.fitting(card["memory"])
            fits = plan and f"{self.total(plan):5.1f} GB, {self.time(plan, card)}, by {plan}"
            lines.append(f"  {name} with {card['memory']:3} GB  {fits or 'does not fit'}")
        return lines

    def remedies(self) -> str:
        """The three cheapest changes not yet in force that would take less memory, and how much less."""
        now = self.total(self.plan)
        smaller = ((way, now - total) for way, total in self.ways())
        best = islice(((way, saved) for way, saved in smaller if saved > 0.05), 3)
        return ", ".join(f"{way} (saves {saved:.1f} GB)" for way, saved in best)

    def ways(self) -> Iterator[tuple[str, float]]:
        """Changes of the config, those that cost the least time first, and the GB that are taken then."""
        plan, config = self.plan, self.config
        if plan.recompute == "none":
            yield "gradient_checkpointing=true", self.total(replace(plan, recompute="block"))
        else:
            yield "modulation_on_cpu=true", self.total(replace(plan, modulation_on_cpu=True))
            yield "offload_activations=true", self.total(replace(plan, offload_activations=True))
            for policy in POLICIES[POLICIES.index(plan.recompute) + 1 :]:
                yield f"recompute={policy}", self.total(replace(plan, recompute=policy))
        for precision in ("int8-torchao", "nf4"):
            changed = config.model_copy(update={"base_model_precision": precision})
            yield f"base_model_precision={precision}", Forecast(changed, self.sizes, self.cuda).total(plan)
        halves = [Size(max(TOKEN, w // 2), max(TOKEN, h // 2)) for w, h in self.sizes[1:]]
        yield "references of half the size", Forecast(config, [self.sizes[0], *halves], self.cuda).total(plan)
        yield "stream_blocks=true", self.total(replace(plan, stream_blocks=True))


def named(config: Config) -> dict[str, str | bool]:
    """The parts of a plan that the config names."""
    said = config.model_dump(include={"recompute", "modulation_on_cpu", "offload_activations", "stream_blocks"})
    said |= {"vae_tiling": config.vae_enable_tiling}
    said |= {} if config.gradient_checkpointing else {"recompute": "none"}
    return {name: value for name, value in said.items() if value is not None}


def forecast(config: Config, examples: list[Example], cuda: bool) -> Forecast:
    """Of the largest use of the examples."""
    several = None if config.conditioning_multidataset_sampling == "combined" else -1
    uses = [[e.target.size, *sorted((v.size for v in e.references), key=math.prod)[several:]] for e in examples]
    return Forecast(config, max(uses, key=lambda sizes: sum(map(math.prod, sizes))), cuda)


def choose(config: Config, examples: list[Example], device: torch.device) -> Forecast:
    """What the config's run takes on a device; its `plan` fits `memory`, auto being the card's. ValueError if none does.

    Without a number, a CUDA device, or where the model is in shards, nothing is chosen that the config does not name.
    """
    found, cuda = forecast(config, examples, device.type == "cuda"), device.type == "cuda"
    found.plan = Plan(**named(config))
    if cuda:
        found.card = next((card for name, card in CARDS.items() if name in torch.cuda.get_device_name(device)), None)
    auto = torch.cuda.get_device_properties(device).total_memory / GB if cuda else None
    budget = auto if config.memory == "auto" else config.memory
    if budget and not config.sharded:
        if not (plan := found.fitting(budget)):
            least = min(found.plans(), key=found.total)
            raise ValueError(
                f"memory {budget:g} GB is too little: with {least} this takes {found.total(least):.1f}, and {SPARE:g} stays "
                f"free; set {found.remedies()}"
            )
        found.plan = plan
    return found


def networks(config: Config) -> tuple[Flux, VAE]:
    """The config's transformer and autoencoder without weights; of the published sizes if they are not here."""
    try:
        found = load.find(presets.locate(config.pretrained_model_name_or_path), download=False)
        return load.empty_flux(found)[0], load.on_meta(VAE, load.vae_config, *load.opened(found, "vae"))
    except FileNotFoundError:
        with torch.device("meta"):
            return Flux(FluxConfig()), VAE(VAEConfig())


def on_meta(config: Config, dtype: torch.dtype, full: bool = False, quantised: bool = True) -> Flux:
    """The config's transformer without weights, as it would be trained."""
    flux, _ = networks(config)
    if full:
        return flux
    flux.to(dtype).requires_grad_(False)
    form, parts = form_of(config.base_model_precision) if quantised else None, {}
    for stem in [name.removesuffix(".weight") for name, _ in flux.named_parameters() if form and is_quantised(name)]:
        linear = flux.get_submodule(stem)
        kind = linear.weight.shape
        parts[kind] = parts.get(kind) or parts_of(linear.weight, form)
        own = {name: part.clone() for name, part in parts[kind].items()}
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
