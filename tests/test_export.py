"""export.py and what it is made of, on the demo model: what is written, what is refused, and what the self-test finds."""

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_user_error, needs_gguf, needs_llama, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prompts import GENERAL_PROMPT
from qwenmed import chat, checkpoints, files, gguf_file, merged_model, model_card, read_back, self_test
from qwenmed.errors import UserError
from qwenmed.settings import GGUF_TYPES, K_QUANTS, ExportSettings


def logits_of(folder: Path) -> torch.Tensor:
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        return checkpoints.load_base(folder, torch.float32).eval()(ids).logits


# --- folders that appear whole ---------------------------------------------------------------------------------------


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), files.whole_folder(target, "导出") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "of a killed process").touch()
    with files.whole_folder(target, "导出") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").touch(mode=0o600)
        with pytest.raises(UserError, match="正在使用"), files.whole_folder(target, "导出"):
            pass
    assert sorted(path.name for path in target.rglob("*")) == ["a", "sub"]
    assert os.name == "nt" or (target / "sub" / "a").stat().st_mode & 0o444 == 0o444
    with files.whole_folder(target, "导出") as folder:
        (folder / "b").touch()
    assert [path.name for path in target.iterdir()] == ["b"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_space_is_told_with_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"磁盘空间不足：需要约 1000000\.00 GB"):
        files.check_space(tmp_path / "not" / "there", 10**15, "请清理磁盘")
    files.check_space(tmp_path / "not" / "there", 1000, "")


# --- merged ----------------------------------------------------------------------------------------------------------


