"""Hostile files: nothing that is read runs code, writes elsewhere, or ends in a traceback."""

import json
import pickle
import shutil

import pytest
from conftest import cpu_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenmed import checkpoints, hub, tracking, training
from qwenmed.errors import UserError


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self._marker = str(marker)

    def __reduce__(self):
        return (open, (self._marker, "w"))


def plant(path, marker):
    """A torch file whose unpickling writes `marker`."""
    import torch

    torch.save({"state": Bomb(marker)}, path)


def test_the_bomb_goes_off_where_nobody_takes_care(tmp_path):
    with pytest.raises(TypeError):  # a file can't be pickled again, but by then it is written
        pickle.dumps(pickle.loads(pickle.dumps(Bomb(tmp_path / "marker"))))
    assert (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def resume(tmp_path_factory, demo_rows, demo_model):
    """A function that trains in a folder, from its checkpoint where it has one, up to a number of steps."""
    import torch

    from qwenmed import callbacks, run
    from qwenmed.settings import TrainSettings

    data = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in demo_rows[:4])
    (data / "rows.jsonl").write_text(text, encoding="utf-8")
    tokenizer, weights = checkpoints.load_tokenizer(demo_model), torch.float32

    def train(folder, max_steps):
        rows = str(data / "rows.jsonl")
        wanted = TrainSettings(train_file=rows, val_file=rows, max_steps=max_steps, eval_steps=2, resume=True)
        config = cpu_config(wanted, folder)
        model = checkpoints.load_base(demo_model, weights)
        trainer = training.build_trainer(
            model, tokenizer, training.load_rows(wanted, tokenizer, "系统", {}), config, {}
        )
        assert isinstance(trainer, callbacks.MedicalSFTTrainer)
        run.Run(wanted, folder, "full", demo_model).train(trainer)
        return trainer.state.global_step

    return train


