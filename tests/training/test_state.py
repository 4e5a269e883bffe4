"""A run that is interrupted and goes on equals one that never was, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import train
from kontext_min.adapters.inject import updates
from kontext_min.adapters.read import read_adapter
from kontext_min.config import read_config
from kontext_min.run_folder import RunFolder, read_lines
from kontext_min.training import run as run_module
from kontext_min.training import state, trainer
from kontext_min.training.evaluate import Evaluator
from kontext_min.training.validate import Validator

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(kontext, tmp_path):
    """Twelve steps of accumulated batches with warm-up, cosine and dropout; a checkpoint every five steps."""
    data = tiny.write_pairs(tmp_path, 3, (64, 48), "make the sky red\nmake it night")
    values = {
        "pretrained_model_name_or_path": str(kontext), "data_backend_config": data, "mixed_precision": "no",
        "cache_dir": str(tmp_path / "cache"), "max_train_steps": 12, "gradient_accumulation_steps": 2, "lora_rank": 2,
        "gradient_checkpointing": False, "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
        "caption_dropout_probability": 0.2, "checkpointing_steps": 5, "validation_steps": 6, "num_eval_images": 1,
        "validation_num_inference_steps": 1, "resume_from_checkpoint": "latest", "checkpoints_total_limit": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path / "config.json"


def run(config, out, *overrides):
    if "lora_type=lycoris" in overrides:
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "lora_rank"}))
    train.main([str(config), f"output_dir={out}", *overrides])
    return out


def results(out):
    """The bytes of the LoRA's tensors, and the logged losses."""
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lora = load_file(out / "pytorch_lora_weights.safetensors")
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in lora.items()}, [
        (e["step"], e["loss"]) for e in losses
    ]


VARIANTS = [
    ["optimizer=adamw"],
    ["optimizer=optimi-lion", "lora_dropout=0.2", "use_ema=true", "ema_update_interval=2"],
    [
        "optimizer=adamw_bf16",
        "use_ema=true",
        "base_model_precision=int8-quanto",
        "mixed_precision=bf16",
        "validation_steps=0",
    ],
    [
        "optimizer=adamw_bf16",
        "use_dora=true",
        "lora_dropout=0.2",
        'lora_rank_pattern={"add_q_proj": 3}',
        "base_model_precision=int8-quanto",
        "validation_steps=0",
    ],
    [
        "lora_type=lycoris",
        'lycoris_config={"algo": "lokr", "factor": 4, "linear_dim": 3, "decompose_both": true}',
        "lora_dropout=0.2",
        "use_ema=true",
        "base_model_precision=int8-quanto",
        "validation_steps=0",
    ],
]
IDS = ["adamw", "lion, dropout, EMA", "bf16, EMA, int8", "DoRA, ranks, int8", "LoKr, EMA, int8"]


@pytest.mark.parametrize("settings", VARIANTS, ids=IDS)
def test_a_resumed_run_equals_an_uninterrupted_run(config, tmp_path, settings):
    whole = run(config, tmp_path / "whole", *settings)
    parts = tmp_path / "parts"

    def stop_after_seven(self, step, each_step=train.Run.each_step):
        self.interrupted.set() if step == 7 else None
        return each_step(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "each_step", stop_after_seven)
        run(config, parts, *settings)
    assert [p.name for p in state.checkpoints(parts)] == ["checkpoint-5", "checkpoint-7"]
    run(config, parts, *settings)
    assert results(parts) == results(whole)
    assert ("use_ema=true" in settings) == (whole / "ema").is_dir()
    for file in (whole / "ema").glob("*"):
        average, last = load_file(file), load_file(whole / file.name)
        resumed = load_file(parts / "ema" / file.name)
        assert average.keys() == last.keys() and any(not torch.equal(average[k], last[k]) for k in last)
        assert all(torch.equal(average[k], resumed[k]) for k in last)
    assert [p.name for p in state.checkpoints(parts)] == ["checkpoint-10", "checkpoint-12"]
    assert (parts / "validation" / "psnr.jsonl").read_text() == (whole / "validation" / "psnr.jsonl").read_text()


