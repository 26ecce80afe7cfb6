"""What the trainer and peft are told: our settings and the memory plan, in the words of TRL and peft."""

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import planning
from qwenmed.errors import UserError
from qwenmed.planner import Card, Plan
from qwenmed.settings import LoraSettings, TrainSettings, listed

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

# Fields of SFTConfig that our own options set.
OUR_FIELDS = {
    "output_dir": "--output-dir",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "num_train_epochs": "--epochs",
    "max_steps": "--max-steps",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--lr-scheduler",
    "warmup_steps": "--warmup-steps",
    "weight_decay": "--weight-decay",
    "max_grad_norm": "--max-grad-norm",
    "max_length": "--max-length",
    "packing": "--packing",
    "torch_compile": "--compile",
    "pad_to_multiple_of": "--compile",
    "eval_steps": "--eval-steps",
    "save_steps": "--eval-steps",
    "save_total_limit": "--save-total-limit",
    "load_best_model_at_end": "--best-by",
    "logging_steps": "--logging-steps",
    "activation_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing_kwargs": "--gradient-checkpointing",
    "optim_args": "--optimizer",
    "neftune_noise_alpha": "--neftune-alpha",
    "seed": "--seed",
    "data_seed": "--seed",
    "report_to": "--swanlab",
}

# The names that transformers has for ours; "8bit" is torchao's, which rounds stochastically.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_torch_8bit"}


def sft_config(settings: TrainSettings, folder: Path, plan: Plan, card: Card) -> "SFTConfig":
    """TRL's configuration of the run.

    Raises:
        UserError: a field that was handed through is unknown, has an option of its own, or an impossible value.
    """
    from trl import SFTConfig

    handed = settings.sft or {}
    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    for name in handed:
        if name in OUR_FIELDS:
            raise UserError(f"--sft {name} 与 {OUR_FIELDS[name]} 说的是同一件事", None, f"请用 {OUR_FIELDS[name]}")
        if name not in known:
            near = "、".join(difflib.get_close_matches(name, known)) or "见 TRL 的 SFTConfig"
            raise UserError(f"SFTConfig 没有字段 {name}", None, f"相近的有：{near}")

    # A share of the steps stays a float: transformers turns it into steps once it knows how many there are.
    every = settings.eval_steps if settings.eval_steps < 1 else int(settings.eval_steps)
    packing = planning.is_packing(settings, card)
    by_loss = settings.best_by == "eval_loss"
    fields: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        # A gradient that is gone as soon as it was used can be neither summed up nor clipped.
        gradient_accumulation_steps=1 if plan.in_backward else settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps if settings.warmup_steps < 1 else int(settings.warmup_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if plan.in_backward else settings.max_grad_norm,
        max_length=settings.max_length,  # rows fit already: nothing is cut here
        packing=packing,
        # Packed rows of one length only: another one would be compiled for again.
        pad_to_multiple_of=settings.max_length if settings.compile and packing else None,
        torch_compile=settings.compile,
        completion_only_loss=True,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=settings.save_total_limit,
        load_best_model_at_end=by_loss,
        # Without a metric the trainer knows no best checkpoint; with one it would keep that and drop the last.
        metric_for_best_model="eval_loss" if by_loss else None,
        greater_is_better=False if by_loss else None,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        bf16=plan.autocast == "bf16",
        fp16=plan.autocast == "fp16",
        activation_checkpointing=bool(plan.checkpoint_every),
        activation_checkpointing_kwargs={"every_n_layers": plan.checkpoint_every, "use_reentrant": False}
        if plan.checkpoint_every
        else None,
        optim=OPTIMIZERS[plan.optimizer],
        # Rounded to the nearest, an update below 0.2 to 0.4 % of a bf16 weight would be lost every time.
        optim_args="bf16_stochastic_round=true" if plan.optimizer == "adamw_8bit" else None,
        use_cpu=card.kind == "cpu",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=card.kind == "cuda",
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        neftune_noise_alpha=settings.neftune_alpha,
    )
    try:
        config = SFTConfig(**fields | handed)
    except (ValueError, TypeError) as error:
        if not handed:
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--sft 的值不合适：{reason}", None, "请改正后重试") from error
    # A process trains on one GPU; on all that it sees, transformers would use nn.DataParallel, which TRL refuses.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """Peft's configuration."""
    from peft import LoraConfig

    names = listed(settings.target_modules)
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
