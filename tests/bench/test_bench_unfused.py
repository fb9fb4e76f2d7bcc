"""The unfused benchmarks on tiny models: every case runs its checks and each side once, and the checks bite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import benchmarks
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(scope="module")
def bench() -> Any:
    return benchmarks.modules(
        "harness.architectures",
        "cases.bench_sparse_delta_mm",
        "cases.bench_unfused",
        "harness.compare",
        "harness.switching",
    )


@pytest.fixture(scope="module")
def tiny(bench: Any) -> Any:
    return benchmarks.tiny_architecture(bench)


@pytest.fixture
def seen() -> dict[str, Any]:
    """What the last case gave to `compare`."""
    return {}


@pytest.fixture
def compare(seen: dict[str, Any]) -> Callable[..., None]:
    return benchmarks.untimed(seen)


@pytest.fixture
def small_layers(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer at a time, of which there are two."""
    monkeypatch.setattr(bench.bench_sparse_delta_mm, "cache_bytes", lambda _: 1)
    bench.bench_sparse_delta_mm.make_layers.cache_clear()


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_one_adapter(bench: Any, compare: Any, seen: dict[str, Any], dtype: str, tokens: int) -> None:
    module = bench.bench_sparse_delta_mm
    module.test_one_adapter(compare, bench.compare.Place("cpu"), (96, 160), dtype, tokens)
    assert len(seen["slots"]) == 2
    expected = {module.BASE, module.OURS, module.LORA, module.PEFT}
    expected |= {module.CSR} if dtype == "float32" else set()
    expected |= {module.COO} if tokens <= module.MOST_TOKENS_OF_COO else set()
    assert set(seen["sides"]) == expected


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_delta_is_noticed(bench: Any, dtype: str) -> None:
    """Of each side: nothing added, the largest entry lost, and another layer's delta."""
    module = bench.bench_sparse_delta_mm
    layer, other = module.make_layers((96, 160), getattr(torch, dtype), "cpu")
    x = torch.randn(4, 160, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    slot = module.Slot(layer, x)
    sides = [module.ours, module.peft, module.sparse_coo, *([module.sparse_csr] if dtype == "float32" else [])]
    module.check(slot, sides)
    with pytest.raises(AssertionError, match="base"):
        module.check(slot, [module.base])
    lost, shape = layer.values.clone(), layer.weight.shape
    lost[lost.abs().argmax()] = 0
    lacking = replace(
        layer,
        values=lost,
        coo=torch.sparse_coo_tensor(layer.positions, lost, shape, is_coalesced=True),
        csr=torch.sparse_csr_tensor(layer.row_ptr, layer.col.int(), lost, shape),
    )
    for wrong in (lacking, replace(other, weight=layer.weight)):
        for side in sides:

            def of_the_wrong(slot: Any, side: Any = side, wrong: Any = wrong) -> torch.Tensor:
                return side(module.Slot(wrong, slot.x))

            with pytest.raises(AssertionError, match="of_the_wrong"):
                module.check(slot, [of_the_wrong])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_batch(bench: Any, compare: Any, tiny: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_unfused, "MANY", 20)
    monkeypatch.setattr(bench.bench_unfused, "BUDGET", 2**20)
    bench.bench_unfused.test_mixed_batch(compare, bench.compare.Place("cpu"), dtype, tiny)


@pytest.mark.parametrize(("rows", "length", "steps"), [(1, 1, 3), (2, 4, 1)])
def test_fused_or_unfused(bench: Any, compare: Any, tiny: Any, rows: int, length: int, steps: int) -> None:
    bench.bench_unfused.test_fused_or_unfused(compare, bench.compare.Place("cpu"), rows, length, steps, tiny)


@pytest.mark.parametrize("wrong", ["swapped rows", "the base", "another strength"])
def test_a_wrong_row_is_noticed(bench: Any, tiny: Any, wrong: str) -> None:
    module = bench.bench_unfused
    model = module.make_llama(tiny, torch.float32, "cpu")
    bank = module.make_bank(model, module.make_adapters(model, tiny, 2), 2)

    class Wrong:
        """A bank whose batches are other ones."""

        using = bank.using

        def batch(self, names: list[str], mode: str) -> Any:
            others = {
                "swapped rows": names[::-1],
                "the base": [names[0], None],
                "another strength": [names[0], {names[1]: 0.9}],
            }
            return bank.batch(others[wrong], mode=mode)

    with torch.inference_mode():
        module.check_rows(model, bank, ["0", "1"], 3)
        with pytest.raises(AssertionError):
            module.check_rows(model, Wrong(), ["0", "1"], 3)


def test_adapters_that_change_nothing_are_noticed(bench: Any, tiny: Any) -> None:
    module = bench.bench_unfused
    model = module.make_llama(tiny, torch.float32, "cpu")
    adapter = module.make_adapters(model, tiny, 1)[0]
    same = {
        name: replace(part, values=model.get_parameter(name).detach().view(-1)[part.indices.long()])
        for name, part in adapter.items()
    }
    bank = module.make_bank(model, [type(adapter)(same)], 1)
    with torch.inference_mode(), pytest.raises(AssertionError):
        module.check_rows(model, bank, ["0"], 3)


def test_a_mixed_batch_of_one_lora_is_noticed(bench: Any, tiny: Any) -> None:
    """PEFT's side must take the rows' own adapters."""
    module = bench.bench_unfused
    names = [str(i) for i in range(module.ROWS)]
    model = module.make_llama(tiny, torch.float32, "cpu")
    lora = bench.switching.make_lora(
        module.make_llama(tiny, torch.float32, "cpu"), tiny, {name: int(name) for name in names}
    ).eval()

    def one_for_all(input_ids: torch.Tensor, adapter_names: list[str]) -> Any:
        return lora(input_ids=input_ids, adapter_names=["0"] * len(adapter_names))

    with torch.inference_mode():
        module.check_mixed({}, model, names, lora)
        with pytest.raises(AssertionError):
            module.check_mixed({}, model, names, one_for_all)
