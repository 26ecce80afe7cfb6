"""阶段 6：把训练好的模型带到别处去用，并证明它在那里说的话与这里一样。

    python export.py --to merged                       # 一个普通的 Transformers 模型目录（LoRA 已合并）
    python export.py --to gguf --quant q8_0            # 一个 GGUF 文件，给 llama.cpp、LM Studio 等
    python export.py --to ollama -s diagnosis          # GGUF 加 Modelfile：ollama create 即可
    python export.py --to vllm -c output/Qwen3-0.6B-lora --dtype bf16

导出之后，另一个程序在新的进程里读出结果（Transformers 或 llama.cpp），回答 8 个问题，逐 token 与检查点对照；
不一致就不留下任何东西。-c 认得导出的目录：python medical_assistant.py -c exports/…
GGUF 需要 gguf 这个包；K 量化、在 llama.cpp 里自检和回答需要 pip install -e '.[gguf]'（可能要编译约十分钟）。
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS
from qwenmed import (
    chat,
    checkpoints,
    cli,
    files,
    gguf_file,
    hardware,
    leaks,
    merged_model,
    model_card,
    read_back,
    self_test,
    tracking,
)
from qwenmed.errors import UserError
from qwenmed.settings import ExportSettings

EXPORT_FILE = "export.json"
QUESTIONS = 8
SERVED_CONTEXT = 8192


def main() -> None:
    """Check, write, test, describe – and only then give the result its name."""
    settings = read_command_line()
    checkpoint = find_checkpoint(settings)
    target = free_target(settings, checkpoint)
    dtype = (
        merged_model.stored_dtype(checkpoint.base or checkpoint.path) if settings.dtype == "auto" else settings.dtype
    )
    check_space(settings, checkpoint, dtype, target)
    with files.whole_folder(target, "导出") as folder:
        artefact = write(settings, checkpoint, dtype, folder)
        found = test(settings, checkpoint, dtype, artefact, folder) if settings.self_test else None
        describe(settings, checkpoint, dtype, folder, target, found)
    commands = usage(settings, run_name(checkpoint), target)
    print(f"\n已导出：{target}（{megabytes(target):,.1f} MB）\n\n{commands}")


def read_command_line() -> ExportSettings:
    """The settings.

    Raises:
        UserError: a value is unknown.
    """
    parser = cli.build_parser("export.py", __doc__)
    cli.add_settings(parser, ExportSettings)
    settings = ExportSettings(**cli.given(parser.parse_args(), ExportSettings))
    if settings.scenario not in MEDICAL_SCENARIOS:
        raise UserError(f"未知场景 {settings.scenario}", None, f"可选：{'、'.join(MEDICAL_SCENARIOS)}")
    return settings


def find_checkpoint(settings: ExportSettings) -> checkpoints.Checkpoint:
    """The checkpoint, which can be exported as far as can be told without loading it.

    Raises:
        UserError: it lacks something, its base is another one, or a package is missing.
    """
    if checkpoints.gguf_file(Path(settings.checkpoint)):
        raise UserError("这已经是 GGUF", settings.checkpoint, "请用 -c 给出训练得到的检查点")
    base = Path(settings.base_model) if settings.base_model else None
    checkpoint = checkpoints.find(settings.checkpoint, base_model=base)
    cli.note(f"导出：{checkpoint.kind} {checkpoint.path}")
    if unchecked := merged_model.check_base(checkpoint):
        cli.note(f"注意：{unchecked}")
    if settings.is_gguf:
        gguf_file.check_installed(settings.quant)
    chat.check_template(checkpoints.load_tokenizer(checkpoints.tokenizer_folder(checkpoint)))
    return checkpoint


def run_name(checkpoint: checkpoints.Checkpoint) -> str:
    """What the exported model is called: its run, or the model's folder."""
    return checkpoints.short_name(checkpoint.path).split("/")[0]


