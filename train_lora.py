"""阶段 2b：LoRA 微调 Qwen3。

    python train_lora.py                             # 用 train.jsonl / val.jsonl 微调 Qwen3-0.6B
    python train_lora.py --model output/demo-full    # 在全参数微调的最佳检查点上继续
    python train_lora.py --lora-rank 32 --lora-alpha 64
    python train_lora.py --plan --gpu-memory 8GB     # 只看各种做法要多少显存，会选哪个
    python train_lora.py --resume                    # 从最新的完整检查点继续

原模型冻结（有 bf16 的 GPU 上为 bf16），只训练加在七个线性层上的低秩矩阵；学习率比全参数微调大一个数量级。
结果写在 output/<模型名>-lora/：适配器检查点、run.json、loss.png、samples.jsonl、swanlog/。
"""

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS
from qwenmed import checkpoints, cli, configuration, hardware, planning, training
from qwenmed.run import Run
from qwenmed.settings import LoraSettings


def main() -> None:
    """LoRA SFT, step by step."""
    command = training.read_command_line("train_lora.py", __doc__, LoraSettings, MEDICAL_PROMPTS.values())
    if command.only_plan:
        print(planning.overview(command.settings))
        return
    settings, model_folder = command.settings, command.model_folder
    folder = training.open_run_folder(settings, model_folder, "lora")
    device = hardware.pick_device(settings.device)
    tokenizer = checkpoints.load_tokenizer(model_folder)
    rows = training.load_rows(settings, tokenizer, GENERAL_PROMPT, MEDICAL_PROMPTS)

    run = Run(settings, folder, "lora", model_folder)
    gpu, plans = planning.choose(settings, model_folder, device, rows.longest, run.plan_before())
    configuration.sft_config(settings, folder, plans[0], gpu)  # a wrong --sft ends here, before anything is written
    card = run.begin(rows, tokenizer, device)
    for plan in run.attempts(plans):
        config = configuration.sft_config(settings, folder, plan, gpu)
        model = checkpoints.load_base(model_folder, plan.dtype, settings.attention, four_bit=plan.weights == "nf4")
        adapter = configuration.lora_config(settings)
        trainer = training.build_trainer(model, tokenizer, rows, config, card, run.callbacks(), adapter)
        run.train(trainer)
    run.finish(trainer, tokenizer, rows, GENERAL_PROMPT)


if __name__ == "__main__":
    cli.run(main)
