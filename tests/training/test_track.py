"""What a run tells while it goes: the bar, metrics.jsonl, TensorBoard and W&B, also when it is resumed."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import CPU

from kontext_min.config import Config
from kontext_min.run_folder import RunFolder
from kontext_min.training import track
from kontext_min.training.track import Tracker


def config(tmp_path, **values) -> Config:
    (tmp_path / "run").mkdir(exist_ok=True)
    return Config(output_dir=tmp_path / "run", data_backend_config=[], max_train_steps=10, **values)


def steps(config: Config, start: int, end: int, loss: float = 1.0):
    """As the trainer does it: steps start + 1 to end, with validation at every fourth."""
    folder = config.output_dir / "validation"
    RunFolder(config.output_dir).rewind(start)
    with Tracker(config, CPU, start) as tracker:
        if not start:
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (64, 16)).save(folder / "000000.png")
            tracker.validated(0)
        for step in range(start + 1, end + 1):
            tracker.log(step, {"loss": loss / step, "grad_norm": 0.5, "lr": 1e-3, "seconds": 0.1})
            if step % 4 == 0:
                (folder / f"{step:06d}").mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 16), (step, 2, 3)).save(folder / f"{step:06d}" / "00.png")
                Image.new("RGB", (64, 16), (step, 2, 3)).save(folder / f"{step:06d}.png")
                (folder / "psnr.jsonl").write_text(json.dumps({"step": step, "base": 17.5, "lora": 17.5 + step}) + "\n")
                line = {"step": step, "loss": 0.25, "per_timestep": [[0.1, 0.5]], "probe": {"own": 0.25, "none": 0.5}}
                (folder / "eval.jsonl").write_text(json.dumps(line) + "\n")
                tracker.validated(step)
        return tracker


def test_metrics_have_one_line_per_step_with_memory_and_resume_does_not_double_them(tmp_path):
    values = config(tmp_path)
    steps(values, 0, 7)
    steps(values, 5, 10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert set(lines[0]) == {"step", "loss", "grad_norm", "lr", "seconds", "memory", "memory_limit"}
    assert 0 < lines[0]["memory"] < lines[0]["memory_limit"]


def test_the_bar_shows_the_smoothed_loss_rate_and_memory(tmp_path):
    tracker = steps(config(tmp_path), 0, 3)
    weights = [0.02 * 0.98**age for age in (2, 1, 0)]
    mean = sum(w / step for w, step in zip(weights, (1, 2, 3), strict=True)) / sum(weights)
    assert f"loss={mean:.4f}, lr=1.0e-03, memory=" in tracker.bar.postfix
    assert tracker.bar.n == 3 and tracker.bar.total == 10


def test_tensorboards_own_reader_reads_a_resumed_run_without_doubled_steps(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = config(tmp_path, report_to="tensorboard", logging_dir=tmp_path / "logs", tracker_run_name="mine")
    steps(values, 0, 7)
    steps(values, 5, 10, loss=2.0)
    events = reader.EventAccumulator(str(tmp_path / "logs" / "mine")).Reload()
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    assert losses == pytest.approx({s: (1.0 if s <= 5 else 2.0) / s for s in range(1, 11)})
    assert len(events.Scalars("train/loss")) == 10
    assert [e.step for e in events.Scalars("train/memory")] == list(range(1, 11))
    assert [(e.step, e.value) for e in events.Scalars("validation/psnr/lora")] == [(4, 21.5), (8, 25.5)]
    assert [e.value for e in events.Scalars("validation/eval/own")] == [0.25, 0.25]
    images = events.Images("validation/00")
    assert [(image.step, image.width, image.height) for image in images] == [(4, 32, 16), (8, 32, 16)]
    assert [(image.step, image.width) for image in events.Images("validation/sheet")] == [(0, 64), (4, 64), (8, 64)]


def test_wandbs_own_library_takes_it_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    steps(config(tmp_path, report_to="wandb", tracker_project_name="edits"), 0, 5)
    wandb.teardown()  # everything is on the disk
    (file,) = (tmp_path / "run" / "logs").rglob("*.wandb")
    raw, place, records = file.read_bytes(), 7, []
    while place < len(raw):  # each record: checksum (4 bytes), length (2), kind (1), Record
        length = int.from_bytes(raw[place + 4 : place + 6], "little")
        records.append(Record.FromString(raw[place + 7 : place + 7 + length]))
        place += 7 + length
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name) == ("edits", "run")
    assert run.run_id == (tmp_path / "run" / "wandb-id").read_text()
    items = [i for r in records if r.HasField("history") for i in r.history.item]
    logged = [json.loads(i.value_json) for i in items if "train/loss" in (i.key, *i.nested_key)]
    assert logged == pytest.approx([1 / step for step in range(1, 6)])


def test_wandb_goes_on_under_the_same_id_and_a_new_run_gets_another(tmp_path, monkeypatch):
    calls = []

    def init(**settings):
        return SimpleNamespace(log=lambda values, step: calls.append((settings["id"], step, values)), finish=lambda: 0)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda image: image.size))
    values = config(tmp_path, report_to="wandb")
    steps(values, 0, 4)
    steps(values, 4, 6)
    assert len({identity for identity, _, _ in calls}) == 1
    assert [step for _, step, logged in calls if "train/loss" in logged] == [1, 2, 3, 4, 5, 6]
    pictures = {"validation/sheet": (64, 16), "validation/00": (32, 16)}
    assert any(step == 4 and pictures.items() <= logged.items() for _, step, logged in calls)
    steps(values, 0, 1)
    assert len({identity for identity, _, _ in calls}) == 2


def test_without_reporters_no_picture_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(track, "Image", None)
    assert steps(config(tmp_path, report_to="none"), 0, 4).bar.n == 4  # `validated` ran beside two pictures


@pytest.mark.parametrize("asked, absent", [("all", ["tensorboard", "wandb"]), ("wandb", ["wandb"]), ("none", [])])
def test_a_missing_library_is_one_sentence_with_the_command(tmp_path, monkeypatch, asked, absent):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    said = track.missing(config(tmp_path, report_to=asked))
    assert [line.partition("pip install ")[2] for line in said] == absent


def test_a_folder_called_wandb_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert track.missing(config(tmp_path, report_to="wandb"))
