# make demo   整条路走一遍：数据 → 全参数训练 → LoRA → 推理 → 医疗助手（CPU 即可，安装后约 3 分钟）
# make test   全部测试
# make lint   代码检查

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(CURDIR)/$(VENV)/bin/python
ROOT := $(CURDIR)

.PHONY: demo test lint clean

# 一个装好固定版本的环境；requirements.txt 改变后自动更新。
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# 在 demo_run/ 里运行，不碰你自己的 train.jsonl、models/ 和 output/。
demo: $(VENV)/.ready
	rm -rf demo_run && mkdir demo_run
	@echo && echo "== 阶段 1：数据 =="
	cd demo_run && $(PY) $(ROOT)/data.py --source demo
	@echo && echo "== 阶段 2a：全参数训练（从随机权重开始）=="
	cd demo_run && $(PY) $(ROOT)/train.py --model demo
	@echo && echo "== 阶段 2b：在它上面做 LoRA =="
	cd demo_run && $(PY) $(ROOT)/train_lora.py --model output/demo-full --epochs 1 --batch-size 8 --gradient-accumulation-steps 1
	@echo && echo "== 阶段 3：推理 =="
	cd demo_run && $(PY) $(ROOT)/inference.py -c latest "$(QUESTION)"
	@echo && echo "== 阶段 4：医疗助手 =="
	cd demo_run && $(PY) $(ROOT)/medical_assistant.py -b $(ROOT)/sample_questions.json -o answers.jsonl
	cd demo_run && $(PY) $(ROOT)/medical_assistant.py -q "$(QUESTION)" -s $(SCENARIO)
	@echo
	@echo "损失曲线：demo_run/output/demo-full/loss.png    批量回答：demo_run/answers.jsonl"
	@echo "换成真正的 Qwen3-0.6B（需要网络；建议 12 GB 以上显存，LoRA 更省）："
	@echo "  source $(VENV)/bin/activate"
	@echo "  python download_model.py && python data.py"
	@echo "  python train_lora.py            # 或 python train.py"
	@echo "  python medical_assistant.py"

QUESTION ?= 胸口像石头压着二十分钟了，出冷汗，左胳膊也疼，怎么办？
SCENARIO ?= emergency

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) demo_run .pytest_cache .ruff_cache .hypothesis .cache
