"""阶段 0：下载 Qwen3，或生成内置的演示模型。

    python download_model.py                             # Qwen/Qwen3-0.6B → models/Qwen3-0.6B
    python download_model.py Qwen/Qwen3-1.7B
    python download_model.py Qwen/Qwen3-0.6B --source huggingface    # 可设 HF_ENDPOINT 使用镜像
    python download_model.py demo                        # 演示模型，不联网

先试 ModelScope，连不上或没有这个模型时再试 Hugging Face；断了可以重来，会接着下载。
已有完整的本地副本时不联网；它记着自己是哪个模型、哪个版本，不是要的那个就会报错。
最后检查配置、分词器和权重能否载入；没有下载完整的目录不会以正式名称出现。
"""

import argparse
from pathlib import Path

from prompts import MEDICAL_PROMPTS
from qwenmed import checkpoints, cli, demo, hub
from qwenmed.errors import UserError


def main() -> None:
    """Fetch or build, check, say what comes next."""
    args = parse_args()
    folder = args.local_dir or Path("models") / args.model_id.rstrip("/").split("/")[-1]
    prepare = "python data.py"
    if args.model_id == demo.DEMO_MODEL:
        build_demo(folder)
        prepare += " --source demo"
    elif args.model_id.count("/") != 1:
        raise UserError(f"不是模型 ID：{args.model_id}", None, "形式是 组织/名称，例如 Qwen/Qwen3-0.6B；或 demo")
    else:
        hub.fetch_model(args.model_id, folder, args.source, args.revision, say=cli.note)
    check_loads(folder)
    print(folder)
    cli.note(f"接下来：{prepare}，然后 python train.py --model {folder}（显存不够用 train_lora.py）")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = cli.build_parser("download_model.py", __doc__, "[模型ID] [选项]")
    parser.general.add_argument(
        "model_id",
        nargs="?",
        default="Qwen/Qwen3-0.6B",
        metavar="MODEL_ID",
        help="模型 ID，或 demo；默认 Qwen/Qwen3-0.6B",
    )
    source = parser.add_argument_group("来源与去处")
    source.add_argument("--source", choices=tuple(hub.SOURCES), help="只用这一个来源（默认依次尝试）")
    source.add_argument("--local-dir", type=Path, metavar="DIR", help="放在哪里（默认 models/<模型名>）")
    source.add_argument("--revision", metavar="R", help="分支、标签或提交（默认来源的主分支）")
    return parser.parse_args()


def build_demo(folder: Path) -> None:
    """Build the demo model unless it is there; never in place of something else."""
    if hub.missing_model_files(folder):
        hub.check_free(folder)
        demo.build_demo_model(folder, MEDICAL_PROMPTS.values())


def check_loads(folder: Path) -> None:
    """Load config, tokenizer and weights once, the weights in the number type they are stored in.

    Raises:
        UserError: one of them can't be loaded.
    """
    checkpoints.load_tokenizer(folder)
    model = checkpoints.load_base(folder, "auto")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    cli.note(f"已检查：配置、分词器和权重都能载入（{size:,.1f} M 参数，{str(model.dtype).removeprefix('torch.')}）")


if __name__ == "__main__":
    cli.run(main)
