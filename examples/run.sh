#!/usr/bin/env bash
# Sets everything up (see setup_env.sh) and runs a KDA layer over the bytes of FILE, the README by default:
#   bash examples/run.sh [FILE]
set -euo pipefail
file=
if [ $# -gt 0 ]; then
    [ -f "$1" ] && [ -r "$1" ] || { printf 'error: %s is not a file that can be read\n' "$1" >&2; exit 1; }
    file=$(cd "$(dirname -- "$1")" && pwd)/$(basename -- "$1")
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up
say "Running examples/run.py"
exec "$python" "$root/examples/run.py" ${file:+"$file"}