def free_target(settings: ExportSettings, checkpoint: checkpoints.Checkpoint) -> Path:
    """The folder to be made.

    Raises:
        UserError: something is there that may not be replaced.
    """
    kind = f"{settings.to}-{settings.quant}" if settings.is_gguf else settings.to
    target = Path(settings.output_dir or Path("exports") / f"{run_name(checkpoint)}-{kind}")
    if not target.exists():
        return target
    if not target.is_dir():
        raise UserError("输出路径是文件而不是目录", target, "请用 -o 换一个目录")
    ours = (target / EXPORT_FILE).is_file()
    if any(target.iterdir()) and not (ours and settings.force):
        remedy = (
            "加上 --force 替换它，或用 -o 换一个目录" if ours else "它不是以前的导出，不会被替换；请用 -o 换一个目录"
        )
        raise UserError("输出目录已存在", target, remedy)
    if target.resolve() in (checkpoint.path.resolve(), checkpoint.base and checkpoint.base.resolve()):
        raise UserError("输出目录就是要导出的模型", target, "请用 -o 换一个目录")
    return target


def check_space(settings: ExportSettings, checkpoint: checkpoints.Checkpoint, dtype: str, target: Path) -> None:
    """Make sure that the disk has room for the result and for what lies beside it meanwhile.

    Raises:
        UserError: it has not, or the model can't be written in this form.
    """
    source = checkpoint.base or checkpoint.path
    if settings.is_gguf:
        needed = gguf_file.size(source, settings.quant)
        needed += merged_model.size(checkpoint, "fp32") if checkpoint.base else 0
    else:
        needed = merged_model.size(checkpoint, dtype)
    if settings.self_test:
        vocabulary = checkpoints.read_config(source)["vocab_size"]
        needed += self_test.space(vocabulary, QUESTIONS, settings.self_test_tokens)
    files.check_space(target, int(1.02 * needed) + 50_000_000, "请清理磁盘，或用 -o 写到另一块盘")


def write(settings: ExportSettings, checkpoint: checkpoints.Checkpoint, dtype: str, folder: Path) -> Path:
    """Write the weights; returns what a program is given to read: the folder, or the GGUF file."""
    if not settings.is_gguf:
        cli.note(f"正在写 safetensors（{dtype}）…")
        merged_model.write_merged(checkpoint, folder, dtype)
        return folder
    name = run_name(checkpoint)
    file = folder / gguf_name(settings, name)
    if checkpoint.base is None:
        cli.note(f"正在写 {file.name} …")
        gguf_file.write_gguf(checkpoint.path, file, settings.quant, name)
    else:
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as merged:
            cli.note("正在把 LoRA 合并进基础模型（fp32）…")
            merged_model.write_merged(checkpoint, Path(merged), "fp32")
            cli.note(f"正在写 {file.name} …")
            gguf_file.write_gguf(Path(merged), file, settings.quant, name)
    if settings.to == "ollama":
        page = model_card.modelfile(
            name,
            file.name,
            checkpoint.base or checkpoint.path,
            MEDICAL_SCENARIOS[settings.scenario],
            MEDICAL_PROMPTS[settings.scenario],
        )
        files.write_whole({folder / "Modelfile": page})
    return file


def test(
    settings: ExportSettings, checkpoint: checkpoints.Checkpoint, dtype: str, artefact: Path, folder: Path
) -> self_test.Comparison:
    """Let an independent reader compare the result with the checkpoint.

    Raises:
        UserError: they differ by more than the number type explains.
    """
    asked = [
        chat.user_messages(questions[0], MEDICAL_PROMPTS[scenario])
        for scenario, questions in list(SAMPLE_QUESTIONS.items())[:QUESTIONS]
    ]
    found = self_test.run(
        checkpoint,
        artefact,
        reader_of(settings),
        self_test.BOUNDS[settings.quant if settings.is_gguf else merged_bound(checkpoint, dtype)],
        asked,
        settings.self_test_tokens,
        hardware.pick_device("auto"),
        folder,
    )
    print(self_test.as_text(found))
    if found.failed:
        raise UserError(f"自检没有通过：{'；'.join(found.failed)}", None, "没有留下结果；请把这几行报告给我们")
    return found


