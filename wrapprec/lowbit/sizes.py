"""How many bytes a weight takes in each format that bitsandbytes stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCK = 64
"""Elements of a 4-bit weight that share one scale, the largest magnitude among them."""

_NESTED_BLOCK = 256
"""Scales that share one scale of theirs under double quantisation."""

_TABLE = 16 * 4
"""The sixteen values of a 4-bit format, in float32, beside each weight."""

FOUR_BITS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
"""Formats of 4 bits an element; `-dq`: the scales are quantised to 8 bits, too."""


FEWEST = 4096
"""Elements of a parameter whose optimizer state is worth quantising; as in bitsandbytes."""

CODE_BLOCK = {8: 256, 4: 128}
"""Elements of optimizer state that share one scale, by bits: bitsandbytes' block, and torchao's."""


def code_bytes(bits: int, count: int) -> int:
    """Count the bytes of optimizer state that was quantised: codes, and a float32 for each block.

    Args:
        bits: 8 or 4.
        count: of elements.

    >>> code_bytes(8, 4096), code_bytes(4, 4096)
    (4160, 2176)
    """
    blocks = -(-count // CODE_BLOCK[bits])
    codes = count if bits == 8 else blocks * CODE_BLOCK[4] // 2  # codes of 4 bits come in whole blocks
    return codes + 4 * blocks


def stored_bytes(form: str, shape: Sequence[int]) -> int:
    """Count the bytes that a weight takes in a format, scales and tables included.

    In bits an element, for large weights: nf4 and fp4 4 + 32/64 = 4.5; with double quantisation 4 + 8/64 + 32/(64*256)
    = 4.127 (Dettmers et al., QLoRA, 2023, section 3); int8 8 + 32/columns. bitsandbytes keeps the table of 8-bit
    scales, 1 KiB, once for all weights: it is not counted.

    Args:
        form: a weight format.
        shape: of the weight, ``(out_features, in_features)`` or ``(num_embeddings, embedding_dim)``.

    Returns:
        Bytes.

    Raises:
        KeyError: it is no weight format.

    >>> stored_bytes("nf4", (1024, 1024)) * 8 / 1024**2, stored_bytes("int8", (1024, 1024)) * 8 / 1024**2
    (4.50048828125, 8.03125)
    """
    count = math.prod(shape)
    if form == "int8":
        return count + 4 * shape[0]
    if form == "int8-training":
        return 4 * count
    if form not in FOUR_BITS:
        raise KeyError(form)
    packed, blocks = -(-count // 2), -(-count // BLOCK)
    if form.endswith("-dq"):
        # 8 bits a scale, a float32 for each 256 of them, and their mean.
        return packed + _TABLE + blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4
    return packed + _TABLE + 4 * blocks
