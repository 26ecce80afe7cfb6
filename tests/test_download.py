"""Downloading: the hubs' real clients against a loopback server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Finished, assert_user_error, run_script
from hub_server import HubServer

from qwenmed import hub as hub_module
from qwenmed.hub import missing_model_files

SOURCES = ("modelscope", "huggingface")

# Only `hub`, under the frame of a command line: without loading the model at the end it takes a second.
FETCH_MODEL = """
import sys
from pathlib import Path
from qwenmed import cli, hub
{before}
cli.run(lambda: print(hub.fetch_model("org/tiny", Path("models/tiny"), source=(sys.argv[1:] or [None])[0], say=cli.note)))
"""

FETCH_DATASET = """
import sys
from pathlib import Path
from qwenmed import cli, hub
cli.run(lambda: print(hub.fetch_dataset(sys.argv[2] or None, sys.argv[1], Path("downloads/data"), say=cli.note)))
"""


@pytest.fixture(scope="session")
def model_folder(demo_model, tmp_path_factory):
    """The demo model with weights above 10 MB, the piece in which Hugging Face's client writes to the disk."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(demo_model, tmp_path_factory.mktemp("hub") / "tiny")
    weights = load_file(folder / "model.safetensors")
    weights["unused"] = torch.arange(12_000_000, dtype=torch.int32).to(torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def server(model_folder):
    server = HubServer(model_folder)
    yield server
    server.close()


def closed_port() -> str:
    """The address of a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def environment(home, modelscope: str, huggingface: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MODELSCOPE_ENDPOINT": modelscope,
        "HF_ENDPOINT": huggingface,
        "HF_HUB_OFFLINE": "0",
        "HOME": str(home),
        # The client's own waiting between its retries is not ours to test.
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    }


def run_code(code: str, *arguments: str, cwd, env) -> Finished:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=env, capture_output=True, timeout=120, check=False
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def fetch(server, tmp_path):
    """Fetch the model in a process of its own, from the loopback server unless told otherwise."""

    def run(*arguments: str, modelscope: str | None = None, huggingface: str | None = None, before: str = ""):
        env = environment(tmp_path / "home", modelscope or server.url, huggingface or server.url)
        return run_code(FETCH_MODEL.format(before=before), *arguments, cwd=tmp_path / "work", env=env)

    (tmp_path / "work").mkdir()
    return run


@pytest.fixture
def work(fetch, tmp_path):
    """The folder in which `fetch` runs."""
    return tmp_path / "work"


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def traces(work) -> list[str]:
    """Everything that lies in the folder, hidden or not."""
    return sorted(str(path.relative_to(work)) for path in work.rglob("*"))


@pytest.mark.parametrize("source", SOURCES)
def test_download_ends_in_a_folder_that_loads_and_a_second_run_asks_nothing(server, work, fetch, source):
    env = environment(work.parent / "home", server.url, server.url)
    done = run_script("download_model.py", "org/tiny", "--source", source, cwd=work, env=env)
    assert done.status == 0, done.err
    assert done.out.strip() == str(Path("models", "tiny"))
    assert "python data.py" in done.err and "--model models/tiny" in done.err
    there = sorted([hub_module.SOURCE_FILE, *server.listed])
    assert traces(work) == ["models", "models/tiny", *(f"models/tiny/{name}" for name in there)]
    server.requests.clear()
    assert fetch().status == 0
    assert server.requests == []


def test_folder_of_another_model_or_revision_is_not_taken_for_the_one_that_is_asked_for(server, work, fetch):
    assert fetch().status == 0
    folder, said = work / "models" / "tiny", []
    server.requests.clear()
    assert hub_module.fetch_model("org/tiny", folder, say=said.append) == folder and not said
    for asked, revision in (("other/tiny", None), ("org/tiny", "dev")):
        with pytest.raises(hub_module.UserError, match=f"org/tiny.*不是 {asked}.*--local-dir"):
            hub_module.fetch_model(asked, folder, revision=revision)
    note = folder / hub_module.SOURCE_FILE
    note.write_text('{"id": "org/tiny", "revision": "dev"}', encoding="utf-8")
    hub_module.fetch_model("org/tiny", folder, revision="dev")
    with pytest.raises(hub_module.UserError, match="dev.*v2"):
        hub_module.fetch_model("org/tiny", folder, revision="v2")
    hub_module.fetch_model("org/tiny", folder, say=said.append)
    assert "dev" in said.pop()
    for broken in ("{", "[]", "{}"):
        note.write_text(broken, encoding="utf-8")
        hub_module.fetch_model("other/tiny", folder, revision="v2", say=said.append)
        assert "没有核对" in said[-1] and "other/tiny" in said[-1] and "v2" in said[-1]
    assert len(said) == 3 and server.requests == []


@pytest.mark.parametrize("source", SOURCES)
def test_broken_off_transfer_resumes_where_it_stopped(server, work, fetch, source):
    server.cut_after = 15_000_000
    failed = fetch(source)
    assert_user_error(failed, "org/tiny", "会接着下载", ".tiny.partial")
    assert names_in(work / "models") == [".tiny.partial"]
    part = (work / "models" / ".tiny.partial" / "model.safetensors.incomplete").stat().st_size
    assert part > 10_000_000
    server.cut_after = None
    server.requests.clear()
    done = fetch(source)
    assert done.status == 0 and "接着上次的下载" in done.err, done.err
    assert server.ranges() == [f"bytes={part}-"]
    assert names_in(work / "models") == ["tiny"] and missing_model_files(work / "models" / "tiny") == []


def test_part_from_one_source_is_completed_from_the_other(server, work, fetch):
    server.cut_after = 15_000_000
    assert fetch("modelscope").status == 2
    server.cut_after = None
    assert fetch("huggingface").status == 0
    assert server.ranges() == ["bytes=15000000-"]


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_checksum_is_fetched_twice_and_never_accepted(server, work, fetch, source):
    server.wrong_checksum = True
    done = fetch(source)
    assert_user_error(done, "org/tiny", "校验和", server.largest)
    assert sum(server.largest in path for path, _ in server.requests) == 2
    assert not (work / "models" / "tiny").exists()
    assert not list(work.rglob(server.largest))


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_id_is_one_line_naming_id_and_source(server, work, source):
    env = environment(work.parent / "home", server.url, server.url)
    done = run_script("download_model.py", "org/other", "--source", source, cwd=work, env=env)
    assert_user_error(done, "org/other", hub_module.SOURCES[source].title, "404", "--model")
    assert len(done.err.strip().splitlines()) == 1
    assert traces(work) == []


def test_without_a_route_one_line_names_both_sources_and_no_folder_appears(work):
    env = environment(work.parent / "home", closed_port(), closed_port())
    started = time.monotonic()
    done = run_script("download_model.py", cwd=work, env=env)
    assert time.monotonic() - started < 30
    assert_user_error(done, "Qwen/Qwen3-0.6B", "ModelScope 连接失败", "Hugging Face 连接失败", "--model")
    assert traces(work) == []


def test_hubs_that_never_answer_are_given_up_in_time(server, work, fetch):
    server.silent = True
    started = time.monotonic()
    done = fetch(before="hub.LISTING_SECONDS = 0.5")
    assert time.monotonic() - started < 8
    assert_user_error(done, "org/tiny", "ModelScope 连接失败", "Hugging Face 连接失败", "没有应答", "--model")
    assert traces(work) == []
    assert 2 * hub_module.LISTING_SECONDS + 8 <= 30  # what the same costs a user, imports included


def test_hugging_face_serves_when_modelscope_is_down(server, work, fetch):
    done = fetch(modelscope=closed_port())
    assert done.status == 0, done.err
    assert "ModelScope 连接失败" in done.err and "改用 Hugging Face" in done.err


@pytest.mark.parametrize("source", SOURCES)
def test_ctrl_c_leaves_a_part_that_the_next_run_completes(server, work, fetch, source):
    server.stall_after = 15_000_000
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH_MODEL.format(before=""), source],
        cwd=work,
        env=environment(work.parent / "home", server.url, server.url),
        stderr=subprocess.DEVNULL,
    )
    part = work / "models" / ".tiny.partial" / f"{server.largest}.incomplete"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None and time.monotonic() < until
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert names_in(work / "models") == [".tiny.partial"]
    server.stall_after = None
    assert fetch(source).status == 0
    assert server.ranges() and names_in(work / "models") == ["tiny"]


@pytest.mark.parametrize(
    "name", ["../evil.json", "a/../../evil.json", "/tmp/evil.json", "..\\evil.json", "C:evil.json"]
)
def test_name_outside_of_the_folder_is_refused(name):
    listing = hub_module.Listing("org/tiny", "model", None, None, (hub_module.RemoteFile(name, 2, None),))
    with pytest.raises(hub_module.UserError, match="越出目录"):
        hub_module._usable(listing)


def test_unsafe_list_is_refused_before_anything_is_written(server, work, fetch):
    server.listed.append("../evil.json")
    for source in SOURCES:
        assert_user_error(fetch(source), "org/tiny", "越出目录", "evil.json")
    assert traces(work) == []


@pytest.mark.parametrize("source", SOURCES)
def test_full_disk_is_told_as_such(server, work, fetch, source):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    assert_user_error(fetch(source, before=limit), "文件超过系统允许的大小", "models")
    assert not (work / "models" / "tiny").exists()


def test_repository_without_safetensors_is_refused_before_the_download(server, work, fetch):
    server.listed = ["config.json", "model.gguf", "pytorch_model.bin"]
    assert_user_error(fetch(), "org/tiny", "safetensors", "GGUF")
    assert traces(work) == []


def test_folder_that_is_no_model_is_left_alone(server, work, fetch):
    (work / "models" / "tiny").mkdir(parents=True)
    (work / "models" / "tiny" / "notes.txt").write_text("mine", encoding="utf-8")
    assert_user_error(fetch(), "models/tiny", "--local-dir")
    assert traces(work) == ["models", "models/tiny", "models/tiny/notes.txt"] and server.requests == []


def test_training_fetches_a_model_by_its_id(server, work, small_data):
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(small_data / name, work / name)
    done = run_script(
        "train.py", "--model", "org/tiny", "--max-steps", "1", "--sample-tokens", "0", "--swanlab", "disabled",
        cwd=work, env=environment(work.parent / "home", server.url, server.url),
    )  # fmt: skip
    assert done.status == 0, done.err
    assert (work / "models" / "tiny" / "config.json").exists()
    assert (work / "output" / "tiny-full" / "run.json").exists()


def test_weights_that_lack_a_tensor_do_not_pass_for_a_model(server, work, model_folder):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, work / "models" / "tiny")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    env = environment(work.parent / "home", server.url, server.url)
    done = run_script("download_model.py", "org/tiny", cwd=work, env=env)
    assert_user_error(done, "models/tiny", "model.norm.weight", "重新下载")


def test_way_on_from_the_demo_model_needs_no_network_either(tmp_path):
    done = run_script("download_model.py", "demo", cwd=tmp_path)
    assert done.status == 0 and "python data.py --source demo" in done.err


def test_demo_model_is_never_built_over_other_files(work):
    (work / "notes.txt").write_text("mine", encoding="utf-8")
    done = run_script("download_model.py", "demo", "--local-dir", ".", cwd=work)
    assert_user_error(done, "--local-dir")
    assert traces(work) == ["notes.txt"]


@pytest.mark.parametrize("source", SOURCES)
def test_data_set_comes_as_plain_files_and_only_once(tmp_path, source):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "r1_data_example.jsonl").write_text('{"question": "头痛怎么办？"}\n', encoding="utf-8")
    (repository / "README.md").write_text("# data", encoding="utf-8")
    (repository / "load.py").write_text("print('code')", encoding="utf-8")
    server = HubServer(repository, "krisfu/delicate_medical_r1_data")
    env = environment(tmp_path / "home", server.url, server.url)
    id_ = "" if source == "modelscope" else server.repo_id
    for _ in range(2):
        done = run_code(FETCH_DATASET, source, id_, cwd=tmp_path, env=env)
        assert done.status == 0, done.err
        assert names_in(tmp_path / "downloads" / "data") == ["README.md", "r1_data_example.jsonl"]
    server.close()
    asked = [path for path, _ in server.requests if "delicate_medical_r1_data" in path]
    assert len(asked) == 3  # a list and two files, once


def test_default_data_set_is_not_known_on_hugging_face(tmp_path):
    with pytest.raises(hub_module.UserError, match="--source modelscope"):
        hub_module.fetch_dataset(None, "huggingface", tmp_path / "data")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(demo_model, tmp_path, name):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / name).unlink()
    assert missing_model_files(folder) == [name]


def test_vocabulary_and_merges_stand_for_the_tokenizer_file(demo_model, tmp_path):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert missing_model_files(folder) == ["tokenizer.json"]
    (folder / "merges.txt").write_text("a b", encoding="utf-8")
    assert missing_model_files(folder) == []


@pytest.mark.parametrize("keep", [0, 4, 100, 1_000_000, -1])
def test_cut_off_weights_count_as_missing(demo_model, tmp_path, keep):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert missing_model_files(folder) == ["model.safetensors（不完整）"]


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b"nope"])
def test_weights_with_a_senseless_header_count_as_missing(demo_model, tmp_path, start):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(start + b"\0" * 100)
    assert missing_model_files(folder) == ["model.safetensors（不完整）"]


def test_each_shard_of_an_index_must_be_there(demo_model, tmp_path):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}', encoding="utf-8")
    assert missing_model_files(folder) == ["b.safetensors"]
    index.write_text('{"weight_map": {"x": "a.safeten', encoding="utf-8")
    assert missing_model_files(folder) == ["model.safetensors.index.json（损坏）"]


def test_pickled_weights_do_not_count_and_the_way_out_is_told(demo_model, tmp_path):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    [missing] = missing_model_files(folder)
    assert "pytorch_model.bin" in missing and "转换" in missing