def test_a_finished_run_says_so_and_a_longer_one_goes_on(config, tmp_path, capsys):
    out = run(config, tmp_path / "out", "lr_scheduler=constant")
    before = results(out)
    run(config, out, "lr_scheduler=constant")
    assert "already reached; nothing to do" in capsys.readouterr().out
    assert results(out) == before
    run(config, out, "lr_scheduler=constant", "max_train_steps=14")
    assert [step for step, _ in results(out)[1]] == list(range(1, 15))


def test_a_run_that_goes_on_from_an_older_checkpoint_is_the_latest_from_then_on(config, tmp_path, capsys):
    out = run(config, tmp_path / "out", "lr_scheduler=constant")
    other = ["lr_scheduler=constant", "learning_rate=5e-3", "allow_changed_resume=true"]

    def stop_after_eleven(self, step, each_step=train.Run.each_step):
        self.interrupted.set() if step == 11 else None
        return each_step(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "each_step", stop_after_eleven)
        run(config, out, *other, f"resume_from_checkpoint={out / 'checkpoint-10'}")
    assert f"checkpoints and pictures after step 10 were moved to {out / 'previous-1'}" in capsys.readouterr().out
    assert (out / "previous-1" / "checkpoint-12" / "state.json").exists()
    assert state.chosen(read_config(config, [f"output_dir={out}"])) == out / "checkpoint-11"
    bare = read_config(config, [f"output_dir={out}", "resume_from_checkpoint=checkpoint-11"])
    assert state.chosen(bare) == out / "checkpoint-11"
    run(config, out, *other[:2])
    assert [step for step, _ in results(out)[1]] == list(range(1, 13))


@pytest.mark.parametrize("what", ["card", "sheet", "eval loss"])
def test_a_run_that_died_behind_its_last_checkpoint_makes_up_for_what_it_has_not_left(config, tmp_path, capsys, what):
    settings = ["lr_scheduler=constant", "max_train_steps=5"]
    whole = run(config, tmp_path / "whole", *settings)

    def die(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*{"card": (run_module, "write_card", die), "sheet": (train.Run, "look", lambda *_: None),
                        "eval loss": (Evaluator, "run", lambda self, step: step and die())}[what])  # fmt: skip
        patch.setattr(run_module, "write_card", die)
        run(config, tmp_path / "out", *settings)
    out = RunFolder(tmp_path / "out")
    assert state.checkpoints(out.path) and not out.card.exists() and out.sheet(5).exists() == (what != "sheet")
    before = results(out.path)  # what is trained is there: it is written before the checkpoint
    assert before == results(whole)
    if what == "sheet":
        out.lora.unlink()  # as by versions that did not
    capsys.readouterr()
    run(config, out.path, *settings)
    assert "nothing to do" not in capsys.readouterr().out and results(out.path) == before
    assert out.card.exists()
    for name in ("validation/000005.png", "validation/psnr.jsonl", "validation/000005/00.png"):
        assert (out.path / name).read_bytes() == (whole / name).read_bytes(), name
    said, expected = (read_lines(RunFolder(path).eval)[-1] for path in (out.path, whole))
    assert said == expected
    run(config, out.path, *settings)
    assert "already reached; nothing to do" in capsys.readouterr().out


def test_what_was_due_at_a_checkpoint_is_made_up_for_in_the_middle_of_a_run_too(config, tmp_path):
    def die(*_):
        raise KeyboardInterrupt

    settings = ["lr_scheduler=constant", "max_train_steps=6", "checkpointing_steps=3", "validation_steps=3"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Validator, "run", die)
        run(config, tmp_path / "out", *settings)
    out = RunFolder(run(config, tmp_path / "out", *settings))
    assert out.sheet(3).exists() and out.sheet(6).exists()
    assert [line["step"] for line in read_lines(out.eval)] == [0, 3, 6]


