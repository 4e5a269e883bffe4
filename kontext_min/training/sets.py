"""The data list of a config -> planned examples. Whatever is wrong with any set is gathered and said at once."""

from collections import Counter
from dataclasses import dataclass, replace

from kontext_min.config import Config, Dataset, Generator, ValidationItem
from kontext_min.data import pairs
from kontext_min.data.buckets import Geometry, extent, same_aspect
from kontext_min.data.cache import Cache
from kontext_min.data.captions import captions_of
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
    several, dropout = config.conditioning_multidataset_sampling, config.caption_dropout_probability
    masks = (config.masked_loss_probability, config.masked_loss_weight)
    return Mix(config.seed, several, dropout, config.reference_dropout_probability, *masks)


def text_cache(config: Config) -> Cache:
    """Where encoded captions are kept: the text_embeds entry's cache_dir, else a folder of the run's cache."""
    named = [entry.cache_dir for entry in config.datasets() if entry.role == "text_embeds" and entry.cache_dir]
    return Cache(named[0] if named else config.cache_dir / "text")


def read_sets(config: Config, step: int) -> Sets:
    """Find, check and plan every pair; step: training sizes are multiples of it, in pixels. ValueError says all.

    Validation takes the sets of dataset_type eval and what validation_split holds out; without them, the first pairs
    that are trained on.
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


class Reader:
    """Reads all sets of one config; `problems` and `notes` grow as it goes."""

    def __init__(self, config: Config, step: int):
        self.config, self.step = config, step
        self.problems, self.notes = Problems(), []
        self.entries = [entry for entry in config.datasets() if not entry.disabled]
        self.by_id = {entry.id: entry for entry in self.entries}
        self.named_ids = {name for entry in self.entries for name in entry.conditioning_data if name != entry.id}
        twice = [name for name, count in Counter(entry.id for entry in self.entries).items() if count > 1]
        for name in twice:
            self.problems.add("ids that stand twice", name)
        if not self.of("image"):
            self.problems.add("missing sets", "no entry holds targets: give one instance_data_dir")
        if len(self.of("text_embeds")) > 1:
            self.problems.add("ids that stand twice", "there can only be one text_embeds entry")
        self.check_use()

    def of(self, role: str) -> list[Dataset]:
        """The entries of a role. A set that another names as its references is one, whether it says so or not."""
        named = [e.id for e in self.entries if e.role == "image" and e.id in self.named_ids and not e.conditioning_data]
        return [e for e in self.entries if ("conditioning" if e.id in named else e.role) == role]

    def check_use(self):
        """Every reference set serves a target set, so that none is left out by a forgotten or mistyped id."""
        named = self.named_ids
        made = {generated_id(entry, generator) for entry in self.entries for generator in entry.conditioning}
        for entry in self.of("conditioning") if named <= self.by_id.keys() | made else []:  # else: said in `named`
            if entry.id not in named:
                self.problems.add("unused sets", f"{entry.id}: no conditioning_data names it; name or disable it")

    # ------------------------------------------------------------------------------------------- finding

    def plan(self, entry: Dataset) -> list[Example]:
        """The examples of one target set; [] when something is wrong with it."""
        known = self.problems.count()
        targets, captions, found = self.find(entry)
        sets, masks = [s for s in found if not s.mask], [s for s in found if s.mask]
        if len(masks) > 1:
            self.problems.add(
                "incomplete entries", f"{entry.id} names {len(masks)} sets of masks; one is all it can use"
            )
        self.check_captions(entry, sets)
        geometry = self.geometry(entry)
        if self.problems.count() > known:
            return []
        large, small = {}, []
        for name, picture in sorted(targets.items()):
            if entry.minimum_image_size and extent(picture.size(), entry.resolution_type) < entry.minimum_image_size:
                small.append(name)
            else:
                large[name] = picture
        if not large:
            self.problems.add("sets without pictures", f"{entry.id}: all are below minimum_image_size")
        examples = [self.example(entry, geometry, name, large[name], captions[name], sets) for name in large]
        for references in masks:
            examples = [self.masked(e, references.pictures[e.name]) for e in examples]
            self.notes.append(f"{entry.id}: the loss counts where {references.id} is white")
        self.notes += described(entry, examples, sets, small)
        return examples

    def find(self, entry: Dataset) -> tuple[Pictures, dict[str, tuple[str, ...]], list[References]]:
        """Targets, their captions, and complete reference sets."""
        if entry.strategy == "instanceprompt" and not all(map(str.strip, entry.instance_prompt or [""])):
            self.problems.add(
                "incomplete entries", f"{entry.id}: caption_strategy instanceprompt needs instance_prompt"
            )
        if (entry.instance_data_dir is None) == (entry.pairs_file is None):
            self.problems.add("incomplete entries", f"{entry.id} needs instance_data_dir or pairs_file, one of them")
            return {}, {}, []
        if sum(map(bool, (entry.side_by_side, entry.reference_suffix, entry.pairs_file))) > 1:
            text = f"{entry.id}: side_by_side, reference_suffix and pairs_file exclude each other"
            self.problems.add("incomplete entries", text)
        if entry.pairs_file is not None:
            targets, captions, sets = self.from_file(entry)
        else:
            targets, sets = self.from_folder(entry)
            captions = {name: self.captions(entry, picture) for name, picture in targets.items()}
        for name in entry.conditioning_data:
            if name not in [generated_id(entry, generator) for generator in entry.conditioning]:
                sets += self.named(entry, name)
        counts = [f"{len(s.pictures)} references in {s.id}" for s in sets]
        with_caption = sum(bool(texts) for texts in captions.values())
        self.problems.facts.append(
            f"{entry.id}: " + ", ".join([f"{len(targets)} targets", f"{with_caption} captions", *counts])
        )
        for references in sets:
            pairs.match(targets, references.pictures, references.id, self.problems)
        return targets, captions, sets + [self.generated(entry, g, targets) for g in entry.conditioning]

    def captions(self, entry: Dataset, picture: Picture) -> tuple[str, ...]:
        """A picture's captions by its set's strategy."""
        return captions_of(picture.path, entry.strategy, tuple(entry.instance_prompt), self.problems)

    def from_folder(self, entry: Dataset) -> tuple[Pictures, list[References]]:
        """Targets of a folder, and the references that lie in the same folder, if the entry says so."""
        pictures = pairs.in_folder(entry.instance_data_dir, self.problems)
        if entry.strategy == "textfile":
            pairs.check_captions(entry.instance_data_dir, pictures, self.problems)
        if entry.side_by_side:
            targets, references = pairs.side_by_side(pictures, entry.side_by_side.removeprefix("reference_"))
            pairs.check_readable(targets, self.problems)
            return targets, [References(f"{entry.id} (other half)", references, {})]
        pairs.check_readable(pictures, self.problems)
        if entry.reference_suffix:
            targets, references = pairs.by_suffix(pictures, entry.reference_suffix)
            return targets, [References(f"{entry.id} (*{entry.reference_suffix})", references, {})]
        return pictures, []

    def from_file(self, entry: Dataset) -> tuple[Pictures, dict[str, tuple[str, ...]], list[References]]:
        """Targets, captions and reference sets of a pairs file."""
        rows = pairs.from_file(entry.pairs_file, self.problems)
        targets = pairs.check_readable({name: row.target for name, row in rows.items()}, self.problems)
        sets = []
        for i in range(min((len(row.references) for row in rows.values()), default=0)):
            column = {name: row.references[i] for name, row in rows.items()}
            title = f"{entry.pairs_file.name}, reference {i + 1}"
            sets.append(References(title, pairs.check_readable(column, self.problems), {}))
        return targets, {name: row.captions for name, row in rows.items()}, sets

    def named(self, entry: Dataset, name: str) -> list[References]:
        """A reference set by its id."""
        if name not in self.by_id:
            off = name in [other.id for other in self.config.datasets() if other.disabled]
            hint = "; it is disabled" if off else near_miss(name, self.by_id)
            self.problems.add(
                "unknown ids", f"{entry.id}: conditioning_data names {name}, which is no id in the list{hint}"
            )
            return []
        source = self.by_id[name]
        if name == entry.id or source.conditioning_data or source.role in ("eval", "text_embeds"):
            what = "itself" if name == entry.id else f"{name}, which is no reference set: it has conditioning_data"
            what = what if source.role not in ("eval", "text_embeds") else f"{name}, which is a set of {source.role}"
            self.problems.add("circular references", f"{entry.id}: conditioning_data names {what}")
            return []
        if source.instance_data_dir is None:
            self.problems.add("incomplete entries", f"{name} needs an instance_data_dir")
            return []
        if source.instance_data_dir == entry.instance_data_dir:
            text = f"{entry.id} and {name} are the same folder, {source.instance_data_dir}: that would teach copying"
            self.problems.add("circular references", text)
        pictures = pairs.check_readable(pairs.in_folder(source.instance_data_dir, self.problems), self.problems)
        if source.role == "image" and "caption_strategy" not in source.model_fields_set:
            source = source.model_copy(update={"conditioning_type": "reference_strict"})  # its captions are not needed
        if source.conditioning_type == "mask":
            return [References(name, pictures, {}, mask=True)]
        captions = {stem: self.captions(source, picture) for stem, picture in pictures.items()}
        loose = source.conditioning_type == "reference_loose"
        if "resolution" not in source.model_fields_set:  # as large as its targets unless it says otherwise
            size = {"resolution": entry.resolution, "resolution_type": entry.resolution_type}
            source = source.model_copy(update=size)
        return [References(name, pictures, captions, self.geometry(source) if loose else None)]

    def generated(self, entry: Dataset, generator: Generator, targets: Pictures) -> References:
        """The set that a generator makes: the targets, degraded."""
        try:
            check_generator(generator.type, generator.parameters)
        except ValueError as error:
            self.problems.add("generators", f"{entry.id}: {error}")
        if entry.vae_cache_clear_each_epoch and generator.when == "start":
            self.problems.add(
                "generators", f"{entry.id}: vae_cache_clear_each_epoch needs {generator.type} with when: step"
            )
        captions = [generator.captions] if isinstance(generator.captions, str) else generator.captions or []
        if not all(map(str.strip, captions)):
            self.problems.add("generators", f"{entry.id}: one of the captions of {generator.type} is empty")
        return References(
            generated_id(entry, generator), targets, dict.fromkeys(targets, tuple(captions)), None, generator
        )

    def check_captions(self, entry: Dataset, sets: list[References]):
        """Every use needs a caption, and it must be clear whose it is."""
        with_own = [s.id for s in sets if any(s.captions.values())]
        combined = self.config.conditioning_multidataset_sampling == "combined"
        if combined and len(sets) > 1 and with_own:
            self.problems.add(
                "captions", f"{', '.join(with_own)} has captions, which `combined` sets of {entry.id} cannot"
            )
        every_set_has = sets and len(with_own) == len(sets)
        if entry.strategy is None and entry.pairs_file is None and not every_set_has:
            self.problems.add("captions", f"{entry.id} has caption_strategy null, and so have its references")
        names = Counter(s.id for s in sets)
        for name in (name for name, count in names.items() if count > 1):
            self.problems.add("ids that stand twice", f"{entry.id}: {name}; give one generator a name")

    # ------------------------------------------------------------------------------------------- planning

    def geometry(self, entry: Dataset) -> Geometry:
        """How a set's pictures are brought to size."""
        if (entry.maximum_image_size is None) != (entry.target_downsample_size is None):
            self.problems.add("incomplete entries", f"{entry.id}: maximum_image_size needs target_downsample_size too")
        if entry.resolution > (67 if entry.resolution_type == "area" else 8192):
            unit = {"area": "megapixels", "pixel": "pixels", "pixel_area": "pixels"}[entry.resolution_type]
            self.problems.add("sizes that no model takes", f"{entry.id}: resolution {entry.resolution:g} {unit}")
        if entry.maximum_image_size and (entry.target_downsample_size or 0) > entry.maximum_image_size:
            self.problems.add("incomplete entries", f"{entry.id}: target_downsample_size is above maximum_image_size")
        downsample = entry.maximum_image_size and (entry.maximum_image_size, entry.target_downsample_size)
        square = entry.crop and entry.crop_aspect == "square"
        style = entry.crop_style.replace("centre", "center")
        return Geometry(entry.resolution, entry.resolution_type, self.step, square, style, downsample)

    def example(self, entry: Dataset, geometry: Geometry, name: str, picture: Picture, captions, sets) -> Example:
        """One target with one view per reference set."""
        seed = (self.config.seed, entry.id, name)
        crop = Crop(geometry, picture.size(), seed)
        views = []
        for references in sets:
            other, own = references.pictures[name], crop
            if references.generator is not None:
                made = self.degradation(references.generator, references.id, seed)
                views.append(self.view(entry, picture, crop, degradation=made))
                continue
            if references.geometry is not None:
                own = Crop(references.geometry, other.size(), (*seed, references.id))
            else:
                self.check_aspect(other, picture, "strict references", " or use reference_loose")
            views.append(self.view(entry, other, own, strict=references.geometry is None))
        own_captions = tuple(references.captions.get(name, ()) for references in sets)
        folder = entry.cache_dir_vae or self.config.cache_dir / "latents"
        often = (entry.repeats, entry.probability, entry.is_regularisation_data)
        target = self.view(entry, picture, crop)
        return Example(entry.id, name, target, tuple(views), captions, own_captions, folder, *often)

    def check_aspect(self, other: Picture, picture: Picture, what: str, way_out: str = ""):
        """What is cut by a target's transform has its aspect."""
        if not same_aspect(other.size(), picture.size()):
            one, two = f"{other.path} is {other.size()}", f"{picture.path} {picture.size()}"
            self.problems.add(f"{what} of another aspect", f"{one}, {two}; crop them alike{way_out}")

    def masked(self, example: Example, picture: Picture) -> Example:
        """With a mask that is cut exactly as the target is."""
        self.check_aspect(picture, example.target.picture, "masks")
        mask = replace(example.target, picture=picture, mask=True)
        if not self.config.masked_loss_weight and mask.open().getextrema()[0][1] == 0:
            text = f"{picture.path}: what is left after the crop is black, so nothing would be learnt of its target"
            self.problems.add("masks without white", text)
        return replace(example, mask=mask)

    def view(self, entry: Dataset, picture: Picture, crop: Crop, **more) -> View:
        """A picture by its crop, of epoch 0 or anew in every epoch."""
        fresh = entry.vae_cache_clear_each_epoch and entry.crop_style == "random"
        return View(picture, crop.at(0), crop=crop if fresh else None, **more)

    def degradation(self, generator: Generator, set_id: str, seed: tuple) -> Degradation:
        """How one target is degraded, and where the result is kept."""
        kept = generator.instance_data_dir or self.config.cache_dir / "conditioning_data" / set_id
        return Degradation(
            generator.type, generator.parameters, (*seed, set_id), kept if generator.when == "start" else None
        )


