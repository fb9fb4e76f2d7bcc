#!/usr/bin/env bash
# bash tools/test_versions.sh TORCH:SHIRA_BUILD...: the suite on versions of torch that take triton 3.6, each in an
# environment of its own, .venv-torch-TORCH. Prints a line for each at the end; exits with 1 if one failed.
#   PYTHON, MAKE   the interpreter that makes the environments, and make

set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
status=0
results=()
for version in "$@"; do
    torch=${version%%:*}
    log=build/test-torch-$torch.log
    # Triton 3.6's interpreter needs numpy below 2.4.
    "${MAKE:-make}" test VENV=".venv-torch-$torch" TORCH="$torch" SHIRA_BUILD="${version#*:}" NUMPY="<2.4" \
        PYTHON="${PYTHON:-python3.12}" 2>&1 | tee "$log"
    if [ "${PIPESTATUS[0]}" -eq 0 ]; then outcome=passed; else outcome=FAILED status=1; fi
    results+=("torch $torch: $outcome: $(grep -E '^[0-9]+ .* in [0-9.]+s' "$log" | tail -n 1 || echo "no tests ran")")
done
printf '%s\n' "${results[@]}"
exit "$status"
