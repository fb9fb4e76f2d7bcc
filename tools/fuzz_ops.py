"""Calls every op with hostile arguments, on the reference and on each instruction set that runs here, and compares.

    python tools/fuzz_ops.py --seconds 60
    python tools/fuzz_ops.py --seed 1234 --cases 1     # what a failure names

A case is a number: its arguments are first right ones, then up to three of them are spoiled: dtype, shape, strides,
layout, device, memory that is shared or gone, contents, sizes. For each case all kernels must accept or all refuse it;
a refusal is a RuntimeError that names the op and an argument, and changes no byte; what is accepted gives equal results
(the same bits, or sums within their rounding) and changes nothing but what the op writes. Some tensors lie between
guards in a larger buffer, some end where their memory does, which a sanitizer watches (`make sanitize`).

Cases run in a child process, so that a crash has its number, too.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import os
import random
import re
import shlex
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from shira_kernels import backends
from shira_kernels.dtypes import ARITHMETIC
from shira_kernels.ops import OPS

GUARD = 0xA5
FAILED = 3  # the exit status of a child that has said what is wrong
INTEGERS = (torch.int32, torch.int64)
ANY_DTYPES = (
    *ARITHMETIC,
    *INTEGERS,
    *(torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32)  # of which torch has no negative
NUMBERS = (
    *(-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 7, 2**16),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**62 + 1, 2**63 - 1),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, 3.5e38, float("inf"), float("-inf"), float("nan"), 2.0**63, 1e38)
# Said by torch where memory for a result, or for a copy, cannot be had; it is the same for all of torch's ops.
NO_MEMORY = re.compile(
    r"fit in memory|not enough memory|allocate memory|(size|[Ss]tride) calculation overflowed|multiplication overflow"
)
SUMS = ("sparse_delta", "masked_grad")  # ops that may add in any order


class Case:
    """The arguments of a case, the same at each making."""

    def __init__(self, seed: int, only: str = "") -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.buffers: list[torch.Tensor] = []  # bytes of all memory that tensors lie in
        self.op = only or self.random.choice(sorted(OPS))
        self.large = self.random.random() < 0.01  # enough for several threads
        self.arguments: dict[str, Any] = MAKERS[self.op](self)
        self.spoiled: list[str] = []
        for _ in range(self.random.choice((0, 1, 1, 1, 1, 2, 3))):
            self.spoil()
        self.grad = self.random.random() < 0.9
        self.threads = self.random.choice((1, 1, 2, 3))

    # Right arguments

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, most: int = 40) -> int:
        return self.random.choice((0, 1, 2, 3, 8, 17, self.random.randint(0, most)))

    def placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements in memory of their own: between guards, or to the end of what was allocated."""
        tensor = tensor.contiguous()
        number = self.random.choice((0, 0, 1, 3, 16, 64)) * tensor.element_size()
        buffer = torch.full((number + tensor.nbytes + number,), GUARD, dtype=torch.uint8)
        self.buffers.append(buffer)
        place = buffer[number : number + tensor.nbytes]
        if tensor.nbytes:
            place.copy_(tensor.reshape(-1).view(torch.uint8))
        return place.view(tensor.dtype).view(tensor.shape)

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.placed(torch.randn(shape, generator=self.generator).to(dtype))

    def positions(self, count: int, below: int, dtype: torch.dtype) -> torch.Tensor:
        """Sorted and unique."""
        some = torch.randperm(below, generator=self.generator)[: min(count, below)].sort().values
        return self.placed(some.to(dtype))

    def shape_of(self, numel: int) -> tuple[int, ...]:
        return (numel // 2, 2) if numel % 2 == 0 and self.chance(0.5) else (numel,)

    def borders(self, lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self.placed(torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype))

    def weight_dtype(self) -> torch.dtype:
        return self.random.choice((*ARITHMETIC, *ARITHMETIC, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn))

    def weight(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype in ARITHMETIC:
            return self.floats(self.shape_of(numel), dtype)
        return self.placed(torch.randint(0, 2, self.shape_of(numel), generator=self.generator).to(dtype))

    def scatter(self, batched: bool, lists: int = 1) -> dict[str, Any]:
        dtype, additive = self.weight_dtype(), self.chance(0.4)
        additive &= dtype in ARITHMETIC
        most = 60000 if self.large else 40
        sizes = [self.size(most) for _ in range(self.random.choice((0, 1, 1, 2, 3)) if batched else 1)]
        weights = [self.weight(size, dtype) for size in sizes]
        alpha = self.random.choice((1.0, 0.5, *FLOATS)) if dtype in ARITHMETIC else 1.0
        made: dict[str, Any] = {"weights": weights} if batched else {"weight": weights[0]}
        for i in range(lists):
            old = i < lists - 1
            index = self.random.choice(INTEGERS)
            parts = [self.positions(self.size(most), size, index) for size in sizes]
            nnz = sum(map(len, parts))
            if batched:
                made["old_offsets" if old else "offsets"] = self.borders([len(part) for part in parts])
            made["old_indices" if old else "indices"] = self.placed(torch.cat([*parts, torch.empty(0, dtype=index)]))
            wide = additive and not old and self.chance(0.5)
            entries = self.weight(nnz, torch.float32 if wide else dtype).reshape(-1)
            made["old_saved" if old else "values"] = entries
        if lists == 2 or self.chance(0.5):
            made["saved"] = self.weight(nnz, dtype).reshape(-1)
        return {**made, "alpha": alpha, "additive": additive}

    def adamw(self) -> dict[str, Any]:
        dtype, index = self.random.choice(ARITHMETIC), self.random.choice(INTEGERS)
        compute = torch.promote_types(dtype, torch.float32)
        most = 60000 if self.large else 40
        sizes = [self.size(most) for _ in range(self.random.choice((0, 1, 1, 2, 3)))]
        parts = [self.positions(self.size(most), size, index) for size in sizes]
        nnz = sum(map(len, parts))
        weights = [self.weight(size, dtype) for size in sizes]
        grad_dtype = self.random.choice((dtype, torch.float32))
        dense = [self.chance(0.5) for _ in sizes]
        return {
            "weights": weights,
            "offsets": self.borders([len(part) for part in parts]),
            "indices": self.placed(torch.cat([*parts, torch.empty(0, dtype=index)])),
            "grads": [
                self.floats(tuple(w.shape) if d else (len(part),), grad_dtype)
                for w, d, part in zip(weights, dense, parts, strict=True)
            ],
            "exp_avg": self.floats((nnz,), compute),
            "exp_avg_sq": self.placed(self.floats((nnz,), compute).abs()),
            "master": self.floats((nnz,), compute) if self.chance(0.5) else None,
            "step": self.placed(torch.tensor(float(self.random.choice((1, 2, 10, 1000))))),
            "lr": self.random.choice((1e-3, 0.0, 1e30)),
            "beta1": self.random.choice((0.9, 0.0, 0.3)),
            "beta2": self.random.choice((0.999, 0.0)),
            "eps": self.random.choice((1e-8, 0.0)),
            "weight_decay": self.random.choice((0.0, 0.01)),
        }

    def matrix(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """row_ptr and col."""
        narrow = columns < 2**16 and self.chance(0.5)
        parts = [self.positions(self.size(columns), columns, torch.int64) for _ in range(rows)]
        col = torch.cat([*parts, torch.empty(0, dtype=torch.int64)]).to(torch.uint16 if narrow else torch.int32)
        return self.borders([len(part) for part in parts], self.random.choice(INTEGERS)), self.placed(col)

    def product(self) -> dict[str, Any]:
        """x, a delta and its sizes."""
        dtype = self.random.choice(ARITHMETIC)
        rows, columns = self.size(), self.size(3000 if self.large else 60)
        leading = tuple(self.size(70 if self.large else 20) for _ in range(self.random.choice((0, 1, 1, 1, 2))))
        row_ptr, col = self.matrix(rows, columns)
        values = self.floats((len(col),), self.random.choice((dtype, torch.promote_types(dtype, torch.float32))))
        x = self.floats((*leading, columns), dtype)
        return {"x": x, "row_ptr": row_ptr, "col": col, "values": values, "rows": rows, "leading": leading}

    def plain(self, in_place: bool) -> dict[str, Any]:
        made = self.product()
        rows, leading = made.pop("rows"), made.pop("leading")
        return (
            {"out": self.floats((*leading, rows), made["x"].dtype), **made}
            if in_place
            else {
                **made,
                "out_features": rows,
            }
        )

    def transposed(self) -> dict[str, Any]:
        made = self.product()
        rows, leading, columns = made.pop("rows"), made.pop("leading"), made["x"].shape[-1]
        return {**made, "x": self.floats((*leading, rows), made["x"].dtype), "in_features": columns}

    def grad_at(self) -> dict[str, Any]:
        made = self.product()
        return {
            "grad_output": self.floats((*made["leading"], made["rows"]), made["x"].dtype),
            **{name: made[name] for name in ("x", "row_ptr", "col")},
        }

    def batched(self, in_place: bool) -> dict[str, Any]:
        dtype = self.random.choice(ARITHMETIC)
        rows, columns, adapters = self.size(), self.size(60), self.random.choice((0, 1, 2, 4))
        tokens = self.size(20)
        index = self.random.choice(INTEGERS)
        deltas = [self.matrix(rows, columns) for _ in range(adapters)]
        narrow = self.random.choice((torch.int32, torch.uint16))
        columns_of = [col.to(torch.int32) for _, col in deltas]
        col = torch.cat([*columns_of, torch.empty(0, dtype=torch.int32)])
        shift, borders, table = 0, [], None
        paged = self.chance(0.5)
        for row_ptr, _ in deltas:
            borders.append(row_ptr.to(index) + (0 if paged else shift))
            shift += int(row_ptr[-1])
        if paged:
            size = self.random.choice((1, 2, 5, 16))
            needed = [-(-len(c) // size) for c in columns_of]
            pages = sum(needed) + self.random.choice((0, 1, 3))
            order = torch.randperm(pages, generator=self.generator).to(torch.int32)
            arena = torch.randint(0, 9, (pages, size), generator=self.generator).to(torch.int32)
            table = torch.full((adapters, max([*needed, 0]) + self.random.choice((0, 1))), -7, dtype=torch.int32)
            for a, c in enumerate(columns_of):
                own, order = order[: needed[a]], order[needed[a] :]
                table[a, : needed[a]] = own
                filled = torch.zeros(needed[a] * size, dtype=torch.int32)
                filled[: len(c)] = c
                arena[own.long()] = filled.view(needed[a], size)
            col, table = arena, self.placed(table)
        x = self.floats((tokens, columns), dtype)
        made = {
            "x": x,
            "token_adapter": self.placed(torch.randint(-1, max(adapters, 0), (tokens,), generator=self.generator).int())
            if adapters
            else self.placed(torch.full((tokens,), -1, dtype=torch.int32)),
            "row_ptr": self.placed(torch.stack(borders) if borders else torch.empty(0, rows + 1, dtype=index)),
            "col": self.placed(col.to(narrow)),
            "values": self.floats(
                tuple(col.shape), self.random.choice((dtype, torch.promote_types(dtype, torch.float32)))
            ),
        }
        if in_place:
            return {"out": self.floats((tokens, rows), dtype), **made, "page_table": table}
        return {**made, "out_features": rows, "page_table": table}

    def changed(self) -> dict[str, Any]:
        base = self.weight(self.size(200000 if self.large else 100), self.weight_dtype())
        tuned = base.clone()
        flat = tuned.view(-1)
        for i in self.positions(self.size(), flat.numel(), torch.int64).tolist():
            flat[i] = self.random.choice((0, 1))
        return {"base": base, "tuned": self.placed(tuned)}

    def fused(self) -> dict[str, Any]:
        dtype, number = self.random.choice(ARITHMETIC), self.random.choice((1, 2, 3, 5))
        below = self.random.choice((1, 40, 5000)) if not self.large else 100000
        indices = [self.positions(self.size(below), below, self.random.choice(INTEGERS)) for _ in range(number)]
        for positions in indices:
            if self.chance(0.2) and len(positions):  # near the end of what the dtype holds
                positions += torch.iinfo(positions.dtype).max - int(positions[-1])
        return {
            "indices": indices,
            "values": [self.floats((len(positions),), dtype) for positions in indices],
            "weights": self.floats((number,), torch.float32),
            "policy": self.random.choice(("sum", "mean", "last", "ties")),
        }

    def encoding(self) -> dict[str, Any]:
        numel = self.random.choice((1, 40, 5000, 10**6, 2**31, 2**62)) if not self.large else 2**20
        count = self.size(20000 if self.large else 60)
        positions = sorted({self.random.randrange(numel) for _ in range(count)})
        dtype = torch.int64 if numel > 2**31 else self.random.choice(INTEGERS)
        return {"indices": self.placed(torch.tensor(positions, dtype=dtype)), "numel": numel}

    def decoding(self) -> dict[str, Any]:
        made = self.encoding()
        code = backends.kernel("encode_indices", "reference")(**made)
        return {"code": self.placed(code), "nnz": len(made["indices"]), "numel": made["numel"]}

    def scores(self) -> dict[str, Any]:
        score = self.floats(self.shape_of(self.size(2_000_000 if self.large else 100)), self.random.choice(ARITHMETIC))
        if self.chance(0.3):
            score = self.placed(score.round())  # many equal ones
        return {"score": score, "k": self.random.randint(0, score.numel())}

    # Spoiling

    def spoil(self) -> None:
        name = self.random.choice(list(self.arguments))
        value = self.arguments[name]
        if isinstance(value, list) and (not value or self.chance(0.3)):
            self.arguments[name] = self.other_list(value)
        elif isinstance(value, list):
            i = self.random.randrange(len(value))
            value[i] = self.other_tensor(value[i], f"{name}[{i}]")
        elif isinstance(value, torch.Tensor):
            self.arguments[name] = self.other_tensor(value, name)
        elif isinstance(value, bool):
            self.arguments[name] = not value
        elif isinstance(value, int):
            number = self.random.choice((*NUMBERS, value - 1, value + 1))
            # A result of that size, which takes memory from others.
            self.arguments[name] = 2**62 if name == "in_features" and 2**20 < number < 2**48 else number
        elif isinstance(value, float):
            self.arguments[name] = self.random.choice(FLOATS)
        elif isinstance(value, str):
            self.arguments[name] = self.random.choice(("", "sum", "last", "Sum", "ties\0", "\N{SNOWMAN}"))
        elif value is None:
            self.arguments[name] = self.floats((self.size(),), torch.float32)
        self.spoiled.append(name)

    def other_list(self, value: list[torch.Tensor]) -> list[torch.Tensor]:
        changes: list[Callable[[], list[torch.Tensor]]] = [
            list,
            lambda: value[:-1],
            lambda: [*value, self.floats((self.size(),), torch.float32)],
            lambda: [*value, *value[-1:]],
            lambda: value[::-1],
        ]
        return self.random.choice(changes)()

    def tensors(self) -> list[torch.Tensor]:
        values = self.arguments.values()
        found = [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]
        return [t for t in found if t.layout == torch.strided and not t.is_nested and not t.is_quantized]

    def other_tensor(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
            return tensor
        if tensor.numel() > 2**32 or tensor.is_neg():
            return tensor
        kind = self.random.choice(
            ("contents", "contents", "contents", "dtype", "shape", "strides", "strides", "shared", "kind", "huge")
        )
        self.spoiled.append(kind)
        try:
            return getattr(self, f"other_{kind}")(tensor)
        except (RuntimeError, NotImplementedError):  # torch cannot make such a one
            return tensor

    def other_contents(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach()
        flat = flat.reshape(-1)  # a view where it is contiguous
        if not flat.numel():
            return tensor
        at = self.random.randrange(flat.numel())
        if tensor.dtype.is_floating_point:
            flat[at] = self.random.choice(FLOATS)
        elif tensor.dtype in (*INTEGERS, torch.uint16, torch.uint8):
            bounds = torch.iinfo(tensor.dtype)
            how = self.random.randrange(4)
            if how == 0:
                number = self.random.choice((*NUMBERS, bounds.min, bounds.max, flat.numel()))
                flat[at] = min(max(number, bounds.min), bounds.max)
            elif how == 1:
                flat[at] = flat[self.random.randrange(flat.numel())].clone()
            elif how == 2:
                number = int(flat[at]) + self.random.choice((-1, 1))
                flat[at] = min(max(number, bounds.min), bounds.max)
            else:
                flat.copy_(torch.tensor(flat.tolist()[::-1], dtype=flat.dtype))
        return tensor

    def other_dtype(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.random.choice(ANY_DTYPES)
        if tensor.dtype.is_complex or tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return tensor
        return self.placed(torch.nan_to_num(tensor.double(), 0, 0, 0).clamp(0, 100).to(dtype))

    def other_shape(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(-1)
        changes: list[Callable[[], torch.Tensor]] = [
            lambda: tensor.unsqueeze(self.random.randint(0, tensor.dim())),
            lambda: flat,
            lambda: flat[: max(0, flat.numel() - 1)],
            lambda: self.placed(torch.cat([flat.view(torch.uint8), flat[:1].view(torch.uint8)]).view(flat.dtype)),
            lambda: flat[:0],
            lambda: flat[0] if flat.numel() else tensor,
            lambda: tensor.reshape(0, *tensor.shape) if not tensor.numel() else tensor,
            lambda: tensor.reshape(*tensor.shape[:-1], -1, 1) if tensor.numel() else tensor,
        ]
        return self.random.choice(changes)()

    def other_strides(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements, or some of them, not side by side."""
        if not tensor.dim():
            return tensor
        axis = self.random.randrange(tensor.dim())
        spread = self.placed(tensor.detach().repeat_interleave(2, axis)) if tensor.dtype.itemsize < 16 else tensor
        changes: list[Callable[[], torch.Tensor]] = [
            lambda: spread.index_select(axis, torch.arange(0)).to(tensor.dtype) if tensor.shape[axis] == 0 else spread,
            lambda: spread[(slice(None),) * axis + (slice(None, None, 2),)],
            lambda: self.placed(tensor.detach().transpose(0, -1)).transpose(0, -1),
            lambda: tensor[:1].expand(tensor.shape) if tensor.numel() else tensor,
            lambda: tensor.transpose(0, -1),
            lambda: torch._neg_view(tensor) if tensor.dtype not in UNSIGNED else tensor,
        ]
        return self.random.choice(changes)()

    def other_shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same shape and dtype in memory of another argument, if that is large enough."""
        others = [t for t in self.tensors() if t is not tensor and t.is_contiguous() and not t.is_meta and t.is_leaf]
        if not others:
            return tensor
        other = self.random.choice(others)
        if other.dtype == tensor.dtype and other.shape == tensor.shape:
            return other
        memory = torch.empty(0, dtype=torch.uint8).set_(other.untyped_storage())
        if memory.numel() > 2**32:
            return tensor
        step = tensor.element_size()
        room = memory.numel() - tensor.nbytes
        if room < 0:
            return tensor
        begin = self.random.randrange(0, room // step + 1) * step
        return memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def other_kind(self, tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.detach()
        floating = plain.dtype.is_floating_point and plain.dtype.itemsize >= 4
        changes: list[Callable[[], torch.Tensor]] = [
            plain.to_sparse,
            lambda: plain.to_sparse_csr() if plain.dim() == 2 else plain.to_sparse(),
            lambda: plain.to("meta"),
            lambda: torch.nested.nested_tensor([plain, plain]) if plain.dim() else plain,
            lambda: torch.nested.nested_tensor([plain], layout=torch.jagged) if plain.dim() > 1 else plain,
            lambda: torch.quantize_per_tensor(plain.float(), 0.1, 0, torch.qint8) if floating else plain,
            lambda: plain.to_mkldnn() if plain.dtype == torch.float32 and plain.dim() else plain,
            lambda: plain.requires_grad_() if plain.dtype.is_floating_point or plain.dtype.is_complex else plain,
            lambda: inference(plain),
            lambda: self.gone(plain),
        ]
        return self.random.choice(changes)()

    def gone(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its memory was given back, as sharding libraries do it."""
        mine = tensor.clone()
        mine.untyped_storage().resize_(self.random.choice((0, mine.nbytes // 2)))
        return mine

    def other_huge(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sizes that memory cannot hold, and that take none."""
        huge = self.random.choice((2**48, 2**62))
        shapes = [(0, huge), (huge, 0), (0, huge, 3), (huge,)]
        shape = self.random.choice(shapes)
        if 0 in shape:
            return torch.empty(shape, dtype=tensor.dtype)
        if tensor.dim() and tensor.numel():
            return (
                tensor.reshape(-1)[:1].expand(huge) if tensor.dim() == 1 else tensor[:1].expand(huge, *tensor.shape[1:])
            )
        return tensor


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


MAKERS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "add_sparse_delta_mm": lambda case: case.plain(in_place=True),
    "add_sparse_delta_mm_batched": lambda case: case.batched(in_place=True),
    "decode_indices": Case.decoding,
    "encode_indices": Case.encoding,
    "extract_changed": Case.changed,
    "fuse_adapters": Case.fused,
    "masked_adamw": Case.adamw,
    "masked_grad": Case.grad_at,
    "scatter_apply": lambda case: case.scatter(batched=False),
    "scatter_apply_batched": lambda case: case.scatter(batched=True),
    "scatter_switch_batched": lambda case: case.scatter(batched=True, lists=2),
    "sparse_delta_mm": lambda case: case.plain(in_place=False),
    "sparse_delta_mm_batched": lambda case: case.batched(in_place=False),
    "sparse_delta_mm_transposed": Case.transposed,
    "topk_indices": Case.scores,
}


# torch's own refusals, before a kernel of ours is called: results of unknown size, an int beyond 64 bits, and a lazily
# negated tensor of a type that torch cannot negate.
NO_NEGATIVE = '"neg_cpu" not implemented'
TORCHS_WORDS = ("with meta Tensors", "Expected a value of type 'int' for argument", NO_NEGATIVE)


class Outcome:
    """What a kernel did with a case."""

    def __init__(self, case: Case, forced: backends.use) -> None:
        self.case = case
        self.results: list[torch.Tensor] = []
        self.error = ""
        self.wrong = ""
        before = [buffer.clone() for buffer in case.buffers]
        schema = getattr(torch.ops.shira, case.op).default._schema
        torch.set_num_threads(case.threads)
        try:
            with torch.set_grad_enabled(not case.grad), forced:
                results = getattr(torch.ops.shira, case.op)(**case.arguments)
        except RuntimeError as error:
            self.error = str(error)
            if not self.says_what():
                self.wrong = "a refusal that names no argument"
            if any(not torch.equal(a, b) for a, b in zip(before, case.buffers, strict=True)):
                self.wrong = "a refusal after something was written"
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            self.error = repr(error)
            self.wrong = "an error that is not a refusal"
            return
        self.results = [results] if isinstance(results, torch.Tensor) else list(results or ())
        self.results = [result.detach() for result in self.results]
        self.meta = any(result.is_meta for result in self.results) or any(t.is_meta for t in case.tensors())
        self.written = []
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = case.arguments.get(argument.name)
                self.written += value if isinstance(value, list) else [] if value is None else [value]
        spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in self.written]
        for old, buffer in zip(before, case.buffers, strict=True):
            for begin, end in spans:
                first, last = begin - buffer.data_ptr(), end - buffer.data_ptr()
                if 0 <= first < last <= buffer.numel():
                    old[first:last] = buffer[first:last]
            if not torch.equal(old, buffer):
                self.wrong = "something was written beside what the op writes"

    @property
    def no_memory(self) -> bool:
        return bool(NO_MEMORY.search(self.error))

    def says_what(self) -> bool:
        if self.no_memory or any(text in self.error for text in TORCHS_WORDS):
            return True
        names = [argument.name for argument in getattr(torch.ops.shira, self.case.op).default._schema.arguments]
        said = self.error.removeprefix(f"shira::{self.case.op}: ")
        return said != self.error and said.startswith(("tensors ", *names))


def difference(reference: Outcome, other: Outcome) -> str:
    """What of two outcomes is not alike; empty if nothing is."""
    if bool(reference.error) != bool(other.error):
        if reference.no_memory or other.no_memory:  # one kernel copies what another reads where it lies
            return ""
        if NO_NEGATIVE in reference.error + other.error:
            return ""
        return f"one refuses: {reference.error or 'accepted'} | {other.error or 'accepted'}"
    if reference.error or reference.meta:
        return ""
    for a, b in zip((*reference.results, *reference.written), (*other.results, *other.written), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        if not alike(a, b, reference.case):
            return f"results differ:\n{a}\n{b}"
    return ""


def alike(a: torch.Tensor, b: torch.Tensor, case: Case) -> bool:
    if not a.dtype.is_floating_point or a.dtype.itemsize == 1:
        return torch.equal(bytes_of(a), bytes_of(b))
    if any(name in case.op for name in SUMS):
        inputs = [t for t in case.tensors() if t.dtype.is_floating_point]
        if not all(bool((t.abs() < 1000).all()) for t in inputs):  # sums of these depend on their order
            return True
        epsilon = torch.finfo(a.dtype).eps
        return torch.allclose(a.double(), b.double(), rtol=2 * epsilon, atol=1e-3 if a.dtype != torch.float64 else 1e-9)
    if case.op == "masked_adamw" and a.dtype == torch.float64:  # torch's square root may be one unit off
        return torch.allclose(a, b, rtol=1e-12, atol=1e-300, equal_nan=True)
    numbers = a.isnan() & b.isnan()  # of NaN the bits may differ
    same = (bytes_of(a) == bytes_of(b)).view(-1, a.dtype.itemsize).all(1)
    return bool((same | numbers.reshape(-1)).all())


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


@functools.cache
def kernels() -> dict[str, backends.use]:
    isas = backends.extension.runnable_isas() if backends.extension else []
    return {"reference": backends.use("reference"), **{isa: backends.use("cpu", isa) for isa in isas}}


def run_case(seed: int, op: str = "", kinds: Counter[str] | None = None) -> str:
    """Runs a case on every kernel; what is wrong, or nothing."""
    outcomes = []
    for name, forced in kernels().items():
        case = Case(seed, op)
        outcome = Outcome(case, forced)
        where = f"{case.op} on {name}, spoiled: {', '.join(case.spoiled) or 'nothing'}"
        if outcome.wrong:
            return f"{where}: {outcome.wrong}: {outcome.error}"
        if outcomes and (unlike := difference(outcomes[0], outcome)):
            return f"{where}: {unlike}"
        outcomes.append(outcome)
    if kinds is not None:
        kinds["calls"] += len(outcomes)
        kinds["refused" if outcomes[0].error else "accepted"] += 1
        kinds["no memory"] += outcomes[0].no_memory
    return ""


def run_cases(arguments: argparse.Namespace, progress: mmap.mmap) -> int:
    """In the child: notes each case before it runs."""
    warnings.simplefilter("ignore")
    kinds: Counter[str] = Counter()
    end = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    failures = 0
    seed = arguments.seed
    while time.monotonic() < end and (not arguments.cases or seed < arguments.seed + arguments.cases):
        progress[:8] = struct.pack("q", seed)
        if wrong := run_case(seed, arguments.op, kinds):
            print(f"case {seed}: {wrong[:2000]}\n  {repeat(arguments, seed)}", flush=True)
            failures += 1
            if failures >= arguments.failures:
                break
        seed += 1
        if arguments.calls and kinds["calls"] >= arguments.calls:
            break
    print(
        f"{seed - arguments.seed} cases from {arguments.seed}, {kinds['calls']} calls on {', '.join(kernels())}: "
        f"{kinds['accepted']} accepted, {kinds['refused']} refused ({kinds['no memory']} for want of memory), "
        f"{failures} failed"
    )
    return FAILED if failures else 0


def repeat(arguments: argparse.Namespace, seed: int) -> str:
    """The command that runs a case again."""
    environment = [f"{name}={shlex.quote(os.environ[name])}" for name in KEPT if name in os.environ]
    op = ["--op", arguments.op] if arguments.op else []
    return " ".join([*environment, sys.executable, "tools/fuzz_ops.py", "--seed", str(seed), "--cases", "1", *op])


KEPT = ("LD_PRELOAD", "PYTHONPATH", "PYTHONMALLOC", "ASAN_OPTIONS", "UBSAN_OPTIONS")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the first case")
    parser.add_argument("--cases", type=int, default=0, help="how many cases; without any bound: until stopped")
    parser.add_argument("--calls", type=int, default=0, help="how many calls of ops, at least")
    parser.add_argument("--seconds", type=float, default=0, help="for how long")
    parser.add_argument("--op", choices=sorted(OPS), default="", help="only this op")
    parser.add_argument("--failures", type=int, default=1, help="stop after this number of failures")
    arguments = parser.parse_args()
    progress = mmap.mmap(-1, 8)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = run_cases(arguments, progress)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if sys.exc_info()[0] is not None:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, FAILED):  # a sanitizer ends the process, too
        (seed,) = struct.unpack("q", progress[:8])
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        print(f"case {seed}: the process ended with {how}\n  {repeat(arguments, seed)}")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
