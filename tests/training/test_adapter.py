"""What a config says of the adapter: the modules and the size on each."""

import json
from collections import Counter

import pytest

from kontext_min.adapters.layers import Kronecker
from kontext_min.config import Config, explain, read_config
from kontext_min.models.flux import FluxConfig
from kontext_min.training.adapter import sizes

LOKR = {"algo": "lokr", "multiplier": 1.0, "full_matrix": True, "linear_alpha": 1, "factor": 16}
SIMPLETUNER = LOKR | {  # its lycoris_config.json.example
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    }
}


def read(tmp_path, *overrides: str, **values) -> Config:
    (tmp_path / "config.json").write_text(json.dumps({"data_backend_config": [], **values}))
    return read_config(tmp_path / "config.json", list(overrides))


def counted(config: Config) -> Counter:
    return Counter(sizes(config, FluxConfig()).values())


def test_simpletuners_example_is_lokr_by_class_of_module_from_a_file_or_inline(tmp_path):
    (tmp_path / "lycoris_config.json").write_text(json.dumps(SIMPLETUNER))
    config = read(tmp_path, lora_type="lycoris", lycoris_config=str(tmp_path / "lycoris_config.json"))
    attention = 19 * 8 + 38 * 3
    expected = {Kronecker(16, True): attention, Kronecker(8, True): 19 * 4}
    assert counted(config) == expected == counted(read(tmp_path, lora_type="lycoris", lycoris_config=SIMPLETUNER))
    (tmp_path / "config.json").write_text(config.record())
    assert counted(read_config(tmp_path / "config.json", [])) == expected
    lines = "\n".join(explain(config))
    assert "lycoris_config" in lines and "lora_rank" not in lines and "flux_lora_target" not in lines


def test_without_a_preset_flux_lora_target_says_the_modules(tmp_path):
    inline = {"algo": "lokr", "factor": 8, "linear_dim": 16, "linear_alpha": 4, "decompose_both": True}
    config = read(tmp_path, lora_type="lycoris", lycoris_config=inline, flux_lora_target="all+ffs")
    assert counted(config) == {Kronecker(8, False, 16, 4.0, True): 419}
    inline["apply_preset"] = {"module_algo_map": {"FeedForward": {"dim": 4, "full_matrix": False}}}
    config = read(tmp_path, lora_type="lycoris", lycoris_config=inline, flux_lora_target="all+ffs")
    assert counted(config) == {Kronecker(8, False, 16, 4.0, True): 343, Kronecker(8, False, 4, 4.0, True): 76}


def test_rank_by_pattern_the_first_that_fits_and_alpha_for_all(tmp_path):
    patterns = {"transformer_blocks.0.*": 4, "to_q": 8}
    said = sizes(read(tmp_path, lora_rank_pattern=patterns), FluxConfig())
    assert said["transformer_blocks.0.attn.to_q"] == (4, 4)
    assert said["transformer_blocks.1.attn.to_q"] == (8, 8)
    assert said["transformer_blocks.0.attn.to_k"] == (4, 4)
    assert said["transformer_blocks.1.attn.to_v"] == (16, 16)
    assert sizes(read(tmp_path, lora_rank_pattern={"to_q": 8}, lora_alpha=16), FluxConfig())[
        "transformer_blocks.1.attn.to_q"
    ] == (8, 16)


LYCORIS = {"lora_type": "lycoris", "lycoris_config": LOKR}
CONTRADICTIONS = {
    "lycoris is described by lycoris_config; take out lora_rank": LYCORIS | {"lora_rank": 16},
    "take out lora_alpha, use_dora": LYCORIS | {"use_dora": True, "lora_alpha": 4},
    "take out flux_lora_target": LYCORIS | {"lycoris_config": SIMPLETUNER, "flux_lora_target": "all"},
    "lora_type lycoris needs lycoris_config": {"lora_type": "lycoris"},
    "lora_format kohya is a LoRA's alone": LYCORIS | {"lora_format": "kohya"},
    "needs linear_dim, or full_matrix": LYCORIS | {"lycoris_config": {"algo": "lokr", "factor": 8}},
    "algo = 'loha': input should be 'lokr'": LYCORIS | {"lycoris_config": {"algo": "loha"}},
    "multiplier = 0.5": LYCORIS | {"lycoris_config": LOKR | {"multiplier": 0.5}},
    "dropout is not used here: use lora_dropout": LYCORIS | {"lycoris_config": LOKR | {"dropout": 0.1}},
    "use_scalar is not used here": LYCORIS | {"lycoris_config": LOKR | {"use_scalar": True}},
    "name_algo_map is not used here": LYCORIS | {
        "lycoris_config": LOKR | {"apply_preset": {"name_algo_map": {"x": {"factor": 2}}}}
    },
    "'Linear': input should be 'Attention'": LYCORIS | {
        "lycoris_config": LOKR | {"apply_preset": {"target_module": ["Linear"]}}
    },
    "unknown key lycoris_config.facto, did you mean factor": LYCORIS | {"lycoris_config": LOKR | {"facto": 8}},
    "module_algo_map FeedForward fits none": LYCORIS | {
        "lycoris_config": LOKR | {"apply_preset": {"module_algo_map": {"FeedForward": {"factor": 2}}}}
    },
    "init_lokr_norm is not used here": LYCORIS | {"init_lokr_norm": 1e-3},
    "validation_lycoris_strength is not used here": LYCORIS | {"validation_lycoris_strength": 0.5},
    "lora_rank_pattern to_x fits none": {"lora_rank_pattern": {"to_x": 4}},
    "unknown key lora_alpha_pattern, did you mean lora_rank_pattern": {"lora_alpha_pattern": {"ff.net.2": 4}},
    "lora_rank_pattern.to_q = 0": {"lora_rank_pattern": {"to_q": 0}},
    "flux_lora_target 'every' is none of": {"flux_lora_target": "every"},
    "none.json does not exist": LYCORIS | {"lycoris_config": "none.json"},
}  # fmt: skip


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_what_contradicts_or_cannot_be_is_one_sentence(tmp_path, said):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        sizes(read(tmp_path, **CONTRADICTIONS[said]), FluxConfig())
    assert said in str(raised.value)


def test_what_is_off_may_stand_beside_lycoris(tmp_path):
    config = read(tmp_path, **LYCORIS, lora_alpha=None, use_dora=False, init_lokr_norm=None)
    assert counted(config) == {Kronecker(16, True): 266}