def test_merged_folder_keeps_ties_and_says_the_same(best, merged):
    with safe_open(merged / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    model = checkpoints.load_base(merged, torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits_of(merged), logits_of(best.path))
    assert not (merged / "optimizer.pt").exists() and (merged / "chat_template.jinja").is_file()


def test_merged_folder_has_both_stops_and_what_older_programs_look_for(best, merged, tmp_path):
    config, generation, tokenizer = (
        json.loads((merged / name).read_text(encoding="utf-8"))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    ids = checkpoints.load_tokenizer(merged).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == ids and generation["use_cache"] and config["use_cache"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000
    assert not {"is_local", "local_files_only"} & set(tokenizer)
    one_stop = shutil.copytree(best.path, tmp_path / "one-stop")
    files.write_json(one_stop / "generation_config.json", {"eos_token_id": ids[1], "do_sample": False})
    (folder := tmp_path / "again").mkdir()
    merged_model.write_merged(checkpoints.describe(one_stop), folder, "fp32")
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == ids


def test_training_leaves_checkpoints_that_older_programs_read(best):
    config = json.loads((best.path / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == 1_000_000 and config["use_cache"]
    assert len(checkpoints.load_base(best.path, torch.float32).config.rope_parameters) == 2


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_merged_dtype_is_the_chosen_one_and_found_again(best, tmp_path, dtype, stored):
    merged_model.write_merged(best, tmp_path, dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {stored}
    assert merged_model.stored_dtype(tmp_path) == dtype and merged_model.stored_dtype(best.path) == "fp32"
    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(size - merged_model.size(best, dtype)) < 10_000


def test_adapter_is_merged(adapter, best, tmp_path):
    from peft import PeftModel

    merged_model.write_merged(checkpoints.describe(adapter), tmp_path, "fp32")
    with torch.inference_mode():
        adapted = PeftModel.from_pretrained(checkpoints.load_base(best.path, torch.float32), adapter).eval()
        wanted = adapted(torch.arange(20)[None]).logits
    assert (logits_of(tmp_path) - wanted).abs().max() < 1e-4
    assert (logits_of(best.path) - wanted).abs().max() > 0.1


def test_an_adapters_base_is_known_by_its_shapes_and_its_hash(adapter, best, demo_model, tmp_path):
    assert merged_model.check_base(checkpoints.describe(adapter)) == ""
    assert merged_model.check_base(best) == ""
    with pytest.raises(UserError, match="哈希不一致"):
        merged_model.check_base(checkpoints.describe(adapter, base_model=demo_model))
    unknown = shutil.copytree(adapter, tmp_path / "unknown")
    (unknown / "checkpoint.json").unlink()
    assert "没有记录" in merged_model.check_base(checkpoints.describe(unknown, base_model=demo_model))
    other = shutil.copytree(demo_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:, :128].clone()}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj 应为 256 维，而它是 128 维"):
        merged_model.check_base(checkpoints.describe(adapter, base_model=other))
    save_file({key: value for key, value in weights.items() if key != name}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"它没有 model\.layers\.0\.mlp\.up_proj"):
        merged_model.check_base(checkpoints.describe(adapter, base_model=other))


# --- GGUF ------------------------------------------------------------------------------------------------------------


@needs_gguf
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_gguf_holds_what_the_package_quantises(demo_model, tmp_path, monkeypatch, kind, stored):
    """Rows written a few at a time, and numbers read from their bytes, give what whole tensors give."""
    import gguf
    import numpy

    folder = shutil.copytree(demo_model, tmp_path / "model")
    weights = {name: each.to(stored) for name, each in load_file(demo_model / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    monkeypatch.setattr(gguf_file, "ROWS_AT_ONCE", 100)
    path = gguf_file.write_gguf(folder, tmp_path / "a.gguf", kind)
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    assert len(tensors) == len(weights)
    for name, weight in weights.items():
        found = tensors[names.get_name(name, try_suffixes=(".weight",))]
        type_ = gguf.GGMLQuantizationType[kind.upper()] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        wanted = gguf.quantize(weight.float().numpy(), type_)
        assert found.tensor_type == type_
        assert numpy.array_equal(numpy.asarray(found.data).view(numpy.uint8).ravel(), wanted.view(numpy.uint8).ravel())
    assert path.stat().st_size <= gguf_file.size(folder, kind) < 1.3 * path.stat().st_size


@needs_gguf
def test_gguf_says_how_to_sample_where_to_stop_and_what_to_show(best, tmp_path):
    import gguf

    reader = gguf.GGUFReader(gguf_file.write_gguf(best.path, tmp_path / "a.gguf", "f16", "名称"))

    def field(name):
        found = reader.get_field(name)
        return found.contents() if found else None

    tokenizer = checkpoints.load_tokenizer(best.path)
    assert field("general.name") == "名称" and field("general.file_type") == gguf.LlamaFileType.MOSTLY_F16
    assert field(gguf_file.NOTICE_KEY) == best.notice != ""
    assert field("general.sampling.temp") == 0.0  # the demo model answers greedily
    assert field("tokenizer.ggml.eos_token_id") == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert field("tokenizer.ggml.pre") == "qwen2" and field("tokenizer.chat_template") == tokenizer.chat_template
    sampled = shutil.copytree(best.path, tmp_path / "sampled")
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    files.write_json(sampled / "generation_config.json", own)
    reader = gguf.GGUFReader(gguf_file.write_gguf(sampled, tmp_path / "b.gguf", "f16"))
    found = {name: field(f"general.sampling.{name}") for name in ("temp", "top_p", "top_k", "min_p")}
    assert found == pytest.approx({"temp": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0})


@needs_gguf
def test_tied_head_stands_in_a_gguf_once(demo_model, tmp_path):
    import gguf

    folder = shutil.copytree(demo_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    names = [each.name for each in gguf.GGUFReader(gguf_file.write_gguf(folder, tmp_path / "a.gguf", "f16")).tensors]
    assert "output.weight" not in names and names.count("token_embd.weight") == 1


@needs_gguf
def test_rows_that_do_not_divide_into_blocks_and_strange_types_are_refused(demo_model, tmp_path):
    folder = shutil.copytree(demo_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:, :100].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="不是 32 的倍数"):
        gguf_file.write_gguf(folder, tmp_path / "a.gguf", "q8_0")
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="I8"):
        gguf_file.size(folder, "f16")
    assert not list(tmp_path.glob("*.gguf*"))


@needs_llama
def test_k_quants_are_llama_cpps_own(best, tmp_path, capfd):
    import gguf

    path = gguf_file.write_gguf(best.path, tmp_path / "a.gguf", "q4_k_m")
    kinds = {each.tensor_type.name for each in gguf.GGUFReader(path).tensors}
    assert "Q4_K" in kinds and [each.name for each in tmp_path.iterdir()] == ["a.gguf"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("missing", "kind", "words"),
    [
        ("gguf", "q8_0", f"没有安装 gguf。请运行 pip install {gguf_file.PACKAGE}$"),
        ("gguf", "q4_k_m", r"没有安装 gguf。请运行 pip install -e '\.\[gguf\]'（.*C\+\+"),
        ("llama_cpp", "q4_k_m", r"量化器.*pip install -e '\.\[gguf\]'（.*C\+\+.*十分钟.*--quant q8_0"),
    ],
)
def test_missing_package_is_told_with_the_smallest_remedy(monkeypatch, missing, kind, words):
    monkeypatch.setitem(sys.modules, "gguf", gguf_file)  # anything that can be imported
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=words):
        gguf_file.check_installed(kind)


def test_gguf_package_is_the_one_of_the_project_and_of_the_docs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert gguf_file.PACKAGE in project["optional-dependencies"]["gguf"]
    assert f"pip install {gguf_file.PACKAGE}`" in (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")


def test_engine_is_chosen_by_what_the_path_is(tmp_path):
    from qwenmed.engines import EngineSettings

    assert EngineSettings(checkpoint="a.gguf").engine == "llama.cpp"
    assert EngineSettings(checkpoint="best").engine == "transformers"
    assert EngineSettings(checkpoint=str(tmp_path)).engine == "transformers"
    (tmp_path / "a.gguf").touch()
    assert EngineSettings(checkpoint=str(tmp_path)).engine == "llama.cpp"
    assert EngineSettings(checkpoint=str(tmp_path), engine="transformers").engine == "transformers"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match="2 个 GGUF"):
        EngineSettings(checkpoint=str(tmp_path))
    (tmp_path / "config.json").touch()
    assert EngineSettings(checkpoint=str(tmp_path)).engine == "transformers"


# --- the self-test ---------------------------------------------------------------------------------------------------


def reference_of(tmp_path, logprobs, replies, texts, **rest):
    """A checkpoint's side over an invented vocabulary."""
    stored = [read_back.save_logprobs(tmp_path, number, each) for number, each in enumerate(logprobs)]
    count = len(replies)
    fields = {
        "conversations": [[]] * count,
        "prompts": [[1, 2]] * count,
        "replies": replies,
        "texts": texts,
        "parts": [("", text) for text in texts],
        "ended": [True] * count,
        "logprobs": stored,
        "beginnings": [[text[:i] for i in range(len(text))] for text in texts],
    }
    return self_test.Reference(**{**fields, **rest})


def result_of(tmp_path, logprobs, texts, stops=chat.STOP_TOKENS, **rest):
    reads = []
    for number, (each, text) in enumerate(zip(logprobs, texts, strict=True)):
        (tmp_path / "there").mkdir(exist_ok=True)
        stored = read_back.save_logprobs(tmp_path / "there", number, each)
        fields = {"prompt": [1, 2], "text": text, "thinking": "", "answer": text, "ended": True, "logprobs": stored}
        reads.append(read_back.Read(**{**fields, **rest}))
    return read_back.Result(list(stops), reads)


def log(rows):
    return torch.tensor(rows).log()


HERE = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]


def test_equal_sides_pass_and_kl_is_the_textbooks(tmp_path):
    there = [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]
    reference = reference_of(tmp_path, [log(HERE)], [[0, 1]], ["ab"])
    found = self_test.compare(reference, result_of(tmp_path, [log(HERE)], ["ab"]), "x", self_test.BOUNDS["exact"])
    assert not found.failed and found.mean_kl == 0 and (found.same_tokens, found.tokens) == (2, 2)
    found = self_test.compare(reference, result_of(tmp_path, [log(there)], ["ab"]), "x", self_test.BOUNDS["exact"])
    kl = 0.7 * math.log(0.7 / 0.6) + 0.2 * math.log(0.2 / 0.3)
    assert found.mean_kl == pytest.approx(kl / 2, rel=1e-4) and found.largest_kl == pytest.approx(kl, rel=1e-4)
    assert found.largest_difference == pytest.approx(math.log(0.7 / 0.6), rel=1e-4)
    assert [each for each in found.failed if "KL" in each] == found.failed != []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stops": ["<|im_end|>"]}, "停止符"),
        ({"prompt": [1, 3]}, "提示"),
        ({"text": "ax"}, "贪心文字"),
        ({"ended": False}, "结束也相同"),
        ({"thinking": "a", "answer": "b"}, "拆分"),
    ],
)
def test_each_difference_fails_by_itself(tmp_path, change, word):
    reference = reference_of(tmp_path, [log(HERE)], [[0, 1]], ["ab"])
    found = self_test.compare(
        reference, result_of(tmp_path, [log(HERE)], ["ab"], **change), "x", self_test.BOUNDS["f16"]
    )
    assert len(found.failed) == 1 and word in found.failed[0], found.failed
    assert "✗" in self_test.as_text(found)


def test_texts_may_part_where_the_checkpoint_is_undecided_and_nowhere_else(tmp_path):
    undecided = [[0.7, 0.2, 0.1], [0.452, 0.448, 0.1]]
    other = [[0.7, 0.2, 0.1], [0.448, 0.452, 0.1]]
    reference = reference_of(tmp_path, [log(undecided)], [[0, 0]], ["ab"])
    found = self_test.compare(reference, result_of(tmp_path, [log(other)], ["ac"]), "x", self_test.BOUNDS["f16"])
    assert not found.failed and (found.tied_texts, found.tied_tokens, found.same_tokens) == (1, 1, 1)
    found = self_test.compare(reference, result_of(tmp_path, [log(other)], ["xb"]), "x", self_test.BOUNDS["f16"])
    assert [each for each in found.failed if "贪心文字" in each]
    decided = [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]
    reference = reference_of(tmp_path, [log(decided)], [[0, 0]], ["ab"])
    found = self_test.compare(reference, result_of(tmp_path, [log(other)], ["ac"]), "x", self_test.BOUNDS["q8_0"])
    assert [each for each in found.failed if "贪心 token" in each] and found.tied_tokens == 0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\n想\n</think>\n\n答", ("想", "答")),
        ("想</think>答", ("想", "答")),
        ("<think>没有想完", ("没有想完", "")),
        ("只有回答", ("", "只有回答")),
        ("<think>\n\n</think>\n\n答</think>尾", ("", "答</think>尾")),
    ],
)
def test_readers_split_as_servers_do(text, parts):
    assert read_back.split(text) == parts


