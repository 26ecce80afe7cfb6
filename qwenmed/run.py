"""One training run's bookkeeping: run.json, the tracker, the signals, the sample answers, the loss curve."""

import gc
import pickle
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import (
    chat,
    checkpoints,
    cli,
    evaluation,
    files,
    hardware,
    measures,
    planner,
    plots,
    processes,
    records,
    resuming,
    scoring,
    tracking,
)
from qwenmed.bootstrap import Bootstrap, Estimate, plain
from qwenmed.errors import UserError
from qwenmed.planner import Plan
from qwenmed.settings import TrainSettings
from qwenmed.training import Rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

    from qwenmed.callbacks import MedicalSFTTrainer, StopOnSignal
    from qwenmed.engine import Generation

SAMPLES_FILE = "samples.jsonl"
SAMPLE_COUNT = 3


class Run:
    """One training run's bookkeeping: its folder, run.json, the tracker and the signals.

    Args:
        settings: as merged.
        folder: the output folder.
        method: "full" or "lora".
        model_folder: what is being trained.

    Raises:
        UserError: another training that is alive writes into the folder.
    """

    def __init__(self, settings: TrainSettings, folder: Path, method: str, model_folder: Path) -> None:
        self.settings, self.folder, self.method, self.model_folder = settings, folder, method, model_folder
        self._lock = files.hold(folder, "训练") if processes.is_first() else None
        self.file = tracking.RunFile(folder)
        self.tracker = tracking.Tracker(cli.note)
        self.stop: StopOnSignal | None = None
        self._plan: Plan | None = None
        self._trainer: MedicalSFTTrainer | None = None
        self._out_of_memory = self._stepped_down = False

    def begin(self, rows: Rows, tokenizer: "PreTrainedTokenizerBase", device: "torch.device") -> dict[str, Any]:
        """Write run.json, start the tracker, and return the card that goes into each checkpoint.

        Raises:
            UserError: `--resume`, but the checkpoint is of other data or settings.
        """
        card = {
            "method": self.method,
            "base_model": str(self.model_folder),
            "base_weights_sha256": checkpoints.weights_sha256(self.model_folder),
            "settings": asdict(self.settings),
            "data": {part: {key: rows.summary[part][key] for key in ("file", "sha256")} for part in rows.summary},
            "system_prompts": sorted(
                each for seen in rows.summary["train"]["system_prompts"].values() for each in seen["hashes"]
            ),
            "chat_template_sha256": tracking.text_hash(tokenizer.chat_template),
        }
        if checkpoint := self.checkpoint():
            resuming.check_same(checkpoints.read_card(checkpoint), card, checkpoint, self.settings)
        previous = self.file.previous() if self.settings.resume else {}
        mode = tracking.swanlab_mode(self.settings.swanlab)
        name = self.folder.name
        self.tracker.start(
            mode, self.folder / "swanlog", name, asdict(self.settings), previous.get("swanlab", {}).get("id")
        )
        self.file.update(
            status="running",
            started=tracking.now(),
            **card | {"data": rows.summary},
            hardware=hardware.describe(device),
            versions=tracking.library_versions(),
            swanlab={"mode": mode, "id": self.tracker.run_id},
        )
        return card

    def attempts(self, plans: Sequence[Plan]) -> Iterator[Plan]:
        """The plans one after the other, as long as `train` runs out of memory.

        Raises:
            UserError: it did so with the last one too.
        """
        for number, plan in enumerate(plans):
            self._plan, self._out_of_memory = plan, False
            yield plan
            if not self._out_of_memory:
                return
            self._let_go()
            if number + 1 < len(plans):
                cli.note(f"显存不足，改用下一个计划：{plans[number + 1]}（{plans[number + 1].total / 2**30:.2f} GiB）")
        remedy = "请用更小的 --max-length、train_lora.py 或更小的模型；已完成的检查点都在，可以用 --resume 继续"
        raise UserError("显存不足，最省的计划也放不下", self.folder, remedy)

    def callbacks(self) -> list:
        """The trainer callbacks that serve the bookkeeping."""
        from qwenmed.callbacks import GuardedSwanLab, PlanAgainstMeasured, StopOnSignal

        self.stop = StopOnSignal()
        found = [self.stop, *([GuardedSwanLab(self.tracker)] if self.tracker.run_id else [])]
        if self._plan:
            found.append(PlanAgainstMeasured(self._plan.total, lambda memory: self.file.update(memory=memory)))
        if self.settings.early_stopping:
            from transformers import EarlyStoppingCallback

            found.append(EarlyStoppingCallback(self.settings.early_stopping))
        return found

    def train(self, trainer: "MedicalSFTTrainer") -> None:
        """Train, from the newest whole checkpoint where there is one; Ctrl-C and SIGTERM save first.

        Running out of a GPU's memory is noted for `attempts`, and the memory given back.

        Raises:
            KeyboardInterrupt, cli.Terminated: after the checkpoint was saved.
            UserError: the disk is full, or a loss is no number.
        """
        plan = planner.described(self._plan)
        trainer.card = trainer.card | {"plan": plan}
        self.file.update(plan={**plan, "parts": self._plan.parts if self._plan else {}})
        checkpoint = self.checkpoint()
        if checkpoint:
            checkpoints.check_weights(checkpoint)
            checkpoints.check_states(checkpoint)
            trainer.fresh_states = not planner.shares_states(self._plan, self.plan_before() or plan)
            cli.note(f"从 {checkpoint} 继续训练")
        elif self.settings.resume:
            cli.note("没有可以继续的检查点，从头开始训练")
        if trainer.args.device.type == "cpu":
            hardware.keep_freed_memory()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except pickle.UnpicklingError as error:  # the states are loaded with weights_only, which runs no code
            remedy = "它可能损坏或被改动过：删除这个检查点后用 --resume 从前一个继续"
            raise UserError("优化器、调度器或随机数的状态不是纯数据，没有载入", checkpoint, remedy) from error
        except Exception as error:
            if hardware.is_out_of_memory(error):
                self._note_out_of_memory(error)
            elif files.is_disk_full(error, self.folder):
                checkpoints.remove_unfinished(self.folder)
                remedy = "已完成的检查点都在；清理磁盘后用 --resume 继续，或用 --output-dir 换一个目录重新训练"
                raise UserError("磁盘空间已满，检查点没有存下", self.folder, remedy) from error
            else:
                raise
        finally:
            trainer.progress_bar.close()
            if self.stop:
                self.stop.release()
            self._trainer = trainer
        if self.stop and self.stop.received is not None:
            self._record(trainer, "interrupted")
            self.tracker.finish("aborted")
            cli.note(f"检查点已保存：{self.folder}/checkpoint-{trainer.state.global_step}；加上 --resume 即可继续")
            raise KeyboardInterrupt if self.stop.received == signal.SIGINT else cli.Terminated

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint of this run, where it goes on from one: `--resume`, or memory ran out behind it."""
        if not self.settings.resume and not self._stepped_down:
            return None
        return next(reversed(checkpoints.finished_checkpoints(self.folder)), None)

    def plan_before(self) -> dict[str, Any]:
        """What the checkpoint that is continued from says of its plan; empty where there is none."""
        checkpoint = self.checkpoint()
        return checkpoints.read_card(checkpoint).get("plan", {}) if checkpoint else {}

    def _note_out_of_memory(self, error: Exception) -> None:
        if processes.count() > 1:  # the others wait for this one and can't step down with it
            remedy = "请加 --gradient-checkpointing on，或用 configs/fsdp2.yaml 分片；已完成的检查点可以 --resume"
            raise UserError("显存不足", self.folder, remedy) from error
        self._out_of_memory = True

    def _let_go(self) -> None:
        """Free what the failed attempt holds, wherever its model is still referred to."""
        import torch

        trainer, self._trainer, self._stepped_down = self._trainer, None, True
        if trainer is not None:
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.model.to_empty(device="meta")
            trainer.accelerator.free_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def finish(self, trainer: "SFTTrainer", tokenizer: "PreTrainedTokenizerBase", rows: Rows, general: str) -> None:
        """Generate the sample answers, draw the curve, complete run.json and say where everything is."""
        from qwenmed.engine import Prompt, Sampling
        from qwenmed.engine_transformers import TransformersEngine

        self._record(trainer, "finished")
        if not processes.is_first():
            return
        model, bootstrap = self._best_model(trainer), Bootstrap(self.settings.seed)
        cli.note(f"用最佳检查点计算 {len(rows.val)} 个验证样本的困惑度 …")
        scored = scoring.score_references(model, (scoring.reference(tokenizer, row) for row in rows.val))
        found = measures.samples(evaluation.PERPLEXITY, [asdict(score) for score in scored])
        wanted = rows.val_records[:SAMPLE_COUNT] if self.settings.sample_tokens else []
        if wanted:
            cli.note(f"用最佳检查点回答 {len(wanted)} 个验证问题 …")
            sampling = Sampling(seed=self.settings.seed)
            engine = TransformersEngine(model, tokenizer, sampling)
            prompts = [
                Prompt(chat.record_messages(record, record.system or general), self.settings.sample_tokens)
                for record in wanted
            ]
            answered = _answered(wanted, engine.generate(prompts))
            found |= measures.behaviour([evaluation.reply_row(generation) for _, generation in answered])
            samples = [_sample(record, generation) for record, generation in answered]
            files.write_whole({self.folder / SAMPLES_FILE: files.to_jsonl(samples)})
            self.tracker.log_texts(
                "samples", [sample["generated_answer"] for sample in samples], trainer.state.global_step
            )
        self.tracker.finish()
        estimates = {key: bootstrap.estimate(sample) for key, sample in found.items()}
        self.file.update(evaluation={key: plain(each) for key, each in estimates.items()})
        metrics = self.file.content["metrics"]
        cli.note(
            f"损失：训练 {metrics['first_loss']:.4f} → {metrics['last_loss']:.4f}，验证 {metrics['last_eval_loss']:.4f}\n"
            f"验证困惑度：思考 {_shown(estimates['perplexity_thinking'])}，回答 {_shown(estimates['perplexity_answer'])}\n"
            f"最佳检查点：{self.file.content['best_checkpoint']}\n"
            f"损失曲线：{self.folder / tracking.PLOT_FILE}\n"
            f"运行记录：{self.folder / tracking.RUN_FILE}"
        )

    def _best_model(self, trainer: "SFTTrainer") -> "PreTrainedModel":
        """The best checkpoint's model; where each process holds a part of it only, read from the disk."""
        if processes.shards() > 1:
            best = checkpoints.describe(checkpoints.run_checkpoint(self.folder, "best"), self.model_folder)
            return checkpoints.load(best, "auto")[0]
        return _ready_to_generate(trainer.accelerator.unwrap_model(trainer.model))

    def _record(self, trainer: "SFTTrainer", status: str) -> None:
        state = trainer.state
        losses = [entry for entry in state.log_history if "loss" in entry]
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        if processes.is_first():
            plots.write(self.folder / tracking.PLOT_FILE, plots.losses({self.folder.name: state.log_history}))
        self.file.update(
            status=status,
            ended=tracking.now(),
            steps=state.global_step,
            epochs=state.epoch,
            metrics={
                "first_loss": losses[0]["loss"] if losses else None,
                "last_loss": losses[-1]["loss"] if losses else None,
                "last_eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
                "best_eval_loss": min((entry["eval_loss"] for entry in evaluations), default=None),
            },
            best_checkpoint=str(checkpoints.run_checkpoint(self.folder, "best")),
            peak_memory_gib=hardware.peak_memory_gib(trainer.args.device),
            log_history=state.log_history,
        )


def _ready_to_generate(model: "PreTrainedModel") -> "PreTrainedModel":
    """Out of training mode and with the key-value cache on, which checkpointing turns off."""
    model.eval()
    model.activation_checkpointing_disable()
    model.config.use_cache = True
    return model


def _shown(estimate: Estimate) -> str:
    """A perplexity with its 95 % interval."""
    interval = "" if estimate.low is None else f" [{estimate.low:,.2f}, {estimate.high:,.2f}]"
    return f"{estimate.value:,.2f}{interval}"


def _answered(
    wanted: Sequence[records.Record], results: "Iterable[Generation | UserError]"
) -> "list[tuple[records.Record, Generation]]":
    """The records with their replies; what failed is said and left out, for the training itself has succeeded."""
    answered = []
    for record, result in zip(wanted, results, strict=True):
        if isinstance(result, UserError):
            cli.note(f"一条样本没有生成：{result}")
        else:
            answered.append((record, result))
    return answered


def _sample(record: records.Record, generation: "Generation") -> dict[str, Any]:
    return {
        "question": record.question,
        "reference_answer": record.answer,
        "generated_thinking": generation.reply.thinking,
        "generated_answer": generation.reply.answer,
        "finish_reason": generation.finish_reason,
    }
