"""The data list of a config -> planned examples. Whatever is wrong with any set is gathered and said at once."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby, product, zip_longest

from kontext_min.config import Config, Dataset, Generator, ValidationItem
from kontext_min.data import pairs
from kontext_min.data.buckets import Geometry, Transform, extent, same_aspect
from kontext_min.data.cache import Cache
from kontext_min.data.degrade import check as check_generator
from kontext_min.data.examples import Degradation, Example, Mix, View, draw
from kontext_min.data.pairs import Captions, Picture, Pictures, Problems, near_miss
from kontext_min.training.items import asked


@dataclass(frozen=True)
class Sets:
    """What a config's data list comes to."""

    training: list[Example]
    validation: list[Example]  # the first num_eval_images are shown, all are evaluated
    notes: list[str]  # for the screen: counts, where captions come from, what is made
    unseen: bool  # whether validation is kept from training
    asked: list[ValidationItem]  # what is shown beside the pairs


@dataclass(frozen=True, eq=False)
class Source:
    """The pictures and captions of one set, by the targets' names."""

    id: str
    pictures: Pictures
    captions: Captions
    geometry: Geometry | None = None  # of targets and loose references; None: by the target's own transform
    generator: Generator | None = None  # the pictures are the targets, degraded by it
    mask: bool = False  # the pictures are masks of the targets' loss
    how: str = "cut like the target (strict)"  # references become what the model sees


def mix_of(config: Config) -> Mix:
    dropout = (config.caption_dropout_probability, config.reference_dropout_probability)
    masks = (config.masked_loss_probability, config.masked_loss_weight)
    return Mix(config.seed, config.conditioning_multidataset_sampling, *dropout, *masks)


def text_cache(config: Config) -> Cache:
    named = (entry.cache_dir for entry in config.datasets() if entry.role == "text_embeds" and entry.cache_dir)
    return Cache(next(named, config.cache_dir / "text"))


def read_sets(config: Config, step: int) -> Sets:
    """Find, check and plan every pair; step: training sizes are multiples of it, in pixels. ValueError says all.
    Validation takes eval sets and what validation_split holds out; without them, the first pairs that are trained on.
    """
    reader = Reader(config, config.aspect_bucket_alignment or step)
    wrong, wanted, name = reader.wrong, asked(config, reader.problems), config.eval_dataset_id
    training, unseen = ([e for entry in reader.of(role) for e in reader.plan(entry)] for role in ("image", "eval"))
    if name and name not in {entry.id for entry in reader.of("image", "eval")}:
        wrong("unknown ids", f"eval_dataset_id {name} is no set of targets{near_miss(name, reader.by_id)}")
    chosen = {entry.id for entry in reader.entries if not entry.disable_validation and name in (None, entry.id)}
    held_out = hold_out([e for e in training if e.set_id in chosen], config, reader.problems)
    unseen = [replace(e, regularise=False) for e in unseen if e.set_id in chosen]  # measured beside the true target
    taught = {e.target.picture.path.resolve() for e in training if not e.regularise}
    for path in (e.target.picture.path for e in unseen if e.target.picture.path.resolve() in taught):
        wrong("eval pictures that are trained on", f"{path}; take it out of one of the sets, or use validation_split")
    reader.problems.raise_any()
    apart = {e.name for e in held_out}
    training, unseen = [e for e in training if e.name not in apart], unseen + held_out
    groups = [[*group] for _, group in groupby(unseen, key=lambda e: e.set_id)]
    fallback = [[e for e in training if e.set_id in chosen and not e.regularise]]
    in_turn = [e for row in zip_longest(*(groups or fallback)) for e in row if e]  # one of every set, and so on
    shown, notes = in_turn[: max(config.num_eval_images, config.num_eval_pairs)], reader.problems.facts
    if unseen:
        notes.append(f"{len(unseen)} pairs are never trained on; validation is on {len(shown)} of them")
    elif shown:
        notes.append("validation shows pairs that are trained on; validation_split=4 keeps four from training")
    return Sets(training, shown, notes, bool(unseen), wanted)


