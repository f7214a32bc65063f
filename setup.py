"""Builds flash_kda and its CUDA kernels: `pip install -v --no-build-isolation .`

Environment:
    FLASH_KDA_CUDA_ARCHS       architectures to compile for, separated by ';' or ','; "90a" by default, the only one that the
                               kernels run on
    FLASH_KDA_SKIP_CUDA_BUILD  "1" installs the Python package alone (the CPU path), without compiling
    CUDA_HOME, CUTLASS_PATH    where the CUDA toolkit and the CUTLASS headers are, if not where toolchain.py finds them
    MAX_JOBS                   how many files to compile at a time (with ninja)
"""
import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import toolchain  # noqa: E402  (a PEP 517 build does not put the project's folder on the path)

DEFAULT_ARCHS = "90a"


def cuda_archs():
    """The list in FLASH_KDA_CUDA_ARCHS, as nvcc names them: ["90a"]."""
    archs = [arch for arch in re.split(r"[;,\s]+", os.environ.get("FLASH_KDA_CUDA_ARCHS") or DEFAULT_ARCHS) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            sys.exit("flash_kda: FLASH_KDA_CUDA_ARCHS holds {!r}; write architectures as in \"90a\", separated by ';'".format(arch))
    return list(dict.fromkeys(archs))


def nvcc_with_reports(cuda):
    """A folder that stands for the toolkit's: its bin/nvcc runs the real one and keeps what it prints.

    What ptxas says of csrc/sm90/fwd.cu (registers, spills, warnings) lands in build/ptxas/sm90-fwd.cu.log and stays there where ninja later
    compiles only other sources again; tests/test_build.py reads it.
    """
    home = ROOT / "build" / "cuda"
    wrapper = home / "bin" / "nvcc"
    reports = ROOT / "build" / "ptxas"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    reports.mkdir(parents=True, exist_ok=True)
    wrapper.write_text("""#!/bin/sh
# Written by setup.py: runs nvcc, shows what it prints and keeps it by the name of the source.
for argument; do
    [ "$previous" = -c ] && source=$argument
    previous=$argument
done
report={reports}/$(printf %s "${{source##*csrc/}}" | tr / -).log
{nvcc} "$@" >"$report" 2>&1
status=$?
cat "$report"
exit $status
""".format(reports=shlex.quote(str(reports)), nvcc=shlex.quote(str(cuda.nvcc))))
    wrapper.chmod(0o755)
    return home


def cuda_extension():
    """The extension module and the command that builds it, as arguments of setup()."""
    archs = cuda_archs()
    try:
        cuda, cutlass, pybind11 = toolchain.find_cuda(), toolchain.find_cutlass(), toolchain.find_pybind11()
    except toolchain.ToolchainError as error:
        sys.exit("\n" + str(error))
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        sys.exit("flash_kda: Python's headers are missing: install python3-dev.\n" + toolchain.SKIP_HINT)
    os.environ["CUDA_HOME"] = str(cuda.home)  # before torch looks for it
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit("flash_kda: PyTorch cannot be imported here ({}). Install it, then build against it:\n"
                 "    pip install --no-build-isolation .\n{}".format(error, toolchain.SKIP_HINT))
    if torch.version.hip:
        sys.exit("flash_kda: this PyTorch is built for ROCm; the kernels are for NVIDIA GPUs.\n" + toolchain.SKIP_HINT)
    print("flash_kda: CUDA {}.{} in {} ({})".format(*cuda.version, cuda.home, cuda.found_by))
    print("flash_kda: CUTLASS {}.{} in {} ({})".format(*cutlass.version, cutlass.include_dir, cutlass.found_by))
    print("flash_kda: compiling for {}".format(", ".join("sm_" + arch for arch in archs)), flush=True)

    # _C links nothing of PyTorch's, so PyTorch need not be built for this toolkit's CUDA version, nor for CUDA at all: what torch makes of the
    # environment is replaced by what was found, and its check of the versions dropped.
    cpp_extension.CUDA_HOME = str(nvcc_with_reports(cuda))
    cpp_extension._check_cuda_version = lambda *arguments: None
    os.environ["PYTORCH_NVCC"] = shlex.quote(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))  # ninja's command line is a shell's

    class BuildKernels(cpp_extension.BuildExtension):
        def build_extensions(self):
            if torch.version.cuda is None and Path(self.build_temp).exists():
                # A CPU build of PyTorch writes ninja files without the headers that a .cu includes: compile everything again
                shutil.rmtree(self.build_temp)
            super().build_extensions()

    system_includes = [flag for folder in [cutlass.include_dir, pybind11] + cuda.include_dirs for flag in ("-isystem", str(folder))]
    # PyTorch's defaults take the operators and conversions of half types away from CUTLASS
    undo = ["-U__CUDA_NO_{}__".format(name) for name in
            ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT16_OPERATORS")]
    nvcc_flags = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v,--warn-on-spills",
                  "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden"] + undo
    nvcc_flags += ["-gencode=arch=compute_{0},code=sm_{0}".format(arch) for arch in archs]
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".cu"))
    extension = cpp_extension.CUDAExtension(
        "flash_kda._C", sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh")),
        define_macros=[("FLASH_KDA_CUDA_ARCHS", '"{}"'.format(";".join(archs)))],
        extra_compile_args={"cxx": ["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"] + system_includes,
                            "nvcc": nvcc_flags + system_includes},
        # The CUDA runtime is linked in and kept to ourselves, so that one wheel serves PyTorch builds for any CUDA version
        extra_link_args=["-Wl,--exclude-libs,ALL"])
    extension.include_dirs = [str(ROOT / "csrc")]
    extension.library_dirs = [str(cuda.library_dir)]
    extension.libraries = ["cudart_static", "dl", "rt", "pthread"]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


# A source distribution, and the question what a build needs, do not compile
describes_only = bool({"sdist", "egg_info", "dist_info"} & set(sys.argv[1:]))
skip_cuda_build = os.environ.get("FLASH_KDA_SKIP_CUDA_BUILD", "0") not in ("", "0")
readme = ROOT / "README.md"

setup(
    name="flash_kda",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "flash_kda" / "__init__.py").read_text(), re.MULTILINE).group(1),
    description="Kimi Delta Attention (KDA), forward: CUDA kernels for NVIDIA Hopper and a CPU path",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["flash_kda"],
    python_requires=">=3.8",
    install_requires=["torch>=2.4"],
    **({} if skip_cuda_build or describes_only else cuda_extension()),
)
