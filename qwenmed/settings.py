"""The settings behind the command lines, each standing once; `yaml_settings` reads those of a training from files."""

import dataclasses
import hashlib
import json

from qwenmed.cli import setting
from qwenmed.errors import UserError

DATA, RUN, OPTIMISATION, MEMORY = "数据", "运行", "优化", "显存与速度"
EVALUATION, TRACKING, LORA = "评估与保存", "记录", "LoRA"
MORE_FIELDS = "其他"


def listed(text: str | None) -> list[str]:
    """The parts of a setting that lists something, set apart by commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def require(settings: object, name: str, condition: bool, rule: str) -> None:
    """Make sure that a setting keeps a rule.

    Raises:
        UserError: it doesn't; named as its option.
    """
    if not condition:
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} 的值 {getattr(settings, name)!r} 不合适：{rule}")


@dataclasses.dataclass
class TrainSettings:
    """Everything that both training scripts can be told."""

    model: str = setting("Qwen/Qwen3-0.6B", "模型：模型 ID、本地目录，或 demo（内置演示模型）", DATA)
    train_file: str = setting("train.jsonl", "训练数据", DATA)
    val_file: str = setting("val.jsonl", "验证数据", DATA)
    max_length: int = setting(2048, "一条样本的最大 token 数；超长样本按 --overlong 处理，绝不从右侧截断", DATA)
    overlong: str = setting(
        "drop", "超长样本：drop 丢弃，shorten 缩短思考（保留回答和结束符）", DATA, choices=("drop", "shorten")
    )
    system_prompts: str = setting(
        "mixed",
        "系统提示词：general 通用，scenario 用记录的场景（数据没有指出时由问题推测），mixed 两者都练",
        DATA,
        choices=("general", "scenario", "mixed"),
    )

    output_dir: str | None = setting(None, "输出目录（默认 output/<模型名>-<方法>）", RUN)
    resume: bool = setting(False, "从输出目录里最新的完整检查点继续训练", RUN)
    force_resume: bool = setting(False, "继续训练，数据或设置与检查点不同也继续（--resume 会列出不同之处并拒绝）", RUN)
    seed: int = setting(42, "随机种子", RUN)
    device: str = setting("auto", "设备", RUN, choices=("auto", "cuda", "mps", "cpu"))

    epochs: float = setting(3.0, "训练轮数", OPTIMISATION)
    max_steps: int = setting(-1, "最多训练步数，-1 表示按轮数", OPTIMISATION)
    learning_rate: float = setting(1e-5, "学习率", OPTIMISATION)
    batch_size: int = setting(1, "每个设备每步的样本数", OPTIMISATION)
    gradient_accumulation_steps: int = setting(8, "梯度累积步数（等效批大小 = 样本数 × 累积步数）", OPTIMISATION)
    warmup_steps: float = setting(0.05, "预热步数；小于 1 时表示占总步数的比例", OPTIMISATION)
    lr_scheduler: str = setting(
        "cosine", "学习率曲线", OPTIMISATION, choices=("cosine", "linear", "constant", "constant_with_warmup")
    )
    weight_decay: float = setting(0.0, "权重衰减", OPTIMISATION)
    max_grad_norm: float = setting(1.0, "梯度裁剪阈值", OPTIMISATION)
    neftune_alpha: float | None = setting(
        None, "NEFTune：训练时给词嵌入加噪声的幅度，如 5（arXiv:2310.05914）", OPTIMISATION
    )
    packing: str = setting(
        "auto", "把多条样本无交叉地拼进一行：auto 在 GPU 上开启", MEMORY, choices=("auto", "on", "off")
    )
    gradient_checkpointing: str = setting(
        "auto",
        "激活检查点（省显存、慢约三成）：auto 只在放不下时用，on 每层，off 不用，数字 N 每 N 层重算一层",
        MEMORY,
        metavar="auto|on|off|N",
    )
    weights: str = setting(
        "auto", "权重的数值类型：auto 放得下就用 fp32 主权重", MEMORY, choices=("auto", "fp32", "bf16")
    )
    optimizer: str = setting(
        "auto",
        "优化器：adamw_8bit 的状态每个一字节，bf16 权重随机舍入（需要 [quant]）；auto 放不下 adamw 时才用",
        MEMORY,
        choices=("auto", "adamw", "adamw_8bit"),
    )
    optimizer_in_backward: str = setting(
        "auto",
        "反向传播时就更新权重，不保留梯度：不累积、不裁剪；auto 只在别的都放不下时用",
        MEMORY,
        choices=("auto", "on", "off"),
    )
    attention: str = setting(
        "sdpa",
        "注意力的实现：sdpa、flex_attention，或 kernels 包里的，如 kernels-community/flash-attn2（GPU）",
        MEMORY,
        metavar="NAME",
    )
    compile: bool = setting(False, "torch.compile；拼接的行补到同样长（第一步要编译几分钟）", MEMORY)
    gpu_memory: str | None = setting(
        None, "按这么大的显存做计划，训练时也不超过它，如 12GB（默认用这块卡空着的）", MEMORY, metavar="SIZE"
    )

    eval_steps: float = setting(0.1, "每多少步评估并保存一次；小于 1 时表示占总步数的比例", EVALUATION)
    best_by: str = setting(
        "eval_loss", "哪个检查点算最佳：验证损失最低的，或最后一个", EVALUATION, choices=("eval_loss", "last")
    )
    early_stopping: int | None = setting(
        None, "验证损失连续这么多次评估没有变好就停止（--best-by eval_loss 时）", EVALUATION
    )
    save_total_limit: int = setting(2, "最多保留几个检查点（最佳的一个总会保留）", EVALUATION)
    sample_tokens: int = setting(512, "训练结束后，三条验证问题各生成多少 token；0 表示不生成", EVALUATION)

    swanlab: str | None = setting(
        None,
        "SwanLab 记录方式（默认 offline；设置了 SWANLAB_API_KEY 时为 online）",
        TRACKING,
        choices=("offline", "online", "local", "disabled"),
    )
    logging_steps: int = setting(5, "每多少步记录一次损失", TRACKING)

    sft: dict | None = setting(
        None,
        "原样交给 TRL 的 SFTConfig（也就是 TrainingArguments）的其他字段，如 optim=adafactor adam_beta2=0.99",
        MORE_FIELDS,
    )

    def __post_init__(self) -> None:
        """Check ranges; a wrong value is named with its option.

        Raises:
            UserError: a value is outside of its range.
        """
        self.resume = self.resume or self.force_resume
        self._require("max_length", self.max_length >= 16, "至少为 16")
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "save_total_limit"):
            self._require(name, getattr(self, name) >= 1, "至少为 1")
        for name in ("learning_rate", "epochs", "max_grad_norm", "eval_steps"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "必须大于 0")
        for name in ("weight_decay", "warmup_steps", "sample_tokens"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "不能为负")
        self._require("neftune_alpha", self.neftune_alpha is None or self.neftune_alpha > 0, "必须大于 0")
        patience = self.early_stopping
        self._require("early_stopping", patience is None or patience >= 1, "至少为 1")
        self._require("early_stopping", patience is None or self.best_by == "eval_loss", "需要 --best-by eval_loss")
        checkpointing = self.gradient_checkpointing
        layers = checkpointing.isascii() and checkpointing.isdigit() and int(checkpointing) >= 1
        self._require(
            "gradient_checkpointing", checkpointing in ("auto", "on", "off") or layers, "可选 auto、on、off 或层数 N"
        )
        self._require("max_steps", self.max_steps == -1 or self.max_steps >= 1, "为 -1 或至少为 1")
        self._require("seed", 0 <= self.seed < 2**32, "应在 0 与 2³²-1 之间")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            self._require(
                field.name, not choices or value is None or value in choices, f"可选 {'、'.join(choices or ())}"
            )

    def _require(self, name: str, condition: bool, rule: str) -> None:
        require(self, name, condition, rule)


@dataclasses.dataclass
class LoraSettings(TrainSettings):
    """The settings of LoRA besides the common ones.

    Rank 16 on all seven linear projections: "LoRA Without Regret" (Schulman et al., 2025) finds that
    covering every layer matters more than the rank, and that a few thousand samples fit well into small
    ranks. alpha = 2·rank gives a scale of 2, which goes with a learning rate ten to twenty times that of
    full fine-tuning.
    """

    learning_rate: float = setting(2e-4, "学习率", OPTIMISATION)
    lora_rank: int = setting(16, "低秩矩阵的秩 r", LORA)
    lora_alpha: int = setting(32, "缩放系数 alpha（等效缩放 alpha / r）", LORA)
    lora_dropout: float = setting(0.05, "LoRA 的 dropout", LORA)
    target_modules: str = setting("all-linear", "加 LoRA 的层：all-linear，或用逗号分隔的层名", LORA)
    rslora: bool = setting(False, "rsLoRA：缩放用 alpha / √r，秩大时更稳（arXiv:2312.03732）", LORA)
    dora: bool = setting(False, "DoRA：方向与大小分开学，较慢（arXiv:2402.09353）", LORA)
    quantize: bool = setting(
        False, "QLoRA：冻结的权重用 4 位（NF4），需要 NVIDIA GPU 和 bitsandbytes（arXiv:2305.14314）", LORA
    )

    def __post_init__(self) -> None:
        """Check ranges, those of LoRA as well; see TrainSettings."""
        super().__post_init__()
        for name in ("lora_rank", "lora_alpha"):
            self._require(name, getattr(self, name) >= 1, "至少为 1")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "应在 0 与 1 之间")
        names = [name.strip().rpartition(".")[2] for name in self.target_modules.split(",")]
        self._require("target_modules", all(names), "层名不能为空")
        tied = {"embed_tokens", "lm_head"} & set(names)
        # Qwen3-0.6B/1.7B share one matrix between both; an adapter on it merges to gibberish (unsloth#3547).
        self._require("target_modules", not tied, "Qwen3 的词嵌入与输出层共享权重，不能加 LoRA")


EXAM, REPLIES, REPORT, MORE = "题目", "生成（对所有模型相同）", "报告", "更多（默认不做）"
# The parts of an evaluation that can be chosen.
EVAL_PARTS = ("perplexity", "answers", "choices", "safety")


@dataclasses.dataclass
class EvalSettings:
    """What models are evaluated on, and where the report goes."""

    data: str = setting("val.jsonl", "评估数据，格式与训练数据相同", EXAM, metavar="FILE")
    limit: int | None = setting(None, "只用前 N 条（排除训练过的行之后）", EXAM)
    system_prompts: str = setting(
        "general", "系统提示词：general 通用，scenario 用记录自己的场景", EXAM, choices=("general", "scenario")
    )
    keep_leaked: bool = setting(False, "训练过的行也评，报告里会说明；用来看模型背下了多少", EXAM)
    parts: str = setting(",".join(EVAL_PARTS), "做哪几项，用逗号分隔", EXAM, metavar="PARTS")
    choices: str | None = setting(
        None, "选择题：JSONL，每行 question、options、answer（默认用自带的 60 题）", EXAM, metavar="FILE"
    )
    urgency: str | None = setting(
        None, "紧急程度题：JSONL，每行 question、emergency（默认用自带的 60 题）", EXAM, metavar="FILE"
    )

    max_tokens: int = setting(2048, "每条回复最多多少 token", REPLIES, short="-m")
    think_budget: int | None = setting(None, "思考最多占多少 token；0 表示不思考（默认只为回答留出余地）", REPLIES)
    temperature: float = setting(0.6, "采样温度；0 为贪心（默认值与 top-p 出自 Qwen3 的模型卡）", REPLIES)
    top_p: float = setting(0.95, "核采样的概率和", REPLIES)
    seed: int = setting(42, "固定采样、重抽和对照题的抽取：同样的种子，同样的报告", REPLIES)

    output_dir: str = setting("eval_report", "报告写到哪个目录", REPORT, short="-o", metavar="DIR")
    resume: bool = setting(False, "接着做：模型和设置都相同的结果不再算", REPORT)

    lm_eval: str | None = setting(
        None, "再用 lm-evaluation-harness 做这些任务，逗号分隔，如 ceval-valid_basic_medicine", MORE, metavar="TASKS"
    )
    judge_url: str | None = setting(None, "让裁判模型两两比较回答：OpenAI 兼容服务器的地址", MORE, metavar="URL")
    judge_model: str | None = setting(None, "裁判模型的名字（服务器上只有一个时可以不给）", MORE, metavar="TEXT")

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: a value is outside of its range.
        """
        require(self, "limit", self.limit is None or self.limit >= 1, "至少为 1")
        require(self, "max_tokens", self.max_tokens >= 1, "至少为 1")
        require(self, "seed", 0 <= self.seed < 2**32, "应在 0 与 2³²-1 之间")
        unknown = set(self.wanted_parts) - set(EVAL_PARTS)
        require(self, "parts", bool(self.wanted_parts) and not unknown, f"可选 {'、'.join(EVAL_PARTS)}")

    @property
    def wanted_parts(self) -> list[str]:
        """The parts to do."""
        return listed(self.parts)


