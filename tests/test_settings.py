"""Settings: who overrules whom, and how a wrong one is named."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest

from qwenmed import cli
from qwenmed.cli import add_settings, build_parser
from qwenmed.errors import UserError
from qwenmed.settings import LoraSettings, TrainSettings, fingerprint
from qwenmed.yaml_settings import RECOMMENDATION_FILE, load_settings, read_yaml, recommended

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(config: Path | None = None, kind=TrainSettings, model_folder: Path | None = None, **given):
    return load_settings(kind, given, config, model_folder)


def parse(*arguments: str, kind=TrainSettings) -> Namespace:
    parser = build_parser("train.py", "训练")
    add_settings(parser, kind)
    return parser.parse_args(arguments)


@pytest.fixture
def model(tmp_path) -> Path:
    """A model folder that recommends settings for each method."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "full: {epochs: 7, seed: 1, batch_size: 2}\nlora: {epochs: 9}\n", RECOMMENDATION_FILE)
    return folder


def test_command_line_beats_yaml_beats_recommendation_beats_default(tmp_path, model):
    config = write(tmp_path, "seed: 5\nbatch_size: 4\n")
    merged = load(config, model_folder=model, batch_size=6)
    assert (merged.batch_size, merged.seed, merged.epochs, merged.max_length) == (6, 5, 7.0, 2048)


def test_falsy_values_are_values_at_every_step(tmp_path, model):
    # mlx-lm once dropped seed=0 because it asked whether the value was true.
    assert load(write(tmp_path, "seed: 0\n"), model_folder=model).seed == 0
    assert load(write(tmp_path, "sample_tokens: 9\n"), sample_tokens=0).sample_tokens == 0
    assert load(write(tmp_path, "resume: true\n"), resume=False).resume is False


def test_each_method_takes_its_own_recommendation(model):
    assert recommended(TrainSettings, model) == {"epochs": 7.0, "seed": 1, "batch_size": 2}
    assert recommended(LoraSettings, model) == {"epochs": 9.0}


def test_folder_without_a_recommendation_changes_nothing(tmp_path, model):
    write(model, "lora: {epochs: 9}\n", RECOMMENDATION_FILE)
    assert load(model_folder=model) == load(model_folder=tmp_path) == load() == TrainSettings()


def test_numbers_without_a_point_are_numbers(tmp_path):
    # YAML 1.1 reads 1e-5 as text.
    config = write(tmp_path, "learning_rate: 1e-5\nepochs: 2\neval-steps: .25\n")
    values = read_yaml(TrainSettings, config)
    assert values == {"learning_rate": 1e-5, "epochs": 2.0, "eval_steps": 0.25}
    assert all(type(value) is float for value in values.values())


def test_null_is_allowed_only_where_none_is(tmp_path):
    assert read_yaml(TrainSettings, write(tmp_path, "output_dir: null\n")) == {"output_dir": None}
    with pytest.raises(UserError, match="seed"):
        read_yaml(TrainSettings, write(tmp_path, "seed: null\n"))


def test_file_of_comments_says_nothing(tmp_path):
    assert read_yaml(TrainSettings, write(tmp_path, "# seed: 1\n")) == {}
    assert read_yaml(TrainSettings, None) == {}


@pytest.mark.parametrize(
    "line",
    [
        "seed: abc", "seed: 1.5", "seed: true", "seed: '1'", "max_length: [1]", "epochs: viel", "epochs: true",
        "resume: 1", "resume: 'yes'", "model: 5", "model: {a: 1}", "train_file: 2026-01-31",
        "target_modules: [q_proj, v_proj]",
    ],
)  # fmt: skip
def test_wrong_type_names_the_setting_and_the_file(tmp_path, line):
    name = line.partition(":")[0]
    with pytest.raises(UserError, match=rf"{name} 的类型不对.*a\.yaml"):
        read_yaml(LoraSettings, write(tmp_path, line + "\n"))


