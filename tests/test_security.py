"""What hostile folders and files cannot make the commands do: SECURITY.md names these tests beside its sentences."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_adapter_file as fuzz
import pytest
import torch
from command_line import exit_code_of
from guard import Guard, Result, opened
from processes import ROOT
from safetensors.torch import load_file, save_file

import shira
from shira import convert
from shira.cli.train import chat
from shira.convert import peft_checks
from shira.files.checkpoint import INDEX, TensorFolder
from shira.model.pretrained import sealed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

WORDS = [f"w{i}" for i in range(24)]
EVIL = """
from pathlib import Path
Path({marker!r}).write_text("run")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


def save_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(WORDS) + 2, num_key_value_heads=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_lora(folder: Path) -> None:
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    draw = torch.Generator().manual_seed(1)
    factors = {"lora_A": torch.randn(2, 32, generator=draw), "lora_B": torch.randn(32, 2, generator=draw)}
    save_file(
        {f"{module}.{name}.weight": factor for name, factor in factors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, lora/, text.txt."""
    folder = tmp_path_factory.mktemp("originals")
    save_model(folder / "model")
    save_lora(folder / "lora")
    (folder / "text.txt").write_text(" ".join(WORDS * 4))
    return folder


def edit(path: Path, change: dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(change(fields) if callable(change) else fields | change))


class Place:
    """A folder of hostile copies of a model and an adapter; and `outside`, which nothing may read."""

    def __init__(self, folder: Path, originals: Path, guard: Guard) -> None:
        self.folder, self.originals, self.outside = folder, originals, folder / "outside"
        self._guard = guard
        self.marker = folder / "marker"
        self.outside.mkdir()
        save_file({"secret": torch.ones(3)}, self.outside / "secret.safetensors")
        torch.save({"a": torch.zeros(2)}, self.outside / "adapter_model.bin")
        self.coded(self.outside)
        (self.outside / "words.txt").write_text("\n".join(WORDS))
        self.lines: dict[str, tuple[list[object], str]] = {}

    def coded(self, folder: Path) -> None:
        (folder / "evil.py").write_text(EVIL.format(marker=str(self.marker)))

    def model(self, name: str, config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None) -> Path:
        shutil.copytree(self.originals / "model", self.folder / name)
        self.coded(self.folder / name)
        edit(self.folder / name / "config.json", config or {})
        edit(self.folder / name / "tokenizer_config.json", tokenizer or {})
        return self.folder / name

    def lora(self, name: str, config: dict[str, Any] | None = None) -> Path:
        shutil.copytree(self.originals / "lora", self.folder / name)
        edit(self.folder / name / "adapter_config.json", config or {})
        return self.folder / name

    def train(self, name: str, model: Path, message: str) -> None:
        line = ["train", model, self.originals / "text.txt", "-o", self.folder / f"{name}-out", "--max-steps", 1]
        self.lines[name] = ([*line, "--max-length", 8], message)

    def convert(self, name: str, adapter: Path, base: Path, message: str) -> None:
        output = self.folder / f"{name}.safetensors"
        self.lines[name] = (["convert", adapter, "--base", base, "--top", 0.1, "-o", output], message)

    def run(self) -> dict[str, Result]:
        """Runs all; nothing was reached, run, read outside or written, and each error is the line that it should be."""
        before = {path.name for path in self.folder.iterdir()}
        with opened(self.outside) as names:
            results = {name: self._guard.run(*line) for name, (line, _) in self.lines.items()}
        wrong = []
        for name, (_, message) in self.lines.items():
            found = results[name]
            if message:
                right = found.code == 2 and re.search(message, found.errors) and found.errors.count("\n") == 1
            else:
                right = found.code == 0
            if found.reached or not right:
                wrong.append(f"{name}: {found.code} {found.reached} {found.errors[-1500:]}")
        assert not wrong, "\n".join(wrong)
        assert names == []
        assert not self.marker.exists()
        refused = {name for name, (_, message) in self.lines.items() if message}
        made = {path.name for path in self.folder.iterdir()} - before
        assert not {f"{name}{end}" for name in refused for end in ("-out", ".safetensors")} & made
        return results


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    guard = Guard(tmp_path_factory.mktemp("guard"))
    yield guard
    guard.close()


@pytest.fixture
def place(tmp_path: Path, originals: Path, guard: Guard) -> Place:
    return Place(tmp_path, originals, guard)


def test_the_watch_sees_what_a_library_opens(place: Place) -> None:
    with opened(place.outside) as names:
        load_file(place.outside / "secret.safetensors")
    assert "secret.safetensors" in names


AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModelForSeq2SeqLM": "evil.Model"}
AUTO |= {"AutoTokenizer": ["evil.Tokenizer", None]}
NEVER = "code of its own, which is never run"


def test_no_code_of_a_folder_is_run_and_nothing_elsewhere_is_read(place: Place) -> None:
    plain, lora = place.model("plain"), place.lora("lora")
    own = {"model_type": "own", "auto_map": AUTO}
    place.train("own-config", place.model("own", own), NEVER)
    place.convert("own-base", lora, place.folder / "own", "transformers cannot load this model")
    plenty = {"start_header_id": 128_006, "block_size": 2**20}  # as some models have
    known = place.model("known", {"auto_map": AUTO, **plenty}, {"auto_map": AUTO})  # transformers has this class itself
    place.train("known", known, "")
    place.convert("known-base", lora, known, "")
    tokenizer = place.model("tokenizer", tokenizer={"tokenizer_class": "Own", "auto_map": AUTO})
    place.train("own-tokenizer", tokenizer, "" if _knows_a_tokenizer() else NEVER)
    inner = {"model_type": "clip_text_model", "auto_map": AUTO, "_name_or_path": str(place.outside)}
    blip = {"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"], "text_config": inner}
    place.convert(
        "own-part",
        place.lora("untasked", {"task_type": None}),
        place.model("part", blip),
        f"text_config.auto_map: it needs {NEVER}",
    )
    place.train("own-part-trained", place.model("part-too", {"text_config": inner}), NEVER)
    kernel = {"attn_implementation": "somebody/kernel"}
    place.train("kernel", place.model("kernel-model", kernel), "names a kernel of the network, 'somebody/kernel'")
    place.convert("kernel-base", lora, place.model("kernel-base-model", kernel), "names a kernel of the network")
    words = {"vocab_file": str(place.outside / "words.txt"), "tokenizer_file": str(place.outside / "words.txt")}
    place.train("vocabulary", place.model("words", tokenizer=words), "")
    versions = place.model("versions", tokenizer={"fast_tokenizer_files": ["../outside/tokenizer.4.0.0.json"]})
    place.train("versions-train", versions, "fast_tokenizer_files must be names of files beside it")
    embedded = place.model("embedded")
    shutil.copy(place.outside / "adapter_model.bin", embedded)
    (embedded / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    place.train("embedded-train", embedded, "it holds an adapter of PEFT")
    place.convert("embedded-base", lora, embedded, "it holds an adapter of PEFT")
    pickled = place.model("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    place.train("pickle", pickled, "no safetensors file")
    place.convert("pickle-base", lora, pickled, "no safetensors file")
    outside = str(place.outside)
    for name, config, message in (
        ("xlora", {"peft_type": "XLORA", "adapters": {"0": outside}, "hidden_size": 32}, "names other adapters"),
        ("xlora-bare", {"peft_type": "XLORA", "hidden_size": 32}, "cannot be merged"),
        ("shadow", {"peft_type": "SHADOW", "shadow_model": outside}, "cannot be merged, or might load"),
        ("prompt", {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": outside, "num_virtual_tokens": 2,
                    "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a",
                    "tokenizer_kwargs": {"trust_remote_code": True}}, "cannot be merged"),
        ("tasks", {"peft_type": "MULTITASK_PROMPT_TUNING",
                   "prompt_tuning_init_state_dict_path": f"{outside}/adapter_model.bin"}, "cannot be merged"),
        ("megatron", {"megatron_config": {"a": 1}, "megatron_core": "evil"}, "an adapter with megatron_config"),
        ("replicated", {"layer_replication": [[0, 2]] * 200_000}, "an adapter with layer_replication|at most"),
        ("mapped", {"auto_mapping": {"parent_library": "evil", "base_model_class": "Model"}}, ""),
        ("based", {"base_model_name_or_path": "somebody/model", "revision": "main"}, ""),
    ):  # fmt: skip
        place.convert(name, place.lora(f"{name}-adapter", config), plain, message)
    unsafe = place.lora("unsafe")
    (unsafe / "adapter_model.safetensors").unlink()
    shutil.copy(place.outside / "adapter_model.bin", unsafe)
    place.convert("unsafe-adapter", unsafe, plain, "adapter_model.bin is a pickle, which is never read")
    place.run()


def _knows_a_tokenizer() -> bool:
    """Whether transformers takes a class of its own where a tokenizer's is unknown."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    return transformers.LlamaConfig in TOKENIZER_MAPPING


def test_code_of_a_part_is_refused_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for each part of a model, whatever was said for the whole."""
    from huggingface_hub import constants

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    config = transformers.CLIPTextConfig()
    config.auto_map, config._name_or_path = AUTO, str(tmp_path)
    before = constants.HF_HUB_OFFLINE
    with sealed(), sealed():
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(ValueError, match="trust_remote_code"):
            transformers.AutoModelForSeq2SeqLM.from_config(config)
    assert before == constants.HF_HUB_OFFLINE
    assert not (tmp_path / "marker").exists()


def linked(folder: Path, cache: Path) -> Path:
    """A folder's files as Hugging Face's cache has them: a snapshot of links to blobs."""
    snapshot = cache / "models--a--b/snapshots/0123abcd"
    (cache / "models--a--b/blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob, link = cache / f"models--a--b/blobs/{number}", snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def tuned(place: Place) -> tuple[Path, Path]:
    """A checkpoint that differs from the model in a tensor, and the adapter that makes it of the model."""
    state = load_file(place.originals / "model/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, place.folder / "tuned.safetensors")
    shira.diff(place.originals / "model", state).save(place.folder / "adapter")
    return place.folder / "tuned.safetensors", place.folder / "adapter"


@pytest.mark.filterwarnings("ignore:not sparse")
def test_links_of_hugging_faces_cache_are_followed_and_no_others(place: Place) -> None:
    checkpoint, adapter = tuned(place)
    lora = linked(place.lora("lora"), place.folder / "cache-of-adapters")
    whole = place.model("whole")
    (whole / "additional_chat_templates").mkdir()
    (whole / "additional_chat_templates/a.jinja").write_text("a")
    cached = linked(whole, place.folder / "cache")

    def lines(name: str, base: Path, message: str, commands: str = "train convert diff apply") -> None:
        output = place.folder / f"{name}-out"
        for command in commands.split():
            if command == "train":
                place.train(f"{name}-train", base, message)
            elif command == "convert":
                place.convert(f"{name}-convert", lora, base, message)
            elif command == "diff":
                place.lines[f"{name}-diff"] = (["diff", base, checkpoint, "-o", f"{output}.safetensors"], message)
            else:
                place.lines[f"{name}-apply"] = (["apply", base, adapter, "-o", output], message)

    lines("cached", cached, "")
    (place.folder / "way").symlink_to(cached)  # a folder may be reached by a link
    lines("way", place.folder / "way", "", "diff apply")
    place.lines["file"] = (["diff", cached / "model.safetensors", checkpoint, "-o", place.folder / "file-diff"], "")
    leads_out = "a link that leads out of its folder"
    for name, file in (("weights", "model.safetensors"), ("config", "config.json"), ("notes", "notes.txt")):
        folder = place.model(name)
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to("../outside/secret.safetensors")
        lines(name, folder, f"{file}: {leads_out}", "train convert apply" + " diff" * (name == "weights"))
    # The links of a cache whose blobs are elsewhere, or that lead past its blobs.
    moved = linked(place.model("to-move"), place.folder / "moved")
    shutil.rmtree(moved.parents[1] / "blobs")
    (moved.parents[1] / "blobs").symlink_to(place.outside)
    (moved / "model.safetensors").unlink()
    (moved / "model.safetensors").symlink_to("../../blobs/secret.safetensors")
    lines("moved", moved, leads_out, "diff apply")
    for name, file in (("sub", "sub/secret.safetensors"), ("up", "sub/../../outside/secret.safetensors")):
        folder = place.model(name)
        (folder / "model.safetensors").unlink()
        (folder / "sub").symlink_to("../outside")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"secret": file}}))
        lines(name, folder, f"{leads_out}|does not lie in its folder")
    for name, file in (("adapters-config", "adapter_config.json"), ("factors", "adapter_model.safetensors")):
        folder = place.lora(f"{name}-adapter")
        (folder / file).unlink()
        (folder / file).symlink_to("../outside/secret.safetensors")
        place.convert(name, folder, place.originals / "model", f"{file}: {leads_out}")
    place.run()
    # Files, not links, and all of them.
    for name in ("cached-out", "way-out"):
        copied = place.folder / name
        assert {path.name for path in copied.iterdir()} == {path.name for path in cached.iterdir()}
        assert not any(path.is_symlink() for path in copied.rglob("*"))
        assert torch.equal(TensorFolder(copied)["model.norm.weight"], load_file(checkpoint)["model.norm.weight"])


@pytest.mark.filterwarnings("ignore:not sparse")
def test_linked_folders_are_named_as_not_copied(place: Place, tmp_path: Path) -> None:
    _, adapter = tuned(place)
    folder = place.model("model")
    (folder / "runs").symlink_to(place.outside)
    merged = shira.merge_checkpoint(folder, [(adapter, 1.0)], tmp_path / "out")
    assert "runs" in merged.left_out
    assert not (tmp_path / "out/runs").exists()


@pytest.mark.filterwarnings("ignore:not sparse")
def test_what_is_not_a_regular_file_is_refused(place: Place) -> None:
    """A pipe that nobody writes to would never be read to its end."""
    _, adapter = tuned(place)
    os.mkfifo(place.folder / "pipe")
    odd = "neither a file nor a folder"
    for command in ("info", "convert"):
        rest = [] if command == "info" else ["-o", place.folder / "pipe-out"]
        place.lines[command] = ([command, place.folder / "pipe", *rest], odd)
    place.lines["apply"] = (["apply", place.folder / "pipe", adapter, "-o", place.folder / "apply-out"], odd)
    place.lines["fuse"] = (["fuse", place.folder / "pipe", adapter, "-o", place.folder / "fuse-out"], odd)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "notes.txt"):
        folder = place.model(f"with-{name}")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        place.train(name, folder, odd)
        place.lines[f"apply-{name}"] = (["apply", folder, adapter, "-o", place.folder / "copy"], odd)
    place.lines["text"] = (
        ["train", place.originals / "model", place.folder / "pipe", "-o", place.folder / "text-out"],
        odd,
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = place.lora(f"with-{name}")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        place.convert(name, folder, place.originals / "model", odd)
    with pytest.raises(shira.AdapterFormatError, match=odd):
        shira.Adapter.load(place.folder / "pipe")
    place.run()


def holes(path: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    """A safetensors file of zeros that takes no place: name -> dtype, shape, bytes."""
    header, end = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


HUGE = 343 * 10**9  # bytes


def test_a_file_of_holes_is_refused(place: Place) -> None:
    """It takes no place on the disk, and as much memory as there is where somebody touches all of it."""
    name, base = "model.norm.weight", place.originals / "model"
    holes(place.folder / "patch", {f"{name}.indices": ("I64", [HUGE // 8], HUGE), f"{name}.values": ("F32", [1], 4)})
    holes(place.folder / "values", {f"{name}.indices": ("I64", [1], 8), f"{name}.values": ("F32", [HUGE // 4], HUGE)})
    sparse = place.lora("sparse", {"peft_type": "SHIRA"})
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    arrays = {f"{module}.shira_weight": ("F32", [1], 4), f"{module}.shira_indices": ("I32", [2, HUGE // 8], HUGE)}
    holes(sparse / "adapter_model.safetensors", arrays)
    for adapter in ("patch", "values", "sparse"):
        line = ["convert", place.folder / adapter, "--base", base, "-o", place.folder / f"{adapter}-out.safetensors"]
        place.lines[adapter] = (line, "Cannot allocate memory|indices, but the weight has 32 entries")
    whole = fuzz.to_bytes(
        shira.Adapter({name: shira.AdapterTensor(torch.tensor([1]), torch.ones(1), (32,), torch.float32)})
    )
    header, description = fuzz.parsed(fuzz.split(whole)[0])
    header[f"{name}.values"] |= {"shape": [HUGE // 4], "data_offsets": [0, HUGE]}
    header[f"{name}.indices"]["data_offsets"] = [HUGE, HUGE + 1]
    description["tensors"][0][1], description["tensors"][0][3] = [HUGE], HUGE // 4
    file = fuzz.joined(fuzz.text_of(header, description), b"")
    (place.folder / "adapter").write_bytes(file)
    os.truncate(place.folder / "adapter", len(file) + HUGE + 1)
    memory = "Cannot allocate memory"
    place.lines["apply"] = (["apply", base, place.folder / "adapter", "-o", place.folder / "merged"], memory)
    place.lines["fuse"] = (["fuse", place.folder / "adapter", "-o", place.folder / "fused"], memory)
    (place.folder / "text.txt").touch()
    os.truncate(place.folder / "text.txt", HUGE)
    line = ["train", base, place.folder / "text.txt", "-o", place.folder / "text-out"]
    place.lines["text"] = (line, "has more than 1073741824 bytes")
    place.run()


def test_numbers_of_a_config_fill_neither_time_nor_memory(place: Place) -> None:
    plain = place.originals / "model"
    many = "must be at most"
    for name, config, message in (
        ("rank", {"r": 10**8}, f"r {many} 16384, got 100000000"),
        ("ranks", {"rank_pattern": {"q_proj": 10**8}}, f"rank_pattern {many} 16384"),
        (
            "rounds",
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}},
            f"loftq_iter {many} 100",
        ),
        ("named-rounds", {"init_lora_weights": "pissa_niter_1000000000"}, f"init_lora_weights's niter {many} 100"),
        ("vectors", {"peft_type": "VBLORA", "num_vectors": 10**9, "vector_length": 16}, f"num_vectors {many}"),
        ("projection", {"peft_type": "VERA", "r": 10**6}, f"r {many} 16384"),
        ("replication", {"layer_replication": [[0, 2]] * 1000}, "an adapter with layer_replication is not read"),
        ("names", {"target_modules": [f"a{i}" for i in range(30_000)]}, "it has 3000. names, more than 20000"),
        ("long", {"revision": "a" * 2**22}, "it must have at most 4194304 bytes"),
        ("larger", {"r": 16_000, "lora_alpha": 10**9}, "a far larger model than there are weights|size mismatch"),
    ):
        place.convert(name, place.lora(f"{name}-adapter", config), plain, message)
    larger = "describes a far larger model than there are weights"
    for name, config, message in (
        ("layers", {"num_hidden_layers": 10**9}, f"num_hidden_layers {many} 100000, got 1000000000"),
        ("more-layers", {"num_hidden_layers": 99_999}, larger),
        ("words", {"vocab_size": 10**12}, larger),
        ("width", {"hidden_size": 2**24, "num_attention_heads": 2}, larger),
        ("inner", {"intermediate_size": 2**40}, larger),
    ):
        model = place.model(f"{name}-model", config)
        place.train(f"{name}-train", model, message)
        place.convert(name, place.lora(f"{name}-lora"), model, message)
    long = place.model("long-model")
    os.truncate(long / "config.json", 2**26 + 1)
    place.train("long-train", long, "it must have at most 67108864 bytes")
    index = place.model("index")
    (index / "model.safetensors").unlink()
    (index / INDEX).touch()
    os.truncate(index / INDEX, 2**40)
    place.lines["index"] = (["diff", index, plain, "-o", place.folder / "index-out"], "it must have at most")
    place.run()


@pytest.mark.parametrize(
    ("pattern", "field"),
    [("(a+)+b", "target_modules"), ("a?" * 60 + "a" * 60 + "b", "rank_pattern")],
)
def test_a_pattern_that_never_ends_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, field: str
) -> None:
    monkeypatch.setattr(peft_checks, "_MATCH_SECONDS", 1)
    config = {field: {"target_modules": pattern, "rank_pattern": {pattern: 4}}.get(field, [pattern])}
    with pytest.raises(ValueError, match=r"adapter_config\.json: its patterns take more than 1 s to be matched"):
        peft_checks.check_patterns(tmp_path, config, ["model.layers.0", "model." + "a" * 80])


def test_patterns_that_end_are_taken(tmp_path: Path) -> None:
    names = [f"model.language_model.layers.{i}.self_attn.{name}_proj" for i in range(80) for name in "qkvo"]
    wide = r"(?:.*?(?:vision|language).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp).*)"
    config = {"target_modules": wide, "rank_pattern": {r"model\.layers\.\d+\.(q|k)_proj": 4, "a(": 3}}
    peft_checks.check_patterns(tmp_path, config, names)
    many = {"rank_pattern": {f"a{i}": 4 for i in range(7000)}}
    with pytest.raises(ValueError, match="its 7000 patterns are too many for a model of 320 modules"):
        peft_checks.check_patterns(tmp_path, many, names)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 1 s"),
        (
            "{% generation %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
            "{% endgeneration %}",
            "it takes more than 1 s",
        ),
        ("{% set a = namespace(b='a') %}{% for i in range(60) %}{% set a.b = a.b ~ a.b %}{% endfor %}", "MemoryError"),
        ("{% for i in range(99) %}{{ messages[0].content }}{% endfor %}", "it writes 198 characters, more than 99"),
    ],
)
def test_a_chat_template_that_never_ends_or_fills_memory_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 1)
    monkeypatch.setattr(chat, "_BYTES", 2**27)
    monkeypatch.setattr(chat, "_CHARACTERS", 99)
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.originals / "model")
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(ValueError, match=message):
        chat.chat_tokens(messages, tokenizer, "a chat")
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getsignal(signal.SIGVTALRM) is handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_long_pattern_of_a_file_is_refused(tmp_path: Path) -> None:
    """Compiling one takes milliseconds for each of its sets of letters."""
    tensors = {"a": shira.AdapterTensor(torch.tensor([1]), torch.ones(1), (32,), torch.float32)}
    whole = fuzz.to_bytes(shira.Adapter(tensors, shira.ShiraConfig("a")))
    header, description = fuzz.parsed(fuzz.split(whole)[0])
    description["config"]["target_modules"] = "(?i)" + "[\x00-\uffff]" * 1000
    file = fuzz.joined(fuzz.text_of(header, description), fuzz.split(whole)[1])
    with pytest.raises(shira.AdapterFormatError, match="a regular expression has at most 2000 characters"):
        fuzz.from_bytes(file)


def test_a_mask_of_a_file_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile_mask.py").write_text("raise SystemExit('imported')")
    base = {"a.weight": torch.zeros(4, 8)}
    save_file(base, tmp_path / "base.safetensors")
    tensors = dict(shira.diff(base, {"a.weight": torch.ones(4, 8)}, top=0.1))
    config = shira.ShiraConfig("all-linear", mask="hostile_mask:choose")
    for name in ("one", "two"):
        shira.Adapter(tensors, config).save(tmp_path / name)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 4, bias=False)})
    model.load_state_dict(base)
    bank = shira.ResidentAdapters(model)
    bank.add("one", tmp_path / "one")
    bank.switch("one")
    bank.switch(None)
    shira.attach(model, shira.Adapter.load(tmp_path / "one")).detach()
    shira.fuse([(tmp_path / "one", 1.0), (tmp_path / "two", 1.0)], base=base).save(tmp_path / "fused")
    monkeypatch.chdir(tmp_path)
    for line in (
        "info one --base base.safetensors",
        "apply base.safetensors one two -o merged",
        "fuse one two -b base.safetensors -o mix",
    ):
        assert exit_code_of(monkeypatch, *line.split()) == 0
    assert "hostile_mask" not in sys.modules


def test_names_are_looked_up_before_tensors_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {f"a{i}.indices": torch.zeros(1).int() for i in range(3000)}
    save_file(arrays | {f"a{i}.values": torch.zeros(1) for i in range(3000)}, place.folder / "patch")
    monkeypatch.setattr(TensorFolder, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"a\d+: the base has no tensor of this name"):
        convert.read(place.folder / "patch", place.originals / "model")


def test_commands_read_no_standard_input_and_say_when_memory_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(path: Path) -> str:
        raise ValueError(sys.stdin.readline() or "nobody answers")

    def fill(path: Path) -> str:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    def fill_more(path: Path) -> str:
        raise MemoryError

    def panic(path: Path) -> str:
        raise type("PanicException", (BaseException,), {})("retry limit\nover")

    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    for found, message in (
        (ask, "nobody answers"),
        (fill, "not enough memory"),
        (fill_more, "not enough memory"),
        (panic, "a library failed: retry limit over"),
    ):
        monkeypatch.setattr(convert, "format_of", found)
        assert exit_code_of(monkeypatch, "info", "file") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sys.stdin.readline() == "y\n"


def test_every_sentence_names_tests_that_there_are() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {test}"
