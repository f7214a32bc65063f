#!/usr/bin/env bash
# compute-sanitizer's memcheck and racecheck over a small case of every variant of the CUDA path. Needs a Hopper GPU and the .venv that
# tests/test.sh makes (or another interpreter with flash_kda installed, in $PYTHON).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-../.venv/bin/python}

# An allocation a tensor: memcheck knows nothing of the tensors within a block of PyTorch's own.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# A stage goes from warps to warps and back to the copy engine by one mbarrier after another: an indirect dependency of the first and last.
for tool in "memcheck" "racecheck --racecheck-indirect-barrier-dependency"; do
    echo "== $tool"
    # shellcheck disable=SC2086  # two words
    compute-sanitizer --tool $tool --error-exitcode 1 "$python" sanitize.py
done
