"""One line makes a plain PyTorch training loop run in mixed precision."""

from wrapprec.errors import (
    AlreadyWrappedError,
    CaptureError,
    DtypeMismatchError,
    ModelChangedError,
    NonFiniteError,
    NotWrappedError,
    PolicyError,
    ScaleLeakError,
    StepError,
    WrapprecError,
    WrapprecWarning,
)
from wrapprec.fsdp import fsdp_policy
from wrapprec.handle import Handle
from wrapprec.island import float32
from wrapprec.outward import leave
from wrapprec.plan import Placement, Plan, resolve
from wrapprec.policy import LossScale, Policy, Precision, Rule
from wrapprec.wrap import handle_of, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "AlreadyWrappedError",
    "CaptureError",
    "DtypeMismatchError",
    "Handle",
    "LossScale",
    "ModelChangedError",
    "NonFiniteError",
    "NotWrappedError",
    "Placement",
    "Plan",
    "Policy",
    "PolicyError",
    "Precision",
    "Rule",
    "ScaleLeakError",
    "StepError",
    "WrapprecError",
    "WrapprecWarning",
    "float32",
    "fsdp_policy",
    "handle_of",
    "leave",
    "resolve",
    "unwrap",
    "wrap",
]
