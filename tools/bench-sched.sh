#!/usr/bin/env bash
# All benchmarks of the scheduler, one after the other. Arguments: the program and, if it is at hand, the trace's file.
set -u
program=$1
trace=${2:+--file $2}
failed=()
bench() {
    "$program" bench "$@" || failed+=("$*")
}
bench plan
bench tick
bench kueue
bench fill
bench fill --postgres
bench store
bench store --postgres
bench submit
# shellcheck disable=SC2086 # two words or none
bench trace $trace
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAIL %s\n' "${failed[@]}"
    exit 1
fi
echo "PASS: all goals are met"
