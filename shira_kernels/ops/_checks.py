"""Checks that ops share. Each raises RuntimeError naming the op, the argument and what would be right."""

from __future__ import annotations

import itertools
from typing import NamedTuple, NoReturn

import torch

INDEX_DTYPES = (torch.int32, torch.int64)
COLUMN_DTYPES = (torch.int32, torch.uint16)
Named = list[tuple[str, torch.Tensor]]


class ListNames(NamedTuple):
    """What the vectors of a sorted list are called in errors."""

    offsets: str = "offsets"
    indices: str = "indices"
    values: str = "values"


LIST_NAMES = ListNames()


def fail(op: str, argument: str, message: str) -> NoReturn:
    raise RuntimeError(f"shira::{op}: {argument} {message}")


def check_plain(op: str, written: Named, read: Named, writes: bool) -> None:
    """Tensors have their elements in memory. An op that writes gets no copies of lazy views, which others do."""
    for argument, tensor in (*written, *read):
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
            fail(op, argument, f"must be a strided tensor, got {kind}")
        if writes and (tensor.is_neg() or tensor.is_conj()):
            fail(op, argument, "must not be lazily negated or conjugated")


def check_storage(op: str, written: Named, read: Named) -> None:
    """The memory of tensors is as large as their shapes say; libraries that shard models give it back meanwhile."""
    for argument, tensor in (*written, *read):
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # by a transform: without storage
        if tensor.numel() and not tensor.is_meta and not wrapped:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
            if tensor.untyped_storage().nbytes() < needed:
                fail(op, argument, f"must have its elements in memory, got {needed} bytes in storage that was resized")


def check_memory(op: str, argument: str, tensor: torch.Tensor) -> None:
    """Contiguous."""
    if not tensor.is_contiguous():
        fail(op, argument, f"must be contiguous, got strides {tensor.stride()}")


def check_vector(op: str, argument: str, tensor: torch.Tensor, like: torch.Tensor, length: int | None = None) -> None:
    """1-D, contiguous, on the device of `like`, and of the given length."""
    if tensor.dim() != 1:
        fail(op, argument, f"must be 1-D, got shape {tuple(tensor.shape)}")
    check_memory(op, argument, tensor)
    if tensor.device != like.device:
        fail(op, argument, f"must be on {like.device} like the others, got {tensor.device}")
    if length is not None and tensor.shape[0] != length:
        fail(op, argument, f"must have one entry per index ({length}), got {tensor.shape[0]}")


def check_indices(op: str, indices: torch.Tensor, like: torch.Tensor, argument: str = "indices") -> None:
    if indices.dtype not in INDEX_DTYPES:
        fail(op, argument, f"must be int32 or int64, got {indices.dtype}")
    check_vector(op, argument, indices, like)


def check_index_contents(op: str, indices: torch.Tensor, numel: int, argument: str = "indices") -> None:
    """Sorted, unique and inside a tensor of `numel` elements. Reads the data, so it waits for a GPU."""
    if indices.numel() == 0:
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        fail(op, argument, "must be sorted and unique")
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= numel:
        fail(op, argument, f"must lie in [0, {numel}), got {first if first < 0 else last}")


def check_offsets(
    op: str, offsets: torch.Tensor, count: int, weights: list[torch.Tensor], argument: str = "offsets"
) -> None:
    """Checks the form of the offsets of a batch of `count` tensors."""
    if offsets.dtype != torch.int64:
        fail(op, argument, f"must be int64, got {offsets.dtype}")
    if offsets.dim() != 1 or not offsets.is_contiguous():
        fail(op, argument, f"must be 1-D and contiguous, got shape {tuple(offsets.shape)}")
    if offsets.shape[0] != count + 1:
        fail(op, argument, f"must have one entry more than weights ({count + 1}), got {offsets.shape[0]}")
    if offsets.device.type != "cpu" and weights and offsets.device != weights[0].device:
        fail(op, argument, f"must be on the CPU or on {weights[0].device}, got {offsets.device}")


