"""What a user installs: the wheel, and an installation without a compiler, each in an environment of its own that sees
the packages of this one but neither this tree nor a compiler. Nothing is downloaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import ROOT

from shira_kernels.ops import OPS

PACKAGES = {"shira": ROOT / "python/shira", "shira_kernels": ROOT / "shira_kernels"}
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
SWITCH = """
import json, shutil, warnings
import torch, shira_kernels
from shira_kernels import backends

assert not any(map(shutil.which, ("cc", "c++", "g++", "gcc", "clang++", "nvcc")))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 64, 48, generator=draw).bfloat16().unbind()]
    indices = torch.randperm(64 * 48, generator=draw)[:99].sort().values
    values = torch.randn(99, generator=draw).bfloat16()
    for backend in (None, "reference"):
        weight, mixed = (tensor.clone() for tensor in weights[0])
        def switch():
            saved = torch.empty_like(values)
            torch.ops.shira.scatter_apply(weight, indices, values, saved=saved)
            torch.ops.shira.scatter_apply(mixed, indices, values, 0.3)
        if backend is None:
            switch()
            found = weight, mixed
        else:
            with backends.use(backend):
                switch()
assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, (weight, mixed)))
print(json.dumps({
    "package": shira_kernels.__file__,
    "extension": backends.extension and backends.extension.__file__,
    "active": {op: backends.active(op, "cpu") for op in backends.OPS},
    "calls": dict(backends.calls()),
    "warnings": [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)],
}))
"""


def output_of(command: Sequence[str | Path], variables: dict[str, str], folder: Path = ROOT) -> str:
    """What a program prints that gets no other variables, both outputs together; its failure fails the test."""
    done = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Environment:
    """A fresh environment with a wheel in it, which sees the packages of this one."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = self.bin / "python"
        install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel]
        output_of([sys.executable, "-m", "pip", *install], {"PATH": str(self.bin)})
        (installed,) = folder.glob("lib/python*/site-packages")
        # An editable installation of this tree is a .pth file there, which is not followed from here.
        seen = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (installed / "seen.pth").write_text("\n".join(seen))

    def run(self, *command: str) -> str:
        """What a program of the environment prints."""
        variables = {"PATH": str(self.bin), "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        return output_of([self.bin / command[0], *command[1:]], variables, self.folder)


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("shira_kernels-*.whl"))
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    sources += [file for folder in PACKAGES.values() for file in folder.rglob("*.py")]
    if len(found) != 1 or found[0].stat().st_mtime < max(file.stat().st_mtime for file in sources):
        pytest.skip("dist/ has no wheel of these sources: make wheel")
    if "abi3" not in found[0].name:
        pytest.skip("the wheel was built without C++ kernels")
    return found[0]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("wheel"), wheel)


def test_the_wheel_holds_the_packages_and_one_extension_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"shira_kernels-[^-]+-(1cu\d+-)?cp310-abi3-\w+\.whl", wheel.name)
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"shira_kernels/_C.abi3.so", "shira_kernels/py.typed", "shira/py.typed"}
    for name, folder in PACKAGES.items():
        expected |= {f"{name}/{file.relative_to(folder)}" for file in folder.rglob("*.py")}
        expected |= {f"{name}/{file.relative_to(folder)}" for file in folder.glob("cli/demo/base_model/*")}
    assert inside == expected


def test_the_kernels_of_the_wheel_run(environment: Environment) -> None:
    found = json.loads(environment.run("python", "-c", SWITCH))
    assert Path(found["package"]).is_relative_to(environment.folder)
    assert Path(found["extension"]).is_relative_to(environment.folder)
    assert list(found["active"]) == list(OPS)
    assert all(kernel.startswith("cpu/") for kernel in found["active"].values())
    assert found["calls"] == {found["active"]["scatter_apply"]: 2, "reference": 2}
    assert found["warnings"] == []


def test_the_commands_of_the_wheel(environment: Environment) -> None:
    version = environment.run("shira", "--version")
    assert re.fullmatch(r"shira-kernels \S+, torch \S+, kernels cpu/\w+(, \w+)*\n", version)
    table = environment.run("python", "-m", "shira_kernels")
    assert re.search(r"scatter_apply +cpu +active on cpu", table)
    assert "warning" not in table


def test_the_blocks_of_the_readme_run_where_the_wheel_is_installed(environment: Environment) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert README_BLOCKS
    (environment.folder / "readme.py").write_text("\n".join(README_BLOCKS))
    environment.run("python", "readme.py")


@pytest.fixture
def built_without_compiler(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Environment, str]:
    """An environment into which this tree was installed with SHIRA_BUILD as the test says, and what that printed."""
    source, tools = tmp_path / "source", tmp_path / "tools"
    tools.mkdir()
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("python", "shira_kernels", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = ["wheel", "--verbose", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    variables = {"PATH": str(tools), "HOME": str(tmp_path), "SHIRA_BUILD": request.param}
    printed = output_of([sys.executable, "-m", "pip", *command], variables)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    return Environment(tmp_path / "environment", wheel), printed


@pytest.mark.parametrize("built_without_compiler", ["auto", "0"], indirect=True)
def test_an_installation_without_a_compiler_works_and_says_so_once(
    built_without_compiler: tuple[Environment, str], request: pytest.FixtureRequest
) -> None:
    """Unless that was asked for by SHIRA_BUILD=0."""
    environment, printed = built_without_compiler
    surprising = "[auto]" in request.node.name
    reason = "no C++ compiler was found when it was installed" if surprising else "SHIRA_BUILD=0"
    assert f"shira-kernels: no C++ kernels are built; {reason}\n" in printed
    found = json.loads(environment.run("python", "-c", SWITCH))
    assert Path(found["package"]).is_relative_to(environment.folder)
    assert found["extension"] is None
    assert found["calls"] == {"reference": 4}
    assert len(found["warnings"]) == surprising
    told = environment.run("python", "-m", "shira_kernels")
    assert "no C++ extension: not built (" in told
    for text in (*found["warnings"], told):
        assert ("CPU tensors take the PyTorch reference, which is slower" in text) == surprising
        assert ("install one, then this package again" in text) == surprising
    version = environment.run("shira", "--version")
    assert re.fullmatch(r"shira-kernels \S+, torch \S+, kernels reference(, \w+)*\n", version)
    help_text = environment.run("shira", "info", "--help")
    assert help_text.startswith("shira: warning: shira_kernels: CPU tensors take") == surprising


def test_a_build_without_a_compiler_asks_for_no_torch(tmp_path: Path) -> None:
    code = "import build_backend; print(build_backend.get_requires_for_build_wheel())"
    for mode in ("auto", "0"):
        variables = {"PATH": str(tmp_path), "SHIRA_BUILD": mode, "PYTHONPATH": str(ROOT / "tools")}
        assert output_of([sys.executable, "-c", code], variables) == "[]\n"
