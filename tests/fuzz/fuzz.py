"""Coverage-guided fuzzing of what reads foreign bytes; `make fuzz` runs every target for a bounded time.

    python tests/fuzz/fuzz.py reply -max_total_time=60

Needs atheris (`pip install -e '.[fuzz]'`, Linux). A crash is anything but the answers that a target allows; its
input is kept as crash-… in the current folder and is repeated with `fuzz.py TARGET crash-…`.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["qwenmed", "yaml", "transformers.utils.chat_parsing", "csv", "json"]):
    import yaml  # noqa: F401  instrumented here, used by settings
    from transformers.utils.chat_parsing import response_parser

    from qwenmed import batch, chat, controls, records, redact, sources, yaml_settings
    from qwenmed import settings as settings_module
    from qwenmed.errors import UserError

from prompts import MEDICAL_SCENARIOS  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


class Letters:
    """A stand-in for a tokenizer: two tags, and every other id a byte of text."""

    def get_response_parser(self, template, prefix):
        return response_parser.ResponseParser(template, prefix=prefix)

    def convert_tokens_to_ids(self, tag):
        return {chat.THINK_START: 256, chat.THINK_END: 257}[tag]

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


LETTERS = Letters()
ANCHOR = "<|im_start|>assistant\n"


def reply(data):
    """Streamed in any pieces a reply parses as in one, as text and as ids."""
    provider = atheris.FuzzedDataProvider(data)
    prompt = ANCHOR + (chat.THINK_START if provider.ConsumeBool() else "")
    cuts = [provider.ConsumeIntInRange(1, 9) for _ in range(6)]
    ids = [provider.ConsumeIntInRange(0, 257) for _ in range(provider.ConsumeIntInRange(0, 40))]
    text = provider.ConsumeUnicodeNoSurrogates(200)
    parser, rest = chat.ReplyParser(prompt), text
    for cut in cuts:
        parser.feed(rest[:cut])
        rest = rest[cut:]
    parser.feed(rest)
    parser.close()
    whole = chat.parse_reply(prompt, text)
    assert parser.reply == whole, (parser.reply, whole)
    written = chat.TokenText(LETTERS)
    by_ids = chat.parse_reply(ANCHOR, "".join(written.feed([id_]) for id_ in ids) + written.close())
    if 256 not in ids and 257 not in ids:
        assert not by_ids.thinking, by_ids


def record(data):
    """Any bytes are records, problems or a UserError; what is accepted can be written and read again."""
    suffix = (".jsonl", ".json", ".csv")[data[0] % 3] if data else ".jsonl"
    path = FOLDER / f"a{suffix}"
    path.write_bytes(data[1:])
    try:
        found, problems = sources.read_records(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert all(str(problem) for problem in problems)
    for each in found:
        row = json.loads(json.dumps(records.format_row(each, "系统"), ensure_ascii=False).encode())
        assert row["output"].startswith("<think>\n") and row["output"].count("</think>") == 1, row


def row(data):
    """Any row is a request that is whole or says why not."""
    provider = atheris.FuzzedDataProvider(data)

    def anything(depth=0):
        kind = provider.ConsumeIntInRange(0, 9 if depth < 3 else 6)
        simple = [None, True, "", 0.5, provider.ConsumeInt(8)]
        if kind < len(simple):
            return simple[kind]
        if kind < 7:
            return provider.ConsumeUnicode(12)
        if kind == 7:
            return [anything(depth + 1) for _ in range(provider.ConsumeIntInRange(0, 3))]
        keys = ("question", "scenario", "max_tokens", "id", "x")
        known = ["diagnosis", "头痛？", "5", anything(depth + 1)]
        return {key: provider.PickValueInList(known) for key in keys if provider.ConsumeBool()}

    value = anything()
    request = batch.parse_request(value, 1, MEDICAL_SCENARIOS, "diagnosis", 9)
    assert request.error or (request.question.strip() and request.scenario in MEDICAL_SCENARIOS)
    assert type(request.max_tokens) is int and request.max_tokens > 0
    controls.json_line([request.id, request.question, request.error]).encode()


def settings(data):
    """Any YAML is settings or a UserError."""
    path = FOLDER / "a.yaml"
    path.write_bytes(data)
    try:
        yaml_settings.load_settings(settings_module.LoraSettings, {}, path, None)
    except UserError as error:
        assert "\n" not in str(error)


def masking(data):
    """Masking twice is masking once, and nothing that a terminal obeys is left by `printable`."""
    text = data.decode(errors="surrogateescape")
    once = redact.redact(text)
    assert redact.redact(once.text).text == once.text, text
    assert bool(once.counts) == (once.text != text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 0x7F <= ord(c) < 0xA0 for c in controls.printable(text))
    assert json.loads(controls.json_line({"t": text})) == {"t": text}


TARGETS = {function.__name__: function for function in (reply, record, row, settings, masking)}

# Where to begin: a fuzzer finds braces by itself, but not Chinese keys.
SEEDS = {
    "reply": ["\x01\x03<think>\n想\n</think>\n\n答", "<think></think><|im_end|>"],
    "record": [
        '\x00{"question": "问", "think": "想", "answer": "答", "scenario": "diagnosis"}\n',
        '\x01[{"question": "问", "answer": "答"}]',
        "\x02question,think,answer\n问,想,答\n",
        '\x00{"instruction": "系", "input": "问", "output": "<think>\\n想\\n</think>\\n\\n答"}\n',
    ],
    "row": ["12345678901234567890", "x" * 60],
    "settings": ["learning_rate: 2e-5\nepochs: 3\nlora_rank: 8\n", "!!python/object/apply:os.system [x]", "a: &a [*a]"],
    "masking": ["电话+86 138 1234 5678", "11010519491231002X", "a.b@c.cn", "(010)62345678"],
}


def main():
    """Run one target: `fuzz.py TARGET [libFuzzer options]`."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)} [-max_total_time=SECONDS] [FILE]")
    name = sys.argv.pop(1)
    if not [argument for argument in sys.argv[1:] if not argument.startswith("-")]:
        corpus = FOLDER / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS[name]):
            (corpus / str(number)).write_text(seed, encoding="utf-8")
        sys.argv.append(str(corpus))
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
