"""A model of Qwen3-0.6B's true shape with random weights in bf16, and the real tokenizer: 1.2 GB, built in 20 s."""

from pathlib import Path

from test_real_sample import CACHE, build_real_tokenizer


def build_true_shape(folder: Path) -> Path:
    """Write the model folder as the hub has it: one bf16 safetensors file, both stop tokens, the sampling of the card.

    Skips the test where the real vocabulary is not installed.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from qwenmed import checkpoints

    tokenizer = checkpoints.load_tokenizer(build_real_tokenizer(CACHE))
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, bos_token_id=pad, eos_token_id=end,
    )  # fmt: skip
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        eos_token_id=[end, pad],
        pad_token_id=pad,
        bos_token_id=pad,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