def test_artefact_that_can_not_be_read_is_one_line(best, trained, tmp_path):
    (broken := tmp_path / "broken").mkdir()
    asked = chat.user_messages(trained.rows[0]["question"], GENERAL_PROMPT)
    with pytest.raises(UserError, match="读不出"):
        self_test.run(
            best, broken, read_back.TRANSFORMERS, self_test.BOUNDS["exact"], [asked], 4, torch.device("cpu"), tmp_path
        )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
@pytest.mark.parametrize(
    ("name", "words"), [("SIGILL", "为另一种 CPU 编译.*SIGILL.*--no-cache-dir"), ("SIGKILL", "信号 SIGKILL 终止")]
)
def test_reader_that_was_killed_says_by_what(best, trained, tmp_path, monkeypatch, name, words):
    killed = tmp_path / "qwenmed"
    killed.mkdir()
    (killed / "__init__.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n", encoding="utf-8")
    monkeypatch.setattr(self_test, "__file__", str(killed / "self_test.py"))
    monkeypatch.chdir(tmp_path)
    asked = chat.user_messages(trained.rows[0]["question"], GENERAL_PROMPT)
    with pytest.raises(UserError, match=f"读不出.*{words}"):
        self_test.run(
            best, tmp_path, read_back.TRANSFORMERS, self_test.BOUNDS["exact"], [asked], 4, torch.device("cpu"), tmp_path
        )


