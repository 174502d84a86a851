# Everything runs in .venv, made on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env test test-fast lint demo clean recipes

env: $(STAMP)

# uv picks matching builds of torch and torchvision; plain pip may not (see constraints.txt).
# Bytecode is compiled once: without it, where Python may not write any, a command takes 8 seconds
# to load what it loads in 3.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q -p $(BIN)/python -c constraints.txt --compile-bytecode \
	  -e ".[test,mmdet]"
	touch $@

# A process for each core, up to four; a file's tests stay together, for what they share.
test: env
	YOLO_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The unit tests: what to run while working. Folders without any are not even looked at.
test-fast: env
	YOLO_OFFLINE=1 $(BIN)/python -m pytest -m unit -n auto --maxprocesses 4 --dist loadfile \
	  --ignore=tests/e2e --ignore=tests/unit/integrations

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: env
	$(BIN)/dfq demo

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# Heavy runs on real data, written up in docs/RESULTS.md; KIT is the folder of images and networks.
KIT ?= ../shared/kit
BENCH ?= runs/bench
WORKERS ?= 1
# What scripts/fine_tuned.py makes.
FINE_TUNED := demo-dark demo-pale demo-grey demo-crowded
FINE_TUNED += yolov5n-dark yolov5n-grey yolov5n-pale yolov5n-bluish

.PHONY: bench-zero-shot bench-demo bench-synthesis bench-synthesis-ablation bench-synthesis-curve
.PHONY: bench-qat bench-qat-step bench-rounding bench-kernels bench-evaluation bench-networks
.PHONY: bench-mmdet bench-mmdet-full bench-mmdet-runner bench-calibration-sets
.PHONY: bench-runtimes bench-gpu bench-ptq bench-paper

bench-zero-shot: env
	$(BIN)/python -m benchmarks.accuracy.zero_shot --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --train $(KIT)/coco-train --val $(KIT)/coco-val --out $(BENCH)/zero-shot --images 512

bench-demo: env
	$(BIN)/python -m scripts.train_demo_detector --evaluate 200

bench-synthesis: env
	$(BIN)/python -m benchmarks.speed.synthesis_loop --model $(KIT)/weights/yolov5n-coco/yolov5n.pt
	$(BIN)/python -m benchmarks.speed.synthesis_loop --model yolo11n.yaml

# Under eight minutes on a GPU.
bench-gpu: env
	$(BIN)/python -m benchmarks.speed.gpu --kit $(KIT) --out $(BENCH)/speed

# An hour on one core; what is there already is not made again.
bench-synthesis-ablation: env
	$(BIN)/python -m benchmarks.synthesis.ablation --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --real $(KIT)/coco-train --out $(BENCH)/synthesis-ablation

# The paper's schedule takes hours; what is there is not made again.
bench-synthesis-curve: env
	$(BIN)/python -m benchmarks.synthesis.curve --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --real $(KIT)/coco-train --out $(BENCH)/curve

# Low-bit networks from synthetic images, photographs and noise, of the kit's networks and of
# fine-tuned ones, which are trained first: hours on one core. Goes on where it stopped.
bench-networks: env
	$(BIN)/python -m scripts.fine_tuned --yolov5n $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --photos $(KIT)/coco-train --out $(BENCH)/fine-tuned
	$(BIN)/python -m benchmarks.accuracy.networks --network demo \
	  --network coco=$(KIT)/weights/yolov5n-coco/yolov5n.pt --labelled coco=$(KIT)/coco-val \
	  --network face=$(KIT)/weights/yolov5n-face/yolov5n.pt \
	  --network ball=$(KIT)/weights/yolov9t-ball/yolov9t.pt \
	  $(foreach name,$(FINE_TUNED),--network $(name)=$(BENCH)/fine-tuned/$(name).safetensors) \
	  --photos $(KIT)/coco-val --photos $(KIT)/voc --real $(KIT)/coco-train \
	  --out $(BENCH)/networks --workers $(WORKERS)

# Ten minutes on one core, most of them to compile.
bench-kernels: env
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed.kernels

# SET: any calibration set, say of bench-zero-shot.
bench-rounding: env
	$(BIN)/python -m benchmarks.speed.rounding --model $(KIT)/weights/yolov5n-coco/yolov5n.pt --data $(SET)

bench-evaluation: env
	$(BIN)/python -m benchmarks.speed.evaluation --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --data $(KIT)/coco-val --size 320 --images 128 --rounds 7

# Days on two cores at 640 px: choose with BENCH_QAT="--size 320 --rows w4a8 --columns ours,lsq-real".
bench-qat: env
	$(BIN)/python -m benchmarks.accuracy.qat --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --train $(KIT)/coco-train --val $(KIT)/coco-val --out $(BENCH)/qat $(BENCH_QAT)

