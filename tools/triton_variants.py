"""The variants of each Triton kernel that are compiled ahead of time: (kernel, signature, constants)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from shira_kernels.triton import _math
from shira_kernels.triton import topk_indices as topk
from shira_kernels.triton.scatter_apply import BLOCK, scatter_apply_kernel
from shira_kernels.triton.scatter_apply_batched import scatter_apply_batched_kernel

MODES = (_math.REPLACE.value, _math.INTERPOLATE.value, _math.ADD.value)
# Weight and value types as the launchers pass them: bits where entries are replaced, bfloat16 as int16.
PAIRS = {
    _math.REPLACE.value: [(kind, kind) for kind in ("u8", "i16", "i32", "i64")],
    _math.INTERPOLATE.value: [(kind, kind) for kind in ("fp64", "fp32", "i16", "fp16")],
    _math.ADD.value: [
        *((kind, kind) for kind in ("fp64", "fp32", "i16", "fp16")),
        *((kind, "fp32") for kind in ("fp64", "i16", "fp16")),
    ],
}


# What topk_indices reads its scores as: bits, and above which magnitude they are a NaN.
SCORES = {("i16", 0x7F80), ("i16", 0x7C00), ("i32", 0x7F800000), ("i64", 0x7FF0000000000000)}


def topk_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    for kind, infinity in sorted(SCORES):
        bits = int(kind[1:])
        constants = {"NAN_ABOVE": infinity, "BITS": bits, "BLOCK": topk.BLOCK}
        common = {"score": f"*{kind}", "numel": "i64", "state": "*i64"}
        numbers = {"shares": "*i64", "ends": "*i64", "programs": "i64"}
        for shift in range(0, bits, 8):
            digit = {"SHIFT": shift, "FIRST": shift == bits - 8, "DIGITS": topk.DIGITS}
            kernels = [(topk.topk_count_kernel, {**common, "counts": "*i64"}, {**digit, **constants})]
            kernels.append((topk.topk_choose_kernel, {"state": "*i64", "counts": "*i64"}, digit))
            for kernel, signature, values in kernels:
                yield kernel, {**signature, **dict.fromkeys(values, "constexpr")}, values
        constant = dict.fromkeys(constants, "constexpr")
        shares = {name: numbers[name] for name in ("shares", "programs")}
        yield topk.topk_share_kernel, {**common, **shares, **constant}, constants
        for index in ("i32", "i64"):
            yield topk.topk_emit_kernel, {**common, **numbers, "result": f"*{index}", **constant}, constants


def variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    for mode, index, keep in itertools.product(MODES, ("i32", "i64"), (False, True)):
        for weight, value in PAIRS[mode]:
            vectors = {"indices": f"*{index}", "values": f"*{value}", "saved": f"*{weight}", "nnz": "i64"}
            constants = {"MODE": mode, "KEEP": keep, "BLOCK": BLOCK}
            yield (
                scatter_apply_kernel,
                {
                    "weight": f"*{weight}",
                    **vectors,
                    "numel": "i64",
                    "alpha_bits": "i64",
                    **dict.fromkeys(constants, "constexpr"),
                },
                constants,
            )
            constants = {"STEPS": 8, **constants}
            yield (
                scatter_apply_batched_kernel,
                {
                    "table": "*i64",
                    "offsets": "*i64",
                    **vectors,
                    "element": f"*{weight}",
                    "count": "i32",
                    "alpha_bits": "i64",
                    **dict.fromkeys(constants, "constexpr"),
                },
                constants,
            )
    yield from topk_variants()