def test_checkpoint_has_left_the_gpu_when_the_fresh_process_begins(best, trained, tmp_path, monkeypatch):
    model, tokenizer = checkpoints.load(best, torch.float32)
    gone, freed = weakref.ref(model), []
    # It stays on the CPU; and it holds itself, so that counting references does not free it.
    vars(model).update(to=lambda device: gone(), itself=model)
    loaded = [(model, tokenizer)]
    monkeypatch.setattr(checkpoints, "load", lambda checkpoint, dtype: loaded.pop())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(gone() is None))
    del model
    asked = chat.user_messages(trained.rows[0]["question"], GENERAL_PROMPT)
    self_test.ask_checkpoint(best, [asked], 2, torch.device("cuda"), tmp_path)
    assert freed == [True]


READER = """
import json, pathlib, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
if job["device"] in {full!r}:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 594.00 MiB.")
read = dict(prompt=[1], text=job["device"], thinking="", answer="", ended=True, logprobs="")
(pathlib.Path(job["folder"]) / "result.json").write_text(json.dumps(dict(stops=[], reads=[read])), encoding="utf-8")
"""


def reader_without_memory(tmp_path, monkeypatch, *full):
    """What the self-test reads from a fresh process for which these devices have no memory."""
    (package := tmp_path / "qwenmed").mkdir()
    (package / "__init__.py").touch()
    (package / "read_back.py").write_text(READER.format(full=full), encoding="utf-8")
    monkeypatch.setattr(self_test, "__file__", str(package / "self_test.py"))
    monkeypatch.chdir(tmp_path)
    reference = reference_of(tmp_path, [log(HERE)], [[0, 1]], ["ab"])
    return self_test.read_in_fresh_process(
        tmp_path, read_back.TRANSFORMERS, reference, 4, torch.device("cuda"), tmp_path
    )


