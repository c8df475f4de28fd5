#!/usr/bin/env bash
# Makes .venv-cuda with NVRTC, the compiler of CUDA's kernels: tests compile them all, and need no GPU for it. With the
# version that is meant there, it does nothing. .cargo/config.toml tells the tests of .venv-cuda/libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

# Takes sm_80 to sm_121, and its machine code every driver for CUDA 13.
wanted="nvidia-cuda-nvrtc==13.0.88"
venv=.venv-cuda
# Written last, so that an install that was interrupted is done again.
if [ "$(cat "$venv/installed.txt" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

echo "nvrtc: installing $wanted into $venv, 90 MB" >&2
if ! python3 -c 'import venv, ensurepip'; then
  echo "nvrtc: Python with venv is needed: install python3 and python3-venv" >&2
  exit 1
fi
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$wanted"
libraries=("$venv"/lib/python3*/site-packages/nvidia/cu13/lib)
ln -s "${libraries[0]#"$venv/"}" "$venv/libraries"
[ -e "$venv/libraries/libnvrtc.so.13" ]
echo "$wanted" >"$venv/installed.txt"
