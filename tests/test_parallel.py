"""Many ranks do what one does: the same losses, the same result, the same files; and a rank that dies loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import infer
import train
from kontext_min import parallel
from kontext_min.run_folder import LORA
from kontext_min.training import state

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(kontext, tmp_path_factory):
    """Four batches a step, at whatever number of ranks; a checkpoint after the second of four steps."""
    folder = tmp_path_factory.mktemp("ranks")
    values = {
        "pretrained_model_name_or_path": str(kontext), "mixed_precision": "no", "max_train_steps": 4,
        "data_backend_config": tiny.write_pairs(folder, 5, (64, 48), "make the sky red\nmake it night"),
        "cache_dir": str(folder / "cache"), "learning_rate": 1e-3, "gradient_accumulation_steps": 4,
        "checkpointing_steps": 2, "validation_steps": 0, "num_eval_images": 3, "num_eval_pairs": 3,
        "eval_timesteps": 1, "validation_num_inference_steps": 1, "caption_dropout_probability": 0.2,
        "lora_dropout": 0.1, "distributed_timeout": 0.5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


@pytest.fixture(scope="module")
def full(config):
    """The same for all parameters."""
    values = json.loads(config.read_text())
    del values["lora_dropout"]
    values |= {"model_type": "full", "learning_rate": 1e-4, "fsdp_cpu_offload": True}
    (config.parent / "full.json").write_text(json.dumps(values))
    return config.parent / "full.json"


def launch(count: int, *command: str, options=()) -> subprocess.Popen:
    """torchrun with so many ranks."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *options]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return subprocess.Popen([*run, *map(str, command)], env=os.environ | threads, **pipes)


def on_ranks(count: int, config: Path, *overrides: str) -> tuple[Path, str]:
    """A run on so many ranks, each with its share of the batches -> its folder, and all that was printed."""
    out = config.parent / "-".join([config.stem, str(count), *overrides]).replace("=", "-")
    process = launch(
        count, "train.py", config, f"output_dir={out}", f"gradient_accumulation_steps={4 // count}", *overrides
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return out, said


def alone(config: Path, *overrides: str) -> Path:
    """The run without torchrun."""
    out = config.parent / f"{config.stem}-alone"
    train.main([str(config), f"output_dir={out}", *overrides])
    return out


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def equal(one: Path, other: Path):
    """Losses to 1e-6, at every step and of the evaluation, and PSNR of the pictures."""
    losses = [[line["loss"] for line in lines(out)] for out in (one, other)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-6)
    found = [[line["loss"] for line in lines(out, "validation/eval.jsonl")] for out in (one, other)]
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], abs=1e-5)
    shown = [lines(out, "validation/psnr.jsonl")[0]["pairs"] for out in (one, other)]
    assert len(shown[0]) == 3
    for left, right in zip(*shown, strict=True):
        assert left == pytest.approx(right, abs=0.01)


@pytest.fixture(scope="module")
def single(config):
    return alone(config)


@pytest.fixture(scope="module")
def two(full):
    return on_ranks(2, full)[0]


@pytest.mark.parametrize("count,overrides", [(2, ()), (4, ()), (2, ("fsdp_enable=true",))])
def test_ranks_train_the_lora_that_one_process_trains(config, single, count, overrides):
    out, said = on_ranks(count, config, *overrides)
    equal(single, out)
    (ours, theirs) = (load_file(folder / LORA) for folder in (out, single))
    assert max(tiny.error(ours[name], theirs[name]) for name in theirs) < 1e-4
    assert said.count("trainable parameters") == 1 and f"ranks    {count}," in said  # rank 0 alone speaks


