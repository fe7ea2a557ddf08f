# Two commands: `make train` and `make test`. Each installs what it needs into .venv first.
# Flags go into ARGS:  make train ARGS="--model cnn --epochs 5".  `make crash-test` tests, in an hour,
# that nothing is lost.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

train: $(VENV)/requirements.installed
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/requirements-dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

crash-test: $(VENV)/requirements-dev.installed
	$(BIN)/python -m tests.crash_test $(ARGS)

fuzz: $(VENV)/requirements-dev.installed
	$(BIN)/python -m tests.fuzz --minutes 10 $(ARGS)

format: $(VENV)/requirements-dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/%.installed: %.txt requirements.txt
	@echo "Installing $< into $(VENV): PyTorch and what goes with it. This happens once and takes some minutes."
	@echo "About 1 GB; on Linux 3 to 5 GB, because PyTorch comes with CUDA there unless a CPU-only one is installed already."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --requirement $<
	touch $@

.PHONY: train test crash-test fuzz format clean