# Reconstruction methods by widths, on a synthetic set of 256 images and on photographs.
bench-ptq: env
	$(BIN)/dfq synthesize --model $(KIT)/weights/yolov5n-coco/yolov5n.pt --images 256 \
	  --image-size 320 --out $(BENCH)/ptq/set
	for data in $(BENCH)/ptq/set $(KIT)/coco-train; do $(BIN)/python -m benchmarks.ptq.reconstruction \
	  --model $(KIT)/weights/yolov5n-coco/yolov5n.pt --data $$data --photos $(KIT)/coco-train \
	  --val $(KIT)/coco-val --out $(BENCH)/ptq/$$(basename $$data) || exit; done

# Tables and figures of the paper, scaled down; with PAPER= its whole protocol, which takes weeks on a
# CPU. Goes on where it stopped; PAPER_TABLES="--tables labels,stages" chooses.
PAPER ?= --images 256 --iterations 500 --epochs 20 --size 320
PAPER_ON = --model $(KIT)/weights/yolov5n-coco/yolov5n.pt --real $(KIT)/coco-train \
  --val $(KIT)/coco-val --out $(BENCH)/paper $(PAPER)
bench-paper: env
	$(BIN)/python -m benchmarks.paper.tables $(PAPER_ON) $(PAPER_TABLES)
	$(BIN)/python -m benchmarks.paper.figures $(PAPER_ON) \
	  --family face=$(KIT)/weights/yolov5n-face/yolov5n.pt \
	  --family ball=$(KIT)/weights/yolov9t-ball/yolov9t.pt

bench-qat-step: env
	$(BIN)/python -m benchmarks.speed.qat_step --model $(KIT)/weights/yolov5n-coco/yolov5n.pt

# Trains small two-stage detectors first, or goes on where that stopped.
bench-mmdet: env
	$(BIN)/python -m benchmarks.mmdet.small_networks --out $(BENCH)/mmdet

# Once through everything at full size, random weights; time and memory of each step.
bench-mmdet-full: env
	$(BIN)/python -m benchmarks.mmdet.full_size --data $(KIT)/coco-val --out $(BENCH)/mmdet-full

# After bench-mmdet: the same training by mmdet's own script, in one process and in two.
bench-mmdet-runner: env
	$(BIN)/python -m benchmarks.mmdet.runner --bench $(BENCH)/mmdet --out $(BENCH)/mmdet-runner

# The quantizers of onnxruntime and NNCF, each on noise, synthetic images and photographs.
CALIBRATION := $(BENCH)/calibration-sets
bench-calibration-sets: env
	for seed in 0 1; do $(BIN)/dfq synthesize --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --images 64 --image-size 320 --seed $$seed --out $(CALIBRATION)/synthetic-$$seed || exit; done
	$(BIN)/dfq synthesize --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --images 64 --image-size 320 --init uniform --iterations 0 --labels none \
	  --out $(CALIBRATION)/noise
	$(BIN)/python -m benchmarks.runtimes.calibration_sets --size 320 \
	  --model $(KIT)/weights/yolov5n-coco/yolov5n.pt --data $(KIT)/coco-val \
	  --set noise=$(CALIBRATION)/noise --set synthetic-0=$(CALIBRATION)/synthetic-0 \
	  --set synthetic-1=$(CALIBRATION)/synthetic-1 --set photos-64=$(KIT)/coco-train \
	  --first photos-64=64 --set photos-178=$(KIT)/coco-train --out $(CALIBRATION)/files

# After bench-calibration-sets, whose sets it takes: runtimes' own quantizers and ours, their AP and
# time. RUNTIMES="--mixed RUN" for one with mixed bits. Goes on where it stopped.
bench-runtimes: env
	$(BIN)/python -m benchmarks.runtimes.baselines --model $(KIT)/weights/yolov5n-coco/yolov5n.pt \
	  --data $(KIT)/coco-val --size 320 --ours synthetic-0 \
	  --set synthetic-0=$(CALIBRATION)/synthetic-0 --set photos-64=$(KIT)/coco-train \
	  --first photos-64=64 --set noise=$(CALIBRATION)/noise --set photos-178=$(KIT)/coco-train \
	  --out $(BENCH)/runtimes $(RUNTIMES)

# recipes/default.yaml, from the docstrings of the settings.
recipes: env
	$(BIN)/python -c "import dfq.recipe.text as t; print(t.default_text(), end='')" > recipes/default.yaml.new
	mv recipes/default.yaml.new recipes/default.yaml