@pytest.fixture(scope="module")
def trained_two_steps(resume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert resume(folder, 2) == 2
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resume_runs_no_code_of_a_pickled_state(trained_two_steps, resume, tmp_path, name):
    folder = shutil.copytree(trained_two_steps, tmp_path / "run")
    assert (folder / "checkpoint-2" / name).is_file()
    plant(folder / "checkpoint-2" / name, tmp_path / "marker")
    with pytest.raises(UserError, match="checkpoint-2.*--resume"):
        resume(folder, 4)
    assert not (tmp_path / "marker").exists()


def test_resume_never_opens_pickled_training_arguments(trained_two_steps, resume, tmp_path):
    folder = shutil.copytree(trained_two_steps, tmp_path / "run")
    plant(folder / "checkpoint-2" / "training_args.bin", tmp_path / "marker")
    assert resume(folder, 4) == 4
    assert not (tmp_path / "marker").exists()


def test_resume_refuses_weights_that_are_pickled(trained_two_steps, resume, tmp_path):
    folder = shutil.copytree(trained_two_steps, tmp_path / "run")
    (folder / "checkpoint-2" / "model.safetensors").unlink()
    plant(folder / "checkpoint-2" / "pytorch_model.bin", tmp_path / "marker")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*SECURITY\.md.*checkpoint-2"):
        resume(folder, 4)
    assert not (tmp_path / "marker").exists()


def test_pickled_model_is_refused_with_the_way_to_convert_it(demo_model, tmp_path):
    import torch

    model = shutil.copytree(demo_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", tmp_path / "marker")
    for look in (lambda: checkpoints.find(str(model)), lambda: checkpoints.load_base(model, torch.float32)):
        with pytest.raises(UserError, match=r"pytorch_model\.bin.*SECURITY\.md"):
            look()
    assert not (tmp_path / "marker").exists()


@pytest.fixture
def adapter(demo_model, tmp_path):
    """A LoRA adapter of the demo model."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    model = checkpoints.load_base(demo_model, torch.float32)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def test_pickled_adapter_is_refused_and_beside_safetensors_never_read(adapter, demo_model, tmp_path):
    import torch

    plant(adapter / "adapter_model.bin", tmp_path / "marker")
    checkpoints.load(checkpoints.find(str(adapter), base_model=demo_model), torch.float32)
    (adapter / checkpoints.ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*SECURITY\.md"):
        checkpoints.find(str(adapter), base_model=demo_model)
    assert not (tmp_path / "marker").exists()


EVIL_CODE = "open({marker!r}, 'w')\nclass Evil:\n    pass\n"


def test_code_in_a_model_folder_is_neither_run_nor_offered(demo_model, tmp_path, monkeypatch):
    import torch

    model = shutil.copytree(demo_model, tmp_path / "model")
    (model / "evil.py").write_text(EVIL_CODE.format(marker=str(tmp_path / "marker")), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked {prompt}"))
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name, changes in {
        "config.json": {
            "auto_map": dict.fromkeys(classes, "evil.Evil"),
            "model_type": "evil",
            "architectures": ["Evil"],
        },
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
        "generation_config.json": {"custom_generate": "evil"},
    }.items():
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(content | changes), encoding="utf-8")
    for load in (lambda: checkpoints.load_base(model, torch.float32), lambda: checkpoints.load_tokenizer(model)):
        with pytest.raises(UserError, match="model"):
            load()
    assert not (tmp_path / "marker").exists()


def test_template_of_a_model_reaches_no_python_object(demo_model, tmp_path):
    from qwenmed import chat

    model = shutil.copytree(demo_model, tmp_path / "model")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('x') }}"
    (model / "chat_template.jinja").write_text(escape, encoding="utf-8")
    tokenizer = checkpoints.load_tokenizer(model)
    with pytest.raises(UserError, match="对话模板"):
        chat.check_template(tokenizer)
    with pytest.raises(UserError, match="对话模板"):
        chat.render_prompt(tokenizer, chat.user_messages("问", None))


def test_links_in_a_broken_off_download_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.json").write_text("mine", encoding="utf-8")
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "a.json.incomplete").symlink_to(outside / "a.json")
    (partial / "sub").symlink_to(outside, target_is_directory=True)
    (partial / "loop").symlink_to(partial)
    with hub._partial_folder(tmp_path / "model", lambda message: None) as folder:
        assert folder == partial and list(folder.iterdir()) == []
    assert [path.name for path in outside.iterdir()] == ["a.json"]
    assert (outside / "a.json").read_text(encoding="utf-8") == "mine"


def test_link_in_the_place_of_the_download_folder_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / ".model.partial").symlink_to(tmp_path / "outside", target_is_directory=True)
    with (
        pytest.raises(UserError, match=r"\.model\.partial"),
        hub._partial_folder(tmp_path / "model", lambda message: None),
    ):
        pytest.fail("went on")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"added_tokens": 0}),
        ("tokenizer.json", {"normalizer": "x"}),
        ("tokenizer_config.json", {"chat_template": None}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"rope_parameters": []}),
    ],
)
def test_model_file_of_the_wrong_shape_is_a_user_error(demo_model, tmp_path, name, change):
    import torch

    model = shutil.copytree(demo_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    content = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps(content | change), encoding="utf-8")
    load = (
        checkpoints.load_tokenizer if "tokenizer" in name else lambda path: checkpoints.load_base(path, torch.float32)
    )
    with pytest.raises(UserError, match="model"):
        load(model)


@pytest.mark.parametrize("change", [{"r": "x"}, {"rank_pattern": None}, {"peft_type": {}}, {"target_modules": True}])
def test_adapter_config_of_the_wrong_shape_is_a_user_error(adapter, demo_model, change):
    import torch

    path = adapter / checkpoints.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match="--base-model"):
        checkpoints.load(checkpoints.find(str(adapter), base_model=demo_model), torch.float32)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["..", "/", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def objects(**known):
    return (
        st.fixed_dictionaries({}, optional={name: json_values | values for name, values in known.items()}) | json_values
    )


FILES = {
    "config.json": objects(notice=st.text(max_size=3)),
    "checkpoint.json": objects(settings=objects(best_by=st.just("last"))),
    "trainer_state.json": objects(log_history=st.lists(objects(eval_loss=st.floats(), step=st.just(1)), max_size=3)),
    "adapter_config.json": objects(base_model_name_or_path=st.text(max_size=3)),
    "tokenizer_config.json": objects(),
    "model.safetensors.index.json": objects(weight_map=st.dictionaries(st.text(max_size=3), json_values, max_size=2)),
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.fixed_dictionaries({}, optional=FILES), nested=st.booleans())
def test_no_json_in_a_checkpoint_gives_anything_but_a_checkpoint_or_a_user_error(
    tmp_path, demo_model, contents, nested
):
    folder = tmp_path / "output" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoint-1" if nested else folder
    checkpoint.mkdir(parents=True)
    for name in ("tokenizer.json", "model.safetensors", "config.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, checkpoint)
    if "adapter_config.json" in contents:
        shutil.copy(demo_model / "model.safetensors", checkpoint / checkpoints.ADAPTER_WEIGHTS)
    for name, value in contents.items():
        (checkpoint / name).write_text(json.dumps(value), encoding="utf-8")
    for spec in ("best", "latest", str(folder)):
        for base in (None, demo_model):
            try:
                found = checkpoints.find(spec, tmp_path / "output", base)
                assert isinstance(found.notice, str) and isinstance(found.card, dict)
            except UserError as error:
                assert "\n" not in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), length=st.integers(0, 2**64 - 1) | st.integers(0, 60))
def test_no_bytes_pass_for_whole_weights_unless_their_header_says_so(tmp_path, content, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + content)
    if hub._is_whole(file):
        json.loads(content[:length])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values)
def test_run_file_of_anything_is_an_empty_history_or_an_object(tmp_path, value):
    (tmp_path / "run.json").write_text(json.dumps(value), encoding="utf-8")
    assert isinstance(tracking.RunFile(tmp_path).previous(), dict)
