"""The rules of the house: who may import whom, what importing may do, how long a file may grow."""

import ast
import subprocess
import sys

from conftest import ROOT

SCRIPTS = [
    "data", "doctor", "download_model", "eval", "export", "inference", "medical_assistant", "prompts", "serve", "train",
    "train_lora",
]  # fmt: skip

# Floor by floor, as in docs/architecture.md: a file imports from floors below, or from a file before it.
FLOORS = [
    ["errors", "controls", "redact", "processes", "cli", "files", "quantities", "signs", "points", "triage"],
    [
        "records",
        "json_list",
        "rows",
        "schemas",
        "sources",
        "settings",
        "yaml_settings",
        "scenarios",
        "splitting",
        "pages",
        "shapes",
    ],
    [
        "hub_clients",
        "hub",
        "chat",
        "lengths",
        "hardware",
        "planner",
        "batch",
        "answers",
        "conversation",
        "bootstrap",
        "text_scores",
        "findings",
        "near_duplicates",
        "contamination",
    ],
    ["checkpoints", "demo", "merged_model", "gguf_file"],
    [
        "collection",
        "preparation",
        "audit",
        "plots",
        "tracking",
        "leaks",
        "head",
        "scoring",
        "choices",
        "lm_tasks",
        "not_finite",
        "callbacks",
        "engine",
        "decoding",
        "sampler",
        "running",
        "engine_transformers",
        "server_reply",
        "engine_openai",
        "llama",
        "engine_llama",
        "read_back",
        "scheduler",
    ],
    [
        "resuming",
        "planning",
        "configuration",
        "training",
        "engines",
        "evaluation",
        "measures",
        "run",
        "terminal",
        "commands",
        "self_test",
        "checkup",
        "checkup_machine",
        "checkup_training",
    ],
    ["comparison", "judge", "report", "model_card", "web_guard", "api_types", "metrics", "jobs", "api"],
]
ORDER = [name for floor in FLOORS for name in floor]

HEAVY = {
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "modelscope", "huggingface_hub", "swanlab",
    "pandas", "pyarrow", "openai", "httpx", "llama_cpp", "gguf", "prompt_toolkit", "psutil", "matplotlib", "numpy", "tokenizers", "safetensors", "yaml", "tqdm",
    "sacrebleu", "rouge_chinese", "jieba", "jinja2", "lm_eval", "fastapi", "starlette", "uvicorn", "pydantic",
    "prometheus_client", "datasketch", "markupsafe",
}  # fmt: skip

# What these define derives from classes of the heavy libraries; they are imported inside of functions.
HEAVY_MODULES = {"callbacks", "decoding", "head", "llama", "api_types", "api"}

MODULES = {path.stem: path for path in (ROOT / "qwenmed").glob("*.py") if path.stem != "__init__"}
PRODUCT = [*MODULES.values(), *(ROOT / f"{name}.py" for name in SCRIPTS)]


def imports(path, everywhere=True):
    """The (module, names) pairs that a file imports; those under `if TYPE_CHECKING` don't count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]


def own_imports(path):
    for module, names in imports(path):
        if module == "qwenmed":
            yield from names
        elif module.startswith("qwenmed."):
            yield module.split(".")[1]


def test_every_module_has_its_floor_and_the_picture_names_it():
    assert sorted(MODULES) == sorted(ORDER)
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in picture for name in ORDER)


def test_imports_go_down_or_to_a_file_before():
    for name, path in MODULES.items():
        for imported in own_imports(path):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_the_package_imports_no_script_and_scripts_only_prompts():
    for path in PRODUCT:
        scripts = {module.split(".")[0] for module, _ in imports(path)} & set(SCRIPTS)
        allowed = {"prompts"} | ({"medical_assistant"} if path.stem in ("eval", "serve") else set())
        assert scripts <= (allowed if path.parent == ROOT else set()), path.name


def test_nothing_heavy_is_imported_before_it_is_needed():
    for path in PRODUCT:
        heavy = {module.split(".")[0] for module, _ in imports(path, everywhere=False)} & HEAVY
        assert not heavy or path.stem in HEAVY_MODULES, (path.name, heavy)


def test_importing_has_no_side_effect(tmp_path):
    light = [f"qwenmed.{name}" for name in ORDER if name not in HEAVY_MODULES] + SCRIPTS
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); before = dict(os.environ)\n"
        f"for name in {light!r}: __import__(name)\n"
        f"assert dict(os.environ) == before\n"
        f"heavy = set(sys.modules) & {HEAVY!r}\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == done.stderr == b"" and not list(tmp_path.iterdir())


def test_texts_are_always_read_and_written_as_utf8():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            builtin = isinstance(node.func, ast.Name) and node.func.id == "open"
            method = isinstance(node.func, ast.Attribute) and node.func.attr in {"open", "read_text", "write_text"}
            ours = method and getattr(node.func.value, "id", "") in {"files", "os"}  # our own, and a file descriptor
            if (builtin or method) and not ours:
                binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args)
                assert binary or any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}"


def test_no_file_outgrows_a_reader_and_no_foreign_code_is_trusted():
    for path in PRODUCT:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path.name
        assert "trust_remote_code=True" not in text and "torch.load" not in text, path.name


def module_level(tree):
    """The statements that run on import, also those inside of `try`, `if` and `with` at the top."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting.extend(
                child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))
            )


def test_every_script_is_held_to_these_rules():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(SCRIPTS)


def test_heavy_imports_do_not_hide_in_a_block_at_the_top():
    for path in PRODUCT:
        found = set()
        for node in module_level(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert not found & HEAVY or path.stem in HEAVY_MODULES, (path.name, found & HEAVY)


def test_imports_are_absolute():
    # The other tests read the module's name; a relative import would pass them unseen.
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}:{node.lineno}"


def test_nothing_is_called_utils():
    for path in PRODUCT:
        names = {path.stem}
        for node in module_level(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {alias.asname or alias.name for alias in node.names}
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert "utils" not in names, path.name


def test_descriptors_opened_as_text_name_their_encoding():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"fdopen", "NamedTemporaryFile", "SpooledTemporaryFile"}:
                # The mode alone says whether it is binary; the temporary files are so by default.
                mode = next((k.value.value for k in node.keywords if k.arg == "mode"), None)
                position = 1 if name == "fdopen" else 0
                if mode is None and len(node.args) > position:
                    mode = getattr(node.args[position], "value", "")
                binary = "b" in mode if mode else name != "fdopen"
                assert binary or any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}"


def test_no_package_or_folder_bears_the_name_of_a_dependency():
    taken = HEAVY | {"evaluate", "utils"}
    assert not {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"} & taken
    # data/ would hide data.py from `import data`.
    assert not (ROOT / "data").exists()
