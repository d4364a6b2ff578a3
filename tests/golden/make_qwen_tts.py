"""Write the golden files of Qwen3-TTS, its codec and its speaker encoder: tiny random models in their official implementation.

    python tests/golden/make_qwen_tts.py

Needs torch 2.13.0, transformers 4.57.3, librosa, accelerate, einops, and qwen-tts 0.1.1 with --no-deps; what it imports besides
(sox, onnxruntime, torchaudio) is not called here, and replaced by empty modules. The official generator forbids the last
1024 ids of codebook 0 but the end; tiny ones have fewer, so it is told where the codes end. Read by test_qwen_tts.py,
test_qwen_codec.py and test_ecapa.py.
"""

import builtins
import json
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path

import torch
import transformers  # noqa: F401
from make import draw, scramble
from safetensors.torch import save_file
from torch import nn

for name in ("sox", "onnxruntime", "torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = ModuleSpec(name, None)             # others look for them
from qwen_tts.core.models import modeling_qwen3_tts as official  # noqa: E402
from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSConfig  # noqa: E402

HERE = Path(__file__).parent


def save(name: str, model: nn.Module, config: dict, **tensors: torch.Tensor) -> None:
    weights = {f"weights/{k}": t.detach().clone().contiguous() for k, t in model.state_dict().items()}
    about = {"config": json.dumps(config, default=str), "command": "python tests/golden/make_qwen_tts.py",
             "versions": json.dumps({p: version(p) for p in ("torch", "transformers", "qwen-tts")})}
    save_file(weights | {k: t.contiguous() for k, t in tensors.items()}, HERE / f"{name}.safetensors", metadata={"format": "pt"} | about)
    print(f"{name}: {(HERE / f'{name}.safetensors').stat().st_size} bytes")


def stack(D: int, heads: int, kv: int, head: int, ffn: int, layers: int) -> dict:
    return {"hidden_size": D, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "head_dim": head, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 512}


@torch.no_grad()
def talker(name: str, seed: int, D: int, d: int, Q: int, codes: int, head: int, heads: int) -> None:
    """Logits and losses of a known utterance, and greedy frames behind prompts of every kind."""
    first = codes + 15
    config = Qwen3TTSConfig(
        tokenizer_type="qwen3_tts_tokenizer_12hz", tts_model_size="0b6", tts_model_type="custom_voice", im_start_token_id=50,
        im_end_token_id=51, tts_pad_token_id=52, tts_bos_token_id=53, tts_eos_token_id=54, talker_config=stack(
            D, heads, 1, head, 40, 3) | {
            "rope_scaling": {"interleaved": True, "mrope_section": [head // 2 - 2, 1, 1], "rope_type": "default"},
            "vocab_size": first, "text_vocab_size": 60, "text_hidden_size": 18, "num_code_groups": Q, "codec_pad_id": codes,
            "codec_bos_id": codes + 1, "codec_eos_token_id": codes + 2, "codec_think_id": codes + 3, "codec_nothink_id": codes + 4,
            "codec_think_bos_id": codes + 5, "codec_think_eos_id": codes + 6,
            "codec_language_id": {"english": codes + 7, "chinese": codes + 8, "beijing_dialect": codes + 9},
            "spk_id": {"dylan": codes + 11, "vivian": codes + 12}, "spk_is_dialect": {"dylan": "beijing_dialect", "vivian": False},
            "code_predictor_config": stack(d, 2, 1, 8, 36, 2) | {"vocab_size": codes, "num_code_groups": Q}})
    official.range = lambda *ends: builtins.range(codes, first) if ends == (first - 1024, first) else builtins.range(*ends)
    model = scramble(official.Qwen3TTSForConditionalGeneration(config), seed, 1.6)
    model.talker.codec_head.weight[codes + 2] *= 1.5                              # so that greedy frames end
    text, ref_text, instruct = (draw(45, n, seed=seed + n) for n in (6, 4, 3))
    frames, ref = draw(codes, 7, Q, seed=seed + 3), draw(codes, 3, Q, seed=seed + 4)
    vector = model.talker.model.codec_embedding.weight[codes + 13]
    role, tail = torch.tensor([50, 48, 47]), torch.tensor([51, 47, 50, 48, 47])
    asked = torch.cat([role, text, tail])[None]
    clone = {"ref_code": [ref], "ref_spk_embedding": [vector], "x_vector_only_mode": [False], "icl_mode": [True]}
    prompts, kept = {}, {}
    generate = model.talker.generate
    model.talker.generate = lambda **options: (kept.update(options), generate(**options))[1]
    greedy = {"do_sample": False, "subtalker_dosample": False, "max_new_tokens": 25}
    kinds = {
        "named": {"languages": ["english"], "speakers": ["vivian"], "non_streaming_mode": True},
        "dialect": {"languages": ["auto"], "speakers": ["dylan"], "non_streaming_mode": True, "repetition_penalty": 1.0},
        "streaming": {"languages": ["auto"], "non_streaming_mode": False},
        "cloned": {"languages": ["auto"], "voice_clone_prompt": clone, "ref_ids": [torch.cat([role, ref_text, tail[:2]])[None]],
                   "non_streaming_mode": True},
        "cloned_streaming": {"languages": ["chinese"], "voice_clone_prompt": clone,
                             "ref_ids": [torch.cat([role, ref_text, tail[:2]])[None]], "non_streaming_mode": False},
        "told": {"languages": ["auto"], "instruct_ids": [torch.cat([torch.tensor([50, 46, 47]), instruct, tail[:2]])[None]],
                 "non_streaming_mode": True}}
    for kind, options in kinds.items():
        got, _ = model.generate(input_ids=[asked], **greedy | options)
        prompts[f"greedy_{kind}"] = got[0]
        print(f"  {kind}: {len(got[0])} frames, first codebook {got[0][:, 0].tolist()}")
        if kind == "named":
            opening, pad = kept["inputs_embeds"], kept["tts_pad_embed"]
    books = [model.talker.get_input_embeddings(), *model.talker.code_predictor.get_input_embeddings()]
    spoken = sum(book(frames[:, k]) for k, book in enumerate(books))[None] + pad
    whole, n = torch.cat([opening, spoken], 1), opening.shape[1]
    h = model.talker.model(inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2])).last_hidden_state
    logits, behind, eos = model.talker.codec_head(h)[0, n - 1 :], h[0, n - 1 : -1], torch.tensor([codes + 2])
    rest, late = model.talker.forward_sub_talker_finetune(frames, behind)
    leaked, _ = model.talker.forward_sub_talker_finetune(frames, h[0, n:])
    target = torch.cat([frames[:, 0], eos])
    entropy = nn.functional.cross_entropy
    right = torch.stack([entropy(logits, target), entropy(rest.flatten(0, 1), frames[:, 1:].flatten())])
    wrong = torch.stack([entropy(logits[:-1], target[1:]), entropy(leaked.flatten(0, 1), frames[:, 1:].flatten()), late])
    print(f"{name}: losses {right.tolist()}, of the faulty script {wrong.tolist()}")
    save(name, model, json.loads(config.to_json_string(use_diff=False)), text=text, ref_text=ref_text, instruct=instruct,
         frames=frames, ref=ref, first=logits, rest=rest, losses=right, wrong=wrong, **prompts)


@torch.no_grad()
def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Every number of a codec or a speaker encoder drawn again, in half precision; codebooks are as wide as what they quantise."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(p.shape, generator=g)
        if name.endswith(("initialized", "inv_freq")) or not p.is_floating_point() or not p.dim():
            continue
        if name.endswith("cluster_usage"):
            noise = 0.5 + noise.abs()
            noise[3] = 1e-6                                     # an entry that won nothing
        elif name.endswith(("embed_sum", "embedding_sum")):
            noise *= 2.0
            noise[3] *= 1e-5
        elif name.endswith(("scale", "gamma")):
            noise = 0.5 + 0.3 * noise
        elif name.endswith(("alpha", "beta")):
            noise *= 0.3
        elif "norm" in name:
            noise = (0 if name.endswith("bias") else 1) + 0.3 * noise
        else:
            gain = 3 if "input_proj" in name else 0.3 if name.startswith("decoder.decoder.6") else 1.2 if "encoder" in name else 0.8
            noise *= 0.1 if name.endswith("bias") else gain * (p.numel() / p.shape[0]) ** -0.5
        p.copy_(noise.half())
    return model.eval()


def sound(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (0.3 * torch.sin(torch.arange(n) * 0.07) + 0.1 * torch.randn(n, generator=g)).half().float()


@torch.no_grad()
def codec() -> None:
    """Codes of sounds of many lengths, and the sound of codes; weights and sounds are stored in half precision."""
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model
    first = {"model_type": "mimi", "hidden_size": 12, "num_filters": 2, "num_hidden_layers": 2, "num_attention_heads": 2,
             "sliding_window": 5, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 8, "codebook_size": 16,
             "codebook_dim": 4, "num_quantizers": 6, "vector_quantization_hidden_dimension": 4, "upsample_groups": 12}
    second = {"codebook_size": 16, "codebook_dim": 8, "latent_dim": 10, "hidden_size": 6, "num_attention_heads": 3,
              "num_key_value_heads": 3, "head_dim": 4, "sliding_window": 7, "intermediate_size": 9,
              "num_hidden_layers": 2, "num_quantizers": 4, "decoder_dim": 32}
    config = Qwen3TTSTokenizerV2Config(first, second, encoder_valid_num_quantizers=4)
    model = redrawn(Qwen3TTSTokenizerV2Model(config), 0)
    kept: dict[str, torch.Tensor] = {}
    for n in (1, 1919, 1920, 1921, 5000, 19200):
        wav = sound(n, n)[None]
        kept[f"codes_{n}"] = model.encode(wav, torch.ones_like(wav, dtype=torch.long)).audio_codes[0].T
    codes = draw(16, 1, 10, 4, seed=1)
    kept |= {"codes": codes[0].T, "wav": model.decode(codes).audio_values[0]}
    print(f"qwen_codec: {len(set(kept['codes_19200'].flatten().tolist()))} codes in use, |wav| {kept['wav'].abs().mean():.2f}")
    state = {name: t if name.endswith("initialized") else t.half() for name, t in model.state_dict().items()}
    bare = nn.Module()
    bare.state_dict = lambda: state
    save("qwen_codec", bare, json.loads(config.to_json_string(use_diff=False)), **kept)


@torch.no_grad()
def speaker() -> None:
    """The vector of a recording, in half precision as above."""
    sizes = {"enc_dim": 24, "enc_channels": [8, 8, 8, 16], "enc_kernel_sizes": [5, 3, 3, 1], "enc_dilations": [1, 2, 3, 1],
             "enc_attention_channels": 6, "enc_res2net_scale": 4, "enc_se_channels": 5}
    config = official.Qwen3TTSSpeakerEncoderConfig(**sizes)
    model, wav = redrawn(official.Qwen3TTSSpeakerEncoder(config), 3), sound(9000, 5)
    how = {"n_fft": 1024, "num_mels": 128, "sampling_rate": 24000, "hop_size": 256, "win_size": 1024, "fmin": 0, "fmax": 12000}
    mel = official.mel_spectrogram(wav[None], **how)
    bare = nn.Module()
    bare.state_dict = lambda: {f"speaker_encoder.{name}": t.half() for name, t in model.state_dict().items()}
    save("qwen_speaker", bare, {"speaker_encoder_config": sizes}, wav=wav.half(), vector=model(mel.transpose(1, 2))[0])


if __name__ == "__main__":
    codec()
    speaker()
    talker("qwen_tts", 0, 24, 16, 5, 21, 8, 3)
    talker("qwen_tts_even", 5, 20, 20, 3, 17, 10, 2)
