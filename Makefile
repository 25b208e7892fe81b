# make demo   train all three stages on the built-in data, measure, draw
# make test   run the tests          make lint    check style
# make ablations  after the demo: variants of stage 3 on its encoder and classifier, three seeds each, as a table
# make page   the page in the browser: of the demo, or of NETWORK=FILE
# make pretrained  train the network of pretrained/ again: ten times as many images as the demo; goes on where it stopped
# make bench  time ops, training step, metrics and data loading against the usual ways
# make gpu    check on a GPU what was built without one: a verdict per line, all of it in gpu.json; ten minutes at most

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/critters

.venv/done: requirements.txt requirements-test.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	touch $@

demo: .venv/done
	$(BIN)/python encoder.py --epochs 4
	$(BIN)/python classifier.py
	$(BIN)/python gan.py --kimg 50
	$(BIN)/python explore.py embedding --network $(RUN)/encoder.pt
	$(BIN)/python explore.py sample --network $(RUN)/gan.pt
	$(BIN)/python explore.py traverse --network $(RUN)/gan.pt
	$(BIN)/python explore.py dimensions --network $(RUN)
	$(BIN)/python metrics.py --network $(RUN)/gan.pt --json $(RUN)/metrics.json
	@echo "pictures: $(RUN)/sample.png, $(RUN)/traverse.png, $(RUN)/embedding.png"

LONG := runs/pretrained

pretrained: .venv/done
	$(BIN)/python encoder.py --epochs 4 --outdir $(LONG)
	$(BIN)/python classifier.py --outdir $(LONG)
	$(BIN)/python gan.py --kimg 480 --penalty-every 1 --outdir $(LONG)
	$(BIN)/python metrics.py --network $(LONG) --json pretrained/metrics.json
	$(BIN)/python explore.py dimensions --network $(LONG)
	$(BIN)/python explore.py export --network $(LONG) --out pretrained/critters.pt

NETWORK := $(wildcard pretrained/critters.pt)
ifeq ($(NETWORK),)
NETWORK := $(RUN)
endif

page: .venv/done
	$(BIN)/python explore.py serve --network $(NETWORK)

ablations: .venv/done
	$(BIN)/python -m experiments.ablations

# One more than cores, since tests wait for processes, but at most four, and one for every 5 GB of memory.
WORKERS := $(shell n=$$(nproc); m=$$(awk '/MemTotal/ {print int($$2 / 5000000)}' /proc/meminfo); \
	n=$$((n < 3 ? n + 1 : 4)); echo $$((m < 1 ? 1 : m < n ? m : n)))

test: .venv/done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

lint: .venv/done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: .venv/done
	$(BIN)/python -m bench

gpu: .venv/done
	$(BIN)/python -m bench.gpu

.PHONY: demo pretrained page ablations test lint bench gpu
