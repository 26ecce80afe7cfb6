# make demo   整条路走一遍：数据 → 全参数训练 → LoRA → 推理 → 医疗助手 → 评估 → 导出（CPU 即可，安装后约 5 分半）
# make test   全部测试
# make test-faults 故障注入：kill -9、损坏的文件、磁盘满、只读目录（约 8 分钟）
# make test-exports 导出：Qwen3-0.6B 的形状、真正的词表、llama.cpp（约 10 分钟；第一次要编译 llama.cpp，再加约 10 分钟）
# make test-data 数据与体检：一万行损坏的数据、近似重复、预先埋好的毛病（约 3 分钟）
# make test-scaling 训练：两个进程、续训、显存不足、8 位优化器（约 6 分钟）
# make test-serve 服务：API、并发、密钥、schemathesis、Chromium 里的网页（约 4 分钟）
# make notebook 重新执行 train.ipynb，结果写回其中（5 到 10 分钟）
# make test-notebook 在临时目录里离线执行一份 train.ipynb（5 到 10 分钟）
# make test-readme 两份 README 里的每条命令，逐字运行或核对（约 10 分钟）
# make bench-assistant 医疗助手的速度：批量、单题、十万行（约 20 分钟）
# make bench-eval 困惑度：与逐行计算是否一致，时间与内存（约 5 分钟）
# make bench-export 导出的时间与内存，与 llama.cpp 自己的转换器比（约 9 分钟）
# make bench-data   一百万条记录的数据准备：时间与内存（约 25 分钟）
# make bench-train  训练的速度和内存，与原教程的做法比（约 20 分钟）
# make bench-plan   显存计划与逐个操作数出来的相比（约 8 分钟）
# make bench-levers 训练的每一种省法，逐个量（约 3 分钟）
# make bench-serve 服务的负载：32 个客户端、500 个断开的、一万个错误的请求（约 5 分钟）
# make fit-points 由 tests/triage 里标注的问题重新算出紧急程度的打分表，再量一遍（约 2 分钟）
# make lint   代码检查：ruff 与 mypy
# make fuzz   模糊测试（可选，Linux；每个目标 FUZZ_SECONDS 秒）
# make lock   重新生成 requirements.lock（带哈希）
# make audit  用公开的漏洞库检查 requirements.lock

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
PY := $(CURDIR)/$(VENV)/bin/python
ROOT := $(CURDIR)

.PHONY: demo test test-faults test-exports test-serve test-data notebook test-notebook test-readme screenshots bench-assistant bench-eval bench-export bench-serve bench-data bench-train bench-plan bench-levers test-scaling fit-points lint fuzz lock audit clean

NEW_ENOUGH = 'import sys; sys.exit(sys.version_info < (3, 11) and \
  "需要 Python 3.11 或更新的版本，这里是 %d.%d：装好后运行 make PYTHON=/路径/python3.11 $(MAKECMDGOALS)" % sys.version_info[:2])'

# 一个装好固定版本的环境；requirements.txt 改变后自动更新。
# --clear：不清空，venv 就留着旧的解释器，装了新的 Python 也用不上。
$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c $(NEW_ENOUGH)
	@echo '$(PYTHON) -m venv $(VENV)'
	@$(PYTHON) -m venv $$($(PY) -c $(NEW_ENOUGH) 2>/dev/null || echo --clear) $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.ready-eval: $(VENV)/.ready pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[eval]'
	touch $@

# llama.cpp 没有现成的 wheel 时要编译约十分钟；编译一次，留在 .cache/wheels。
WHEELS := .cache/wheels

$(VENV)/.ready-gguf: $(VENV)/.ready-dev
	mkdir -p $(WHEELS)
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --find-links $(WHEELS) --wheel-dir $(WHEELS) \
	  $$(sed -n 's/^gguf = \["\(llama-cpp-python==[0-9.]*\)".*/\1/p' pyproject.toml)
	$(PY) -m pip install --quiet --disable-pip-version-check --find-links $(WHEELS) -e '.[gguf]'
	touch $@

# torchao 另放一处：装进环境里，每个脚本启动都要多等半秒。
QUANT := .cache/quant

$(QUANT)/.ready: $(VENV)/.ready pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(QUANT) \
	  $$(sed -n 's/^quant = \["\(torchao==[0-9.]*\)".*/\1/p' pyproject.toml)
	touch $@

# 在 demo_run/ 里运行，不碰你自己的 train.jsonl、models/ 和 output/。
demo: $(VENV)/.ready-eval
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
	@echo && echo "== 阶段 5：评估（与训练之前相比）=="
	cd demo_run && $(PY) $(ROOT)/eval.py -c output/demo-full --base demo -m 320
	@echo && echo "== 阶段 6：导出，并由另一个进程读出来对照 =="
	cd demo_run && $(PY) $(ROOT)/export.py -c output/demo-full --to merged
	@echo
	@echo "损失曲线：demo_run/output/demo-full/loss.png    批量回答：demo_run/answers.jsonl"
	@echo "评估报告：demo_run/eval_report/report.html（用浏览器打开）"
	@echo "换成真正的 Qwen3-0.6B（需要网络；建议 12 GB 以上显存，LoRA 更省）："
	@echo "  source $(VENV)/bin/activate"
	@echo "  python download_model.py && python data.py"
	@echo "  python train_lora.py            # 或 python train.py"
	@echo "  python medical_assistant.py"

