"""What hooks into the trainer. Imports transformers at once, so import this module where it is used."""

import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer

from qwenmed import checkpoints, cli, hardware, head, merged_model, not_finite, processes


def takes_own_head(args: Any) -> bool:
    """Whether a trainer with these arguments takes the loss of head.py instead of TRL's."""
    gpu = args.device.type == "cuda"
    return hardware.is_own_head(args.device.type, args.fp16, gpu and hardware.has_triton())


class MedicalSFTTrainer(SFTTrainer):
    """SFTTrainer with a leaner head where there is no Triton, that stops at a loss that is no number.

    Its checkpoints say how they were made (`checkpoint.json`).

    Attributes:
        card: what each checkpoint says of itself.
        rows: what is trained on; to name a sample.
        in_backward: update each weight as soon as its gradient is there, and free the gradient.
        fresh_states: continue from a checkpoint's weights and step, but with new optimizer states.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card: dict[str, Any] = {}
        self.rows: Any = None
        self.in_backward = self.fresh_states = False
        self._step_inputs: list[Any] = []
        self._own_head = takes_own_head(self.args)
        if self._own_head:
            inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            head.add_loss_head(inner)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood over the completion tokens of the global batch.

        Raises:
            UserError: in training, where it is NaN or infinite; nothing is saved behind the last good checkpoint.
        """
        if not self._own_head or return_outputs:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            found = self._loss(model, inputs, num_items_in_batch)
        if model.training:
            if len(self._step_inputs) >= self.args.gradient_accumulation_steps:
                self._step_inputs.clear()
            self._step_inputs.append(inputs)
            # TRL waits for the device at this point as well, for its metrics.
            if not (found[0] if return_outputs else found).isfinite():
                raise not_finite.error(self, "损失", [inputs])
        return found

    def _loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        total = model(**inputs, use_cache=False, only_loss=True)
        if num_items_in_batch is None:
            return total / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        # Data parallelism averages the gradients of the processes, and the count is of all of them.
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * scale / num_items_in_batch

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # In fp16 the gradients are scaled; an overflow is expected now and then, and the scaler leaves that step out.
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            raise not_finite.error(self, "梯度", self._step_inputs)
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate.

        Raises:
            UserError: the loss is no number; the weights are not saved then.
        """
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise not_finite.error(self, "验证损失", [])
        return metrics

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer; with `in_backward` each gradient calls it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.in_backward:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.register_post_accumulate_grad_hook(self._update_at_once)
        return optimizer

    def _update_at_once(self, weight: Any) -> None:
        # The gradients of all others are gone already or not yet there, so this step moves one weight only.
        self.optimizer.step()
        weight.grad = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.fresh_states and self.optimizer is not None:
            self.optimizer.load_state_dict = lambda states: None  # those of another optimizer do not fit this one
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights, and beside them the card; other programs can load a full checkpoint as it is."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and output_dir:
            folder = Path(output_dir)
            if (folder / "config.json").is_file():
                merged_model.mend_config(folder / "config.json")
            checkpoints.write_card(folder, self.card)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        inner = self.accelerator.unwrap_model(self.model)
        if state_dict is not None and inner.config.tie_word_embeddings:
            # Gathered from several processes, a shared weight comes twice and would be stored so.
            twice = getattr(inner, "_tied_weights_keys", None) or {}
            state_dict = {name: weight for name, weight in state_dict.items() if name not in twice}
        super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card advertises a hub upload; `checkpoint.json` and `run.json` say more."""


class ProgressBar(ProgressCallback):
    """The progress bar with the losses behind it, instead of a line a log entry."""

    training_bar: Any  # tqdm's, or None

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; where stderr is a file, a line every half minute is enough."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 30

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """No second bar for the evaluation: it is short, and the losses tell when it has happened."""

    def close(self) -> None:
        """Take the bar away, so that a message after a failure stands on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest losses."""
        if self.training_bar is None:
            return
        names = {"loss": "loss", "eval_loss": "val"}
        self._shown |= {short: f"{logs[key]:.4f}" for key, short in names.items() if key in (logs or {})}
        self.training_bar.set_postfix(self._shown, refresh=False)


class PlanAgainstMeasured(TrainerCallback):
    """Says after two steps what the plan was and what they took.

    In the first step the optimizer has no states yet while the activations are there; the peak comes in the second.

    Args:
        planned: bytes.
        tell: takes both in GiB, for run.json.
    """

    def __init__(self, planned: int, tell: Callable[[dict[str, Any]], None]) -> None:
        self._planned, self._tell, self._steps = planned / 2**30, tell, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare, once."""
        self._steps += 1
        if self._steps == 2:
            self._compare(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare after a single step, if there was no second."""
        if self._steps == 1:
            self._compare(args, state)

    def _compare(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        peak = hardware.peak_memory_gib(args.device)
        if not peak:
            return
        measured = next(iter(peak.values()))
        self._tell({"planned_gib": round(self._planned, 3), "measured_gib": peak, "steps": self._steps})
        listed = "，".join(f"{_PEAKS.get(name, name)} {size:.2f} GiB" for name, size in peak.items())
        said = (
            f"{self._steps} 步之后：计划 {self._planned:.2f} GiB，实测{listed}（{measured / self._planned - 1:+.0%}）"
        )
        tqdm.write(said, file=sys.stderr)  # the bar makes room for it


_PEAKS = {"gpu_allocated": "分配", "gpu_reserved": "保留", "resident": "常驻内存"}


def _of_any(received: int | None, device: torch.device) -> int | None:
    """The signal that any of the processes got."""
    if processes.count() == 1:
        return received
    highest = torch.tensor(received or 0, device=device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return int(highest) or None


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the training after the step in hand, with a checkpoint.

    A second Ctrl-C ends it at once.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end; of several processes all together, in the same step."""
        self.received = _of_any(self.received, args.device)
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back, once; a training that fails never comes to `on_train_end`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        cli.note("\n收到停止信号：完成这一步并保存检查点后退出（再按一次 Ctrl-C 立即退出）")


class GuardedSwanLab(TrainerCallback):
    """SwanLab's own trainer callback, each of its events behind the tracker's guard."""

    def __init__(self, tracker: Any) -> None:
        from swanlab.integration.transformers import SwanLabCallback

        self._inner = SwanLabCallback(log_config=False)
        self._tracker = tracker

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass losses on."""
        self._tracker.guarded(self._inner.on_log, args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass validation metrics on."""
        self._tracker.guarded(self._inner.on_evaluate, args, state, control, **kwargs)
