"""A SimpleTuner user's files: every key of theirs is used, left out with a reason, or refused with a remedy."""

import json
import shutil
from pathlib import Path

import pytest

import train
from kontext_min.config import Config, Dataset, read_config
from kontext_min.foreign import TABLES

ROOT = Path(__file__).parents[2]
# fmt: off
USED = {  # config keys with values as SimpleTuner's files and its documentation have them, numbers as text too
    "model_family": "flux", "model_flavour": "kontext", "model_type": "lora", "base_model_precision": "int8-quanto",
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev", "gradient_checkpointing": "true",
    "gradient_checkpointing_interval": 2, "mixed_precision": "bf16", "data_backend_config": "config/pairs.json",
    "cache_dir": "cache", "aspect_bucket_alignment": "64", "conditioning_multidataset_sampling": "combined",
    "resolution": "1024", "resolution_type": "pixel_area", "minimum_image_size": 0, "maximum_image_size": "2048",
    "target_downsample_size": 1024, "caption_strategy": "textfile",
    "caption_dropout_probability": "0.1", "lora_type": "standard", "lora_rank": "16", "lora_alpha": 16,
    "lora_dropout": "0.1", "init_lora": "a.safetensors", "flux_lora_target": "all+ffs", "flow_schedule_shift": "3.0",
    "flow_sigmoid_scale": 1.0, "flow_use_uniform_schedule": "false", "flow_use_beta_schedule": "true",
    "flow_beta_schedule_alpha": 2.0, "flow_beta_schedule_beta": "2.0", "flux_guidance_mode": "random-range",
    "flux_guidance_value": "1.0", "flux_guidance_min": 0, "flux_guidance_max": "4", "loss_type": "huber",
    "huber_c": 0.1, "train_batch_size": "4", "gradient_accumulation_steps": "2", "max_train_steps": "10000",
    "seed": "42", "optimizer": "adamw_bf16", "learning_rate": "1e-4", "lr_scheduler": "polynomial",
    "lr_warmup_steps": "100", "lr_end": "4e-7", "lr_power": 0.8, "lr_num_cycles": 1, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_weight_decay": "0.01", "adam_epsilon": "1e-8", "optimizer_beta1": 0.9,
    "optimizer_beta2": 0.99, "optimizer_config": "eps=1e-7,decouple_lr=false", "max_grad_norm": "2.0",
    "use_ema": "true", "ema_decay": "0.995", "ema_update_interval": "1", "ema_validation": "ema_only",
    "output_dir": "out", "checkpointing_steps": "500", "checkpoint_step_interval": 500,
    "checkpoints_total_limit": "5", "resume_from_checkpoint": "latest",
    "num_eval_images": 4, "validation_guidance": 2.5, "validation_num_inference_steps": "20", "validation_seed": "42",
    "validation_steps": "500", "use_dora": "true", "text_encoder_2_precision": "int8-quanto",
}
IGNORED = {  # left out with a reason
    "fuse_qkv_projections": True, "fused_qkv_projections": False, "num_train_epochs": "0",
    "offload_during_startup": True,
    "quantize_via": "cpu", "text_encoder_1_precision": "no_change",
    "base_model_default_dtype": "bf16", "gradient_precision": "fp32", "vae_dtype": "bf16", "vae_batch_size": 4,
    "vae_enable_slicing": "true", "image_processing_batch_size": 32, "write_batch_size": 128,
    "read_batch_size": 25, "max_workers": 32, "aspect_bucket_worker_count": 12, "aspect_bucket_rounding": 2,
    "tokenizer_max_length": 512, "override_dataset_config": True, "vae_cache_scan_behaviour": "recreate",
    "compress_disk_cache": True, "cache_dir_text": "cache/text", "cache_dir_vae": "cache/vae",
    "vae_cache_ondemand": True, "text_cache_ondemand": True, "skip_file_discovery": "vae",
    "allow_dataset_oversubscription": True, "data_backend_sampling": "uniform", "grad_clip_method": "value",
    "noise_offset": 0.1, "noise_offset_probability": 0.25, "huber_schedule": "snr", "attention_mechanism": "diffusers",
    "lycoris_config": "config/lycoris_config.json", "init_lokr_norm": "1e-3", "sageattention_usage": "inference",
    "ema_device": "cpu", "ema_cpu_only": True, "ema_foreach_disable": True, "checkpointing_use_tempdir": True,
    "delete_invalid_checkpoints": True, "checkpoints_rolling_total_limit": 1, "preserve_data_backend_cache": True,
    "disable_segmented_timestep_sampling": True, "training_scheduler_timestep_spacing": "trailing",
    "ignore_final_epochs": True, "dataloader_prefetch": True,
    "set_grads_to_none": True, "disable_tf32": True, "i_know_what_i_am_doing": True, "hub_model_id": "me/mine",
    "validation_prompt_library": True, "tracker_image_layout": "gallery", "validation_lycoris_strength": 1.0,
    "model_card_note": "mine", "model_card_safe_for_work": True, "model_card_private": True,
    "webhook_reporting_interval": 10, "validation_torch_compile_mode": "max-autotune", "eval_dataset_pooling": True,
    "validation_guidance_skip_layers_start": 0.01, "validation_guidance_skip_layers_stop": 0.2,
    "validation_guidance_skip_scale": 2.8, "validation_num_video_frames": 8,
    "pretrained_evaluation_model_name_or_path": "openai/clip-vit-large-patch14-336",
}
REFUSED = {  # a value that asks for something, and one that asks for nothing, which is left out
    "flow_schedule_auto_shift": (True, "false"), "flux_fast_schedule": (True, False),
    "flow_custom_timesteps": ("1,2", None), "flow_cubic_schedule_weights": ("1", ""), "input_perturbation": (0.1,
    "0.0"),
    "input_perturbation_steps": (10, 0), "offset_noise": (True, False), "t5_padding": ("zero", "unmodified"),
    "flux_attention_masked_training": (True, "false"), "peft_lora_target_modules": (["to_q"], None),
    "lora_init_type": ("pissa", "default"),
    "init_lora_step": (5, 0), "quantize_activations": (True, False), "train_text_encoder": (True, False),
    "text_encoder_lr": (1e-6, None), "lr_scale": (True, False), "lr_scale_sqrt": (True, False),
    "ema_warmup_steps": (10, 0), "checkpointing_rolling_steps": (10, 0), "deepspeed_config": ("ds.json", "none"),
    "enable_group_offload": (True, False), "pretrained_vae_model_name_or_path": ("vae", None), "revision": ("x", None),
    "prediction_type": ("epsilon", "flow_matching"), "vae_cache_disable": (True, False),
    "text_cache_disable": (True, False), "delete_problematic_images": (True, False), "control": (True, False),
    "delete_unwanted_images": (True, False), "max_upscale_threshold": (1.5, None),
    "prepend_instance_prompt": (True, False),
    "only_instance_prompt": (True, "False"), "ignore_missing_files": (True, False), "variant": ("fp16", None),
    "instance_prompt": ("a prompt", None), "push_to_hub": ("true", False), "push_checkpoints_to_hub": (True, "false"),
    "publishing_config": ("s3.json", None), "webhook_config": ("hook.json", ""),
    "disable_multiline_split": (True, "false"), "validation_guidance_rescale": (0.7, 0.0),
    "validation_guidance_skip_layers": ("7,8,9", None),
}
LATER = """validation_prompt user_prompt_library validation_prompt_library validation_input eval_dataset_id
    validation_using_datasets validation_guidance_real validation_negative_prompt validation_randomize
    validation_seed_source validation_on_startup disable_benchmark validation_stitch_input_location validation_disable
    validation_disable_unconditional validation_noise_scheduler validation_no_cfg_until_timestep eval_steps_interval
    eval_timesteps eval_loss_disable evaluation_type validation_step_interval masked_loss_probability report_to
    logging_dir tracker_project_name tracker_run_name tracker_image_layout push_to_hub push_checkpoints_to_hub
    hub_model_id publishing_config webhook_config validation_lycoris_strength""".split()