SOURCE, FORM, PLACE = "来源", "形式", "结果"
EXPORT_TARGETS = ("merged", "gguf", "ollama", "vllm")
# What a GGUF file can hold: those that the gguf package writes itself, and those of llama.cpp's quantiser.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


@dataclasses.dataclass
class ExportSettings:
    """What is exported, in which form, and where to."""

    checkpoint: str = setting(
        "best",
        "检查点、训练目录或模型目录；best、latest 取最近一次训练的",
        SOURCE,
        short="-c",
        metavar="DIR|latest|best",
    )
    base_model: str | None = setting(None, "LoRA 的基础模型现在的目录", SOURCE, metavar="DIR")
    report: str = setting(
        "eval_report/report.json", "eval.py 的报告；里面有这个检查点时，数字写进模型卡", SOURCE, metavar="FILE"
    )

    to: str | None = setting(
        None,
        "merged 合并好的 safetensors；gguf 给 llama.cpp；ollama GGUF 加 Modelfile；vllm 合并好的目录加启动命令",
        FORM,
        choices=EXPORT_TARGETS,
    )
    dtype: str = setting(
        "auto",
        "merged、vllm 的数值类型；auto 保持模型原来的（LoRA：基础模型的）",
        FORM,
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    quant: str = setting(
        "q8_0", f"gguf、ollama 的类型：{'、'.join(GGUF_TYPES)}；装有 llama.cpp 时还有 {'、'.join(K_QUANTS)}", FORM
    )
    scenario: str = setting("diagnosis", "ollama：把哪个场景的提示词写进 Modelfile", FORM, short="-s", metavar="ID")

    output_dir: str | None = setting(
        None, "写到哪个目录（默认 exports/<名称>-<形式>）", PLACE, short="-o", metavar="DIR"
    )
    force: bool = setting(False, "替换同一目录里以前的导出", PLACE)
    self_test: bool = setting(True, "导出后由另一个程序读出，与检查点对照；不一致就不留下结果", PLACE)
    self_test_tokens: int = setting(256, "自检的 8 条回复每条至多多少 token", PLACE)

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            UserError: a value is unknown or outside of its range.
        """
        if self.to is None:
            raise UserError("没有说导出成什么", None, f"请加上 --to {'|'.join(EXPORT_TARGETS)}")
        require(self, "to", self.to in EXPORT_TARGETS, f"可选 {'、'.join(EXPORT_TARGETS)}")
        self.quant = self.quant.lower()
        known = (*GGUF_TYPES, *K_QUANTS)
        require(self, "quant", self.quant in known, f"可选 {'、'.join(known)}")
        require(self, "self_test_tokens", 1 <= self.self_test_tokens <= 2048, "应在 1 与 2048 之间")

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.to in ("gguf", "ollama")


ADDRESS, LOAD = "地址与密钥", "负载"


@dataclasses.dataclass
class ServeSettings:
    """Where the server listens, and how much it takes on."""

    host: str = setting("127.0.0.1", "监听的地址；不是本机的地址需要密钥", ADDRESS)
    port: int = setting(8000, "端口", ADDRESS)
    api_key_file: str | None = setting(
        None, "API 密钥，每行一个；请求里用 Authorization: Bearer 密钥", ADDRESS, metavar="FILE"
    )
    log_content: bool = setting(False, "把问题和回答打印到 stderr（默认从不记录）", ADDRESS)

    slots: int = setting(32, "同时生成多少条回复（llama.cpp 总是 1）", LOAD)
    waiting: int = setting(64, "另有多少个请求可以等待；再多就回答 429", LOAD)
    request_timeout: float = setting(300.0, "一个请求最多多少秒", LOAD)
    max_tokens: int = setting(2048, "每条回复最多多少 token；请求可以要得更少", LOAD, short="-m")

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: a value is outside of its range.
        """
        require(self, "port", 0 < self.port < 65536, "应在 1 与 65535 之间")
        require(self, "slots", 1 <= self.slots <= 1024, "应在 1 与 1024 之间")
        require(self, "waiting", 0 <= self.waiting <= 4096, "应在 0 与 4096 之间")
        require(self, "request_timeout", 0 < self.request_timeout <= 86_400, "应大于 0，至多一天")
        require(self, "max_tokens", 1 <= self.max_tokens <= 32_768, "应在 1 与 32768 之间")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def fingerprint(value: object) -> str:
    """A short hash of any JSON-like value, for run.json."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
