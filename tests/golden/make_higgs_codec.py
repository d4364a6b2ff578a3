"""Write the golden files of audio/higgs.py, hubert.py and whisper.py: tiny random models in their official implementation.

    python tests/golden/make_higgs_codec.py higgs_codec hubert whisper      (environment A)
    python tests/golden/make_higgs_codec.py boson_codec fairseq boson_tower     (environment B, behind A: adds to those files)

A: torch 2.13.0, transformers 5.23.0, torchaudio 2.11.0 with --no-deps and without its compiled libraries.
B: torch 2.13.0, transformers 4.46.3, boson-multimodal 0.1.1 with --no-deps, the same torchaudio, einops, numpy; what else the package
   imports is not called here, and replaced by empty modules.
Weights are drawn again, rounded to half precision and stored so: the official model computes with the rounded ones.
A file holds `weights/NAME` in transformers' names, inputs and outputs; its metadata versions, commands and the config.json.
Read by test_higgs_codec.py.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import sys
import types
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1"}

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "torchaudio", "boson-multimodal")
LENGTHS = (960, 1201, 1500, 1711, 2880)         # W % 960: 0; where the two codecs differ: 241, 540; beyond: 751; 0
TRAINING = ("decoder_semantic", "fc1.", "fc_post1", "embed_avg", "cluster_size", "inited", "masked_spec")       # not in the files
RATIOS = [8, 5, 4, 2, 3]


def write(name: str, tensors: dict[str, Tensor], config: dict, packages: str, command: str, **more: str) -> None:
    versions = {p: importlib.metadata.version(p) for p in PACKAGES if p in packages.split()}
    metadata = {"format": "pt", "config": json.dumps(config), "versions": json.dumps(versions),
                "command": f"python tests/golden/{Path(sys.argv[0]).name} {command}"} | more
    path = HERE / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(0o644)
    print(f"{name}: {path.stat().st_size} bytes, {versions}")


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@torch.no_grad()
def scramble(model: nn.Module, seed: int, gains: dict[str, float] | None = None) -> nn.Module:
    """Draw every parameter in half precision: matrices 1.2 / sqrt(fan_in) wide, norms and snakes around 1, biases around 0."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name or name.endswith("alpha") or name.endswith("original0"):
            noise = 1 + 0.3 * noise
        elif p.dim() < 2 or "embed_positions" in name:
            noise *= 0.2
        else:
            gain = next((gain for word, gain in (gains or {}).items() if word in name), 1.2)
            noise *= gain * (p.numel() / p.shape[0]) ** -0.5
        p.copy_(noise.half())
    for name, b in sorted(model.named_buffers()):
        if name.endswith("codebook.embed"):
            b.copy_(torch.randn(b.shape, generator=g).half())
    return model.eval()


