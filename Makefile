# `make test` and `make demo` need nothing but Python 3.10+ and make: each keeps a virtual environment of its own.
# `make test-fast` leaves out what takes long. PYTHON chooses the interpreter that builds the environments.
# `make test-matrix` runs the tests that know the libraries with each supported transformers, the first of them with the
# oldest peft, trl and bitsandbytes.
# `make gate` compiles every launch for cards that are not there; `make gate-all` does so with every Triton below.
# `make test-upstream` runs transformers' own tests of its models, from its source distribution, on Gemma 4, patched.
# `make sanitize` runs every kernel on an NVIDIA GPU under compute-sanitizer, which comes with the CUDA toolkit.
# `make mutation` perturbs the kernels, and lists what their tests do not notice.
PYTHON ?= python3
TEST_ENV := .venv/test
DEMO_ENV := .venv/demo
# Without an NVIDIA driver the CPU build of torch will do, and spares gigabytes.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
TRANSFORMERS := 5.15.0 5.17.0 5.20.0 5.23.0
OLDEST := transformers==5.15.0 peft==0.21.0 trl==1.15.0 bitsandbytes==0.50.0
TRITONS := 3.4.0 3.5.0 3.5.1 3.6.0 3.7.0 3.7.1 3.8.0 3.9.0
PYTEST := OMP_NUM_THREADS=1 $(TEST_ENV)/bin/python -m pytest

.PHONY: demo test test-fast test-matrix test-upstream gate gate-all sanitize mutation bench report lint clean

demo: $(DEMO_ENV)/.installed
	$(DEMO_ENV)/bin/python -m fastgemma demo --output demo_output

test: $(TEST_ENV)/.installed
	$(PYTEST) -n 2

test-fast: $(TEST_ENV)/.installed
	$(PYTEST) -n 2 -m "not slow"

test-matrix: $(TRANSFORMERS:%=.venv/with-%/.installed)
	status=0; for version in $(TRANSFORMERS); do \
		OMP_NUM_THREADS=1 .venv/with-$$version/bin/python -m pytest -n 2 tests/patches tests/regression || status=1; \
	done; exit $$status

test-upstream: $(TEST_ENV)/.installed
	$(TEST_ENV)/bin/python -m pip install --quiet parameterized
	rm -rf .upstream
	$(TEST_ENV)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest .upstream \
		transformers==$$($(TEST_ENV)/bin/python -c 'from importlib.metadata import version; print(version("transformers"))')
	OMP_NUM_THREADS=1 $(TEST_ENV)/bin/python tests/upstream.py .upstream/transformers-*.tar.gz

gate: $(TEST_ENV)/.installed
	PYTHONPATH=. $(TEST_ENV)/bin/python tests/portability/gate.py

gate-all: $(TRITONS:%=.venv/gate-%/.installed)
	status=0; for version in $(TRITONS); do \
		PYTHONPATH=. .venv/gate-$$version/bin/python tests/portability/gate.py || status=1; \
	done; exit $$status

# Of cuBLAS's own kernels racecheck reports races; ours begin with an underscore.
sanitize: $(TEST_ENV)/.installed
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(TEST_ENV)/bin/python tests/sanitize.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck $(TEST_ENV)/bin/python tests/sanitize.py \
		| tee .racecheck.log
	! grep "access at _" .racecheck.log

mutation: $(TEST_ENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(TEST_ENV)/bin/python tests/mutation.py

bench: $(TEST_ENV)/.installed
	$(TEST_ENV)/bin/python -m pip install --quiet -e ".[bench]"
	$(TEST_ENV)/bin/python -m pytest bench/kernels
	for impl in hf fastgemma; do $(TEST_ENV)/bin/python bench/train_step.py --impl $$impl --model e2b || exit 1; done
	$(TEST_ENV)/bin/python bench/fit.py --model e2b
	$(TEST_ENV)/bin/python bench/report.py

report:
	$(PYTHON) bench/report.py

lint: $(TEST_ENV)/.installed
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/mypy

clean:
	rm -rf .venv .gate_cache .mutation .upstream build dist *.egg-info demo_output

# Some packages of its own; everything else is the test environment's, which comes later in Python's path.
define OVER_TEST_ENV
	$(TEST_ENV)/bin/python -m venv $(1)
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(abspath $(TEST_ENV))/bin/python -c "$$purelib" > "$$($(1)/bin/python -c "$$purelib")/test.pth"
	$(1)/bin/python -m pip install --quiet $(2)
	touch $(1)/.installed
endef

.venv/gate-%/.installed: $(TEST_ENV)/.installed
	$(call OVER_TEST_ENV,.venv/gate-$*,--no-deps triton==$*)

.venv/with-%/.installed: $(TEST_ENV)/.installed
	$(call OVER_TEST_ENV,.venv/with-$*,$(if $(findstring transformers==$*,$(OLDEST)),$(OLDEST),transformers==$*))

%/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet "$(TORCH)"
	$*/bin/python -m pip install --quiet -e ".[test]"
	touch $@