def test_ranks_make_the_caches_together_and_nothing_twice(config, single):
    cache = config.parent / "other-cache"
    _, said = on_ranks(2, config, f"cache_dir={cache}", "max_train_steps=1")
    made, before = (
        {path.relative_to(c) for path in c.rglob("*.safetensors")} for c in (cache, config.parent / "cache")
    )
    assert made == before
    captions, pictures = map(int, re.search(r"encoded (\d+) captions and (\d+) pictures", said).groups())
    assert captions + pictures == len(made)
    bars = re.findall(r"encoding (?:captions|pictures): 100%.*?(\d+)/\d+ ", said)
    assert set(map(int, bars)) == {-(-captions // 2), -(-pictures // 2)}  # what rank 0 made: the larger half


def test_all_parameters_in_shards_train_as_in_one_process(full, two):
    one = alone(full)
    equal(one, two)
    ours, theirs = (tiny.read_part(out / "model" / "transformer") for out in (two, one))
    assert max(tiny.error(ours[name], theirs[name]) for name in theirs) < 1e-6
    base = tiny.read_part(Path(json.loads(full.read_text())["pretrained_model_name_or_path"]) / "transformer")
    assert base.keys() == ours.keys()
    assert min(tiny.error(ours[name], base[name]) for name in base) > 0  # every tensor has learned
    picture = two / "picture.png"
    infer.main(["--model", str(two / "model"), "--prompt", "make the sky red", "--steps=1", "--out", str(picture)])
    assert picture.is_file()


def test_a_checkpoint_of_two_ranks_is_the_same_on_one_and_on_four_and_takes_what_was_predicted(full, two):
    out, found = two, {}
    for count in (1, 2, 4):
        file = out / f"states-{count}.pt"
        process = launch(count, "tests/rank_states.py", full, out / "checkpoint-2", file)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        found[count] = torch.load(file)
        for predicted, counted in found[count]["bytes"]:
            assert counted == pytest.approx(predicted, rel=0.05)
    names = found[2]["states"].keys()
    assert any(name.endswith("/exp_avg") for name in names)
    for count in (1, 4):
        assert found[count]["states"].keys() == names
        assert all(torch.equal(found[count]["states"][name], found[2]["states"][name]) for name in names)
    for count in (1, 4):  # and a run goes on from it
        other = out.with_name(f"resumed-{count}")
        kept = f"resume_from_checkpoint={out / 'checkpoint-2'}"
        train_on = [f"output_dir={other}", f"gradient_accumulation_steps={4 // count}", kept]
        process = launch(count, "train.py", full, *train_on)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "after step 2" in said, said
        assert [e["loss"] for e in lines(other)] == pytest.approx([e["loss"] for e in lines(out)[2:]], abs=1e-6)


def stopped_after(out: Path, step: int, process: subprocess.Popen, number: int):
    """Send a signal to rank 1 somewhere in a step after a checkpoint."""
    while not (out / f"checkpoint-{step}" / "state.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    time.sleep(0.3)
    found = subprocess.run(["pgrep", "-f", f"train.py .*output_dir={out}"], capture_output=True, text=True).stdout
    ranks = [int(pid) for pid in found.split() if int(pid) != process.pid]
    os.kill(max(ranks), number)


def test_a_rank_that_is_killed_ends_the_job_with_one_sentence_and_a_restart_ends_as_if_nothing_had_been(config):
    longer = ["max_train_steps=40", "checkpointing_steps=10", "gradient_accumulation_steps=2", "num_eval_images=0"]
    whole, out = config.parent / "whole", config.parent / "killed"
    process = launch(2, "train.py", config, f"output_dir={whole}", *longer)
    assert process.wait(timeout=300) == 0
    process = launch(2, "train.py", config, f"output_dir={out}", *longer, options=["--max-restarts=1"])
    stopped_after(out, 10, process, signal.SIGKILL)
    began = time.monotonic()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert time.monotonic() - began < 120
    last = re.findall(r"train.py: a rank died, .*the last good checkpoint is (\S+);", said)
    assert len(last) == 1 and f"going on from {last[0]}, after step" in said, said
    assert lines(out)[-1]["step"] == 40 and [e["loss"] for e in lines(out)] == [e["loss"] for e in lines(whole)]
    assert (out / LORA).read_bytes()[-(10**4) :] == (whole / LORA).read_bytes()[-(10**4) :]  # behind the header
    ours, theirs = load_file(out / LORA), load_file(whole / LORA)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_agents_as_on_two_machines_train_one_lora(config, single):
    out, agents = config.parent / "agents", []
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29473", "--rdzv-id=kontext"]
    for number in range(2):
        overrides = [f"output_dir={out}", "gradient_accumulation_steps=2"]
        agents.append(launch(1, "train.py", config, *overrides, options=[*meeting, f"--node-rank={number}"]))
    texts = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    equal(single, out)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_within_the_timeout(config):
    out = config.parent / "hung"
    longer = ["max_train_steps=400", "checkpointing_steps=5", "gradient_accumulation_steps=2", "num_eval_images=0"]
    process = launch(2, "train.py", config, f"output_dir={out}", *longer, "distributed_timeout=0.1")
    stopped_after(out, 5, process, signal.SIGSTOP)
    began = time.monotonic()
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and time.monotonic() - began < 90  # torchrun itself gives the other 30 seconds
    assert len(re.findall(r"train.py: a rank died, or was silent for 0.1 minutes; the last good", said)) == 1, said


def test_a_mistake_in_the_config_is_said_once(config):
    process = launch(2, "train.py", config, "learnig_rate=1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and said.count("did you mean learning_rate?") == 1


def test_the_first_rank_to_fail_says_why_even_before_the_ranks_have_met(tmp_path):
    """torchrun ends all ranks as soon as one has failed: rank 0 would come too late to say it."""
    late = "import os, time\nfrom kontext_min import parallel\nif os.environ['RANK'] == '0':\n    time.sleep(60)\n"
    late += "with parallel.errors_in_one_line('late.py'):\n    raise ValueError('told')\n"
    (tmp_path / "late.py").write_text(late)
    said, _ = launch(2, tmp_path / "late.py").communicate(timeout=300)
    assert said.count("late.py: told") == 1, said


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["model_type=full", "lora_rank=4"], "model_type full has no adapter; take out lora_dropout, lora_rank"),
        (["fsdp_enable=true", "base_model_precision=int8-torchao"], "fsdp_enable: a quantised base is kept whole"),
        (["fsdp_enable=true", "use_dora=true"], "use_dora needs whole weights"),
        (["fsdp_enable=true", "fsdp_cpu_offload=true"], "fsdp_cpu_offload needs model_type full"),
    ],
)
def test_what_shards_cannot_do_is_refused(config, overrides, said):
    with pytest.raises(ValueError, match=said):
        train.main([str(config), *overrides])


def test_regularisation_data_and_shards_exclude_each_other(config):
    values = json.loads(config.read_text())
    values["data_backend_config"][0]["is_regularisation_data"] = True
    (config.parent / "regularised.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is_regularisation_data would leave ranks waiting"):
        train.main([str(config.parent / "regularised.json"), "fsdp_enable=true"])


def test_work_is_shared_out_in_order(monkeypatch):
    done = {}
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world", lambda: 4)
        monkeypatch.setattr(parallel, "gathered", lambda mine, rank=rank: done.setdefault(rank, mine) and [mine] * 4)
        parallel.shared_out(str, range(6))
    assert [len(mine) for mine in done.values()] == [2] * 4
    assert [done[i % 4][i // 4] for i in range(6)] == ["0", "1", "2", "3", "4", "5"]


def test_a_damaged_file_of_a_sharded_checkpoint_is_found(two, tmp_path):
    out = Path(shutil.copytree(two, tmp_path / "copy", symlinks=True))
    file = out / "checkpoint-4" / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged .its checksum differs.; go on with .*checkpoint-2"):
        state.restore(out / "checkpoint-4", state.Parts(), {}, False)