def generated_id(entry: Dataset, generator: Generator) -> str:
    """The id of a generator's set: ENTRY_conditioning_TYPE, as SimpleTuner calls it."""
    return f"{entry.id}_conditioning_{generator.name or generator.type}"


def described(entry: Dataset, examples: list[Example], sets: list[References], small: list[str]) -> list[str]:
    """What the screen says of a target set."""
    source = f"of the set ({entry.strategy})" if entry.strategy else "of its references"
    source = f"of {entry.pairs_file.name}" if entry.pairs_file else source
    lines = [f"{entry.id}: {key} is ignored: {why}" for key, why in entry.ignored.items()]
    kind = "" if sets else "; no references: text-to-image"
    count = sum(len(example.captions) for example in examples)
    lines.append(f"{entry.id}: {len(examples)} targets, {count} captions {source}{kind}")
    for references in sets:
        how = "own size (loose)" if references.geometry else "cut like the target (strict)"
        made = references.generator
        if made:
            how = f"made from the targets by {made.type}, {'once' if made.when == 'start' else 'anew at every use'}"
        own = "; its own captions take the place of the targets'" if any(references.captions.values()) else ""
        lines.append(f"  reference {references.id}: {len(references.pictures)} pictures, {how}{own}")
        if made:
            lines.append("    the degraded picture is the reference, the original is the target")
    if small:
        lines.append(f"  {len(small)} left out, below minimum_image_size: {', '.join(small[:5])}")
    return lines
