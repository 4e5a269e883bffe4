"""Where an instruction comes from: a text file beside the picture, its name, or fixed prompts."""

from pathlib import Path

from kontext_min.data.problems import Problems


def captions_of(path: Path, strategy: str | None, prompts: tuple[str, ...], problems: Problems) -> tuple[str, ...]:
    """The captions of a picture, of which one is drawn at every use; () for strategy None.

    textfile: NAME.txt beside NAME.png, one caption a line · filename: NAME with blanks for underscores
    instanceprompt: the set's own prompts.
    """
    if strategy == "filename":
        captions, why = [path.stem.replace("_", " ")], "its name says nothing"
    elif strategy == "textfile":
        captions, why = read_textfile(path.with_suffix(".txt"))
    else:
        return prompts if strategy else ()
    captions = tuple(caption.strip() for caption in captions if caption.strip())
    if not captions:
        problems.add("pictures without a caption", f"{path} ({why})")
    return captions


def read_textfile(file: Path) -> tuple[list[str], str]:
    """The lines of a caption file, and why there are none if there are none."""
    if not file.is_file():
        return [], f"{file.name} is missing"
    try:
        return file.read_text(encoding="utf-8-sig").splitlines(), f"{file.name} is empty"
    except OSError as error:
        return [], f"{file.name}: {error.strerror}"
    except UnicodeDecodeError:
        return [], f"{file.name} is not UTF-8"
