"""What could be wrong in bench/studies/quality without anyone noticing: leaks, unequal budgets, resuming."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from studies.quality.plan import METHODS, QUICK, Planned, Results

COUNTS = {"train": 6, "validation": 3, "test": 3}
SMALL = ("peft", "networkx", "huggingface_hub")


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return importlib.import_module("studies.quality.run")


@pytest.fixture(scope="module")
def data(quality: ModuleType) -> ModuleType:
    return quality.texts


@pytest.fixture(scope="module")
def tokenizer(quality: ModuleType) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(quality.model_folder())


@pytest.fixture(scope="module")
def parts(data: ModuleType, tokenizer: Any) -> dict[str, Any]:
    return data.load(COUNTS, tokenizer, 32, SMALL)


@pytest.fixture(scope="module")
def settings(quality: ModuleType) -> Any:
    return dataclasses.replace(QUICK, subset=4)


@pytest.fixture(scope="module")
def task(quality: ModuleType, data: ModuleType, parts: dict[str, Any], settings: Any) -> Any:
    """The real encoder on three packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: parts)
        return quality.load_task(settings)


def test_no_module_and_no_text_is_in_two_parts(parts: dict[str, Any]) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    modules = [set(part.modules) for part in parts.values()]
    for part in parts.values():
        seen.update(tuple(row) for row in part.ids.tolist())
    assert set(seen.values()) == {1}
    assert sum(map(len, modules)) == len(set.union(*modules))


