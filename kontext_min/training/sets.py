"""The data list of a config -> planned examples. Whatever is wrong with any set is gathered and said at once."""

from collections import Counter
from dataclasses import dataclass, replace

from kontext_min.config import Config, Dataset, Generator, ValidationItem
from kontext_min.data import pairs
from kontext_min.data.buckets import Geometry, extent, same_aspect
from kontext_min.data.cache import Cache
from kontext_min.data.degrade import check as check_generator
from kontext_min.data.examples import Crop, Degradation, Example, Mix, View, draw
from kontext_min.data.pairs import Picture, Pictures
from kontext_min.data.problems import Problems, near_miss
from kontext_min.training.items import asked


@dataclass(frozen=True)
class Sets:
    """What a config's data list comes to."""

    training: list[Example]
    validation: list[Example]  # the first num_eval_images are shown, all are evaluated
    notes: list[str]  # for the screen: counts, where captions come from, what is made
    unseen: bool = False  # whether validation is kept from training
    asked: tuple[ValidationItem, ...] = ()  # what is shown beside the pairs


@dataclass(frozen=True)
class References:
    """One reference set of a target set: pictures and captions by the targets' names, and their geometry."""

    id: str
    pictures: Pictures
    captions: dict[str, tuple[str, ...]]
    geometry: Geometry | None = None  # None: strict, by the target's own transform
    generator: Generator | None = None  # the pictures are the targets, degraded by it
    mask: bool = False  # the pictures are masks of the targets' loss


def mix_of(config: Config) -> Mix:
    """What an epoch shows."""
    dropout = (config.caption_dropout_probability, config.reference_dropout_probability)
    masks = (config.masked_loss_probability, config.masked_loss_weight)
    return Mix(config.seed, config.conditioning_multidataset_sampling, *dropout, *masks)


def text_cache(config: Config) -> Cache:
    """Where encoded captions are kept: the text_embeds entry's cache_dir, else a folder of the run's cache."""
    named = [entry.cache_dir for entry in config.datasets() if entry.role == "text_embeds" and entry.cache_dir]
    return Cache(named[0] if named else config.cache_dir / "text")


def read_sets(config: Config, step: int) -> Sets:
    """Find, check and plan every pair; step: training sizes are multiples of it, in pixels. ValueError says all.

    Validation takes eval sets and what validation_split holds out; without them, the first pairs that are trained on.
    """
    reader = Reader(config, config.aspect_bucket_alignment or step)
    found = {role: [e for entry in reader.of(role) for e in reader.plan(entry)] for role in ("image", "eval")}
    wanted = asked(config, reader.problems)
    chosen = {entry.id for entry in reader.entries if not entry.disable_validation}
    if config.eval_dataset_id is not None:
        if config.eval_dataset_id not in {entry.id for role in found for entry in reader.of(role)}:
            hint = near_miss(config.eval_dataset_id, reader.by_id)
            reader.problems.add("unknown ids", f"eval_dataset_id {config.eval_dataset_id} is no set of targets{hint}")
        chosen &= {config.eval_dataset_id}
    held_out = hold_out([e for e in found["image"] if e.set_id in chosen], config, reader.problems)
    reader.problems.raise_any()
    apart = {(e.set_id, e.name) for e in held_out}
    training = [e for e in found["image"] if (e.set_id, e.name) not in apart]
    notes = reader.notes + [f"{count} {remark}" for remark, count in reader.problems.remarks.items() if count]
    unseen = [e for e in found["eval"] if e.set_id in chosen] + held_out
    if unseen:
        notes.append(f"{len(unseen)} pairs are never trained on; validation is on these")
        return Sets(training, unseen[: max(config.num_eval_images, config.num_eval_pairs)], notes, True, tuple(wanted))
    shown = [e for e in training if e.set_id in chosen][: config.num_eval_images]
    if shown:
        notes.append("validation shows pairs that are trained on; validation_split=4 keeps four from training")
    return Sets(training, shown, notes, False, tuple(wanted))


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


@dataclass(frozen=True)
class Found:
    """A target set as it lies on disk: pictures and captions by name, reference sets, a set of masks among them."""

    targets: Pictures
    captions: dict[str, tuple[str, ...]]
    sets: list[References]


