"""What a run will take: by hand, by published figures, and beside what it then takes; and what is chosen to fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU

import train
from kontext_min.config import Config
from kontext_min.data.buckets import Size
from kontext_min.memory import GB, POLICIES, held
from kontext_min.training.plan import (
    CARDS,
    PLANS,
    SPARE,
    WORKSPACE,
    Forecast,
    Plan,
    bytes_of_one,
    choose,
    on_meta,
    screen,
)

SIZES = {  # bytes of parameter, gradient and state, by the optimizers' papers; 8 bits have an fp32 scale per 256 values
    "adamw": 4 + 4 + 2 * 4,
    "adamw_bf16": 2 + 2 + 2 * 2 + 2,  # and what rounding took off
    "ao-adamw8bit": 4 + 4 + 2 * (1 + 4 / 256),
    "optimi-lion": 4 + 4 + 4,
    "optimi-adan": 4 + 4 + 4 * 4,
    "optimi-sgd": 4 + 4,
}
NOWHERE = {"data_backend_config": [], "pretrained_model_name_or_path": "nobody/has-this"}  # of the published sizes
COUNT, BLOCK = 11_901_408_320, 339_831_296  # of numbers, in all and in a double block: facts of the published files


def pairs(*sides: int) -> list:
    """Examples as far as a forecast looks: one target, and references of these sides."""
    target, *references = (SimpleNamespace(size=Size(side, side)) for side in sides)
    return [SimpleNamespace(target=target, references=references)]


@pytest.mark.parametrize("name", SIZES)
def test_a_trained_parameter_takes_what_its_optimizer_keeps_of_it(name):
    config = Config(data_backend_config=[], optimizer=name)
    assert bytes_of_one(config) == pytest.approx(SIZES[name], rel=0.06)
    assert bytes_of_one(config.model_copy(update={"use_ema": True})) == bytes_of_one(config) + 4


@pytest.mark.parametrize("ranks", [1, 8])
def test_what_each_gpu_holds_of_the_published_model(ranks):
    config = Config(**NOWHERE, lora_rank=1)
    outside = COUNT - 19 * BLOCK - 38 * 141_591_808
    whole = held(on_meta(config, torch.bfloat16), 16, torch.bfloat16, ranks)
    assert sum(whole.values()) == pytest.approx(2 * COUNT, rel=0.01)
    full = config.model_copy(update={"model_type": "full"})
    shards = held(on_meta(full, torch.bfloat16), 16, torch.bfloat16, ranks, sharded=True)
    assert sum(shards.values()) == 16 * COUNT / ranks + 2 * (2 * BLOCK + outside)
    assert sum(shards.values()) / GB < 200 / ranks + 2


AT_ONCE = {"memory_rate": 1e12}  # of a card whose memory takes no time


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    """Of the published model in int8 at 1024 px with a reference of the same size, on CUDA."""
    return Forecast(
        Config(**NOWHERE, base_model_precision="int8-torchao", flux_lora_target="all+ffs"), pairs(1024, 1024), True
    )


def test_the_weights_that_stay_are_those_by_the_published_shapes(forecast):
    """Modulation has 3.247 billion numbers, linears of blocks that see tokens 8.608, a double block's 0.226 of them."""
    parts = forecast.parts(Plan("block"))
    assert parts["transformer"] == pytest.approx(8.608e9 + 2 * (COUNT - 8.608e9), rel=0.003)  # int8; the rest in bf16
    without = forecast.parts(Plan("block", modulation_on_cpu=True))["transformer"]
    host = forecast.host(Plan("block", modulation_on_cpu=True))
    assert (
        parts["transformer"] - without == pytest.approx(host * GB) == pytest.approx(2 * (3.247e9 + 0.031e9), rel=0.001)
    )
    ring = forecast.parts(Plan("block", modulation_on_cpu=True, stream_blocks=True))["transformer"]
    assert without - ring == pytest.approx(8.608e9 - 3 * 0.2265e9, rel=0.002)  # three double blocks stay


def test_the_hosts_memory_is_counted_as_torch_takes_it_in_powers_of_two(forecast):
    one = 2**26  # a block's input is of 8704 * 3072 * 2 = 53.5 million bytes
    assert forecast.host(Plan("block", offload_activations=True)) == pytest.approx(54 * one / GB)
    double = 2 * (2**25 + 2**24 + 2 * 2**26)  # both streams' qkv, proj and two of the feed-forward, in int8
    streamed = forecast.host(Plan("block", stream_blocks=True))
    assert streamed == pytest.approx((19 * double + 38 * 2 * 2**26) / GB, rel=0.002)  # 12.1 GB for 8.6