def hold_out(examples: list[Example], config: Config, problems: Problems) -> list[Example]:
    """The pairs that validation_split keeps from training: a share of the names below 1, else so many.
    Which ones is a function of (seed, name), so a name is kept from every set, and further pairs change little.
    """
    examples = [e for e in examples if config.validation_split and not e.regularise]
    names = sorted({e.name for e in examples}, key=lambda name: draw("held out", config.seed, name).random())
    share = config.validation_split
    count = max(1, round(share * len(names))) if share < 1 else int(share)
    if names and count >= len(names):
        problems.add("missing sets", f"validation_split {share:g} of {len(names)} pairs leaves none to train on")
    return sorted((e for e in examples if e.name in names[:count]), key=lambda e: names.index(e.name))


class Reader:
    """Reads all sets of one config; `problems` grow as it goes."""

    def __init__(self, config: Config, step: int):
        self.config, self.step, self.problems, listed = config, step, Problems(), config.datasets()
        self.wrong, self.disabled = self.problems.add, {entry.id for entry in listed if entry.disabled}
        self.entries = [entry for entry in listed if not entry.disabled]
        named = {name for entry in self.entries for name in entry.conditioning_data if name != entry.id}
        self.by_id = {entry.id: entry for entry in self.entries}
        for name in (name for name, count in Counter(entry.id for entry in self.entries).items() if count > 1):
            self.wrong("ids that stand twice", name)
        if not self.of("image"):
            self.wrong("missing sets", "no entry holds targets: give one instance_data_dir")
        if len(self.of("text_embeds")) > 1:
            self.wrong("ids that stand twice", "there can only be one text_embeds entry")
        made = [generator.instance_data_dir for entry in self.entries for generator in entry.conditioning]
        for place, entry in product((config.output_dir, config.cache_dir, *filter(None, made)), self.entries):
            if entry.instance_data_dir and place.resolve().is_relative_to(entry.instance_data_dir.resolve()):
                self.wrong("folders of a run among pictures", f"{place} lies in {entry.id}; choose another folder")
        for entry in self.of("conditioning"):
            if entry.id not in named:
                self.wrong("unused sets", f"{entry.id}: no conditioning_data names it; name or disable it")

    def of(self, *roles: str) -> list[Dataset]:
        return [entry for entry in self.entries if entry.role in roles]

    def plan(self, entry: Dataset) -> list[Example]:
        """The examples of one target set, from what lies on disk; [] when something is wrong with it."""
        known = self.problems.count()
        if (entry.instance_data_dir is None) == (entry.pairs_file is None):
            self.wrong("incomplete entries", f"{entry.id} needs instance_data_dir or pairs_file, one of them")
            return []
        pictures, captions, beside = self.targets(entry)
        others = [Source(name, found, {}) for name, found in beside.items()]
        made = [generated_id(entry, generator) for generator in entry.conditioning]
        others += filter(None, [self.named(entry, name) for name in entry.conditioning_data if name not in made])
        pairs.check_readable([pictures, *(source.pictures for source in others)], self.problems)
        for source in others:
            pairs.match(pictures, source.pictures, source.id, self.problems)
        others += [self.generated(entry, generator, pictures) for generator in entry.conditioning]
        self.problems.facts += described(entry, captions, others)
        targets = Source(entry.id, pictures, captions, self.geometry(entry))
        self.check(entry, others)
        if self.problems.count() > known:
            return []
        least, unit = entry.minimum_image_size or 0, entry.resolution_type
        small = [name for name in sorted(pictures) if extent(pictures[name].size(), unit) < least]
        text = f"{entry.id}: {len(small)} left out, below minimum_image_size: {', '.join(small[:5])}"
        self.problems.facts += [text] if small else []
        if len(small) == len(pictures):
            why = "all are below minimum_image_size" if small else f"{entry.pairs_file} lists none"
            self.wrong("sets without pictures", f"{entry.id}: {why}")
        return [self.example(entry, targets, others, name) for name in sorted(pictures.keys() - small)]

    def targets(self, entry: Dataset) -> tuple[Pictures, Captions, dict[str, Pictures]]:
        """Targets and captions by name, and the references that lie in the same file or folder."""
        if file := entry.pairs_file:
            pictures, captions, columns = pairs.from_file(file, self.problems)
            return pictures, captions, {f"{file.name}, reference {i}": c for i, c in enumerate(columns, 1)}
        pictures, beside = pairs.in_folder(entry.instance_data_dir, self.problems), {}
        if entry.strategy == "textfile":
            pairs.check_captions(entry.instance_data_dir, pictures, self.problems)
        if half := entry.side_by_side:
            pictures, beside[f"{entry.id} (other half)"] = pairs.side_by_side(pictures, half.removeprefix("reference_"))
        elif suffix := entry.reference_suffix:
            pictures, beside[f"{entry.id} (*{suffix})"] = pairs.by_suffix(pictures, suffix)
        return pictures, self.captions(entry, pictures), beside

    def captions(self, entry: Dataset, pictures: Pictures) -> Captions:
        how = (entry.strategy, tuple(entry.instance_prompt), self.problems)
        return {name: pairs.captions_of(picture.path, *how) for name, picture in pictures.items()}

    def named(self, entry: Dataset, name: str) -> Source | None:
        """A reference set by its id."""
        source = self.by_id.get(name)
        if source is None:
            hint = "; it is disabled" if name in self.disabled else near_miss(name, self.by_id)
            return self.wrong("unknown ids", f"{entry.id}: conditioning_data names {name}, which is no id{hint}")
        if name == entry.id or source.conditioning_data or source.role in ("eval", "text_embeds"):
            why = "it has conditioning_data" if source.conditioning_data else f"it is a set of {source.role}"
            what = "itself" if name == entry.id else f"{name}, which is no reference set: {why}"
            return self.wrong("circular references", f"{entry.id}: conditioning_data names {what}")
        if source.instance_data_dir is None:
            return self.wrong("incomplete entries", f"{name} needs an instance_data_dir")
        if source.instance_data_dir == entry.instance_data_dir:
            what = f"{entry.id} and {name} are the same folder, {source.instance_data_dir}"
            self.wrong("circular references", f"{what}: that would teach copying")
        pictures = pairs.in_folder(source.instance_data_dir, self.problems)
        if source.conditioning_type == "mask":
            return Source(name, pictures, {}, mask=True, how="the loss counts where they are white")
        captions = self.captions(source, pictures)
        if source.conditioning_type != "reference_loose":
            return Source(name, pictures, captions)
        if "resolution" not in source.model_fields_set:  # as large as its targets
            source = source.model_copy(update=entry.model_dump(include={"resolution", "resolution_type"}))
        return Source(name, pictures, captions, self.geometry(source), how="own size (loose)")

    def generated(self, entry: Dataset, generator: Generator, targets: Pictures) -> Source:
        """The set that a generator makes: the targets, degraded."""
        kind, kept = generator.type, generator.when == "start"
        try:
            check_generator(kind, generator.parameters)
        except ValueError as error:
            self.wrong("generators", f"{entry.id}: {error}")
        if entry.vae_cache_clear_each_epoch and kept:
            self.wrong("generators", f"{entry.id}: vae_cache_clear_each_epoch needs {kind} with when: step")
        captions = [generator.captions] if isinstance(generator.captions, str) else generator.captions or []
        if not all(map(str.strip, captions)):
            self.wrong("generators", f"{entry.id}: one of the captions of {kind} is empty")
        how = f"made from the targets by {kind}, {'once' if kept else 'anew at every use'}"
        how += ": the degraded picture is the reference, the original the target"
        own = dict.fromkeys(targets, tuple(captions))
        return Source(generated_id(entry, generator), targets, own, generator=generator, how=how)

    def check(self, entry: Dataset, others: list[Source]):
        """Every use needs a caption, it must be clear whose it is, and what a set says must agree."""
        references = [source for source in others if not source.mask]
        with_own, masks = [s.id for s in references if any(s.captions.values())], len(others) - len(references)
        if entry.strategy == "instanceprompt" and not all(map(str.strip, entry.instance_prompt or [""])):
            self.wrong("incomplete entries", f"{entry.id}: caption_strategy instanceprompt needs instance_prompt")
        if sum(map(bool, (entry.side_by_side, entry.reference_suffix, entry.pairs_file))) > 1:
            self.wrong("incomplete entries", f"{entry.id}: of side_by_side, reference_suffix, pairs_file give one")
        if masks > 1:
            self.wrong("incomplete entries", f"{entry.id} names {masks} sets of masks; one is all it can use")
        if self.config.conditioning_multidataset_sampling == "combined" and len(references) > 1 and with_own:
            self.wrong("captions", f"{', '.join(with_own)} has captions, which `combined` sets of {entry.id} cannot")
        if not (entry.strategy or entry.pairs_file) and not (with_own and len(with_own) == len(references)):
            self.wrong("captions", f"{entry.id} has caption_strategy null, and so have its references")
        for name in (name for name, count in Counter(source.id for source in references).items() if count > 1):
            self.wrong("ids that stand twice", f"{entry.id}: {name}; give one generator a name")

    def geometry(self, entry: Dataset) -> Geometry:
        unit, largest, downsampled = entry.resolution_type, entry.maximum_image_size, entry.target_downsample_size
        if (largest is None) != (downsampled is None):
            self.wrong("incomplete entries", f"{entry.id}: maximum_image_size needs target_downsample_size too")
        if largest and (downsampled or 0) > largest:
            self.wrong("incomplete entries", f"{entry.id}: target_downsample_size is above maximum_image_size")
        if not 16 <= (1000 * entry.resolution**0.5 if unit == "area" else entry.resolution) <= 8192:
            what = f"resolution {entry.resolution:g} in {unit}; area counts megapixels, pixel and pixel_area pixels"
            self.wrong("sizes that no model takes", f"{entry.id}: {what}")
        square, style = entry.crop and entry.crop_aspect == "square", entry.crop_style.replace("centre", "center")
        return Geometry(entry.resolution, unit, self.step, square, style, largest and (largest, downsampled))

    def example(self, entry: Dataset, targets: Source, others: list[Source], name: str) -> Example:
        target = view(entry, targets.pictures[name], targets.geometry, (self.config.seed, entry.id, name))
        views = {source: self.other(entry, source, target, name) for source in others}
        references = {source: made for source, made in views.items() if not source.mask}
        mask = next((made for made in views.values() if made.mask), None)
        captions = (targets.captions[name], tuple(source.captions.get(name, ()) for source in references))
        folder = entry.cache_dir_vae or self.config.cache_dir / "latents"
        often = (entry.repeats, entry.probability, entry.is_regularisation_data)
        return Example(entry.id, name, target, tuple(references.values()), *captions, folder, *often, mask)

    def other(self, entry: Dataset, source: Source, target: View, name: str) -> View:
        """What a set has for a target: a reference, or the mask."""
        picture, seed = source.pictures[name], (self.config.seed, entry.id, name, source.id)
        if made := source.generator:
            kept = made.instance_data_dir or self.config.cache_dir / "conditioning_data" / source.id
            how = Degradation(made.type, made.parameters, seed, kept if made.when == "start" else None)
            return replace(target, degradation=how)
        if source.geometry:
            return view(entry, picture, source.geometry, seed)
        if not same_aspect(picture.size(), target.picture.size()):
            kind, loose = "masks" if source.mask else "strict references", source.id in self.by_id and not source.mask
            what = f"{picture.path} is {picture.size()}, {target.picture.path} {target.picture.size()}"
            self.wrong(f"{kind} of another aspect", f"{what}; crop them alike{' or use reference_loose' * loose}")
        cut = replace(target, picture=picture, strict=not source.mask, mask=source.mask)
        if cut.mask and not self.config.masked_loss_weight and cut.open().getextrema()[0][1] == 0:
            what = "what is left after the crop is black, so nothing would be learnt of its target"
            self.wrong("masks without white", f"{picture.path}: {what}")
        return cut


