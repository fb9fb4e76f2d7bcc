"""Which modules and weights of a model are meant: by a config's target_modules and modules_to_save, by an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from shira.files.errors import warn
from shira.masks.config import ALL_LINEAR, ShiraConfig, names_match
from shira.model.modules import is_linear
from shira.model.names import bare_model, canonical_in, first_names, resolve, some_of
from shira.training.layers import mixin_of

_NOT_MEANT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.modules.conv._ConvNd)  # by "all-linear"
_MUCH = 0.01  # of the model: a router or a table of positions is less


def matched_weights(model: nn.Module, config: ShiraConfig) -> list[nn.Parameter]:
    """The weights of the modules that target_modules means, for `attach`.

    Raises ValueError if an entry of target_modules matches no module, or one whose weight cannot be trained.
    """
    found = _matched_modules(model, config)
    _check_all_match(found, config, "module")
    weights = []
    for name, module in found.items():
        mixin_of(name, module, "weight")
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{name}: the weight must be a plain parameter")
        weights.append(weight)
    if not weights:
        raise ValueError(f"target_modules: {config.target_modules!r} matches no module of the model")
    _warn_of_rest(model, config, weights)  # type: ignore[arg-type]
    return weights  # type: ignore[return-value]


def matched_parameters(model: nn.Module, config: ShiraConfig) -> list[nn.Parameter]:
    """The parameters that target_modules means, for `mask_gradients`: those it names, and the weights of modules.

    Raises ValueError if an entry of target_modules matches neither, or a module without a weight.
    """
    modules = _matched_modules(model, config)
    found: list[nn.Parameter] = []
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{name}: {type(module).__name__} has no parameter 'weight': name the parameters")
        found.append(weight)  # type: ignore[arg-type]
    bare = canonical_in(model)
    parameters = [(bare(name), parameter) for name, parameter in model.named_parameters()]
    if config.target_modules != ALL_LINEAR:
        found += [parameter for name, parameter in parameters if _matches(name, config)]
    _check_all_match([*modules, *(name for name, _ in parameters)], config, "module or parameter")
    if not found:
        raise ValueError(f"target_modules: {config.target_modules!r} matches no module or parameter of the model")
    _warn_of_rest(model, config, found)
    return list(dict.fromkeys(found))


def _warn_of_rest(model: nn.Module, config: ShiraConfig, weights: Sequence[nn.Parameter]) -> None:
    """Warns if "all-linear" leaves out much that is a matrix, but not a linear layer's: fused experts, say."""
    if config.target_modules != ALL_LINEAR:
        return
    passed, output, bare = set(weights), _output_of(model), canonical_in(model)
    for module in model.modules():
        if isinstance(module, _NOT_MEANT) or module is output:
            passed.update(module.parameters(recurse=False))
    # Parameters of the form [1, ...] are positions and tokens, those of one dimension norms and biases.
    known = {name: each for name, each in model.named_parameters() if not nn.parameter.is_lazy(each)}
    rest = {
        bare(name): each.numel()
        for name, each in known.items()
        if each not in passed and each.dim() > 1 and each.shape[0] > 1 and each.is_floating_point()
        if not is_saved(bare(name), config.modules_to_save)
    }
    count, total = sum(rest.values()), sum(each.numel() for each in known.values())
    if count > _MUCH * total:
        warn(
            f'"all-linear" leaves out {count / total:.0%} of the model, {count} entries that no linear layer holds: '
            f"{some_of(list(rest))}. mask_gradients trains them by name"
        )


def _matched_modules(model: nn.Module, config: ShiraConfig) -> dict[str, nn.Module]:
    """The modules that target_modules means, by name; aliases too."""
    # A layer inside a wrapper of PEFT comes after the wrapper, and takes its name.
    bare = canonical_in(model)
    named = {bare(name): module for name, module in model.named_modules(remove_duplicate=False)}
    if config.target_modules == ALL_LINEAR:
        output = _output_of(model)
        return {name: module for name, module in named.items() if is_linear(module) and module is not output}
    return {name: module for name, module in named.items() if _matches(name, config)}


def _output_of(model: nn.Module) -> nn.Module | None:
    """A transformers model's head."""
    return getattr(bare_model(model), "get_output_embeddings", lambda: None)()  # type: ignore[no-any-return]


def _check_all_match(names: Iterable[str], config: ShiraConfig, kind: str) -> None:
    """Refuses a list of target_modules with an entry that none of the names matches."""
    names = list(names)
    for entry in () if isinstance(config.target_modules, str) else config.target_modules:
        if not any(names_match(name, [entry]) for name in names):
            raise ValueError(f"target_modules: {entry!r} matches no {kind} of the model")


def _matches(name: str, config: ShiraConfig) -> bool:
    """Whether a name is one of those in target_modules, which is a list or a regular expression."""
    wanted = config.target_modules
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else names_match(name, wanted)


def weights_of(model: nn.Module, adapter: Iterable[str]) -> dict[str, nn.Parameter]:
    """The model's weight for each name of an adapter.

    Raises ValueError if the model lacks one, if two names mean the same weight, or if the adapter is empty.
    """
    names = first_names(model)
    weights: dict[str, nn.Parameter] = {}
    for adapter_name in adapter:
        weight = resolve(model, adapter_name)
        if any(weight is other for other in weights.values()):
            raise ValueError(f"{adapter_name}: the adapter names the tensor {names[weight]!r} twice")
        weights[adapter_name] = weight
    if not weights:
        raise ValueError("the adapter holds no tensors of weights")
    return weights


def modules_to_save(model: nn.Module, config: ShiraConfig, weights: Sequence[nn.Parameter]) -> tuple[str, ...]:
    """The config's modules_to_save. `weights` are those that are trained by their entries.

    Raises ValueError if an entry means no parameters, one of these weights, or one that is not floating point.
    """
    trained, bare = set(weights), canonical_in(model)
    for entry in config.modules_to_save:
        found = [parameter for name, parameter in model.named_parameters() if is_saved(bare(name), [entry])]
        if not found:
            raise ValueError(f"modules_to_save: {entry!r} matches no module with parameters")
        if any(parameter in trained or not parameter.is_floating_point() for parameter in found):
            raise ValueError(f"modules_to_save: {entry!r} holds a weight that is a target or not floating point")
    return tuple(config.modules_to_save)


def is_saved(parameter_name: str, entries: Sequence[str]) -> bool:
    """Whether a parameter, given by its canonical name, lies in a module that one of the entries names."""
    path = parameter_name.split(".")[:-1]
    return any(names_match(".".join(path[: i + 1]), entries) for i in range(len(path)))
