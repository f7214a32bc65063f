# Sets up what the examples and the tests run in: .venv with PyTorch, the CUTLASS headers and flash_kda. Sourced by examples/run.sh and
# tests/test.sh, with `set -euo pipefail`; needs bash and Python >= 3.9, and says what it does.
#
# `set_up` sets
#   $python   the environment's interpreter
#   $kernels  "yes" if flash_kda was built with its CUDA kernels: where there is a CUDA toolkit, or a Hopper GPU (then the toolkit's pip
#             packages are installed). FLASH_KDA_SKIP_CUDA_BUILD=1 says no.
# `install [pip's options] IMPORT_NAME=REQUIREMENT...` installs those that cannot be imported yet.
#
# A PyTorch that $PYTHON (python3) already has is used, so that nothing need be downloaded where it has the other packages too.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
# The CPU path is many small operations. Threads that spin between them take the cores from one another where something else runs too:
# 0.27 s became 20 s on two busy cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

say() {
    printf '== %s\n' "$*"
}

fail() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

pip_install() {
    "$python" -m pip install -qq "$@"
}

install() {
    local item options=() missing=()
    for item in "$@"; do
        case $item in
        -*) options+=("$item") ;;
        *) "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('${item%%=*}') is None)" || missing+=("${item#*=}") ;;
        esac
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "Installing ${missing[*]}"
    pip_install ${options[@]+"${options[@]}"} "${missing[@]}"
}

has_hopper_gpu() {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '9\.0' >/dev/null
}

# Where a script of the base interpreter can be imported from, one folder a line, if it has a PyTorch that we can use
lent_packages() {
    "$base" - "$1" <<'END' 2>/dev/null
import site
import sys

import torch

version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if version < (2, 4) or (sys.argv[1] == "cuda" and not torch.version.cuda):
    sys.exit(1)
print("\n".join(site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])))
END
}

make_venv() {
    if [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1; then
        say "Using the environment in .venv"
        return
    fi
    say "Making a virtual environment in .venv with $("$base" --version)"
    rm -rf "$root/.venv"
    if ! "$base" -m venv "$root/.venv" >/dev/null 2>&1; then
        # Debian's Python comes without the pip to put into new environments
        rm -rf "$root/.venv"
        "$base" -m venv --without-pip "$root/.venv" || fail "$base cannot make a virtual environment"
    fi
    local site_packages folders
    site_packages=$("$python" -c 'import site; print(site.getsitepackages()[0])')
    if folders=$(lent_packages "$(has_hopper_gpu && echo cuda || echo any)"); then
        say "Using the PyTorch that $base has"
        printf '%s\n' "$folders" >"$site_packages/packages_of_the_base_interpreter.pth"
    fi
    "$python" -m pip --version >/dev/null 2>&1 || "$base" -m pip install --quiet --target "$site_packages" pip ||
        fail "$base cannot put pip into a virtual environment: install Python's venv module (Debian, Ubuntu: python3-venv)"
}

# The release of PyTorch for this machine. Those for CUDA have the major version of the toolkit; 2.8 is the last for Python 3.9. Without a toolkit
# any does: pip prefers a CPU build ("2.13.0+cpu"), which is far smaller, where its configuration has one.
torch_release() {
    if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 10))'; then
        echo 2.8.0
    elif [ "$kernels" = no ]; then
        echo 2.13.0
    elif "$python" "$root/toolchain.py" | grep '^CUDA 12' >/dev/null; then
        echo 2.10.0
    else
        echo 2.11.0
    fi
}

install_torch() {
    "$python" -c 'import torch' 2>/dev/null && return
    local release
    release=$(torch_release)
    say "Installing PyTorch $release; the first time this takes a minute or more"
    pip_install "torch==$release" numpy || {
        say "No PyTorch $release for this Python; installing the newest there is"
        pip_install 'torch>=2.4' numpy
    }
}

set_up() {
    cd "$root"
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "$base is not there: install Python 3.9 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || fail "Python 3.9 or newer is needed; $base is $("$base" --version 2>&1)"
    python=$root/.venv/bin/python
    make_venv
    # Programs of the base interpreter's packages (ninja), and ours before them
    PATH=$root/.venv/bin:$PATH:$(dirname "$("$base" -c 'import sys; print(sys.executable)')")

    kernels=yes
    local found
    if [ "${FLASH_KDA_SKIP_CUDA_BUILD:-0}" != 0 ]; then
        kernels=no
        say "FLASH_KDA_SKIP_CUDA_BUILD is set: the CPU path alone"
    elif ! found=$("$python" toolchain.py); then
        if has_hopper_gpu; then
            say "A Hopper GPU but no CUDA toolkit: installing the toolkit's pip packages"
            pip_install --ignore-installed 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2'
        else
            kernels=no
            say "No CUDA toolkit and no Hopper GPU: the CPU path alone, without compiling"
            printf '%s\n' "$found" | sed -n '1s/^/   /p'
        fi
    fi
    install_torch
    install setuptools=setuptools wheel=wheel
    if [ "$kernels" = yes ]; then
        "$python" toolchain.py | grep '^CUTLASS [0-9]' >/dev/null || install --no-deps cutlass_library=nvidia-cutlass==4.2.0.0
        command -v ninja >/dev/null || install ninja=ninja
        "$python" toolchain.py | sed 's/^/   /'
        say "Building flash_kda with its CUDA kernels (log: build/build.log)"
    else
        export FLASH_KDA_SKIP_CUDA_BUILD=1
        say "Installing flash_kda (log: build/build.log)"
    fi
    rm -rf build/lib* build/bdist*
    mkdir -p build
    "$python" -m pip install -v --no-build-isolation . >build/build.log 2>&1 || {
        tail -n 60 build/build.log >&2
        fail "flash_kda did not build; the whole log is build/build.log"
    }
}