def view(entry: Dataset, picture: Picture, geometry: Geometry, seed: tuple[str | int, ...]) -> View:
    size = picture.size()

    def crop(number: int) -> Transform:
        return geometry.transform(size, tuple(draw("crop", *seed, number).random(2).tolist()))

    anew = entry.vae_cache_clear_each_epoch and geometry.style == "random"
    return View(picture, crop(0), crop=crop if anew else None)


def generated_id(entry: Dataset, generator: Generator) -> str:
    return f"{entry.id}_conditioning_{generator.name or generator.type}"


def described(entry: Dataset, captions: Captions, others: list[Source]) -> list[str]:
    source = f"of the set ({entry.strategy})" if entry.strategy else "of its references"
    source = f"of {entry.pairs_file.name}" if entry.pairs_file else source
    kind = "" if any(not other.mask for other in others) else "; no references: text-to-image"
    lines = [f"{entry.id}: {key} is ignored: {why}" for key, why in entry.ignored.items()]
    lines.append(f"{entry.id}: {len(captions)} targets, {sum(map(len, captions.values()))} captions {source}{kind}")
    for other in others:
        own = "; its own captions take the place of the targets'" if any(other.captions.values()) else ""
        lines.append(f"{entry.id}, reference {other.id}: {len(other.pictures)} pictures, {other.how}{own}")
    return lines
