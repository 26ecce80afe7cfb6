"""The memory plan: what it counts, what it chooses, what it says where nothing fits."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_user_error, run_script

from qwenmed import hardware, planner, planning, shapes
from qwenmed.errors import UserError
from qwenmed.planner import GIB
from qwenmed.settings import LoraSettings, TrainSettings

SMALL, MIDDLE = shapes.known("Qwen/Qwen3-0.6B"), shapes.known("Qwen/Qwen3-1.7B")
AMPERE = planner.Card("cuda", 11 * GIB, True, "a 12 GB card")
TURING = planner.Card("cuda", 14 * GIB, False, "a T4")


def best(shape, settings, card, tokens=2048, torchao=True):
    return planner.choose(shape, settings, card, tokens, torchao)[0]


def room(gib):
    return dataclasses.replace(AMPERE, room=int(gib * GIB))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_of_the_published_models(model, parameters):
    assert shapes.known(model).parameters == parameters


def test_shape_of_a_folder_is_that_of_its_weights(demo_model):
    from peft import LoraConfig, get_peft_model

    from qwenmed import checkpoints

    shape = shapes.of_config(checkpoints.read_config(demo_model))
    assert shape.parameters == checkpoints.count_parameters(demo_model)
    adapted = get_peft_model(
        checkpoints.load_base(demo_model, "auto"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert shape.lora_parameters(4) == adapted.get_nb_trainable_parameters()[0]


# Counted by torch's MemTracker over fake tensors, MiB (`make bench-plan`): peaks of Qwen3's shapes with 2 and 6 layers.
@pytest.mark.parametrize(
    ("width", "layers", "lora", "weights", "autocast", "every", "tokens", "counted"),
    [
        (1024, 6, False, "fp32", "bf16", 0, 2048, 5951.7),
        (1024, 6, False, "fp32", "bf16", 0, 512, 5015.7),
        (1024, 6, False, "fp32", "bf16", 1, 2048, 4765.8),
        (1024, 6, False, "bf16", "bf16", 0, 2048, 3904.4),
        (1024, 6, False, "bf16", "bf16", 1, 2048, 2990.4),
        (1024, 6, True, "bf16", "bf16", 0, 2048, 2055.4),
        (1024, 6, True, "bf16", "bf16", 1, 2048, 852.1),
        (2048, 6, False, "fp32", "bf16", 0, 2048, 13259.4),
        (2048, 6, False, "bf16", "bf16", 0, 2048, 8085.7),
        (2048, 6, False, "bf16", "bf16", 1, 2048, 6711.8),
        (2048, 6, True, "bf16", "bf16", 0, 2048, 3655.1),
        (2048, 6, True, "bf16", "bf16", 1, 2048, 1817.2),
        (2048, 2, True, "bf16", "bf16", 1, 2048, 1363.2),
    ],
)
def test_plan_is_within_a_tenth_of_what_is_counted(width, layers, lora, weights, autocast, every, tokens, counted):
    shape = dataclasses.replace(SMALL if width == 1024 else MIDDLE, layers=layers)
    plan = planner.Plan(lora, weights, autocast, "adamw", False, every, tokens, {})
    total = sum(planner.parts(shape, plan, AMPERE, 16 if lora else None).values())
    assert total / 2**20 == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "card", "words"),
    [
        (TrainSettings(), room(40), ("fp32 权重", "AdamW", "不重算激活")),
        (TrainSettings(), room(11), ("fp32 权重", "每层重算激活")),
        (TrainSettings(), room(8), ("fp32 权重", "8 位 AdamW", "每层重算激活")),
        (TrainSettings(), room(5), ("bf16 权重（随机舍入）", "8 位 AdamW", "每层重算激活")),
        (TrainSettings(), room(3.8), ("反向传播时更新",)),
        (TrainSettings(), TURING, ("fp32 权重", "fp16 自动混合精度")),
        (LoraSettings(), room(40), ("bf16 冻结权重 + fp32 LoRA 权重", "不重算激活")),
        (LoraSettings(), room(3), ("bf16 冻结权重", "每层重算激活")),
        (LoraSettings(), TURING, ("fp32 冻结权重", "fp16")),
        (LoraSettings(quantize=True), room(40), ("4 位（NF4）",)),
        (TrainSettings(gradient_checkpointing="4"), room(40), ("每 4 层重算一层",)),
        (TrainSettings(weights="bf16"), room(40), ("bf16 权重（随机舍入）", "8 位 AdamW", "不重算激活")),
        (TrainSettings(weights="bf16", optimizer="adamw"), room(40), ("bf16 权重（小的更新会被舍入掉）", "，AdamW")),
        (LoraSettings(weights="fp32"), room(40), ("fp32 冻结权重",)),
        (TrainSettings(optimizer="adamw_8bit"), room(40), ("fp32 权重", "8 位 AdamW")),
        (TrainSettings(), planner.Card("cpu", 2**40, False, "CPU"), ("fp32 权重，AdamW，不重算激活",)),
    ],
)
def test_best_plan_that_fits_is_chosen(settings, card, words):
    said = str(best(SMALL, settings, card))
    assert all(word in said for word in words), said


def test_weights_gradients_and_states_take_the_bytes_a_parameter_that_they_are_known_for():
    def each(**options):
        parts = best(SMALL, TrainSettings(**options), room(100)).parts
        return (parts["权重"] + parts["梯度"] + parts["优化器"]) / SMALL.parameters

    assert each() == 16
    assert each(optimizer="adamw_8bit") == pytest.approx(10, rel=0.01)
    assert each(weights="bf16", optimizer="adamw_8bit", optimizer_in_backward="off") == pytest.approx(6, rel=0.01)
    assert each(weights="bf16", optimizer="adamw_8bit", optimizer_in_backward="on") == pytest.approx(4, rel=0.01)


def test_plans_to_step_down_to_need_less_and_less():
    for settings in (TrainSettings(), LoraSettings()):
        totals = [plan.total for plan in planner.choose(SMALL, settings, room(40), 2048, True)]
        assert len(totals) > 3 and totals == sorted(totals, reverse=True)


def test_plan_without_torchao_does_without_it_or_says_how_to_get_it():
    assert not any(plan.needs_torchao for plan in planner.choose(SMALL, TrainSettings(), room(11), 2048, False))
    with pytest.raises(UserError, match=r"\[quant\]"):
        planner.choose(SMALL, TrainSettings(), room(5), 2048, False)


def test_what_fits_nowhere_says_what_would_fit():
    with pytest.raises(UserError) as caught:
        planner.choose(MIDDLE, TrainSettings(), room(6), 2048, True)
    assert "放不下" in caught.value.what
    assert "train_lora.py" in caught.value.remedy and "Qwen/Qwen3-0.6B" in caught.value.remedy
    with pytest.raises(UserError, match="--max-length 1024"):
        planner.choose(MIDDLE, LoraSettings(), room(4.2), 4096, True)


@pytest.mark.parametrize("settings", [TrainSettings(), TrainSettings(weights="fp32"), LoraSettings()])
def test_what_is_said_to_fit_fits_when_it_is_followed(settings):
    said = set()
    for shape in (SMALL, MIDDLE, shapes.known("Qwen/Qwen3-4B")):
        for size in range(2, 25):
            card = planner.imagined_card(size * GIB)
            try:
                planner.choose(shape, settings, card, 2048, False)
            except UserError as error:
                remedies = error.remedy.removeprefix("放得下的：").split("；") if "放得下的：" in error.remedy else []
            else:
                continue
            for remedy in remedies:
                said.add(remedy)
                if remedy.startswith("--max-length "):
                    planner.choose(shape, settings, card, int(remedy.split()[1]), False)
                elif remedy == "train_lora.py":
                    planner.choose(shape, LoraSettings(), card, 2048, False)
                elif remedy.startswith("pip install"):
                    planner.choose(shape, settings, card, 2048, True)
                else:
                    planner.choose(shapes.known(remedy), settings, card, 2048, False)
    assert "Qwen/Qwen3-0.6B" in said


@pytest.mark.parametrize("options", [{"weights": "bf16"}, {"optimizer": "adamw_8bit"}])
def test_what_needs_torchao_says_so_where_there_is_room(options):
    with pytest.raises(UserError, match=r"torchao.*\[quant\]") as caught:
        planner.choose(SMALL, TrainSettings(**options), room(22), 2048, False)
    assert "放不下" not in str(caught.value)


def test_on_windows_the_8_bit_optimizer_asks_for_triton_too(monkeypatch):
    import torch

    there = {"torchao"}
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(hardware, "has_triton", lambda: "triton" in there)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    assert not planning.has_torchao()
    with pytest.raises(UserError, match="pip install triton-windows") as caught:
        planner.choose(SMALL, TrainSettings(), room(5), 2048, False)
    assert "[quant]" not in caught.value.remedy
    said = planning.overview(TrainSettings(model="Qwen/Qwen3-1.7B", gpu_memory="12GB"))
    assert "triton-windows" in said
    there.clear()
    with pytest.raises(UserError, match=r"\[quant\].*triton-windows"):
        planner.choose(SMALL, TrainSettings(), room(5), 2048, False)
    there.update(("torchao", "triton"))
    assert planning.has_torchao()


def test_what_is_a_little_too_large_is_tried_all_the_same():
    least = min(plan.total for plan in planner.plans(SMALL, LoraSettings(), AMPERE, 2048))
    (tried,) = planner.choose(SMALL, LoraSettings(), room(least / GIB / 1.05), 2048, True)
    assert tried.total == least
    with pytest.raises(UserError, match="放不下"):
        planner.choose(SMALL, LoraSettings(), room(least / GIB / 1.15), 2048, True)


def test_options_that_can_not_go_together_are_named():
    for options in ({"weights": "bf16"}, {"optimizer_in_backward": "on"}):
        with pytest.raises(UserError, match="bf16"):
            planner.choose(SMALL, TrainSettings(**options), TURING, 2048, True)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("weights", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize(
    "card",
    [AMPERE, TURING, planner.Card("mps", 2**40, False, "mps"), *(planner.Card("cpu", 2**40, b, "CPU") for b in (0, 1))],
)
def test_lora_has_a_plan_that_the_device_can_compute_or_is_refused(card, weights, quantize):
    settings = LoraSettings(weights=weights, quantize=quantize)
    refused = (card.kind != "cuda") if quantize else (weights == "bf16" and not card.bf16)
    if refused:
        with pytest.raises(UserError, match="--quantize" if quantize else "bf16"):
            planner.plans(SMALL, settings, card, 512)
    else:
        kinds = {plan.weights for plan in planner.plans(SMALL, settings, card, 512)}
        assert kinds == {"nf4" if quantize else "bf16" if card.bf16 and weights != "fp32" else "fp32"}


def test_plan_does_not_advise_what_a_run_refuses(monkeypatch):
    import torch

    monkeypatch.setattr(hardware, "faster_cpu_dtype", lambda *sizes: (torch.bfloat16, 2.0))
    with pytest.raises(UserError, match="NVIDIA"):
        planning.overview(LoraSettings(model="Qwen/Qwen3-0.6B", device="cpu", quantize=True))


def test_several_processes_do_not_update_within_the_backward_pass(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # each would step by its own gradient, before they are averaged
    assert not any(plan.in_backward for plan in planner.plans(MIDDLE, TrainSettings(), AMPERE, 2048))
    with pytest.raises(UserError, match="一个进程"):
        planner.plans(MIDDLE, TrainSettings(optimizer_in_backward="on"), AMPERE, 2048)


def test_sharded_training_counts_the_fp32_weights_that_it_gets(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sharded = dataclasses.replace(AMPERE, shards=2)
    assert {plan.weights for plan in planner.plans(MIDDLE, TrainSettings(), sharded, 2048)} == {"fp32"}
    with pytest.raises(UserError, match="FSDP"):
        planner.plans(MIDDLE, TrainSettings(weights="bf16"), sharded, 2048)
    # Frozen weights stay as they are.
    assert {plan.weights for plan in planner.plans(MIDDLE, LoraSettings(), sharded, 2048)} == {"bf16"}


def test_no_plan_mixes_bf16_into_fp16():
    import torch

    for settings in (TrainSettings(), LoraSettings(), LoraSettings(quantize=True)):
        for plan in planner.plans(SMALL, settings, TURING, 2048):
            assert plan.autocast == "fp16" and plan.dtype != torch.bfloat16 and "bf16" not in str(plan)
    assert planner.plans(SMALL, LoraSettings(quantize=True), AMPERE, 2048)[0].dtype == torch.bfloat16


def test_cpu_computes_in_the_type_that_is_measured_faster(monkeypatch):
    import torch

    cpu = planner.Card("cpu", 2**40, False, "CPU")
    monkeypatch.setattr(hardware, "faster_cpu_dtype", lambda *sizes: (torch.bfloat16, 2.0))
    quick = planning.with_faster_type(cpu, SMALL, 2048)
    assert best(SMALL, TrainSettings(), quick).autocast == "bf16"
    assert best(SMALL, TrainSettings(), quick).weights == "fp32"
    said = planning.overview(LoraSettings(model="Qwen/Qwen3-0.6B", device="cpu"))
    assert "bf16 自动混合精度" in said  # --plan says what a run would do
    monkeypatch.setattr(hardware, "faster_cpu_dtype", lambda *sizes: (torch.float32, 0.5))
    assert best(SMALL, TrainSettings(), planning.with_faster_type(cpu, SMALL, 2048)).autocast is None
    monkeypatch.setattr(hardware, "faster_cpu_dtype", lambda *sizes: (torch.bfloat16, 1.4))
    for before in (planner.described(best(SMALL, TrainSettings(), card)) for card in (cpu, quick)):
        kept = planning.with_faster_type(cpu, SMALL, 2048, before)  # whatever is measured when a run is continued
        assert best(SMALL, TrainSettings(), kept).autocast == before["autocast"]
    monkeypatch.setattr(hardware, "faster_cpu_dtype", lambda *sizes: (torch.float32, 0.01))
    slow = planning.with_faster_type(cpu, SMALL, 2048, planner.described(best(SMALL, TrainSettings(), quick)))
    assert not slow.bf16  # a checkpoint from a CPU with bf16, on one without
    monkeypatch.setattr(hardware, "faster_cpu_dtype", None)  # a small model, and a GPU, are not measured
    tiny = dataclasses.replace(SMALL, layers=1, words=1000)
    assert (
        planning.with_faster_type(cpu, tiny, 2048) == cpu and planning.with_faster_type(AMPERE, SMALL, 2048) == AMPERE
    )


def test_gpu_that_torch_does_not_see_is_named_before_hours_on_the_cpu(tmp_path, demo_model, monkeypatch, capsys):
    import torch

    cpu = torch.device("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    planning.choose(TrainSettings(), demo_model, cpu, 100, None)
    assert "doctor.py" not in capsys.readouterr().err
    program = tmp_path / ("nvidia-smi.exe" if sys.platform == "win32" else "nvidia-smi")
    program.touch(mode=0o755)
    planning.choose(TrainSettings(device="cpu"), demo_model, cpu, 100, None)  # this was asked for
    assert "doctor.py" not in capsys.readouterr().err
    planning.choose(TrainSettings(), demo_model, cpu, 100, None)
    assert "python doctor.py" in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "processes", "said"), [(2, 1, 1), (1, 1, 0), (2, 2, 0)])
def test_run_that_leaves_gpus_idle_says_how_to_use_them(monkeypatch, capsys, demo_model, gpus, processes, said):
    import torch

    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(planning, "card_of", lambda *given: AMPERE)
    monkeypatch.setattr(planning.processes, "agree", lambda found: found)
    planning.choose(TrainSettings(), demo_model, torch.device("cuda"), 700, None)
    assert capsys.readouterr().err.count("accelerate launch") == said


@pytest.mark.parametrize(
    ("kind", "fp16", "triton", "own"),
    [
        ("cpu", False, False, True),
        ("mps", False, False, True),
        ("cuda", False, True, False),
        ("cuda", False, False, True),  # Windows
        ("cuda", True, True, False),
        ("cuda", True, False, False),
    ],
)
def test_plan_counts_the_head_that_the_trainer_takes(trainer_args, kind, fp16, triton, own):
    from qwenmed.callbacks import takes_own_head

    assert takes_own_head(trainer_args(kind, fp16, triton)) == own
    weights, autocast = ("fp32", "fp16") if fp16 else ("bf16", "bf16") if kind == "cuda" else ("fp32", None)
    plan = planner.Plan(True, weights, autocast, "adamw", False, 1, 2048, {})
    card = planner.Card(kind, 2**40, not fp16, "", triton=triton)
    size = planner.head_bytes(SMALL, plan, card, frozen=True) / GIB
    if own:
        assert size == pytest.approx(512 * SMALL.words * (4 if kind != "cuda" else 2 + 4) / GIB, rel=0.01)
    elif triton:
        assert size < 0.3
    else:  # counted by MemTracker: 1.94 without the copies of fp32 weights
        assert size == pytest.approx(1.94 + 0.125, rel=0.02)


@pytest.fixture
def trainer_args(monkeypatch):
    """Builds what a trainer knows of its device."""
    import torch

    def build(kind, fp16, triton):
        monkeypatch.setattr(hardware, "has_triton", lambda: triton)
        return SimpleNamespace(device=torch.device(kind), fp16=fp16)

    return build


@pytest.mark.parametrize(("text", "gib"), [("12GB", 12), ("11.6GiB", 11.6), ("24", 24), (" 8 gb ", 8)])
def test_card_sizes_as_people_write_them(text, gib):
    assert planner.memory(text) == int(gib * GIB)


@pytest.mark.parametrize("text", ["", "0", "12TB", "-4GB", "viel", "99999"])
def test_what_is_no_card_size_is_refused(text):
    with pytest.raises(UserError, match="--gpu-memory"):
        planner.memory(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-memory", "12GB"], ["0.60 B 参数，全参数，每步 2048 个 token", "→", "会选：fp32 权重"]),
        (["--gpu-memory", "12GB", "--model", "Qwen/Qwen3-1.7B"], ["反向传播时更新", "pip install -e '.[quant]'"]),
        (["--gpu-memory", "8GB", "--model", "Qwen/Qwen3-8B"], ["放不下", "Qwen/Qwen3-"]),
    ],
)
def test_plan_is_printed_with_neither_weights_nor_data(tmp_path, arguments, words):
    done = run_script("train.py", "--plan", *arguments, cwd=tmp_path)
    assert done.status == 0 and all(word in done.out for word in words), done.out
    assert not list(tmp_path.iterdir())


def test_plan_of_lora_and_of_a_folder(tmp_path, demo_model):
    done = run_script("train_lora.py", "--plan", "--model", str(demo_model), "--gpu-memory", "4GB", cwd=tmp_path)
    assert done.status == 0 and "LoRA（r=16）" in done.out and "会选：" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "--model", "nobody/knows"], "不知道这个模型的大小"),
        (["--plan", "--gpu-memory", "much"], "--gpu-memory"),
        (["--gradient-checkpointing", "sometimes"], "--gradient-checkpointing"),
    ],
)
def test_bad_plans_give_one_line(tmp_path, arguments, words):
    assert_user_error(run_script("train.py", *arguments, cwd=tmp_path), words)


def test_memory_of_an_imagined_card_can_not_be_trained_on(small_data, demo_model):
    done = run_script("train.py", "--model", str(demo_model), "--gpu-memory", "12GB", cwd=small_data)
    assert_user_error(done, "--gpu-memory")


def test_gpu_is_held_to_the_size_that_was_given(monkeypatch):
    import torch

    held = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * GIB, name="a GPU")
    )
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda share, device: held.append((share, device)), raising=False
    )
    planning.cap(hardware.pick_device(), TrainSettings(gpu_memory="12GB"))
    ((share, device),) = held
    assert device == 0 and share == pytest.approx(0.5, rel=0.05)


def test_packing_is_on_where_there_is_a_gpu():
    assert planning.is_packing(TrainSettings(), AMPERE) and not planning.is_packing(
        TrainSettings(packing="off"), AMPERE
    )
    cpu = planner.Card("cpu", GIB, False, "")
    assert not planning.is_packing(TrainSettings(), cpu) and planning.is_packing(TrainSettings(packing="on"), cpu)
    assert planning.tokens_of(TrainSettings(), cpu, 700) == 700
    assert planning.tokens_of(TrainSettings(batch_size=2), AMPERE, 700) == 4096


def test_run_records_its_plan_and_what_it_took(trained):
    run = json.loads((trained.run / "run.json").read_text(encoding="utf-8"))
    assert run["plan"]["weights"] == "fp32" and sum(run["plan"]["parts"].values()) > 0
    assert (
        run["memory"]["planned_gib"] > 0
        and run["memory"]["measured_gib"]["resident"] > 0
        and run["memory"]["steps"] == 2
    )


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_peak_of_a_cpu_without_the_module_resource_is_what_psutil_knows(monkeypatch, capsys, platform):
    import psutil
    import torch

    from qwenmed import callbacks

    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    known = {"win32": SimpleNamespace(rss=GIB, peak_wset=3 * GIB), "linux": SimpleNamespace(rss=GIB)}[platform]
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: known))
    assert hardware.peak_memory_gib(torch.device("cpu")) == ({"resident": 3.0} if platform == "win32" else {})
    told = []
    compare = callbacks.PlanAgainstMeasured(2 * GIB, told.append)
    for _ in range(2):
        compare.on_step_end(
            SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(is_world_process_zero=True), None
        )
    if platform == "win32":
        assert told[0]["measured_gib"] == {"resident": 3.0} and "+50%" in capsys.readouterr().err
    else:
        assert not told and not capsys.readouterr().err


@pytest.mark.parametrize(("capability", "words"), [((7, 5), "fp16 自动混合精度"), ((8, 0), "bf16 自动混合精度")])
def test_plan_for_a_size_computes_as_the_gpu_here_does(monkeypatch, capability, words):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert words in planning.overview(TrainSettings(model="Qwen/Qwen3-0.6B", gpu_memory="16GB")).splitlines()[-1]


WORDS = {
    "README.md": ("fp32", "fp32 + 8 位", "bf16 + 8 位", "反向时更新", "–", "T4：14.6 GiB，没有 bf16"),
    "README_EN.md": ("fp32", "fp32 + 8-bit", "bf16 + 8-bit", "in backward", "–", "T4: 14.6 GiB, no bf16"),
}


@pytest.mark.parametrize("readme", sorted(WORDS))
def test_table_of_cards_in_the_readme_is_what_the_planner_says(readme):
    plain, fp32_8bit, bf16_8bit, in_backward, none, t4 = WORDS[readme]

    def cell(shape, settings, card):
        try:
            plan = best(shape, settings, card)
        except UserError:
            return none
        kind = fp32_8bit if plan.weights == "fp32" else in_backward if plan.in_backward else bf16_8bit
        peak = f"{plan.total / GIB:.1f}"
        return peak if plan.lora else f"{peak} {kind if plan.needs_torchao else plain}"

    text = (ROOT / readme).read_text(encoding="utf-8")
    cards = {f"{size} GB": planner.imagined_card(size * GIB) for size in (8, 12, 16, 24)}
    for name, card in {**cards, t4: planner.imagined_card(planner.memory("14.6GiB"), bf16=False)}.items():
        cells = [cell(shape, kind(), card) for shape in (SMALL, MIDDLE) for kind in (TrainSettings, LoraSettings)]
        row = f"| {name} | {' | '.join(cells)} |"
        assert row in text, f"the row should read: {row}"
