"""How trained values get their gradient: autograd functions that attached modules call (`shira.training.layers`).

- `LinearTap`, behind a linear layer: an identity that keeps the layer's input; its backward is `masked_grad`.
- `EmbeddingTap`, behind an embedding: an identity whose backward sums the rows of each token.
- `Alias`, before any other layer: what the layer reads as its weight; its backward gathers from the dense gradient,
  which autograd makes for one layer at a time.

None of them can be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shira_kernels.dtypes import index_dtype
from shira_kernels.ops.masked_grad import masked_grad


def csr_of(indices: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(row_ptr [rows + 1], col [nnz]) of sorted flat positions in a matrix [rows, columns], in the narrowest dtypes
    that `masked_grad` takes."""
    rows, columns = shape
    flat = indices.long()
    borders = torch.arange(rows + 1, device=indices.device) * columns
    row_ptr = torch.searchsorted(flat, borders)
    narrow = torch.uint16 if columns <= 0xFFFF else torch.int32
    wide = index_dtype(indices.numel())
    return row_ptr.to(wide), (flat % columns).to(narrow)


def _passed(ctx: Any, output: torch.Tensor) -> torch.Tensor:
    """What the forward of an identity gives back: its input itself. A view of it could not be changed in place by what
    follows, as in Sequential(Linear, ReLU(inplace=True))."""
    if torch.compiler.is_compiling():
        # Dynamo of torch 2.10 and 2.11 makes a view of what is marked dirty, too. Inductor removes this copy.
        return output.clone()
    ctx.mark_dirty(output)
    return output


class LinearTap(torch.autograd.Function):
    """Gives back `output` as it is; its gradient passes, and the listed entries of the weight's are the values'.

    output [..., out], input [..., in], values [nnz], row_ptr and col as of `csr_of`; the weight is [out, in], or with
    `transposed` [in, out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        input: torch.Tensor,
        values: torch.Tensor,
        row_ptr: torch.Tensor,
        col: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, row_ptr, col)
        ctx.transposed, ctx.values_dtype = transposed, values.dtype
        return _passed(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_values = None
        if ctx.needs_input_grad[2]:
            input, row_ptr, col = ctx.saved_tensors
            input = input.to(grad_output.dtype)  # under autocast the layer cast it too
            left, right = (input, grad_output) if ctx.transposed else (grad_output, input)
            grad_values = masked_grad(left, right, row_ptr, col).to(ctx.values_dtype)
        return grad_output, None, grad_values, None, None, None


class EmbeddingTap(torch.autograd.Function):
    """Gives back an embedding's `output` as it is; its gradient passes, and summed by token it is the values'.

    output [..., columns], tokens [...] below `rows`, values and indices [nnz]; the weight is [rows, columns]. The row
    `padding_idx` gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        tokens: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        rows: int,
        padding_idx: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, indices)
        ctx.rows, ctx.padding_idx, ctx.values_dtype = rows, padding_idx, values.dtype
        return _passed(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, indices = ctx.saved_tensors
        tokens, entries = tokens.reshape(-1).long(), indices.long()
        count, columns = tokens.numel(), grad_output.shape[-1]
        # Equal tokens add up at the place of one of them, so that nothing here has the weight's size. The place after
        # the last stays zero, for rows without a token.
        place = torch.arange(count, device=tokens.device)
        place_of_row = tokens.new_full((ctx.rows,), count).index_copy_(0, tokens, place)
        gradients = grad_output.reshape(-1, columns).to(ctx.values_dtype)
        sums = gradients.new_zeros(count + 1, columns)
        if sums.is_cuda:  # index_add_ sums in any order there; this sorts
            sums.index_put_((place_of_row[tokens],), gradients, accumulate=True)
        else:
            sums.index_add_(0, place_of_row[tokens], gradients)
        if ctx.padding_idx is not None:
            place_of_row[ctx.padding_idx] = count
        grad_values = sums[place_of_row[entries // columns], entries % columns]
        return grad_output, None, grad_values, None, None, None


class Alias(torch.autograd.Function):
    """The weight, as a function of the values [nnz] at its flat `indices` [nnz]."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.values_dtype = values.dtype
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dense: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return dense.reshape(-1).index_select(0, indices).to(ctx.values_dtype), None, None
