"""Keys of SimpleTuner's that have no knob here: what happens to each, and why. One table instead of code per key."""

# key of a config -> why it can be left out without harm; the run says so once
CONFIG_IGNORED = {
    "fuse_qkv_projections": "projections are always fused, and a LoRA on them still trains separate q, k, v",
    "num_train_epochs": "max_train_steps says how long",
    "validation_resolution": "validation pictures have the sizes of their pairs",
    "offload_during_startup": "the encoders are always let go before the transformer is loaded",
    "aspect_bucket_rounding": "aspects are rounded to 2 decimals",
    "vae_batch_size": "pictures are encoded one by one",
    "write_batch_size": "cache entries are written one by one",
    "read_batch_size": "batches are read as they are needed",
    "max_workers": "as many as there are cores",
    "image_processing_batch_size": "pictures are encoded one by one",
    "aspect_bucket_worker_count": "sizes are read from the files' headers",
    "override_dataset_config": "caches are keyed by content, so a changed dataset is never confused with the old one",
    "compress_disk_cache": "latents hardly compress",
}
# key of a config -> what to do instead; the run refuses to start
CONFIG_REFUSED = {
    "flow_schedule_auto_shift": "use flow_schedule_shift: auto",
    "caption_dropout": "use caption_dropout_probability",
    "peft_lora_target_modules": "use flux_lora_target",
    "delete_problematic_images": "nothing of yours is ever deleted; the messages name such pictures",
    "delete_unwanted_images": "nothing of yours is ever deleted; the messages name such pictures",
    "grad_clip_method": "gradients are always clipped by norm, by max_grad_norm",
    "data_backend": "use data_backend_config",
}
# key of a dataset -> why it can be left out without harm; the run says so once
DATASET_IGNORED = {
    "hash_filenames": "caches are keyed by content",
    "preserve_data_backend_cache": "caches are keyed by content and never cleared",
    "skip_file_discovery": "files are always looked at; that is fast",
    "vae_cache_ondemand": "everything is encoded before training starts",
    "text_embeds": "there is one text cache",
    "metadata_backend": "nothing is kept beside the pictures",
    "source_dataset_id": "references are linked from the targets' side, by conditioning_data",
    "disable_multiline_split": "set it false: every line of a caption file is a caption of its own",
    "ignore_epochs": "epochs are counted for all sets alike",
    "write_batch_size": "entries are written one by one",
    "max_workers": "as many as there are cores",
}
# key of a dataset -> what to do instead; the run refuses to start
DATASET_REFUSED = {
    "disable": "use disabled",
    "vae_cache_disable": "latents are always cached; set cache_dir_vae to a place with room",
    "minimum_aspect_ratio": "move such pictures out of the folder",
    "maximum_aspect_ratio": "move such pictures out of the folder",
    "max_upscale_threshold": "use minimum_image_size",
    "max_num_samples": "use probability, or move pictures out of the folder",
    "crop_aspect_buckets": "use crop_aspect square or preserve",
    "prepend_instance_prompt": "write the prompt into the caption files",
    "only_instance_prompt": "use caption_strategy instanceprompt",
    "caption_shuffle": "instructions are sentences, not tag lists; write alternatives as lines",
    "caption_filter_list": "edit the caption files",
    "start_epoch": "train in two runs",
    "start_step": "train in two runs",
    "end_epoch": "train in two runs",
    "end_step": "train in two runs",
    "huggingface": "save the pictures to a folder; side_by_side cuts composite ones",
    "parquet": "use pairs_file with a JSONL or CSV file",
    "csv": "use pairs_file with a CSV file",
    "video": "Kontext edits pictures",
    "timestep_sampling_offset": "use flow_schedule_shift",
}
