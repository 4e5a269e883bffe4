"""Four ways to give pairs; what is incomplete is a problem by name. The table of broken sets is in test_broken.py."""

import json

import pytest
from PIL import Image

from kontext_min.data import pairs
from kontext_min.data.buckets import same_aspect
from kontext_min.data.pairs import Picture, Problems, captions_of


def save(path, size=(8, 8), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_pictures_are_known_by_their_relative_path_without_extension(tmp_path):
    for name in ("a.png", "sub/b.JPG", ".hidden.png", "note.txt"):
        save(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    problems = Problems()
    found = pairs.in_folder(tmp_path, problems)
    assert found == {"a": Picture(tmp_path / "a.png"), "sub/b": Picture(tmp_path / "sub/b.JPG")}
    assert not problems.count()


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.png", "._a.png", "sub/._b.gif", ".ipynb_checkpoints/a-checkpoint.png", "sub/.trash/c.svg"):
        save(tmp_path / name) if name.endswith("png") else (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (tmp_path / name).write_text("make it red")
    problems = Problems()
    found = pairs.in_folder(tmp_path, problems)
    pairs.check_captions(tmp_path, found, problems)
    assert found == {"a": Picture(tmp_path / "a.png")} and not problems.count(), problems.found
    assert len(pairs.in_folder(tmp_path / ".ipynb_checkpoints", problems)) == 1  # which was asked for


def test_side_by_side_pictures_are_cut_in_two(tmp_path):
    picture = Image.new("RGB", (21, 8), "red")
    picture.paste("blue", (10, 0, 21, 8))
    picture.save(tmp_path / "both.png")
    targets, references = pairs.side_by_side({"both": Picture(tmp_path / "both.png")}, "left")
    assert targets["both"].open().size == references["both"].open().size == references["both"].size() == (10, 8)
    assert references["both"].open().getcolors() == [(80, (255, 0, 0))]
    assert targets["both"].open().getcolors() == [(80, (0, 0, 255))]


def test_suffixes_tell_references_from_targets_in_one_folder(tmp_path):
    pictures = {name: Picture(tmp_path / f"{name}.png") for name in ("a", "a_ref", "sub/b", "sub/b_ref")}
    targets, references = pairs.by_suffix(pictures, "_ref")
    assert list(targets) == ["a", "sub/b"]
    assert references == {"a": pictures["a_ref"], "sub/b": pictures["sub/b_ref"]}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_gives_targets_references_and_captions(tmp_path, kind):
    file = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        rows = [{"target": "t/a.png", "references": ["r/a.png", "s/x.png"], "caption": "one\ntwo"}]
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        file.write_text('target,reference,caption\nt/a.png,r/a.png,"do, it"\n')
    problems = Problems()
    targets, captions, references = pairs.from_file(file, problems)
    assert not problems.count(), problems.found
    assert targets == {"t/a": Picture(tmp_path / "t/a.png")}
    expected = ["r/a.png", "s/x.png"] if kind == "jsonl" else ["r/a.png"]
    assert references == [{"t/a": Picture(tmp_path / path)} for path in expected]
    assert captions == {"t/a": ("one", "two") if kind == "jsonl" else ("do, it",)}


def test_captions_come_from_text_files_names_or_prompts(tmp_path):
    (tmp_path / "red_hat.txt").write_text("\ufeffmake it red \n\n paint it red\n", encoding="utf-8")
    problems, picture = Problems(), tmp_path / "red_hat.png"
    assert captions_of(picture, "textfile", (), problems) == ("make it red", "paint it red")
    assert captions_of(picture, "filename", (), problems) == ("red hat",)
    assert captions_of(picture, "instanceprompt", ("a", "b"), problems) == ("a", "b")
    assert captions_of(picture, None, (), problems) == ()
    (tmp_path / "red_hat.txt").write_text("one\u2028caption\r\nanother\r\n", encoding="utf-8", newline="")
    assert captions_of(picture, "textfile", (), problems) == ("one\u2028caption", "another")
    assert not problems.count()


def test_long_lists_of_problems_are_cut_after_twenty_and_counted():
    problems = Problems()
    for i in range(30):
        problems.add("broken things", f"thing {i}")
    with pytest.raises(ValueError, match="30 broken things:(.|\n)*thing 19\n    … and 10 more"):
        problems.raise_any()


def test_what_a_name_was_meant_to_be_is_only_looked_for_where_it_is_shown():
    targets, references = (
        {f"photo_{i:02d}{end}": Picture(f"{i:02d}{end}.png") for i in range(30)} for end in ("", "_r")
    )
    problems = Problems()
    pairs.match(targets, references, "set", problems)
    for found in problems.found.values():
        assert [("did you mean photo_" in text) for text in found] == [True] * 20 + [False] * 10


@pytest.mark.parametrize("a, b, same", [((1000, 667), (500, 333), True), ((1000, 667), (500, 334), True),
                                        ((300, 200), (150, 100), True), ((300, 200), (150, 104), False)])  # fmt: skip
def test_aspects_are_the_same_up_to_the_rounding_of_a_side(a, b, same):
    from kontext_min.data.buckets import Size

    assert same_aspect(Size(*a), Size(*b)) is same
    assert same_aspect(Size(*b), Size(*a)) is same


def test_a_link_that_leads_back_shows_no_picture_twice(tmp_path):
    save(tmp_path / "set" / "sub" / "a.png")
    save(tmp_path / "other" / "b.png")
    for link, folder in (("all", "set"), ("sub/up", "set/sub"), ("more", "other")):
        (tmp_path / "set" / link).symlink_to(tmp_path / folder)
    problems = Problems()
    assert pairs.in_folder(tmp_path / "set", problems).keys() == {"sub/a", "more/b"} and not problems.count()


def test_a_file_whose_name_is_no_utf8_is_named(tmp_path):
    save(tmp_path / "caf\udce9.png")
    problems = Problems()
    pairs.in_folder(tmp_path, problems)
    assert r"caf\udce9.png'; rename it" in problems.found["names that are no UTF-8"][0]


@pytest.mark.parametrize("text, line", [
    ('target,reference,caption\na.png,b.png,"make it gray\nc.png,d.png,x\n', "unexpected end of data"),
    ('target,reference,caption\na.png,b.png,"' + "x" * 200_000, "field larger than field limit"),
])  # fmt: skip
def test_a_quote_that_is_never_closed_swallows_no_lines(tmp_path, text, line):
    (tmp_path / "pairs.csv").write_text(text)
    problems = Problems()
    assert pairs.from_file(tmp_path / "pairs.csv", problems) == ({}, {}, [])
    assert line in problems.found["files that cannot be read"][0]
    (tmp_path / "pairs.csv").write_text('target,caption\na.png,"say ""hello"", then\nleave"\n')
    _, captions, _ = pairs.from_file(tmp_path / "pairs.csv", Problems())
    assert captions == {"a": ('say "hello", then', "leave")}


def test_captions_of_jsonl_may_hold_any_character_but_half_ones(tmp_path):
    lines = [json.dumps({"target": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)]
    lines.append(json.dumps({"target": "b.png", "caption": "half \ud83c"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    problems = Problems()
    targets, captions, _ = pairs.from_file(tmp_path / "pairs.jsonl", problems)
    assert (
        captions == {"a": ("one\u2028two",)}
        and list(targets) == ["a"]
        and "pairs.jsonl, line 2: " in problems.found["malformed lines"][0]
    )