def test_seconds_are_the_roofline_that_was_worked_out_by_hand(forecast):
    """FLOPs of shapes by hand over the same sustained rates: bf16 and, of products in 8 bits, fp8 and int8."""
    by_hand = {("keep_attn", "H100"): 0.83, ("keep_attn", "4090"): 3.41, ("keep_attn", "3090"): 8.4}
    for (policy, card), seconds in by_hand.items():
        found = forecast.seconds(Plan(policy), CARDS[card] | AT_ONCE)
        assert found == pytest.approx(seconds, rel=0.01)
        moved = forecast.work(policy).moved / CARDS[card]["memory_rate"] / 1e12
        assert forecast.seconds(Plan(policy), CARDS[card]) == pytest.approx(found + moved)
    rounded = Forecast(
        forecast.config.model_copy(update={"base_model_precision": "fp8-dynamic"}), forecast.examples, True
    )
    rounded.counts = forecast.counts  # the same FLOPs
    assert rounded.seconds(Plan("keep_attn"), CARDS["H100"] | AT_ONCE) == pytest.approx(0.66, rel=0.01)
    away = forecast.seconds(Plan("block", offload_activations=True), CARDS["H100"] | {"pcie": 1})
    assert away == pytest.approx(2 * 54 * 8704 * 3072 * 2 / GB, rel=0.01)  # the inputs of blocks cross twice, at a GB/s
    streamed = forecast.seconds(Plan("keep_attn", stream_blocks=True), CARDS["3090"] | {"pcie": 1})
    assert streamed == pytest.approx(2 * 8.61, rel=0.01)  # so do their weights


def test_what_is_not_computed_again_moves_fewer_bytes(forecast):
    """What is cheap is computed again by every policy but the last, which is faster than keep_gemm by this alone."""
    moved = {policy: forecast.work(policy).moved for policy in POLICIES}
    assert moved["none"] < 0.8 * moved["keep_gemm"]
    assert forecast.seconds(Plan("none"), CARDS["4090"]) < forecast.seconds(Plan("keep_gemm"), CARDS["4090"])


def test_blocks_that_come_and_go_are_not_compiled_and_the_run_says_so(tmp_path, capsys):
    arguments = [f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "max_train_steps=1"]
    arguments += ["torch_compile=true", "stream_blocks=true", "validation_disable=true", "eval_loss_disable=true"]
    train.main(["configs/nano.json", *arguments, "resume_from_checkpoint="])
    assert "torch_compile is left out: blocks whose inputs or weights come and go" in capsys.readouterr().out


def test_a_smaller_budget_never_takes_more_and_what_is_named_is_kept(forecast):
    budgets = [80, 48, 42, 24, 20, 18, 16, 15.5, 8.5]
    plans = [forecast.fitting(budget) for budget in budgets]
    totals = [forecast.total(plan) for plan in plans]
    assert totals == sorted(totals, reverse=True) and len(set(plans)) >= 5
    assert all(total + SPARE <= budget for total, budget in zip(totals, budgets, strict=True))
    assert plans[0].recompute == "none" and plans[-1].stream_blocks and forecast.fitting(4) is None
    order = [*dict.fromkeys(plan.recompute for plan in plans if not plan.stream_blocks)]
    assert order == ["none", "keep_gemm", "keep_attn", "block"]


def test_of_what_a_budget_leaves_blocks_are_computed_again_by_less(forecast):
    """Linears of 2 x 8704 tokens cost 0.39 GB a block, attention 0.05: what is free becomes blocks."""
    plan = forecast.fitting(24)
    assert plan == Plan("keep_attn", 11, modulation_on_cpu=True)
    assert 24 - SPARE - 0.45 < forecast.total(plan) <= 24 - SPARE
    seconds = [forecast.seconds(one, CARDS["4090"]) for one in (Plan("keep_gemm"), plan, Plan("keep_attn"))]
    assert seconds == sorted(seconds) and len({*seconds}) == 3
    assert str(plan) == "keep_attn, keep_gemm of the last 11 blocks, modulation_on_cpu"
    with_none = replace(forecast.plan, recompute="none", recompute_less=3)  # nothing is less than that
    assert forecast.total(with_none) == forecast.total(Plan("none")) and str(with_none).endswith("last 3 blocks")
    for named in ({"recompute": "keep_attn"}, {"recompute_less": 0}):
        own = Forecast(forecast.config.model_copy(update=named), forecast.examples, True)
        own.counts = forecast.counts
        assert own.fitting(24) == Plan("keep_attn", modulation_on_cpu=True)


def test_what_a_config_names_is_so_in_every_plan(forecast):
    named = {"recompute": "keep_attn", "modulation_on_cpu": False}
    config = forecast.config.model_copy(update=named)
    own = Forecast(config, forecast.examples, True)
    own.counts = forecast.counts
    assert own.plan == own.fitting(80) == Plan("keep_attn")
    assert not own.fitting(24).modulation_on_cpu and own.fitting(24).recompute == "keep_attn"
    assert own.fitting(16).stream_blocks and not own.fitting(16).modulation_on_cpu
    for named in ({"offload_activations": True}, {"gradient_checkpointing": False}):  # they exclude each other
        own = Forecast(forecast.config.model_copy(update=named), forecast.examples, True)
        own.counts = forecast.counts
        assert all(plan.offload_activations != (plan.recompute == "none") for plan in map(own.fitting, (95, 80)))
    assert Forecast(Config(**NOWHERE, gradient_checkpointing=False), pairs(64, 64), False).plan.recompute == "none"


