"""The package as a whole: how it loads, what it links, what it says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from processes import ROOT, python

import shira_kernels
from shira_kernels import backends
from shira_kernels.ops import OPS

WITHOUT_EXTENSION = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "shira_kernels._C": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""
WRITE = """
import torch, shira_kernels
weight = torch.zeros(4)
torch.ops.shira.scatter_apply(weight, torch.tensor([1]), torch.ones(1))
assert weight.tolist() == [0, 1, 0, 0]
print(shira_kernels.backends.active("scatter_apply", "cpu"), dict(shira_kernels.backends.calls()))
"""


needs_extension = pytest.mark.skipif(backends.extension is None, reason="C++ extension not built")


def test_import_is_light() -> None:
    heavy = ("triton", "transformers", "peft", "matplotlib", "safetensors", "shira", "torch._inductor", "torch._dynamo")
    code = f"""
import sys, torch
before = set(sys.modules)
import shira_kernels
print([name for name in {heavy} if name in sys.modules and name not in before], torch.cuda.is_initialized())
"""
    result = python(code)
    assert result.stdout.split("\n")[0] == "[] False", result.stderr


def test_without_the_extension_the_reference_works() -> None:
    result = python(WITHOUT_EXTENSION + WRITE)
    assert result.stdout.strip() == "reference {'reference': 1}", result.stderr
    forced = python(WITHOUT_EXTENSION + WRITE, SHIRA_CPU_ISA="avx2")
    assert "SHIRA_CPU_ISA=avx2, but the C++ extension" in forced.stderr


@needs_extension
@pytest.mark.parametrize("isa", backends.CPU_ISAS)
def test_forced_isa(isa: str) -> None:
    if isa not in backends.extension.runnable_isas():
        pytest.skip(f"this processor does not run {isa}")
    assert python(WRITE, SHIRA_CPU_ISA=isa).stdout.strip() == f"cpu/{isa} {{'cpu/{isa}': 1}}"


def test_a_forced_backend_that_cannot_run_is_an_error() -> None:
    assert (
        "SHIRA_CPU_ISA must be one of auto, base, avx2, avx512, avx512_bf16, got 'sse9'"
        in python(WRITE, SHIRA_CPU_ISA="sse9").stderr
    )
    assert "SHIRA_GPU_BACKEND must be one of auto, triton, cuda, got 'x'" in python(WRITE, SHIRA_GPU_BACKEND="x").stderr
    if backends.extension is None or not backends.extension.cuda_ops():
        result = python(WRITE, SHIRA_GPU_BACKEND="cuda")
        assert "SHIRA_GPU_BACKEND=cuda, but there are no CUDA C++ kernels" in result.stderr
    with pytest.raises(RuntimeError, match="isa must be one"):
        backends.use("cpu", isa="sse9")
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.use("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend cuda cannot run"):
            backends.use("cuda")


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "refused"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.6", False), ("3.10.0", "2.10.0rc1", False)],
)
def test_an_interpreter_that_numpy_broke_is_refused(
    monkeypatch: pytest.MonkeyPatch, triton_version: str, numpy_version: str, refused: bool
) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = f"the interpreter of triton {triton_version} needs numpy below 2.4, got {numpy_version}"
    assert backends.reason_unavailable("scatter_apply", "triton") == (reason if refused else "")
    if refused:
        with pytest.raises(RuntimeError, match=reason):
            backends.use("triton")


@needs_extension
def test_active_names_what_a_call_would_run() -> None:
    with backends.use("reference"):
        assert backends.active("scatter_apply", "cpu") == "reference"
        with backends.use("cpu", isa="base"):
            assert backends.active("scatter_apply", "cpu") == "cpu/base"
    assert backends.active("scatter_apply", "cpu") == f"cpu/{backends.extension.runnable_isas()[-1]}"
    assert backends.active("scatter_apply", "meta") == "reference"
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="op must be one of"):
            backends.active("nothing", device)


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_only_the_stable_abi_of_torch_is_used() -> None:
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", backends.extension.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols
    assert backends.extension.__file__.endswith("_C.abi3.so"), "Python's limited API alone"
    assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line]


@needs_extension
def test_each_isa_has_its_own_code() -> None:
    """No instruction beyond the base set outside the functions of the ISA namespaces."""
    if shutil.which("objdump") is None or "avx512" not in backends.extension.runnable_isas():
        pytest.skip("needs objdump and an x86-64 build")
    listing = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", backends.extension.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wide: dict[str, bool] = {}
    for function in listing.split("\n\n"):
        name = function.split("\n", 1)[0]
        wide[name] = "%ymm" in function or "%zmm" in function
    outside = [name for name, uses in wide.items() if uses and not re.search(r"avx(2|512|512_bf16)::", name)]
    assert not outside
    assert any(uses and "avx512::" in name for name, uses in wide.items()), "the wide code is there"


def test_info_command() -> None:
    command = [sys.executable, "-m", "shira_kernels"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = json.loads(
        subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    assert set(known["kernels"]) == set(OPS)
    for op, states in known["kernels"].items():
        assert list(states) == list(backends.BACKENDS)
        assert f"{op} " in text
        assert all(states.values()), "a reason for each that is not active"
        active = backends.active(op, "cpu").split("/")[0]
        assert "cpu" in states[active].split()
    assert known["shira-kernels"] == shira_kernels.__version__


def test_one_stem_for_each_op() -> None:
    checks = subprocess.run(
        [sys.executable, ROOT / "tools/check_repository.py"], capture_output=True, text=True, check=False
    )
    assert checks.returncode == 0, checks.stderr


# What setup.py asks setuptools to build, with a torch that says it has CUDA; nothing is built.
SETUP = """
import json, runpy, sys, setuptools, torch
torch.version.cuda, torch.cuda._is_compiled, torch.cuda.is_available = "13.0", lambda: True, lambda: False
made = {}
setuptools.setup = made.update
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
(extension,) = made["ext_modules"]
facts = {name: getattr(extension, name) for name in ("sources", "library_dirs", "include_dirs", "libraries")}
print(json.dumps({**facts, "wheel": made["options"]["bdist_wheel"]}))
"""


NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"


def write_nvcc(folder: Path, text: str = NVCC) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text(text)
    (folder / "nvcc").chmod(0o755)


def setup_with(nvcc: str | None, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs SETUP where the nvcc on the PATH is a script with this text, or there is none."""
    tools = folder / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    for name in ("c++", "g++", "sh"):
        if (found := shutil.which(name)) and not (tools / name).exists():
            (tools / name).symlink_to(found)
    if nvcc is not None:
        write_nvcc(tools, nvcc)
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "-c", SETUP],
        cwd=ROOT,
        env={**inherited, "SHIRA_BUILD": "auto", "PATH": str(tools), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def extension_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_nvcc_that_calls_another_is_asked_where_cuda_is(tmp_path: Path) -> None:
    real = tmp_path / "real cuda"
    for folder in ("lib64", "include"):
        (real / folder).mkdir(parents=True)
    write_nvcc(real / "bin")
    wrapper = (
        f"#!/bin/sh\n[ \"$1\" = --dryrun ] && echo '#$ _HERE_=/elsewhere' >&2 && echo '#$ TOP={real}/bin/..' >&2\n"
    )
    for environment in ({}, {"CUDA_HOME": str(tmp_path / "nothing")}):
        result = setup_with(wrapper, tmp_path, **environment)
        extension = extension_of(result)
        assert str(real / "lib64") in extension["library_dirs"], (environment, result.stderr)
        assert "csrc/cuda/launch.cu" in extension["sources"]
        assert "cudart" in extension["libraries"]
        assert extension["wheel"] == {"py_limited_api": "cp310", "build_number": "1cu13"}


def test_a_cuda_home_with_an_nvcc_is_taken(tmp_path: Path) -> None:
    write_nvcc(tmp_path / "bin")
    result = setup_with("#!/bin/sh\necho '#$ TOP=/elsewhere' >&2\n", tmp_path, CUDA_HOME=str(tmp_path))
    assert any(path.startswith(str(tmp_path)) for path in extension_of(result)["library_dirs"])


def test_a_build_without_nvcc_says_so(tmp_path: Path) -> None:
    result = setup_with(None, tmp_path, CUDA_HOME=str(tmp_path))
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("shira-kernels:")]
    assert f"there is no nvcc on the PATH or in CUDA_HOME ({tmp_path}): CPU kernels are built, and no CUDA" in line
    assert not [source for source in extension_of(result)["sources"] if source.endswith(".cu")]
    assert extension_of(result)["wheel"] == {"py_limited_api": "cp310"}
    wanted = setup_with(None, tmp_path, CUDA_HOME=str(tmp_path), SHIRA_BUILD="cuda")
    assert wanted.returncode == 1
    assert "SHIRA_BUILD=cuda cannot be built: there is no nvcc" in wanted.stderr