DATASET = {  # all that a set of SimpleTuner's may say
    "id": "a", "type": "local", "dataset_type": "image", "instance_data_dir": "x", "conditioning_data": "b",
    "conditioning_type": None, "source_dataset_id": "b", "resolution": "1024", "resolution_type": "area",
    "crop": "false",
    "crop_aspect": "square", "crop_style": "random", "minimum_image_size": "512", "maximum_image_size": 2048,
    "target_downsample_size": 1024, "minimum_aspect_ratio": None, "maximum_aspect_ratio": None,
    "max_upscale_threshold": None, "max_num_samples": None, "repeats": "0", "probability": "1.0", "disabled": False,
    "start_epoch": 0, "start_step": 0, "end_epoch": None, "end_step": None, "disable": False,
    "disable_validation": False,
    "caption_strategy": "textfile", "instance_prompt": "p", "prepend_instance_prompt": False, "caption_shuffle": None,
    "only_instance_prompt": False, "disable_multiline_split": False, "caption_filter_list": None, "cache_dir_vae": "v",
    "cache_dir": "c", "default": True, "text_embeds": "t", "vae_cache_clear_each_epoch": False,
    "vae_cache_disable": False,
    "vae_cache_ondemand": True, "preserve_data_backend_cache": True, "skip_file_discovery": "", "ignore_epochs": False,
    "hash_filenames": True, "is_regularisation_data": False, "conditioning": [{"type": "jpeg", "captions": "x"}],
    "huggingface": None, "timestep_sampling_offset": 0,
}
# fmt: on
DATA = {"data_backend_config": []}