def check_offset_contents(op: str, offsets: torch.Tensor, nnz: int, argument: str = "offsets") -> list[int]:
    """Begins with 0, never falls, ends with nnz; returned as a list. Waits for a GPU that holds them."""
    borders: list[int] = offsets.tolist()
    if borders[0] != 0 or borders[-1] != nnz or any(a > b for a, b in itertools.pairwise(borders)):
        fail(op, argument, f"must rise from 0 to the number of indices ({nnz}), got {_shorten(borders)}")
    return borders


def _shorten(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def check_csr(op: str, row_ptr: torch.Tensor, col: torch.Tensor, rows: int, like: torch.Tensor, what: str) -> None:
    """Checks the form of the entries of a matrix of `rows` rows; `what` says in errors whose rows these are."""
    if row_ptr.dtype not in INDEX_DTYPES:
        fail(op, "row_ptr", f"must be int32 or int64, got {row_ptr.dtype}")
    if col.dtype not in COLUMN_DTYPES:
        fail(op, "col", f"must be int32 or uint16, got {col.dtype}")
    check_vector(op, "row_ptr", row_ptr, like)
    check_vector(op, "col", col, like)
    if rows < 0:
        fail(op, "out_features", f"must not be negative, got {rows}")
    if row_ptr.shape[0] != rows + 1:
        fail(op, "row_ptr", f"must have one entry more than {what} ({rows + 1}), got {row_ptr.shape[0]}")


def check_csr_contents(op: str, row_ptr: torch.Tensor, col: torch.Tensor, width: int) -> None:
    """row_ptr rises from 0 to nnz; columns are sorted and unique in each row, and lie in [0, width). Reads the data, so
    it waits for a GPU."""
    borders, nnz = row_ptr.long(), col.shape[0]
    first, last = int(borders[0]), int(borders[-1])
    if first != 0 or last != nnz or bool((borders.diff() < 0).any()):
        fail(op, "row_ptr", f"must rise from 0 to the number of entries ({nnz}), got from {first} to {last}")
    columns = col.to(torch.int32)
    rises = columns.diff() > 0
    inner = borders[1:-1]
    rises[inner[(inner > 0) & (inner < nnz)] - 1] = True  # a new row may begin anywhere
    if not bool(rises.all()):
        fail(op, "col", "must be sorted and unique within each row")
    if nnz and (int(columns.min()) < 0 or int(columns.max()) >= width):
        wrong = int(columns.min()) if int(columns.min()) < 0 else int(columns.max())
        fail(op, "col", f"must lie in [0, {width}), got {wrong}")


def check_overlap(op: str, written: Named, read: Named) -> None:
    """No written tensor, which are contiguous, shares memory with any other that a kernel reads: of one that is not
    contiguous it reads a copy."""
    spans = [
        (begin := tensor.data_ptr(), begin + tensor.nbytes, name, is_written)
        for group, is_written in ((written, True), (read, False))
        for name, tensor in group
        if tensor.nbytes and tensor.is_contiguous()
    ]
    spans.sort()
    # The furthest end so far, of all spans and of the written ones, with the names of their tensors.
    reach, reach_written = (0, ""), (0, "")
    for begin, end, name, is_written in spans:
        other = reach if is_written else reach_written
        if begin < other[0]:
            first, second = sorted((name, other[1]), key=lambda n: (not n.startswith("saved"), n))
            fail(op, first, f"must not share memory with {second}")
        reach = max(reach, (end, name))
        if is_written:
            reach_written = max(reach_written, (end, name))


def check_autograd(op: str, written: Named, read: Named) -> None:
    """The op is not differentiable: outside no_grad none of these may require grad. Nor may an inference tensor be
    written outside inference mode."""
    if torch.is_grad_enabled():
        for argument, tensor in (*written, *read):
            if tensor.requires_grad:
                fail(op, argument, "requires grad: call this op under torch.no_grad()")
    if not torch.is_inference_mode_enabled():
        for argument, tensor in written:
            if tensor.is_inference():
                fail(op, argument, "must not be an inference tensor outside torch.inference_mode()")
