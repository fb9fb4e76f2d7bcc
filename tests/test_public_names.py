"""The public names of the release before are there, with the parameters that they had.

Parameters keep their order, kinds and defaults; new ones may follow the old ones of their kind and must have defaults.
What users do not make themselves, as a Handle, has no entry for its constructor.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any, get_type_hints

import pytest
import torch

import shira_kernels.ops  # noqa: F401  (the schemas of torch.ops.shira)

ANY = object()  # a default that is not compared
MASK = "weight, density, *, k=None, grad=None, seed=0, skip=0, granularity=1"
ADAMW = (
    "params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *, maximize=False, indices=None, decay='weights'"
)
BASES = "a, b, base=None"
MIX = "self, target"

# The parameters of functions, methods and constructors, by module.
PARAMETERS = {
    "shira": {
        "Adapter": "tensors, config=None, provenance=None",
        "Adapter.load": "path, *, base=None",
        "Adapter.save": "self, path, *, indices=True, base=None",
        "AdapterTensor": "indices, values, shape, dtype, kind='replace', checksum=None",
        "Handle.adapter": "self",
        "Handle.detach": "self, keep=False",
        "Handle.named_parameters": "self",
        "Handle.parameters": "self",
        "Handle.write_back": "self",
        "ResidentAdapters": "model, *, device_budget=None",
        "ResidentAdapters.add": "self, name, adapter, *, force=False, check_finite=False, on_host=False",
        "ResidentAdapters.batch": "self, names, *, mode='auto', tokens=None",
        "ResidentAdapters.forget_graphs": "self",
        "ResidentAdapters.remove": "self, name",
        "ResidentAdapters.stage": MIX,
        "ResidentAdapters.switch": MIX,
        "ResidentAdapters.using": MIX,
        "ResidentAdapters.verify_base": "self",
        "ShiraAdamW": ADAMW,
        "ShiraAdamW.add_param_group": "self, param_group",
        "ShiraAdamW.load_state_dict": "self, state_dict",
        "ShiraAdamW.step": "self, closure=None",
        "ShiraConfig": "target_modules, mask='wm', density=None, k=None, seed=0, modules_to_save=(), r=None, "
        "budget='tensor', skip=0, family=0, granularity=1, axis=0, offset=0, diagonal=True, calibration='sum'",
        "ShiraConfig.from_dict": "fields",
        "ShiraConfig.to_dict": "self",
        "attach": "model, what, *, calibration=None, loss=None",
        "awom": BASES,
        "awor": BASES,
        "diff": "base, tuned, *, top=None, common=False, progress=ANY",
        "fuse": "adapters, policy='sum', base=None, *, force=False, progress=ANY",
        "mask_gradients": "model, what, *, calibration=None, loss=None",
        "merge_checkpoint": "base, adapters, output, *, force_base=False, overwrite=False, progress=ANY",
        "overlap": BASES,
    },
    "shira.adapter": {
        "Adapter": "tensors, config=None, provenance=None",
        "AdapterTensor": "indices, values, shape, dtype, kind='replace', checksum=None",
        "checksum_of": "entries",
    },
    "shira.cli": {"main": ""},
    "shira.convert": {
        "format_of": "path",
        "read": "path, base=None, *, top=None, trust_base=False, progress=ANY",
        "write": "adapter, path, form='shira', base=None, *, indices=True, overwrite=False, force_base=False",
    },
    "shira.masks": {
        "Mask.__call__": f"self, {MASK}",
        "grad": MASK,
        "rand": MASK,
        "small": MASK,
        "snip": MASK,
        "struct": f"{MASK}, axis=0, offset=0, diagonal=True",
        "wm": MASK,
    },
    "shira_kernels": {
        "ShiraAdamW": ADAMW,
        "add_sparse_delta_mm": "out, x, row_ptr, col, values",
        "add_sparse_delta_mm_batched": "out, x, token_adapter, row_ptr, col, values, page_table=None",
        "decode_indices": "code, nnz, numel",
        "encode_indices": "indices, numel",
        "extract_changed": "base, tuned",
        "fuse_adapters": "indices, values, weights, policy='sum'",
        "masked_adamw": "weights, offsets, indices, grads, exp_avg, exp_avg_sq, master, step, lr, beta1, beta2, eps, "
        "weight_decay",
        "masked_grad": "grad_output, x, row_ptr, col",
        "scatter_apply": "weight, indices, values, alpha=1.0, additive=False, saved=None",
        "scatter_apply_batched": "weights, offsets, indices, values, alpha=1.0, additive=False, saved=None",
        "scatter_switch_batched": "weights, old_offsets, old_indices, old_saved, offsets, indices, values, saved, "
        "alpha=1.0, additive=False",
        "sparse_delta_mm": "x, row_ptr, col, values, out_features",
        "sparse_delta_mm_batched": "x, token_adapter, row_ptr, col, values, out_features, page_table=None",
        "sparse_delta_mm_transposed": "x, row_ptr, col, values, in_features",
        "topk_indices": "score, k",
    },
    "shira_kernels.backends": {
        "active": "op, device",
        "calls": "",
        "checked": "",
        "kernel": "op, backend",
        "reason_unavailable": "op, backend",
        "set_check_indices": "enabled",
        "use": "backend, isa=None",
    },
}

# What has no parameters of its own: modules, constants, errors, properties.
NAMES = {
    "shira": (
        "Adapter.density",
        "Adapter.nnz",
        "AdapterFormatError",
        "AdapterTensor.nnz",
        "AdapterTensor.numel",
        "Handle",
        "ResidentAdapters.active",
        "ResidentAdapters.names",
        "ResidentAdapters.stats",
        "ShiraConfig.mask_name",
        "convert",
        "masks",
    ),
    "shira.adapter": ("DTYPES",),
    "shira.convert": ("WRITTEN",),
    "shira.masks": ("MASKS", "Mask"),
    "shira_kernels": ("__version__", "backends"),
    "shira_kernels.backends": ("BACKENDS", "CPU_ISAS"),
}

# The fields of what these give back.
FIELDS = {
    "ResidentAdapters.stats": "adapter_bytes saved_bytes plan_bytes switches last_switch_us unfused_bytes pages "
    "pages_used resident hits misses evictions",
    "merge_checkpoint": "tensors entries files left_out",
}

SCHEMAS = """
add_sparse_delta_mm(Tensor(a!) out, Tensor x, Tensor row_ptr, Tensor col, Tensor values) -> ()
add_sparse_delta_mm_batched(Tensor(a!) out, Tensor x, Tensor token_adapter, Tensor row_ptr, Tensor col, Tensor values, Tensor? page_table=None) -> ()
decode_indices(Tensor code, int nnz, int numel) -> Tensor
encode_indices(Tensor indices, int numel) -> Tensor
extract_changed(Tensor base, Tensor tuned) -> (Tensor, Tensor)
fuse_adapters(Tensor[] indices, Tensor[] values, Tensor weights, str policy="sum") -> (Tensor, Tensor)
masked_adamw(Tensor(a!)[] weights, Tensor offsets, Tensor indices, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()
masked_grad(Tensor grad_output, Tensor x, Tensor row_ptr, Tensor col) -> Tensor
scatter_apply(Tensor(a!) weight, Tensor indices, Tensor values, float alpha=1., bool additive=False, Tensor(b!)? saved=None) -> ()
scatter_apply_batched(Tensor(a!)[] weights, Tensor offsets, Tensor indices, Tensor values, float alpha=1., bool additive=False, Tensor(b!)? saved=None) -> ()
scatter_switch_batched(Tensor(a!)[] weights, Tensor old_offsets, Tensor old_indices, Tensor old_saved, Tensor offsets, Tensor indices, Tensor values, Tensor(b!) saved, float alpha=1., bool additive=False) -> ()
sparse_delta_mm(Tensor x, Tensor row_ptr, Tensor col, Tensor values, SymInt out_features) -> Tensor
sparse_delta_mm_batched(Tensor x, Tensor token_adapter, Tensor row_ptr, Tensor col, Tensor values, SymInt out_features, Tensor? page_table=None) -> Tensor
sparse_delta_mm_transposed(Tensor x, Tensor row_ptr, Tensor col, Tensor values, SymInt in_features) -> Tensor
topk_indices(Tensor score, int k) -> Tensor
"""  # noqa: E501


def found(module: str, name: str) -> Any:
    value: Any = importlib.import_module(module)
    for attribute in name.split("."):
        value = getattr(value, attribute)
    return value


def parameters_of(text: str) -> list[inspect.Parameter]:
    function = eval(f"lambda {text}: None", {"ANY": ANY})
    return list(inspect.signature(function).parameters.values())


def difference(old: list[inspect.Parameter], new: list[inspect.Parameter]) -> str | None:
    """What keeps a call that was right for `old` from being right for `new`."""
    for kind in {parameter.kind for parameter in [*old, *new]}:
        theirs = [parameter for parameter in new if parameter.kind == kind]
        for own in (parameter for parameter in old if parameter.kind == kind):
            if not theirs or theirs[0].name != own.name:
                return f"{own} is missing, or in another place"
            other = theirs.pop(0)
            if (own.default is own.empty) != (other.default is own.empty) or (
                own.default is not ANY and own.default != other.default
            ):
                return f"{own} is now {other}"
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if needed := [other for other in theirs if other.default is other.empty and kind not in variable]:
            return f"{needed[0]} is new and has no default"
    return None


@pytest.mark.parametrize("module", PARAMETERS)
def test_parameters(module: str) -> None:
    for name, text in PARAMETERS[module].items():
        new = list(inspect.signature(found(module, name)).parameters.values())
        assert difference(parameters_of(text), new) is None, f"{module}.{name}: {difference(parameters_of(text), new)}"


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    for name in NAMES[module]:
        found(module, name)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    function = found("shira", name)
    result = get_type_hints(function.fget if isinstance(function, property) else function)["return"]
    assert set(FIELDS[name].split()) <= {field.name for field in dataclasses.fields(result)}


@pytest.mark.parametrize("schema", SCHEMAS.split("\n")[1:-1], ids=lambda schema: schema.partition("(")[0])
def test_schemas(schema: str) -> None:
    old = torch._C.parse_schema(f"shira::{schema}")
    new = getattr(torch.ops.shira, old.name.removeprefix("shira::")).default._schema
    assert new.is_backward_compatible_with(old), f"was {old}, is {new}"


@pytest.mark.parametrize("module", ["shira", "shira_kernels"])
def test_all_lists_them(module: str) -> None:
    listed = {name.partition(".")[0] for name in [*PARAMETERS[module], *NAMES[module]]}
    assert listed <= set(importlib.import_module(module).__all__)


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("a, b=1, *, c=None, d=ANY", None),
        ("a, b=1, e=2, *, c=None, d=ANY, f=3", None),
        ("a, b=1, *args, c=None, d=3, **kwargs", None),
        ("a, *, c=None, d=ANY", "b=1 is missing"),
        ("b=1, a=2, *, c=None, d=ANY", "a is missing, or in another place"),
        ("a, b=2, *, c=None, d=ANY", "b=1 is now b=2"),
        ("a, b=1, c=None, *, d=ANY", "c=None is missing"),
        ("a, b=1, *, c=None, d", "is now d"),
        ("a, b=1, *, c=None, d=ANY, e", "e is new and has no default"),
    ],
)
def test_a_difference_is_found(new: str, reason: str | None) -> None:
    got = difference(parameters_of("a, b=1, *, c=None, d=ANY"), parameters_of(new))
    assert got is None if reason is None else got is not None and reason in got
