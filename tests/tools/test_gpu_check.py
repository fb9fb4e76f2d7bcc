"""The driver of the GPU check with dummy work: whatever happens, what was measured is on disk and printed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarks
import pytest
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[2]
PARTS = ("gpu_driver", "gpu_phases", "gpu_pytest", "gpu_records", "gpu_smoke", "gpu_summary")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The modules of tools/ by their names, without `gpu_`."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield SimpleNamespace(**{name.removeprefix("gpu_"): importlib.import_module(name) for name in PARTS})
    sys.path.remove(str(ROOT / "tools"))


FIGURE = {"us": 9.1, "floor_us": 6.8, "host_us": 12.0, "share_of_copy": 0.7, "ratio": 2.5}
SMOKE = {"op": "scatter_apply", "backend": "triton"}


def script(code: str) -> list[str]:
    """A worker that needs no torch; `record` appends to FILE."""
    return [sys.executable, "-c", f"import os, signal, sys, time\nfrom gpu_records import append\n{code}"]


class Check:
    """A run of dummy phases in a folder: what it printed, its exit code, and the records that it left."""

    def __init__(self, gpu: Any, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.gpu, self.out, self.capsys = gpu, out, capsys
        self.phases: list[Any] = []

    def phase(self, file: str, *tasks: Any, limit: float = 20.0, at_once: int = 1, name: str = "dummy") -> None:
        number = len(self.phases)
        self.phases.append(self.gpu.driver.Phase(number, name, limit, file, lambda _: iter(tasks), at_once))

    def task(self, code: str, **options: Any) -> Any:
        return self.gpu.driver.Task(options.pop("label", "work"), script(code), **options)

    def smoke(self, code: str, **options: Any) -> Any:
        return self.task(code, facts=SMOKE, label="scatter_apply triton", **options)

    def recording(self, file: str, **record: Any) -> Any:
        return self.task(f"append({str(self.out / file)!r}, **{record!r})", label="measures")

    def run(self, deadline: float = 30.0, rehearse: bool = False) -> tuple[int, str]:
        setup = self.gpu.driver.Setup(self.out, rehearse, deadline + self.gpu.driver.RESERVE)
        code = self.gpu.driver.run(self.phases, setup)
        printed = self.capsys.readouterr().out
        text = (self.out / "summary.txt").read_text()
        assert printed.endswith(text), "the summary is printed last"
        assert len(text) < 4000
        assert len(list(self.out.iterdir())) <= 8
        return code, text

    def records(self, file: str) -> list[dict[str, Any]]:
        return self.gpu.records.read(self.out / file)  # type: ignore[no-any-return]


@pytest.fixture
def check(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    return Check(gpu, tmp_path / "out", capsys)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def row(text: str, op: str, backend: str) -> list[str]:
    """The cells of an op's line behind its backend."""
    (line,) = re.findall(rf"^{op} +{backend}\b(.*)$", text, re.MULTILINE)
    return line.split()  # type: ignore[no-any-return]


def test_all_is_well(check: Check) -> None:
    check.phase("smoke.jsonl", check.smoke("time.sleep(0.2)"), name="smoke")
    figure = {"op": "scatter_apply", "backend": "triton", "case": "one", **FIGURE}
    check.phase("figures.jsonl", check.recording("figures.jsonl", **figure), name="figures")
    code, text = check.run()
    assert code == 0
    assert row(text, "scatter_apply", "triton") == ["ok", "-", "-", "9.1", "6.8", "12", "70%", "2.50x"]
    assert "no wrong result, no dead worker" in text
    assert re.search(r"0 smoke \d s done \| 1 figures \d s done", text)


def test_every_op_has_its_line_also_those_without_a_gpu_kernel(check: Check) -> None:
    check.phase("smoke.jsonl")
    _, text = check.run()
    ops = [path.stem for path in (ROOT / "shira_kernels/ops").glob("[a-z]*.py")]
    assert len(ops) >= 15
    for op in ops:
        assert re.search(rf"^{op} ", text, re.MULTILINE), op
    for op in ("encode_indices", "decode_indices"):
        assert row(text, op, "none") == []
    assert row(text, "scatter_apply", "cuda") == row(text, "sparse_delta_mm_transposed", "triton") == ["-", "-", "-"]


