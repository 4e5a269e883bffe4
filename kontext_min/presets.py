"""What belongs to a published model beside its weights: its name, where it lies, and its preferred picture sizes."""

from dataclasses import dataclass
from pathlib import Path

from kontext_min.checkpoints.load import read_json
from kontext_min.data.buckets import Size

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class Preset:
    """Sizes in pixels: references and outputs are brought to the preferred one that is nearest in aspect."""

    name: str
    default: Size  # of a picture made without a reference
    sizes: tuple[Size, ...]
    bucket_step: int  # training sizes are multiples of it
    text_shape: tuple[int, int]  # of one encoded instruction: tokens, channels


def both_ways(*sizes: tuple[int, int]) -> tuple[Size, ...]:  # upright ones -> also lying ones, from narrow to wide
    return tuple(Size(w, h) for w, h in sizes) + tuple(Size(h, w) for w, h in reversed(sizes) if w != h)


KONTEXT_SIZES = both_ways(
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024)
)  # fmt: skip
KONTEXT_DEV = Preset("kontext", Size(1024, 1024), KONTEXT_SIZES, bucket_step=64, text_shape=(512, 4096))
NANO = Preset("nano", Size(96, 96), both_ways((64, 128), (80, 112), (96, 96)), bucket_step=16, text_shape=(24, 128))


def locate(model: str) -> str:
    """A name given by a user -> what `checkpoints.load.find` takes: a folder in weights/ where there is one."""
    if model == NANO.name:
        return str(WEIGHTS / NANO.name)
    owner, _, name = model.rpartition("/")
    copied = WEIGHTS / name  # where the README says to put a model that was downloaded by hand
    return str(copied) if owner and copied.is_dir() and name != NANO.name and not Path(model).exists() else model


def preset_of(model: str | Path) -> Preset:
    """The preset of a model, named by a user or found: nano says so in model_index.json, all others are Kontext-dev."""
    index = Path(locate(str(model))) / "model_index.json"
    name = read_json(index).get("_name_or_path") if index.exists() else None
    return NANO if name == NANO.name else KONTEXT_DEV
