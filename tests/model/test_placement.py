"""Where entries lie: boxes, tensors that remember their sources, and layouts of models and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from shira.model.boxes import Box, localise
from shira.model.tracing import Traced, traced

SHAPES = {"a": (6, 4), "b": (6, 4), "c": (8, 2, 3)}
MOVES: dict[str, Callable[..., torch.Tensor]] = {
    "a view": lambda a, b, c: c.view(4, 2, 6).reshape(-1),
    "a transposition": lambda a, b, c: a.t().contiguous(),
    "a permutation": lambda a, b, c: c.permute(2, 0, 1).contiguous().view(6, 8),
    "a stack": lambda a, b, c: torch.stack([a, b], dim=1),
    "experts with gate and up": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "chunks, swapped": lambda a, b, c: torch.cat(torch.chunk(a, 3, dim=0)[::-1]),
    "columns": lambda a, b, c: a.split([1, 3], dim=1)[1],
    "unbound": lambda a, b, c: torch.cat(c.unbind(1)[::-1]),
    "one of many": lambda a, b, c: c[3].unsqueeze(0).squeeze(),
    "interleaved": lambda a, b, c: a.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4).contiguous(),
    "interleaved, then cut": lambda a, b, c: a.reshape(2, 3, 4).transpose(0, 1).reshape(6, 4)[1:4].t().reshape(-1),
    "permuted for rotary embeddings": lambda a, b, c: (
        c.view(8, 6).view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6).contiguous()
    ),
    "flattened, then cut": lambda a, b, c: c.transpose(0, 1).flatten()[5:40],
    "padded": lambda a, b, c: torch.cat([a, torch.full((2, 4), -1.0, device=a.device)]),
    "two layers": lambda a, b, c: torch.cat([c[:, [0, 1]].flatten(0, 1)[:3], c.flatten(0, 1)[3:]], dim=0),
}


def numbered() -> dict[str, torch.Tensor]:
    """Tensors whose elements are all different."""
    made, begin = {}, 0
    for name, shape in SHAPES.items():
        made[name] = torch.arange(begin, begin + math.prod(shape), dtype=torch.float32).view(shape)
        begin += math.prod(shape)
    return made


@pytest.mark.parametrize("move", [name for name in MOVES if name != "two layers"])
def test_a_traced_tensor_knows_where_each_element_comes_from(move: str) -> None:
    tensors = numbered()
    expected = MOVES[move](*tensors.values())
    found = MOVES[move](*(traced(name, shape, torch.float32) for name, shape in SHAPES.items()))
    assert isinstance(found, Traced)
    assert found.shape == expected.shape
    assert found.sources is not None
    copied = torch.full(found.shape, -1.0)
    for name, box in found.sources:
        box.copy(tensors[name], copied)
    assert torch.equal(copied, expected)

    # The same entry by entry, both ways.
    for name, tensor in tensors.items():
        boxes = [box for other, box in found.sources if other == name]
        kept, local = localise(torch.arange(tensor.numel()), boxes)
        assert torch.equal(expected.reshape(-1)[local], tensor.reshape(-1)[kept])
        assert int((expected.reshape(-1)[:, None] == tensor.reshape(-1)).sum()) == len(kept)
        for box in boxes:
            there, back = localise(torch.arange(expected.numel()), [box.reversed])
            assert torch.equal(tensor.reshape(-1)[back], expected.reshape(-1)[there])


@pytest.mark.parametrize(
    "compute",
    [lambda a: a * 2, lambda a: a.to(torch.bfloat16), lambda a: a[::2], lambda a: a.sum(0), MOVES["two layers"]],
)
def test_what_is_computed_has_no_sources(compute: Callable[..., torch.Tensor]) -> None:
    tensors = [traced(name, shape, torch.float32) for name, shape in SHAPES.items()]
    found = compute(*tensors) if compute is MOVES["two layers"] else compute(tensors[0])
    assert isinstance(found, Traced)
    assert found.sources is None


def test_only_entries_in_a_box_are_found() -> None:
    box = Box(src_offset=2, shape=(2, 3), src_stride=(10, 2), dst_offset=1, dst_stride=(1, 2))
    kept, local = localise(torch.tensor([0, 2, 3, 4, 6, 8, 12, 14, 17, 30], dtype=torch.int32), [box])
    # 2, 4, 6 are the first row, 12, 14 (and 16) the second.
    assert kept.tolist() == [1, 6, 3, 7, 4]
    assert local.tolist() == [1, 2, 3, 4, 5]
    assert box.reversed.reversed == box
    assert [found.tolist() for found in localise(torch.tensor([5]), [])] == [[], []]


def test_positions_above_2_31_are_found() -> None:
    box = Box(3 * 2**31, (2**31,), (1,), 5, (1,))
    kept, local = localise(torch.tensor([0, 3 * 2**31 + 7, 4 * 2**31]), [box])
    assert kept.tolist() == [1]
    assert local.tolist() == [12]


def test_a_box_that_has_an_element_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a box must have each element of its source once"):
        localise(torch.arange(9), [Box(0, (3, 3), (1, 1), 0, (3, 1))])
