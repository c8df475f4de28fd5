#!/usr/bin/env bash
# Makes .venv-peer, the Python environment of the peer, from requirements.txt. With the same requirements there, it does
# nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

requirements=tools/bench-peer/requirements.txt
venv=.venv-peer
# Written last, so that an install that was interrupted is done again.
if cmp -s "$requirements" "$venv/installed.txt"; then exit 0; fi

echo "bench-peer: installing the peer into $venv, 5 GB" >&2
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || ! python3 -c 'import venv, ensurepip'; then
  echo "bench-peer: Python 3.11 or newer with venv is needed: install python3 and python3-venv" >&2
  exit 1
fi
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --no-deps --requirement "$requirements"
cp "$requirements" "$venv/installed.txt"
