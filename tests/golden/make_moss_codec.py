"""Write the golden files of audio/moss.py and audio/hift.py: tiny random models in their published implementation.

    python tests/golden/make_moss_codec.py OpenMOSS-MOSS-Speech/ Matcha-TTS/ speech_tokenizer/

The three are folders of other people's code: OpenMOSS/MOSS-Speech (its cosyvoice package), shivammehta25/Matcha-TTS, and
the Whisper-VQ encoder of GLM-4-Voice as made causal for MOSS-Speech (alpacaking/MOSS-Speech-decoder-cosy, GLM_modules).
Beside them torch 2.13.0, transformers 5.23.0, diffusers 0.35.1, einops, librosa, omegaconf, conformer, and torchaudio 2.11.0 without
its compiled library.  What those folders import and nothing here calls is replaced by empty modules.
Weights are drawn as in make_higgs_codec.py, and so are the sounds.  Read by test_moss_codec.py.
"""

import sys
import types
from pathlib import Path

import torch
from make_higgs_codec import scramble, sound, weights, write
from torch import nn

PACKAGES, COMMAND = "torch transformers torchaudio", "MOSS-Speech/ Matcha-TTS/ speech_tokenizer/"
MELS, CHUNK, VOICED = 80, 5, 3
ENCODER = dict(d_model=16, encoder_attention_heads=2, encoder_ffn_dim=24, encoder_layers=4, num_mel_bins=9, max_source_positions=1500,
               pooling_kernel_size=4, pooling_position=2, pooling_type="avg", quantize_position=2, quantize_vocab_size=37,
               quantize_encoder_only=True, encoder_causal_attention=True, encoder_causal_convolution=True, quantize_causal_encoder=True,
               quantize_causal_block_size=200,
               activation_function="gelu", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0)
LENGTHS = (1920, 1921, 5000, 14403)


def replace_modules(glm: str) -> None:
    """Stand-ins for what the packages import on the way: the language model, its server, a configuration library."""
    stubs = {"cosyvoice.llm.llm": ("TransformerLM", "Qwen2LM"), "cosyvoice.cli.model": ("CosyVoiceModel", "CosyVoice2Model"),
             "matcha.utils": (), "matcha.utils.pylogger": ("get_pylogger",)}
    for name, attributes in stubs.items():
        module = sys.modules[name] = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {"__init__": lambda self, *_: None}))
    sys.modules["matcha.utils"].__path__ = [str(Path(sys.argv[2]) / "matcha" / "utils")]
    sys.path[:0] = [*sys.argv[1:3], glm]


def encoder() -> None:
    """Codes of odd lengths at 24 kHz, of two clips, and of 31 s at 16 kHz."""
    from configuration_whisper import WhisperVQConfig
    from modeling_whisper import WhisperVQEncoder
    from transformers import WhisperFeatureExtractor
    from utils import extract_speech_token
    config = WhisperVQConfig(**ENCODER, attn_implementation="sdpa")
    model = scramble(WhisperVQEncoder(config), 1, {"conv1": 3.0, "fc2": 2.0, "v_proj": 2.0})
    features = WhisperFeatureExtractor(feature_size=ENCODER["num_mel_bins"])
    wav = sound(2, max(LENGTHS), seed=3).float()
    long = sound(1, 31 * 16000, seed=4).float()
    with torch.no_grad():
        caught = []
        hook = model.pooling_layer.register_forward_hook(lambda module, args, out: caught.append(out.transpose(1, 2)))
        extract_speech_token(model, features, [(long, 16000), *((row[None], 24000) for row in wav)])
        states, pooled = caught[0].flatten(0, 1)[:375], caught[0][2:, :8]
        hook.remove()
        chosen = torch.randperm(375, generator=torch.Generator().manual_seed(5))[:33]
        model.codebook.weight.copy_(torch.cat([states[chosen], pooled[0, 1:3], pooled[1, 5:7]]).half())      # entries where states are
        tensors = weights(model, ("embed_positions2", "ema_"))
        for n in LENGTHS:
            codes = extract_speech_token(model, features, [(row[None, :n], 24000) for row in wav])
            tensors[f"codes/{n}"] = torch.tensor(codes, dtype=torch.uint8)
        tensors["codes/long"] = torch.tensor(extract_speech_token(model, features, [(long, 16000)]), dtype=torch.uint8)
    tensors |= {"wav": wav.half(), "pooled": pooled}
    print({key: (tuple(t.shape), int(t.unique().numel())) for key, t in tensors.items() if key.startswith("codes")})
    write("moss_encoder", tensors, ENCODER | {"model_type": "whisper"}, PACKAGES, COMMAND)


