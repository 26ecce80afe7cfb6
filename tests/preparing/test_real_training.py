"""The real data set's records through data → 20 training steps → inference, with the real Qwen3 vocabulary.

Skipped, and saying so, where the sample does not lie beside the checkout or the vocabulary is not installed.
"""

import json

import pytest
from conftest import REAL_SAMPLE, run_script
from test_real_sample import CACHE, build_real_tokenizer

from qwenmed import checkpoints

pytestmark = pytest.mark.skipif(not REAL_SAMPLE.is_file(), reason=f"the real sample {REAL_SAMPLE} is not here")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Qwen3's architecture with the true vocabulary of 151,936, hidden 64, two layers, random weights."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=40_960, tie_word_embeddings=True,
        eos_token_id=151_645, pad_token_id=151_643,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[151_645, 151_643], pad_token_id=151_643
    )
    model.save_pretrained(folder)
    checkpoints.load_tokenizer(build_real_tokenizer(CACHE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", ["train.py", "train_lora.py"])
def test_data_then_twenty_steps_then_inference(small_model, tmp_path, script, record_property):
    data = run_script("data.py", "--source", REAL_SAMPLE, "--tokenizer", small_model, cwd=tmp_path)
    assert data.status == 0, data.err
    counts = {
        words[0]: words[1] for line in data.out.splitlines() if (words := line.split()) and words[0] in ("train", "val")
    }
    assert counts == {"train": "108", "val": "12"}

    rate = "1e-2" if script == "train_lora.py" else "3e-3"
    done = run_script(
        script, "--model", small_model, "--max-steps", "20", "--batch-size", "1", "--gradient-accumulation-steps", "1",
        "--learning-rate", rate, "--max-length", "640", "--overlong", "shorten", "--logging-steps", "1",
        "--eval-steps", "20", "--sample-tokens", "8", "--output-dir", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0, done.err
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(11.93, abs=0.1)  # ln(151,936): an untrained model knows nothing
    assert losses[-1] < losses[0] - (0.5 if script == "train.py" else 0.05)
    record_property("loss_at_steps_1_and_20", (losses[0], losses[-1]))
    print(f"\n{script}: loss at step 1 {losses[0]:.3f}, at step 20 {losses[-1]:.3f}")

    answer = run_script("inference.py", "高血压患者饮食要注意什么？", "-c", "run", "-m", "8", "--json", cwd=tmp_path)
    assert answer.status == 0, answer.err
    reply = json.loads(answer.out)
    assert reply["thinking_tokens"] + reply["answer_tokens"] <= 8 and reply["prompt_tokens"] > 20