class Reader:
    """Reads all sets of one config; `problems` and `notes` grow as it goes."""

    def __init__(self, config: Config, step: int):
        self.config, self.step = config, step
        self.problems, self.notes = Problems(), []
        self.wrong = self.problems.add
        listed = config.datasets()
        self.disabled = {entry.id for entry in listed if entry.disabled}
        entries = [entry for entry in listed if not entry.disabled]
        named = {name for entry in entries for name in entry.conditioning_data if name != entry.id}
        strict = {"conditioning_type": "reference_strict"}  # a set that another names as its references is one
        self.entries = [
            e.model_copy(update=strict) if e.id in named and e.role == "image" and not e.conditioning_data else e
            for e in entries
        ]
        self.by_id = {entry.id: entry for entry in self.entries}
        for name, count in Counter(entry.id for entry in entries).items():
            if count > 1:
                self.wrong("ids that stand twice", name)
        if not self.of("image"):
            self.wrong("missing sets", "no entry holds targets: give one instance_data_dir")
        if len(self.of("text_embeds")) > 1:
            self.wrong("ids that stand twice", "there can only be one text_embeds entry")
        made = {generated_id(entry, generator) for entry in entries for generator in entry.conditioning}
        for entry in self.of("conditioning") if named <= self.by_id.keys() | made else []:  # else: said in `named`
            if entry.id not in named:
                self.wrong("unused sets", f"{entry.id}: no conditioning_data names it; name or disable it")

    def of(self, role: str) -> list[Dataset]:
        """The entries of a role."""
        return [entry for entry in self.entries if entry.role == role]

    def plan(self, entry: Dataset) -> list[Example]:
        """The examples of one target set; [] when something is wrong with it."""
        known = self.problems.count()
        found = self.find(entry)
        self.check_captions(entry, found)
        geometry = self.geometry(entry)
        if self.problems.count() > known:
            return []
        least, unit = entry.minimum_image_size, entry.resolution_type
        small = [name for name in sorted(found.targets) if least and extent(found.targets[name].size(), unit) < least]
        names = sorted(found.targets.keys() - small)
        if not names:
            self.wrong("sets without pictures", f"{entry.id}: all are below minimum_image_size")
        examples = [self.example(entry, geometry, found, name) for name in names]
        self.notes += described(entry, examples, found, small)
        return examples

    def find(self, entry: Dataset) -> Found:
        """Targets, their captions, and complete reference sets."""
        if entry.strategy == "instanceprompt" and not all(map(str.strip, entry.instance_prompt or [""])):
            self.wrong("incomplete entries", f"{entry.id}: caption_strategy instanceprompt needs instance_prompt")
        if sum(map(bool, (entry.side_by_side, entry.reference_suffix, entry.pairs_file))) > 1:
            what = "side_by_side, reference_suffix and pairs_file exclude each other"
            self.wrong("incomplete entries", f"{entry.id}: {what}")
        if (entry.instance_data_dir is None) == (entry.pairs_file is None):
            self.wrong("incomplete entries", f"{entry.id} needs instance_data_dir or pairs_file, one of them")
            return Found({}, {}, [])
        if file := entry.pairs_file:
            targets, captions, columns = pairs.from_file(file, self.problems)
            sets = [References(f"{file.name}, reference {i}", column, {}) for i, column in enumerate(columns, 1)]
            found = Found(targets, captions, sets)
        else:
            found = self.in_folder(entry)
        made = [generated_id(entry, generator) for generator in entry.conditioning]
        for name in entry.conditioning_data:
            if name not in made and (references := self.named(entry, name)):
                found.sets.append(references)
        pairs.check_readable([found.targets, *(s.pictures for s in found.sets)], self.problems)
        counts = [f"{len(found.targets)} targets", f"{sum(map(bool, found.captions.values()))} captions"]
        counts += [f"{len(references.pictures)} references in {references.id}" for references in found.sets]
        self.problems.facts.append(f"{entry.id}: {', '.join(counts)}")
        for references in found.sets:
            pairs.match(found.targets, references.pictures, references.id, self.problems)
        found.sets.extend(self.generated(entry, generator, found.targets) for generator in entry.conditioning)
        return found

    def captions(self, entry: Dataset, pictures: Pictures) -> dict[str, tuple[str, ...]]:
        """The captions of a set's pictures by its strategy."""
        how = (entry.strategy, tuple(entry.instance_prompt), self.problems)
        return {name: pairs.captions_of(picture.path, *how) for name, picture in pictures.items()}

    def in_folder(self, entry: Dataset) -> Found:
        """Targets of a folder, and the references that lie in the same folder, if the entry says so."""
        pictures, sets = pairs.in_folder(entry.instance_data_dir, self.problems), []
        if entry.strategy == "textfile":
            pairs.check_captions(entry.instance_data_dir, pictures, self.problems)
        if entry.side_by_side:
            pictures, others = pairs.side_by_side(pictures, entry.side_by_side.removeprefix("reference_"))
            sets = [References(f"{entry.id} (other half)", others, {})]
        elif entry.reference_suffix:
            pictures, others = pairs.by_suffix(pictures, entry.reference_suffix)
            sets = [References(f"{entry.id} (*{entry.reference_suffix})", others, {})]
        return Found(pictures, self.captions(entry, pictures), sets)

    def named(self, entry: Dataset, name: str) -> References | None:
        """A reference set by its id."""
        source = self.by_id.get(name)
        if source is None:
            hint = "; it is disabled" if name in self.disabled else near_miss(name, self.by_id)
            what = f"conditioning_data names {name}, which is no id in the list{hint}"
            return self.wrong("unknown ids", f"{entry.id}: {what}")
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
            return References(name, pictures, {}, mask=True)
        geometry = None
        if source.conditioning_type == "reference_loose":  # as large as its targets unless it says otherwise
            size = {"resolution": entry.resolution, "resolution_type": entry.resolution_type}
            stated = "resolution" in source.model_fields_set
            geometry = self.geometry(source if stated else source.model_copy(update=size))
        return References(name, pictures, self.captions(source, pictures), geometry)

    def generated(self, entry: Dataset, generator: Generator, targets: Pictures) -> References:
        """The set that a generator makes: the targets, degraded."""
        try:
            check_generator(generator.type, generator.parameters)
        except ValueError as error:
            self.wrong("generators", f"{entry.id}: {error}")
        if entry.vae_cache_clear_each_epoch and generator.when == "start":
            what = f"vae_cache_clear_each_epoch needs {generator.type} with when: step"
            self.wrong("generators", f"{entry.id}: {what}")
        captions = [generator.captions] if isinstance(generator.captions, str) else generator.captions or []
        if not all(map(str.strip, captions)):
            self.wrong("generators", f"{entry.id}: one of the captions of {generator.type} is empty")
        own = dict.fromkeys(targets, tuple(captions))
        return References(generated_id(entry, generator), targets, own, generator=generator)

    def check_captions(self, entry: Dataset, found: Found):
        """Every use needs a caption, and it must be clear whose it is."""
        sets = [references for references in found.sets if not references.mask]
        masks = len(found.sets) - len(sets)
        if masks > 1:
            self.wrong("incomplete entries", f"{entry.id} names {masks} sets of masks; one is all it can use")
        with_own = [references.id for references in sets if any(references.captions.values())]
        if self.config.conditioning_multidataset_sampling == "combined" and len(sets) > 1 and with_own:
            what = f"{', '.join(with_own)} has captions, which `combined` sets of {entry.id} cannot"
            self.wrong("captions", what)
        if entry.strategy is None and entry.pairs_file is None and not (sets and len(with_own) == len(sets)):
            self.wrong("captions", f"{entry.id} has caption_strategy null, and so have its references")
        for name, count in Counter(references.id for references in sets).items():
            if count > 1:
                self.wrong("ids that stand twice", f"{entry.id}: {name}; give one generator a name")

    def geometry(self, entry: Dataset) -> Geometry:
        """How a set's pictures are brought to size."""
        largest, downsampled = entry.maximum_image_size, entry.target_downsample_size
        if (largest is None) != (downsampled is None):
            self.wrong("incomplete entries", f"{entry.id}: maximum_image_size needs target_downsample_size too")
        if entry.resolution > (67 if entry.resolution_type == "area" else 8192):
            unit = "megapixels" if entry.resolution_type == "area" else "pixels"
            self.wrong("sizes that no model takes", f"{entry.id}: resolution {entry.resolution:g} {unit}")
        if largest and (downsampled or 0) > largest:
            self.wrong("incomplete entries", f"{entry.id}: target_downsample_size is above maximum_image_size")
        square = entry.crop and entry.crop_aspect == "square"
        style = entry.crop_style.replace("centre", "center")
        downsample = largest and (largest, downsampled)
        return Geometry(entry.resolution, entry.resolution_type, self.step, square, style, downsample)

    def example(self, entry: Dataset, geometry: Geometry, found: Found, name: str) -> Example:
        """One target with one view per reference set, and its mask."""
        picture, seed = found.targets[name], (self.config.seed, entry.id, name)
        target = view(entry, picture, Crop(geometry, picture.size(), seed))
        views, own_captions, mask = [], [], None
        for references in found.sets:
            other = references.pictures[name]
            if references.mask:
                mask = self.mask(other, target)
                continue
            own_captions.append(references.captions.get(name, ()))
            own_seed = (*seed, references.id)
            if made := references.generator:
                kept = made.instance_data_dir or self.config.cache_dir / "conditioning_data" / references.id
                how = Degradation(made.type, made.parameters, own_seed, kept if made.when == "start" else None)
                views.append(replace(target, degradation=how))
            elif references.geometry:
                views.append(view(entry, other, Crop(references.geometry, other.size(), own_seed)))
            else:
                self.check_aspect(other, picture, "strict references", " or use reference_loose")
                views.append(replace(target, picture=other, strict=True))
        folder = entry.cache_dir_vae or self.config.cache_dir / "latents"
        often = (entry.repeats, entry.probability, entry.is_regularisation_data)
        captions = (found.captions[name], tuple(own_captions))
        return Example(entry.id, name, target, tuple(views), *captions, folder, *often, mask)

    def check_aspect(self, other: Picture, picture: Picture, what: str, way_out: str = ""):
        """What is cut by a target's transform has its aspect."""
        if not same_aspect(other.size(), picture.size()):
            one, two = f"{other.path} is {other.size()}", f"{picture.path} {picture.size()}"
            self.wrong(f"{what} of another aspect", f"{one}, {two}; crop them alike{way_out}")

    def mask(self, picture: Picture, target: View) -> View:
        """A mask that is cut exactly as its target is."""
        self.check_aspect(picture, target.picture, "masks")
        mask = replace(target, picture=picture, mask=True)
        if not self.config.masked_loss_weight and mask.open().getextrema()[0][1] == 0:
            text = f"{picture.path}: what is left after the crop is black, so nothing would be learnt of its target"
            self.wrong("masks without white", text)
        return mask


