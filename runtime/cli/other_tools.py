"""Advice on options of other trainers, for the command line and for files of options alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.option_fields import Options, options_of, word_of
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.common.option_names import on_command_line
from tightfit.runtime.session.options import RunOptions

CUTOFF = 0.4
"""likeness, from 0 to 1, from which on a name is worth mentioning in the place of an unknown one"""
OTHER_NAMES = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "base_model": "model",
    "batch_size": "batch",
    "cutoff_len": "seq",
    "dataset": "data",
    "dataset_path": "data",
    "datasets": "data",
    "early_stopping_patience": "early_stopping",
    "epoch": "epochs",
    "eval_dataset": "eval",
    "eval_steps": "eval_every",
    "gradient_accumulation_steps": "accumulate",
    "grad_accumulation_steps": "accumulate",
    "gradient_clip_val": "max_grad_norm",
    "iters": "steps",
    "layers_to_transform": "lora_layers",
    "learning_rate": "lr",
    "load_best_model_at_end": "keep_best",
    "lora_modules_to_save": "modules_to_save",
    "lora_r": "lora_rank",
    "lora_target": "lora_targets",
    "lora_target_modules": "lora_targets",
    "lora_attn_modules": "lora_targets",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "max_epochs": "epochs",
    "max_length": "seq",
    "max_memory": "memory",
    "max_seq_len": "seq",
    "max_seq_length": "seq",
    "max_steps": "steps",
    "max_steps_per_epoch": "steps",
    "micro_batch_size": "batch",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_layers": "lora_layers",
    "num_train_epochs": "epochs",
    "num_warmup_steps": "warmup_steps",
    "optim": "optimizer",
    "out": "output",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "peft_use_dora": "dora",
    "peft_use_rslora": "rslora",
    "per_device_train_batch_size": "batch",
    "r": "lora_rank",
    "resume_from_checkpoint": "resume",
    "sample_packing": "packing",
    "save_every": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "sequence_len": "seq",
    "steps_per_eval": "eval_every",
    "target_modules": "lora_targets",
    "target_parameters": "lora_experts",
    "lora_target_parameters": "lora_experts",
    "test_file": "eval",
    "torch_dtype": "dtype",
    "train_data": "data",
    "train_file": "data",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "val_file": "eval",
    "validation_file": "eval",
    "warmup": "warmup_steps",
    "weight_decay_rate": "weight_decay",
}
"""what transformers, TRL, PEFT, axolotl, unsloth, torchtune, LLaMA-Factory and mlx-lm call an option"""
NEEDLESS = {
    "bf16": "the arithmetic is in bfloat16, unless `dtype` says float32",
    "fp16": "the arithmetic is in bfloat16, or float32 as `dtype` says",
    "tf32": "the arithmetic is in bfloat16, or float32 as `dtype` says",
    "gradient_checkpointing": "the plan chooses what is computed again; leave it out",
    "activation_checkpointing": "the plan chooses what is computed again; leave it out",
    "enable_activation_checkpointing": "the plan chooses what is computed again; leave it out",
    "enable_activation_offloading": "the plan chooses what goes to disk; leave it out",
    "load_in_4bit": "frozen weights are packed in 4 bits, unless `base` says otherwise",
    "load_in_8bit": "say it with `base`: 8bit",
    "use_qlora": "frozen weights are packed in 4 bits, unless `base` says otherwise",
    "flash_attention": "attention is never held whole; leave it out",
    "use_flash_attention_2": "attention is never held whole; leave it out",
    "logging_steps": "every step is in metrics.jsonl; leave it out",
    "report_to": "`tightfit report --to` draws a run elsewhere, once it is over or while it goes on",
    "val_set_size": "hold data out in a file of their own, and name it as `eval`",
    "save_total_limit": "the two newest checkpoints are kept; leave it out",
    "do_train": "leave it out",
    "use_lora": "LoRA pairs are what is trained; leave it out",
    "use_peft": "LoRA pairs are what is trained; leave it out",
}
"""option of other trainers that tightfit needs no counterpart of -> advice; options of tightfit in backquotes, by their
keys
"""
STAGES: Mapping[str, type[Options]] = {"profile": ProfileOptions, "plan": PlanOptions, "run": RunOptions}
"""command: the record whose options it takes"""


def hint(name: str, spellings: Mapping[str, str], *, near: bool) -> str:
    """The end of a message about an unknown option `name`, beginning with ``; ``: what tightfit calls it, which command
    has it, or, if `near`, which one is most like it. Empty if nothing is known about it.

    `spellings` are the known options by their keys, as they are written where the unknown one stands.
    """
    key = name.replace("-", "_")
    if key in NEEDLESS:
        return "; " + re.sub(r"`(\w+)`", lambda word: spellings.get(word[1], on_command_line(word[1])), NEEDLESS[key])
    our_name = OTHER_NAMES.get(key, key)
    if our_name in spellings:
        return f"; it is {spellings[our_name]} here"
    word = on_command_line(our_name)
    commands = [
        command for command, record in STAGES.items() if word in (word_of(*item) for item in options_of(record).items())
    ]
    if commands:
        return f"; {', '.join(f'`tightfit {command}`' for command in commands)} and `tightfit train` have it: {word}"
    close = difflib.get_close_matches(key, spellings, 1, CUTOFF) if near else []
    return f"; the nearest is {spellings[close[0]]}" if close else ""
