#!/usr/bin/env bash
# Writes .clangd with this machine's CUDA, CUTLASS, pybind11 and Python include paths, so that clangd finds every include of every source.
# Run it again when one of them moves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python # where the examples and the tests install CUTLASS and pybind11
fi

"$python" - <<'END'
import json
import sys
import sysconfig

sys.path.insert(0, ".")
import toolchain

try:
    cuda, cutlass, pybind11 = toolchain.find_cuda(), toolchain.find_cutlass(), toolchain.find_pybind11()
except toolchain.ToolchainError as error:
    sys.exit(str(error))

system = [cutlass.include_dir, pybind11, sysconfig.get_path("include")] + cuda.include_dirs
flags = ["-std=c++17", "-Wall", "-Wextra", "-I" + str(toolchain.ROOT / "csrc"), '-DFLASH_KDA_CUDA_ARCHS="90a"']
flags += ["-isystem" + str(folder) for folder in system]
# clang knows fewer CUDA versions than there are; what it makes of a newer one is good enough to edit by
cuda_flags = ["-xcuda", "--cuda-path=" + str(cuda.home), "--cuda-gpu-arch=sm_90a", "-Wno-unknown-cuda-version"]
if not any((folder / "curand_mtgp32_kernel.h").is_file() for folder in cuda.include_dirs):
    # clang's CUDA wrapper includes it always and gives up on templates without it; an empty one does, since no source of ours uses cuRAND
    stub = toolchain.ROOT / "build" / "clangd"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "curand_mtgp32_kernel.h").write_text("")
    cuda_flags.append("-isystem" + str(stub))


def fragment(path_match, flags):
    lines = ["If:", "  PathMatch: " + json.dumps(path_match), "CompileFlags:", "  Add:"]
    return lines + ["    - " + json.dumps(flag) for flag in flags]


cuda_sources = r"csrc/.*\.cuh?|csrc/sm[0-9]+/.*\.h"  # headers of the kernels hold device code
# JSON's strings are YAML's too
with open(".clangd", "w") as file:
    file.write("# Written by setup_clangd.sh\n")
    file.write("\n---\n".join("\n".join(fragment(*pair)) for pair in ((r"csrc/.*", flags), (cuda_sources, cuda_flags))) + "\n")
print("Wrote .clangd: CUDA {}, CUTLASS {}, pybind11 {}".format(cuda.home, cutlass.include_dir, pybind11))
END
