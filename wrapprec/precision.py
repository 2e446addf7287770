"""In which dtypes a module stores, computes and answers, and the presets of the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from wrapprec import dtypes
from wrapprec.dtypes import COMPUTE_FORMATS, WEIGHT_FORMATS, Dtype, is_low, parse_dtype
from wrapprec.errors import PolicyError, message, nearest
from wrapprec.grammar import read_flag
from wrapprec.recipe import TENSORWISE, read_recipe

Casting: TypeAlias = Literal["op", "module"] | None
"""Who casts: PyTorch per operation (autocast), wrapprec per module, or nobody."""

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Precision:
    """The dtypes of one module.

    Args:
        param_dtype: what the parameters are stored in; a dtype, its name or a weight format such as `nf4`.
        compute_dtype: what operations run in; a dtype, its name, `fp8` or `tf32`.
        output_dtype: what floating outputs are cast to when they leave for another precision.
        casting: `op`, `module` or None.
        cast_inputs: whether floating inputs are cast on entry; None decides by `casting`.
        recipe: how fp8 is scaled: `tensorwise` (what None means), `rowwise` or `rowwise_with_gw_hp`.

    Raises:
        PolicyError: the dtypes and the casting do not go together.

    >>> Precision("f32", "bf16", "f32", "op")
    Precision('float32', 'bfloat16', 'float32', casting='op')
    """

    param_dtype: Dtype
    compute_dtype: Dtype
    output_dtype: Dtype
    casting: Casting = None
    cast_inputs: bool | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name in ("param_dtype", "compute_dtype", "output_dtype"):
            object.__setattr__(self, name, parse_dtype(getattr(self, name)))
        object.__setattr__(self, "recipe", read_recipe(self.recipe, self.compute_dtype))
        check_precision(self)

    @property
    def casts_inputs(self) -> bool:
        """Whether floating inputs are cast on entry: as given, otherwise only under module casting."""
        return self.casting == "module" if self.cast_inputs is None else self.cast_inputs

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of activations: formats are for weights and linears, around which all is bfloat16 (tf32: float32).

        >>> PRESETS["fp8-mixed"].activation_dtype, PRESETS["32-fast"].activation_dtype
        (torch.bfloat16, torch.float32)
        """
        if isinstance(self.compute_dtype, torch.dtype):
            return self.compute_dtype
        return BF16 if is_low(self.compute_dtype) else F32

    @property
    def surroundings(self) -> Precision:
        """What holds around the products themselves: bfloat16 for fp8, however weights are stored.

        >>> PRESETS["fp8-mixed"].surroundings == PRESETS["nf4"].surroundings == PRESETS["bf16-mixed"]
        True
        """
        if self.compute_dtype != "fp8" and not dtypes.is_format(self.param_dtype):
            return self
        param = F32 if dtypes.is_format(self.param_dtype) else self.param_dtype
        compute, recipe = (BF16, None) if self.compute_dtype == "fp8" else (self.compute_dtype, self.recipe)
        return replace(self, param_dtype=param, compute_dtype=compute, recipe=recipe)

    def __repr__(self) -> str:
        names = ", ".join(repr(dtypes.name(d)) for d in (self.param_dtype, self.compute_dtype, self.output_dtype))
        inputs = "" if self.cast_inputs is None else f", cast_inputs={self.cast_inputs}"
        recipe = "" if self.recipe in (None, TENSORWISE) else f", recipe={self.recipe!r}"
        return f"Precision({names}, casting={self.casting!r}{inputs}{recipe})"


def check_precision(precision: Precision) -> None:
    """Refuse dtypes and casting that do not go together.

    Args:
        precision: what to check.

    Raises:
        PolicyError: with what would go together.

    >>> check_precision(Precision("f32", "f32", "f32"))
    """
    compute, casting = precision.compute_dtype, precision.casting

    def require(holds: bool, expected: str, received: object, remedy: str) -> None:
        if not holds:
            raise PolicyError(message(expected, f"{received}", remedy=remedy))

    param = f"params={dtypes.name(precision.param_dtype)}"
    require(
        precision.param_dtype not in COMPUTE_FORMATS,
        f"a torch dtype or a weight format ({', '.join(WEIGHT_FORMATS)}) for the parameters",
        param,
        "fp8 and tf32 are ways to compute: name them as compute_dtype",
    )
    require(
        compute not in WEIGHT_FORMATS,
        "a torch dtype, fp8 or tf32 to compute in",
        f"compute={dtypes.name(compute)}",
        "name the weight format as param_dtype and compute in bfloat16",
    )
    output = precision.output_dtype
    require(not isinstance(output, str), "a torch dtype for outputs", f"output={output}", "use output=float32")
    require(casting in ("op", "module", None), "casting 'op', 'module' or None", repr(casting), "use casting='op'")
    received = f"{param}, compute={dtypes.name(compute)}, casting={casting}"
    require(
        casting is not None or not is_low(compute) or compute == precision.param_dtype,
        "a casting where computation is in another dtype than the parameters'",
        received,
        "use casting='op' (autocast) or casting='module'",
    )
    require(
        casting != "op" or is_low(compute),
        "a low-precision compute dtype with casting='op'",
        received,
        "use casting=None, or compute in bfloat16",
    )