def weights(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {f"weights/{k}": t.detach().half() for k, t in model.state_dict().items() if not any(word in k for word in skip)}


def sound(*shape: int, seed: int) -> Tensor:
    """Noise whose loudness swells and falls; half precision."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return (x * (torch.arange(shape[-1]) / 300).sin()).half()


# ---- the tokenizer ----

HUBERT = {"hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 26, "conv_dim": [6] * 7,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 3}


def higgs_codec() -> None:
    """Codes of odd lengths, and with the other one's padding, states, waves of whole and of fewer codebooks."""
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig
    dac = {"encoder_hidden_size": 1, "downsampling_ratios": RATIOS, "decoder_hidden_size": 32, "upsampling_ratios": RATIOS,
           "hidden_size": 10}
    config = HiggsAudioV2TokenizerConfig(
        acoustic_model_config=DacConfig(**dac), semantic_model_config=HubertConfig(**HUBERT, mask_time_prob=0.0),
        codebook_size=32, codebook_dim=6, target_bandwidths=[0.25, 1])                  # 8 codebooks of 5 bits
    gains = {"acoustic_decoder": 0.6, "fc.": 4, "encoder": 1.4}                         # waves near [-1, 1], many codes in use
    model = scramble(HiggsAudioV2TokenizerModel(config), 1, gains)
    assert len(model.quantizer.quantizers) == 8 and config.hop_length == 960
    tensors = weights(model, TRAINING)
    with torch.no_grad():
        tensors["wav"] = sound(2, 1, max(LENGTHS), seed=3)
        for n in LENGTHS:
            wav = tensors["wav"][..., :n].float()
            tensors[f"codes_hf/{n}"] = model.encode(wav).audio_codes.to(torch.uint8)
            tensors[f"codes_mult960/{n}"] = model.encode(F.pad(wav, (0, -n % 960))).audio_codes.to(torch.uint8)
            tensors[f"states/{n}"] = model._extract_semantic_features(wav)
        codes = torch.randint(0, 32, (2, 8, 2), generator=torch.Generator().manual_seed(5))
        tensors |= {"codes": codes.to(torch.uint8), "decoded": model.decode(codes).audio_values}
        tensors["decoded_3"] = model.decode(codes[:1, :3, :1]).audio_values             # of the first three codebooks
    used = [int(row.unique().numel()) for row in tensors[f"codes_hf/{max(LENGTHS)}"].transpose(0, 1)]
    print(f"|wave| up to {float(tensors['decoded'].abs().max()):.2f}; of 6 frames in each codebook {used} codes")
    about = json.loads(config.to_json_string()) | {"architectures": ["HiggsAudioV2TokenizerModel"]}
    write("higgs_codec", tensors, about, "torch transformers torchaudio", "higgs_codec")


def boson_codec() -> None:
    """The first release with the same weights: its codes, its wave, and a hash of the pairs of names, its and theirs."""
    tensors, metadata = read("higgs_codec")
    state = {k.removeprefix("weights/"): t.float() for k, t in tensors.items() if k.startswith("weights/")}
    tokenizer = boson_tokenizer()
    trained = [k for k in tokenizer.state_dict() if not any(word in k for word in TRAINING)]
    filled = {boson_name(k): k for k in state}
    pairs = sorted(f"{k} {filled[k.replace('weight_g', 'weight').replace('weight_v', 'weight')]}" for k in trained)
    names = hashlib.sha256("\n".join(pairs).encode()).hexdigest()
    with torch.no_grad():
        for name, tensor in tokenizer.state_dict().items():
            if name.endswith("weight_g"):                       # any direction of that length stands for the weight
                v = state[filled[name.replace("weight_g", "weight")]]
                tensor.copy_(torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))
            elif name in trained:
                tensor.copy_(state[filled[name.replace("weight_v", "weight")]])
            elif name.endswith("inited"):
                tensor.fill_(1)                                 # else the first encode fits codebooks of its own
        for n in LENGTHS:
            wav = tensors["wav"][..., :n].float()
            codes = torch.cat([tokenizer._xcodec_encode(x[None]).audio_codes for x in wav])     # its padding knows no batch
            tensors[f"codes_boson/{n}"] = codes.to(torch.uint8)
            theirs = tensors[f"codes_hf/{n}"]
            part = float((codes != theirs).float().mean()) if codes.shape == theirs.shape else "all"
            print(f"{n} samples: {tuple(codes.shape)}, {part} of the codes differ from transformers'")
        wave = torch.from_numpy(tokenizer.decode(tensors["codes"].long()))
    print(f"waves differ by {float((wave - tensors['decoded']).abs().max()):.1e}")
    tensors["decoded_boson"] = wave[:1]
    boson = {"n_filters": 32, "D": 10, "target_bandwidths": [0.25, 1], "ratios": RATIOS, "sample_rate": 24000, "bins": 32, "n_q": 8,
             "codebook_dim": 6, "semantic_techer": "hubert_base_general"}
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    write("higgs_codec", tensors, json.loads(metadata["config"]), "torch transformers torchaudio", "higgs_codec", **{
        "versions": metadata["versions"], "boson_names_sha256": names, "boson_config": json.dumps(boson),
        "boson_versions": json.dumps(versions), "boson_command": "python tests/golden/make_higgs_codec.py boson_codec"})