def test_reader_without_memory_on_the_gpu_reads_on_the_cpu(tmp_path, monkeypatch, capsys):
    assert [each.text for each in reader_without_memory(tmp_path, monkeypatch, "cuda").reads] == ["cpu"]
    assert "CPU" in capsys.readouterr().err


def test_reader_without_any_memory_does_not_blame_the_export(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="自检没有做完：内存不够.*--no-self-test"):
        reader_without_memory(tmp_path, monkeypatch, "cuda", "cpu")


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--to", "merged|gguf|ollama|vllm"]),
        (["--to", "gguf", "--quant", "q9"], ["--quant", "q9", "q8_0", "q4_k_m"]),
        (["--to", "ollama", "-s", "dentist"], ["dentist", "diagnosis"]),
        (["--to", "merged", "--self-test-tokens", "0"], ["--self-test-tokens"]),
        (["--to", "merged", "-c", "nowhere"], ["nowhere"]),
        (["--to", "merged", "-c", "a.gguf"], ["a.gguf", "已经是 GGUF"]),
        (["--to", "tarball"], ["tarball"]),
    ],
)
def test_wrong_options_are_one_line_and_status_2(tmp_path, arguments, words):
    done = run_script("export.py", *arguments, cwd=tmp_path)
    assert_user_error(done, *words)
    assert not list(tmp_path.iterdir())


def test_adapter_without_its_base_or_with_another_is_refused(adapter, demo_model, tmp_path):
    lost = shutil.copytree(adapter, tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text(encoding="utf-8"))
    files.write_json(lost / "adapter_config.json", {**config, "base_model_name_or_path": "gone/base"})
    done = run_script("export.py", "-c", lost, "--to", "merged", cwd=tmp_path)
    assert_user_error(done, "gone/base", "--base-model")
    done = run_script("export.py", "-c", lost, "--base-model", demo_model, "--to", "merged", cwd=tmp_path)
    assert_user_error(done, "哈希不一致", "--base-model")
    assert [path.name for path in tmp_path.iterdir()] == ["lost"]


def test_failed_self_test_leaves_nothing(trained, tmp_path, monkeypatch):
    import export

    monkeypatch.setattr(sys, "argv", ["export.py", "-c", str(trained.run), "--to", "merged", "--self-test-tokens", "8"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merged_model, "mend_config", break_config)
    with pytest.raises(UserError, match="自检没有通过.*没有留下结果"):
        export.main()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def break_config(path: Path) -> None:
    """The rope base that transformers 4 falls back to."""
    config = json.loads(path.read_text(encoding="utf-8"))
    files.write_json(path, {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}})


