"""Keys of SimpleTuner's that have no knob here: what happens to each, and why. Tables instead of code per key."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


def by_key(reasons: dict[str, str]) -> dict[str, str]:
    """{what is said: "key key …"} -> {key: what is said}."""
    return {key: said for said, keys in reasons.items() for key in keys.split()}


RENAMED = {
    "checkpoint_step_interval": "checkpointing_steps", "fused_qkv_projections": "fuse_qkv_projections",
    "validation_step_interval": "validation_steps", "validation_input": "validation",
}  # fmt: skip

# values, as text in small letters, by which a refused key asks for nothing: such a key is left out too
OFF = {"", "none", "false", "0", "0.0", "[]", "{}", "default", "standard", "diffusers", "unmodified", "flow_matching"}

# why it can be left out without harm -> keys of a config; the run says so once
CONFIG_IGNORED = by_key({
    "projections are always fused, and a LoRA on them still trains separate q, k, v": "fuse_qkv_projections",
    "max_train_steps says how long": "num_train_epochs ignore_final_epochs strict_epoch_limit",
    "the encoders run once, in mixed_precision, the VAE in fp32, and are let go before the transformer is loaded":
        "offload_during_startup fully_unload_text_encoder delete_model_after_load keep_vae_loaded offload_during_save "
        "text_encoder_1_precision text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision vae_dtype",
    "weights are quantised one by one while they are read, on the device that trains": "quantize_via",
    "mixed_precision says it": "base_model_default_dtype gradient_precision",
    "pictures and captions are looked at and encoded one by one, whole, before training, batches read as needed":
        "vae_batch_size vae_enable_tiling vae_enable_slicing vae_enable_patch_conv vae_enable_temporal_roll "
        "image_processing_batch_size text_encoder_batch_size text_encoder_limit text_embed_full_cache "
        "tokenizer_max_length write_batch_size vae_cache_ondemand text_cache_ondemand skip_file_discovery "
        "read_batch_size dataloader_prefetch dataloader_prefetch_qlen max_workers enable_multiprocessing "
        "torch_num_threads aspect_bucket_worker_count",
    "caches are in cache_dir, keyed by content, so a changed dataset is never confused with the old one":
        "override_dataset_config preserve_data_backend_cache vae_cache_scan_behaviour metadata_update_interval "
        "aspect_bucket_disable_rebuild cache_clear_validation_prompts compress_disk_cache cache_dir_text cache_dir_vae",
    "aspects are rounded to 2 decimals": "aspect_bucket_rounding",
    "batches of few pictures are no problem": "allow_dataset_oversubscription disable_bucket_pruning",
    "an epoch shows every set; repeats and probability weigh them": "data_backend_sampling",
    "gradients are always clipped by norm; SimpleTuner's value does next to nothing": "grad_clip_method",
    "noise and times are what the flow says, drawn anew for every use, and huber_c is the same at all times":
        "noise_offset noise_offset_probability disable_segmented_timestep_sampling training_scheduler_timestep_spacing "
        "inference_scheduler_timestep_spacing huber_schedule",
    "torch's own attention and checkpointing, block by block, are used":
        "attention_mechanism sageattention_usage gradient_checkpointing_backend gradient_checkpointing_segment_stride",
    "an adapter's optimizer state and average are small and stay on the device":
        "optimizer_cpu_offload_method optimizer_offload_gradients optimizer_release_gradients fuse_optimizer "
        "ema_device ema_cpu_only ema_foreach_disable",
    "checkpoints appear whole or not at all, and checkpoints_total_limit counts all of them":
        "checkpointing_use_tempdir delete_invalid_checkpoints checkpoints_rolling_total_limit",
    "it changes nothing of the result":
        "set_grads_to_none disable_tf32 i_know_what_i_am_doing local_rank seed_for_each_device trust_remote_code "
        "print_filenames print_sampler_statistics debug_aspect_buckets debug_dataset_loader configs_dir prodigy_steps "
        "accelerator_cache_clear_interval save_text_encoder merge_environment_config find_unused_parameters "
        "pretrained_transformer_subfolder",
    "name an item twice in `validation`, with two seeds": "num_validation_images",
    "noise is seeded and drawn on the CPU, to compare pictures": "validation_randomize validation_seed_source",
    "a sheet holds input, base, made once, LoRA, target": "validation_stitch_input_location disable_benchmark",
    "validation shows what is asked for, by Euler's method, through the very modules that are trained":
        "validation_disable_unconditional validation_noise_scheduler validation_torch_compile",
    "validation pictures are compared with the targets, by PSNR": "evaluation_type",
    "there is no built-in library; user_prompt_library names a file": "validation_prompt_library",
    "pictures are logged one by one, and all on a sheet": "tracker_image_layout",
    "nothing is uploaded": "hub_model_id",
    "set it false: every line of a caption file is a caption of its own": "disable_multiline_split",
})  # fmt: skip
# the same, where lora_type is standard
LYCORIS_IGNORED = by_key({
    "lora_type is standard, and only lycoris reads it": "lycoris_config init_lokr_norm validation_lycoris_strength",
})  # fmt: skip
# what to do instead -> keys of a config; the run refuses to start unless the key is off
CONFIG_REFUSED = by_key({
    "use flow_schedule_shift: auto": "flow_schedule_auto_shift",
    "use flow_use_uniform_schedule, flow_use_beta_schedule or neither":
        "flux_fast_schedule flow_custom_timesteps flow_timesteps_mode flow_cubic_schedule_weights",
    "the input is always mix(target, noise, t)": "input_perturbation input_perturbation_steps offset_noise",
    "Kontext was trained with text that is padded and not masked": "t5_padding flux_attention_masked_training",
    "use caption_dropout_probability": "caption_dropout",
    "use flux_lora_target": "peft_lora_target_modules",
    "leave it out: A is drawn as by PEFT, B is zero": "lora_init_type peft_lora_mode singlora_ramp_up_steps",
    "leave it out: w1 is drawn as by LyCORIS, w2 is zero": "init_lokr_norm",
    "pictures show what is trained; infer.py --lora FILE:0.5 weakens it": "validation_lycoris_strength",
    "use init_lora, which starts at step 0": "init_lora_step init_lora_ema",
    "only weights are quantised, by base_model_precision": "quantize_activations quantization_config",
    "only the transformer is trained": "train_text_encoder text_encoder_lr control",
    "set learning_rate itself": "lr_scale lr_scale_sqrt",
    "ema_decay warms up by (1 + n) / (10 + n)": "ema_warmup_steps",
    "use checkpointing_steps and checkpoints_total_limit": "checkpointing_rolling_steps checkpoint_epoch_interval",
    "training is on one GPU": "deepspeed_config enable_group_offload offload_param_path",
    "put or link all files into one folder, for pretrained_model_name_or_path":
        "pretrained_transformer_model_name_or_path pretrained_vae_model_name_or_path pretrained_t5_model_name_or_path "
        "revision non_ema_revision variant",
    "FLUX predicts a flow": "prediction_type",
    "latents and text are always cached, in cache_dir": "vae_cache_disable text_cache_disable",
    "what is missing is listed; nothing is left out, and nothing of yours is ever deleted":
        "ignore_missing_files enable_nsfw_check delete_problematic_images delete_unwanted_images",
    "use data_backend_config": "data_backend",
    "say it in the set's own entry": "instance_prompt",
    "use pairs_file with a JSONL or CSV file": "parquet_caption_column parquet_filename_column",
    "nothing is uploaded; hf upload NAME OUTPUT_DIR does it, the model card included":
        "push_to_hub push_checkpoints_to_hub publishing_config",
    "use report_to": "webhook_config",
    "use minimum_image_size": "max_upscale_threshold",
    "write the prompt into the caption files": "prepend_instance_prompt",
    "use caption_strategy instanceprompt": "only_instance_prompt",
})  # fmt: skip
# the same for lycoris_config
LYCORIS_REFUSED = by_key({
    "use lora_dropout; LyCORIS's LoKr itself has none": "dropout",
    "it is as by LyCORIS's defaults": "rank_dropout module_dropout use_scalar use_tucker conv_dim conv_alpha dora_wd "
        "rs_lora unbalanced_factorization bypass_mode train_norm",
    "use target_module and module_algo_map, or flux_lora_target": "target_name name_algo_map use_fnmatch enable_conv",
})  # fmt: skip
# the same of a dataset's keys; some mean there what they mean in a config
DATASET_IGNORED = by_key({
    "caches are keyed by content and never cleared": "hash_filenames",
    "there is one text cache": "text_embeds",
    "nothing is kept beside the pictures": "metadata_backend",
    "references are linked from the targets' side, by conditioning_data": "source_dataset_id",
    "epochs are counted for all sets alike": "ignore_epochs",
}) | {key: CONFIG_IGNORED[key] for key in (
    "preserve_data_backend_cache", "skip_file_discovery", "max_workers", "vae_cache_ondemand", "write_batch_size",
    "disable_multiline_split",
)}  # fmt: skip
DATASET_REFUSED = by_key({
    "use disabled": "disable",
    "move such pictures out of the folder": "minimum_aspect_ratio maximum_aspect_ratio",
    "use probability, or move pictures out of the folder": "max_num_samples",
    "use crop_aspect square or preserve": "crop_aspect_buckets",
    "instructions are sentences, not tag lists; write alternatives as lines": "caption_shuffle",
    "edit the caption files": "caption_filter_list",
    "train in two runs": "start_epoch start_step end_epoch end_step",
    "save the pictures to a folder; side_by_side cuts composite ones": "huggingface",
    "use pairs_file with a JSONL or CSV file": "parquet csv",
    "Kontext edits pictures": "video",
    "use flow_schedule_shift": "timestep_sampling_offset",
}) | {key: CONFIG_REFUSED[key] for key in (
    "vae_cache_disable", "max_upscale_threshold", "prepend_instance_prompt", "only_instance_prompt",
)}  # fmt: skip


class Strict(BaseModel):
    """A part of a config: frozen, and no key that neither it nor its tables know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    LEFT_OUT: ClassVar[dict[str, str]] = {}  # key without a meaning here that does no harm -> why
    REFUSED: ClassVar[dict[str, str]] = {}  # key that is not used here, unless it is off -> what to do instead
    SAME: ClassVar[dict[str, str]] = {}  # another name of a key -> ours

    _ignored: dict[str, str] = {}

    @property
    def ignored(self) -> dict[str, str]:
        """The keys that were given and left out, and why."""
        return self._ignored

    @model_validator(mode="wrap")
    @classmethod
    def leave_out(cls, values, validate):
        """Take out the keys of LEFT_OUT, and those of REFUSED that ask for nothing, remembering them."""
        if not isinstance(values, dict):
            return validate(values)
        values = {cls.SAME.get(key, key): value for key, value in values.items()}
        used = LYCORIS_IGNORED if values.get("lora_type") == "lycoris" else ()
        ignored = {key: why for key, why in cls.LEFT_OUT.items() if key in values and key not in used}
        off = [key for key in cls.REFUSED if key in values and str(values[key]).lower() in OFF]
        ignored |= dict.fromkeys(off, "what it says is always so here")
        made = validate({key: value for key, value in values.items() if key not in ignored})
        made._ignored = ignored
        return made
