#!/usr/bin/env bash
# Renders config/demo/prompts.jsonl on a farm that is started for it (one scheduler, two nodes of two devices) and
# always stopped after it. Leaves the clips and a contact sheet in out/. Can be run again: out/ is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=${CARGO_TARGET_DIR:-target}/release
prompts=config/demo/prompts.jsonl
out=out
ready_within=60 # seconds

started=$(date +%s)
rm -rf "$out/farm" "$out/farm.ready" "$out/farm.log" "$out/contact-sheet.png"
mkdir -p "$out"
rm -f "$out"/*.mp4

"$bin/farmctl" up --nodes 2 --devices cpu:2 --model assets/mochi-tiny --data "$out/farm" --listen 127.0.0.1:0 \
  >"$out/farm.ready" 2>"$out/farm.log" &
farm=$!
stop_farm() {
  kill "$farm" 2>/dev/null || true
  wait "$farm" 2>/dev/null || true
}
trap stop_farm EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

deadline=$(($(date +%s) + ready_within))
until grep -q '^farm ready' "$out/farm.ready"; do
  if ! kill -0 "$farm" 2>/dev/null || [ "$(date +%s)" -ge "$deadline" ]; then
    cat "$out/farm.log" >&2
    echo "demo: FAIL, the farm did not start within $ready_within s" >&2
    exit 1
  fi
  sleep 0.1
done
cat "$out/farm.ready"
address=$(sed -n 's|^farm ready at http://\([^ ]*\): .*|\1|p' "$out/farm.ready")

if ! "$bin/farmctl" --scheduler "$address" submit "$prompts" --wait --out "$out"; then
  echo "demo: FAIL, a clip was not rendered; the farm's log is $out/farm.log" >&2
  exit 1
fi
if ! tools/contact-sheet.sh "$prompts" "$out" "$out/contact-sheet.png"; then
  echo "demo: FAIL, the contact sheet cannot be made" >&2
  exit 1
fi
echo "demo: PASS, $(grep -c . "$prompts") clips and $out/contact-sheet.png in $(($(date +%s) - started)) s"
