"""Write snac.safetensors and snac_wide.safetensors: tiny SNACs of random weights in the official package, what they hear and say.

    python tests/golden/make_snac.py

Environment: torch 2.13.0, snac 1.2.1 with --no-deps, einops. The noise of the decoder is random there; here it is drawn from the
generators of audio/snac.py. The files hold `weights/NAME` in official names (weight norm and all), inputs and outputs; the metadata
versions, command and config.json. Read by test_snac.py.
"""

import importlib.metadata
import json
from pathlib import Path

import snac.layers
import torch
from safetensors.torch import save_file
from snac import SNAC
from torch import Tensor

HERE = Path(__file__).parent
CASES = {
    "snac": {"sampling_rate": 24000, "encoder_dim": 5, "encoder_rates": [2, 4, 3], "decoder_dim": 24, "decoder_rates": [4, 3, 2],
             "attn_window_size": None, "codebook_size": 19, "codebook_dim": 3, "vq_strides": [4, 2, 1], "noise": True, "depthwise": True},
    "snac_wide": {"sampling_rate": 16000, "encoder_dim": 6, "encoder_rates": [3, 5], "decoder_dim": 20, "decoder_rates": [5, 3],
                  "attn_window_size": None, "codebook_size": 13, "codebook_dim": 4, "vq_strides": [6, 3, 1], "noise": True,
                  "depthwise": True}}


class Numbered:
    """Stands for torch in snac.layers: gives each block of the decoder its noise, block by block."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def randn(self, shape: tuple[int, ...], **_: object) -> Tensor:
        self.count += 1
        return torch.randn(1 << 19, generator=torch.Generator().manual_seed(self.count - 1))[: shape[-1]].expand(shape)


@torch.no_grad()
def case(name: str, about: dict) -> None:
    model, g = SNAC(**about).eval(), torch.Generator().manual_seed(len(name))
    for key, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        gain = {"alpha": 0.3, "bias": 0.1, "original0": 0.3}.get(key.rpartition(".")[2], 1.0)
        p.copy_(gain * noise + (1.0 if key.endswith("alpha") else 0.5 if key.endswith("original0") else 0.0))
    hop = model.hop_length * about["vq_strides"][0]
    wav = 0.5 * torch.randn(2, 1, 5 * hop + 7, generator=g)
    codes = model.encode(wav)
    snac.layers.torch = Numbered()
    said = model.decode(codes)
    tensors = {f"weights/{k}": v.clone().contiguous() for k, v in model.state_dict().items()}
    tensors |= {"wav": wav, "said": said.contiguous()} | {f"codes{n}": c.contiguous() for n, c in enumerate(codes)}
    versions = {p: importlib.metadata.version(p) for p in ("torch", "snac")}
    save_file(tensors, HERE / f"{name}.safetensors", metadata={
        "format": "pt", "config": json.dumps(about), "versions": json.dumps(versions), "command": "python tests/golden/make_snac.py"})
    print(f"{name}: {(HERE / f'{name}.safetensors').stat().st_size} bytes, codes {[c.shape for c in codes]}, {said.std():.2f} loud")


for each, config in CASES.items():
    case(each, config)
