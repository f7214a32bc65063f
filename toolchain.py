"""Finds what the build needs: the CUDA toolkit, the CUTLASS headers and pybind11's headers.

Standard library only, so that setup.py, setup_clangd.sh, the set-up script of the examples and the tests can all use it before anything
is installed. `python toolchain.py` prints what it finds and exits with 1 where the CUDA toolkit is missing or too old.
"""
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent
MIN_CUDA = (12, 9)
MIN_CUTLASS = (4, 2)
SKIP_HINT = "Set FLASH_KDA_SKIP_CUDA_BUILD=1 to install the CPU path alone, without compiling."


class ToolchainError(RuntimeError):
    """Something the build needs is missing or too old; the message says what to install."""


class Cuda(NamedTuple):
    """A CUDA toolkit."""
    home: Path  # the toolkit's root; bin/nvcc lies under it
    version: Tuple[int, int]
    include_dirs: List[Path]  # as nvcc itself passes them to the host compiler
    library_dir: Path  # holds libcudart_static.a
    found_by: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


class Cutlass(NamedTuple):
    """A copy of the CUTLASS headers."""
    include_dir: Path
    version: Tuple[int, int]
    found_by: str


def _package_dirs(name: str) -> List[Path]:
    """Folders of an installed package (several for a namespace package), without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(path) for path in (spec.submodule_search_locations or [])] if spec else []


def _version_text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


# CUDA toolkit

def _nvcc_candidates(environ: Mapping[str, str], default: Path, nvidia_dirs: Sequence[Path]) -> Iterator[Tuple[str, Path]]:
    """(how it is found, path of an nvcc that may exist), in the order of preference."""
    if environ.get("CUDA_HOME"):
        yield "CUDA_HOME", Path(environ["CUDA_HOME"], "bin", "nvcc")
    for directory in filter(None, environ.get("PATH", "").split(os.pathsep)):
        yield "nvcc on PATH", Path(directory, "nvcc")
    yield str(default), default / "bin" / "nvcc"
    for directory in nvidia_dirs:
        # nvidia/cu13/bin/nvcc of the pip packages; the newest first
        for nvcc in sorted(directory.glob("cu*/bin/nvcc"), reverse=True):
            yield "the pip packages of the CUDA compiler", nvcc


def _ask_nvcc(nvcc: Path, found_by: str) -> Cuda:
    """What `nvcc` says of the toolkit that it belongs to. Raises ToolchainError where it does not run or is no nvcc.

    The file may be a link or a script that runs the real compiler, so its own path says nothing: a dry run names the real one's folder (TOP),
    its include folders and its library folders.
    """
    try:
        version_text, dry_run = (
            subprocess.run([str(nvcc)] + arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           universal_newlines=True, timeout=60).stdout
            for arguments in (["--version"], ["--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError("{} does not run: {}".format(nvcc, error))
    release = re.search(r"release (\d+)\.(\d+)", version_text)
    settings: Dict[str, str] = dict(re.findall(r"^#\$ (TOP|INCLUDES|SYSTEM_INCLUDES|LIBRARIES) *= *(.*)$", dry_run, re.MULTILINE))
    if not release or "TOP" not in settings:
        last_line = (dry_run.strip().splitlines() or ["it says nothing"])[-1]
        raise ToolchainError("{} does not answer as nvcc does ({}); it needs a C++ compiler (g++) too".format(nvcc, last_line))

    def folders(names: Sequence[str]) -> List[Path]:
        words = (re.sub(r"^-[IL]", "", word) for name in names for word in shlex.split(settings.get(name, "")))
        found = (Path(os.path.normpath(word)) for word in words if word != "-isystem")
        return [folder for folder in found if folder.is_dir()]

    home = Path(os.path.normpath(settings["TOP"].strip()))
    libraries = folders(["LIBRARIES"]) + [home / "lib64", home / "lib"]
    library_dir = next((folder for folder in libraries if (folder / "libcudart_static.a").is_file()), None)
    include_dirs = folders(["INCLUDES", "SYSTEM_INCLUDES"])
    if not any((folder / "cuda_runtime.h").is_file() for folder in include_dirs) or library_dir is None:
        raise ToolchainError("{} has no CUDA runtime beside it (cuda_runtime.h, libcudart_static.a)".format(nvcc))
    if not any((folder / "cuda/std/utility").is_file() for folder in include_dirs):
        raise ToolchainError("{} has no CUDA C++ core libraries beside it (cuda/std)".format(nvcc))
    return Cuda(home, (int(release.group(1)), int(release.group(2))), include_dirs, library_dir, found_by)


def find_cuda(environ: Optional[Mapping[str, str]] = None, default: Path = Path("/usr/local/cuda"),
              nvidia_dirs: Optional[Sequence[Path]] = None) -> Cuda:
    """The CUDA toolkit to build with: CUDA_HOME; nvcc on PATH; /usr/local/cuda; the pip packages of the CUDA compiler.

    The first that works and is new enough is taken; `found_by` names those passed over.
    Raises ToolchainError, which tells what was found and what to install.
    """
    environ = os.environ if environ is None else environ
    nvidia_dirs = _package_dirs("nvidia") if nvidia_dirs is None else nvidia_dirs
    rejected: List[str] = []
    for found_by, nvcc in _nvcc_candidates(environ, default, nvidia_dirs):
        if not nvcc.is_file():
            if found_by == "CUDA_HOME":
                rejected.append("CUDA_HOME is {}, which has no bin/nvcc".format(environ["CUDA_HOME"]))
            continue
        try:
            cuda = _ask_nvcc(nvcc, "; passed over: ".join([found_by] + rejected))
        except ToolchainError as error:
            rejected.append(str(error))
            continue
        if cuda.version >= MIN_CUDA:
            return cuda
        rejected.append("CUDA {} in {} is too old".format(_version_text(cuda.version), cuda.home))
    raise ToolchainError("flash_kda needs the CUDA toolkit, {minimum} or newer, to compile its kernels; {found}.\n"
                         "Install it (or set CUDA_HOME to where it is), or take its pip packages:\n"
                         "    pip install \"cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2\"\n{skip}".format(
                             minimum=_version_text(MIN_CUDA), found="; ".join(rejected) or "no nvcc was found", skip=SKIP_HINT))


# CUTLASS headers

def _cutlass_version(include_dir: Path) -> Optional[Tuple[int, int]]:
    """The version of the CUTLASS and CuTe headers in a folder; None where they are not there."""
    header = include_dir / "cutlass" / "version.h"
    if not header.is_file() or not (include_dir / "cute" / "tensor.hpp").is_file():
        return None
    macros = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(macros["MAJOR"]), int(macros["MINOR"])


def find_cutlass(environ: Optional[Mapping[str, str]] = None, root: Path = ROOT, wheel_dirs: Optional[Sequence[Path]] = None) -> Cutlass:
    """The CUTLASS headers: third_party/cutlass; CUTLASS_PATH (the repository or its include folder); the nvidia-cutlass wheel.

    Raises ToolchainError, which tells what was found and what to install.
    """
    environ = os.environ if environ is None else environ
    wheel_dirs = _package_dirs("cutlass_library") if wheel_dirs is None else wheel_dirs
    chosen = environ.get("CUTLASS_PATH")
    candidates = [("third_party/cutlass", root / "third_party" / "cutlass" / "include")]
    if chosen:
        candidates += [("CUTLASS_PATH", Path(chosen, "include")), ("CUTLASS_PATH", Path(chosen))]
    candidates += [("the nvidia-cutlass wheel", path / "source" / "include") for path in wheel_dirs]
    rejected = []
    for found_by, include_dir in candidates:
        version = _cutlass_version(include_dir)
        if version is not None and version >= MIN_CUTLASS:
            return Cutlass(include_dir.resolve(), version, found_by)
        if version is not None:
            rejected.append("CUTLASS {} in {} is too old".format(_version_text(version), include_dir))
    if chosen and not any(chosen in text for text in rejected):
        rejected.append("CUTLASS_PATH is {}, which has no include/cute".format(chosen))
    raise ToolchainError("flash_kda needs the headers of CUTLASS, {minimum} or newer; {found}.\n"
                         "Get them with one of\n"
                         "    git submodule update --init third_party/cutlass\n"
                         "    pip install --no-deps nvidia-cutlass==4.2.0.0\n"
                         "or set CUTLASS_PATH to a checkout of CUTLASS.\n{skip}".format(
                             minimum=_version_text(MIN_CUTLASS), found="; ".join(rejected) or "none were found", skip=SKIP_HINT))


# pybind11 headers

def find_pybind11() -> Path:
    """The include folder of pybind11: the package's own, or the copy that PyTorch ships. Raises ToolchainError where neither is there."""
    for include_dir in [path / "include" for name in ("pybind11", "torch") for path in _package_dirs(name)]:
        if (include_dir / "pybind11" / "pybind11.h").is_file():
            return include_dir.resolve()
    raise ToolchainError("flash_kda needs pybind11's headers: pip install pybind11\n" + SKIP_HINT)


def main() -> int:
    found = True
    for name, find in (("CUDA", find_cuda), ("CUTLASS", find_cutlass), ("pybind11", find_pybind11)):
        try:
            place = find()
        except ToolchainError as error:
            found = False if name == "CUDA" else found
            print("{}: {}".format(name, error))
            continue
        if isinstance(place, Path):
            print("{}: {}".format(name, place))
        else:
            print("{} {} in {} ({})".format(name, _version_text(place.version), place[0], place.found_by))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
