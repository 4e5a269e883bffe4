"""The first screen: what a trained parameter will take."""

import pytest

from kontext_min.config import Config
from kontext_min.training.start import bytes_of_one

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