QUESTION ?= 胸口像石头压着二十分钟了，出冷汗，左胳膊也疼，怎么办？
SCENARIO ?= emergency

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/faults --ignore tests/exports --ignore tests/serving \
	  --ignore tests/notebook --ignore tests/preparing --ignore tests/readme --ignore tests/scaling

# 一个进程：脚本在 fork 出的子进程里运行，重的库只导入一次。
test-faults: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults
	$(PY) tests/faults/tally.py

# 需要 llama.cpp 的测试也在这里；一个进程，因为 0.6B 的模型用得上两个核。
test-exports: $(VENV)/.ready-gguf
	$(PY) -m pytest tests/exports tests/test_engine_llama.py
	$(PY) -m pytest tests/test_export.py -k k_quants

# data.py 和 doctor.py：一万行损坏的数据、二十七种预先埋好的毛病。
test-data: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests/preparing

# 两个进程、逐位相同的续训、8 位优化器。一个测试自己就占两个核，所以一条接一条。
test-scaling: $(VENV)/.ready-dev $(QUANT)/.ready
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/scaling

# API 与网页（网页需要 Chromium）。
test-serve: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests/serving

# 在 notebook_run/ 里从头运行；有单元格出错时 train.ipynb 保持原样。
notebook: $(VENV)/.ready-dev
	rm -rf notebook_run
	$(PY) tests/notebook/execute.py train.ipynb

# 一个进程：训练用得上两个核。
test-notebook: $(VENV)/.ready-dev
	$(PY) -m pytest tests/notebook

# 一条接一条，像读者那样；占用 8000 端口。
test-readme: $(VENV)/.ready-dev
	$(PY) -m pytest tests/readme

screenshots: $(VENV)/.ready-dev
	SCREENSHOTS=$(ROOT)/docs/images $(PY) -m pytest tests/serving/test_chat_page.py

# 其中 llama.cpp 一项需要 pip install -e '.[gguf]'（没有现成的 wheel 时要编译约十分钟）。
bench-assistant: $(VENV)/.ready-dev
	$(PY) benchmarks/assistant.py

# 需要 ../shared/data 里的真实样本。
bench-eval: $(VENV)/.ready-dev
	$(PY) benchmarks/evaluation.py

# 在 make demo 之后：用它训练的模型。
bench-serve: $(VENV)/.ready-dev
	$(PY) benchmarks/serving.py

# 需要 Qwen3 的分词器（测试会建好）；有 GPU 时在 GPU 上测。
bench-train: $(VENV)/.ready-dev $(QUANT)/.ready
	$(PY) benchmarks/training.py

# 需要 ../shared/data 里的真实样本。
bench-levers: $(VENV)/.ready-dev $(QUANT)/.ready
	$(PY) benchmarks/levers.py

# 不需要 GPU，也不载入权重。
bench-plan: $(VENV)/.ready-dev
	$(PY) benchmarks/plan.py

# 需要 ../shared/data 里的真实样本，和 15 GB 磁盘。
bench-data: $(VENV)/.ready-dev
	$(PY) benchmarks/preparation.py

fit-points: $(VENV)/.ready-dev
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[urgency]'
	$(PY) benchmarks/fit_points.py
	$(PY) benchmarks/triage.py

bench-export: $(VENV)/.ready-gguf
	$(PY) benchmarks/export.py

lint: $(VENV)/.ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

FUZZ_SECONDS ?= 60

fuzz: $(VENV)/.ready-dev
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	mkdir -p .fuzz
	set -e; for target in reply record row settings masking; do \
	  echo "== $$target =="; \
	  cd $(ROOT)/.fuzz && $(PY) $(ROOT)/tests/fuzz/fuzz.py $$target -max_total_time=$(FUZZ_SECONDS) -max_len=400 -verbosity=0 -print_final_stats=1; \
	done

# 锁定和审计的工具装在自己的环境里，不影响项目的依赖。
TOOLS := .venv-tools

$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	touch $@

lock: $(TOOLS)/.ready
	cp requirements.lock .requirements.lock.new
	$(TOOLS)/bin/uv pip compile requirements.txt --quiet --generate-hashes --no-header --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --default-index https://pypi.org/simple -o .requirements.lock.new
	(sed '/^[^#]/,$$d' requirements.lock; sed '/^#/d' .requirements.lock.new) > .requirements.lock.whole
	mv .requirements.lock.whole requirements.lock && rm .requirements.lock.new

# --strict：漏洞库查不到的包算失败，而不是悄悄跳过。
audit: $(TOOLS)/.ready
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

clean:
	rm -rf $(TOOLS) .fuzz
	rm -rf $(VENV) demo_run notebook_run .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache
