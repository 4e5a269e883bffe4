"""Pairing is complete or nothing starts."""

import pytest
from PIL import Image

from kontext_min.data.pairs import find_pairs


@pytest.fixture
def folders(tmp_path):
    """Three targets, one in a sub-folder, their references (one with another extension) and captions."""
    target, reference = tmp_path / "target", tmp_path / "reference"
    for folder, extension in ((target, "png"), (reference, "jpg")):
        (folder / "sub").mkdir(parents=True)
        for name in ("a", "b", "sub/c"):
            Image.new("RGB", (8, 8)).save(folder / f"{name}.{extension}")
    for name in ("a", "b", "sub/c"):
        (target / f"{name}.txt").write_text(f"edit {name}\n")
    return target, reference


def test_partners_have_the_same_relative_path_whatever_the_extension(folders):
    target, reference = folders
    pairs = find_pairs(target, [reference])
    assert [p.caption for p in pairs] == ["edit a", "edit b", "edit sub/c"]
    assert pairs[2].target == target / "sub/c.png" and pairs[2].references == (reference / "sub/c.jpg",)


def test_every_problem_is_listed_at_once_and_nothing_of_the_users_changes(folders):
    target, reference = folders
    (reference / "a.jpg").unlink()
    Image.new("RGB", (8, 8)).save(reference / "A.jpg")
    (target / "b.txt").write_text("  \n")
    (target / "sub/c.txt").unlink()
    (reference / "sub/c.jpg").write_bytes(b"not a picture")
    Image.new("RGB", (8, 8)).save(target / "b.webp")
    before = sorted(target.rglob("*")) + sorted(reference.rglob("*"))
    with pytest.raises(ValueError) as raised:
        find_pairs(target, [reference])
    message = str(raised.value)
    for part in ("a.png (nothing in", "did you mean A?", "A.jpg", "b.txt is empty", "c.txt is missing",
                 "c.jpg (cannot identify", "b.png, ", "1 references without a target"):  # fmt: skip
        assert part in message, (part, message)
    assert sorted(target.rglob("*")) + sorted(reference.rglob("*")) == before


def test_long_lists_are_cut_after_twenty(tmp_path):
    for name in ("target", "reference"):
        (tmp_path / name).mkdir()
    for i in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / "target" / f"{i:02}.png")
        (tmp_path / "target" / f"{i:02}.txt").write_text("x")
    with pytest.raises(ValueError, match="30 targets without a reference:(.|\n)*… and 10 more"):
        find_pairs(tmp_path / "target", [tmp_path / "reference"])


def test_a_missing_or_empty_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="instance_data_dir"):
        find_pairs(tmp_path / "none", [tmp_path])
    with pytest.raises(ValueError, match="folders without pictures"):
        find_pairs(tmp_path, [tmp_path])
