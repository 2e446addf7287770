"""Makes inputs for a model from the signature of its forward and its config: text, images, sound, and labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.configs import IMAGE

BATCH, LENGTH = 2, 12
Inputs = dict[str, Any]


def _find(config: Any, *names: str) -> Any:
    """A field of the config, or of the first of its sub-configs that has it."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # a config whose layers differ refuses to give one number
            continue
        if isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
            return value
    for sub in getattr(config, "sub_configs", {}) or {}:
        below = getattr(config, sub, None)
        if below is not None and not isinstance(below, dict):
            value = _find(below, *names)
            if value is not None:
                return value
    return None


def _ids(length: int, *lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(lead) + length)
    # Below the special tokens' numbers.
    return torch.randint(5, 55, (BATCH, *lead, length), generator=generator)


def _noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def _mask(*lead: int) -> Tensor:
    mask = torch.ones(BATCH, *lead, LENGTH, dtype=torch.long)
    # Padding is what makes a model fill its masks with very negative numbers.
    mask[1, ..., -3:] = 0
    return mask


class Maker:
    """Makes inputs for one model.

    Args:
        model: its class's name and the signature of its forward decide.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = model.config
        self.kind = type(model).__name__
        self.names = inspect.signature(type(model).forward).parameters
        self.main = getattr(model, "main_input_name", "input_ids")

    def candidates(self) -> Iterator[Inputs]:
        """Inputs to try, the richest first."""
        text, images, sounds = list(self.text()), list(self.images()), list(self.sounds())
        for other in (images, sounds):
            for one in other:
                if text:
                    yield {**text[0], **one}
        order = [images, sounds, text] if self.main.startswith("pixel") else [text, sounds, images]
        if self.main.startswith("input_") and self.main != "input_ids":
            order = [sounds, images, text]
        for group in order:
            yield from group
        if "decoder_input_ids" in self.names:
            for one in (*images, *sounds):
                yield {**one, "decoder_input_ids": _ids(6)}
        yield from self.special()

    def text(self) -> Iterator[Inputs]:
        names = self.names
        if "input_ids" not in names:
            return
        lead = (3,) if "MultipleChoice" in self.kind else ()
        base: Inputs = {"input_ids": _ids(LENGTH, *lead)}
        if "bbox" in names:
            corner = torch.randint(0, 60, (BATCH, LENGTH, 2), generator=torch.Generator().manual_seed(1))
            base["bbox"] = torch.cat([corner, corner + 20], -1)
        if "decoder_input_ids" in names and "decoder" not in self.kind.lower():
            base["decoder_input_ids"] = _ids(6)
        masked = {**base, "attention_mask": _mask(*lead)} if "attention_mask" in names else base
        yield masked
        if "attention_mask" in names:
            yield base
        if "decoder_input_ids" in base:
            yield {key: value for key, value in masked.items() if key != "decoder_input_ids"}
        if "mems" not in names and "token_type_ids" in names:
            yield {**base, "token_type_ids": torch.zeros_like(base["input_ids"])}

    def images(self) -> Iterator[Inputs]:
        names = self.names
        key = next((k for k in ("pixel_values", "pixel_values_videos", "flattened_patches") if k in names), None)
        if key is None:
            return
        channels = _find(self.config, "num_channels", "in_channels", "in_chans", "num_input_channels")
        channels = channels if isinstance(channels, int) else 3
        size = _find(self.config, "image_size", "img_size", "input_size")
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size or IMAGE,) * 2
        if not isinstance(height, int) or height > 256:
            height = width = IMAGE
        frames = _find(self.config, "num_frames", "frames_per_clip") or 4
        if key == "flattened_patches":
            patches = _noise(BATCH, 8, 2 + channels * 256)
            patches[..., :2] = torch.arange(8)[:, None].float()
            yield {key: patches, "attention_mask": torch.ones(BATCH, 8)}
            return
        extra: Inputs = {"pixel_mask": torch.ones(BATCH, height, width)} if "pixel_mask" in names else {}
        if "bool_masked_pos" in names and "Masked" in self.kind:
            patch = _find(self.config, "patch_size") or 16
            count = (height // (patch if isinstance(patch, int) else patch[0])) ** 2
            masked = torch.zeros(BATCH, count, dtype=torch.bool)
            masked[:, ::3] = True
            yield {key: _noise(BATCH, channels, height, width), "bool_masked_pos": masked}
        yield {key: _noise(BATCH, channels, height, width)}
        if extra:
            yield {key: _noise(BATCH, channels, height, width), **extra}
        yield {key: _noise(BATCH, frames, channels, height, width)}
        if "image_grid_thw" in names or "grid_thw" in names or "spatial_shapes" in names:
            return
        yield {key: _noise(BATCH, channels, IMAGE * 2, IMAGE * 2)}

    def sounds(self) -> Iterator[Inputs]:
        names = self.names
        bins = _find(self.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels") or 80
        bins = bins if isinstance(bins, int) else 80
        positions = _find(self.config, "max_source_positions")
        frames = 2 * positions if isinstance(positions, int) else 128
        labels: Inputs = {"decoder_input_ids": _ids(6)} if "decoder_input_ids" in names else {}
        if "input_features" in names:
            mask = {"attention_mask": torch.ones(BATCH, frames, dtype=torch.long)} if "attention_mask" in names else {}
            yield {"input_features": _noise(BATCH, bins, frames), **labels}
            yield {"input_features": _noise(BATCH, frames, bins), **labels}
            yield {"input_features": _noise(BATCH, frames, bins), **mask, **labels}
            yield {"input_features": _noise(BATCH, 1, frames, bins), **labels}
        if "input_values" in names:
            yield {"input_values": _noise(BATCH, 2000), **labels}
            yield {"input_values": _noise(BATCH, 1, 2000), **labels}
            longest = _find(self.config, "max_length")
            yield {"input_values": _noise(BATCH, longest if isinstance(longest, int) else 64, bins), **labels}
            yield {"input_values": _noise(BATCH, 2, 4000), **labels}

    def special(self) -> Iterator[Inputs]:
        """Time series, and spectrograms by other names."""
        names, config = self.names, self.config
        if "past_values" in names:
            length = _find(config, "context_length") or 32
            lags = max(_find(config, "lags_sequence") or [0])
            channels = _find(config, "num_input_channels", "input_size") or 1
            for shape in ((BATCH, length + lags), (BATCH, length, channels), (BATCH, length + lags, channels)):
                given: Inputs = {"past_values": _noise(*shape)}
                if "past_time_features" in names:
                    count = (_find(config, "num_time_features") or 0) + 1
                    given["past_time_features"] = _noise(*shape[:2], count - 1)
                    given["past_observed_mask"] = torch.ones(*shape)
                    ahead = _find(config, "prediction_length") or 8
                    given["future_values"] = _noise(BATCH, ahead)
                    given["future_time_features"] = _noise(BATCH, ahead, count - 1)
                yield given
        for key in ("spectrogram", "audio_values", "features"):
            if key in names:
                yield {key: _noise(BATCH, 32, _find(config, "model_in_dim", "num_mel_bins") or 80)}
        if "hidden_states" in names:
            width = _find(config, "hidden_size", "d_model") or 64
            yield {"hidden_states": _noise(BATCH, LENGTH, width)}
        if "inputs_embeds" in names:
            width = _find(config, "hidden_size", "d_model") or 64
            yield {"inputs_embeds": _noise(BATCH, LENGTH, width)}
        if "inputs" in names:
            yield {"inputs": _ids(LENGTH)}

    def labels(self, inputs: Inputs) -> Iterator[Inputs]:
        """What makes the model compute its own loss."""
        names, kind = self.names, self.kind
        target = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if "return_loss" in names:
            yield {"return_loss": True}
        if "start_positions" in names:
            yield {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])}
        if "labels" not in names:
            return
        if "next_sentence_label" in names:
            yield {"labels": target, "next_sentence_label": torch.tensor([0, 1])}
        if ("Classification" in kind and "Token" not in kind) or "MultipleChoice" in kind or "NextSentence" in kind:
            yield {"labels": torch.tensor([0, 1])}
        elif "Token" in kind and "Classification" in kind and target is not None:
            yield {"labels": target % 2}
        elif "CTC" in kind:
            yield {"labels": _ids(4)}
        elif "SemanticSegmentation" in kind and "pixel_values" in inputs:
            yield {"labels": torch.ones(inputs["pixel_values"].shape[:1] + inputs["pixel_values"].shape[2:]).long()}
        elif target is not None and ("LM" in kind or "Generation" in kind or "PreTraining" in kind or "Seq2" in kind):
            yield {"labels": target}