def test_a_restart_of_torchruns_goes_on_from_what_was_asked_for_until_it_has_one_of_its_own(
    config, tmp_path, monkeypatch
):
    old = run(config, tmp_path / "old", "lr_scheduler=constant", "max_train_steps=5")
    monkeypatch.setattr(train.parallel, "RESTARTS", 1)
    asked = ["lr_scheduler=constant", "max_train_steps=6", f"resume_from_checkpoint={old / 'checkpoint-5'}"]
    assert [step for step, _ in results(run(config, tmp_path / "new", *asked))[1]] == [6]


def test_there_is_no_last_checkpoint_before_what_is_trained_is_written(config, tmp_path):
    def die(*_):
        raise KeyboardInterrupt

    settings = ["lr_scheduler=constant", "max_train_steps=6"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "write", die)
        run(config, tmp_path / "out", *settings)
    assert [path.name for path in state.checkpoints(tmp_path / "out")] == ["checkpoint-5"]
    assert results(run(config, tmp_path / "out", *settings)) == results(run(config, tmp_path / "whole", *settings))


def test_changed_settings_or_data_are_listed_and_refused_unless_allowed(config, tmp_path):
    out = run(config, tmp_path / "out", "max_train_steps=5", "lr_scheduler=constant")
    changes = ["lr_scheduler=constant", "learning_rate=2e-3", "seed=1", "adam_weight_decay=0.5"]
    (tmp_path / "target" / "0.txt").write_text("another caption")
    with pytest.raises(ValueError) as raised:
        run(config, out, *changes)
    for part in ("learning_rate: 0.001 -> 0.002", "seed: 42 -> 1", "data: ", "allow_changed_resume=true"):
        assert part in str(raised.value)
    assert "caption_dropout" not in str(raised.value)
    run(config, out, *changes, "allow_changed_resume=true", "max_train_steps=6")
    kept = torch.load(out / "checkpoint-6" / "tensors.pt", weights_only=True)["optimizer"]
    assert {group["weight_decay"] for group in kept["param_groups"]} == {0.5}  # not what the checkpoint brought


LOKR = ["lora_type=lycoris", 'lycoris_config={"algo": "lokr", "factor": 4, "linear_dim": 4, "linear_alpha": 2}']


def test_the_config_json_of_a_lokr_run_is_a_config_file_again(config, tmp_path, capsys):
    out = run(config, tmp_path / "out", *LOKR, "max_train_steps=2", "use_ema=true")
    record = json.loads((out / "config.json").read_text())
    assert "lora_rank" not in record and record["lycoris_config"]["dim"] == 4
    assert "adapter  LoKr of 4x4 and 16x4x16 on 22 modules: " in capsys.readouterr().out
    assert results(run(out / "config.json", tmp_path / "again")) == results(out)
    assert (
        "A LoKr for" in (out / "README.md").read_text() and "load_lora_weights" not in (out / "README.md").read_text()
    )
    assert "LoKr on all" in (out / "report.html").read_text()
    with pytest.raises(ValueError, match="other settings.*\n.*lycoris_config: "):
        run(config, out, *LOKR[:1], LOKR[1].replace(": 4,", ": 8,"), "max_train_steps=3", "allow_changed_resume=true")


@pytest.mark.parametrize("kind", [LOKR, ["use_dora=true", "lora_alpha=4"]], ids=["LoKr", "DoRA"])
def test_a_run_may_start_from_a_lokr_or_a_dora(config, tmp_path, kind):
    first = run(config, tmp_path / "first", *kind, "max_train_steps=3", "learning_rate=1e-2")
    file = first / "pytorch_lora_weights.safetensors"
    start = ["max_train_steps=1", "learning_rate=1e-12", "lr_warmup_steps=0"]
    second = run(config, tmp_path / "second", *kind, f"init_lora={file}", *start)
    old, new = (read_adapter(folder / file.name).updates for folder in (first, second))
    for a, b in zip(old, new, strict=True):
        assert a.name == b.name and a.delta().any()
        torch.testing.assert_close(a.delta(), b.delta(), rtol=1e-5, atol=1e-7)
        assert (a.magnitude is None) == (kind is LOKR)
        if a.magnitude is not None:
            torch.testing.assert_close(a.magnitude, b.magnitude)
    other = ["use_dora=true"] if kind is LOKR else []
    with pytest.raises(ValueError, match="init_lora: .* is a (LoKr|DoRA) of .*, this run's is a (DoRA|LoRA) of rank"):
        run(config, tmp_path / "third", *other, f"init_lora={file}", "lora_rank=2")