def test_a_phase_that_hangs_is_cut_and_the_next_runs(check: Check, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
append({str(check.out / "figures.jsonl")!r}, op="scatter_apply", backend="triton", case="one", **{FIGURE})
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen(["sleep", "100"])
open({str(child)!r}, "w").write(str(grandchild.pid))
time.sleep(100)"""
    check.phase("figures.jsonl", check.task(code), check.task("1 / 0"), limit=4.0, name="figures")
    check.phase("models.jsonl", check.recording("models.jsonl", line="step 1 ms"), name="models")
    begin = time.monotonic()
    status, text = check.run()
    assert time.monotonic() - begin < 30
    assert status == 0, "a phase that its limit cuts is no error"
    assert re.search(r"0 figures \d s cut by its limit \(1 cut\)", text)
    assert row(text, "scatter_apply", "triton")[3] == "9.1", "what was measured before is printed"
    assert "step 1 ms" in text
    assert [r["ended"] for r in check.records("figures.jsonl") if "ended" in r] == ["cut"]
    assert not alive(int(child.read_text())), "the whole group is ended"


@pytest.mark.parametrize(
    ("code", "word", "note"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "DIED", "killed by SIGSEGV"),
        ("print('the last words'); sys.exit(7)", "DIED", "exit code 7: the last words"),
        ("time.sleep(100)", "HUNG", "longer than 1 s"),
    ],
)
def test_a_dead_worker_is_an_error_and_the_others_go_on(check: Check, code: str, word: str, note: str) -> None:
    other = check.task("time.sleep(0.1)", facts={"op": "scatter_apply", "backend": "cuda"})
    check.phase("smoke.jsonl", check.smoke(code, limit=1.0), other, other, at_once=2, name="smoke")
    status, text = check.run()
    assert status == 1
    assert row(text, "scatter_apply", "triton")[0] == word
    assert row(text, "scatter_apply", "cuda")[0] == "ok"
    assert f"- smoke scatter_apply triton {word.lower()}: {note}" in text
    assert re.search(rf"0 smoke \d s done \(1 {word.lower()}\)", text)


def test_a_task_that_may_take_longer_is_only_cut(check: Check) -> None:
    check.phase("figures.jsonl", check.smoke("time.sleep(100)", limit=0.5, may_take_longer=True))
    assert check.run()[0] == 0
    assert check.records("figures.jsonl")[0]["ended"] == "cut"


def test_a_program_that_is_not_there_is_a_dead_worker(check: Check) -> None:
    check.phase("smoke.jsonl", check.gpu.driver.Task("absent", ["/no/such/program"]), check.smoke("pass"))
    status, text = check.run()
    assert status == 1
    assert "- smoke absent died: [Errno 2] No such file" in text
    assert row(text, "scatter_apply", "triton")[0] == "ok"


def test_a_wrong_result_is_an_error(check: Check) -> None:
    record = {**SMOKE, "case": "small float32", "result": "wrong", "note": "3 of 9 entries differ"}
    check.phase("smoke.jsonl", check.recording("smoke.jsonl", **record), check.smoke("pass"))
    status, text = check.run()
    assert status == 1
    assert row(text, "scatter_apply", "triton")[0] == "WRONG"
    assert "1 failures; the first 1:\n- smoke scatter_apply triton small float32: 3 of 9 entries differ" in text


def test_a_figure_that_fails_its_equality_is_an_error(check: Check) -> None:
    record = {**SMOKE, "case": "one", "result": "wrong", "note": "differs from index_copy_"}
    check.phase("figures.jsonl", check.recording("figures.jsonl", **record))
    status, text = check.run()
    assert status == 1
    assert "- figures scatter_apply triton one: differs from index_copy_" in text


def test_what_the_sanitizer_finds_is_an_error_and_its_refusal_is_none(check: Check) -> None:
    judge = check.gpu.phases.sanitized
    found = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 2 errors"
    facts = {**SMOKE, "tool": "memcheck"}
    bad = check.task(f"print({found!r}); sys.exit(86)", facts=facts, judge=judge)
    check.phase("sanitizer.jsonl", bad)
    status, text = check.run()
    assert status == 1
    assert row(text, "scatter_apply", "triton")[2] == "WRONG"
    assert "memcheck wrong: Invalid __global__ write of size 4 bytes; ERROR SUMMARY: 2 errors" in text

    check.phases.clear()
    refused = check.task("print('Error: Device not supported'); sys.exit(1)", facts=facts, judge=judge)
    told = check.task(
        f"print({found!r}); sys.exit(86)", facts={**facts, "op": "topk_indices"}, judge=check.gpu.phases.reported
    )
    check.phase("sanitizer.jsonl", refused, told)
    status, text = check.run()
    assert status == 0
    assert row(text, "scatter_apply", "triton")[2] == "refused"


def test_a_failing_build_is_said_loudly_and_is_no_error(check: Check) -> None:
    out = str(check.out / "build.log")
    build = check.task(
        "print('nvcc: no such thing'); sys.exit(2)",
        judge=check.gpu.phases.probed,
        log=check.out / "build.log",
        label="build",
    )
    probe = check.task(f"append({out!r}, cuda_cpp=False, build_note='the extension is not built')")
    check.phase("build.log", build, probe, name="build")
    check.phase("smoke.jsonl", check.smoke("pass"))
    status, text = check.run()
    assert status == 0
    assert text.splitlines()[1].startswith("!! NO CUDA C++ KERNELS: the extension is not built")
    assert "nvcc: no such thing\n" in (check.out / "build.log").read_text()
    assert row(text, "scatter_apply", "triton")[0] == "ok"


def test_a_full_deadline_ends_all_phases_in_time(check: Check) -> None:
    check.phase(
        "smoke.jsonl", check.recording("smoke.jsonl", **SMOKE, case="one", result="ok"), check.smoke("time.sleep(100)")
    )
    check.phase("models.jsonl", check.task("time.sleep(100)"), name="models")
    begin = time.monotonic()
    status, text = check.run(deadline=4.0)
    assert time.monotonic() - begin < 30
    assert status == 0
    assert "cut by the deadline" in text
    assert "1 models 0 s not begun: the deadline had come" in text
    assert row(text, "scatter_apply", "triton")[0] == "cut"
    assert [r["case"] for r in check.records("smoke.jsonl") if "case" in r] == ["one"]


def test_nothing_runs_after_a_phase_that_says_so(check: Check, gpu: Any) -> None:
    setup = gpu.driver.Setup(check.out)
    machine = f"open({str(check.out / 'environment.json')!r}, 'w').write('{{\"gpu\": null}}'); sys.exit(1)"
    tasks = [check.task(machine)]
    check.phases.append(
        gpu.driver.Phase(0, "machine", 9, "build.log", lambda _: iter(tasks), nothing_after=gpu.phases.no_gpu)
    )
    check.phase("smoke.jsonl", check.smoke("pass"), name="smoke")
    status, text = check.run()
    assert status == 1
    assert text.startswith("GPU check: NO GPU FOUND")
    assert "1 smoke 0 s not begun: torch sees no GPU" in text
    assert gpu.phases.no_gpu(setup)
    assert not gpu.phases.no_gpu(gpu.driver.Setup(check.out, rehearse=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_what_is_there_in_the_summary(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu_driver as d
out = Path({str(out)!r})
tasks = [d.Task(name, [sys.executable, "-c", code]) for name, code in (("a", ""), ("b", "import time; time.sleep(99)"))]
files = "smoke.jsonl", "models.jsonl"
phases = [d.Phase(i, "dummy", 60, file, lambda _: iter(tasks)) for i, file in enumerate(files)]
sys.exit(d.run(phases, d.Setup(out)))"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 20
    while not (out / "smoke.jsonl").exists() or '"a"' not in (out / "smoke.jsonl").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert re.search(rf"0 dummy \d s stopped by {name}", printed)
    assert "1 dummy 0 s not begun: stopped" in printed
    assert printed.strip().endswith((out / "summary.txt").read_text().strip())


def test_the_summary_stays_short_with_all_ops_and_long_failures(check: Check, gpu: Any) -> None:
    check.out.mkdir()
    for op, backend in gpu.summary.kernels():
        facts = {"op": op, "backend": backend}
        for case in ("a first case", "a second case of some length", "a third case of even more length than that"):
            gpu.records.append(check.out / "figures.jsonl", **facts, case=f"{op}, {case}", **{**FIGURE, "us": 12345.6})
        gpu.records.append(check.out / "smoke.jsonl", **facts, case="c" * 50, result="wrong", note="n" * 5000)
        gpu.records.append(
            check.out / "tests.jsonl",
            test=f"tests/ops/test_{op}.py::test_{'x' * 300}[{backend}-gpu]",
            outcome="failed",
            note="e" * 999,
        )
    for number in range(7):
        gpu.records.append(
            check.out / "build.log", phase=number, name="a phase", seconds=99.9, phase_ended="cut by the deadline"
        )
        gpu.records.append(check.out / "models.jsonl", line=f"{number} " + "m" * 90)
    text, code = gpu.summary.summary(check.out, rehearse=False)
    assert code == 1
    assert len(text) < 4000
    assert all(re.search(rf"^{op} +{backend}", text, re.MULTILINE) for op, backend in gpu.summary.kernels())
    assert len(re.findall(r"^- ", text, re.MULTILINE)) == 10
    assert all(len(line) < 130 for line in text.splitlines())
    assert "6 a phase 100 s cut by the deadline" in text


def test_records_survive_a_line_that_was_not_finished(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    gpu.records.append(path, a=1)
    with path.open("a") as file:
        file.write('{"b": 2')
    assert gpu.records.read(path) == [{"a": 1}]
    assert gpu.records.read(tmp_path / "none") == []


def test_files_stay_small(check: Check, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.driver, "FILE_LIMIT", 2000)
    check.phase(
        "build.log", check.task("print('x' * 100000, flush=True); print('the end')", log=check.out / "build.log")
    )
    check.phase(
        "models.jsonl", check.task(f"[append({str(check.out / 'models.jsonl')!r}, a='y' * 99) for _ in range(100)]")
    )
    check.run()
    assert all(path.stat().st_size <= 4000 for path in check.out.iterdir())
    assert len(check.records("models.jsonl")) == 2000 // len(json.dumps({"a": "y" * 99}) + "\n")


@pytest.mark.parametrize(
    ("text", "phases"), [("0-5", {0, 1, 2, 3, 4, 5}), ("0,2,4", {0, 2, 4}), ("6", {6}), ("0-1,6", {0, 1, 6})]
)
def test_chosen_phases(text: str, phases: set[int]) -> None:
    assert gpu_check().chosen_phases(text) == phases


@pytest.mark.parametrize("text", ["7", "0-", "1--2"])
def test_phases_that_are_not_there_are_refused(text: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gpu_check.py", f"--phases={text}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "must be phases from 0 to 6" in done.stderr


def gpu_check() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_tests_are_told_by_op_and_backend(gpu: Any) -> None:
    of = gpu.summary.test_of
    assert of("tests/ops/test_topk_indices.py::test_a[x-triton-gpu]") == ("topk_indices", "triton")
    assert of("tests/ops/test_scatter_apply.py::test_a[cuda-gpu-torch.int32]") == ("scatter_apply", "cuda")
    assert of("tests/ops/test_scatter_apply.py::test_a[reference-gpu]") == ("scatter_apply", "reference")
    assert of("tests/ops/test_scatter_apply.py::test_a[1.0-triton-interpreter-x]") == ("scatter_apply", "triton")
    assert of("tests/gpu/test_gpu.py::test_cuda_graph[cuda]") == ("", "cuda")
    assert of("tests/serving/test_resident.py::test_gpu") == ("", "")


# In place of torch, which takes seconds to import.
FAKE_TORCH = """
class cuda:
    is_initialized = staticmethod(lambda: True)
    synchronize = staticmethod(lambda: None)
"""
DUMMY_TESTS = """
import pytest, torch
pytestmark = pytest.mark.gpu

def test_good(): pass

def test_bad(): assert 1 + 1 == 3, "sum"

def test_poisons():
    def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = synchronize

def test_after(): pass

@pytest.mark.skip(reason="no")
def test_skipped(): pass
"""


def run_dummy_tests(tmp_path: Path, gpu: Any, *options: str) -> tuple[int, dict[str, str], str]:
    """Exit code, outcome of each test, output."""
    (tmp_path / "test_dummy.py").write_text(DUMMY_TESTS)
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: dummy\n")
    record = tmp_path / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_errors", "-p", "gpu_pytest", f"--gpu-record={record}"]
    path = os.pathsep.join(
        [str(tmp_path), str(ROOT / "tests/helpers"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += [*options, "test_dummy.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    worst = gpu.summary.outcomes(gpu.records.read(record))
    return done.returncode, {name.rpartition("::")[2]: r["outcome"] for name, r in worst.items()}, done.stdout


def test_a_cuda_error_ends_pytest_where_no_worker_can_take_its_place(
    tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this test's own worker is none of the one it starts
    code, outcomes, output = run_dummy_tests(tmp_path, gpu)
    assert code == 3
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_poisons": "failed"}
    assert "the GPU's context is lost: test_dummy.py::test_poisons: CUDA error: an illegal" in output


def test_a_cuda_error_costs_one_test_under_xdist(tmp_path: Path, gpu: Any) -> None:
    pytest.importorskip("xdist")
    code, outcomes, _ = run_dummy_tests(tmp_path, gpu, "-pxdist", "-n1", "--dist=worksteal", "--max-worker-restart=99")
    assert code == 1
    assert outcomes.pop("test_poisons") == "crashed"
    (note,) = [r["note"] for r in gpu.records.read(tmp_path / "tests.jsonl") if "CUDA" in r["note"]]
    assert note in gpu.summary.failures({"tests.jsonl": gpu.records.read(tmp_path / "tests.jsonl")})[1]
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_after": "passed", "test_skipped": "skipped"}


def test_the_note_of_a_failed_test_is_what_it_says(gpu: Any) -> None:
    assert (
        gpu.pytest.telling_line("def test():\n>   assert x\nE   assert 1 == 2\nE    +  where\n\na.py:3: E")
        == "assert 1 == 2"
    )
    assert gpu.pytest.telling_line("[gw0] linux -- Python 3\nCUDA error: misaligned") == "CUDA error: misaligned"
    assert gpu.pytest.telling_line("") == ""


def test_pytest_without_tests_is_a_dead_worker(gpu: Any) -> None:
    assert gpu.phases.pytest_ended(0, "")[0] == gpu.phases.pytest_ended(1, "")[0] == "ok"
    assert gpu.phases.pytest_ended(5, "no tests ran")[0] == "died"


def test_a_smoke_case_that_takes_too_long_is_told_as_such(gpu: Any) -> None:
    code = "import faulthandler, time; faulthandler.dump_traceback_later(0.2, exit=True); time.sleep(100)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert gpu.phases.smoked(done.returncode, done.stderr) == ("hung", "a case took longer: Timeout (0:00:00.200000)!")
    assert gpu.phases.smoked(0, "")[0] == "ok"
    assert gpu.phases.smoked(-11, "")[0] == "died"


def test_smoke_sees_one_wrong_bit_and_a_sum_that_is_off(gpu: Any) -> None:
    smoke = gpu.smoke
    size = smoke.SIZES["tiny"]
    case = next(smoke.scatter_cases(size, [torch.float32]))
    right = smoke.backends.kernel("scatter_apply", "reference")
    assert smoke.run_case(case, right, right, "cpu") == ("ok", "")

    def one_bit_off(weight: torch.Tensor, indices: torch.Tensor, *rest: Any) -> None:
        right(weight, indices, *rest)
        weight.view(-1).view(torch.int32)[indices[3]] ^= 1

    result, note = smoke.run_case(case, one_bit_off, right, "cpu")
    assert (result, note) == ("wrong", "tensor 0: 1 of 1000 entries differ in their bits from the reference")

    product = smoke.backends.kernel("masked_grad", "reference")
    case = next(smoke.masked_grad_cases(size, [torch.float32]))
    assert smoke.run_case(case, lambda *args: product(*args) * (1 + 2**-23), product, "cpu")[0] == "ok"
    assert smoke.run_case(case, lambda *args: product(*args) * 1.00001, product, "cpu")[0] == "wrong"
    assert smoke.run_case(case, lambda *args: product(*args)[:-1], product, "cpu")[0] == "wrong"

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: misaligned address\nmore")

    assert smoke.run_case(case, fails, product, "cpu") == ("died", "RuntimeError: CUDA error: misaligned address")


def test_smoke_has_cases_for_every_kernel_and_they_pass_on_the_reference(gpu: Any) -> None:
    assert gpu.smoke.MAKERS.keys() == {op for op, backend in gpu.summary.kernels() if backend != "none"}
    for op, make in gpu.smoke.MAKERS.items():
        reference = gpu.smoke.backends.kernel(op, "reference")
        cases = list(make(gpu.smoke.SIZES["tiny"], gpu.smoke.SIZES["tiny"].dtypes))
        assert len({case.name for case in cases}) == len(cases) > 3, op
        for case in cases:
            assert gpu.smoke.run_case(case, reference, reference, "cpu") == ("ok", ""), (op, case.name)


def test_the_phases_of_a_gpu_run_are_within_the_deadline_and_their_files_known(gpu: Any, tmp_path: Path) -> None:
    for rehearse in (False, True):
        phases = gpu.phases.phases(gpu.driver.Setup(tmp_path, rehearse))
        assert [phase.number for phase in phases] == list(range(7))
        assert {phase.file for phase in phases} <= set(gpu.summary.FILES)
        assert len(gpu.summary.FILES) <= 8
    assert sum(phase.limit for phase in gpu.phases.phases(gpu.driver.Setup(tmp_path))[:6]) <= 500


def test_every_test_marked_gpu_is_in_a_file_that_the_check_runs(gpu: Any) -> None:
    found = set(gpu.phases.gpu_tests())
    assert {"tests/gpu/test_gpu.py", "tests/ops/test_masked_grad.py", "tests/serving/test_resident.py"} <= found


CUOBJDUMP = """#!/bin/sh
case $1 in
  --list-elf) echo "ELF file 1: a.sm_80.cubin"; echo "ELF file 2: a.sm_90.cubin" ;;
  *) echo "PTX file 1: a.sm_90.ptx" ;;
