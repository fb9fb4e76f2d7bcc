"""Runs one op on one backend and compares it with the reference on the CPU: a worker of the GPU check.

    python tools/gpu_smoke.py OP BACKEND --record FILE [--device cpu] [--sizes tiny,small,medium] [--tiny]

All arguments are compared afterwards, bit for bit, with those of the reference; so is what an op returns, except where
it is a sum whose order is free: that may be as far from the float64 sum as its roundings allow. `--tiny` runs a few
small cases, for tools that slow a kernel down a thousand times.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_records
import torch

from shira_kernels import backends

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
I32, I64, U16 = torch.int32, torch.int64, torch.uint16
SECONDS_OF_A_CASE = 20.0  # on a GPU, its kernels' compilation included
NUMBERS = (1e-2, 0.9, 0.999, 1e-8, 0.1)  # lr, beta1, beta2, eps, weight_decay


@dataclass(frozen=True)
class Case:
    """One call. `terms` is the largest number of terms of a sum, of an op whose sums may be taken in any order."""

    name: str
    arguments: Sequence[Any]
    terms: int | None = None


@dataclass(frozen=True)
class Size:
    """Of a case: a weight [rows, columns], a share of its entries, and tokens; and the dtypes it is run with."""

    rows: int
    columns: int
    density: float
    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


# Each pair of sizes and dtypes is compiled anew: not all of them everywhere.
SIZES = {
    "tiny": Size(20, 50, 0.3, (3, 20), (F32, BF16)),
    "small": Size(37, 61, 0.3, (1, 40), (F32, BF16, F16, F64)),
    "medium": Size(1000, 1032, 0.02, (8, 300), (F32, BF16)),
}


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def entries(numel: int, density: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Sorted, unique flat positions."""
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density
    return mask.nonzero().view(-1).to(dtype)