def test_disk_too_small_is_told_before_anything_is_written(trained, tmp_path, monkeypatch):
    import export

    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=60_000_000))
    monkeypatch.setattr(sys, "argv", ["export.py", "-c", str(trained.run), "--to", "merged"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"磁盘空间不足.*-o"):
        export.main()
    assert not list(tmp_path.iterdir())


# --- Ollama's template -----------------------------------------------------------------------------------------------

GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var given struct {
		Template string
		Cases    []map[string]any
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	for _, values := range given.Cases {
		if err := parsed.Execute(os.Stdout, values); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""

TURNS = [
    {"role": "user", "content": "头痛"},
    {"role": "assistant", "content": "多休息。"},
    {"role": "user", "content": "还要多久？"},
]


@pytest.mark.skipif(not shutil.which("go"), reason="Go, whose template engine Ollama uses, is not here")
def test_ollamas_template_gives_the_tokens_of_training(tokenizer, tmp_path):
    """Go's own engine renders the Modelfile's template as the chat template renders the same conversation."""
    asked = [
        (system, turns, think)
        for system in (None, "你是医生。")
        for turns in (TURNS[:1], TURNS)
        for think in (None, True, False)
    ]
    cases = [
        {
            "System": system or "",
            "Messages": [
                *([{"Role": "system", "Content": system}] if system else []),
                *({"Role": turn["role"], "Content": turn["content"], "Thinking": ""} for turn in turns),
            ],
            "IsThinkSet": think is not None,
            "Think": bool(think),
        }
        for system, turns, think in asked
    ]
    (tmp_path / "render.go").write_text(GO, encoding="utf-8")
    template = (model_card.PAGES / "qwen3.gotmpl").read_text(encoding="utf-8").rstrip("\n")
    done = subprocess.run(
        ["go", "run", "render.go"], cwd=tmp_path, capture_output=True, check=True,
        input=json.dumps({"Template": template, "Cases": cases}).encode(),
        env={**os.environ, "HOME": str(tmp_path), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"},
    )  # fmt: skip
    rendered = done.stdout.decode().split("\0")[:-1]
    for (system, turns, think), text in zip(asked, rendered, strict=True):
        messages = [*([{"role": "system", "content": system}] if system else []), *turns]
        wanted = tokenizer.decode(chat.render_prompt(tokenizer, messages))
        assert text == wanted + ("<think>\n\n</think>\n\n" if think is False else ""), (system, turns, think)


def test_modelfile_samples_as_the_model_recommends(tmp_path):
    files.write_json(tmp_path / "generation_config.json", {"do_sample": True, "temperature": 0.7, "top_p": 0.8})
    text = model_card.modelfile("A b", "a.gguf", tmp_path, "症状诊断", "提示")
    assert "PARAMETER temperature 0.7" in text and "PARAMETER top_p 0.8" in text and "create a-b " in text
    files.write_json(tmp_path / "generation_config.json", {"do_sample": False})
    assert "PARAMETER temperature 0\n" in model_card.modelfile("A", "a.gguf", tmp_path, "症状诊断", "提示")


@pytest.mark.parametrize("name", ["Qwen3-0.6B-lora", "我的模型", "..", "A/B c"])
def test_ollama_names_are_allowed_ones(name):
    import re

    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", model_card.ollama_name(name))


def test_card_of_a_model_from_elsewhere_says_that_nothing_is_known(best, tmp_path):
    page = model_card.card("x", best, {}, tmp_path / "none.json", GENERAL_PROMPT, "merged，fp32", "…", None)
    assert "没有记录" in page and "没有测过" in page and "没有做" in page
    hub = {"method": "lora", "steps": 5, "settings": {"model": "Qwen/Qwen3-0.6B"}, "data": {}}
    page = model_card.card("x", best, hub, tmp_path / "none.json", GENERAL_PROMPT, "merged，fp32", "…", None)
    assert "base_model: Qwen/Qwen3-0.6B" in page and "license: apache-2.0" in page


def test_card_prefers_the_reports_figures(best, tmp_path):
    label = checkpoints.short_name(best.path)
    estimate = {"value": 12.345, "low": 10.0, "high": 15.0, "rows": 240}
    measure = {"key": "perplexity_answer", "estimates": {label: estimate, "other": {}}}
    files.write_json(tmp_path / "report.json", {"measures": [measure], "rows": {"file": "val.jsonl"}})
    ended = {"perplexity_answer": {"value": 99.0, "low": None, "high": None, "rows": 3}}
    run = {"evaluation": ended, "best_checkpoint": str(best.path)}
    page = model_card.card("x", best, run, tmp_path / "report.json", GENERAL_PROMPT, "…", "…", None)
    assert "| 困惑度 · 参考回答 | 12.35 [10.00, 15.00] | 240 | eval.py，val.jsonl |" in page and "99" not in page
    page = model_card.card("x", best, run, tmp_path / "none.json", GENERAL_PROMPT, "…", "…", None)
    assert "| 困惑度 · 参考回答 | 99.00 | 3 |" in page


def test_settings_know_their_types():
    assert ExportSettings(to="gguf", quant="Q8_0").quant == "q8_0"


def test_every_type_of_a_gguf_has_its_bound():
    assert {*GGUF_TYPES, *K_QUANTS} <= set(self_test.BOUNDS)