def read(tmp_path, key, value) -> Config:
    (tmp_path / "config.json").write_text(json.dumps({**DATA, f"--{key}": value}))
    return read_config(tmp_path / "config.json", [])


@pytest.mark.parametrize("key", USED)
def test_used_keys_are_taken_as_they_stand_in_a_file(tmp_path, key):
    config = read(tmp_path, key, USED[key])
    assert not config.ignored
    value, text = getattr(config, TABLES["RENAMED"].get(key, key)), str(USED[key])
    if isinstance(value, bool):
        assert value == (text == "true")
    elif isinstance(value, int | float):
        assert value == float(text)


@pytest.mark.parametrize("key", IGNORED)
def test_keys_without_a_meaning_here_are_left_out_with_a_reason(tmp_path, key):
    (reason,) = read(tmp_path, key, IGNORED[key]).ignored.values()
    assert len(reason) > 10


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys_say_what_to_do_and_may_stand_when_they_are_off(tmp_path, key):
    asking, off = REFUSED[key]
    with pytest.raises(ValueError, match=f"{key} is not used here: ...."):
        read(tmp_path, key, asking)
    assert key in read(tmp_path, key, off).ignored


def test_keys_of_validation_and_tracking_are_known_too():
    known = {*Config.model_fields, *TABLES["CONFIG_IGNORED"], *TABLES["CONFIG_REFUSED"], *TABLES["RENAMED"]}
    assert not set(LATER) - known


def test_no_key_of_a_set_is_unknown():
    entry = Dataset.model_validate(DATASET)
    assert (entry.resolution, entry.crop, entry.repeats, entry.conditioning_data) == (1024, False, 0, ["b"])
    for key in ("start_step", "huggingface", "max_num_samples", "disable_multiline_split"):
        with pytest.raises(ValueError):
            Dataset.model_validate({**DATASET, key: 5})


@pytest.mark.parametrize("precision", ["nf4-bnb", "int4-quanto", "int2-quanto", "fp8-quanto"])
def test_precisions_that_are_not_built_are_refused_by_name(tmp_path, precision):
    with pytest.raises(ValueError, match=f"{precision}': input should be 'no_change', 'bf16', 'int8-quanto'"):
        read(tmp_path, "base_model_precision", precision)


def test_false_means_false_and_text_means_numbers(tmp_path):
    path = tmp_path / "config.json"
    texts = {
        "--use_ema": "false",
        "gradient_checkpointing": False,
        "--lora_rank": "8",
        "optimizer_config": "a=1,b=false",
    }
    path.write_text(json.dumps({**DATA, **texts}))
    config = read_config(path, ["flow_use_beta_schedule=false"])
    assert (config.use_ema, config.gradient_checkpointing, config.flow_use_beta_schedule) == (False, False, False)
    assert config.lora_rank == 8 and config.optimizer_config == {"a": 1.0, "b": False}


