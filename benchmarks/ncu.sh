#!/usr/bin/env bash
# Profiles one benchmark row with Nsight Compute: DRAM bytes beside the floor's, duration, utilisation, stall reasons.
#
#   bash benchmarks/ncu.sh T8192-H96           # gate "random"
#   bash benchmarks/ncu.sh T8192-H96 slow
#
# Clocks are left as they are (the figures are then those of real runs); caches are flushed before every replay.
# PYTHON names the interpreter, python3 by default.
set -euo pipefail
if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: bash benchmarks/ncu.sh ROW [GATE]" >&2
    exit 2
fi
row=$1 gate=${2:-random}
profile=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/profile_row.py
python=${PYTHON:-python3}
if ! command -v ncu >/dev/null; then
    echo "ncu.sh: ncu is not on PATH; it comes with Nsight Compute, a part of the CUDA toolkit." >&2
    exit 1
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
echo "profiling $row, $gate gate" >&2
if ! ncu --clock-control none --cache-control all --profile-from-start off --csv --page raw --print-units base \
        --section WarpStateStats --metrics "$("$python" "$profile" metrics)" --log-file "$tmp/ncu.csv" \
        "$python" "$profile" run "$row" "$gate"; then
    cat "$tmp/ncu.csv" >&2
    echo "ncu.sh: ncu failed; where it says ERR_NVGPUCTRPERM, the driver reserves performance counters for administrators." >&2
    exit 1
fi
"$python" "$profile" table "$row" "$tmp/ncu.csv"