def test_the_largest_use_counts_and_of_several_references_what_a_use_shows():
    config = Config(**NOWHERE)
    examples = [*pairs(512, 256), *pairs(512, 1024, 512), *pairs(1024)]
    assert Forecast(config, examples, False).tokens == 512 + (512**2 + 1024**2) // 256
    every = config.model_copy(update={"conditioning_multidataset_sampling": "combined", "train_batch_size": 2})
    assert Forecast(every, examples, False).tokens == 2 * (512 + (2 * 512**2 + 1024**2) // 256)


def test_a_budget_that_nothing_fits_is_one_sentence_with_what_it_takes():
    config = Config(data_backend_config=[], memory=1.01, mixed_precision="no")  # nano
    with pytest.raises(
        ValueError, match=r"memory: 1\.0 GB are too few. The run needs 1\.\d GB by block, modulation_on"
    ):
        choose(config, pairs(96, 96), CPU)
    assert choose(config.model_copy(update={"memory": 8.0}), pairs(96, 96), CPU).plan == Plan("none")
    assert choose(config.model_copy(update={"memory": "auto"}), pairs(96, 96), CPU).plan == Plan("block")


def test_the_card_is_known_by_the_drivers_name_and_what_is_free_of_its_memory_is_the_budget(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.0e9, 25.2e9))  # another program has the rest
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0.3e9)
    config = Config(data_backend_config=[], mixed_precision="no")
    with pytest.raises(ValueError, match=r"memory: 1\.3 GB are too few"):
        choose(config, pairs(96, 96), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24.8e9, 25.2e9))
    found = choose(config, pairs(96, 96), torch.device("cuda"))
    assert found.card is CARDS["4090"] and found.plan == PLANS[0]
    assert "s a step" in found.lines()[-1] and WORKSPACE < found.total(found.plan) < 2
    beside = found.beside([{"seconds": s, "memory": 1.25} for s in (1, 2, 9)])
    tensors = found.total(found.plan) - WORKSPACE
    assert beside == f"measured 1.2 GB, 2.00 s a step; predicted {tensors:.1f} GB, 0.00 s a step"


def test_remedies_are_what_a_change_really_saves(forecast):
    own = Forecast(forecast.config, forecast.examples, True, Plan("keep_attn"))
    own.counts = forecast.counts
    said = own.remedies()
    assert (
        "modulation_on_cpu=True saves 6.6 GB, offload_activations=True saves 2.9 GB, recompute=block saves 3 GB" in said
    )


def test_out_of_memory_in_a_step_is_one_sentence_with_what_would_save_it(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr("kontext_min.training.trainer.flow_loss", full)
    arguments = [f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "max_train_steps=1"]
    with pytest.raises(ValueError, match="step 1 needs more memory than there is: modulation_on_cpu=True") as raised:
        train.main(["configs/nano.json", *arguments, "validation_disable=true", "eval_loss_disable=true"])
    said, last = str(raised.value).split("\n")
    assert ", gradient_checkpointing=True recompute=keep_attn saves 0.0" in said and said.count(" saves ") == 3
    assert last == "there is no checkpoint yet"


def test_an_epoch_that_shows_nothing_is_said_and_no_error():
    config = Config(data_backend_config=[])
    flux, seen = on_meta(config, torch.float32), SimpleNamespace(lines=list)
    examples = SimpleNamespace(epoch=lambda number, size: [], examples=pairs(96, 96))  # of probability below 1
    lines = screen(config, SimpleNamespace(flux=flux, device=CPU), examples, seen)
    assert any(line.startswith("epoch    0 uses in 0 batches: 0 steps") for line in lines)


def test_what_is_measured_stands_once_beside_what_was_predicted(tmp_path, monkeypatch, capsys):
    def on_a_card(config, examples, device):
        return Forecast(config, examples, True, card=CARDS["H100"])

    monkeypatch.setattr(train, "choose", on_a_card)
    arguments = [f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "max_train_steps=12"]
    train.main(["configs/nano.json", *arguments, "validation_disable=true", "eval_loss_disable=true"])
    said = capsys.readouterr().out
    assert said.count("measured ") == 1 and "; predicted 0.1 GB, 0.00 s a step" in said
    assert " GB  in all, by none\n" in said and "0.00 s a step, 0.0 hours in all" in said


def test_check_tells_what_the_quantised_base_takes_on_disk(forecast):
    assert forecast.cards()[0] == f"{forecast.config.cache_dir / 'base'} will take 15.2 GB"  # of the published sizes


def test_check_tells_of_every_card(tmp_path, capsys):
    train.main(["configs/nano.json", "--check", f"output_dir={tmp_path}"])
    said = capsys.readouterr().out
    assert all(f"  {name}, {card['memory']:3} GB: " in said for name, card in CARDS.items())
