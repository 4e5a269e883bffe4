"""Keys of SimpleTuner's that have no knob here: what happens to each, and why. One table instead of code per key."""

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
