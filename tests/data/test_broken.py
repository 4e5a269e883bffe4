"""Everything that can be wrong with a data list is refused in one message that names the file or the key.

Each function of the table breaks a good dataset: it gets the folder of the pictures and the entries of the list, and
may return other values of the config. The parts that the message must hold stand above it.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

import train
from kontext_min.data import pairs
from kontext_min.data.pairs import Problems

ROOT = Path(__file__).parents[2]
CASES = []


def broken(*parts, findings=1):
    """Put a function into the table. findings: how many lines name something."""

    def add(function):
        CASES.append(pytest.param(function, parts, findings, id=function.__name__))
        return function

    return add


def save(path, size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)


def dataset(folder):
    """Two good pairs with captions, a subfolder among them -> their folder and the entries of the data list."""
    data = folder / "data"
    for name in ("a", "sub/b"):
        for kind in ("target", "reference"):
            save(data / kind / f"{name}.png")
        (data / "target" / f"{name}.txt").write_text("make it red\n")
    target = {"id": "edits", "instance_data_dir": str(data / "target"), "conditioning_data": ["refs"], "resolution": 32}
    reference = {"id": "refs", "instance_data_dir": str(data / "reference"), "conditioning_type": "reference_strict"}
    return data, [target, reference]


def write_config(folder, entries, **values):
    """Beside the data, as are the outputs."""
    (folder / "data.json").write_text(json.dumps(entries))
    config = {
        "pretrained_model_name_or_path": "nano",
        "data_backend_config": str(folder / "data.json"),
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        **values,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


def snapshot(folder):
    """Everything that an innocent program leaves alone."""
    return {
        path: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def rows(data, entries, *lines, name="pairs.jsonl"):
    """Make the target entry read a pairs file. lines: mappings, or text as it is."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (data / name).write_text(text + "\n")
    entries[:] = [{"id": "edits", "pairs_file": str(data / name), "resolution": 32}]


GOOD = {"target": "target/a.png", "reference": "reference/a.png", "caption": "make it red"}

# ------------------------------------------------------------------------------------------- files and partners


@broken("1 targets without a reference", "target/sub/b.png: no sub/b in refs")
def missing_reference(data, entries):
    (data / "reference/sub/b.png").unlink()


@broken("1 references without a target", "reference/c.png")
def orphan_reference(data, entries):
    save(data / "reference/c.png")


@broken("1 captions without a picture", "target/lost.txt")
def orphan_caption(data, entries):
    (data / "target/lost.txt").write_text("paint it red")


@broken("target/a.png: no a in refs; did you mean A?", "reference/A.png; did you mean a?", findings=2)
def case_mismatch(data, entries):
    (data / "reference/a.png").rename(data / "reference/A.png")


@broken("1 names with several pictures", "target/a.jpg, a.png; keep one of them")
def duplicate_stem(data, entries):
    save(data / "target/a.jpg")


@broken("1 unreadable pictures", "target/a.jpg is not a readable picture", "truncated")
def truncated_jpeg(data, entries):
    (data / "target/a.png").unlink()
    save(data / "target/a.jpg", (200, 133))
    save(data / "reference/a.png", (200, 133))
    (data / "target/a.jpg").write_bytes((data / "target/a.jpg").read_bytes()[:-400])


@broken("1 unreadable pictures", "reference/a.png is not a readable picture")
def zero_byte_picture(data, entries):
    (data / "reference/a.png").write_bytes(b"")


@broken("1 unreadable pictures", "target/a.png is not a readable picture")
def text_named_png(data, entries):
    (data / "target/a.png").write_text("I am not a picture")


