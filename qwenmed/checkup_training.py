"""What doctor.py asks of a training before it is begun: model, tokenizer, template, data, one sample, memory, two steps."""

import dataclasses
import math
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import (
    chat,
    checkpoints,
    configuration,
    files,
    hardware,
    hub,
    leaks,
    lengths,
    not_finite,
    planner,
    planning,
    sources,
    training,
)
from qwenmed.checkup import BAD, GOOD, MIND, Finding
from qwenmed.errors import UserError
from qwenmed.records import Problem, Record
from qwenmed.settings import LoraSettings, TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Chinese, Latin, digits, a rare character, an emoji and blanks: what medical texts hold.
ROUND_TRIP = (
    "患者，男，65岁；BP 150/95 mmHg，HbA1c 7.2%。\n\n1. **嗳气**、𬌗面龋（K02.1）😷 “多喝水”\tα-酮戊二酸 ≥ 3×10⁹/L"
)
CONTROL = ("<|im_start|>", chat.END_OF_TURN, "<|endoftext|>", chat.THINK_START, chat.THINK_END)
# Samples that are looked at, and the length of those that are trained on.
LOOKED_AT, STEP_TOKENS = 200, 512
# What an untrained model's loss is: every word as likely as the other.
RANDOM_LOSS = 0.9


@dataclass(frozen=True)
class Sample:
    """One sample as the model is trained on it.

    Attributes:
        place: where it was read.
        parts: (text, whether the loss covers it) in order.
        tokens: the texts of the trained tokens.
    """

    place: str
    parts: list[tuple[str, bool]]
    tokens: list[str]


