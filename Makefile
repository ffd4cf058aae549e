# make demo    train on packed documents and compare with padding    make test      the tests that need no GPU
# make lint    ruff and mypy                                         make check     lint, test, docs and package
# make docs    build the pages into site/, and fail on a broken link  make package   the sdist and the wheel into dist/, checked
# make coverage  the tests that need no GPU, with the lines that they do not reach
# make test-gpu  the tests marked `gpu`                              make clean     remove what make made
# make test-browser  the tests marked `browser`, in chromium; make browser installs it, with apt-get, if it is missing
# make sweep   compare every family of models with eager attention and write docs/models.md: fifteen minutes
# make transformers-tests  run Transformers' own tests of attention implementations: two minutes
# make fuzz    10,000 random calls of attention on the GPU against dense attention
# make sanitize  run the kernels for this GPU under compute-sanitizer, or under SANITIZER
# make versions  run the core of the tests with other supported versions: all of them, or VERSIONS="oldest newest"
# make hub  load the kernels as the Kernel Hub does, with Hugging Face's library `kernels`
# make embeddings  run the page about embeddings with the library sentence-transformers
# make tritons  compile the kernels for sm_90 with other releases of Triton, TRITONS: minutes
# PYTHON is the interpreter that creates the environment, VENV the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
PYTEST_WORKERS ?= 2
VERSIONS ?=
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
SANITIZER ?= compute-sanitizer

RUN = $(VENV)/bin/python
READY = $(VENV)/.ready

.PHONY: demo test coverage docs package test-gpu browser test-browser fuzz sanitize sweep transformers-tests versions hub embeddings tritons lint \
	check clean

# Idle threads sleep instead of spinning: on a busy machine, spinning threads make the demo 5 times as slow.
demo: $(READY)
	OMP_WAIT_POLICY=passive $(RUN) examples/sft_packed.py

# Some tests compile for a minute or two. With worksteal, an idle worker takes tests from the queue of a busy one.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not gpu and not browser and not hub and not embeddings"

coverage: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not gpu and not browser and not hub and not embeddings" --cov --cov-report=term --cov-report=xml

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --site-dir site

package: $(READY)
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist . >/dev/null
	$(RUN) -m twine check --strict dist/*

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu

browser:
	command -v chromedriver || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

test-browser: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m browser

fuzz: $(READY)
	$(RUN) tests/fuzz_attention.py

# racecheck does not understand the barriers between the warps of the sm_90 kernels; see sanitize_attention.py.
sanitize: $(READY)
	set -e; for case in "memcheck portable 64" "racecheck portable 64" "memcheck portable 128" "racecheck portable 128" \
	  "memcheck hopper 64" "synccheck hopper 64" "memcheck hopper 128" "synccheck hopper 128" \
	  "memcheck hopper 256" "synccheck hopper 256"; do set -- $$case; \
	  $(SANITIZER) --tool $$1 --error-exitcode 1 $(RUN) tests/sanitize_attention.py $$2 $$3; done

sweep: $(READY)
	OMP_NUM_THREADS=1 $(RUN) tests/sweep_models.py

transformers-tests: $(READY)
	OMP_NUM_THREADS=1 $(RUN) tests/run_transformers_tests.py

versions: $(READY)
	$(RUN) tests/run_versions.py --workers $(PYTEST_WORKERS) $(VERSIONS)

# Beside the environment: where the library is installed, Transformers behaves in other ways.
hub: $(READY)
	$(RUN) -m pip install --quiet --no-deps --upgrade --target build/hub kernels==0.17.2
	PYTHONPATH=$(CURDIR)/build/hub $(RUN) -m pytest -m hub tests/test_packaging.py tests/test_examples.py

# Beside the environment, too: Transformers imports scipy and scikit-learn where they are installed, which takes a second.
embeddings: $(READY)
	$(RUN) -m pip install --quiet --no-deps --upgrade --target build/embeddings \
	  sentence-transformers==6.2.0 scikit-learn scipy joblib threadpoolctl cloudpickle narwhals
	PYTHONPATH=$(CURDIR)/build/embeddings $(RUN) -m pytest tests/test_docs.py -m embeddings

tritons: $(READY)
	set -e; for version in $(TRITONS); do \
	  $(RUN) -m pip install --quiet --no-deps --target build/triton-$$version triton==$$version; \
	  PYTHONPATH=build/triton-$$version $(RUN) -m pytest tests/test_compilation.py -k sm_90; done

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	MYPYPATH=tests $(RUN) -m mypy --follow-imports=silent tests/*_gpu.py  # they call tests of others, which change

check: lint test docs package

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "hf-flashmask needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs site coverage.xml .coverage* *.egg-info .mypy_cache .pytest_cache .ruff_cache
