"""Tasks of lm-evaluation-harness (CMMLU, C-Eval, …) on a loaded model: did training make it forget?

The harness fetches the tasks' data sets from Hugging Face; a mirror is named by HF_ENDPOINT.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwenmed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The measures of a document that are looked for, the best known first.
METRICS = ("acc_norm", "acc", "exact_match")
BATCH_SIZE = 8


def check_installed() -> None:
    """Make sure that the harness is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval 需要 lm-evaluation-harness", None, "请运行 pip install -e '.[lm-eval]'")


def run(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tasks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield `{"id", "task", "metric", "score"}` for each document of each task.

    Raises:
        UserError: there is no such task, or its data can't be fetched.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        found = simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=True, bootstrap_iters=0)
    except Exception as error:  # the harness and the hub raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        remedy = "任务名见 lm-eval ls tasks；数据取自 Hugging Face，可设 HF_ENDPOINT"
        raise UserError(f"lm-evaluation-harness 失败：{reason}", "、".join(tasks), remedy) from error
    for task, documents in found["samples"].items():
        for number, document in enumerate(documents):
            metric = next((name for name in METRICS if name in document), None)
            if metric is not None:
                yield {"id": f"{task}:{number}", "task": task, "metric": metric, "score": float(document[metric])}