def boson_tokenizer() -> nn.Module:
    """The package's tokenizer in tiny: sizes that stand in its code are replaced, and so is what it only imports."""
    from transformers import HubertConfig, HubertModel  # before it could meet an empty librosa

    audiotools, ml = types.ModuleType("audiotools"), types.ModuleType("audiotools.ml")
    audiotools.AudioSignal, audiotools.ml = object, ml
    ml.BaseModel = type("BaseModel", (nn.Module,), {"INTERN": [], "EXTERN": []})
    fsq, omegaconf = types.ModuleType("vector_quantize_pytorch"), types.ModuleType("omegaconf")
    fsq.ResidualFSQ = omegaconf.OmegaConf = object
    sys.modules |= {"audiotools": audiotools, "audiotools.ml": ml, "librosa": types.ModuleType("librosa"), "omegaconf": omegaconf,
                    "vector_quantize_pytorch": fsq, "tqdm": types.ModuleType("tqdm")}
    package = Path(importlib.metadata.distribution("boson-multimodal").locate_file("boson_multimodal"))
    sys.path.insert(0, str(package / "audio_processing/descriptaudiocodec"))
    from boson_multimodal.audio_processing import higgs_audio_tokenizer as theirs
    hubert, encoder, decoder = HubertModel(HubertConfig(**HUBERT)), theirs.dac2.Encoder, theirs.dac2.Decoder
    theirs.AutoModel = types.SimpleNamespace(from_pretrained=lambda *_, **__: hubert)
    theirs.dac2 = types.SimpleNamespace(Encoder=lambda width, ratios, dim: encoder(1, ratios, dim),
                                        Decoder=lambda dim, width, ratios: decoder(dim, 32, ratios))
    small_encoder, small_decoder, linear = theirs.Encoder, theirs.Decoder, nn.Linear
    theirs.Encoder = lambda input_channels, encode_channels: small_encoder(input_channels=18, encode_channels=18)
    theirs.Decoder = lambda **_: small_decoder(code_dim=18, output_channels=18, decode_channels=18)
    quantizer = theirs.ResidualVectorQuantizer
    theirs.ResidualVectorQuantizer = lambda dimension, **sizes: quantizer(dimension=28, **sizes)
    sizes = {10 + 768: 28, 768: 18}
    theirs.nn.Linear = lambda inputs, outputs, **options: linear(sizes.get(inputs, inputs), sizes.get(outputs, outputs), **options)
    try:
        tokenizer = theirs.HiggsAudioTokenizer(D=10, target_bandwidths=[0.25, 1], ratios=RATIOS, sample_rate=24000, bins=32, n_q=8,
                                               codebook_dim=6, semantic_techer="hubert_base_general", device="cpu")
    finally:
        nn.Linear = linear
    return tokenizer.eval()


def boson_name(name: str) -> str:
    """transformers' name -> boson's, part by part, apart from the product's own table."""
    first, *rest = name.split(".")
    parts = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
    if first in ("acoustic_encoder", "acoustic_decoder"):
        encodes = first == "acoustic_encoder"
        top = "encoder.block" if encodes else "decoder_2.model"
        if rest[0] != "block":
            return ".".join([top, {"conv1": "0", "snake1": "6", "conv2": "7"}[rest[0]], *rest[1:]])
        inner = f"{top}.{int(rest[1]) + 1}.block"
        if rest[2].startswith("res_unit"):
            return ".".join([inner, str(int(rest[2][-1]) - 1 + (0 if encodes else 2)), "block", str(parts[rest[3]]), *rest[4:]])
        return ".".join([inner, str({"snake1": 3, "conv1": 4}[rest[2]] if encodes else {"snake1": 0, "conv_t1": 1}[rest[2]]), *rest[3:]])
    if first == "quantizer":
        return f"quantizer.vq.layers.{'.'.join(rest[1:])}".replace(".codebook.", "._codebook.")
    if first == "encoder_semantic":
        return name if rest[-2] == "conv2" else f"{name.removesuffix('.' + rest[-1])}.conv.{rest[-1]}"
    return f"{ {'fc': 'fc_prior', 'fc2': 'fc_post2'}.get(first, first) }.{'.'.join(rest)}"


# ---- HuBERT ----

def hubert() -> None:
    """All states of an odd number of samples."""
    from transformers import HubertConfig, HubertModel
    config = HubertConfig(**HUBERT | {"num_hidden_layers": 3, "hidden_size": 24, "num_conv_pos_embeddings": 13}, mask_time_prob=0.0)
    model = scramble(HubertModel(config), 2)
    wav = sound(2, 2113, seed=3)
    with torch.no_grad():
        states = model(wav.float(), output_hidden_states=True).hidden_states
        positional = model.encoder.pos_conv_embed.conv.weight.clone()
    tensors = weights(model) | {"wav": wav, "positional": positional} | {f"states/{n}": x for n, x in enumerate(states)}
    about = {k: getattr(config, k) for k in HUBERT}
    write("hubert", tensors, about, "torch transformers", "hubert")


