"""The variants of each Triton kernel that are compiled ahead of time: (kernel, signature, constants)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from shira_kernels.triton import _marks, _math, _sparse_delta, masked_grad
from shira_kernels.triton import extract_changed as extract
from shira_kernels.triton import fuse_adapters as fuse
from shira_kernels.triton import masked_adamw as adamw
from shira_kernels.triton import scatter_apply_batched as batched
from shira_kernels.triton import scatter_switch_batched as switch
from shira_kernels.triton import topk_indices as topk
from shira_kernels.triton.scatter_apply import BLOCK, scatter_apply_kernel

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


Variant = tuple[Any, dict[str, str], dict[str, Any]]


def variants() -> Iterator[Variant]:
    yield from scatter_variants()
    yield from switch_variants()
    yield from masked_grad_variants()
    yield from adamw_variants()
    yield from topk_variants()
    yield from fuse_variants()
    yield from sparse_delta_variants()
    yield from extract_variants()


def sparse_delta_variants() -> Iterator[Variant]:
    pairs = [("fp64", "fp64"), ("fp32", "fp32"), ("i16", "i16"), ("fp16", "fp16"), ("i16", "fp32"), ("fp16", "fp32")]
    small, large = ("i32", "u16"), ("i64", "i32")
    forms = [(False, 0, True, small), (True, 0, True, large), (True, 4096, True, small), (True, 4096, False, large)]
    decode = {"ROWS": _sparse_delta.DECODE_ROWS, "ENTRIES": _sparse_delta.DECODE_ENTRIES}
    prefill = {name: getattr(_sparse_delta, name) for name in ("ROWS", "TOKENS", "UNROLLED")}
    for (kind, value), (mixed, page, add, (row_ptr, col)) in itertools.product(pairs, forms):
        form = {"BATCHED": mixed, "PAGE": page, "ADD": add}
        stored = {"row_ptr": f"*{row_ptr}", "col": f"*{col}", "values": f"*{value}", "page_table": "*i32"}
        numbers = {
            **dict.fromkeys(("rows", "columns", "adapters"), "i32"),
            "room": "i64",
            **dict.fromkeys(("pages", "pages_of_one"), "i32"),
        }
        few = {"out": f"*{kind}", "x": f"*{kind}", "token_adapter": "*i32", **stored, **numbers}
        many = {"out": f"*{kind}", "x_t": f"*{kind}", "token_adapter": "*i32", "order": "*i64", **stored}
        many |= {**dict.fromkeys(("tokens", "stride"), "i32"), **numbers}
        for kernel, signature, sizes in (
            (_sparse_delta.decode_kernel, few, decode),
            (_sparse_delta.prefill_kernel, many, prefill),
        ):
            constants = {**form, **sizes}
            yield kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants


def masked_grad_variants() -> Iterator[Variant]:
    kinds = {"fp64": 8, "fp32": 4, "i16": 2, "fp16": 2}
    for kind, row_ptr, col in itertools.product(kinds, ("i32", "i64"), ("u16", "i32")):
        constants = {
            "STEPS": 13,
            "WIDEN": False,
            "ROWS": masked_grad.ROWS,
            "COLUMNS": masked_grad.COLUMNS,
            "TOKENS": masked_grad.TOKENS[kinds[kind]],
            "PICKED": masked_grad.PICKED,
        }
        signature = {
            **dict.fromkeys(("grad_output", "x"), f"*{kind}"),
            "row_ptr": f"*{row_ptr}",
            "col": f"*{col}",
            "sums": "*fp64" if kind == "fp64" else "*fp32",
            **dict.fromkeys(("tokens", "rows", "columns", "nnz"), "i64"),
            **dict.fromkeys(constants, "constexpr"),
        }
        yield masked_grad.masked_grad_kernel, signature, constants


# What topk_indices reads its scores as: bits, and above which magnitude they are a NaN.
SCORES = {("i16", 0x7F80), ("i16", 0x7C00), ("i32", 0x7F800000), ("i64", 0x7FF0000000000000)}


def topk_variants() -> Iterator[Variant]:
    for kind, infinity in sorted(SCORES):
        bits = int(kind[1:])
        score = {"NAN_ABOVE": infinity, "BITS": bits, "DIGIT": topk.DIGIT}
        table = {**score, "COPIES": topk.COPIES}
        common = {"score": f"*{kind}", "numel": "i64", "state": "*i64", "table": "*i32"}
        ranks = dict.fromkeys(("wanted", "high_rank", "low_rank"), "i64")
        marked = {**common, "marks": "*i32", "words": "i64"}
        block = {"WORDS": max(_marks.words_of_a_block(bits // 8), topk.FEWEST_WORDS)}
        forms = [
            (topk.topk_sample_kernel, {**common, **ranks}, {**score, "SAMPLE_BITS": topk.SAMPLE.bit_length() - 1}),
            (topk.topk_mark_kernel, marked, {**table, **block}),
        ]
        for first, last in ((True, False), (False, False), (False, True)):
            form = {"FIRST": first, "LAST": last, "WORDS": _marks.WORDS}
            forms.append((topk.topk_narrow_kernel, {**marked, "shares": "*i32"}, {**table, **form}))
        for kernel, signature, constants in forms:
            yield kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants
    for index in ("i32", "i64"):
        yield written(index, "i32", {"TIES": True, "VALUES": False, "PER": 1})


def extract_variants() -> Iterator[Variant]:
    for kind, size in (("u8", 1), ("i16", 2), ("i32", 4), ("i64", 8)):
        words = _marks.words_of_a_block(size)
        constants = {"WORDS": words}
        common = {"base": f"*{kind}", "tuned": f"*{kind}", "numel": "i64", "marks": "*i32", "counts": "*i32"}
        yield extract.extract_mark_kernel, {**common, **dict.fromkeys(constants, "constexpr")}, constants
        for index in ("i32", "i64"):
            yield written(index, kind, {"TIES": False, "VALUES": True, "PER": _marks.WORDS // words})


def written(index: str, kind: str, form: dict[str, Any]) -> Variant:
    """Marks as indices of one type, with values of another."""
    constants = {**form, "WORDS": _marks.WORDS}
    signature = {
        "marks": "*i32",
        "words": "i64",
        "counts": "*i32",
        "ends": "*i64",
        "blocks": "i64",
        "ties_wanted": "*i64",
        "indices": f"*{index}",
        **dict.fromkeys(("source", "values"), f"*{kind}"),
        **dict.fromkeys(constants, "constexpr"),
    }
    return _marks.write_marked_kernel, signature, constants


def fuse_variants() -> Iterator[Variant]:
    for index, entry in (("i32", "i32"), ("i64", "i32"), ("i64", "i64")):
        lists = {"indices": f"*{index}", "offsets": "*i64", "number": "i32"}
        parts = {**lists, "blocks": "*i64", "cuts": f"*{entry}"}
        ranked = {"order": f"*{entry}", "total": "i64", "counts": "*i32"}
        for kernel, signature, block in (
            (fuse.fuse_cut_kernel, {**parts, "longest": "i64", "cut_count": "i64"}, fuse.BLOCK),
            (fuse.fuse_rank_kernel, {**parts, "order": f"*{entry}"}, fuse.BLOCK),
            (fuse.fuse_count_kernel, ranked, fuse.RANKS),
        ):
            yield kernel, {**signature, "BLOCK": "constexpr"}, {"BLOCK": block}
        for policy, number in fuse.POLICIES.items():
            for kind in ("i16", "i32", "i64") if policy == "last" else ("fp64", "fp32", "i16", "fp16"):
                constants = {"POLICY": number.value, "BLOCK": fuse.RANKS}
                signature = {
                    **lists,
                    **ranked,
                    **dict.fromkeys(("values", "result"), f"*{kind}"),
                    "weights": "*fp32",
                    "ends": "*i64",
                    "union": f"*{index}",
                    **dict.fromkeys(constants, "constexpr"),
                }
                yield fuse.fuse_write_kernel, signature, constants


def scatter_variants() -> Iterator[Variant]:
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
            constants = {"STEPS": 8, **constants, "BLOCK": batched.BLOCK}
            yield (
                batched.scatter_apply_batched_kernel,
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


def switch_variants() -> Iterator[Variant]:
    for mode, old_index, index in itertools.product(MODES, ("i32", "i64"), ("i32", "i64")):
        for weight, value in PAIRS[mode]:
            constants = {"STEPS": 8, "MODE": mode, "BLOCK": switch.BLOCK}
            signature = {
                "table": "*i64",
                "old_offsets": "*i64",
                "old_indices": f"*{old_index}",
                "old_saved": f"*{weight}",
                "offsets": "*i64",
                "indices": f"*{index}",
                "values": f"*{value}",
                **dict.fromkeys(("saved", "element"), f"*{weight}"),
                "count": "i32",
                **dict.fromkeys(("old_nnz", "nnz"), "i64"),
                **dict.fromkeys(("programs", "old_steps", "steps"), "i32"),
                "alpha_bits": "i64",
                **dict.fromkeys(constants, "constexpr"),
            }
            yield switch.scatter_switch_batched_kernel, signature, constants


def adamw_variants() -> Iterator[Variant]:
    pairs = [("fp64", "fp64"), ("fp64", "fp32"), ("fp32", "fp32"), ("i16", "i16"), ("i16", "fp32"), ("fp16", "fp32")]
    for (weight, grad), index, master in itertools.product(pairs, ("i32", "i64"), (False, True)):
        compute = "fp64" if weight == "fp64" else "fp32"
        constants = {"STEPS": 8, "MASTER": master, "STEP_ON_DEVICE": master, "BLOCK": adamw.BLOCK}
        signature = {
            "table": "*i64",
            "offsets": "*i64",
            "indices": f"*{index}",
            **dict.fromkeys(("exp_avg", "exp_avg_sq", "master"), f"*{compute}"),
            "step": "*fp32",
            "step_count": "i64",
            "element": f"*{weight}",
            "grad_element": f"*{grad}",
            "count": "i32",
            "nnz": "i64",
            **dict.fromkeys((f"{name}_bits" for name in ("lr", "beta1", "beta2", "eps", "weight_decay")), "i64"),
            **dict.fromkeys(constants, "constexpr"),
        }
        yield adamw.masked_adamw_kernel, signature, constants