PRESETS: dict[str, Precision] = {
    "32-true": Precision(F32, F32, F32),
    "64-true": Precision(F64, F64, F64),
    "16-mixed": Precision(F32, F16, F32, "op"),
    "bf16-mixed": Precision(F32, BF16, F32, "op"),
    "16-module": Precision(F32, F16, F32, "module"),
    "bf16-module": Precision(F32, BF16, F32, "module"),
    "16-true": Precision(F16, F16, F16, "module"),
    "bf16-true": Precision(BF16, BF16, BF16, "module"),
    "fp8-mixed": Precision(F32, "fp8", F32, "op"),
    **{form: Precision(form, BF16, F32, "op") for form in WEIGHT_FORMATS},
    "32-fast": Precision(F32, "tf32", F32),
}
"""The precision of every preset, by name."""

_OTHER_SPELLINGS = {
    "32-true": "32 fp32 float32 full no O0",
    "64-true": "64 fp64 float64 double",
    "16-mixed": "16 fp16 float16 O1 mixed_float16 amp_fp16",
    "bf16-mixed": "bf16 bfloat16 mixed_bfloat16 amp_bf16",
    "16-module": "O2",
    "16-true": "O3 half",
    "fp8-mixed": "fp8 amp_fp8",
}
SPELLINGS: dict[str, str] = {
    spelling: preset for preset in PRESETS for spelling in (preset, *_OTHER_SPELLINGS.get(preset, "").split())
}
"""Every accepted spelling of a preset, and the preset's name."""

_FOLDED = {spelling.lower(): preset for spelling, preset in SPELLINGS.items()}


def find_preset(spelling: str) -> str:
    """Find the preset that a spelling means, whatever its case.

    Args:
        spelling: e.g. `O1`, `fp16`, `BF16-mixed`.

    Returns:
        The preset's name.

    Raises:
        PolicyError: it is `auto`, which needs a device, or unknown.

    >>> find_preset("o1"), find_preset("mixed_bfloat16")
    ('16-mixed', 'bf16-mixed')
    """
    folded = spelling.strip().lower().removeprefix("torch.")
    if folded in _FOLDED:
        return _FOLDED[folded]
    if folded == "auto":
        raise PolicyError(
            message(
                "a policy that can be read without a device",
                repr(spelling),
                remedy="pass 'auto' to wrap or resolve, which know the model's device",
            )
        )
    raise PolicyError(
        message(
            f"a policy, one of {', '.join(SPELLINGS)}, auto, or params=...,compute=...,output=...",
            repr(spelling),
            remedy=nearest(folded, [*_FOLDED, "auto"]) + "write one of these spellings",
        )
    )


def default_casting(param: Dtype, compute: Dtype) -> Casting:
    """Who casts where a text does not say.

    Args:
        param: the parameters' dtype.
        compute: the compute dtype.

    Returns:
        None where nothing is to be cast, `module` for low-precision parameters, otherwise `op`.

    >>> default_casting(F32, F32), default_casting(F32, BF16), default_casting(BF16, BF16)
    (None, 'op', 'module')
    """
    if not isinstance(param, str) and is_low(param):
        return "module"
    return "op" if is_low(compute) else None


def read_precision(preset: str | None, fields: Mapping[str, str]) -> Precision:
    """Read a precision from a preset's spelling and the fields that override it.

    Args:
        preset: a spelling, or None for the jmp grammar: params = float32, compute = params, output = compute.
        fields: values by full key; keys that a precision does not have are left alone.

    Returns:
        The precision.

    Raises:
        PolicyError: a value cannot be read.

    >>> read_precision(None, {"compute": "bf16", "output": "f32"})
    Precision('float32', 'bfloat16', 'float32', casting='op')
    """
    base = PRESETS[find_preset(preset)] if preset is not None else None

    def chosen(key: str, default: Dtype) -> Dtype:
        return parse_dtype(fields[key]) if key in fields else default

    param = chosen("params", base.param_dtype if base else F32)
    compute = chosen("compute", base.compute_dtype if base else _default_compute(param))
    output = chosen("output", base.output_dtype if base else _default_output(compute))
    casting = base.casting if base and base.casting else default_casting(param, compute)
    if "casting" in fields:
        casting = _read_casting(fields["casting"])
    return Precision(param, compute, output, casting, read_flag(fields, "cast_inputs"), fields.get("recipe"))


def _read_casting(text: str) -> Casting:
    known: dict[str, Casting] = {"op": "op", "module": "module", "none": None}
    if text.lower() not in known:
        raise PolicyError(
            message("casting=op, module or none", f"casting={text}", remedy=nearest(text, known) + "write one of these")
        )
    return known[text.lower()]


def write_precision(precision: Precision) -> dict[str, str]:
    """Write the fields that `read_precision(None, fields)` turns back into an equal precision.

    Args:
        precision: what to write.

    Returns:
        The params, and whatever differs from the grammar's defaults.

    >>> write_precision(PRESETS["bf16-mixed"])
    {'params': 'float32', 'compute': 'bfloat16', 'output': 'float32'}
    """
    param, compute = precision.param_dtype, precision.compute_dtype
    fields = {"params": dtypes.name(param)}
    if compute != _default_compute(param):
        fields["compute"] = dtypes.name(compute)
    if precision.output_dtype != _default_output(compute):
        fields["output"] = dtypes.name(precision.output_dtype)
    if precision.casting != default_casting(param, compute):
        fields["casting"] = precision.casting or "none"
    if precision.cast_inputs is not None:
        fields["cast_inputs"] = str(precision.cast_inputs).lower()
    if precision.recipe not in (None, TENSORWISE):
        fields["recipe"] = precision.recipe
    return fields


def _default_compute(param: Dtype) -> Dtype:
    return BF16 if isinstance(param, str) else param


def _default_output(compute: Dtype) -> Dtype:
    return F32 if isinstance(compute, str) else compute
