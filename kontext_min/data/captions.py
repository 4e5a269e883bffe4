"""Where an instruction comes from: a text file beside the picture, its name, or fixed prompts."""

from pathlib import Path

from kontext_min.data.problems import Problems


def captions_of(path: Path, strategy: str | None, prompts: tuple[str, ...], problems: Problems) -> tuple[str, ...]:
    """The captions of a picture, of which one is drawn at every use; () for strategy None.

    textfile: NAME.txt beside NAME.png, one caption a line · filename: NAME with blanks for underscores
    instanceprompt: the set's own prompts.
    """
    if strategy == "textfile":
        return read_textfile(path.with_suffix(".txt"), path, problems)
    if strategy == "filename":
        caption = path.stem.replace("_", " ").strip()
        if not caption:
            problems.add("pictures without a caption", f"{path} (its name says nothing)")
        return (caption,) if caption else ()
    return prompts if strategy == "instanceprompt" else ()


def read_textfile(file: Path, picture: Path, problems: Problems) -> tuple[str, ...]:
    """The lines of a caption file, stripped, empty ones left out."""
    if not file.is_file():
        problems.add("pictures without a caption", f"{picture} ({file.name} is missing)")
        return ()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        problems.add("captions that cannot be read", f"{file} ({error.strerror})")
        return ()
    except UnicodeDecodeError:
        problems.add("captions that are not UTF-8", f"{file}; save it as UTF-8")
        return ()
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        problems.add("pictures without a caption", f"{picture} ({file.name} is empty)")
    return captions
