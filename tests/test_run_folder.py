"""The files of a run."""

import json
import math

from kontext_min.run_folder import RunFolder, append, read_lines


def test_a_rewound_log_ends_with_the_step_and_a_line_that_was_cut_off_does_not_count(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        append(folder.metrics, {"step": step, "loss": 0.5})
    append(folder.psnr, {"step": 3, "base": math.inf})
    before = folder.metrics.read_text().splitlines()
    with open(folder.metrics, "a") as file:
        file.write(json.dumps({"step": 4})[:-1])
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2, 3]
    folder.rewind(2)
    assert folder.metrics.read_text().splitlines() == before[:2]
    assert read_lines(folder.psnr) == [] and read_lines(folder.eval) == [] and not folder.eval.exists()


def test_pictures_are_found_where_they_are_written(tmp_path):
    folder = RunFolder(tmp_path)
    files = [
        folder.input(0, 2),
        folder.input(0, 1),
        folder.picture("base", 0),
        folder.picture(500, 0),
        folder.sheet(500),
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert folder.inputs(0) == [files[1], files[0]] and folder.inputs(1) == []
    assert folder.steps() == [500] and folder.pictures(500) == [files[3]]
    aside = RunFolder(folder.set_aside())
    assert aside.steps() == [500] and folder.set_aside() is None
