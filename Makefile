# make distill   a teacher, a student and the table that compares them, on bundled digits; sets itself up in .venv first;
#                PICTURE=docs/digits.png draws the table's picture too
# make compare   what distillation competes with, on one page; make compare DATA=mnist
# make detect    an object detector: a teacher, the same student alone and distilled, a table and a page with pictures of boxes
# make methods   every method on bundled digits, five seeds, and the time of a step: the table of docs/methods.md;
#                make methods ONLY=kd,nkd measures these alone
# make few       the same student of few labels: alone, fine-tuned, distilled, as curves; make few DATA=mnist
# make gpu       what only a GPU can show, with tables: OUT=runs/gpu STAGES=equality,steps SECONDS=400; DEVICE=cpu is the dry form
# make secure    students under attack, who betrays the training samples, and copies by a thief, on bundled digits: the tables and
#                the picture of docs/security.md; make secure DATA=mnist PARTS=[defensive] for defensive distillation on MNIST
# make test      style, types, the order of the rooms, and the tests that need nothing but this process
# make docs      the documentation site, in runs/site
# make test-processes      the tests that need fresh processes, an environment or a terminal

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
SETUP := .venv/.ready
# Python keeps the bytecode of what it imports, whatever the environment says: without it each process compiles torch and
# Lightning anew, which takes seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: distill compare methods few detect secure docs test test-processes gpu zoo setup requirements clean
.DEFAULT_GOAL := distill

distill: $(SETUP)
	@stamp=$$(date +%Y-%m-%d_%H-%M-%S)_$$$$; export RUN_STAMP=$$stamp; \
	$(BIN)/python scripts/train.py --multirun seed=0,1,2 \
		experiment=digits/few_labels,digits/same_images,digits/distilled && \
	$(BIN)/python scripts/report.py runs=runs/digits/$$stamp out=runs/digits/$$stamp/table.md \
		$(if $(PICTURE),picture=$(PICTURE)) && \
	echo "Curves and pictures: $(BIN)/tensorboard --logdir runs"

# Every technique on the same data, budget and seeds, and one page of them all: runs/compare/$(DATA)/report/index.html.
# What is finished is not trained again. PICTURE=docs/compare.png writes the README's picture too.
DATA ?= digits
compare: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/compare.py dataset=$(DATA) $(if $(PICTURE),picture=$(PICTURE))

# Trains one after the other; what is finished in runs/methods is not repeated, and other rows stay as they are.
methods: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/methods_table.py $(if $(ONLY),'only=[$(ONLY)]')

# Writes docs/few.md, its picture and what both are made of, docs/few.json, in which other data sets stay as they are.
few: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/few_table.py dataset=$(DATA) jobs=2

# On two cores: the student alone beside the teacher. SEEDS=0,1,2 gives the figures of conf/experiment/detection.
SEEDS ?= 0
detect: $(SETUP)
	@stamp=$$(date +%Y-%m-%d_%H-%M-%S)_$$$$; runs=runs/detection_digits/$$stamp; mkdir -p $$runs; \
	export RUN_STAMP=$$stamp OMP_NUM_THREADS=1; \
	$(BIN)/python scripts/train.py --multirun seed=$(SEEDS) experiment=detection/digit_scenes_alone \
		'hydra.sweep.subdir=alone-s$${seed}' > $$runs/alone.log 2>&1 & alone=$$!; \
	$(BIN)/python scripts/train.py --multirun seed=$(SEEDS) experiment=detection/digit_scenes \
		'hydra.sweep.subdir=distilled-s$${seed}' && \
	{ wait $$alone || { cat $$runs/alone.log; exit 1; }; } && \
	$(BIN)/python scripts/report.py runs=$$runs out=$$runs/table.md && \
	$(BIN)/python scripts/evaluate.py run=$$(ls -d $$runs/distilled-s* | head -1) pictures=$$runs/pictures

# Goes on where it was stopped; nothing in it hangs. The head of scripts/gpu.py says what the stages are.
DEVICE ?= cuda
OUT ?= runs/gpu
gpu: $(SETUP)
	$(BIN)/python scripts/gpu.py device=$(DEVICE) out=$(OUT) $(if $(STAGES),stages=$(STAGES)) $(if $(SECONDS),seconds=$(SECONDS))

# About 13 minutes of one core's time; what is finished in runs/secure is not repeated. SEEDS_OF=1 for a first look.
SEEDS_OF ?= 3
secure: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/secure_table.py dataset=$(DATA) seeds=$(SEEDS_OF) $(if $(PARTS),parts=$(PARTS))

test: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-processes: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "process and not slow and not zoo and not network and not gpu and not slurm"

# Every method and scheme trained, logged, stopped, resumed and shipped.
zoo: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m zoo

docs: $(SETUP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Written to runs/site/index.html"

setup: $(SETUP)

# Every package is pinned by version and hash; uv itself is one of them.
$(SETUP): requirements.txt pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -oE '^uv==[^ ]+' requirements.txt)"
	$(BIN)/uv pip sync --quiet --require-hashes --python $(BIN)/python requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

# Pins anew what pyproject.toml asks for. The file names no host, so that it installs from whatever index is set up.
requirements: $(SETUP)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade \
		--extra dev --output-file requirements.txt pyproject.toml

clean:
	rm -rf .venv runs
