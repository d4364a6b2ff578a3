"""Write tests/golden/higgs_chat.safetensors: what boson-multimodal makes of conversations, and how it ends speech.

    python tests/golden/make_higgs_chat.py          (environment B of make.py)

For each conversation below: its ids, labels, delayed codes and audio labels out of `prepare_chatml_sample` and
`HiggsAudioSampleCollator`. Then a tiny random model, prompts, and the columns that its greedy `generate` drew: the start
columns, delays and ends are its own. Read by test_conversation.py and test_higgs.py; the tokenizer is assets/tiny_tokenizer.json.
"""

import json
import sys
import types

import torch
from make import HERE, draw, scramble, write
from tokenizers import Tokenizer

K, CODES = 4, 16                                # start 16, end 17
RECORDING = {"type": "audio", "audio_url": "a.wav"}


def turn(role: str, *content: object, **more: object) -> dict:
    return {"role": role, "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content), **more}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


QUIET = "Generate audio following instruction.\n\n<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|>"
# (messages, start_index, frames of each recording in reading order)
CONVERSATIONS = [
    ([turn("system", QUIET), turn("user", "the voice"), turn("assistant", RECORDING), turn("user", "say this."),
      turn("assistant", RECORDING)], 4, [2, 3]),
    ([turn("system", "Generate audio following instruction."), turn("user", "مرحبا بكم"), turn("assistant", RECORDING)], None, [5]),
    ([turn("system", text("Generate audio following instruction.\n\n<|scene_desc_start|>\nSPEAKER0: "), RECORDING,
           text("\n<|scene_desc_end|>")), turn("user", "one  two "), turn("assistant", RECORDING)], None, [1, 4]),
    ([turn("user", "[SPEAKER0] ya"), turn("assistant", RECORDING), turn("user", "[SPEAKER1] no"), turn("assistant", RECORDING),
      turn("user", "[SPEAKER0] a\n[SPEAKER1] b"), turn("assistant", RECORDING)], 5, [2, 1, 3]),
    ([turn("user", text("listen"), RECORDING), turn("assistant", text("I heard it."), RECORDING),
      turn("assistant", "Bye", recipient="user"), turn("user", "more"), turn("assistant", "no.")], None, [3, 2]),
    ([turn("user", "x"), turn("assistant", text("first"), RECORDING), turn("user", "y"), turn("assistant", text("second"), RECORDING)], 2,
     [1, 2])]


class Tokens:
    """The two names that boson uses of a tokenizer."""

    def __init__(self) -> None:
        self.found = Tokenizer.from_file(str(HERE.parents[1] / "assets" / "tiny_tokenizer.json"))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.found.encode(text, add_special_tokens=add_special_tokens).ids


def collated() -> dict[str, torch.Tensor]:
    """librosa and pandas are imported by the package and not used on this way: empty modules stand in for them."""
    import dacite
    sys.modules |= {name: types.ModuleType(name) for name in ("librosa", "pandas")}
    from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
    from boson_multimodal.data_types import ChatMLSample
    from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
    tokens, out = Tokens(), {}
    audio, audio_out = (tokens.encode(name)[0] for name in ("<|AUDIO|>", "<|AUDIO_OUT|>"))
    collate = HiggsAudioSampleCollator(None, audio, audio_out, 0, 16, 17, round_to=1, encode_whisper_embed=False,
                                       return_audio_in_tokens=True, audio_num_codebooks=K, use_delay_pattern=True)
    for n, (messages, start, frames) in enumerate(CONVERSATIONS):
        sample = dacite.from_dict(ChatMLSample, {"messages": messages, "start_index": start}, dacite.Config(strict=True, check_types=True))
        ids, labels, contents, _ = prepare_chatml_sample(sample, tokens)
        assert len(contents) == len(frames), (n, len(contents))
        codes = [draw(CODES, K, T, seed=10 * n + i) for i, T in enumerate(frames)]
        starts = torch.tensor([0, *frames[:-1]]).cumsum(0)
        batch = collate([ChatMLDatasetSample(
            input_ids=torch.tensor(ids), label_ids=torch.tensor(labels), audio_ids_concat=torch.cat(codes, 1), audio_ids_start=starts,
            audio_label_ids_concat=torch.cat(codes, 1), audio_waveforms_concat=torch.zeros(0), audio_waveforms_start=torch.zeros(0),
            audio_sample_rate=torch.zeros(0), audio_speaker_indices=torch.zeros(0))])
        recordings = [f"audio_{side}_ids{end}" for side in ("in", "out") for end in ("", "_start")]
        for name in ("input_ids", "label_ids", "label_audio_ids", *recordings):
            value = getattr(batch, name)
            if value is not None and value.numel():
                out[f"{n}/{name}"] = value.long()
        out[f"{n}/codes"] = torch.cat(codes, 1)
    return out


def generated() -> tuple[torch.nn.Module, dict, dict[str, torch.Tensor]]:
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
    from transformers import GenerationConfig
    one = {name: Tokens().encode(name)[0] for name in ("<|AUDIO|>", "<|AUDIO_OUT|>", "<|audio_out_bos|>", "<|audio_eos|>", "<|eot_id|>")}
    text = {
        "model_type": "llama", "vocab_size": 288, "hidden_size": 18, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                 "original_max_position_embeddings": 8192},
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "eos_token_id": one["<|eot_id|>"]}
    config = HiggsAudioConfig(
        text_config=dict(text), audio_adapter_type="dual_ffn_fast_forward", audio_dual_ffn_layers=[0, 1], audio_num_codebooks=K,
        audio_codebook_size=CODES, audio_stream_bos_id=16, audio_stream_eos_id=17, audio_in_token_idx=one["<|AUDIO|>"],
        audio_out_token_idx=one["<|AUDIO_OUT|>"], audio_out_bos_token_id=one["<|audio_out_bos|>"], audio_eos_token_id=one["<|audio_eos|>"],
        pad_token_id=0, encode_whisper_embed=False, skip_audio_tower=True, encode_audio_in_tokens=True, use_delay_pattern=True)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    config.hidden_size = 18
    model = scramble(HiggsAudioModel(config), 9, gain=1.6)
    with torch.no_grad():                       # text behind the speech may not bring placeholders: boson has no clip for them
        model.audio_decoder_proj.text_lm_head.weight[256:] *= (torch.arange(256, 288) == one["<|eot_id|>"])[:, None]
        ends = model.audio_decoder_proj.audio_lm_head.weight.view(K, CODES + 2, -1)[:, 17]
        ends *= torch.tensor([0.6, 1.3, 1.0, 1.0])[:, None]                 # so that each codebook is the one that ends somewhere
    out = {}
    settings = GenerationConfig(do_sample=False, max_new_tokens=40, pad_token_id=0, eos_token_id=one["<|eot_id|>"])
    settings.generation_kwargs = {}
    model.generation_config = settings
    for n in range(32):                         # a text, a delayed clip, a text, the start of speech
        first, second, clip = draw(250, 4 + n % 3, seed=n), draw(250, 3, seed=n + 50), draw(18, K, 5 + n % 4, seed=n + 90)
        ids = torch.cat([first, torch.tensor([one["<|audio_out_bos|>"], one["<|AUDIO_OUT|>"], one["<|audio_eos|>"]]), second,
                         torch.tensor([one["<|audio_out_bos|>"]])])[None]
        with torch.no_grad():
            _, clips = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), audio_out_ids=clip, audio_out_ids_start=torch.tensor([0]),
                audio_in_ids=None, audio_in_ids_start=None, use_cache=True, do_sample=False, max_new_tokens=40)
        columns = clips[0]
        first = (columns == 17).any(0).nonzero()[0].item()
        print(f"prompt {n}: codebook {K - columns.shape[1] + first} ended it in column {first}")
        out |= {f"prompt{n}/ids": ids[0], f"prompt{n}/clip": clip, f"prompt{n}/columns": columns.long().contiguous()}
    about = json.loads(config.to_json_string(use_diff=False)) | {"text_config": text, "architectures": ["HiggsAudioModel"]}
    return model, about, out


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, about, columns = generated()
    about |= {"conversations": [(messages, start) for messages, start, _ in CONVERSATIONS]}
    write("higgs_chat", model, about, "torch transformers boson-multimodal", **columns, **collated())
