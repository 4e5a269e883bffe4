"""The data list of a config -> planned examples, for training and for validation. All problems are raised at once."""

from kontext_min.config import Config, Dataset
from kontext_min.data.cache import Cache
from kontext_min.data.examples import Example, plan
from kontext_min.data.pairs import find_pairs


def read_sets(config: Config, step: int) -> tuple[list[Example], list[Example]]:
    """-> (training examples, validation examples). step: training sizes are multiples of it, in pixels.

    Without a set of dataset_type eval, validation takes the first pairs that are trained on.
    """
    datasets = config.datasets()
    by_id = {entry.id: entry for entry in datasets}
    if len(by_id) < len(datasets):
        raise ValueError(f"data: every id may stand only once; got {', '.join(entry.id for entry in datasets)}")
    found, problems = {"image": [], "eval": []}, []
    for entry in datasets:
        if entry.role in found:
            try:
                found[entry.role] += examples_of(config, entry, by_id, step)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
    if not any(entry.role == "image" for entry in datasets):
        problems.append("data: no set of targets; one entry needs instance_data_dir and conditioning_data")
    if problems:
        raise ValueError("\n".join(problems))
    return found["image"], (found["eval"] or found["image"])[: config.num_eval_images]


def examples_of(config: Config, entry: Dataset, by_id: dict[str, Dataset], step: int) -> list[Example]:
    """One target set with its reference sets."""
    unknown = [name for name in entry.conditioning_data if name not in by_id]
    if unknown:
        raise ValueError(f"data: {entry.id} names conditioning_data {', '.join(unknown)}, which is no id in the list")
    if not entry.conditioning_data:
        raise ValueError(f"data: {entry.id} has no conditioning_data; name the id of its reference set")
    sources = [by_id[name] for name in entry.conditioning_data]
    without_folder = [e.id for e in (entry, *sources) if e.instance_data_dir is None]
    if without_folder:
        raise ValueError(f"data: {', '.join(without_folder)} needs an instance_data_dir")
    if entry.caption_strategy is None:
        raise ValueError(f"data: {entry.id} holds targets, so its caption_strategy must be textfile")
    pairs = find_pairs(entry.instance_data_dir, [source.instance_data_dir for source in sources])
    cache_dir = entry.cache_dir_vae or config.cache_dir / "latents"
    strict = [source.conditioning_type != "reference_loose" for source in sources]
    return [plan(pair, entry.resolution, step, strict, cache_dir) for pair in pairs]


def text_cache(config: Config) -> Cache:
    """Where encoded captions are kept: the text_embeds entry's cache_dir, else a folder of the run's cache."""
    named = [entry.cache_dir for entry in config.datasets() if entry.role == "text_embeds" and entry.cache_dir]
    return Cache(named[0] if named else config.cache_dir / "text")
