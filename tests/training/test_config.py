"""The config page: comments, overrides, and messages that help."""

import json
from pathlib import Path

import pytest

from kontext_min.config import Config, explain, read_config

ROOT = Path(__file__).parents[2]


def write(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    return tmp_path / "config.json"


def test_comments_trailing_commas_dashes_and_overrides(tmp_path):
    path = write(tmp_path, '{"--lora_rank": 8, // half\n "data_backend_config": [], "seed": 1,}')
    config = read_config(path, ["seed=3", "--learning_rate=5e-4", "output_dir=some where"])
    assert (config.lora_rank, config.seed, config.learning_rate, config.output_dir) == (8, 3, 5e-4, Path("some where"))


def test_all_problems_come_at_once_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path, '{"lora_rnk": 8, "learning_rate": "fast", "data_backend_config": [{"id": "a", "instance_dir": 1}]}'
    )
    with pytest.raises(ValueError) as raised:
        read_config(path, ["base_model_precision=nf4-bnb"])
    for part in (
        "unknown key lora_rnk, did you mean lora_rank?",
        "learning_rate = 'fast'",
        "did you mean instance_data_dir?",
        "base_model_precision = 'nf4-bnb': input should be 'no_change', 'bf16', 'int8-quanto', 'int8-torchao',",
    ):
        assert part in str(raised.value), str(raised.value)


@pytest.mark.parametrize("text, part", [("{", "is not JSON"), ("[]", "one object")])
def test_malformed_files_are_one_sentence(tmp_path, text, part):
    with pytest.raises(ValueError, match=part):
        read_config(write(tmp_path, text), [])


def test_a_missing_file_and_a_malformed_override_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_config(tmp_path / "none.json", [])
    with pytest.raises(ValueError, match="KEY=VALUE"):
        read_config(write(tmp_path, "{}"), ["seed"])


def test_the_shipped_configs_are_valid():
    for path in sorted((ROOT / "configs").glob("*.json")):
        assert isinstance(read_config(path, []), Config)
        read_config(path, []).datasets()


def test_the_quickstarts_keys_are_used_or_named_with_what_becomes_of_them(tmp_path):
    keys = """{"model_family": "flux", "model_flavour": "kontext", "gradient_checkpointing": true,
      "fuse_qkv_projections": false, "lora_rank": 16, "learning_rate": 1e-5, "optimizer": "optimi-lion",
      "max_train_steps": 10000, "validation_guidance": 2.5, "validation_resolution": "1024x1024",
      "conditioning_multidataset_sampling": "random", "data_backend_config": []}"""
    config = read_config(write(tmp_path, keys), [])
    assert set(config.ignored) == {"fuse_qkv_projections"} and config.validation_resolution == "1024x1024"
    with pytest.raises(ValueError, match="flow_schedule_auto_shift is not used here: use flow_schedule_shift: auto"):
        read_config(write(tmp_path, keys), ["flow_schedule_auto_shift=true"])


def test_explain_says_value_source_and_meaning_of_every_key(tmp_path):
    config = read_config(write(tmp_path, '{"lora_rank": 8, "num_train_epochs": 0, "data_backend_config": []}'), [])
    lines = explain(config)
    assert len(lines) == len(set(Config.model_fields) - config.idle) + 1  # no LoKr here: its key is not in force
    rank = next(line for line in lines if line.startswith("lora_rank "))
    assert rank.split()[:3] == ["lora_rank", "8", "given"]
    seed = next(line for line in lines if line.startswith("seed "))
    assert seed.split() == ["seed", "42", "default"]
    assert any("num_train_epochs" in line and "max_train_steps says how long" in line for line in lines)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "optimi-lion"])
def test_what_was_not_said_of_an_optimizer_is_not_said_by_the_record(tmp_path, optimizer):
    config = read_config(write(tmp_path, '{"data_backend_config": []}'), [f"optimizer={optimizer}"])
    again = read_config(write(tmp_path, config.record()), [])
    assert again.optimizer_options() == config.optimizer_options() and again.record() == config.record()
    assert any(line.startswith("adam_beta2") for line in explain(config)) == (optimizer == "adamw")


