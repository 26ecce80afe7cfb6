"""Downloading, against a loopback server and with the hubs' real clients."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_user_error, run_script
from hub_server import HubServer

from qwenmed.hub import missing_model_files

SOURCES = ["modelscope", "huggingface"]


@pytest.fixture
def hub(demo_model):
    server = HubServer("org/tiny", demo_model)
    yield server
    server.close()


def closed_port() -> str:
    """The address of a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def environment(cwd, modelscope: str, huggingface: str) -> dict[str, str]:
    return {
        "MODELSCOPE_ENDPOINT": modelscope,
        "HF_ENDPOINT": huggingface,
        "HF_HUB_OFFLINE": "0",
        "HOME": str(cwd / "home"),
        # The clients wait between their retries; the waiting is theirs, the outcome is ours.
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
        "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "1",
        "MODELSCOPE_API_MAX_RETRIES": "1",
    }


def download(cwd, hub, *arguments, **options):
    env = environment(cwd, hub.url, hub.url)
    return run_script("download_model.py", "org/tiny", *arguments, cwd=cwd, env=env, **options)


@pytest.mark.parametrize("source", SOURCES)
def test_download_ends_in_a_checked_folder_and_a_second_run_costs_no_network(hub, tmp_path, source):
    done = download(tmp_path, hub, "--source", source)
    assert done.status == 0, done.err
    assert done.out.strip() == "models/tiny" and "都能载入" in done.err
    assert missing_model_files(tmp_path / "models" / "tiny") == []
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]
    assert not list((tmp_path / "models" / "tiny").glob(".*"))
    hub.requests.clear()
    again = download(tmp_path, hub)
    assert again.status == 0 and hub.requests == []


def test_broken_off_transfer_resumes_where_it_stopped_in_the_next_run(hub, tmp_path):
    hub.cuts = [3_000_000] * 100
    failed = download(tmp_path, hub, "--source", "modelscope")
    assert_user_error(failed, "org/tiny", "断点续传")
    assert not (tmp_path / "models" / "tiny").exists()
    hub.cuts.clear()
    hub.requests.clear()
    done = download(tmp_path, hub, "--source", "modelscope")
    assert done.status == 0, done.err
    assert any(start >= 1_000_000 for start in hub.starts_asked())
    assert missing_model_files(tmp_path / "models" / "tiny") == []


def test_hugging_face_transfer_resumes_within_the_run_and_keeps_whole_files_for_the_next(hub, tmp_path):
    # Its client gives every process a part file of its own, so a later run fetches only the broken file anew.
    hub.cuts = [10_490_000]
    done = download(tmp_path, hub, "--source", "huggingface")
    assert done.status == 0, done.err
    assert any(start >= 10_000_000 for start in hub.starts_asked())
    assert missing_model_files(tmp_path / "models" / "tiny") == []

    shutil.rmtree(tmp_path / "models")
    hub.cuts = [1_000_000] * 100
    assert_user_error(download(tmp_path, hub, "--source", "huggingface"), "org/tiny")
    assert not (tmp_path / "models" / "tiny").exists()
    hub.cuts.clear()
    hub.requests.clear()
    assert download(tmp_path, hub, "--source", "huggingface").status == 0
    fetched = {path.rsplit("/", 1)[-1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"model.safetensors"}


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_checksum_is_never_accepted(hub, tmp_path, source):
    hub.wrong_checksum = True
    assert_user_error(download(tmp_path, hub, "--source", source), "org/tiny", "校验和")
    assert not (tmp_path / "models" / "tiny").exists()


def test_unknown_id_names_both_sources(hub, tmp_path):
    env = environment(tmp_path, hub.url, hub.url)
    done = run_script("download_model.py", "org/other", cwd=tmp_path, env=env)
    assert_user_error(done, "org/other", "ModelScope", "Hugging Face", "404", "--model")
    assert not (tmp_path / "models").exists()


def test_without_a_route_one_clear_line_within_half_a_minute_and_no_folder(tmp_path):
    env = environment(tmp_path, closed_port(), closed_port())
    started = time.monotonic()
    done = run_script("download_model.py", cwd=tmp_path, env=env)
    assert time.monotonic() - started < 30
    assert_user_error(done, "Qwen/Qwen3-0.6B", "ModelScope", "Hugging Face", "--model")
    assert not (tmp_path / "models").exists()


def test_hugging_face_serves_when_modelscope_does_not(hub, tmp_path):
    env = environment(tmp_path, closed_port(), hub.url)
    done = run_script("download_model.py", "org/tiny", cwd=tmp_path, env=env)
    assert done.status == 0, done.err
    assert "ModelScope 不成功" in done.err and (tmp_path / "models" / "tiny").is_dir()


def test_killed_download_leaves_nothing_under_the_final_name(hub, tmp_path, demo_model):
    hub.stall = True
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "download_model.py"), "org/tiny", "--source", "huggingface"],
        cwd=tmp_path,
        env={**os.environ, **environment(tmp_path, hub.url, hub.url)},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not any("model.safetensors" in path and method == "GET" for method, path, _ in list(hub.requests)):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "models" / "tiny").exists()


def test_training_fetches_a_model_by_its_id(hub, trained, tmp_path):
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(trained.folder / name, tmp_path / name)
    done = run_script(
        "train.py", "--model", "org/tiny", "--max-steps", "1", "--sample-tokens", "0", "--swanlab", "disabled",
        cwd=tmp_path, env=environment(tmp_path, hub.url, hub.url),
    )  # fmt: skip
    assert done.status == 0, done.err
    assert (tmp_path / "models" / "tiny" / "config.json").exists()
    assert (tmp_path / "output" / "tiny-full" / "run.json").exists()


def test_existing_folder_that_is_no_model_is_left_alone(hub, tmp_path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "notes.txt").write_text("mine", encoding="utf-8")
    assert_user_error(download(tmp_path, hub), "models/tiny", "--local-dir")
    assert (tmp_path / "models" / "tiny" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(demo_model, tmp_path, name):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / name).unlink()
    assert missing_model_files(folder) == [name]


@pytest.mark.parametrize("keep", [0, 4, 100, 5_000_000, -1])
def test_cut_off_weights_count_as_missing(demo_model, tmp_path, keep):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert missing_model_files(folder) == ["model.safetensors（不完整）"]


def test_each_shard_of_an_index_must_be_there(demo_model, tmp_path):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}', encoding="utf-8"
    )
    assert missing_model_files(folder) == ["b.safetensors"]


def test_pickled_weights_are_refused_with_the_way_out(demo_model, tmp_path):
    folder = shutil.copytree(demo_model, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in missing_model_files(folder)[0] and "safetensors" in missing_model_files(folder)[0]
