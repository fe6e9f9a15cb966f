"""Finding and loading the compiled library, and what is said where that cannot be done."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.experts.native.problems import ISAS, Problem, needs_library

from moesaic import use_backend
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import available, compute, status
from moesaic.experts.native import library


@pytest.fixture
def forget() -> Iterator[None]:
    """Load anew inside the test, and again after it."""
    library._load.cache_clear()
    library._function.cache_clear()
    yield
    library._load.cache_clear()
    library._function.cache_clear()


@pytest.mark.usefixtures("forget")
class TestMissing:
    @pytest.fixture(autouse=True)
    def empty_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MOESAIC_LIBRARY", raising=False)
        monkeypatch.setattr(library, "BUILT", tmp_path / "libmoesaic_experts.so")
        monkeypatch.setattr(library, "NOT_BUILT", tmp_path / "not_built.txt")

    def test_never_built(self) -> None:
        reason = "moesaic was installed without building it; the library libmoesaic_experts.so is missing"
        assert library.missing() == status()["native"] == reason
        assert "native" not in available()
        with pytest.raises(ConfigError, match="the backend 'native' cannot be used here: moesaic was installed"):
            use_backend("native")
        with pytest.raises(UnsupportedError, match="the native kernels cannot be used here: moesaic was installed"):
            library.isas()

    def test_the_reason_that_the_build_left(self) -> None:
        library.NOT_BUILT.write_text("the native kernels were not built: no compiler\n")
        reason = library.missing()
        assert reason and reason.startswith("the native kernels were not built: no compiler; the library")

    def test_auto_goes_on_without(self) -> None:
        problem = Problem()
        y = compute(problem.x, problem.dispatch(), problem.expert_weights())
        assert torch.allclose(y, problem.run("grouped"))

    def test_no_library_at_all(self) -> None:
        library.BUILT.write_text("a text")
        reason = library.missing()
        assert reason and re.fullmatch(r".*libmoesaic_experts\.so cannot be loaded: .*", reason)

    def test_another_library(self) -> None:
        library.BUILT.symlink_to(str(torch._C.__file__))
        reason = library.missing()
        assert reason and re.fullmatch(r".* cannot be loaded: .*moesaic_abi.*", reason)

    @needs_library
    def test_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "BUILT", loaded_from())
        monkeypatch.setattr(library, "ABI", library.ABI + 1)
        reason = library.missing()
        assert reason and f"(ABI {library.ABI - 1}, not {library.ABI}): install moesaic again" in reason


@pytest.mark.usefixtures("forget")
class TestVariables:
    def test_a_library_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOESAIC_LIBRARY", "nowhere.so")
        with pytest.raises(ConfigError, match=r"MOESAIC_LIBRARY=nowhere\.so: there is no such file"):
            library.missing()

    @needs_library
    @pytest.mark.parametrize("isa", ISAS)
    def test_each_variant_by_its_name(self, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with library.use_isa(ISAS[0]):
            library._load.cache_clear()
            monkeypatch.setenv("MOESAIC_ISA", isa)
            assert library.missing() is None
            assert library.isa() == isa

    @needs_library
    @pytest.mark.parametrize("isa", ["avx1024", "PORTABLE", "portable "])
    def test_an_unknown_variant(self, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOESAIC_ISA", isa)
        names = ", ".join(sorted(ISAS))
        with pytest.raises(ConfigError, match=f"MOESAIC_ISA='{isa}' cannot be run on this CPU: .*allowed: {names}"):
            library.missing()


def loaded_from() -> Path:
    """The file that the tests of this process load."""
    return Path(os.environ.get("MOESAIC_LIBRARY") or library._FOLDER / library.BUILT.name)


@needs_library
class TestLoaded:
    def test_a_variant_for_a_while(self) -> None:
        before = library.isa()
        with library.use_isa("portable"):
            assert library.isa() == "portable"
        assert library.isa() == before
        with pytest.raises(ConfigError, match="isa='mmx' cannot be run on this CPU"), library.use_isa("mmx"):
            pytest.fail("a variant that there is not was chosen")

    def test_the_header_says_the_same(self) -> None:
        """Fields of structs, their order and types, and the numbers of formats and activations."""
        header = re.sub(r"//.*", "", (library._FOLDER / "moesaic.h").read_text())
        types = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "MoesaicMatrix": library.Matrix}
        for struct in (library.Matrix, library.Layer, library.Gradients):
            body = re.search(rf"{{([^{{}}]*)}} Moesaic{struct.__name__};", header)
            assert body
            fields = []
            for declared, names in re.findall(r"(?:const )?(\w+\*?) ([\w, ]+);", body[1]):
                kind = ctypes.c_void_p if declared.endswith("*") else types[declared]
                fields += [(name.strip(), kind) for name in names.split(",")]
            assert fields == list(struct._fields_)
        numbers = {name.lower(): int(value) for name, value in re.findall(r"MOESAIC_(\w+) = (\d+)", header)}
        formats = {str(dtype): number for dtype, number in library.FLOATS.items()}
        assert formats == {
            f"torch.{n}": numbers[k] for n, k in (("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16"))
        }
        assert (numbers["int8"], numbers["int4"]) == (library.INT8, library.INT4)
        assert {name: numbers[name] for name in library.ACTIVATIONS} == library.ACTIVATIONS
        abi = re.search(r"#define MOESAIC_ABI (\d+)", header)
        assert abi and int(abi[1]) == library.ABI
        declared = set(re.findall(r"MOESAIC_API [\w *]+\b(moesaic_\w+)\(", header))
        assert declared == {*library._FUNCTIONS, "moesaic_abi"}

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
    def test_a_process_of_its_own(self) -> None:
        """It takes the best variant, and loads no second OpenMP runtime."""
        code = """if True:
            import re, torch
            from tests.experts.native.problems import Problem
            from moesaic.experts.native import library
            torch.set_num_threads(2)
            problem = Problem(tokens=40, d_model=64, d_ff=64)
            problem.gradients("native", torch.ones(40, 64)), torch.randn(500, 500) @ torch.randn(500, 500)
            paths = set(re.findall(r"\\S*/lib\\S*omp\\S*", open("/proc/self/maps").read()))
            print(library.has_openmp(), library.isa(), *paths)
        """
        environment = {**os.environ, "MOESAIC_ISA": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        has_openmp, isa, *runtimes = done.stdout.split()
        assert (has_openmp, isa) == ("True", ISAS[0])
        assert len(runtimes) == 1, runtimes

    @pytest.mark.skipif(not (shutil.which("objdump") and platform.machine() == "x86_64"), reason="reads x86-64 code")
    def test_only_the_variants_use_wide_registers(self) -> None:
        """An inline function that variants shared would be linked once, from either: an old CPU could not run it."""
        command = ["objdump", "-d", "-C", "--no-show-raw-insn", loaded_from()]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        function, variants, others = "", set(), set()
        for line in listing.splitlines():
            if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                function = start[1]
            elif re.search(r"\tv\w+ .*%[xyz]mm", line):
                variant = re.match(r"(?:[^(]* )?moesaic::(avx\w+)::", function)
                (variants if variant else others).add(variant[1] if variant else function)
        assert others == set()
        assert variants == {"avx2", "avx512", "avx512_bf16"}