def test_a_flavour_without_a_path_is_the_published_model_and_explain_says_that_it_is_implied(tmp_path):
    def model(*given):
        config = read_config(write(tmp_path, '{"data_backend_config": []}'), [*given])
        (line,) = [line for line in explain(config) if line.startswith("pretrained_model_name_or_path ")]
        return line.split()[1:3], json.loads(config.record())["pretrained_model_name_or_path"]

    kontext = "black-forest-labs/FLUX.1-Kontext-dev"
    assert model() == (["'nano'", "default"], "nano")
    assert model("model_flavour=kontext") == ([f"'{kontext}'", "implied"], kontext)
    assert model("model_flavour=kontext", "pretrained_model_name_or_path=nano") == (["'nano'", "given"], "nano")


def test_the_schema_knows_every_key_and_its_meaning():
    properties = Config.model_json_schema()["properties"]
    assert set(properties) == set(Config.model_fields)
    assert properties["max_train_steps"]["type"] == "integer" and "optimizer steps" in str(
        properties["max_train_steps"]
    )


@pytest.mark.parametrize("override", [
    "flow_schedule_shift=-1", "flow_schedule_shift=0", "adam_beta1=1.5", "flux_guidance_min=5", "lora_alpha=0",
    "max_train_steps=0", "max_grad_norm=0", "base_model_precision=bf16", "validation_seed=-5",
    "seed=9223372036854775808",
])  # fmt: skip
def test_values_that_would_train_garbage_are_refused_with_the_key(tmp_path, override):
    path = write(tmp_path, '{"data_backend_config": [], "mixed_precision": "no"}')
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        read_config(path, [override])


@pytest.mark.parametrize("override", ["memory=24", "modulation_on_cpu=true", "offload_activations=false"])
def test_a_model_in_shards_refuses_what_only_a_plan_decides(tmp_path, override):
    path = write(tmp_path, '{"data_backend_config": [], "fsdp_enable": true}')
    with pytest.raises(ValueError, match=f"in shards has no plan to choose; take out {override.partition('=')[0]}"):
        read_config(path, [override])
    assert read_config(path, ["recompute=keep_attn"]).memory == "auto"


def test_memory_is_a_number_of_gb_or_auto(tmp_path):
    path = write(tmp_path, '{"data_backend_config": []}')
    assert (read_config(path, []).memory, read_config(path, ["memory=12"]).memory) == ("auto", 12)
    with pytest.raises(ValueError, match="memory.*should be greater than 0"):
        read_config(path, ["memory=0"])
    with pytest.raises(ValueError, match="offload_activations needs gradient_checkpointing"):
        read_config(path, ["offload_activations=true", "gradient_checkpointing=false"])


def test_a_format_that_cannot_hold_the_adapter_is_refused_before_training(tmp_path):
    path = write(tmp_path, '{"data_backend_config": [], "use_dora": true, "lora_format": "comfyui"}')
    with pytest.raises(ValueError, match="lora_format comfyui is a LoRA's alone; convert it later"):
        read_config(path, [])
    assert read_config(path, ["lora_format=diffusers"]).use_dora
    for decay in ("adam_weight_decay=0.5", "optimizer_config=weight_decay=0.5"):
        with pytest.raises(ValueError, match="use_dora needs a weight decay of at most 0.01"):
            read_config(path, ["lora_format=diffusers", decay])
    assert read_config(path, ["lora_format=diffusers", "optimizer=optimi-lion", "adam_weight_decay=0.5"]).use_dora


def test_characters_in_two_halves_are_joined_and_a_key_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path, '{"data_backend_config": [], "validation_prompt": ' + json.dumps("night \U0001f3a8") + "}")
    assert r"\ud83c\udfa8" in path.read_text() and read_config(path, []).validation_prompt == "night \U0001f3a8"
    path = write(tmp_path, '{"data_backend_config": [], "lora_rank": 16, "lora_rank": 2}')
    with pytest.raises(ValueError, match="lora_rank"):
        read_config(path, [])