class TrainingCheckup:
    """The checks in their order; each uses what those before it have found.

    Args:
        settings: of the training that is planned; LoraSettings for LoRA.
        general: the general system prompt.
        by_scenario: the scenarios' system prompts.

    Attributes:
        sample: the sample that was looked at, once it has been.
    """

    def __init__(self, settings: TrainSettings, general: str, by_scenario: Mapping[str, str]) -> None:
        self.sample: Sample | None = None
        self._settings, self._general, self._by_scenario = settings, general, by_scenario
        self._folder: Path | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._records: list[Record] = []
        self._rows: list[dict[str, Any]] = []
        self._row_lengths: list[int] = []
        self._lora = isinstance(settings, LoraSettings)

    @property
    def needs_hub(self) -> bool:
        """Whether the model must still be fetched."""
        return planning.local_folder(self._settings.model) is None

    def model(self) -> Iterator[Finding]:
        """Whether the model is there and whole."""
        name = self._settings.model
        if planning.local_folder(name) is None:
            yield Finding(MIND, "模型", f"{name} 还没有下载", f"python download_model.py {name}")
            return
        folder = training.resolve_model(name, self._by_scenario.values())
        if missing := hub.missing_model_files(folder):
            fix = "请删除这个目录，重新运行 python download_model.py"
            yield Finding(BAD, "模型", f"{folder} 不完整：{'、'.join(missing)}", fix)
            return
        checkpoints.check_weights(folder)
        config = checkpoints.read_config(folder)
        self._folder = folder
        count = checkpoints.count_parameters(folder)
        yield Finding(GOOD, "模型", f"{folder}，{count / 1e6:,.1f} M 参数，{config.get('model_type')}")
        if config.get("model_type") != "qwen3":
            yield Finding(
                MIND, "模型类型", f"{config.get('model_type')}", "这里的模板、停止符和默认设置只在 Qwen3 上测试过"
            )

    def tokenizer(self) -> Iterator[Finding]:
        """Round trip, control tokens, padding, the size of the vocabulary."""
        if self._folder is None:
            return
        tokenizer = checkpoints.load_tokenizer(self._folder)
        fix = "请使用 Qwen3 自带的分词器：重新运行 python download_model.py"
        text = unicodedata.normalize("NFC", ROUND_TRIP)
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back != text:
            place = next((i for i, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), len(back))
            found = f"编码再解码之后文字变了：{text[place : place + 8]!r} 成了 {back[place : place + 8]!r}"
            yield Finding(BAD, "分词器", found, fix)
            return
        split = [each for each in CONTROL if len(tokenizer(each, add_special_tokens=False)["input_ids"]) != 1]
        if split:
            yield Finding(BAD, "控制 token", f"{'、'.join(split)} 不是一个 token", fix)
            return
        if tokenizer.pad_token_id is None or tokenizer.pad_token == chat.END_OF_TURN:
            found = f"填充符是 {tokenizer.pad_token}：结束符会被当作填充遮住，回答停不下来"
            yield Finding(BAD, "填充符", found, "请把 pad_token 设为 <|endoftext|>")
            return
        shapes = checkpoints.tensor_shapes(self._folder)
        words = next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
        if words is not None and words < len(tokenizer):
            yield Finding(
                BAD, "词表", f"分词器有 {len(tokenizer)} 个 token，模型只有 {words} 个", "它们不是一套，" + fix
            )
            return
        self._tokenizer = tokenizer
        yield Finding(GOOD, "分词器", f"{len(tokenizer):,} 个 token，往返无损，控制 token 与填充符正确")
        yield from self._stop_tokens(tokenizer)

    def _stop_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
        assert self._folder is not None
        path = self._folder / "generation_config.json"
        config = files.read_json(path) if path.is_file() else {}
        ends = config.get("eos_token_id") if isinstance(config, dict) else None
        ends = ends if isinstance(ends, list) else [ends]
        if tokenizer.convert_tokens_to_ids(chat.END_OF_TURN) in ends:
            yield Finding(GOOD, "停止符", "generation_config.json 里有 <|im_end|>")
        else:
            fix = "这里的脚本会自己补上；别的程序读这个目录时回答停不下来，请把 <|im_end|> 加进 eos_token_id"
            yield Finding(MIND, "停止符", "generation_config.json 的 eos_token_id 里没有 <|im_end|>", fix)

    def template(self) -> Iterator[Finding]:
        """Whether training renders what inference will, and text stays text."""
        if self._tokenizer is None:
            return
        chat.check_template(self._tokenizer)
        usual = chat.render_prompt(self._tokenizer, chat.user_messages("问", "系统"))
        prompt = self._tokenizer.decode(usual)
        if not prompt.endswith("<|im_start|>assistant\n"):
            fix = "请使用 Qwen3 自带的对话模板"
            yield Finding(BAD, "生成标记", f"提示的末尾是 {prompt[-24:]!r}，应为 '<|im_start|>assistant\\n'", fix)
            return
        hostile = chat.render_prompt(self._tokenizer, chat.user_messages("<|im_end|><think>", "系统"))
        ids = self._tokenizer.convert_tokens_to_ids(list(CONTROL))
        if any(hostile.count(each) != usual.count(each) for each in ids):
            yield Finding(BAD, "对话模板", "用户写的 <|im_end|> 变成了控制 token", "请使用 Qwen3 自带的分词器和模板")
            return
        yield Finding(GOOD, "对话模板", "训练与推理逐 token 相同，思考在 <think> 里，以 <|im_end|> 结束")

    def data(self) -> Iterator[Finding]:
        """Whether both files are there, clean, and apart from each other."""
        counts: dict[str, int] = {}
        seen: dict[str, set[str]] = {}
        for part, name in (("训练", self._settings.train_file), ("验证", self._settings.val_file)):
            path = Path(name)
            if not path.exists():
                raise UserError("数据文件不存在", path, "python data.py，或用 --train-file / --val-file 指定")
            files.check_belong_together(path)
            counts[part], seen[part] = 0, set()
            for found in sources.stream(path):
                if isinstance(found, Problem):
                    raise UserError(found.reason, found.place, f"python data.py --source {path} --output-dir 新目录")
                counts[part] += len(found)
                seen[part] |= {leaks.text_fingerprint(record.question) for record in found}
                if part == "训练" and len(self._records) < LOOKED_AT:
                    self._records += found
            if not counts[part]:
                raise UserError("文件里没有一条记录", path, "python data.py")
        yield Finding(GOOD, "数据", f"训练 {counts['训练']:,} 条，验证 {counts['验证']:,} 条")
        if both := len(seen["训练"] & seen["验证"]):
            fix = "python data.py 会把问题相同的记录放在同一边"
            yield Finding(MIND, "数据泄漏", f"{both:,} 个验证问题也在训练集里：验证损失会偏低", fix)

    def mask(self) -> Iterator[Finding]:
        """Whether samples fit, and the loss covers thinking, answer and the end of the turn."""
        if self._tokenizer is None or not self._records:
            return
        samples = training.samples(self._settings, self._records[:LOOKED_AT], self._general, self._by_scenario)
        limit = self._settings.max_length
        self._rows, report = lengths.fit_rows(self._tokenizer, samples, limit, self._settings.overlong)
        if not self._rows:
            found = f"前 {len(samples)} 个样本没有一个不超过 {limit} 个 token"
            yield Finding(BAD, "长度", found, "请增大 --max-length，或训练时用 --overlong shorten")
            return
        lost = len(report.dropped) / len(samples)
        text = f"前 {len(samples)} 个样本里 {report.whole} 个完整，缩短 {report.shortened}，丢弃 {len(report.dropped)}"
        fix = "请增大 --max-length，或训练时用 --overlong shorten" if lost > 0.1 else ""
        yield Finding(MIND if lost > 0.1 else GOOD, "长度", text, fix)
        self._row_lengths = report.lengths
        ids, labels = chat.render_sample(self._tokenizer, self._rows[0])
        # Of a record only one sample may have been dropped: the prompt tells which this is.
        prompts = ((record.place, chat.record_messages(record, system)) for record, system in samples)
        place = next(place for place, prompt in prompts if prompt == self._rows[0]["prompt"])
        self.sample = _shown(self._tokenizer, place, ids, labels)
        yield from mask_findings(self._tokenizer, ids, labels, self._rows[0])

    def memory(self) -> Iterator[Finding]:
        """What the training will need, computed, against what there is."""
        if self._folder is None:
            return
        gpu = self._card()
        kind = "显存" if gpu.kind == "cuda" else "内存"
        tokens = planning.tokens_of(self._settings, gpu, max(self._row_lengths, default=None))
        try:
            plan, *_ = planning.candidates(self._settings, self._folder, gpu, tokens)
        except UserError as error:
            yield Finding(BAD, f"{kind}计划", error.what, error.remedy or "")
            return
        listed = "，".join(f"{name} {size / 2**30:.2f}" for name, size in plan.parts.items())
        text = f"{plan}：约需 {plan.total / 2**30:.1f} GiB（计算值：{listed}），可用 {gpu.room / 2**30:.1f} GiB"
        yield Finding(GOOD, f"{kind}计划", text)

    def steps(self) -> Iterator[Finding]:
        """Two steps of the real trainer on short samples; nothing is kept of them."""
        if self._folder is None or self._tokenizer is None or not self._rows:
            return
        started = time.perf_counter()
        by_length = sorted(zip(self._row_lengths, self._rows, strict=True), key=lambda pair: pair[0])
        short = [row for _, row in by_length[:2]]
        ill = "权重可能损坏，或数值类型不合适：请重新下载模型；有旧显卡时试试 train_lora.py"
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                losses, batch = self._train(short * 2, Path(folder))
        except not_finite.NotFinite as error:
            yield Finding(BAD, "两步训练", f"损失不是有限的数：{error.what}", ill)
            return
        yield from mask_findings(self._tokenizer, batch["input_ids"][0], batch["labels"][0], short[0], "训练器的掩码")
        device = hardware.pick_device(self._settings.device)
        peak = "，".join(f"{name} {size} GiB" for name, size in hardware.peak_memory_gib(device).items())
        text = (
            f"损失 {' → '.join(f'{loss:.3f}' for loss in losses)}，{time.perf_counter() - started:.1f} 秒，峰值 {peak}"
        )
        config = checkpoints.read_config(self._folder)
        if losses[0] > RANDOM_LOSS * math.log(config["vocab_size"]) and not config.get("notice"):
            fix = "预训练过的模型应在 3 以下：检查权重和分词器是不是一套"
            yield Finding(MIND, "两步训练", f"{text}；像是随机的权重", fix)
            return
        yield Finding(GOOD, "两步训练", text)

    def _card(self) -> planner.Card:
        return planning.card_of(hardware.pick_device(self._settings.device), self._settings)

    def _train(self, wanted: list[dict[str, Any]], folder: Path) -> tuple[list[float], dict[str, Any]]:
        assert self._folder is not None and self._tokenizer is not None
        settings = dataclasses.replace(
            self._settings, max_steps=2, batch_size=1, gradient_accumulation_steps=1, logging_steps=1,
            max_length=max(STEP_TOKENS, self._settings.max_length), eval_steps=1, best_by="last", packing="off",
        )  # fmt: skip
        gpu = self._card()
        plan, *_ = planning.candidates(settings, self._folder, gpu, STEP_TOKENS)
        model = checkpoints.load_base(self._folder, plan.dtype)
        config = configuration.sft_config(settings, folder, plan, gpu)
        config.save_strategy, config.eval_strategy, config.logging_nan_inf_filter = "no", "no", False
        adapter = configuration.lora_config(settings) if isinstance(settings, LoraSettings) else None
        data = training.Rows(wanted, wanted[:1], [], {})
        trainer = training.build_trainer(model, self._tokenizer, data, config, {}, (), adapter)
        trainer.remove_callback(trainer.progress_bar)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {name: batch[name].tolist() for name in ("input_ids", "labels")}


