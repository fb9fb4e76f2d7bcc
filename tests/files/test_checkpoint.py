"""Checkpoints on disk: which files a folder's index may name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shira.files.checkpoint import INDEX, TensorFolder


@pytest.mark.parametrize("file", ["/{outside}", "../outside.safetensors", "inner/../../outside.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "base"
    (folder / "inner").mkdir(parents=True)
    named = file.replace("/{outside}", str(tmp_path / "outside.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"weight": named}}))
    with pytest.raises(ValueError, match=re.escape(f"{INDEX}: it names {named!r}, which does not lie in its folder")):
        TensorFolder(folder)


def test_an_index_may_name_files_in_folders_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"weight": torch.ones(3)}, tmp_path / "inner/part.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": "inner/part.safetensors"}}))
    assert torch.equal(TensorFolder(tmp_path)["weight"], torch.ones(3))
