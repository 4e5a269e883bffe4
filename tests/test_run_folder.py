"""The files of a run."""

import json

from kontext_min.run_folder import RunFolder, append, checkpoints, read_lines


def test_a_rewound_log_ends_with_the_step_and_a_line_that_was_cut_off_does_not_count(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        append(folder.metrics, {"step": step, "loss": 0.5})
    append(folder.psnr, {"step": 3, "base": 0.5})
    before = folder.metrics.read_text().splitlines()
    with open(folder.metrics, "a") as file:
        file.write(json.dumps({"step": 4})[:-1])
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2, 3]
    folder.rewind(2)
    assert folder.metrics.read_text().splitlines() == before[:2]
    assert read_lines(folder.psnr) == [] and read_lines(folder.eval) == [] and not folder.eval.exists()


def test_checkpoints_after_the_step_are_moved_aside_and_never_lost(tmp_path):
    folder = RunFolder(tmp_path)
    for expected in ("previous-1", "previous-2"):  # and once more
        for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-1500", "checkpoint-2000.tmp"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "state.json").write_text(expected)
        assert folder.rewind(1000) == tmp_path / expected
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-500", "checkpoint-1000"]
        assert (tmp_path / expected / "checkpoint-1500" / "state.json").read_text() == expected
    assert folder.rewind(1000) is None and not (tmp_path / "previous-3").exists()


def test_pictures_after_the_step_are_moved_aside_with_its_checkpoints(tmp_path):
    folder = RunFolder(tmp_path)
    for file in (folder.picture("000500", 0), folder.picture("001000", 0), folder.picture("base", 0)):
        file.parent.mkdir(parents=True)
        file.touch()
    for step in (500, 1000):
        folder.sheet(step).touch()
    assert folder.rewind(500) == tmp_path / "previous-1"
    assert list(folder.pictures(0)) == ["000500", "base"] and folder.sheet(500).exists()
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["001000", "001000.png"]


def test_pictures_are_found_where_they_are_written(tmp_path):
    folder = RunFolder(tmp_path)
    files = {kind: folder.picture(kind, 0) for kind in ("000100", "000500", "base", "input-1")}
    for file in (*files.values(), folder.picture("base", 1), folder.sheet(500)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert list(folder.pictures(0).items()) == list(files.items()) and list(folder.pictures(1)) == ["base"]
    (tmp_path / "another.safetensors").touch()  # of a folder of LoRAs
    folder.lora.touch()
    aside = RunFolder(folder.set_aside())
    assert (tmp_path / "another.safetensors").exists() and aside.lora.exists() and not folder.lora.exists()
    assert len(aside.pictures(0)) == 4 and aside.sheet(500).exists() and folder.set_aside() is None
