"""What the config of a foreign PEFT adapter may ask of PEFT, which follows most of what it says.

An adapter must lie in its own folder alone: kinds that load further models or adapters are refused, and so are fields
that import modules. Numbers and patterns are bounded, for PEFT makes what they say before it looks at the weights.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from shira.convert.source import CONFIG, peft_config, peft_tensors

# Kinds that PEFT 0.21 reads from their own folder alone, and that change weights.
# fmt: off
_KINDS = {
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "BONE", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT",
    "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA",
    "WAVEFT",
}
# fmt: on
_MOST_NUMBER = 2**14  # ranks, blocks, .. : a projection of as many rows is made before the file is looked at
_MOST_ROUNDS = 100  # of iterations
_MOST_STRINGS = 20_000
_UNBOUNDED = re.compile("seed|key|step|tinit|tfinal|deltaT|warmup|interval|ind(ex|ices)|value|lambda|alpha|token")
_RANK, _ROUNDS = re.compile("(^|_)r$|rank"), re.compile("iter|terms")
_NAMED_ROUNDS = re.compile(r"_niter_(\d{1,18})")
_PATTERN = re.compile(r"[*+?{|(]")  # without one of these a pattern is matched in linear time
_MOST_MATCHES = 2**21  # PEFT compiles a pattern anew for each module
_MATCH_SECONDS = 20  # of the processor

# Matches as PEFT does; a pattern that never ends takes this process's time alone.
_MATCHER = """
import json, re, resource, sys
seconds, patterns, names = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
for pattern in patterns:
    try:
        whole, part = re.compile(pattern), re.compile(rf"(?:^|.*\\.)(?:{pattern})(?:$|\\..*)")
    except (re.error, OverflowError):
        continue  # PEFT says so, too
    for name in names:
        whole.fullmatch(name), part.match(name)
"""


def check_adapter(folder: Path) -> dict[str, Any]:
    """The config of an adapter that PEFT may be given. Refuses with ValueError one that names what lies elsewhere, or
    numbers beyond all sense."""
    config = peft_config(folder)
    kind, where = config["peft_type"], f"{folder}: an adapter of type {config['peft_type']}"
    if config.get("adapters") is not None:
        raise ValueError(f"{where} names other adapters, which are not read")
    if kind not in _KINDS:
        raise ValueError(f"{where} cannot be merged, or might load what is not in its folder")
    for field in ("megatron_config", "layer_replication"):  # one imports a module, the other makes another model
        if config.get(field):
            raise ValueError(f"{folder / CONFIG}: an adapter with {field} is not read")
    tensors = peft_tensors(folder)
    entries = sum(math.prod(tensors.shape(name)) for name in tensors)
    for name, value in _leaves(config):
        if isinstance(value, str) and (rounds := _NAMED_ROUNDS.search(value)):  # as in "pissa_niter_16"
            name, value = f"{name}'s niter", int(rounds[1])
        if type(value) is not int or _UNBOUNDED.search(name):
            continue
        # A rank counts rows of tensors; other numbers may count entries of the file.
        most = _MOST_NUMBER if _RANK.search(name) else max(_MOST_NUMBER, entries)
        if value > (most := _MOST_ROUNDS if _ROUNDS.search(name) else most):
            raise ValueError(f"{folder / CONFIG}: {name} must be at most {most}, got {value}")
    if (strings := len(set(_strings(config)))) > _MOST_STRINGS:
        raise ValueError(f"{folder / CONFIG}: it has {strings} names, more than {_MOST_STRINGS}")
    return config


def check_patterns(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuses with ValueError a config with a pattern that takes too long to be matched with these names of modules."""
    matched = [value for field, value in config.items() if field.endswith("_pattern") or field == "modules_to_save"]
    count = sum(len(value) for value in matched if isinstance(value, (Mapping, list)))
    if count * len(names) > _MOST_MATCHES:
        raise ValueError(f"{folder / CONFIG}: its {count} patterns are too many for a model of {len(names)} modules")
    patterns = sorted({text for text in _strings(config) if _PATTERN.search(text)})
    if not patterns:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _MATCHER],
            input=json.dumps([_MATCH_SECONDS, patterns, list(names)]),
            text=True,
            capture_output=True,
            timeout=30 * _MATCH_SECONDS,  # on a machine that is busy with other things
            check=False,
        )
        ended = done.returncode == 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise ValueError(
            f"{folder / CONFIG}: its patterns take more than {_MATCH_SECONDS} s to be matched, or far too much memory"
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All numbers and strings of a config, with the name of the field that they are in, at its own level."""
    if isinstance(value, Mapping):
        for field, inner in value.items():
            # A pattern's numbers are of the field that it refines: `rank_pattern`, `alpha_pattern`.
            yield from _leaves(inner, name if name.endswith("_pattern") else field)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _strings(value: Any) -> Iterator[str]:
    """All strings of a config that may be patterns: values, and names in objects that fields hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for field, inner in value.items():
            yield field
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