esac
"""


def test_the_architectures_of_an_extension_are_read_from_its_listing(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuobjdump").write_text(CUOBJDUMP)
    (tmp_path / "cuobjdump").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu.phases.architectures_in(tmp_path / "x.so", sys.executable) == {"sm_80", "sm_90", "PTX of sm_90"}


def test_the_table_of_floors_has_every_case_and_every_op(gpu: Any) -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    cases = importlib.import_module("gpu.floors").cases()
    assert [row[:4] for row in rows if row[1] != "none"] == [
        [f"`{case.op}`", case.name, case.counted, f"{case.floor_us:.1f}"] for case in cases
    ]
    assert {row[0].strip("`") for row in rows} == {op for op, _ in gpu.summary.kernels()}
    assert {row[0].strip("`") for row in rows if row[1] == "none"} == {
        op for op, backend in gpu.summary.kernels() if backend == "none"
    }
    assert len({case.name for case in cases}) == len(cases)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the figures, set to one round of warm inputs, on one thread."""
    bench = benchmarks.modules("harness.compare", "gpu.floors", "gpu.figures", "harness.rotation")
    monkeypatch.setattr(bench.compare, "MIN_ROUNDS", 1)
    monkeypatch.setattr(bench.rotation, "CACHE_TURNS", 0)
    monkeypatch.setattr(bench.compare.gc, "collect", lambda: None)  # most of the time otherwise
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench
    torch.set_num_threads(threads)


