"""What a run holds: the type of every parameter.
"""

from collections.abc import Sequence

import torch
from torch import nn

from layers.int8_base import quantizable
from lora import LoraConfig, trained_parameters, within


def held_types(model: nn.Module, config: LoraConfig | None, rates: Sequence[tuple[str, float]], quantize: str) -> dict[str, torch.dtype]:
    """How training holds the parameters that are not of its compute type: what is trained in fp32, frozen Linears in int8."""
    chosen = trained_parameters(model, config) if config else {n: p for n, p in model.named_parameters() if p.requires_grad}
    trained = [name for name in chosen if next((factor for pattern, factor in rates if within(name, pattern)), 1.0)]
    eight = {f"{path}.weight": torch.int8 for path in quantizable(model, trained)} if quantize else {}
    return dict.fromkeys(trained, torch.float32) | eight
