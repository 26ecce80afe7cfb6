"""阶段 2a：全参数微调 Qwen3。

    python train.py                                  # 用 train.jsonl / val.jsonl 微调 Qwen3-0.6B
    python train.py --model demo                     # 内置演示模型，CPU 上几分钟
    python train.py --config configs/full.yaml --learning-rate 2e-5
    python train.py --plan --gpu-memory 12GB         # 只看各种做法要多少显存，会选哪个
    python train.py --resume                         # 从最新的完整检查点继续

全部参数都参加训练。开始前按空着的显存选做法：fp32 主权重和 AdamW（16 字节/参数），放不下时一步步换更省的（最省 4）。
结果写在 output/<模型名>-full/：检查点、run.json、loss.png、samples.jsonl、swanlog/。
"""

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS
from qwenmed import checkpoints, cli, configuration, hardware, planning, training
from qwenmed.run import Run
from qwenmed.settings import TrainSettings


def main() -> None:
    """Full-parameter SFT, step by step."""
    command = training.read_command_line("train.py", __doc__, TrainSettings, MEDICAL_PROMPTS.values())
    if command.only_plan:
        print(planning.overview(command.settings))
        return
    settings, model_folder = command.settings, command.model_folder
    folder = training.open_run_folder(settings, model_folder, "full")
    device = hardware.pick_device(settings.device)
    tokenizer = checkpoints.load_tokenizer(model_folder)
    rows = training.load_rows(settings, tokenizer, GENERAL_PROMPT, MEDICAL_PROMPTS)

    run = Run(settings, folder, "full", model_folder)
    gpu, plans = planning.choose(settings, model_folder, device, rows.longest, run.plan_before())
    configuration.sft_config(settings, folder, plans[0], gpu)  # a wrong --sft ends here, before anything is written
    card = run.begin(rows, tokenizer, device)
    for plan in run.attempts(plans):
        config = configuration.sft_config(settings, folder, plan, gpu)
        model = checkpoints.load_base(model_folder, plan.dtype, settings.attention)
        trainer = training.build_trainer(
            model, tokenizer, rows, config, card, run.callbacks(), in_backward=plan.in_backward
        )
        run.train(trainer)
    run.finish(trainer, tokenizer, rows, GENERAL_PROMPT)


if __name__ == "__main__":
    cli.run(main)