def test_unknown_name_is_named(tmp_path):
    with pytest.raises(UserError, match=r"learning_rat（.*a\.yaml"):
        read_yaml(TrainSettings, write(tmp_path, "seed: 1\nlearning_rat: 1\n"))
    with pytest.raises(UserError, match="不认识的设置 1"):
        read_yaml(TrainSettings, write(tmp_path, "1: 2\n"))


def test_lora_settings_are_unknown_to_full_training(tmp_path):
    config = write(tmp_path, "lora_rank: 8\n")
    assert read_yaml(LoraSettings, config) == {"lora_rank": 8}
    with pytest.raises(UserError, match="lora_rank"):
        read_yaml(TrainSettings, config)


@pytest.mark.parametrize("text", ["- seed: 1\n- epochs: 2\n", "just words\n", "5\n"])
def test_anything_but_names_and_values_at_the_top_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"最外层.*a\.yaml"):
        read_yaml(TrainSettings, write(tmp_path, text))
    with pytest.raises(UserError, match="最外层"):
        write(tmp_path, f"full:\n{text}" if text.startswith("-") else "full: 5\n", RECOMMENDATION_FILE)
        recommended(TrainSettings, tmp_path)


def test_broken_yaml_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"YAML 格式错误.*a\.yaml:3"):
        read_yaml(TrainSettings, write(tmp_path, "seed: 1\nepochs: 2\nmodel: a: b\n"))


@pytest.mark.parametrize(
    "text",
    [
        "model: \x07\n",  # a character that YAML forbids; this error has no line
        "model: !!python/object/apply:os.getcwd []\n",
        "output_dir: 2026-02-30\n",  # PyYAML takes it for a date and raises ValueError
        "model: " + "[" * 3000 + "]" * 3000 + "\n",
        "learning_rate: 1" + "0" * 400 + "\n",  # too large for a float
    ],
    ids=["control character", "python object", "impossible date", "too deep", "too large"],
)
def test_no_yaml_gives_anything_but_a_user_error(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.yaml"):
        read_yaml(TrainSettings, write(tmp_path, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(LoraSettings) if field.metadata["choices"]]
)
def test_wrong_choice_names_the_option_and_the_choices(tmp_path, name):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, f"{name}: wrong\n"), LoraSettings)
    field = next(field for field in dataclasses.fields(LoraSettings) if field.name == name)
    for word in ("--" + name.replace("_", "-"), "'wrong'", *field.metadata["choices"]):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 15), ("batch_size", 0), ("gradient_accumulation_steps", -1), ("logging_steps", 0),
        ("save_total_limit", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("epochs", -1.0),
        ("epochs", float("inf")), ("max_grad_norm", 0.0), ("eval_steps", 0.0), ("weight_decay", -0.1),
        ("warmup_steps", -1.0), ("sample_tokens", -1), ("max_steps", 0), ("max_steps", -2), ("seed", -1),
        ("seed", 2**32), ("lora_rank", 0), ("lora_alpha", 0), ("lora_dropout", 1.0), ("lora_dropout", -0.1),
    ],
)  # fmt: skip
def test_value_out_of_range_names_its_option(name, value):
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        LoraSettings(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("max_steps", -1), ("max_steps", 1), ("max_length", 16), ("seed", 0)])
def test_values_at_the_edge_are_allowed(name, value):
    assert getattr(TrainSettings(**{name: value}), name) == value


@pytest.mark.parametrize(
    "modules", ["embed_tokens", "lm_head", "q_proj, lm_head", " embed_tokens ", "model.embed_tokens"]
)
def test_lora_on_the_tied_embeddings_is_refused(modules):
    # peft matches by the end of the dotted name, so the full path means the same layer.
    with pytest.raises(UserError, match="--target-modules"):
        LoraSettings(target_modules=modules)


