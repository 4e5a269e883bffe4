"""What validation shows: pairs of the data, and pictures that the user asks for with prompts of their own."""

from dataclasses import dataclass

from kontext_min.config import Config, ValidationItem, checked, read_json5
from kontext_min.data.buckets import Size, Transform, bucket_size, crop_box, nearest_aspect, parse_size
from kontext_min.data.examples import Use, View
from kontext_min.data.pairs import Picture, Problems
from kontext_min.edit import TOKEN
from kontext_min.presets import Preset

TITLE = 60  # letters of a prompt that serve as a name


@dataclass(frozen=True)
class Item:
    """One validation picture: what it is made from, and what it should be where that is known."""

    name: str
    prompt: str
    negative: str
    seed: int
    size: Size
    references: tuple[View, ...] = ()
    target: View | None = None
    unseen: bool | None = None  # of a pair: whether it is kept from training

    def record(self) -> dict:
        said = {key: getattr(self, key) for key in ("name", "prompt", "negative", "seed", "unseen")}
        return said | {"size": str(self.size), "references": len(self.references), "target": self.target is not None}

    def title(self) -> str:
        kind = {True: " (unseen)", False: " (trained on)", None: "" if self.references else " (text-to-image)"}
        name = "" if self.prompt.startswith(self.name) else f"{self.name}: "
        return f"{name}{self.prompt}{kind[self.unseen]}"


def pair_item(config: Config, use: Use, unseen: bool | None) -> Item:
    settings = (use.caption, config.validation_negative_prompt, config.validation_seed, use.target.size)
    return Item(use.example.name, *settings, use.references, use.target, unseen)


def asked(config: Config, problems: Problems) -> list[ValidationItem]:
    """What `validation`, `validation_prompt` and the libraries ask for; what is wrong with it becomes problems."""
    prompt, file, wanted = config.validation_prompt, config.user_prompt_library, list(config.validation)
    wanted += [ValidationItem(prompt=prompt)] if prompt else []
    try:
        library = read_json5(file, dict, 'one object, {"name": "prompt"}') if file else {}
        whole = {name: entry if isinstance(entry, dict) else {"prompt": entry} for name, entry in library.items()}
        wanted += [checked(ValidationItem, {"name": name, **whole[name]}, f"{file}, {name}") for name in whole]
    except (ValueError, FileNotFoundError) as error:
        problems.add("prompt libraries that cannot be read", str(error))
    for item in wanted:
        try:
            sizes_of(item.size or config.validation_resolution)
            for path in item.images or []:
                Picture(path).open()
        except (ValueError, FileNotFoundError) as error:
            problems.add("validation pictures that cannot be made", f"{item.name or item.prompt[:TITLE]}: {error}")
    return wanted


def sizes_of(text: str | None) -> list[Size | None]:
    """'1024x768, 512' -> sizes, a number being a square's side; nothing said -> [None]."""
    parts = [part.strip().lower() for part in text.split(",")] if text else []
    return [parse_size(part if "x" in part else f"{part}x{part}") for part in parts] or [None]


def asked_items(config: Config, wanted: ValidationItem, first: Item, preset: Preset) -> list[Item]:
    """What was asked for, once per size. first: the validation pair whose references serve where none are named.
    Without a size, pictures are what infer.py makes. With one, references keep their aspect at its area; the picture
    is exactly of it if the item itself names it, or has the first reference's size.
    """
    borrowed, name = wanted.images is None, wanted.name or wanted.prompt[:TITLE]
    negative = config.validation_negative_prompt if wanted.negative is None else wanted.negative
    seed = config.validation_seed if wanted.seed is None else wanted.seed
    sizes, items = sizes_of(wanted.size or (None if borrowed else config.validation_resolution)), []
    for size in sizes:
        views = first.references if borrowed else tuple(shown(Picture(path), size, preset) for path in wanted.images)
        if size and (wanted.size or not views):
            own = size.floored(TOKEN)
        else:
            own = first.size if borrowed else views[0].size if views else preset.default
        items.append(Item(name if len(sizes) == 1 else f"{name} {size}", wanted.prompt, negative, seed, own, views))
    return items


def shown(picture: Picture, size: Size | None, preset: Preset) -> View:
    whole = picture.size()
    own = nearest_aspect(whole, preset.sizes)
    if size is not None:
        own = bucket_size(whole.width / whole.height, (size.width * size.height) ** 0.5, TOKEN)
    return View(picture, Transform(own, crop_box(whole, own)))
