#!/usr/bin/env bash
# Builds in place with the python that is there, runs the gpu tests and benchmarks, leaves JSON in $RESULTS.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
results="${RESULTS:-bench-results}"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results"

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.__version__, torch.cuda.get_device_name())'
SHIRA_BUILD="${SHIRA_BUILD:-auto}" "$python" setup.py --quiet build_ext --inplace
"$python" -m shira_kernels
"$python" -m shira_kernels --json > "$results/environment.json"

status=0
tests=(tests/test_gpu.py)
for op in shira_kernels/ops/[a-z]*.py; do tests+=("tests/test_$(basename "$op")"); done
"$python" -m pytest "${tests[@]}" -m gpu --junitxml="$results/gpu-tests.xml" || status=$?
if "$python" -c 'import pytest_benchmark' 2> /dev/null; then
  "$python" -m pytest bench -m gpu --benchmark-json="$results/gpu-bench.json" || status=$?
else
  echo "gpu-check: pytest-benchmark is not installed: no benchmarks were run" >&2
  status=1
fi
exit "$status"
