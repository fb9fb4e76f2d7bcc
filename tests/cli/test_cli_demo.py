"""The command line: bad input is one line and exit code 2; the demonstration, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import exit_code_of

import shira


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "nope"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seed", "4294967296"], "--seed"),
        (["demo", "--output", "{tmp}"], "report.md: there already; --force replaces files"),
        (["demo", "--bogus"], "--bogus"),
        (["demo", "--output", "{tmp}/file"], "file"),
        (["demo", "--output", "{tmp}/file/inside"], "file"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "report.md").write_text("mine")
    assert exit_code_of(monkeypatch, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("shira: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "report.md"]
    assert (tmp_path / "report.md").read_text() == "mine"


@pytest.mark.parametrize("command", ["demo", "report", "bench", "train"])
def test_help_has_examples(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"shira {command} " in text.partition("Example")[2]


def test_without_arguments_there_is_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(monkeypatch) == 2
    assert "demo" in capsys.readouterr().out
    assert exit_code_of(monkeypatch, "--help") == 0


def test_without_transformers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    assert exit_code_of(monkeypatch, "demo") == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "shira: the demo needs transformers: pip install shira-kernels[train]\n")


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from shira.cli.demo import base, corpus
    from shira.cli.demo import run as demo

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **sizes, **heads
        )
    ).eval()
    before = demo.bytes_hash(model)
    monkeypatch.setattr(base, "load_base", lambda: model)
    # English letters of which each adapter sees other ones.
    letters = {"python": b"abcd", "cpp": b"efgh", "prose": b"ijkl"}
    monkeypatch.setattr(
        corpus,
        "load",
        lambda domain, **_: corpus.Split(*[torch.tensor(list(letters[domain] * 100), dtype=torch.uint8)] * 2),
    )
    effort = demo.Effort(steps={"cpp": 4, "prose": 4}, batch=4, heldout_bytes=256, generated_bytes=5, switches=6)
    monkeypatch.setattr(demo, "QUICK", effort)
    output = tmp_path / "deep" / "out"
    output.mkdir(parents=True)
    (output / "report.md").write_text("old")
    assert exit_code_of(monkeypatch, "demo", "--quick", "-o", output, "--json", "--force") == 0

    assert demo.bytes_hash(model) == before
    assert sorted(path.name for path in output.iterdir()) == [
        "cpp.safetensors",
        "prose.safetensors",
        "report.md",
        "report.png",
    ]
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert set(found) == {"bpb", "switch_ms", "lora_fuse_ms", "base_bytes_equal", "seconds"}
    assert found["base_bytes_equal"] is True
    for state in demo.STATES:
        assert list(found["bpb"][state]) == list(corpus.DOMAINS)
        # Which adapter was active while it was scored is seen in the numbers.
        bank = shira.ResidentAdapters(model)
        if state != "base":
            bank.add(state, output / f"{state}.safetensors")
            bank.switch(state)
        for domain in corpus.DOMAINS:
            assert found["bpb"][state][domain] == pytest.approx(
                base.bits_per_byte(model, corpus.load(domain).heldout[:256])
            )
        bank.switch(None)
    for name in demo.ADAPTERS:
        assert found["bpb"][name][name] < found["bpb"]["base"][name]
        assert 0.009 < shira.Adapter.load(output / f"{name}.safetensors").density < 0.011
    text = (output / "report.md").read_text()
    assert "the same bytes" in text
    assert f"{found['bpb']['cpp']['cpp']:.3f}" in text
    assert "Held-out bits per byte" in shown.err


def test_scored_windows_are_spread() -> None:
    from shira.cli.demo import run as demo

    data = torch.arange(1000).repeat_interleave(256).remainder(251).to(torch.uint8)
    rows = demo.sample_windows(data, 3 * 256 + 5).view(-1, 256)
    assert torch.equal(rows[:, 0], torch.tensor([0, 499 % 251, 999 % 251], dtype=torch.uint8))
    assert torch.equal(demo.sample_windows(data[:600], 10_000), data[:512])


def test_generated_text_is_shown_harmless() -> None:
    from shira.cli.demo import report

    assert report.printable("a\x1b[31mb\tc\nd\x00\x7f") == "a·[31mb c\nd··"