def test_a_runs_own_config_json_is_a_config_file_again(config, tmp_path):
    out = run(config, tmp_path / "out", "max_train_steps=2")
    record = json.loads((out / "config.json").read_text())
    assert record["lora_rank"] == 2 and record["ema_decay"] == 0.995 and record["lora_alpha"] is None
    said = json.loads(config.read_text())["data_backend_config"]  # and of the sets what they say, no default
    assert [entry.keys() for entry in record["data_backend_config"]] == [entry.keys() for entry in said]
    again = run(out / "config.json", tmp_path / "again")
    assert results(again) == results(out)


def test_a_run_that_fails_leaves_the_lora_before_the_failure_and_names_the_checkpoint(config, tmp_path, monkeypatch):
    out = run(config, tmp_path / "out", "max_train_steps=5", "lr_scheduler=constant")
    before = results(out)[0]
    monkeypatch.setattr(trainer, "flow_loss", lambda flux, *_: next(updates(flux)).B.sum() * float("nan"))
    with pytest.raises(ValueError, match="step 6: the loss is nan.*\n.*checkpoint is .*checkpoint-5;.* is the LoRA so"):
        run(config, out, "max_train_steps=6", "lr_scheduler=constant")
    assert results(out)[0] == before


@pytest.mark.parametrize("file", ["tensors.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(config, tmp_path, file):
    out = run(config, tmp_path / "out")
    path = out / "checkpoint-12" / file
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="checkpoint-12 is damaged .*resume_from_checkpoint=.*checkpoint-10"):
        run(config, out)
    run(config, out, f"resume_from_checkpoint={out / 'checkpoint-10'}")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        run(config, out, "resume_from_checkpoint=nowhere")


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # torch says it by the second
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(config, tmp_path, monkeypatch, kind):
    out = run(config, tmp_path / "out", "max_train_steps=5", "lr_scheduler=constant")

    def full(*_):
        raise kind(28, "No space left on device")

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(
        ValueError, match="checkpoint 6 could not be written .*No space left.*\nthe last good checkpoint is .*-5"
    ):
        run(config, out, "max_train_steps=6", "lr_scheduler=constant")
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-5"]


def start(config, out):
    command = [sys.executable, "train.py", str(config), f"output_dir={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: some CPUs sum in another order with two
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(out, count, process):
    """Until so many steps are logged."""
    file = out / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < count):
        time.sleep(0.02)


def test_sigterm_finishes_the_step_saves_and_exits_with_0(config, tmp_path):
    whole, parts = run(config, tmp_path / "whole"), tmp_path / "parts"
    process = start(config, parts)
    wait_for_steps(parts, 3, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "resume_from_checkpoint=latest" in said, said
    run(config, parts)
    assert results(parts) == results(whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_a_run_ends_in_the_same_bytes(config, tmp_path):
    longer = json.loads(config.read_text()) | {"max_train_steps": 150, "validation_steps": 60}
    config.write_text(json.dumps(longer))
    whole, parts = run(config, tmp_path / "whole"), tmp_path / "parts"
    r, kills, reached = random.Random(0), 0, []
    metrics = parts / "metrics.jsonl"
    while kills < 20:
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = start(config, parts)
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until its training has begun
        time.sleep(r.random())
        assert process.poll() is None, "it ended before it could be killed; make the run longer"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        reached.append(metrics.read_text().count("\n"))
    print("killed after step", reached)
    assert len(set(reached)) > 5
    run(config, parts)
    assert results(parts) == results(whole)


def test_a_new_run_in_a_used_folder_sets_the_old_one_aside(config, tmp_path, capsys):
    out = run(config, tmp_path / "out", "resume_from_checkpoint=null")
    before = results(out)
    run(config, out, "resume_from_checkpoint=null", "seed=7", "max_train_steps=6")
    assert "was moved to" in capsys.readouterr().out
    assert results(out / "previous-1") == before
    assert [p.name for p in state.checkpoints(out)] == ["checkpoint-5", "checkpoint-6"]
    assert [step for step, _ in results(out)[1]] == [1, 2, 3, 4, 5, 6]


def test_going_on_from_another_runs_checkpoint_sets_what_is_in_the_folder_aside(config, tmp_path):
    other = run(config, tmp_path / "other")
    out = run(config, tmp_path / "out", "max_train_steps=3", "seed=7")
    before = results(out)
    run(config, out, "max_train_steps=14", f"resume_from_checkpoint={other / 'checkpoint-12'}", "lr_scheduler=constant",
        "allow_changed_resume=true")  # fmt: skip
    assert results(out / "previous-1") == before
    assert [step for step, _ in results(out)[1]] == [13, 14]


def test_what_a_checkpoint_cannot_do_without_is_refused_even_when_changes_are_allowed(config, tmp_path):
    out = run(config, tmp_path / "out")
    for change in ("lora_rank=4", "optimizer=optimi-lion", "flux_lora_target=context", "use_ema=true"):
        with pytest.raises(ValueError, match=change.partition("=")[0] + ": ") as raised:
            run(config, out, change, "allow_changed_resume=true", "max_train_steps=14")
        assert "or set allow_changed_resume" not in str(raised.value)


def test_pruning_and_a_refused_resume_leave_the_run_as_it_was(config, tmp_path, capsys):
    out = run(config, tmp_path / "out", "resume_from_checkpoint=null")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train.main([str(config), f"output_dir={out}", "resume_from_checkpoint=null", "--prune-cache"])
    assert "removed 0 unused entries" in capsys.readouterr().out
    with pytest.raises(ValueError, match="learning_rate: 0.001 -> 0.5"):
        run(config, out, "learning_rate=0.5")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_average_is_shown_and_both_files_are_named(config, tmp_path, capsys):
    shown = []

    def see(self, step, see=Validator.run):
        shown.append({u.name: u.B.detach().clone() for u in updates(self.editor.flux)})
        return see(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "run", see)
        out = run(config, tmp_path / "out", "use_ema=true", "max_train_steps=3")
        run(config, tmp_path / "raw", "use_ema=true", "ema_validation=none", "max_train_steps=3")
    said = capsys.readouterr().out
    for folder, files in ((out, shown[0]), (tmp_path / "raw", shown[1])):
        file = folder / ("ema" if folder == out else "") / "pytorch_lora_weights.safetensors"
        read = read_adapter(file).updates
        assert all(torch.allclose(update.B, files[update.name] * update.scale) for update in read)
    assert f"{out}/pytorch_lora_weights.safetensors\n{out}/ema/pytorch_lora_weights.safetensors" in said


def deltas(file):
    """What an adapter file adds to each weight."""
    return {update.name: update.delta() for update in read_adapter(file).updates}


def test_a_run_may_start_from_a_lora_file(config, tmp_path):
    first = run(config, tmp_path / "first", "lora_alpha=4", "max_train_steps=2")
    file = first / "pytorch_lora_weights.safetensors"
    second = run(config, tmp_path / "second", f"init_lora={file}", "learning_rate=1e-12", "max_train_steps=1")
    old, new = deltas(file), deltas(second / file.name)
    assert all(torch.allclose(old[name], new[name], atol=1e-7) for name in old | new)
    run(config, first, f"init_lora={file}", "max_train_steps=1", "resume_from_checkpoint=null")  # from its own folder
    kept = deltas(first / "previous-1" / file.name)
    assert torch.equal(kept["transformer_blocks.0.attn.to_q"], old["transformer_blocks.0.attn.to_q"])
    file = first / "previous-1" / file.name
    for change, said in (("lora_rank=4", "of rank 2.*set lora_rank"), ("flux_lora_target=context", "set flux_lora_ta")):
        with pytest.raises(ValueError, match=said):
            run(config, tmp_path / "third", f"init_lora={file}", change)
    with pytest.raises(ValueError, match="nowhere.* does not exist"):
        run(config, tmp_path / "third", "init_lora=nowhere.safetensors")
