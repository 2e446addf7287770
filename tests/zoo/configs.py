"""Builds a small random config for a model class: the class's own defaults, with every size made small by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

IMAGE = 64
VOCAB = 128

_RULES: list[tuple[str, Any]] = [
    # By the end of the name, first match wins: the largest value allowed.
    (r"num_labels|label|ignore|padding|coefficient|_cost|rate$|stride|kernel|n_points|feature_levels", None),
    (r"vocab_size\w*|num_embeddings|codebook_size|num_codevectors_per_group", VOCAB),
    (r"max_window_layers|layer_index|insert_layer_id|feature_layer|every_n_layers|_interval", None),
    (r"max_(2d_)?position_embeddings|n_positions|n_ctx|max_\w*positions|max_seq_len\w*|context_length", 128),
    (r"max_length|block_size|num_position_embeddings|chunk_size|local_attention|sliding_window", 64),
    (r"hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|_layers|num_blocks|depth|_depth", 2),
    (r"num_\w*blocks|n_blocks|num_stages_\w+|first_k_dense_replace|n_dec|n_enc", 2),
    (r"(key_value|kv|group|query_group|k)_heads", 2),
    (r"heads?|n_head|num_head", 4),
    (r"n_routed_experts|num_experts|local_experts|n_experts|moe_num_experts", 4),
    (r"experts_per_tok|top_?k|moe_k|experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts", 1),
    (r"rope_head_dim|head_dim|d_kv|key_dim|head_size|value_dim|attention_hidden_dim", 16),
    (r"lora_rank|rank|dt_rank|state_size|d_state|d_conv|ssm_state_size|conv_dim_\w+", 16),
    (r"image_size|img_size|input_size|pretrain_image_size|crop_size", IMAGE),
    (r"patch_size", 16),
    (r"window_size", 4),
    (r"num_queries|num_query_tokens|num_latents|num_denoising|num_mask_queries|two_stage_num_proposals", 8),
    (r"train_num_points|num_negatives|num_patches|image_seq_length|mm_tokens_per_image", 16),
    (r"moe_intermediate_size|expert_intermediate_size", 32),
    (r"mel_bins|feature_size|input_feat_per_channel|num_mels|n_mels", 80),
    (r"size|dim|dims|channels|units|width|embd|inner|hidden|d_model|d_ff|d_embed|planes|features|filters", 64),
]
_TABLE = [(re.compile(rf"(?:^|_)(?:{pattern})$"), limit) for pattern, limit in _RULES]
_DEEP = {pattern.pattern for pattern, limit in _TABLE if limit == 2 and re.search("layers|blocks", pattern.pattern)}
_TOKEN = re.compile(r"(_token_id|_token_index|_token_idx|_id|_index|_token)s?$")
_DROPOUT = re.compile(r"drop|layerdrop|mask_time_prob|mask_feature_prob")
_WIDTHS = re.compile(r"size|dim|channels|features|width|filters|units|planes")

STYLES: dict[str, dict[str, int]] = {
    "small": {},
    # Heads are 32 wide for models with a fixed rotary part; widths stay apart where a model relates them.
    "wide": {"width": 128, "head": 32},
    "divided": {"divide": 8},
    # Every kind of layer where they alternate, and room for four outputs on the way.
    "deep": {"layers": 4},
    # Stages that double their width, several times.
    "thin": {"width": 16, "head": 8},
    # Rotary positions in three parts, whose widths the class takes for granted.
    "mrope": {"mrope": 1},
    "own": {"own": 1},
}
"""Ways to make a config small, in the order in which they are tried."""


class _Shrink:
    """One way of making numbers small."""

    def __init__(self, style: str) -> None:
        self.style = STYLES[style]
        self.tokens = 60

    def value(self, key: str, value: Any) -> Any:
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if isinstance(value, float):
            return 0.0 if _DROPOUT.search(key) else value
        if isinstance(value, int):
            return 0 if _DROPOUT.search(key) else self.number(key, value)
        if isinstance(value, (list, tuple)) and value:
            return self.sequence(key, value)
        if isinstance(value, dict):
            return {k: self.value(k, v) if isinstance(k, str) else v for k, v in value.items()}
        return value

    def number(self, key: str, value: int) -> int:
        if _TOKEN.search(key):
            if value < VOCAB - 8:
                return value
            self.tokens += 1
            return self.tokens
        if "own" in self.style and not re.search(r"layers?$|vocab|depth$|image_size|experts$", key):
            return value
        for pattern, limit in _TABLE:
            if pattern.search(key):
                if limit == 2 and pattern.pattern in _DEEP:
                    limit = self.style.get("layers", 2)
                return value if limit is None else self.limited(value, limit)
        return value

    def limited(self, value: int, limit: int) -> int:
        divide, width, head = (self.style.get(k) for k in ("divide", "width", "head"))
        if divide and limit in (64, 16, 32) and value > limit:
            return max(value // divide // 8 * 8, 8)
        if limit == 64 and width:
            limit = width
        if limit == 16 and head:
            limit = head
        return min(value, limit)

    def sequence(self, key: str, value: Any) -> Any:
        kind = type(value)
        if key == "mrope_section":
            return {8: [1, 1, 2], 32: [4, 6, 6]}.get(self.style.get("head", 16), [2, 3, 3])
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            if "own" in self.style:
                return kind(min(v, 2) for v in value) if key == "depths" else value
            if "depth" in key or key in ("layers", "num_block_repeats"):
                return kind(min(v, 2) for v in value)
            if "heads" in key:
                return kind(min(1 << (v.bit_length() - 1), 4) for v in value)
            if _WIDTHS.search(key) and max(value) > 64:
                return kind(max(v // 8 // 8 * 8, 8) if v >= 8 else v for v in value)
            if key in ("image_size", "img_size"):
                return kind(min(v, IMAGE) for v in value)
            return value
        if key == "attention_types":
            return [[["global", "local"], 1]]
        if all(isinstance(v, (list, tuple)) for v in value):
            return kind(self.sequence(key, v) if v else v for v in value)
        if all(isinstance(v, str) for v in value) and key.endswith("layer_types"):
            count = self.style.get("layers", 2)
            return kind(sorted(set(value), key=value.index)[:count] + list(value[:count]))[:count]
        return value


_NEEDED = {"pad_token_id": 0, "prediction_length": 8, "num_experts_per_tok": 2}
"""What a config leaves open, and some of its models want."""


def _field(config: PretrainedConfig, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # a config whose layers differ refuses to give one number
        return None


def _defaults(kind: type[PretrainedConfig]) -> dict[str, Any]:
    found = {}
    for base in reversed(kind.__mro__):
        if base is object or not issubclass(base, PretrainedConfig) or base is PretrainedConfig:
            continue
        for key, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                found[key] = parameter.default
    return found


def small(kind: type[PretrainedConfig], style: str, shrink: _Shrink | None = None) -> PretrainedConfig:
    """Build a small config.

    Args:
        kind: the class's `config_class`.
        style: one of `STYLES`.
    """
    shrink = shrink or _Shrink(style)
    default = kind()
    given: dict[str, Any] = {}
    subs = dict(getattr(kind, "sub_configs", None) or {})
    for key, value in _defaults(kind).items():
        own = _field(default, key)
        if value is None and own is None and key in _NEEDED:
            given[key] = _NEEDED[key]
        if key in subs or isinstance(own, PretrainedConfig):
            continue
        if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
            value = own
        after = shrink.value(key, value)
        if key == "rope_parameters" and isinstance(own, dict) and "mrope" in shrink.style:
            after = {**own, "mrope_section": [2, 3, 3]}
        if after is not value and after != value:
            given[key] = after
        elif value is None and isinstance(own, float) and _DROPOUT.search(key):
            given[key] = 0.0
        elif (isinstance(own, list) and key == "attention_types") or (isinstance(own, dict) and "mrope_section" in own):
            given[key] = shrink.value(key, own)
    for key in subs:
        own = _field(default, key)
        if isinstance(own, PretrainedConfig):
            given[key] = small(type(own), style, shrink)
    return kind(**given)


def styles() -> Iterator[str]:
    """The ways to try, in order."""
    yield from STYLES