def view(entry: Dataset, picture: Picture, crop: Crop) -> View:
    """A picture by its crop, of epoch 0 or anew in every epoch."""
    fresh = entry.vae_cache_clear_each_epoch and entry.crop_style == "random"
    return View(picture, crop.at(0), crop=crop if fresh else None)


def generated_id(entry: Dataset, generator: Generator) -> str:
    """The id of a generator's set: ENTRY_conditioning_TYPE, as SimpleTuner calls it."""
    return f"{entry.id}_conditioning_{generator.name or generator.type}"


def described(entry: Dataset, examples: list[Example], found: Found, small: list[str]) -> list[str]:
    """What the screen says of a target set."""
    source = f"of the set ({entry.strategy})" if entry.strategy else "of its references"
    source = f"of {entry.pairs_file.name}" if entry.pairs_file else source
    kind = "" if examples and examples[0].references else "; no references: text-to-image"
    count = sum(len(example.captions) for example in examples)
    lines = [f"{entry.id}: {key} is ignored: {why}" for key, why in entry.ignored.items()]
    lines.append(f"{entry.id}: {len(examples)} targets, {count} captions {source}{kind}")
    for references in found.sets:
        how = "own size (loose)" if references.geometry else "cut like the target (strict)"
        if made := references.generator:
            how = f"made from the targets by {made.type}, {'once' if made.when == 'start' else 'anew at every use'}"
            how += ": the degraded picture is the reference, the original the target"
        how = "the loss counts where they are white" if references.mask else how
        own = "; its own captions take the place of the targets'" if any(references.captions.values()) else ""
        lines.append(f"  reference {references.id}: {len(references.pictures)} pictures, {how}{own}")
    if small:
        lines.append(f"  {len(small)} left out, below minimum_image_size: {', '.join(small[:5])}")
    return lines