def reader_of(settings: ExportSettings) -> str:
    """Who reads the result."""
    if not settings.is_gguf:
        return read_back.TRANSFORMERS
    if importlib.util.find_spec("llama_cpp"):
        return read_back.LLAMA
    cli.note("没有安装 llama-cpp-python：自检改由 Transformers 读 GGUF")
    return read_back.GGUF_BY_TRANSFORMERS


def merged_bound(checkpoint: checkpoints.Checkpoint, dtype: str) -> str:
    """What merged weights of this number type are held to."""
    keeps = checkpoint.base is None and dtype == merged_model.stored_dtype(checkpoint.path)
    return {"fp16": "f16", "bf16": "bf16"}.get(dtype, "exact") if not keeps else "exact"


def describe(
    settings: ExportSettings,
    checkpoint: checkpoints.Checkpoint,
    dtype: str,
    folder: Path,
    target: Path,
    found: self_test.Comparison | None,
) -> None:
    """Add the model card, what is known of the training, and export.json, by which an export is known."""
    run: dict[str, Any] = leaks.run_of(checkpoint.path)[1]
    if run:
        # A base that was itself trained here may not lie beside the export: its rows were seen as well.
        sources = [each for each in (checkpoint.path, checkpoint.base) if each]
        seen = sorted(leaks.trained_on(sources).texts)
        train = {**run.get("data", {}).get("train", {}), "texts": seen}
        files.write_json(folder / tracking.RUN_FILE, {**run, "data": {**run.get("data", {}), "train": train}})
    if (card := checkpoint.path / checkpoints.CARD_FILE).is_file():
        shutil.copyfile(card, folder / checkpoints.CARD_FILE)
    form = f"{settings.to}，{settings.quant if settings.is_gguf else dtype}"
    page = model_card.card(
        run_name(checkpoint),
        checkpoint,
        run,
        Path(settings.report),
        GENERAL_PROMPT,
        form,
        usage(settings, run_name(checkpoint), Path(target.name)),
        self_test.as_text(found) if found else None,
    )
    files.write_whole({folder / "README.md": page})
    files.write_json(
        folder / EXPORT_FILE,
        {
            "to": settings.to,
            "type": settings.quant if settings.is_gguf else dtype,
            "checkpoint": str(checkpoint.path),
            "base_model": str(checkpoint.base) if checkpoint.base else None,
            "exported": tracking.now(),
            "self_test": found.as_json() if found else None,
            "versions": tracking.library_versions(),
        },
    )


def usage(settings: ExportSettings, name: str, target: Path) -> str:
    """The commands that use the result.

    Args:
        name: of the model.
        target: the folder as it stands in the commands.
    """
    question = '-q "头痛三天了怎么办？" -s auto'
    local = f"python medical_assistant.py -c {target} {question}"
    if settings.to == "merged":
        return local
    if settings.to == "gguf":
        server = f"llama-server -m {target / gguf_name(settings, name)} --jinja -c {SERVED_CONTEXT}"
        return f"{local}\n{server}   # llama.cpp 自己的服务器"
    if settings.to == "ollama":
        model, url = model_card.ollama_name(name), "http://localhost:11434/v1"
        start = f"(cd {target} && ollama create {model} -f Modelfile)\nollama run {model}"
    else:
        model, url = name, "http://localhost:8000/v1"
        options = f"--served-model-name {model} --reasoning-parser qwen3 --max-model-len {SERVED_CONTEXT}"
        start = f"vllm serve {target} {options}"
    client = f"python medical_assistant.py --engine openai --base-url {url} --model {model} {question}"
    return f"{start}\n{client}   # 带紧急规则、回答检查和免责声明"


def gguf_name(settings: ExportSettings, name: str) -> str:
    """The name of the GGUF file."""
    return f"{name}-{settings.quant.upper()}{checkpoints.GGUF}"


def megabytes(folder: Path) -> float:
    """Size of a folder's files in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    cli.run(main)
