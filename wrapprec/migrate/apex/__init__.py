"""Apex's API over wrapprec: ``from wrapprec.migrate.apex import amp`` where a script said ``from apex import amp``.

Low precision and the loss scale exist only inside the models that `amp.initialize` was given, so gradients are true
right after ``backward()``, and what Apex asked a loop to do about the scale does nothing here.
"""

from wrapprec.migrate.apex import amp, fp16_utils, multi_tensor_apply, normalization, optimizers, parallel

__all__ = ["amp", "fp16_utils", "multi_tensor_apply", "normalization", "optimizers", "parallel"]
