"""Classifier-free guidance (arXiv:2207.12598; moshi's cfg_coef): draw from what the given facts change.

    logits = null + cfg * (full - null)        full: the column as it is; null: a past that knows less

Every item of a batch is read twice, rows 0..B-1 in full, B..2B-1 with less: without its conditions, with `cfg_no_text`
without any text but the first id (the text is then drawn from the full side alone), with `cfg_hide` without its first
frames. Both sides read the same sampled tokens. With cfg = 1 nothing is read twice. Used by sample.py.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.choice import device_constant
from layers.conditioning import condition_column
from streams import StreamTable


class Guidance:
    """Doubles what the model reads and mixes what it says."""

    def __init__(self, config: Any, table: StreamTable) -> None:
        self.scale, self.no_text, self.hide, self.table = config.cfg, config.cfg_no_text, config.cfg_hide, table
        self.on = config.cfg != 1
        self.bad = condition_column(table, config.cfg_condition if self.on else "").flatten().tolist()
        if self.on and not (table.conditions or self.no_text or self.hide):
            raise ValueError("cfg guides by what one side does not know; this model has no condition, add --cfg_no_text or --cfg_hide=N")

    def twice(self, x: Tensor) -> Tensor:
        """Repeat for both sides.   (B, ...) -> (2B, ...)"""
        return torch.cat([x, x]) if self.on else x

    def both(self, columns: Tensor, positions: Tensor) -> Tensor:
        """Columns (B, K, n), the start column at position (B, n) 0, as both sides read them.   -> (2B, K, n)"""
        if not self.on:
            return columns
        table, less = self.table, columns.clone()
        frame = positions[:, None] - 1 - device_constant(tuple(table.delays), columns.device)[:, None]       # (B, K, n) frame numbers
        unseen = torch.zeros_like(frame, dtype=torch.bool)
        if self.no_text:
            unseen[:, : len(table.text)] = frame[:, : len(table.text)] >= 0
        unseen |= (frame >= 0) & (frame < self.hide)
        less.masked_fill_(unseen, -1)
        for k, id in zip(table.conditions, self.bad, strict=True):
            less[:, k] = torch.where(columns[:, k] >= 0, id, -1)
        return torch.cat([columns, less])

    def voice_features(self, model: Any, voice: Tensor | None) -> Tensor | None:
        """Features of the voices (B, n, F), NaN where is none, as the layers attend to them; the unguided side has none.   -> (2B, n, D)"""
        if model.voice is None or voice is None:
            return None
        known = ~voice.isnan().any(-1)
        known = torch.cat([known, torch.zeros_like(known)]) if self.on else known
        return model.voice(self.twice(voice.nan_to_num()).to(model.voice.none.device), known.to(model.voice.none.device))

    def mix(self, logits: Tensor, text: bool = False) -> Tensor:
        """(2B, ...) -> (B, ...)"""
        if not self.on:
            return logits
        full, null = logits.chunk(2)
        return full if text and self.no_text else null + self.scale * (full - null)
