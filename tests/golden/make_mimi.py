"""Write mimi.safetensors: a tiny Mimi of random weights in moshi and in transformers, what it hears and says, offline and live.

    python tests/golden/make_mimi.py

Environment: torch 2.13.0, moshi 0.2.13 with --no-deps (its pins are stricter than it needs), transformers 5.23.0, einops, sentencepiece,
sphn.  Weights are drawn again (a fresh package has empty codebooks), rounded to half precision and stored so; both packages compute with
the rounded ones.  The file holds `weights/NAME` in moshi's names, inputs and outputs; its metadata versions, command, transformers'
config.json and the names of the file that transformers writes.  Read by test_mimi.py.
"""

import copy
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "NO_TORCH_COMPILE": "1", "NO_CUDA_GRAPH": "1"}

import torch
from moshi.models import loaders
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MimiConfig, MimiModel

HERE = Path(__file__).parent
DIM, WIDTH, LAYERS, HEADS, FFN, WINDOW, LEVELS, SIZE, BOOK = 24, 2, 2, 3, 28, 5, 9, 23, 10
LENGTHS = (1, 960, 1919, 1920, 1921, 5000, 9600)
LONG = 24               # frames of the streams: 48 positions, far past the window


def tiny() -> dict:
    config = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(dimension=DIM, n_filters=WIDTH)
    config["quantizer"].update(dimension=BOOK, n_q=LEVELS, bins=SIZE, input_dimension=DIM, output_dimension=DIM)
    config["transformer"].update(d_model=DIM, num_heads=HEADS, num_layers=LAYERS, dim_feedforward=FFN, input_dimension=DIM,
                                 output_dimensions=[DIM], context=WINDOW)
    return config


