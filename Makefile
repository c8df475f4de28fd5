# `make demo` and `make test` are all that a newcomer needs; both install what is missing.
# A rustup installed a moment ago is not on the PATH yet.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET)/release

.PHONY: setup build demo test nvrtc lint alone chaos sim bench peer bench-peer bench-onednn bench-compare bench-usp \
  bench-gpu bench-tiles bench-decode bench-overhead bench-sched clean

setup:
	@tools/setup.sh

build: setup
	cargo build --release --locked

# Renders config/demo/prompts.jsonl on a farm on this machine; clips and out/contact-sheet.png.
demo: build
	@tools/demo.sh

# All that CI runs. The programs are built first: tests over real processes start them.
test: setup nvrtc lint alone
	cargo build --workspace --locked
	if command -v cargo-nextest >/dev/null; then cargo nextest run --workspace --locked; \
	else cargo test --workspace --locked; fi

# The compiler of CUDA's kernels, in .venv-cuda: tests compile all kernels for all GPUs that are meant.
nvrtc: setup
	@tools/nvrtc.sh

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

# A workspace build unites the features of all crates; each program has to build without the others' help.
alone:
	cargo check --locked -p farmctl
	cargo check --locked -p farm-scheduler
	cargo check --locked -p farm-node --no-default-features
	cargo check --locked -p farm-bench

# What `make test` does a few times, many times: a group of four processes loses a rank, fifty times; a hundred clips are
# decoded by three nodes that are killed, paused, cut off, slowed down and lied to; five hundred clips while two schedulers,
# their database and four nodes are killed, paused and cut off for five minutes. Takes root.
chaos: setup
	cargo build --workspace --locked
	FARM_FAULTS=50 cargo test --locked -p farm-tests --test group_faults -- --nocapture
	FARM_DECODE_CLIPS=100 cargo test --locked -p farm-tests --test decode_faults -- --nocapture
	FARM_SCHEDULER_CLIPS=500 FARM_SCHEDULER_SECONDS=300 cargo test --locked -p farm-tests --test scheduler_faults -- --nocapture

# The scheduler's core under random faults: 20,000 schedules of 2 to 20 nodes and 20 of 10,000, at most ten minutes on
# two cores. Prints its seed; again with that one, and other options: make sim SIM="--seed 1 --schedules 100 --large 0".
sim: setup
	cargo run --release --locked -p farm-scheduler --example sim -- $(SIM)

# Where the time of one clip goes. Ends with one line of figures, and PASS or FAIL; keeps them in a file that it names.
bench: build
	$(BIN)/farm-bench clip

# The networks and a whole clip, here and in PyTorch, in turn, against the goals. The first time it installs PyTorch, 5 GB, in
# .venv-peer. Takes half an hour of an idle machine; a part of it: make bench-peer PEER="--case dit --threads 1 --rounds 5"
bench-peer: build peer $(TARGET)/bench-peer/made
	$(BIN)/farm-bench peer --files $(TARGET)/bench-peer $(PEER)

# Networks with random weights, inputs, and what PyTorch makes of them; 1 GB.
$(TARGET)/bench-peer/made: tools/bench-peer/make_cases.py tools/bench-peer/networks.py tools/bench-peer/requirements.txt | peer
	.venv-peer/bin/python tools/bench-peer/make_cases.py --out $(@D)
	touch $@

peer:
	@tools/bench-peer/setup.sh

# The same operations as `farm-node bench kernels` in oneDNN, on one core. Takes a C++ compiler and libdnnl-dev.
bench-onednn:
	mkdir -p $(TARGET)
	$(CXX) -O2 -std=c++17 -Wall -Wextra -o $(TARGET)/onednn tools/bench-peer/onednn.cpp -ldnnl
	OMP_NUM_THREADS=1 $(TARGET)/onednn

# What the working tree takes against another revision, which is built beside it: make bench-compare BASE=main. Options:
# COMPARE="--case clip --threads 2 --rounds 9". The networks take part once bench-peer has made them.
bench-compare: build
	@test -n "$(BASE)" || { echo "bench-compare: name a revision: make bench-compare BASE=main" >&2; exit 1; }
	$(BIN)/farm-bench compare --base "$(BASE)" --files $(TARGET)/bench-peer $(COMPARE)

# A denoising step on one and on two ranks, one pinned thread each, and the part of it that exchanges cost.
bench-usp: build
	$(BIN)/farm-node bench usp --model assets/mochi-tiny

# How far decodes in tiles are from the decode of the whole frame, in every mode. Some minutes; ends with PASS or FAIL.
bench-tiles: build
	$(BIN)/farm-node bench tiles --model assets/mochi-tiny

# What a GPU does with its time, at the published size with weights that are drawn on it: what it can do at most, and every
# kernel of each stage of a clip. Some minutes on a GPU. Options: make bench-gpu GPU="--num-frames 49 --steps 5 --json"
bench-gpu: build
	$(BIN)/farm-node bench gpu $(GPU)

# A clip's decode in one and in two processes of one thread, and the memory of the one that puts a large clip together.
bench-decode: build
	$(BIN)/farm-node bench decode --model assets/mochi-tiny
	$(BIN)/farm-node bench stitch

# The scheduler against its goals: decisions, ticks, gangs, a whole farm filled, rows, a long file, waits in a trace. Three
# minutes on idle cores; ends with all that failed. TRACE=lora_request_trace.csv takes the published trace in place of a
# synthetic one.
bench-sched: setup
	cargo build --release --locked -p farm-scheduler --features testing
	tools/bench-sched.sh $(BIN)/farm-scheduler $(TRACE)

# A clip of a minute, rendered by one process and by a farm of one node in turn, three times. Takes seven minutes.
bench-overhead: build
	cargo build --release --locked -p farm-tests --bin farm-overhead
	$(BIN)/farm-overhead

clean:
	cargo clean
	rm -rf out
