#!/usr/bin/env bash
# Sets everything up (see examples/setup_env.sh) and runs the tests. Arguments go to pytest, files as they are called in this folder.
# Without a Hopper GPU the tests that need one are skipped, without a CUDA toolkit those of the kernels' build too; the summary counts both.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup_env.sh"
set_up
install pytest=pytest
install matplotlib=matplotlib || say "It cannot be installed here: the test of the benchmark's plot will be skipped"

# The flash-linear-attention releases that tests/test_fla.py runs, each in a folder of its own
for version in 0.5.0 0.5.1 0.5.2 0.6.0; do
    folder=$root/.venv/fla/$version
    [ -d "$folder/fla" ] && continue
    say "Installing flash-linear-attention $version for its tests"
    pip_install --retries 1 --no-deps --target "$folder" "flash-linear-attention==$version" "fla-core==$version" einops 2>/dev/null ||
        say "It cannot be installed here: its tests will be skipped"
done

# From tests/, so that the installed package is tested and not the folder flash_kda/ beside it
cd "$root/tests"
if [ "$kernels" = yes ]; then
    "$python" -c 'import flash_kda._C' || fail "the build left no flash_kda._C"
fi
if has_hopper_gpu; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "PyTorch does not see the Hopper GPU: the tests that need it would be skipped"
else
    say "No Hopper GPU: the tests that need one are skipped"
fi
say "Running the tests"
"$python" -m pytest -rs "$@"
