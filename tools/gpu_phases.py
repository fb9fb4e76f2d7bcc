"""The phases of the GPU check: which processes run in each, and for how long. In a rehearsal none needs a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gpu_records
import gpu_summary
from gpu_driver import DEADLINE, ROOT, Phase, Setup, Task, by_exit_code, last_line

EXTENSION = ROOT / "shira_kernels/_C.abi3.so"  # one for every Python

BUILD = {"SHIRA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
SANITIZER_ERROR = 86  # the exit code that compute-sanitizer is told to give
INTERPRETED = {"TRITON_INTERPRET": "1"}
# Compiles with the headers of the torch that is there.
NVCC = """
import os, sys
from torch.utils.cpp_extension import include_paths
os.execvp("nvcc", ["nvcc", *sys.argv[1:], *("-I" + path for path in include_paths())])
"""
LOADED = """
from shira_kernels import backends
print(backends.extension_reason or (backends.extension.build_facts(), backends.extension.cuda_ops()))
"""
REHEARSED_TESTS = ("scatter_apply", "masked_adamw", "topk_indices", "sparse_delta_mm")
# Ops by the value of their figures: what the deadline cuts comes last.
FIGURES_ORDER = (
    "scatter_apply",
    "scatter_switch_batched",
    "scatter_apply_batched",
    "masked_grad",
    "masked_adamw",
    "topk_indices",
    "add_sparse_delta_mm",
    "add_sparse_delta_mm_batched",
    "extract_changed",
    "fuse_adapters",
    "sparse_delta_mm",
    "sparse_delta_mm_transposed",
    "sparse_delta_mm_batched",
)
RACECHECKED = ("masked_adamw", "topk_indices", "masked_grad", "sparse_delta_mm", "sparse_delta_mm_batched")
PROFILED = ("scatter_apply", "topk_indices", "masked_grad")


def phases(setup: Setup) -> list[Phase]:
    """With a later deadline each may take longer, in proportion."""
    rehearse, cores, longer = setup.rehearse, setup.cores, max(1.0, setup.deadline / DEADLINE)
    limits = (30, 110, 110, 90, 70, 30) if rehearse else (20, 60, 60, 150, 120, 90)
    limit = [longer * seconds for seconds in limits]
    return [
        Phase(0, "machine", limit[0], "build.log", machine, nothing_after=no_gpu),
        Phase(1, "build", limit[1], "build.log", build, cores if rehearse else 1),
        Phase(2, "smoke", limit[2], "smoke.jsonl", smoke, min(12, cores)),
        Phase(3, "figures", limit[3], "figures.jsonl", figures, cores if rehearse else 1),
        Phase(4, "tests", limit[4], "tests.jsonl", tests),
        Phase(5, "sanitizer", limit[5], "sanitizer.jsonl", sanitizer, min(6, cores)),
        Phase(6, "models", float("inf"), "models.jsonl", models),
    ]


def ops() -> list[tuple[str, str]]:
    return [(op, backend) for op, backend in gpu_summary.kernels() if backend != "none"]


def device(setup: Setup) -> str:
    return "cpu" if setup.rehearse else "cuda"


def machine(setup: Setup) -> Iterator[Task]:
    path = setup.out / "environment.json"
    yield Task("facts", [setup.python, "tools/gpu_machine.py", "facts", str(path), "--device", device(setup)])


def no_gpu(setup: Setup) -> str:
    environment = gpu_summary.environment_of(setup.out)
    missing = not setup.rehearse and environment.get("gpu", "") is None
    return "torch sees no GPU; --rehearse needs none" if missing else ""


def probed(code: int, output: str) -> tuple[str, str]:
    """An extension that cannot be loaded, or does not compile, is no failure of the check: the rest runs without it."""
    ended, note = by_exit_code(code, output)
    return ("failed" if ended == "died" else ended), note


def cuda_cpp(setup: Setup) -> bool | None:
    """Whether there are CUDA C++ kernels; None if nobody looked."""
    known = [record for record in gpu_records.read(setup.out / "build.log") if "cuda_cpp" in record]
    return known[-1]["cuda_cpp"] if known else None


def build(setup: Setup) -> Iterator[Task]:
    """The extension that was carried here, else one that is built here, else none."""
    if setup.rehearse:
        yield from rehearsed_build(setup)
        return
    log = setup.out / "build.log"
    probe = Task("load", [setup.python, "tools/gpu_machine.py", "extension", "--record", str(log)], 30, judge=probed)
    yield probe
    if cuda_cpp(setup):
        return
    command = [setup.python, "setup.py", "build_ext", "--inplace"]
    yield Task("build", command, environment=BUILD, judge=probed, log=log, may_take_longer=True)
    yield probe
    crashed = [r for r in gpu_records.read(log) if r.get("task") == "load"][-1]["ended"] != "ok"
    if crashed and EXTENSION.is_file():  # it would take every later process with it
        EXTENSION.rename(EXTENSION.with_suffix(".broken"))


def rehearsed_build(setup: Setup) -> Iterator[Task]:
    """The CUDA sources alone, beside the tree: nothing that is built there is replaced."""
    log = setup.out / "build.log"
    if shutil.which("nvcc") is None:
        gpu_records.append(log, remark="build: no nvcc on the PATH, so nothing was compiled")
        return
    flags = ["-c", "-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-arch=sm_90", "-DUSE_CUDA"]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        command = [setup.python, "-c", NVCC, *flags, str(source), "-o", str(setup.scratch / f"{source.stem}.o")]
        yield Task(f"nvcc {source.name}", command, judge=probed, log=log, may_take_longer=True)


def smoke_command(setup: Setup, op: str, backend: str, path: Path, *more: str) -> list[str]:
    command = [setup.python, "tools/gpu_smoke.py", op, backend, "--record", str(path), "--device", device(setup)]
    return [*command, *more]


def smoked(code: int, output: str) -> tuple[str, str]:
    """A case that took too long ends its process with a traceback, whose first line says so."""
    ended, note = by_exit_code(code, output)
    timeout = re.search(r"^Timeout \(.*\)!", output, re.MULTILINE)
    return ("hung", f"a case took longer: {timeout[0]}") if ended == "died" and timeout else (ended, note)


def smoke(setup: Setup) -> Iterator[Task]:
    """Each case has its own limit in the worker, so that many that compile do not look like one that hangs."""
    for op, backend in ops():
        yield Task(
            f"{op} {backend}",
            smoke_command(setup, op, backend, setup.out / "smoke.jsonl", *["--tiny"] * setup.rehearse),
            facts={"op": op, "backend": backend},
            environment=INTERPRETED if setup.rehearse else {},
            judge=smoked,
        )


def figures(setup: Setup) -> Iterator[Task]:
    known = {op for op, _ in ops()}
    for op in (*FIGURES_ORDER, *sorted(known - set(FIGURES_ORDER))):
        command = [setup.python, "bench/gpu/figures.py", op, "--record", str(setup.out / "figures.jsonl")]
        command += ["--environment", str(setup.out / "environment.json"), "--device", device(setup)]
        yield Task(op, command, 60.0, {"op": op}, may_take_longer=True)


def gpu_tests() -> list[str]:
    """The files with tests that are marked gpu."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if re.search(r"mark\.gpu\b|each_backend", path.read_text())]