def csr(size: Size, row_ptr: torch.dtype, col: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = entries(size.rows * size.columns, size.density, I64, seed)
    borders = torch.searchsorted(flat, torch.arange(size.rows + 1) * size.columns)
    return borders.to(row_ptr), (flat % size.columns).to(col)


def scatter_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    shape = (size.rows, size.columns)
    for dtype, index in zip(dtypes, itertools.cycle((I32, I64))):
        indices = entries(size.rows * size.columns, size.density, index, 1)
        for alpha, additive in ((1.0, False), (0.3, False), (-0.4, True)):
            value_dtype = F32 if additive and dtype != F64 else dtype
            saved = torch.zeros(len(indices), dtype=dtype)
            arguments = [numbers(shape, dtype, 2), indices, numbers([len(indices)], value_dtype, 3), alpha, additive]
            yield Case(f"{dtype} alpha {alpha} additive {additive}", [*arguments, saved])
    for dtype in (torch.uint8, torch.int64):
        indices = entries(size.rows * size.columns, size.density, I32, 1)
        random = torch.Generator().manual_seed(4)
        weight = torch.randint(0, 200, shape, generator=random).to(dtype)
        values = torch.randint(0, 200, indices.shape, generator=random).to(dtype)
        yield Case(str(dtype), [weight, indices, values])


def model(size: Size, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights of different sizes, an empty one among them."""
    shapes = ((size.rows, size.columns), (0,), (3, 5), (size.columns,))
    return [numbers(shape, dtype, i) for i, shape in enumerate(shapes)]


def arena(weights: Sequence[torch.Tensor], density: float, index: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Offsets and indices of a list of entries of all weights."""
    parts = [entries(weight.numel(), density, index, seed + i) for i, weight in enumerate(weights)]
    return [torch.tensor([0, *itertools.accumulate(map(len, parts))]), torch.cat(parts)]


def batched_scatter_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    for dtype, index in zip(dtypes, itertools.cycle((I32, I64))):
        for alpha, additive in ((1.0, False), (0.3, False), (0.3, True)):
            weights = model(size, dtype)
            offsets, indices = arena(weights, size.density, index, 1)
            values = numbers([len(indices)], dtype, 5)
            saved = torch.zeros_like(values)
            yield Case(
                f"{dtype} alpha {alpha} additive {additive}",
                [weights, offsets, indices, values, alpha, additive, saved],
            )


def switch_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    for dtype, (old_index, index) in zip(dtypes, itertools.cycle(((I32, I32), (I64, I32), (I32, I64), (I64, I64)))):
        for alpha, additive in ((1.0, False), (0.3, False), (0.3, True)):
            weights = model(size, dtype)
            old, new = arena(weights, size.density, old_index, 1), arena(weights, size.density, index, 50)
            old_saved, values = numbers([len(old[1])], dtype, 5), numbers([len(new[1])], dtype, 6)
            saved = torch.zeros_like(values)
            yield Case(
                f"{dtype} alpha {alpha} additive {additive}",
                [weights, *old, old_saved, *new, values, saved, alpha, additive],
            )


def adamw_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Not float64, where the reference's square roots may be a bit off."""
    kinds = [dtype for dtype in dtypes if dtype != F64]
    for dtype, index, (master, dense) in itertools.product(
        kinds, (I32, I64), ((True, False), (True, True), (False, True))
    ):
        weights = model(size, dtype)
        offsets, indices = arena(weights, size.density, index, 1)
        counts = offsets.diff().tolist()
        grads = [
            numbers(w.shape if dense else [n], F32, 9 + i) for i, (w, n) in enumerate(zip(weights, counts, strict=True))
        ]
        nnz = len(indices)
        states = [numbers([nnz], F32, 20).mul_(0.1), numbers([nnz], F32, 21).square_()]
        masters = numbers([nnz], F32, 22) if master else None
        name = f"{dtype} {index} {'master' if master else 'no master'}, {'dense' if dense else 'compact'} gradients"
        yield Case(name, [weights, offsets, indices, grads, *states, masters, torch.tensor(3.0), *NUMBERS])


def masked_grad_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    for dtype, tokens, (row_ptr, col) in itertools.product(dtypes, size.tokens, ((I32, U16), (I64, I32))):
        operands = [numbers((tokens, size.rows), dtype, 1), numbers((tokens, size.columns), dtype, 2)]
        yield Case(f"{dtype} {tokens} tokens {col}", [*operands, *csr(size, row_ptr, col, 3)], terms=tokens)


def delta_cases(size: Size, dtypes: Sequence[torch.dtype], into: bool, transposed: bool = False) -> Iterator[Case]:
    for dtype, tokens, (row_ptr, col) in itertools.product(dtypes, size.tokens, ((I32, U16), (I64, I32))):
        index = csr(size, row_ptr, col, 3)
        value_dtype = F32 if col == I32 and dtype != F64 else dtype
        values = numbers([len(index[1])], value_dtype, 4)
        inner, outer = (size.rows, size.columns) if transposed else (size.columns, size.rows)
        x = numbers((tokens, inner), dtype, 5)
        arguments = [numbers((tokens, outer), dtype, 6), x, *index, values] if into else [x, *index, values, outer]
        yield Case(f"{dtype} {tokens} tokens {col}", arguments, terms=max(size.rows, size.columns))


def mixed_cases(size: Size, dtypes: Sequence[torch.dtype], into: bool) -> Iterator[Case]:
    """Three adapters in one arena, with and without pages; some tokens have none."""
    for dtype, tokens, paged in itertools.product(dtypes, size.tokens, (False, True)):
        parts = [csr(size, I32, U16, 3 + i) for i in range(3)]
        lists = [numbers([len(col)], dtype, 20 + i) for i, (_, col) in enumerate(parts)]
        counts = [len(col) for _, col in parts]
        if paged:
            page = 16
            used = [-(-count // page) for count in counts]
            # uint16 columns are moved as int16: torch cannot pad or put uint16 everywhere.
            col = torch.zeros(sum(used), page, dtype=torch.int16)
            values = torch.zeros(sum(used), page, dtype=dtype)
            table = torch.zeros(3, max(used), dtype=I32)
            first = 0
            for i, (number, count) in enumerate(zip(used, counts, strict=True)):
                col[first : first + number].view(-1)[:count] = parts[i][1].view(torch.int16)
                values[first : first + number].view(-1)[:count] = lists[i]
                table[i, :number] = torch.arange(first, first + number)
                first += number
            stored = [torch.stack([borders for borders, _ in parts]), col.view(U16), values, table]
        else:
            starts = [0, *itertools.accumulate(counts)]
            borders = torch.stack([borders + start for (borders, _), start in zip(parts, starts[:3], strict=True)])
            stored = [
                borders.to(I32),
                torch.cat([col.view(torch.int16) for _, col in parts]).view(U16),
                torch.cat(lists),
                None,
            ]
        adapters = (torch.arange(tokens) * 7 % 4 - 1).to(I32)
        x, out = numbers((tokens, size.columns), dtype, 5), numbers((tokens, size.rows), dtype, 6)
        row_ptr, col, values, pages = stored
        arguments = [out, x, adapters, *stored] if into else [x, adapters, row_ptr, col, values, size.rows, pages]
        yield Case(f"{dtype} {tokens} tokens{' in pages' if paged else ''}", arguments, terms=size.columns)


def extract_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    for dtype in (*dtypes, torch.uint8):
        base = (numbers((size.rows, size.columns), F64, 1) * 50).abs().to(dtype)
        for density in (0.0, size.density, 1.0):
            mask = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < density
            tuned = torch.where(mask, base + 1, base)
            yield Case(f"{dtype} {density:.0%}", [base, tuned])


def topk_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    numel = size.rows * size.columns
    for dtype in dtypes:
        score = numbers([numel], dtype, 1).abs()
        ties = (score * 4).round() / 4
        for k in (0, 1, numel // 50, numel // 3, numel):
            yield Case(f"{dtype} k {k}", [score, k])
            yield Case(f"{dtype} k {k} with ties", [ties, k])


def fuse_cases(size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    numel = size.rows * size.columns
    for dtype, policy, index in itertools.product(dtypes, ("sum", "mean", "last", "ties"), (I32, I64)):
        lists = [entries(numel, share, index, i) for i, share in enumerate((size.density, 0.0, size.density / 9, 0.5))]
        values = [numbers([len(positions)], dtype, 9 + i) for i, positions in enumerate(lists)]
        yield Case(f"{dtype} {policy} {index}", [lists, values, torch.tensor([0.7, 0.3, -0.5, 1.25]), policy])


Maker = Callable[[Size, Sequence[torch.dtype]], Iterator[Case]]
MAKERS: dict[str, Maker] = {
    "scatter_apply": scatter_cases,
    "scatter_apply_batched": batched_scatter_cases,
    "scatter_switch_batched": switch_cases,
    "masked_adamw": adamw_cases,
    "masked_grad": masked_grad_cases,
    "sparse_delta_mm": lambda size, dtypes: delta_cases(size, dtypes, into=False),
    "sparse_delta_mm_transposed": lambda size, dtypes: delta_cases(size, dtypes, into=False, transposed=True),
    "add_sparse_delta_mm": lambda size, dtypes: delta_cases(size, dtypes, into=True),
    "sparse_delta_mm_batched": lambda size, dtypes: mixed_cases(size, dtypes, into=False),
    "add_sparse_delta_mm_batched": lambda size, dtypes: mixed_cases(size, dtypes, into=True),
    "extract_changed": extract_cases,
    "topk_indices": topk_cases,
    "fuse_adapters": fuse_cases,
}


def mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A copy of nested lists with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return [mapped(change, item) for item in value] if isinstance(value, (list, tuple)) else value


def flat(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach().cpu()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)


def called(
    op: Callable[..., Any], arguments: Sequence[Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """All tensors of a call on changed copies of the arguments: these, and what it returns."""
    own = mapped(change, arguments)
    result = op(*own)
    return list(flat([own, result]))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def difference(case: Case, op: Callable[..., Any], reference: Callable[..., Any], device: str) -> str:
    """What is wrong with the op's results; empty if nothing is."""
    got = called(op, case.arguments, lambda tensor: tensor.to(device, copy=True))
    want = called(reference, case.arguments, torch.clone)
    if len(got) != len(want):
        return f"{len(got)} tensors instead of {len(want)}"
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return f"tensor {i} is {mine.dtype} {list(mine.shape)} instead of {theirs.dtype} {list(theirs.shape)}"
        if case.terms is None or not mine.is_floating_point():
            wrong = int((as_bits(mine) != as_bits(theirs)).view(mine.numel(), -1).any(1).sum()) if mine.numel() else 0
            if wrong:
                return f"tensor {i}: {wrong} of {mine.numel()} entries differ in their bits from the reference"
    return beyond_rounding(case, got, reference) if case.terms is not None else ""


def beyond_rounding(case: Case, got: list[torch.Tensor], reference: Callable[..., Any]) -> str:
    """Whether sums of at most `terms` terms are further from the float64 ones than their roundings allow."""
    terms = case.terms or 0
    exact = called(reference, case.arguments, lambda t: t.double() if t.is_floating_point() else t)
    size = called(reference, case.arguments, lambda t: t.double().abs() if t.is_floating_point() else t)
    for i, (mine, right, magnitude) in enumerate(zip(got, exact, size, strict=True)):
        if mine.is_floating_point():
            kind = torch.finfo(mine.dtype)
            error = (terms + 2) * torch.finfo(torch.promote_types(mine.dtype, F32)).eps * magnitude
            allowed = error + kind.eps / 2 * (right.abs() + error) + kind.smallest_normal * kind.eps
            if not bool(((mine.double() - right).abs() <= allowed).all()):
                return f"tensor {i}: a sum is further from the float64 sum than {terms} roundings explain"
    return ""


def run_case(case: Case, op: Callable[..., Any], reference: Callable[..., Any], device: str) -> tuple[str, str]:
    """ "ok", "wrong" or "died", and a note."""
    try:
        wrong = difference(case, op, reference, device)
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        return "died", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ("wrong", wrong) if wrong else ("ok", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=sorted(MAKERS))
    parser.add_argument("backend")
    parser.add_argument("--record", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="tiny,small,medium")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = {"op": options.op, "backend": options.backend}
    run_on = "reference" if options.device == "cpu" and options.backend == "cuda" else options.backend
    if reason := backends.reason_unavailable(options.op, run_on):
        gpu_records.append(options.record, **facts, result="missing", note=reason)
        return 0
    op, reference = backends.kernel(options.op, run_on), backends.kernel(options.op, "reference")
    for name in ["tiny"] if options.tiny else options.sizes.split(","):
        for case in MAKERS[options.op](SIZES[name], SIZES[name].dtypes):
            if options.device == "cuda":
                # Ends the process, also one that waits for a GPU which does not answer.
                faulthandler.dump_traceback_later(SECONDS_OF_A_CASE, exit=True)
            result, note = run_case(case, op, reference, options.device)
            gpu_records.append(options.record, **facts, case=f"{name} {case.name}", result=result, note=note)
            if result == "died":  # the context of the GPU may be lost
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
