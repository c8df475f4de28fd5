#!/bin/sh
# The whole chain, from nothing to a checkpoint, in about MINUTES (default 10) of one core. At 10 the losses fall and the
# chain is proven; the bundled checkpoint took about 100.
#
#     MINUTES=10 OUT=out/train-tiny PYTHON=python3 ./run.sh
set -eu
MINUTES=${MINUTES:-10}
OUT=${OUT:-out/train-tiny}
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS=ignore
here=$(cd "$(dirname "$0")" && pwd)

part() { # share of the time, in percent -> minutes
    awk "BEGIN { print $MINUTES * $1 / 100 }"
}
step() {
    echo "== $*"
    script=$1
    shift
    "$PYTHON" "$here/$script" "$@"
}

mkdir -p "$OUT"
step make_tokenizer.py "$OUT/tokenizer"
step train_vae.py "$OUT/vae-small" --minutes "$(part 37)"
step encode_data.py "$OUT/vae-small" "$OUT/latents.safetensors" --clips "$(awk "BEGIN { print int(24 * $MINUTES) }")"
step train_decoder.py "$OUT/vae-small" "$OUT/vae" --minutes "$(part 16)"
step train_dit.py "$OUT/latents.safetensors" "$OUT/tokenizer" "$OUT/dit" --minutes "$(part 34)"
step assemble.py "$OUT/vae" "$OUT/dit" "$OUT/tokenizer" "$OUT/checkpoint"
step evaluate.py "$OUT/checkpoint" --clips 36 --sheet "$OUT/sheet.png"