def test_labels_are_balanced_and_those_of_the_modules(parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        assert part.labels.bincount().tolist() == [COUNTS[name]] * len(SMALL)
        assert [SMALL[label] for label in part.labels] == [module.split("/")[0] for module in part.modules]


def test_padding_is_no_text(parts: dict[str, Any], tokenizer: Any) -> None:
    part = parts["test"]
    for row, mask, text in zip(part.ids, part.mask, part.texts, strict=True):
        assert row[mask.bool()].tolist() == tokenizer(text, truncation=True, max_length=32)["input_ids"]


def test_no_text_names_a_package(data: ModuleType, parts: dict[str, Any]) -> None:
    for part in parts.values():
        for text in part.texts:
            assert not [name for name in data.NAMES if name.lower() in text.lower()], text


@pytest.mark.parametrize(
    ("docstring", "cleaned"),
    [
        ("See numpy.ndarray and PyTorch-like\n  things.", "See it and it things."),
        (">>> import numpy as np\n>>> np.zeros(3)", ">>> import it as it >>> it(3)"),
        ("the Scikit-Learn API, HuggingFace, mpl_toolkits", "the it API, it, it"),
        ("an input split spans hfs", "an input split spans hfs"),
    ],
)
def test_names_are_masked_as_whole_words(data: ModuleType, docstring: str, cleaned: str) -> None:
    assert data.masked(docstring) == cleaned


def test_the_part_depends_on_the_name_and_shares_hold(data: ModuleType) -> None:
    counts = Counter(data.part_of(f"package/module_{i}.py") for i in range(4000))
    for part, share in data.SHARES.items():
        assert counts[part] / 4000 == pytest.approx(share, abs=0.03)
    # The same on every machine and in every process.
    assert data.part_of("torch/nn/functional.py") == "train"
    assert data.part_of("numpy/lib/_npyio_impl.py") == "validation"


def test_texts_that_the_encoder_cannot_tell_apart_are_kept_once(
    data: ModuleType, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for i in range(60):  # what differs stands behind the tokens that are kept
        path = tmp_path / f"m{i}.py"
        path.write_text(f'"""one two three four five six seven eight {"nine " * 20} number{i}"""\n')
        files.append((f"peft/m{i}.py", path))
    monkeypatch.setattr(data, "_modules", lambda _: iter(files))
    with pytest.raises(LookupError, match="1 are needed"):
        data.load({"train": 1, "test": 1}, tokenizer, 16, ("peft",))


def test_too_few_texts(data: ModuleType, tokenizer: Any) -> None:
    with pytest.raises(LookupError, match=r"peft has \d+ texts for train, 100000 are needed"):
        data.load({"train": 100_000}, tokenizer, 32, ("peft",))


def test_the_upper_layers_on_the_lower_layers_output_are_the_whole_encoder(quality: ModuleType, task: Any) -> None:
    from transformers import AutoModel

    part = task.parts["test"]
    whole = AutoModel.from_pretrained(quality.model_folder(), add_pooling_layer=False).eval()
    with torch.no_grad():
        output = whole(input_ids=part.ids, attention_mask=part.mask).last_hidden_state
        weight = part.mask[..., None].float()
        mean = (output * weight).sum(1) / weight.sum(1)
    expected = torch.nn.functional.layer_norm(mean, mean.shape[-1:])
    similar = torch.nn.functional.cosine_similarity(task.features["test"], expected)
    assert similar.min() > 0.995  # bfloat16 against float32


def test_all_adapters_train_equally_many_numbers(quality: ModuleType, task: Any, settings: Any) -> None:
    """Of the encoder; the head is trained too, and nothing else."""
    expected = 3 * settings.rank * (4 * 2 * 384 + 2 * (384 + 1536))
    rows = quality.draw(task.parts["train"], settings, 0)
    kinds = Counter()
    for method in METHODS:
        if method.kind not in ("lora", "dora", "shira"):
            continue
        kinds[method.kind] += 1
        model = quality.Classifier(copy.deepcopy(task.encoder), task.classes)
        trained = quality.prepare(method, model, task, rows, settings, 0)
        assert trained.numbers == expected, method.name
        free = {p for p in model.parameters() if p.requires_grad}
        assert free == {*trained.parameters, *model.head.parameters()}, method.name
    assert kinds == {"lora": 1, "dora": 1, "shira": 16}


def test_a_draw_is_balanced_and_differs_by_seed(quality: ModuleType, task: Any, settings: Any) -> None:
    part = task.parts["train"]
    first, again, other = (quality.draw(part, settings, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert part.labels[first].bincount().tolist() == [settings.subset] * len(SMALL)
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("name", ["SHiRA rand", "LoRA", "DoRA", "full"])
def test_a_run_trains_and_the_tested_model_is_the_trained_one(
    quality: ModuleType, task: Any, settings: Any, name: str
) -> None:
    (method,) = [method for method in METHODS if method.name == name]
    torch.manual_seed(0)
    model = quality.Classifier(copy.deepcopy(task.encoder), task.classes).eval()
    before = {key: tensor.clone() for key, tensor in task.encoder.state_dict().items()}
    rows = quality.draw(task.parts["train"], settings, 0)
    trained = quality.prepare(method, model, task, rows, settings, 0)
    quality.train(model, trained, 1e-2, task, rows, settings, 0)
    index = torch.arange(len(task.parts["test"].labels))
    batch = task.batch("test", index)
    with torch.no_grad():
        expected = model.features(batch["hidden"], batch["mask"])
        trained.finish()
        tested = model.features(batch["hidden"], batch["mask"])
    assert (expected - task.features["test"]).abs().max() > 0.05
    torch.testing.assert_close(tested, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.encoder.state_dict().items())


def _fake_runs(quality: ModuleType, results: Any, planned: list[Any]) -> None:
    for plan in planned:
        best = plan.method.learning_rates[1]
        results.add(
            {
                "method": plan.method.name,
                "lr": plan.lr if plan.lr is not None else best,
                "seed": plan.seed,
                "trained": 1,
                "validation": 0.5 + 0.1 * (plan.lr == best),
                "test": 0.5 + 0.01 * plan.seed,
                "seconds_per_step": 0.1,
                "last_loss": 1.0,
            }
        )


def test_finished_runs_are_skipped_and_the_best_rate_is_used(
    quality: ModuleType, settings: Any, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    results = Results(path, settings)
    every = results.missing()
    assert len(every) == len(METHODS) * (4 + len(settings.seeds) - 1)
    _fake_runs(quality, results, every[:4])
    resumed = Results(path, settings)
    assert resumed.runs == results.runs
    method = every[0].method
    missing = resumed.missing()
    assert missing[0] == Planned(method, settings.seeds[1], method.learning_rates[1])
    _fake_runs(quality, resumed, missing)
    assert Results(path, settings).missing() == []


def test_a_report_leaves_out_runs_of_entries_that_are_not_finished(
    quality: ModuleType, settings: Any, tmp_path: Path
) -> None:
    results = Results(tmp_path / "results.json", settings)
    single = [method for method in METHODS if method.granularity == 1]
    _fake_runs(quality, results, [plan for plan in results.missing() if plan.method in single[1:]])
    results.leave_out_unfinished_runs()
    assert {plan.method for plan in results.missing()} == {single[0]}  # without it there is no report
    _fake_runs(quality, results, results.missing())
    assert results.missing() == []
    assert len(results.left_out) == len(METHODS) - len(single)
    text = quality.report.markdown(quality.report.rows(results), results, False, "")
    assert "left out: SHiRA wm, runs of 8, " in text


def test_an_interrupted_command_goes_on(
    quality: ModuleType, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that are there are not trained again, and a report is written at the end."""
    done: list[tuple[Any, ...]] = []

    def fake_run(method: Any, lr: float, seed: int, *_: Any) -> dict[str, Any]:
        if len(done) == 20 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        done.append((method.name, lr, seed))
        numbers = {"trained": 1, "validation": 0.5, "test": 0.5, "seconds_per_step": None, "last_loss": None}
        return {"method": method.name, "lr": lr, "seed": seed, **numbers}

    stopped: list[bool] = []
    monkeypatch.setattr(quality, "run", fake_run)
    monkeypatch.setattr(quality, "load_task", lambda _: task)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            quality.command(tmp_path, quick=True)
        quality.command(tmp_path, quick=True)
    finally:
        torch.set_num_threads(threads)
    assert len(done) == len(set(done)) == len(METHODS) * 5
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "numbers mean nothing" in (tmp_path / "report.md").read_text()


def test_results_of_other_settings_are_refused(
    quality: ModuleType, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "results.json"
    Results(path, settings).write()
    with pytest.raises(quality.StudyError, match="other settings: steps 2, now 320"):
        Results(path, dataclasses.replace(settings, steps=320))
    results = Results(path, settings)
    results.check_texts("a")
    with pytest.raises(quality.StudyError, match="other texts"):
        results.check_texts("b")
    monkeypatch.setattr(sys, "argv", ["quality", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        quality.main()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"header": {}, "runs": []})])
def test_a_file_that_is_no_result_is_refused(quality: ModuleType, settings: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(quality.StudyError, match=r"not a results\.json of this command"):
        Results(tmp_path / "results.json", settings)


@pytest.mark.parametrize("arguments", [[], ["--output", "x", "--threads", "0"], ["--output", "x", "--other"]])
def test_wrong_arguments(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    with pytest.raises(SystemExit, match="2"):
        quality.main()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_difference_within_the_spread_is_called_that(quality: ModuleType) -> None:
    report = quality.report

    def row(*test: float) -> Any:
        return report.Row("a", "shira", "wm", 1, 1e-3, {1e-3: 0.5}, list(test), 1, None)

    assert report.verdict(row(0.6, 0.5, 0.7), row(0.6, 0.6, 0.6)).startswith("no difference beyond the spread")
    assert report.verdict(row(0.7, 0.6, 0.8), row(0.6, 0.5, 0.7)).startswith("better (+10.0")
    assert report.verdict(row(0.5, 0.4, 0.6), row(0.6, 0.5, 0.7)).startswith("worse (-10.0")
