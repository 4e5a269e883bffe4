"""The first screen: what a trained parameter will take."""

import pytest
import torch

from kontext_min.config import Config
from kontext_min.memory import GB, held
from kontext_min.training.start import bytes_of_one, on_meta

SIZES = {  # bytes of parameter, gradient and state, by the optimizers' papers; 8 bits have an fp32 scale per 256 values
    "adamw": 4 + 4 + 2 * 4,
    "adamw_bf16": 2 + 2 + 2 * 2 + 2,  # and what rounding took off
    "ao-adamw8bit": 4 + 4 + 2 * (1 + 4 / 256),
    "optimi-lion": 4 + 4 + 4,
    "optimi-adan": 4 + 4 + 4 * 4,
    "optimi-sgd": 4 + 4,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_trained_parameter_takes_what_its_optimizer_keeps_of_it(name):
    config = Config(data_backend_config=[], optimizer=name)
    assert bytes_of_one(config) == pytest.approx(SIZES[name], rel=0.06)
    assert bytes_of_one(config.model_copy(update={"use_ema": True})) == bytes_of_one(config) + 4


@pytest.mark.parametrize("ranks", [1, 8])
def test_what_each_gpu_holds_of_the_published_model(ranks):
    config = Config(data_backend_config=[], pretrained_model_name_or_path="nobody/has-this", lora_rank=1)
    count, block = 11_901_408_320, 339_831_296  # of numbers, in all and in a double block: facts of the published files
    outside = count - 19 * block - 38 * 141_591_808
    whole = held(on_meta(config, torch.bfloat16, full=False, quantised=False), 16, torch.bfloat16, ranks)
    assert sum(whole.values()) == pytest.approx(2 * count, rel=0.01)
    shards = held(on_meta(config, torch.bfloat16, full=True, quantised=False), 16, torch.bfloat16, ranks, sharded=True)
    assert sum(shards.values()) == 16 * count / ranks + 2 * (2 * block + outside)
    assert sum(shards.values()) / GB < 200 / ranks + 2