def test_every_case_is_checked_and_timed_at_tiny_sizes(gpu: Any, cases: Any) -> None:
    """On the kernels of the CPU: what is recorded of a right kernel, and that a wrong one is not timed."""
    records: list[dict[str, Any]] = []

    def record(**facts: Any) -> None:
        records.append(facts)

    place = cases.compare.Place("cpu")
    tiny = cases.floors.cases(cases.floors.TINY)
    for case in tiny:
        found = {"triton": getattr(torch.ops.shira, case.op)}
        with torch.no_grad():
            cases.figures.measure(case, case.make("cpu"), found, place, 1e9, record)
    assert [r["case"] for r in records] == [case.name for case in tiny]
    assert all(r["us"] > 0 and r["ratio"] > 0 and r["baseline"] in r["baselines_us"] for r in records)
    assert {r["op"] for r in records} == {op for op, backend in gpu.summary.kernels() if backend != "none"}

    def wrong() -> None:
        raise AssertionError("3 entries\n differ")

    records.clear()
    job = dataclasses.replace(tiny[0].make("cpu"), check=wrong)
    cases.figures.measure(tiny[0], job, {"triton": torch.ops.shira.scatter_apply}, place, 1e9, record)
    assert records == [
        {
            "op": "scatter_apply",
            "backend": "triton",
            "case": "scatter, bf16",
            "result": "wrong",
            "note": "3 entries differ",
        }
    ]


class Broken(TorchFunctionMode):
    """An op that writes nothing in place, and returns zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("shira."):
            return func(*args, **(kwargs or {}))
        if str(func).startswith(("shira.scatter", "shira.masked_adamw", "shira.add_")):
            return None
        result = func(*args, **(kwargs or {}))
        return tuple(map(torch.zeros_like, result)) if isinstance(result, tuple) else torch.zeros_like(result)


def test_every_case_refuses_a_kernel_that_does_nothing(cases: Any) -> None:
    for case in cases.floors.cases(cases.floors.TINY):
        job = case.make("cpu")
        with Broken(), pytest.raises(AssertionError):
            job.check()