def flow() -> nn.Module:
    from cosyvoice.flow.decoder import CausalConditionalDecoder
    from cosyvoice.flow.flow import CausalMaskedDiffWithXvec
    from cosyvoice.flow.flow_matching import CausalConditionalCFM
    from cosyvoice.transformer.upsample_encoder import PreLookaheadLayer, Upsample1D, UpsampleConformerEncoder
    estimator = CausalConditionalDecoder(
        in_channels=4 * MELS, out_channels=MELS, channels=[8], dropout=0.0, attention_head_dim=64, n_blocks=2, num_mid_blocks=1,
        num_heads=2, act_fn="gelu", static_chunk_size=4 * CHUNK, num_decoding_left_chunks=-1)
    cfm = types.SimpleNamespace(sigma_min=1e-6, solver="euler", t_scheduler="cosine", training_cfg_rate=0.2, inference_cfg_rate=0.7)
    decoder = CausalConditionalCFM(in_channels=3 * MELS, n_spks=1, spk_emb_dim=MELS, cfm_params=cfm, estimator=estimator)
    conformer = UpsampleConformerEncoder(
        input_size=12, output_size=12, attention_heads=2, linear_units=22, num_blocks=2, input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet", selfattention_layer_type="rel_selfattn", upsample_stride=4, use_cnn_module=False,
        macaron_style=False, static_chunk_size=CHUNK)
    conformer.pre_lookahead_layer = PreLookaheadLayer(12, 3)            # both are 512 wide whatever one asks for
    conformer.up_layer = Upsample1D(12, 12, 4)
    model = CausalMaskedDiffWithXvec(
        input_size=12, output_size=MELS, spk_embed_dim=MELS, vocab_size=45, input_frame_rate=12.5, token_mel_ratio=4,
        pre_lookahead_len=3, encoder=conformer, decoder=decoder)
    return scramble(model, 2, {"final_proj": 2.0, "pos_bias": 4.0})


def hift() -> nn.Module:
    from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
    from cosyvoice.hifigan.generator import HiFTGenerator
    model = HiFTGenerator(
        in_channels=MELS, base_channels=16, nb_harmonics=8, sampling_rate=24000, nsf_alpha=0.1, nsf_sigma=0.003, nsf_voiced_threshold=10,
        upsample_rates=[8, 5, 3], upsample_kernel_sizes=[16, 11, 7], istft_params={"n_fft": 16, "hop_len": 4},
        resblock_kernel_sizes=[3, 7, 11], resblock_dilation_sizes=[[1, 3, 5]] * 3, source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3, lrelu_slope=0.1, audio_limit=0.99,
        f0_predictor=ConvRNNF0Predictor(num_class=1, in_channels=MELS, cond_channels=6))
    scramble(model, 3, {"l_linear": 6.0})
    with torch.no_grad():
        model.f0_predictor.classifier.weight.mul_(HERTZ).copy_(model.f0_predictor.classifier.weight.half())
        for module in (model.conv_post, *model.resblocks, *model.source_resblocks):
            for name, p in module.named_parameters():
                if name.endswith("original0"):
                    p.mul_(0.5).copy_(p.half())
    return model


HERTZ = 300


def decoder() -> None:
    """Mels with full and with chunked attention, of a prefix that looks 3 codes ahead, the source, sound, a voice's features."""
    import torchaudio.compliance.kaldi as kaldi
    from matcha.utils.audio import mel_spectrogram
    model, vocoder = flow(), hift()
    g = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 37, (1, 16), generator=g)
    voice = {"codes": torch.randint(0, 37, (1, VOICED), generator=g), "mel": torch.randn(1, 4 * VOICED, MELS, generator=g).half().float(),
             "speaker": torch.randn(1, MELS, generator=g).half().float()}

    def mel(count: int, streaming: bool, finalize: bool) -> torch.Tensor:
        sizes = [torch.tensor([n], dtype=torch.int32) for n in (count, VOICED, 4 * VOICED)]
        return model.inference(codes[:, :count], sizes[0], voice["codes"], sizes[1], voice["mel"], sizes[2], voice["speaker"],
                               streaming=streaming, finalize=finalize)[0]
    tensors = {f"weights/flow.{k.removeprefix('weights/')}": t for k, t in weights(model).items()}
    tensors |= {f"weights/hift.{k.removeprefix('weights/')}": t for k, t in weights(vocoder).items()}
    tensors |= {f"voice/{k}": t for k, t in voice.items()} | {"codes": codes}
    with torch.no_grad():
        tensors |= {"mel_full": mel(16, False, True)[:, ::7], "mel_chunks": mel(16, True, True)[:, ::7],
                    "mel_prefix": mel(15, True, False)[:, ::7]}
        spoken = torch.randn(1, MELS, 9, generator=g).half().float()
        drawn = torch.cat([torch.randn(9, 480, generator=torch.Generator().manual_seed(n)) for n in range(9)], 1)
        torch.randn_like = lambda x: drawn.T[None] if x.shape == (1, 4320, 9) else torch.zeros_like(x)
        wav, source = vocoder.inference(spoken)
        tensors |= {"hift/mel": spoken, "hift/f0": vocoder.f0_predictor(spoken), "hift/source": source[0], "hift/wav": wav}
    clip = sound(1, 24000, seed=7).float()
    tensors["voice_mel"] = mel_spectrogram(clip, 1920, MELS, 24000, 480, 1920, 0, 8000)[0].T[::5]
    tensors["fbank"] = kaldi.fbank(clip[:, :8000], num_mel_bins=80, dither=0, sample_frequency=16000)[::5]
    tensors["voice_clip"] = clip.half()          # normal numbers and sines are rounded by the processor: another one draws another clip
    mine = {key: t for key, t in tensors.items() if "hift" in key or key in ("voice_mel", "fbank", "voice_clip")}
    print(f"f0 {tensors['hift/f0']}; |wav| {wav.abs().mean():.3f} to {wav.abs().max():.3f}; |mel| {tensors['mel_full'].abs().mean():.3f}")
    print(f"chunks differ from full by {(tensors['mel_full'] - tensors['mel_chunks']).abs().max():.3f}")
    write("moss_flow", {key: t for key, t in tensors.items() if key not in mine}, {}, PACKAGES, COMMAND)
    write("moss_hift", mine, {}, PACKAGES, COMMAND)


if __name__ == "__main__":
    replace_modules(sys.argv[3])
    encoder()
    decoder()