@broken("1 unreadable pictures", "reference/a.png is too large to be a photograph (Image size (2500000000 pixels)")
def decompression_bomb(data, entries):
    header = b"IHDR" + struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, pixels)]
    (data / "reference/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@broken("strict references of another aspect", "reference/a.png is 48x40", "target/a.png 48x32", "reference_loose")
def other_aspect_in_strict(data, entries):
    save(data / "reference/a.png", (48, 40))


@broken("1 folders without pictures", "reference/none", ".png", findings=3)  # and every target lacks its partner
def empty_folder(data, entries):
    (data / "reference/none").mkdir()
    entries[1]["instance_data_dir"] = str(data / "reference/none")


@broken("1 folders that cannot be read", "/nowhere", "instance_data_dir")
def missing_folder(data, entries):
    entries[0]["instance_data_dir"] = str(data / "nowhere")
    shutil.rmtree(data / "reference")
    (data / "reference").mkdir()
    entries[:] = entries[:1]
    del entries[0]["conditioning_data"]


@broken("1 folders that cannot be read", "target/a.png/below")
def folder_below_a_file(data, entries):
    entries[0] = {"id": "edits", "instance_data_dir": str(data / "target/a.png/below")}
    del entries[1]


@broken("1 unreadable pictures", "target/a.png is too narrow to hold two pictures")
def half_of_one_pixel(data, entries):
    save(data / "target/a.png", (1, 1))
    entries[:] = [{**entries[0], "conditioning_data": [], "side_by_side": "reference_left"}]


@broken("1 unreadable pictures", "does not exist or is not a file")
def impossible_name(data, entries):
    rows(data, entries, {**GOOD, "target": "a" * 500 + ".png"})


@broken("sets without pictures", "edits", "minimum_image_size")
def all_too_small(data, entries):
    entries[0]["minimum_image_size"] = 500


@broken("sets without pictures", "edits", "pairs.jsonl lists none")
def no_lines(data, entries):
    rows(data, entries)


@broken("1 folders of a run among pictures", "data/target/out lies in edits; choose another folder")
def output_among_the_targets(data, entries):
    return {"output_dir": str(data / "target/out")}


@broken("1 folders of a run among pictures", "data/target/made lies in edits; choose another folder")
def made_references_among_the_targets(data, entries):
    entries[0]["conditioning"] = [{"type": "superresolution", "instance_data_dir": str(data / "target/made")}]


# ---------------------------------------------------------------------------------------------------- captions


@broken("1 pictures without a caption", "target/a.png (a.txt is missing)")
def missing_caption(data, entries):
    (data / "target/a.txt").unlink()


@broken("1 pictures without a caption", "target/a.png (a.txt is empty)")
def empty_caption(data, entries):
    (data / "target/a.txt").write_text(" \n\n")


@broken("1 pictures without a caption", "target/a.png (a.txt is no readable UTF-8")
def latin1_caption(data, entries):
    (data / "target/a.txt").write_bytes("mach es schön".encode("latin-1"))


@broken("1 captions", "refs has captions, which `combined`")
def captions_with_combined(data, entries):
    entries[0]["conditioning_data"].append("more")
    entries.append({**entries[1], "id": "more"})
    entries[1] |= {"caption_strategy": "filename"}
    return {"conditioning_multidataset_sampling": "combined"}


@broken("edits: caption_strategy instanceprompt needs instance_prompt")
def no_instance_prompt(data, entries):
    entries[0]["caption_strategy"] = "instanceprompt"


@broken("edits: caption_strategy instanceprompt needs instance_prompt")
def blank_instance_prompt(data, entries):
    entries[0] |= {"caption_strategy": "instanceprompt", "instance_prompt": ["make it red", " "]}


@broken("1 pictures without a caption", "target/_.png (its name says nothing)")
def name_without_letters(data, entries):
    entries[0]["caption_strategy"] = "filename"
    for kind in ("target", "reference"):
        (data / kind / "a.png").rename(data / kind / "_.png")


@broken("edits has caption_strategy null")
def no_captions_anywhere(data, entries):
    entries[0]["caption_strategy"] = None


# --------------------------------------------------------------------------------------------------------- ids


@broken("1 unknown ids", "edits: conditioning_data names rfs", "did you mean refs?", findings=2)  # refs is unused
def unknown_id(data, entries):
    entries[0]["conditioning_data"] = ["rfs"]


@broken("1 unknown ids", "edits: conditioning_data names refs", "it is disabled")
def disabled_id(data, entries):
    entries[1]["disabled"] = True


@broken("1 unused sets", "refs: no conditioning_data names it")
def unused_reference_set(data, entries):
    del entries[0]["conditioning_data"]


@broken("1 circular references", "edits: conditioning_data names itself")
def self_reference(data, entries):
    entries[0]["conditioning_data"] = ["edits"]
    del entries[1]


@broken("1 circular references", "edits: conditioning_data names refs", "it has conditioning_data")
def cyclic_reference(data, entries):
    entries[1]["conditioning_data"] = ["edits"]


@broken("1 ids that stand twice", "edits")
def duplicate_ids(data, entries):
    entries.append(dict(entries[0]))


@broken("missing sets", "no entry holds targets")
def no_target_set(data, entries):
    entries[:] = [{"id": "text-embeds", "dataset_type": "text_embeds"}]


@broken("there can only be one text_embeds entry")
def two_text_embeds(data, entries):
    entries += [{"id": f"text-{i}", "dataset_type": "text_embeds"} for i in range(2)]


@broken("1 incomplete entries", "edits needs instance_data_dir or pairs_file")
def no_place(data, entries):
    entries[:] = [{"id": "edits"}]


# -------------------------------------------------------------------------------------------------- generators


def generated(entries, *generators):
    """Targets whose references are made."""
    entries[:] = [{**entries[0], "conditioning": list(generators)}]
    del entries[0]["conditioning_data"]


@broken("edits_conditioning_superresolution", "give one generator a name")
def two_generators_of_one_type(data, entries):
    generated(entries, {"type": "superresolution"}, {"type": "superresolution", "blur_radius": 5})


@broken("1 generators", "edits: one of the captions of superresolution is empty")
def blank_generator_caption(data, entries):
    generated(entries, {"type": "superresolution", "captions": ["sharpen", ""]})


@broken("1 generators", "edits: type is 'jpeg_artefacts'", "did you mean jpeg_artifacts?")
def unknown_generator(data, entries):
    generated(entries, {"type": "jpeg_artefacts"})


@broken("1 generators", "edits: type 'canny' is not generated here: finding edges needs OpenCV")
def refused_generator(data, entries):
    generated(entries, {"type": "canny"})


@broken("1 generators", "blur_type is 'gausian'", "'gaussian', 'box' or 'both'")
def unknown_blur_type(data, entries):
    generated(entries, {"type": "superresolution", "blur_type": "gausian"})


@broken("1 generators", "quality_range is [30, 10]", "[lowest, highest]")
def reversed_quality_range(data, entries):
    generated(entries, {"type": "jpeg_artifacts", "quality_mode": "range", "quality_range": [30, 10]})


@broken("1 generators", "superresolution.blur_radios is 3", "did you mean blur_radius?")
def unknown_generator_parameter(data, entries):
    generated(entries, {"type": "superresolution", "blur_radios": 3})


# ---------------------------------------------------------------------------------------------------- pairs files


@broken("1 malformed lines", "pairs.jsonl, line 2")
def absolute_path(data, entries):
    rows(data, entries, GOOD, {**GOOD, "target": str(data / "target/sub/b.png")})


@broken("1 malformed lines", "pairs.jsonl, line 1", "without ..")
def path_out_of_the_folder(data, entries):
    rows(data, entries, {**GOOD, "reference": "../data/reference/a.png"})


@broken("1 malformed lines", "pairs.jsonl, line 2: not one JSON object")
def malformed_line(data, entries):
    rows(data, entries, GOOD, '{"target": "target/sub/b.png",')


@broken("1 malformed lines", "pairs.jsonl, line 1: target, reference and caption should be texts")
def reference_is_a_number(data, entries):
    rows(data, entries, {**GOOD, "reference": 5})


@broken("1 malformed lines", "pairs.jsonl, line 2", "has an empty name")
def target_is_the_folder_itself(data, entries):
    rows(data, entries, GOOD, {**GOOD, "target": "."})


@broken("1 malformed lines", "pairs.jsonl, line 1: unknown prompt")
def unknown_column(data, entries):
    rows(data, entries, {**GOOD, "prompt": "make it red"})


@broken("lines have [1, 2] references")
def differing_reference_counts(data, entries):
    second = {"target": "target/sub/b.png", "references": ["reference/sub/b.png", "reference/a.png"], "caption": "red"}
    rows(data, entries, GOOD, second)


@broken("1 names with several pictures", "pairs.jsonl, line 2: target/a.png stands twice")
def duplicate_target(data, entries):
    rows(data, entries, GOOD, GOOD)


@broken("1 unreadable pictures", "reference/c.png does not exist")
def listed_picture_is_missing(data, entries):
    rows(data, entries, {**GOOD, "reference": "reference/c.png"})


@broken("1 pictures without a caption", "pairs.jsonl, line 1: target/a.png")
def listed_without_caption(data, entries):
    rows(data, entries, {**GOOD, "caption": ""})


@broken("1 malformed lines", "pairs.csv, line 2: unknown image; a line has target, reference, references, caption")
def csv_without_target(data, entries):
    rows(data, entries, "image,reference,caption", "target/a.png,reference/a.png,red", name="pairs.csv")


@broken("1 malformed lines", "pairs.csv, line 2: more fields than line 1; quote a caption that holds a comma")
def csv_with_unquoted_comma(data, entries):
    lines = "target,reference,caption", "target/a.png,reference/a.png,make it red, please"
    rows(data, entries, *lines, name="pairs.csv")


@broken("1 files that cannot be read", "pairs_file", "nowhere.jsonl")
def missing_pairs_file(data, entries):
    entries[:] = [{"id": "edits", "pairs_file": str(data / "nowhere.jsonl")}]


# -------------------------------------------------------------------------------------------- keys and the list


@broken("data.json, entry 1: unknown key instance_dir, did you mean instance_data_dir?")
def unknown_key(data, entries):
    entries[0]["instance_dir"] = entries[0].pop("instance_data_dir")


@broken("edits: maximum_image_size needs target_downsample_size too")
def downsample_size_missing(data, entries):
    entries[0]["maximum_image_size"] = 100


@broken("1 sizes that no model takes", "edits: resolution 1024 in area; area counts megapixels")
def megapixels_instead_of_pixels(data, entries):
    entries[0] |= {"resolution_type": "area", "resolution": 1024}


@broken("1 sizes that no model takes", "edits: resolution 1 in pixel_area; area counts megapixels")
def pixels_instead_of_megapixels(data, entries):
    entries[0]["resolution"] = 1


@broken("data.json, entry 1: resolution = -3")
def negative_resolution(data, entries):
    entries[0]["resolution"] = -3


@broken("one.json should hold a list of datasets")
def data_list_is_no_list(data, entries):
    (data.parent / "one.json").write_text(json.dumps(entries[0]))
    return {"data_backend_config": str(data.parent / "one.json")}


@broken("nowhere.json does not exist")
def data_list_is_missing(data, entries):
    return {"data_backend_config": str(data.parent / "nowhere.json")}


@broken("cut.json is not JSON")
def data_list_is_not_json(data, entries):
    (data.parent / "cut.json").write_text('[{"id": "edits", "instance_')
    return {"data_backend_config": str(data.parent / "cut.json")}


@broken("data.json, entry 1: 'edits' should be one object")
def entry_is_no_object(data, entries):
    entries[:] = ["edits"]


# ------------------------------------------------------------------------------------------------------- tests


def test_the_dataset_that_is_broken_below_is_good(tmp_path, capsys):
    data, entries = dataset(tmp_path)
    before = snapshot(data)
    train.main([write_config(tmp_path, entries), "--check"])
    assert (tmp_path / "out/check-edits.png").is_file()
    assert "edits: 2 targets" in capsys.readouterr().out
    assert snapshot(data) == before


@pytest.mark.parametrize("function, parts, findings", CASES)
def test_a_broken_dataset_is_refused_in_one_message(tmp_path, function, parts, findings):
    data, entries = dataset(tmp_path)
    config = write_config(tmp_path, entries, **(function(data, entries) or {}))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    before = snapshot(data)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        train.main([config, "--check"])
    message = str(raised.value)
    for part in parts:
        assert part in message, message
    assert message.count("\n    ") == (findings if "nothing was started" in message else 0), message
    assert snapshot(data) == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_problems_of_several_sets_are_all_in_the_one_message(tmp_path):
    data, entries = dataset(tmp_path)
    (data / "target/a.txt").unlink()
    (data / "reference/sub/b.png").unlink()
    (data / "other").mkdir()
    entries += [{"id": "style", "instance_data_dir": str(data / "other"), "conditioning": [{"type": "depth"}]}]
    with pytest.raises(ValueError) as raised:
        train.main([write_config(tmp_path, entries, flux_lora_target="al"), "--check"])
    for part in ("flux_lora_target 'al'", "a.txt is missing", "no sub/b in refs", "data/other", "depth network"):
        assert part in str(raised.value)


def test_a_set_that_two_others_name_is_complained_of_once(tmp_path):
    data, entries = dataset(tmp_path)
    (data / "reference/a.png").write_bytes(b"")
    with pytest.raises(ValueError) as raised:
        train.main([write_config(tmp_path, [*entries, {**entries[0], "id": "again"}]), "--check"])
    assert str(raised.value).count("reference/a.png is not a readable picture") == 1


@pytest.mark.parametrize(
    "function, option", [(missing_reference, ["--check"]), (truncated_jpeg, []), (unknown_key, [])]
)
def test_the_door_says_it_once_and_exits_with_one(tmp_path, function, option):
    data, entries = dataset(tmp_path)
    function(data, entries)
    command = [sys.executable, "train.py", write_config(tmp_path, entries), *option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: ") and "Traceback" not in done.stderr
    assert done.stderr.count("train.py: ") == 1 and not done.stdout


def test_a_folder_without_permission_is_named_and_not_skipped():
    folder = Path(tempfile.mkdtemp())
    save(folder / "open/a.png")
    save(folder / "locked/b.png")
    folder.chmod(0o755)
    (folder / "locked").chmod(0)
    problems, user = Problems(), os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # the superuser may read everything
        pairs.in_folder(folder, problems)
        pairs.in_folder(folder / "locked", problems)
    finally:
        os.seteuid(user)
        (folder / "locked").chmod(0o755)
        shutil.rmtree(folder)
    assert list(problems.found) == ["folders that cannot be read"]
    assert all("locked (Permission denied)" in text for text in problems.found["folders that cannot be read"])