def test_an_nvcc_of_another_cuda_than_torchs_is_left_alone(tmp_path: Path) -> None:
    write_nvcc(tmp_path / "bin", NVCC.replace("13.0", "12.8"))
    result = setup_with(None, tmp_path, CUDA_HOME=str(tmp_path))
    assert f"torch is built with CUDA 13.0, and {tmp_path}/bin/nvcc is of CUDA 12: CPU kernels" in result.stderr
    assert not [source for source in extension_of(result)["sources"] if source.endswith(".cu")]


def test_the_oldest_triton_is_compiled_with() -> None:
    allowed = re.search(r'"triton>=(\S+);', (ROOT / "pyproject.toml").read_text())
    compiled = re.search(r"^OLDEST_TRITON := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert allowed is not None
    assert compiled is not None
    assert compiled[1] == f"{allowed[1]}.0"


def test_schemas_are_the_contract() -> None:
    rest = "Tensor indices, Tensor values, float alpha=1., bool additive=False, Tensor(b!)? saved=None) -> ()"
    single, batched = torch.ops.shira.scatter_apply.default, torch.ops.shira.scatter_apply_batched.default
    assert str(single._schema) == f"shira::scatter_apply(Tensor(a!) weight, {rest}"
    assert str(batched._schema) == f"shira::scatter_apply_batched(Tensor(a!)[] weights, Tensor offsets, {rest}"