def mask_findings(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], labels: list[int], row: Mapping[str, Any], what: str = "掩码"
) -> Iterator[Finding]:
    """Whether the loss covers the reply, its end too, and nothing of the prompt; and the prompt is inference's."""
    fix = "请使用 Qwen3 自带的对话模板"
    trained = [label for label in labels if label != -100]
    if not trained:
        yield Finding(BAD, what, "没有一个 token 参加训练：损失会是 0 或 NaN", fix)
        return
    start = next(i for i, label in enumerate(labels) if label != -100)
    prompt = chat.render_prompt(tokenizer, row["prompt"])
    if ids[:start] != prompt:
        yield Finding(BAD, what, "训练的提示与推理渲染的提示不同：训练的和使用的不是一种格式", fix)
        return
    *_, before, last = "", *(tokenizer.decode([id_]) for id_ in trained[-2:])
    end = last if last.strip() else before  # the template writes a line break behind the end of the turn
    if end != chat.END_OF_TURN:
        yield Finding(BAD, what, f"最后一个参加训练的 token 是 {end!r}，不是 <|im_end|>：回答会停不下来", fix)
        return
    text = f"提示 {start} 个 token 不算损失，思考和回答 {len(trained)} 个算，最后是 <|im_end|>"
    yield Finding(GOOD, what, text)


def _shown(tokenizer: "PreTrainedTokenizerBase", place: str, ids: list[int], labels: list[int]) -> Sample:
    parts = []
    for trained, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100):
        parts.append((tokenizer.decode([id_ for id_, _ in group]), trained))
    return Sample(place, parts, list(_pieces(tokenizer, [label for label in labels if label != -100])))


def _pieces(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> Iterator[str]:
    """The text of each token; those that share a character's bytes are one piece."""
    waiting: list[int] = []
    for id_ in ids:
        waiting.append(id_)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd") or len(waiting) >= 8:  # a character has at most four bytes
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)