@torch.no_grad()
def scramble(model: nn.Module, seed: int) -> nn.Module:
    """Draw everything in half precision; scales large enough for attention to matter, codebooks as wide as what they quantise."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(p.shape, generator=g)
        if name.endswith("_initialized"):
            noise = torch.ones(p.shape)
        elif name.endswith("cluster_usage"):
            noise = 0.5 + 1.5 * torch.rand(p.shape, generator=g)
            noise[3] = 1e-6                                     # an entry that won nothing: divided by 1e-5
        elif name.endswith("embedding_sum"):
            noise *= 2.0
            noise[3] *= 1e-5
        elif name.endswith("scale"):
            noise = 0.5 + 0.5 * torch.rand(p.shape, generator=g)
        elif "norm" in name:
            noise = (0 if name.endswith("bias") else 1) + 0.3 * noise
        elif name.endswith("bias"):
            noise *= 0.1
        else:
            fan = p.numel() / p.shape[0 if "convtr" not in name or "upsample" in name else 1] / (2 if "convtr" in name else 1)
            gain = 3 if "input_proj" in name else 1.6 if "encoder" in name else 1.2       # many codes in use
            noise *= gain * max(fan, 1) ** -0.5
        p.copy_(noise.half())
    return model.eval()


def sound(n: int, seed: int) -> Tensor:
    """(1, 1, n): noise whose loudness swells and falls, by a formula, so that it need not be stored."""
    k = torch.arange(n, dtype=torch.float64)
    noise = ((k * 12.9898 + seed).sin() * 43758.5453).frac() * 0.6
    return (noise * (k / 3000).sin()).float()[None, None]


def transformers_twin(state: dict[str, Tensor]) -> tuple[MimiModel, dict, list[str]]:
    """The same weights in transformers: its parameters in the order of moshi's, rows of q and k from neighbours to halves."""
    config = MimiConfig(
        hidden_size=DIM, num_filters=WIDTH, codebook_size=32, codebook_dim=BOOK, num_quantizers=LEVELS, num_hidden_layers=LAYERS,
        vector_quantization_hidden_dimension=BOOK, upsample_groups=DIM, intermediate_size=FFN, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=DIM // HEADS, sliding_window=WINDOW, attn_implementation="eager")
    model = MimiModel(config).eval()
    new, head = {}, DIM // HEADS
    words = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "linear1": "mlp.fc1", "linear2": "mlp.fc2",
             "layer_scale_1": "self_attn_layer_scale", "layer_scale_2": "mlp_layer_scale", "self_attn.out_projs.0": "self_attn.o_proj",
             ".conv.conv.conv.": ".conv.", ".convtr.convtr.convtr.": ".conv.", ".conv.conv.": ".conv.", ".convtr.convtr.": ".conv.",
             "transformer.transformer.layers": "transformer.layers", "coder.model.": "coder.layers.",
             "rvq_first": "semantic_residual_vector_quantizer", "rvq_rest": "acoustic_residual_vector_quantizer", ".vq.layers": ".layers",
             "_codebook._initialized": "codebook.initialized", "_codebook.embedding_sum": "codebook.embed_sum", "_codebook": "codebook"}
    for name, tensor in state.items():
        for old, word in words.items():
            name = name.replace(old, word)
        if "in_projs" in name:
            stem = name.removesuffix("in_projs.0.weight")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                if letter != "v":
                    part = part.view(HEADS, head // 2, 2, DIM).transpose(1, 2).reshape(DIM, DIM)
                new[f"{stem}{letter}_proj.weight"] = part.contiguous()
        else:
            if "codebook.embed_sum" in name or "codebook.cluster_usage" in name:        # transformers wants a power of 2: far entries
                fill = tensor.new_full((32 - SIZE, *tensor.shape[1:]), 1e3 if "embed" in name else 1)
                tensor = torch.cat([tensor, fill])
            new[name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder)
        with safe_open(path / "model.safetensors", "pt") as file:
            names = sorted(file.keys())
        assert names == sorted(new), set(names) ^ set(new)
        save_file(new, path / "model.safetensors", {"format": "pt"})
        about = json.loads((path / "config.json").read_text())
        return MimiModel.from_pretrained(folder, attn_implementation="eager").eval(), about, names


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = scramble(loaders.get_mimi(None, tiny(), num_codebooks=8), 1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {f"weights/{name}": tensor.half() for name, tensor in state.items()}
    wav = torch.cat([sound(max(LENGTHS), seed) for seed in (3, 4)])
    for n in LENGTHS:
        tensors[f"codes/{n}"] = model.encode(wav[..., :n]).to(torch.uint8)
    codes = torch.randint(0, SIZE, (2, 8, 3), generator=torch.Generator().manual_seed(5))
    wave = model.decode(codes)
    tensors |= {"codes": codes.to(torch.uint8), "decoded": wave[..., ::2].clone(), "decoded_1": model.decode(codes[:1, :1])[..., ::5]}
    model.set_num_codebooks(LEVELS)
    tensors["codes_all"] = model.encode(wav).to(torch.uint8)
    tensors["decoded_all"] = model.decode(tensors["codes_all"][:1].long())[..., ::5]
    model.set_num_codebooks(8)

    long = sound(LONG * 1920, seed=7)
    offline, live, said = model.encode(long), [], []
    with model.streaming(1):
        for piece in long.split(1920, 2):
            live.append(model.encode(piece))
            said.append(model.decode(live[-1]))
    live, said = torch.cat(live, 2), torch.cat(said, 2)
    whole = model.decode(live)
    apart = ((offline != live).any(1)[0].nonzero()[:, 0].tolist(), float((said - whole).abs().max()))
    print(f"the ring: other codes in frames {apart[0]} of {LONG}, waves of the same codes up to {apart[1]:.3f} apart")
    tensors |= {"long_offline": offline.to(torch.uint8), "long_live": live.to(torch.uint8)}
    tensors |= {"said_offline": whole[..., ::17].clone(), "said_live": said[..., ::17].clone()}

    twin, about, names = transformers_twin(state)
    for n in LENGTHS:
        theirs = twin.encode(wav[..., :n], num_quantizers=8).audio_codes
        tensors[f"codes_hf/{n}"] = theirs.to(torch.uint8)
        print(f"{n} samples: transformers' codes differ in {int((theirs != tensors[f'codes/{n}']).sum())} of {theirs.numel()}")
    theirs = twin.decode(codes).audio_values
    tensors["decoded_hf"] = theirs[..., ::5].clone()
    print(f"its wave by {float((theirs - wave).abs().max()):.1e}; |wave| up to {wave.abs().max():.2f}")
    used = [int(row.unique().numel()) for row in offline[0]]
    print(f"of {LONG} frames in each codebook {used} codes")
    versions = {p: importlib.metadata.version(p) for p in ("torch", "moshi", "transformers")}
    metadata = {"format": "pt", "versions": json.dumps(versions), "command": "python tests/golden/make_mimi.py",
                "seeds": json.dumps({"weights": 1, "wav": 3, "codes": 5, "long": 7}), "hf_config": json.dumps(about),
                "hf_names": json.dumps(names)}
    path = HERE / "mimi.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(0o644)
    print(f"mimi: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
