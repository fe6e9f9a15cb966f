"""Compiles the native expert kernels: one plain shared library inside the package, without any header of PyTorch's.

Everything else about the package stands in ``pyproject.toml``. The compiler is ``CXX``, else ``CC``, else the first of
g++, c++ and clang++; ``CXXFLAGS`` are added at the end of every command. Where none works the package is installed all
the same, without the library, and the reason is left beside it for ``moesaic doctor``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path("moesaic/experts/native")
SOURCES = Path("src") / PACKAGE
LIBRARY = "libmoesaic_experts.dylib" if sys.platform == "darwin" else "libmoesaic_experts.so"
REASON = "not_built.txt"
MADE = (LIBRARY, REASON)  # one of the two
# -fno-math-errno only drops what no kernel reads; nothing here changes what arithmetic gives.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
OPENMP = "-fopenmp"
# GCC takes what is undefined on purpose in its own AVX-512 intrinsics for a mistake.
QUIET = ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
AVX512 = [*QUIET, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
# The sources that only x86-64 has, each compiled for its own instruction set: which one runs is decided at run time.
VARIANTS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
JOBS = 2  # compilations at a time


class BuildError(Exception):
    """Why there is no library, in one line."""


class Compiler:
    """A C++ compiler that works, for the machine that it compiles for."""

    def __init__(self) -> None:
        self.command = find_compiler()
        self.flags, self.last_flags = list(FLAGS), shlex.split(os.environ.get("CXXFLAGS", ""))
        # A C compiler knows C++ sources by their suffix, but not that they need C++'s own library.
        by_c = not os.environ.get("CXX") and os.environ.get("CC")
        self.libraries = ["-lc++" if sys.platform == "darwin" else "-lstdc++"] if by_c else []
        self.machine = self.run("-dumpmachine").strip()
        if self.has_openmp():
            self.flags.append(OPENMP)
        else:
            self.flags.append("-Wno-unknown-pragmas")
            warn(f"{self.command[0]} has no OpenMP that PyTorch's can stand for: the native kernels use one thread")

    def run(self, *arguments: str | Path) -> str:
        """What the compiler prints; its complaints go where they always go, and end up in the error too."""
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            words = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "it said nothing")
            raise BuildError(f"{self.command[0]} failed: {words.strip()}")
        return done.stdout

    def has_openmp(self) -> bool:
        """Whether loops can run on the OpenMP runtime that PyTorch has loaded: on Linux that is GNU's."""
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
            command = [*self.command, *self.flags, OPENMP, *self.last_flags, "-shared", source, "-o", library]
            if subprocess.run(command, capture_output=True).returncode:
                return False
            return "linux" not in self.machine or b"libgomp.so.1\0" in library.read_bytes()

    def compile(self, source: Path, folder: Path) -> Path:
        """One object file."""
        made = folder / f"{source.stem}.o"
        self.run(*self.flags, *VARIANTS.get(source.name, []), *self.last_flags, "-c", source, "-o", made)
        return made

    def link(self, objects: list[Path], library: Path) -> None:
        """The shared library."""
        self.run(*self.flags, *self.last_flags, "-shared", *objects, *self.libraries, "-o", library)


def find_compiler() -> list[str]:
    """The command that ``CXX`` or ``CC`` names, or the first compiler that there is."""
    named = next((name for name in ("CXX", "CC") if os.environ.get(name)), None)
    if named:
        command = shlex.split(os.environ[named])
        if shutil.which(command[0]):
            return command
        raise BuildError(f"{named}={os.environ[named]} names a C++ compiler that is not there")
    tried = ("g++", "c++", "clang++")
    found = next((name for name in tried if shutil.which(name)), None)
    if found:
        return [found]
    raise BuildError(f"there is no C++ compiler (tried {', '.join(tried)}): install one, then install moesaic again")


def build_library(library: Path, objects: Path) -> None:
    """Compile and link what the compiler's target can have."""
    compiler = Compiler()
    is_x86_64 = re.match("x86_64|amd64", compiler.machine) is not None
    sources = [source for source in sorted(SOURCES.glob("*.cpp")) if is_x86_64 or source.name not in VARIANTS]
    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(JOBS) as pool:
        made = list(pool.map(lambda source: compiler.compile(source, objects), sources))
    compiler.link(made, library)


def warn(message: str) -> None:
    """One line that stands out in the output of a build."""
    print(f"WARNING: moesaic: {message}", file=sys.stderr, flush=True)


class BuildNative(build_ext):
    """Puts the library, or the reason why there is none, where the package looks for it."""

    def run(self) -> None:
        folder = Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        # Not the library of an earlier build in any case: it may be older than the Python code beside it.
        for name in MADE:
            (folder / name).unlink(missing_ok=True)
        try:
            build_library(folder / LIBRARY, Path(self.build_temp))
        except (BuildError, OSError) as error:
            (folder / REASON).write_text(f"the native kernels were not built: {error}\n")
            warn(f"the native kernels were not built, so experts on a CPU will be slower: {error}")
        if self.inplace:  # an editable install has it in the source tree
            for name in MADE:
                if (folder / name).exists():
                    # In one step: a process that has the earlier library loaded keeps that file.
                    os.replace(shutil.copy(folder / name, SOURCES / f"{name}.new"), SOURCES / name)
                else:
                    (SOURCES / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for name in MADE if (path := Path(self.build_lib, PACKAGE, name)).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {made: str(SOURCES / Path(made).name) for made in self.get_outputs()} if self.inplace else {}


class PlatformWheel(bdist_wheel):
    """One wheel a platform for all Pythons: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("moesaic.experts.native", sources=[])],  # what makes the wheel one of a platform
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