def pytest_ended(code: int, output: str) -> tuple[str, str]:
    """Failed tests are in the records; that none were found, or pytest's own errors, is a dead worker."""
    return ("ok", "") if code in (0, 1) else by_exit_code(code, output)


def tests(setup: Setup) -> Iterator[Task]:
    record = setup.out / "tests.jsonl"
    command = [setup.python, "-m", "pytest", "-q", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--strict-markers", "--continue-on-collection-errors"]
    command += ["-p", "gpu_pytest", "--gpu-record", str(record)]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, setup.cores)), "--dist", "worksteal", "--max-worker-restart", "10000"]
    else:
        gpu_records.append(record, remark="pytest-xdist is not installed: tests run in one process, a crash ends them")
    if importlib.util.find_spec("pytest_timeout"):
        # A thread's timer ends a process whose main thread waits for a GPU that does not answer; a signal would not.
        # The interpreter takes longer for one test than a GPU that answers.
        seconds = "300" if setup.rehearse else "30"
        command += ["--timeout", seconds, "--timeout-method", "thread"]
    else:
        gpu_records.append(record, remark="pytest-timeout is not installed: a test that hangs takes the phase's time")
    if setup.rehearse:
        files = [f"tests/ops/test_{op}.py" for op in REHEARSED_TESTS]
        command += [*files, "-k", "triton-interpreter and not (opcheck or compile or rounding or bad_input)"]
    else:
        command += ["-m", "gpu", *gpu_tests()]
    environment = {"OMP_NUM_THREADS": str(max(1, setup.cores // 8)), **(INTERPRETED if setup.rehearse else {})}
    yield Task("pytest", command, environment=environment, judge=pytest_ended, may_take_longer=True, output_kept=4000)


def sanitized(code: int, output: str) -> tuple[str, str]:
    """What compute-sanitizer says of one run."""
    if refused := re.search(
        r"Device not supported|Unable to find|error 999|Target application terminated before first", output
    ):
        return "refused", refused[0]
    if code == SANITIZER_ERROR:
        summary = re.findall(r"=========\s+(.*(?:ERROR SUMMARY|RACECHECK SUMMARY).*)", output)
        first = re.findall(r"=========\s+((?:Invalid|Uninitialized|Error|Warning|Race)\b.*)", output)
        return "wrong", "; ".join([*first[:1], *summary[-1:]]) or last_line(output)
    return by_exit_code(code, output)


def reported(code: int, output: str) -> tuple[str, str]:
    """initcheck also speaks of what torch leaves unwritten on purpose: it is told, and judged by a reader."""
    ended, note = sanitized(code, output)
    return ("told", note) if ended == "wrong" else (ended, note)


def sanitizer(setup: Setup) -> Iterator[Task]:
    record = setup.out / "sanitizer.jsonl"
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None and not setup.rehearse:
        gpu_records.append(record, remark="compute-sanitizer was not found")
        return
    if setup.rehearse:
        gpu_records.append(record, remark="sanitizer: its programs run plainly")
    pairs = [(op, backend) for op, backend in ops() if backend != "cuda" or cuda_cpp(setup) is not False]
    racechecked = [(op, backend) for op, backend in pairs if op in RACECHECKED]
    plan = [("memcheck", pairs), ("racecheck", racechecked), ("initcheck", pairs)]
    if setup.rehearse:
        plan = [("memcheck", racechecked[:3])]
    for check, pairs in plan:
        for op, backend in pairs:
            if any(r.get("ended") == "refused" for r in gpu_records.read(record)):
                gpu_records.append(record, remark="compute-sanitizer refuses this device")
                return
            options = ["--tool", check, "--error-exitcode", str(SANITIZER_ERROR), "--report-api-errors", "no"]
            program = smoke_command(setup, op, backend, setup.scratch / f"{check}.jsonl", "--tiny")
            yield Task(
                f"{check} {op} {backend}",
                program if setup.rehearse else [str(tool), *options, *program],
                80.0,
                {"op": op, "backend": backend, "tool": check},
                INTERPRETED if setup.rehearse else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                judge=reported if check == "initcheck" else sanitized,
                may_take_longer=True,
            )


def profiled(code: int, output: str) -> tuple[str, str]:
    if re.search(r"ERR_NVGPUCTRPERM|LibraryNotLoaded|not supported|==ERROR==", output):
        return "refused", last_line(output)
    return by_exit_code(code, output)


def models(setup: Setup) -> Iterator[Task]:
    record = setup.out / "models.jsonl"
    for what in ("training", "switch", "layers"):
        command = [setup.python, "bench/gpu/models.py", what, "--record", str(record), "--device", device(setup)]
        yield Task(what, command, 120.0, {"tool": what}, may_take_longer=True)
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None or setup.rehearse:
        gpu_records.append(record, remark="ncu: not run" if setup.rehearse else "ncu was not found")
        return
    metrics = (
        "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sectors.sum,"
        "sm__warps_active.avg.pct_of_peak_sustained_active,dram__throughput.avg.pct_of_peak_sustained_elapsed"
    )
    for op in PROFILED:
        options = ["--metrics", metrics, "--csv", "--profile-from-start", "off", "--target-processes", "all"]
        program = [setup.python, "bench/gpu/figures.py", op, "--profile", "--record", str(record)]
        yield Task(
            f"ncu {op}",
            [tool, *options, *program],
            60.0,
            {"op": op, "tool": "ncu"},
            judge=profiled,
            may_take_longer=True,
            output_kept=16_000,
        )


def carry(python: str) -> int:
    """Builds the extension in place for sm_80 and sm_90, and shows that it holds these and loads in that Python."""
    done = subprocess.run(
        [python, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, env={**os.environ, **BUILD}, check=False
    )
    if done.returncode:
        return 1
    held = architectures_in(EXTENSION, python)
    loaded = subprocess.run([python, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        f"{EXTENSION.relative_to(ROOT)}: {EXTENSION.stat().st_size / 2**20:.1f} MiB, "
        f"{', '.join(sorted(held)) or 'no GPU code'}"
    )
    print(loaded.stdout.strip() or last_line(loaded.stderr))
    return 0 if held == {"sm_80", "sm_90", "PTX of sm_90"} and "cuda architectures" in loaded.stdout else 1


def architectures_in(path: Path, python: str) -> set[str]:
    """What cuobjdump finds in an extension."""
    code = "import triton, pathlib; print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump')"
    tool = (
        shutil.which("cuobjdump")
        or subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    held = set()
    for option, form in (("--list-elf", "{}"), ("--list-ptx", "PTX of {}")):
        listed = subprocess.run([tool.strip(), option, path], capture_output=True, text=True, check=False).stdout
        held |= {form.format(name) for name in re.findall(r"\.(sm_\w+?)\.", listed)}
    return held
