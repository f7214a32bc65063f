"""The build: how the toolkit and the headers are found, what the wheel holds, what ptxas said of the kernels, what the library links."""
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Not by sys.path: the repository's own flash_kda/, which holds no compiled module, would hide the installed one
spec = importlib.util.spec_from_file_location("toolchain", str(ROOT / "toolchain.py"))
toolchain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toolchain)

CSRC = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".cu", ".h", ".cuh"))
CUDA_SOURCES = [path for path in CSRC if path.suffix == ".cu"]
CPP_SOURCES = [path for path in CSRC if path.suffix == ".cpp"]


def relative(path):
    return str(path.relative_to(ROOT / "csrc"))


def extension_path():
    spec = importlib.util.find_spec("flash_kda._C")
    return Path(spec.origin) if spec else None


needs_kernels = pytest.mark.skipif(extension_path() is None, reason="flash_kda is built without CUDA kernels")


# Finding the CUDA toolkit

def make_toolkit(home, version="13.0"):
    """A folder that looks like a CUDA toolkit, with an nvcc that says what the real one says of itself."""
    for name in ("include/cuda_runtime.h", "include/cccl/cuda/std/utility", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("")
    return write_script(home / "bin" / "nvcc", """
here=$(dirname "$(readlink -f "$0")")
case "$1" in
--version) echo "Cuda compilation tools, release {0}, V{0}.88" ;;
--dryrun)
    echo "#\\$ _HERE_=$here"
    echo "#\\$ TOP=$here/.."
    echo "#\\$ INCLUDES=\\"-I$here/../include\\"  "
    echo "#\\$ SYSTEM_INCLUDES=\\"-isystem\\" \\"$here/../include/cccl\\"  "
    echo "#\\$ LIBRARIES=  \\"-L$here/../lib64\\""
    ;;
esac >&2
""".format(version))


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def find_cuda(tmp_path, path=(), home=None, pip=()):
    """find_cuda on a machine that holds what the test made and nothing else."""
    environ = {"PATH": os.pathsep.join(map(str, path))}
    if home:
        environ["CUDA_HOME"] = str(home)
    return toolchain.find_cuda(environ, default=tmp_path / "default", nvidia_dirs=list(pip))


def test_cuda_home_comes_first(tmp_path):
    for name in ("chosen", "other", "default"):
        make_toolkit(tmp_path / name)
    cuda = find_cuda(tmp_path, path=[tmp_path / "other/bin"], home=tmp_path / "chosen")
    assert cuda.home == tmp_path / "chosen"
    assert cuda.version == (13, 0)
    assert cuda.include_dirs == [tmp_path / "chosen/include", tmp_path / "chosen/include/cccl"]
    assert cuda.library_dir == tmp_path / "chosen/lib64"
    assert cuda.nvcc == tmp_path / "chosen/bin/nvcc"


def test_nvcc_on_path_comes_before_the_default(tmp_path):
    make_toolkit(tmp_path / "with space")
    make_toolkit(tmp_path / "default")
    assert find_cuda(tmp_path, path=[tmp_path / "empty", tmp_path / "with space/bin"]).home == tmp_path / "with space"


def test_nvcc_on_path_behind_a_wrapper(tmp_path):
    nvcc = make_toolkit(tmp_path / "real")
    write_script(tmp_path / "wrapper/nvcc", 'exec "{}" "$@"\n'.format(nvcc))
    cuda = find_cuda(tmp_path, path=[tmp_path / "wrapper"])
    assert (cuda.home, cuda.library_dir) == (tmp_path / "real", tmp_path / "real/lib64")


def test_nvcc_on_path_behind_a_link(tmp_path):
    nvcc = make_toolkit(tmp_path / "real")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/nvcc").symlink_to(nvcc)
    assert find_cuda(tmp_path, path=[tmp_path / "links"]).home == tmp_path / "real"


def test_default_comes_before_the_pip_packages(tmp_path):
    make_toolkit(tmp_path / "default")
    make_toolkit(tmp_path / "site/nvidia/cu13")
    assert find_cuda(tmp_path, pip=[tmp_path / "site/nvidia"]).home == tmp_path / "default"


def test_pip_packages(tmp_path):
    make_toolkit(tmp_path / "site/nvidia/cu13")
    cuda = find_cuda(tmp_path, pip=[tmp_path / "site/nvidia"])
    assert cuda.home == tmp_path / "site/nvidia/cu13"
    assert "pip packages" in cuda.found_by


def test_a_toolkit_that_is_too_old_is_passed_over(tmp_path):
    make_toolkit(tmp_path / "old", "12.8")
    make_toolkit(tmp_path / "default", "12.9")
    cuda = find_cuda(tmp_path, path=[tmp_path / "old/bin"])
    assert (cuda.home, cuda.version) == (tmp_path / "default", (12, 9))
    assert "CUDA 12.8" in cuda.found_by


def test_a_toolkit_without_its_runtime_is_passed_over(tmp_path):
    make_toolkit(tmp_path / "bare")
    (tmp_path / "bare/lib64/libcudart_static.a").unlink()
    make_toolkit(tmp_path / "default")
    assert find_cuda(tmp_path, home=tmp_path / "bare").home == tmp_path / "default"


@pytest.mark.parametrize("case, told", [("none", "no nvcc was found"), ("old", "CUDA 12.4 in"), ("home", "has no bin/nvcc"),
                                        ("broken", "does not answer as nvcc does"), ("no runtime", "no CUDA runtime")])
def test_without_a_toolkit_the_message_says_what_to_do(tmp_path, case, told):
    environ = {}
    if case == "old":
        make_toolkit(tmp_path / "default", "12.4")
    elif case == "home":
        environ["home"] = tmp_path / "nowhere"
    elif case == "broken":
        write_script(tmp_path / "default/bin/nvcc", "echo what?\n")
    elif case == "no runtime":
        make_toolkit(tmp_path / "default")
        (tmp_path / "default/include/cuda_runtime.h").unlink()
    with pytest.raises(toolchain.ToolchainError) as error:
        find_cuda(tmp_path, **environ)
    for text in (told, "12.9 or newer", "pip install", "FLASH_KDA_SKIP_CUDA_BUILD=1"):
        assert text in str(error.value)


# Finding CUTLASS

def make_cutlass(include_dir, version="4.2"):
    (include_dir / "cute").mkdir(parents=True)
    (include_dir / "cutlass").mkdir()
    (include_dir / "cute/tensor.hpp").write_text("")
    (include_dir / "cutlass/version.h").write_text("#define CUTLASS_MAJOR {}\n#define CUTLASS_MINOR {}\n".format(*version.split(".")))


def find_cutlass(tmp_path, path=None):
    return toolchain.find_cutlass({"CUTLASS_PATH": str(path)} if path else {}, root=tmp_path, wheel_dirs=[tmp_path / "site/cutlass_library"])


def test_cutlass_order(tmp_path):
    make_cutlass(tmp_path / "site/cutlass_library/source/include")
    assert find_cutlass(tmp_path).include_dir == tmp_path / "site/cutlass_library/source/include"
    make_cutlass(tmp_path / "checkout/include", "4.3")
    for path in (tmp_path / "checkout", tmp_path / "checkout/include"):
        cutlass = find_cutlass(tmp_path, path)
        assert (cutlass.include_dir, cutlass.version) == (tmp_path / "checkout/include", (4, 3))
    make_cutlass(tmp_path / "third_party/cutlass/include")
    assert find_cutlass(tmp_path, tmp_path / "checkout").include_dir == tmp_path / "third_party/cutlass/include"


def test_cutlass_that_is_too_old_is_passed_over(tmp_path):
    make_cutlass(tmp_path / "third_party/cutlass/include", "3.8")
    make_cutlass(tmp_path / "site/cutlass_library/source/include", "4.2")
    assert find_cutlass(tmp_path).include_dir == tmp_path / "site/cutlass_library/source/include"


@pytest.mark.parametrize("path, told", [(None, "none were found"), ("old", "CUTLASS 3.8 in"), ("empty", "has no include/cute")])
def test_without_cutlass_the_message_says_what_to_do(tmp_path, path, told):
    make_cutlass(tmp_path / "old/include", "3.8")
    with pytest.raises(toolchain.ToolchainError) as error:
        find_cutlass(tmp_path, path and tmp_path / path)
    for text in (told, "git submodule update --init", "nvidia-cutlass", "CUTLASS_PATH"):
        assert text in str(error.value)


# Packaging

@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, so that building leaves nothing in the repository."""
    copy = tmp_path / "tree with space"
    copy.mkdir()
    for name in ("setup.py", "toolchain.py", "setup_clangd.sh", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(str(ROOT / name), str(copy))
    for name in ("csrc", "flash_kda"):
        shutil.copytree(str(ROOT / name), str(copy / name), ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if (ROOT / "third_party").is_dir():
        (copy / "third_party").symlink_to(ROOT / "third_party")
    return copy


def run_setup(tree, *arguments, **environ):
    return subprocess.run([sys.executable, "setup.py"] + list(arguments), cwd=str(tree), env=dict(os.environ, **environ),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)


def test_skipping_the_cuda_build_makes_a_pure_python_wheel(tree):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "."]
    done = subprocess.run(command, cwd=str(tree), env=dict(os.environ, FLASH_KDA_SKIP_CUDA_BUILD="1", CUDA_HOME="/nowhere"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.startswith("flash_kda-") and wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(str(wheel)) as files:
        names = set(files.namelist())
        metadata = files.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {"flash_kda/" + path.name for path in (ROOT / "flash_kda").glob("*.py")} <= names
    assert not any("_C" in name for name in names)
    assert re.search(r"^Requires-Dist: torch ?\(?>=2\.4", metadata, re.MULTILINE)
    assert "Requires-Python: >=3.8" in metadata
    version = re.search(r'__version__ = "(.+)"', (ROOT / "flash_kda/__init__.py").read_text()).group(1)
    assert "\nVersion: {}\n".format(version) in metadata


def test_source_distribution_holds_what_the_build_reads(tree):
    done = run_setup(tree, "sdist", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stdout
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(str(archive)) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    read = CSRC + [ROOT / name for name in ("toolchain.py", "setup.py", "pyproject.toml", "LICENSE")]
    assert {str(path.relative_to(ROOT)) for path in read} <= names


def test_an_unknown_architecture_is_refused(tree):
    done = run_setup(tree, "bdist_wheel", FLASH_KDA_CUDA_ARCHS="90a;hopper", FLASH_KDA_SKIP_CUDA_BUILD="0")
    assert done.returncode != 0
    assert "FLASH_KDA_CUDA_ARCHS holds 'hopper'" in done.stdout


# The sources

def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", CSRC, ids=relative)
def test_no_source_includes_pytorch(path):
    assert not [name for _, name in includes(path) if re.match(r"(torch|ATen|c10|caffe2)/", name)]


@needs_kernels
@pytest.mark.parametrize("path", CPP_SOURCES, ids=relative)
def test_the_cpp_sources_compile_without_warnings(path):
    folders = [toolchain.find_pybind11(), toolchain.find_cutlass().include_dir, sysconfig.get_path("include")]
    command = ["c++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-c", "-o", os.devnull, str(path),
               "-I" + str(ROOT / "csrc"), '-DFLASH_KDA_CUDA_ARCHS="90a"']
    command += ["-isystem" + str(folder) for folder in folders + toolchain.find_cuda().include_dirs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout


def compiler_search_paths():
    """Where the C++ compiler looks for its own headers."""
    text = subprocess.run(["c++", "-E", "-x", "c++", "-v", os.devnull], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, check=True).stdout
    return [line.strip() for line in text.split("search starts here:\n")[-1].split("End of search list")[0].splitlines()]


def test_clangd_finds_every_include_of_every_source(tree):
    try:
        toolchain.find_cuda(), toolchain.find_cutlass(), toolchain.find_pybind11()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error).splitlines()[0])
    done = subprocess.run(["bash", "setup_clangd.sh"], cwd=str(tree), env=dict(os.environ, PYTHON=sys.executable),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout
    flags = [json.loads(text) for text in re.findall(r"^    - (.*)$", (tree / ".clangd").read_text(), re.MULTILINE)]
    folders = [re.sub("^(-I|-isystem)", "", flag) for flag in flags if flag.startswith(("-I", "-isystem"))] + compiler_search_paths()
    assert str(tree / "csrc") in folders
    for path in sorted((tree / "csrc").glob("**/*.*")):
        for quote, name in includes(path):
            places = ([path.parent] if quote == '"' else []) + [Path(folder) for folder in folders]
            assert any((place / name).is_file() for place in places), "{} includes {}".format(path.name, name)


# What ptxas said of the kernels

def read_report(text):
    """(kernels and their spilled bytes, other complaints) in what nvcc and ptxas print with -Xptxas=-v."""
    kernels = {}
    for entry in re.split(r"Compiling entry function '", text)[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        kernels[entry.split("'")[0]] = sum(map(int, spills.groups())) if spills else None
    # C75xx: the compiler serialised wgmma or could not honour setmaxnreg. Any other complaint says 'warning'.
    complaints = [line for line in text.splitlines() if re.search(r"warning|\bC75\d\d\b|Potential Performance Loss", line, re.IGNORECASE)]
    return kernels, complaints


def test_read_report_sees_spills_and_complaints():
    kernels, complaints = read_report("""
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in function '_Z1av'
ptxas warning : Registers are spilled to local memory in function '_Z1av', 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    16 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
""")
    assert kernels == {"_Z1av": 24, "_Z1bv": 0}
    assert len(complaints) == 2


def report_of(source):
    path = ROOT / "build" / "ptxas" / (relative(source).replace(os.sep, "-") + ".log")
    assert path.is_file(), "the build left no report {}: build with `pip install --no-build-isolation .` in this folder".format(path)
    return path.read_text()


@needs_kernels
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=relative)
def test_no_kernel_spills_and_the_compiler_complains_of_none(source):
    kernels, complaints = read_report(report_of(source))
    assert not complaints
    assert all(spilled == 0 for spilled in kernels.values()), kernels


@needs_kernels
def test_the_reports_cover_every_kernel_of_the_library():
    reported = {name for source in CUDA_SOURCES for name in read_report(report_of(source))[0]}
    # The host side registers each kernel by its mangled name, which lies in the library as a string, behind whatever other constant; so do variables of CUDA's headers
    names = {match.decode() for match in re.findall(rb"_Z[A-Za-z0-9_$.]+(?=\0)", Elf(extension_path()).section(".rodata"))}
    assert reported
    assert {name for name in names if "_INTERNAL_" not in name or name in reported} == reported


# What the library links

class Elf:
    """As much of a 64-bit little-endian ELF file as the tests ask for."""

    def __init__(self, path):
        self.data = Path(path).read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01"
        offset, = struct.unpack_from("<Q", self.data, 0x28)
        size, count, names = struct.unpack_from("<HHH", self.data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", self.data, offset + size * index) for index in range(count)]
        self.sections = {self._text(headers[names][4] + header[0]): header for header in headers}

    def _text(self, offset):
        return self.data[offset:self.data.index(b"\0", offset)].decode()

    def section(self, name):
        _, _, _, _, offset, size = self.sections[name]
        return self.data[offset:offset + size]

    def needed(self):
        """The libraries that the dynamic loader must find."""
        strings = self.sections[".dynstr"][4]
        entries = struct.iter_unpack("<QQ", self.section(".dynamic"))
        return [self._text(strings + value) for tag, value in entries if tag == 1]

    def symbols(self):
        """(name, defined here) of each dynamic symbol."""
        strings = self.sections[".dynstr"][4]
        for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", self.section(".dynsym")):
            yield self._text(strings + name), section != 0


@needs_kernels
def test_the_library_needs_neither_pytorch_nor_cuda():
    needed = Elf(extension_path()).needed()
    assert any(name.startswith("libc.so") for name in needed)  # the list was read
    assert not [name for name in needed if re.match(r"lib(torch|c10|cuda|cudart|nv|cu)", name)]


@needs_kernels
def test_the_library_uses_no_symbol_of_pytorch_or_cuda_and_keeps_its_own():
    symbols = list(Elf(extension_path()).symbols())
    undefined = {name for name, defined in symbols if name and not defined}
    assert "PyModule_Create2" in undefined or any(name.startswith("PyModule") for name in undefined)
    foreign = re.compile(r"^_ZN?K?(2at|3c10|5torch|6caffe2)|^THP|^(cu|cuda|__cuda)[A-Z]")
    assert not sorted(filter(foreign.match, undefined))
    defined = {name for name, here in symbols if here}
    assert "PyInit__C" in defined
    assert not sorted(filter(re.compile(r"^(cu|cuda|__cuda)[A-Z]").match, defined))


@needs_kernels
def test_the_library_tells_the_architectures_it_was_built_for():
    from flash_kda import _C
    assert re.fullmatch(r"\d+[af]?(;\d+[af]?)*", _C.CUDA_ARCHS)
