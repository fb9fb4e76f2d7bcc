"""extract_changed in Triton.

indices = the positions i where base[i] and tuned[i] differ as integers, sorted;   values = tuned[indices]

Shapes: base and tuned flat [numel], as integers of the element's size; counts, ends [programs]; indices, values [nnz].
A program owns BLOCK neighbours. It counts those that differ; sums over the programs before tell where its part of the
result begins; then it writes that part in order. A result has one writer: no atomics, no race, deterministic. Between
the two passes the host reads one number, the size of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits

BLOCK = 2048


@triton.jit
def differing(base, tuned, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    v = tl.load(tuned + i, mask=inside, other=0)
    return i, v, inside & (tl.load(base + i, mask=inside, other=0) != v)


@triton.jit
def extract_count_kernel(base, tuned, numel, counts, BLOCK: tl.constexpr):
    _, _, differs = differing(base, tuned, numel, BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(differs.to(tl.int32), 0).to(tl.int64))


@triton.jit
def extract_write_kernel(base, tuned, numel, counts, ends, indices, values, BLOCK: tl.constexpr):
    """ends: the sums of counts up to and with each program."""
    program = tl.program_id(0)
    first = tl.load(ends + program) - tl.load(counts + program)
    i, v, differs = differing(base, tuned, numel, BLOCK)
    one = differs.to(tl.int32)
    place = first + tl.cumsum(one, 0) - one
    tl.store(indices + place, i.to(indices.dtype.element_ty), mask=differs)
    tl.store(values + place, v, mask=differs)


def extract_changed(base: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numel = base.numel()
    # Lazily negated or conjugated tensors become what they stand for.
    old, new = (as_bits(t.detach().resolve_conj().resolve_neg().contiguous()) for t in (base, tuned))
    grid = (triton.cdiv(numel, BLOCK),)
    counts = torch.empty(grid, dtype=torch.int64, device=base.device)
    if numel:
        extract_count_kernel[grid](old, new, numel, counts, BLOCK=BLOCK)
    ends = counts.cumsum(0)
    nnz = int(ends[-1]) if numel else 0
    indices = torch.empty(nnz, dtype=torch.int32 if numel < 2**31 else torch.int64, device=base.device)
    values = torch.empty(nnz, dtype=tuned.dtype, device=base.device)
    if nnz:
        extract_write_kernel[grid](old, new, numel, counts, ends, indices, as_bits(values), BLOCK=BLOCK)
    return indices, values
