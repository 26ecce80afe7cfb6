"""The fixed texts that stand with every answer, whatever the model says."""

DISCLAIMER = "【免责声明】以上内容由人工智能生成，仅供参考，不能代替医生的诊断和治疗；如有不适请及时就医，紧急情况请立即拨打120。"

NO_ANSWER = "（模型在 {limit} 个 token 之内没有写完思考，还没有给出回答。请用更大的 -m / max_tokens 再试一次。）"
EMPTY_ANSWER = "（模型没有给出回答。请换一种说法再试一次。）"


def close_answer(answer: str, notice: str = "") -> str:
    """The answer as it is shown: with the model's own notice, if it has one, and the disclaimer, once."""
    body = answer.replace(DISCLAIMER, "").rstrip()
    return "\n\n".join(part for part in (body, notice, DISCLAIMER) if part)
