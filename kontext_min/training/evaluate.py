"""Whether training helps, in numbers: the loss at fixed noise and times, and whether the references matter for it."""

from dataclasses import replace

import torch
from torch import Tensor

from kontext_min import flow, parallel
from kontext_min.config import Config
from kontext_min.data.examples import Examples, Use, use_of
from kontext_min.models.flux import Flux
from kontext_min.run_folder import RunFolder, append
from kontext_min.training.trainer import Draw, flow_loss, guidance, seeded

CLEARLY = 0.99  # a loss below this share of another is clearly lower: the same noise and times make small shares tell
WARNING = """\
the LoRA does not look at its reference: without the right one its loss is hardly higher. Make sure that targets and
references belong together (the same names, the right set in conditioning_data; train.py CONFIG --check draws every
pair), and that the captions do not say all already"""


class Evaluator:
    """The loss of the validation pairs, at the same noise and times at every step; training does not notice it."""

    def __init__(self, config: Config, flux: Flux, examples: Examples, unseen: bool):
        self.config, self.flux, self.examples, self.unseen = config, flux, examples, unseen
        chosen = [] if config.eval_loss_disable else examples.examples[: config.num_eval_pairs]
        self.uses = [use_of(i, example, examples.mix, epoch=0) for i, example in enumerate(chosen)]
        self.shown = [[view.key() for view in use.references] for use in self.uses]
        self.times = [(k + 0.5) / config.eval_timesteps for k in range(config.eval_timesteps)]  # middles of equal parts

    @torch.no_grad()
    def run(self, step: int) -> str:
        """Evaluate. -> what to say of it, nothing without pairs."""
        if not self.uses:
            return ""
        own = torch.stack(parallel.shared_out(self.losses, [(use, use) for use in self.uses]))
        loss, curve, probe = own.mean().item(), [*zip(self.times, own.mean(0).tolist(), strict=True)], self.probe(own)
        warned = bool(step) and ignored(probe)
        line = {"step": step, "loss": loss, "per_timestep": curve, "probe": probe, "pairs": len(self.uses)}
        line |= {"unseen": self.unseen, **({"warning": WARNING} if warned else {})}
        parallel.by_first(append)(RunFolder(self.config.output_dir).eval, line)
        text = f"step {step}: eval loss {loss:.4f} on {len(self.uses)} {'unseen' if self.unseen else 'trained'} pairs"
        for kind, name in (("shuffled", "another pair's reference"), ("none", "no reference")):
            text += f", {probe[kind]:.4f} with {name}" if probe and probe[kind] is not None else ""
        return text + (f"\nwarning: {WARNING}" if warned else "")

    def probe(self, own: Tensor) -> dict[str, float | None] | None:
        uses = [use for use in self.uses if use.references]
        others = [self.other(use) for use in uses]
        shuffled = [] if None in others else [*zip(uses, others, strict=True)]  # a mean is over all pairs, or none
        groups = {"own": [own[use.index] for use in uses], "shuffled": parallel.shared_out(self.losses, shuffled)}
        groups["none"] = parallel.shared_out(self.losses, [(use, None) for use in uses])
        means = {kind: torch.stack(found).mean().item() if found else None for kind, found in groups.items()}
        return means if uses else None

    def other(self, use: Use) -> Use | None:  # the next pair with other references, rather one of the same sizes
        ring = self.uses[use.index + 1 :] + self.uses[: use.index]
        ring = [u for u in ring if u.references and self.shown[u.index] != self.shown[use.index]]
        return min(ring, key=lambda u: u.shape != use.shape, default=None)

    def losses(self, pair: tuple[Use, Use | None]) -> Tensor:
        """(T,) the loss of the first use's target at every time, with the references of the second."""
        (use, shown), device = pair, parallel.place(self.flux)
        batch = self.examples.batch([use], device)
        references = self.examples.batch([shown], device).condition.references if shown else []
        batch = replace(batch, condition=replace(batch.condition, references=references))
        generator = seeded("eval", self.config.validation_seed, use.example.set_id, use.example.name)
        scale, found = guidance(self.config, generator).to(device), []
        for t in self.times:
            noise = flow.draw_noise(batch.target.shape, generator).to(device)
            drawn = Draw(noise, torch.tensor([t], device=device), scale)
            found.append(flow_loss(self.flux, batch, drawn, self.config.loss_type, self.config.huber_c).cpu())
        return torch.stack(found)


def ignored(probe: dict[str, float | None] | None) -> bool:
    return probe is not None and probe["own"] >= CLEARLY * (probe["shuffled"] or probe["none"])
