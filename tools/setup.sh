#!/usr/bin/env bash
# Installs what building and testing need and is missing. Safe to run again: with everything there it does nothing.
set -euo pipefail

packages=(
  # ffmpeg's libraries, and the libclang that reads their headers at build time
  libavcodec-dev libavformat-dev libavutil-dev libswscale-dev libclang1-14 libclang-common-14-dev pkg-config
  # a C compiler for the crates that bring C sources
  gcc libc6-dev make
  # a C++ compiler for the CUDA kernels, which tests run on the processor
  g++
  # the ffmpeg and ffprobe programs check and show clips; the font labels the contact sheet
  ffmpeg fonts-dejavu-core
  # NVRTC, which compiles the CUDA kernels, comes in a wheel
  python3 python3-venv
  # tests put processes on hosts of their own (network namespaces)
  iproute2
  # tests of several schedulers start a Postgres of their own
  postgresql
  # crates are downloaded over https
  ca-certificates
)

installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing=()
if command -v dpkg-query >/dev/null; then
  for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
  done
else
  echo "setup: this is not a Debian system; make sure that you have: ${packages[*]}" >&2
fi

if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing ${missing[*]}"
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: run as root, or install sudo: ${missing[*]} are missing" >&2; exit 1; }
    as_root=(sudo)
  fi
  # Of Postgres only the programs are wanted: no cluster of the package's own, and no server that runs.
  clusters=/etc/postgresql-common/createcluster.conf
  if [ ! -e "$clusters" ]; then
    "${as_root[@]}" mkdir -p "${clusters%/*}"
    echo 'create_main_cluster = false' | "${as_root[@]}" tee "$clusters" >/dev/null
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# A rustup that was installed a moment ago is not on the PATH of the shell that did it.
if ! command -v cargo >/dev/null && [ ! -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
  echo "setup: cargo is missing; install Rust with rustup, see https://rustup.rs" >&2
  exit 1
fi