def test_what_a_set_does_not_say_is_the_configs():
    sets = [
        {"id": "a", "instance_data_dir": "x", "conditioning_data": "b", "resolution": 512},
        {"id": "b", "instance_data_dir": "y", "conditioning_type": "reference_strict"},
        {"id": "t", "dataset_type": "text_embeds"},
    ]
    config = Config(data_backend_config=sets, resolution=768, caption_strategy="filename", minimum_image_size=100)
    a, b, _ = config.datasets()
    assert (a.resolution, a.strategy, a.minimum_image_size) == (512, "filename", 100)
    assert (b.resolution, b.strategy) == (768, None)


def test_options_of_the_optimizer_come_from_the_general_to_the_particular():
    options = Config(
        **DATA, adam_beta2=0.9, optimizer_config="weight_decay=0.2", optimizer_beta1=0.8
    ).optimizer_options()
    assert options == {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "eps": 1e-8}
    assert Config(**DATA, optimizer="optimi-lion", adam_beta2=0.9).optimizer_options() == {}
    assert Config(**DATA, optimizer="adamw_bf16", adam_beta2=0.9).optimizer_options() == {"beta2": 0.9}


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="sine rises by itself"):
        Config(**DATA, lr_scheduler="sine", lr_warmup_steps=10)
    with pytest.raises(ValueError, match="lr_end is above learning_rate"):
        Config(**DATA, lr_scheduler="cosine", lr_end=1)


# The quickstart's configuration, with its keys and values and comments behind them, and its data list.
QUICKSTART = """{
  "model_family": "flux",
  "model_flavour": "kontext",          // not plain FLUX
  "base_model_precision": "int8-quanto",
  "gradient_checkpointing": true,
  "fuse_qkv_projections": false,       // for one kind of card
  "lora_rank": 16,
  "learning_rate": 1e-5,
  "optimizer": "optimi-lion",
  "max_train_steps": 10000,
  "validation_guidance": 2.5,          // what Kontext likes
  "validation_resolution": "1024x1024",
  "conditioning_multidataset_sampling": "random"  // or "combined"
}"""
PAIRS = """[
  {
    "id": "my-edited-images",
    "type": "local",
    "instance_data_dir": "/path/to/datasets/edited-images",
    "conditioning_data": [
      "my-reference-images"            // a second one could stand here
    ],
    "resolution": 1024,
    "caption_strategy": "textfile"
  },
  {
    "id": "my-reference-images",
    "type": "local",
    "instance_data_dir": "/path/to/datasets/reference-images",
    "conditioning_type": "reference_strict",
    "resolution": 1024,
    "caption_strategy": null,          // the comma after it is theirs
  }
]"""


def test_the_quickstarts_configuration_trains_as_printed(tmp_path, capsys):
    photos = ROOT / "configs" / "photos"
    for folder in ("target", "reference"):
        (tmp_path / folder).mkdir()
        for file in sorted((photos / folder).glob("*"))[: 2 if folder == "target" else 1]:  # a picture and its text
            shutil.copy(file, tmp_path / folder)
    config = QUICKSTART.replace("10000", "3").replace("1024x1024", "96x96")
    pairs = PAIRS.replace("1024", "64").replace("/path/to/datasets/edited-images", str(tmp_path / "target"))
    pairs = pairs.replace("/path/to/datasets/reference-images", str(tmp_path / "reference"))
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "multidatabackend.json").write_text(pairs)
    out = tmp_path / "out"
    kontext = read_config(tmp_path / "config.json", [])  # what trains here is nano, by its name
    assert kontext.pretrained_model_name_or_path == "black-forest-labs/FLUX.1-Kontext-dev"
    places = [f"output_dir={out}", f"cache_dir={tmp_path / 'cache'}", "pretrained_model_name_or_path=nano"]
    train.main([str(tmp_path / "config.json"), *places])
    said = capsys.readouterr().out
    assert "the blocks' weights in int8, from " in said
    assert "fuse_qkv_projections is ignored: projections are always fused" in said
    for name in ("pytorch_lora_weights.safetensors", "validation/000003.png", "checkpoint-3", "metrics.jsonl"):
        assert (out / name).exists()
