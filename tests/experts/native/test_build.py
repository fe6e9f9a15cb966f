"""setup.py: the library, or the reason why there is none, in the wheel and in the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.experts.native.library import ABI

ROOT = Path(__file__).resolve().parents[3]
NATIVE = "src/moesaic/experts/native"
LIBRARY = "libmoesaic_experts.dylib" if sys.platform == "darwin" else "libmoesaic_experts.so"
SOURCE = """
#include "moesaic.h"
#include <vector>
MOESAIC_API int moesaic_abi(void) { return static_cast<int>(std::vector<int>(MOESAIC_ABI).size()); }
"""
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
)
Build = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What setup.py reads, with one small source in place of the kernels."""
    for name in ["setup.py", "MANIFEST.in", "pyproject.toml", "LICENSE", "README.md", f"{NATIVE}/moesaic.h"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / NATIVE / "library.cpp").write_text(SOURCE)
    for folder in ("moesaic", "moesaic/experts", "moesaic/experts/native"):
        (tmp_path / "src" / folder / "__init__.py").touch()
    return tmp_path


@pytest.fixture
def build(project: Path) -> Build:
    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS")}
        done = subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=project,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def wheel_of(project: Path) -> tuple[str, list[str]]:
    """The wheel's name, and what it has of the native folder."""
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    folder = "moesaic/experts/native/"
    return wheel.name, sorted(name.removeprefix(folder) for name in names if name.startswith(folder))


@needs_compiler
def test_a_wheel_holds_the_library_and_fits_every_python(project: Path, build: Build) -> None:
    done = build("-q", "bdist_wheel")
    assert "WARNING: moesaic" not in done.stderr or "OpenMP" in done.stderr
    name, native = wheel_of(project)
    assert name.startswith("moesaic-") and "-py3-none-" in name and not name.endswith("-any.whl")
    assert native == ["__init__.py", LIBRARY]


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_without_a_compiler_the_rest_is_installed(project: Path, build: Build, variable: str) -> None:
    done = build("-q", "bdist_wheel", **{variable: "no-such-compiler"})
    reason = f"{variable}=no-such-compiler names a C++ compiler that is not there"
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert warnings == [
        f"WARNING: moesaic: the native kernels were not built, so experts on a CPU will be slower: {reason}"
    ]
    _, native = wheel_of(project)
    assert native == ["__init__.py", "not_built.txt"]
    made = next((project / "build").glob("lib*/moesaic/experts/native/not_built.txt"))
    assert made.read_text() == f"the native kernels were not built: {reason}\n"


def test_no_compiler_at_all(project: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    build("-q", "build_ext", "--inplace", PATH=str(tmp_path_factory.mktemp("empty")))
    reason = (project / NATIVE / "not_built.txt").read_text()
    assert "there is no C++ compiler (tried g++, c++, clang++): install one, then install moesaic again" in reason


@needs_compiler
def test_in_place_the_outcome_replaces_the_earlier_one(project: Path, build: Build) -> None:
    native = project / NATIVE
    build("-q", "build_ext", "--inplace")
    assert (native / LIBRARY).exists() and not (native / "not_built.txt").exists()
    (native / "library.cpp").write_text("this is no C++\n")
    build("-q", "build_ext", "--inplace")
    assert not (native / LIBRARY).exists()
    assert "error" in (native / "not_built.txt").read_text()
    (native / "library.cpp").write_text(SOURCE)
    build("-q", "build_ext", "--inplace")
    assert (native / LIBRARY).exists() and not (native / "not_built.txt").exists()
    assert sorted(path.name for path in native.iterdir()) == ["__init__.py", LIBRARY, "library.cpp", "moesaic.h"]


@needs_compiler
def test_the_users_compiler_and_flags(project: Path, build: Build, tmp_path: Path) -> None:
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))))
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {found} "$@"\n')
    compiler.chmod(0o755)
    build("-q", "build_ext", "--inplace", CXX=f"{compiler} -DONE", CC="no-such-compiler", CXXFLAGS="-DTWO -O1")
    assert (project / NATIVE / LIBRARY).exists()
    (line,) = (line for line in log.read_text().splitlines() if "library.cpp" in line)
    words = line.split()
    assert words[0] == "-DONE" and "-DTWO" in words and words.index("-O1") > words.index("-O3")
    assert not {"-march=native", "-ffast-math"} & set(words)


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs GCC's C compiler")
def test_a_c_compiler_links_cpps_library_too(project: Path, build: Build) -> None:
    build("-q", "build_ext", "--inplace", CC="gcc")
    code = f"import ctypes; print(ctypes.CDLL({str(project / NATIVE / LIBRARY)!r}).moesaic_abi())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"{ABI}\n"


@needs_compiler
def test_a_compiler_without_openmp(project: Path, build: Build, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))))
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {found} "$@"\n')
    compiler.chmod(0o755)
    done = build("-q", "build_ext", "--inplace", CXX=str(compiler))
    assert "WARNING: moesaic: " in done.stderr and "the native kernels use one thread" in done.stderr
    assert (project / NATIVE / LIBRARY).exists()


def test_the_source_distribution_has_the_sources(project: Path, build: Build) -> None:
    build("-q", "sdist")
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"setup.py", f"{NATIVE}/library.cpp", f"{NATIVE}/moesaic.h"} <= names
    assert not [name for name in names if name.endswith((".so", ".dylib"))]


ARM = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(ARM), reason=f"needs {ARM}")
def test_the_kernels_compile_for_arm(project: Path, build: Build) -> None:
    shutil.copytree(ROOT / NATIVE, project / NATIVE, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "*.txt"))
    build("-q", "build_ext", CXX=ARM, CXXFLAGS="-O1")
    (library,) = project.glob(f"build/lib*/moesaic/experts/native/{LIBRARY}")
    assert library.read_bytes()[18:20] == b"\xb7\x00"  # ELF's number for AArch64
    assert {path.stem for path in project.glob("build/temp*/*.o")} == {"library", "portable"}
