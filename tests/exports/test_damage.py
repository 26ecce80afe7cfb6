"""The self-test finds the well-known ways to break an export, each with a fresh process as its reader."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from prompts import GENERAL_PROMPT
from qwenmed import chat, files, gguf_file, read_back, self_test


def conversations(trained, count=2):
    return [chat.user_messages(row["question"], GENERAL_PROMPT) for row in trained.rows[:count]]


def break_rope(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10_000
    files.write_json(folder / "config.json", config)


def break_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("'<|im_start|>' +", "'<|im_start|> ' +"), encoding="utf-8")


def break_stops(folder):
    config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    files.write_json(folder / "generation_config.json", {**config, "eos_token_id": config["eos_token_id"][1]})


def untie(folder):
    """What a careless merge leaves: an output matrix of its own, no longer the embedding."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files.write_json(folder / "config.json", {**config, "tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("damage", "word"), [(break_rope, "KL"), (break_template, "提示"), (break_stops, "停止符"), (untie, "KL")]
)
def test_self_test_finds_the_well_known_ways_to_break_an_export(best, merged, trained, tmp_path, damage, word):
    damage(merged)
    found = self_test.run(
        best,
        merged,
        read_back.TRANSFORMERS,
        self_test.BOUNDS["bf16"],
        conversations(trained),
        40,
        torch.device("cpu"),
        tmp_path,
    )
    assert any(word in each for each in found.failed), found.failed
    assert not list(tmp_path.glob(".self-test*"))


def test_gguf_is_read_by_transformers_where_llama_cpp_is_missing(best, trained, tmp_path):
    path = gguf_file.write_gguf(best.path, tmp_path / "a.gguf", "f16")
    found = self_test.run(
        best,
        path,
        read_back.GGUF_BY_TRANSFORMERS,
        self_test.BOUNDS["f16"],
        conversations(trained),
        300,
        torch.device("cpu"),
        tmp_path,
    )
    assert not found.failed and found.ended_there == 2 and set(found.stops) == set(chat.STOP_TOKENS)