def fairseq() -> None:
    """fairseq's names, from the table of transformers' converter, which transformers 5 no longer has."""
    import transformers
    converter = Path(transformers.__file__).parent / "models/hubert/convert_hubert_original_pytorch_checkpoint_to_pytorch.py"
    assigned = (node for node in ast.parse(converter.read_text()).body if isinstance(node, ast.Assign))         # it imports fairseq
    MAPPING = next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "MAPPING")
    tensors, metadata = read("hubert")
    write("hubert", tensors, json.loads(metadata["config"]), "torch transformers", "hubert", mapping=json.dumps(MAPPING), **{
        "versions": metadata["versions"], "mapping_command": "python tests/golden/make_higgs_codec.py fairseq"})


# ---- Whisper ----

WHISPER = {"num_mel_bins": 12, "d_model": 18, "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 28,
           "max_source_positions": 23}


def whisper() -> None:
    """Log-mels of large-v3's features, and the encoder whole; with a causal mask as the codec of MOSS-Speech has it."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    extractor = WhisperFeatureExtractor(feature_size=128)
    wavs = [sound(n, seed=n) for n in (4001, 16000)]
    options = {"sampling_rate": 16000, "return_tensors": "pt"}
    tensors = {f"wav/{len(wav)}": wav for wav in wavs}
    for wav in wavs:
        mel = extractor(wav.float().numpy(), **options).input_features[0]
        assert mel[:, 102:].unique().numel() == 1                                   # silence: one value tells it
        tensors[f"mel/{len(wav)}"] = mel[:, :: 1 if len(wav) < 5000 else 7][:, :30].clone()
        tensors[f"floor/{len(wav)}"] = mel[:1, -1].clone()
    config = WhisperConfig(**WHISPER, attn_implementation="eager")
    model = scramble(WhisperEncoder(config), 4)
    features = sound(2, 12, 46, seed=6).float()
    with torch.no_grad():
        tensors |= weights(model) | {"features": features, "states": model(features).last_hidden_state}
        x = F.gelu(F.conv1d(F.pad(features, (2, 0)), model.conv1.weight, model.conv1.bias))
        x = F.gelu(F.conv1d(F.pad(x, (2, 0)), model.conv2.weight, model.conv2.bias, stride=2)).transpose(1, 2)
        x = x + model.embed_positions.weight
        mask = torch.full((23, 23), float("-inf")).triu(1)[None, None]
        for layer in model.layers:
            x = layer(x, mask)
        tensors["states_causal"] = x
    write("whisper", tensors, WHISPER, "torch transformers", "whisper")


def boson_tower() -> None:
    """The optional tower of Higgs Audio with the same weights: pairs averaged before the last norm; whole, and masked."""
    from boson_multimodal.model.higgs_audio.configuration_higgs_audio import HiggsAudioEncoderConfig
    from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioEncoder
    tensors, metadata = read("whisper")
    config = HiggsAudioEncoderConfig(**WHISPER, pad_token_id=0)
    config._attn_implementation = "sdpa"
    model = HiggsAudioEncoder(config).eval()
    model.load_state_dict({k.removeprefix("weights/"): t.float() for k, t in tensors.items() if k.startswith("weights/")})
    lengths = torch.tensor([46, 31])
    keep = torch.arange(23) < ((lengths - 1) // 2 + 1)[:, None]
    with torch.no_grad():
        tensors["states_pooled"] = model(tensors["features"]).last_hidden_state
        tensors["states_masked"] = model(tensors["features"], attention_mask=keep[:, None, None].expand(2, 1, 23, 23)).last_hidden_state
    tensors |= {"lengths": lengths, "counts": model._get_feat_extract_output_lengths(lengths)[1]}
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "boson-multimodal")}
    write("whisper", tensors, WHISPER, "torch transformers", "whisper", **{
        "versions": metadata["versions"], "boson_versions": json.dumps(versions),
        "boson_command": "python tests/golden/make_higgs_codec.py boson_tower"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or sys.exit(__doc__):
        torch.manual_seed(0)
        globals()[case]()