@pytest.mark.parametrize("modules", ["all-linear", "q_proj,v_proj", "q_proj, v_proj"])
def test_lora_on_linear_layers_is_allowed(modules):
    assert LoraSettings(target_modules=modules).target_modules == modules


@pytest.mark.parametrize(("name", "kind"), [("full", TrainSettings), ("lora", LoraSettings)])
def test_the_recipes_that_we_ship_are_valid(name, kind):
    assert load(ROOT / "configs" / f"{name}.yaml", kind)


@pytest.mark.parametrize("kind", [TrainSettings, LoraSettings])
def test_option_that_is_not_given_leaves_nothing(kind):
    assert vars(parse(kind=kind)) == {}


def test_given_options_have_their_types():
    given = vars(parse("--seed", "0", "--epochs", "2", "--resume", "--swanlab", "disabled", "--model", "demo"))
    assert given == {"seed": 0, "epochs": 2.0, "resume": True, "swanlab": "disabled", "model": "demo"}
    assert type(given["epochs"]) is float


@pytest.mark.parametrize("kind", [TrainSettings, LoraSettings])
def test_help_shows_every_option_with_its_default(capsys, kind):
    with pytest.raises(SystemExit) as left:
        parse("--help", kind=kind)
    assert left.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(kind):
        assert "--" + field.name.replace("_", "-") in shown
        if field.default is not None and not isinstance(field.default, bool):
            assert f"（默认{field.default}）" in shown, field.name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "abc"],
        ["--seed"],
        ["--device", "tpu"],
        ["--no-such-option"],
        ["stray"],
        ["--see", "1"],  # no abbreviations: they would break when an option is added
    ],
)
def test_wrong_option_is_one_line_on_stderr_and_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        parse(*arguments)
    out, err = capsys.readouterr()
    assert left.value.code == cli.EXIT_USER_ERROR == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("错误：")
    assert "--help" in err and arguments[0] in err


def test_fields_that_are_handed_through_are_read_as_yaml_reads_them(tmp_path):
    given = vars(parse("--sft", "optim=adafactor", "torch-compile=true", "--sft", "adam_beta2=0.95", "run_name=a=b"))
    assert given == {"sft": {"optim": "adafactor", "torch_compile": True, "adam_beta2": 0.95, "run_name": "a=b"}}
    config = write(tmp_path, "sft:\n  optim: adafactor\n  dataloader_num_workers: 2\n")
    assert load(config).sft == {"optim": "adafactor", "dataloader_num_workers": 2}
    with pytest.raises(UserError, match="名称: 值"):
        load(write(tmp_path, "sft: adafactor\n"))


@pytest.mark.parametrize("word", ["optim", "=x", "a=[1"])
def test_word_that_is_no_pair_is_named(capsys, word):
    with pytest.raises(SystemExit):
        parse("--sft", word)
    assert "--sft" in capsys.readouterr().err


def test_early_stopping_needs_the_validation_loss():
    with pytest.raises(UserError, match="--early-stopping.*eval_loss"):
        TrainSettings(early_stopping=2, best_by="last")


def test_fingerprint_depends_on_content_and_not_on_order():
    assert fingerprint({"a": 1, "b": "中"}) == fingerprint({"b": "中", "a": 1}) != fingerprint({"a": 2, "b": "中"})


@pytest.mark.parametrize(
    ("line", "value"), [("packing: on", "on"), ("packing: off", "off"), ("gradient_checkpointing: 2", "2")]
)
def test_switches_may_be_written_as_yaml_likes_them(tmp_path, line, value):
    name = line.partition(":")[0]
    assert read_yaml(TrainSettings, write(tmp_path, line + "\n")) == {name: value}
    with pytest.raises(UserError, match="model 的类型不对"):
        read_yaml(TrainSettings, write(tmp_path, "model: on\n"))


def test_forcing_a_resume_is_a_resume():
    assert TrainSettings(force_resume=True).resume and not TrainSettings().resume
