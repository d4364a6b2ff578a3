"""Write the golden files: tiny random models in their official implementation, its inputs and what it answers.

    python tests/golden/make.py qwen2 qwen2_tied qwen3 qwen_peft higgs moshi moshi_steps moss moss_talk     (environment A)
    python tests/golden/make.py boson_list boson_forward                                          (environment B)

A: torch 2.13.0, transformers 5.23.0, peft 0.21.2, and moshi 0.2.13 with --no-deps plus einops sentencepiece sphn.
B: torch 2.13.0, transformers 4.46.3, and boson-multimodal 0.1.1 with --no-deps plus loguru dacite.
The shapes are odd on purpose (3 heads over 1, heads of 6, 5 codebooks): what only works for powers of two shows here.
Every parameter is drawn again, norms and biases too, since default ones hide faults. A file holds `weights/NAME` in
official names, inputs and outputs; its metadata holds the config.json, versions and command. Read by test_parity.py.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

os.environ |= {"NO_TORCH_COMPILE": "1", "NO_CUDA_GRAPH": "1", "HF_HUB_OFFLINE": "1"}       # moshi reads them on import

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "peft", "moshi", "boson-multimodal")


def write(name: str, model: nn.Module, config: dict, packages: str, **tensors: Tensor) -> None:
    """Save a case; `packages` names what computed it."""
    seen: dict[int, str] = {}
    weights = {}
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:       # a tied head is stored once, as official files do
            seen[tensor.data_ptr()] = key
            weights[f"weights/{key}"] = tensor.detach().clone().contiguous()
    versions = {p: importlib.metadata.version(p) for p in PACKAGES if p in packages.split()}
    save_file(weights | {k: v.contiguous() for k, v in tensors.items()}, HERE / f"{name}.safetensors", metadata={
        "format": "pt", "config": json.dumps(config, default=str), "versions": json.dumps(versions),
        "command": f"python tests/golden/make.py {name}"})
    print(f"{name}: {(HERE / f'{name}.safetensors').stat().st_size} bytes, {versions}")


@torch.no_grad()
def scramble(model: nn.Module, seed: int, gain: float = 1.2) -> nn.Module:
    """Draw every parameter: matrices gain / sqrt(fan_in) wide, norms around 1, biases around 0."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name or name.endswith("alpha"):
            p.copy_(1 + 0.3 * noise)
        else:
            p.copy_(noise * (0.3 if name.endswith("bias") else 0.3 if "emb" in name else gain * p.shape[-1] ** -0.5))
    return model.eval()


def draw(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- Qwen ----

def qwen_case(name: str, model: nn.Module, config: dict, packages: str = "torch transformers", **extra: Tensor) -> None:
    """Whole prompts, a left-padded batch and greedy continuations."""
    ids = draw(config["vocab_size"] - 2, 2, 19, seed=1)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)[:, 19:]
    print(f"{name}: greedy {tokens.tolist()}, |logits| up to {plain.abs().max():.1f}")
    write(name, getattr(model, "bare", model), config, packages, ids=ids, mask=mask, logits=plain, padded_logits=padded, tokens=tokens,
          **extra)


def qwen(kind: str, **options: object) -> tuple[nn.Module, dict]:
    import transformers
    config = getattr(transformers, f"{kind}Config")(
        **{"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "use_sliding_window": False, "attn_implementation": "eager"} | options)
    model = scramble(getattr(transformers, f"{kind}ForCausalLM")(config), 0)
    return model, json.loads(config.to_json_string(use_diff=False)) | {"architectures": [f"{kind}ForCausalLM"]}


QWEN2 = {"vocab_size": 67, "hidden_size": 18, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3,
         "num_key_value_heads": 1, "rope_theta": 1e6, "tie_word_embeddings": False, "eos_token_id": 65}


def qwen2() -> None:
    qwen_case("qwen2", *qwen("Qwen2", **QWEN2))


def qwen2_tied() -> None:
    changes = {"vocab_size": 51, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
               "eos_token_id": [49, 50]}
    qwen_case("qwen2_tied", *qwen("Qwen2", **QWEN2 | changes))


def qwen3() -> None:
    qwen_case("qwen3", *qwen(
        "Qwen3", vocab_size=59, hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        head_dim=6, rope_theta=1e6, tie_word_embeddings=False, attention_bias=False, eos_token_id=57))


def qwen_peft() -> None:
    """An adapter with ranks and alphas of its own in places, DoRA, rsLoRA and a fully trained head."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    base, config = qwen("Qwen2", **QWEN2)
    kept = {k: v.clone() for k, v in base.state_dict().items()}
    lora = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.05, target_modules=["q_proj", "v_proj", "gate_proj"], use_dora=True, use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.0.mlp.gate_proj": 7}, modules_to_save=["lm_head"],
        task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    model.eval()
    adapter = {f"adapter/{k}": v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}
    about = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.to_dict().items()}
    model.bare = nn.Module()
    for key, value in kept.items():
        model.bare.register_buffer(key.replace(".", "/"), value)
    model.bare.state_dict = lambda: kept
    qwen_case("qwen_peft", model, config | {"adapter": about}, "torch transformers peft", **adapter)


# ---- CSM ----

def csm_model(seed: int, D: int, d: int, Q: int, V: int, heads: int, codec_width: int = 32, **more: object) -> nn.Module:
    from transformers import CsmConfig, CsmForConditionalGeneration
    llama3 = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0}
    deep = {"num_codebooks": Q, "backbone_hidden_size": D, "vocab_size": V, "hidden_size": d, "intermediate_size": 36,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 33,
            "rope_parameters": llama3 | {
                "low_freq_factor": 0.001953125, "high_freq_factor": 0.0078125, "original_max_position_embeddings": 16}}
    codec = {"model_type": "mimi", "hidden_size": codec_width, "num_filters": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 8, "codebook_size": 8, "codebook_dim": 4, "num_quantizers": Q,
             "vector_quantization_hidden_dimension": 4, "upsample_groups": codec_width}
    ids = {"text_vocab_size": 60, "bos_token_id": 40, "audio_token_id": 42, "audio_eos_token_id": 43, "pad_token_id": 42}
    config = CsmConfig(
        num_codebooks=Q, vocab_size=V, hidden_size=D, intermediate_size=52, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=1,
        codebook_pad_token_id=V - 1, depth_decoder_config=deep, codec_config=codec, rope_parameters=llama3 | {
            "low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}, **(ids | more))
    model = scramble(CsmForConditionalGeneration(config), seed)
    model.tie_weights()
    return model


def csm_case(name: str, seed: int, D: int, d: int, Q: int, V: int, heads: int, **more: object) -> None:
    """A prompt of text and frames: logits of every codebook, both losses, and greedy frames behind the text."""
    model = csm_model(seed, D, d, Q, V, heads, **more)
    text = torch.cat([torch.tensor([[40]]), draw(40, 1, 4, seed=seed + 1), torch.tensor([[41]])], 1)
    frames = draw(V - 3, 1, 7, Q, seed=seed + 2)
    with torch.no_grad():
        embedded = torch.cat([model.embed_text_tokens(text), model.backbone_model.embed_tokens(frames)], 1)
        h = model.backbone_model(inputs_embeds=embedded).last_hidden_state
        first = model.lm_head(h)[:, 5:-1]                                                   # predicts frames 0..6
        codes = torch.nn.functional.pad(frames[0, :, : Q - 1], (1, 0))
        rest = model.depth_decoder(input_ids=codes, backbone_last_hidden_state=h[0, 5:-1]).logits
        labels = torch.full((1, 13, Q), -100)
        labels[0, 6:] = frames
        loss = model(inputs_embeds=embedded, labels=labels)
        greedy = model.generate(input_ids=text, max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False)
    bare = nn.Module()
    bare.state_dict = lambda: {k: v for k, v in model.state_dict().items() if not k.startswith("codec_model.")}
    print(f"{name}: greedy {greedy.tolist()}, |logits| up to {first.abs().max():.1f} and {rest.abs().max():.1f}")
    write(name, bare, json.loads(model.config.to_json_string(use_diff=False)), "torch transformers", text=text, frames=frames, first=first,
          rest=rest, losses=torch.stack([loss.backbone_loss, loss.depth_decoder_loss]), greedy=greedy)


def csm() -> None:
    csm_case("csm", 0, 24, 16, 5, 21, 4)


def csm_wide() -> None:
    csm_case("csm_wide", 3, 30, 20, 3, 17, 3, head_dim=10)


# ---- Orpheus ----

def orpheus_case(name: str, seed: int, words: int, Q: int, V: int, spare: int, **more: object) -> None:
    """A prompt and two frames of codes, learnt by heart: logits behind every id, and what greedy generation says to its end."""
    from transformers import LlamaConfig, LlamaForCausalLM
    first = words + 10
    config = LlamaConfig(
        vocab_size=first + Q * V + spare, intermediate_size=52, num_hidden_layers=2, eos_token_id=words + 2, bos_token_id=1,
        max_position_embeddings=256, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}, **more)
    model = scramble(LlamaForCausalLM(config), seed, gain=1.0)
    model.tie_weights()
    codes = draw(V, 2, Q, seed=seed + 1) + first + V * torch.arange(Q)
    prompt = torch.tensor([words + 3, 1, *draw(words, 6, seed=seed).tolist(), words - 1, words + 4, words + 5, words + 1])
    ids = torch.cat([prompt, codes.flatten(), torch.tensor([words + 2])])[None]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        model(input_ids=ids, labels=torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)).loss.backward()
        optimiser.step()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        other, said = draw(words, 1, 9, seed=seed + 6), []
        for begun, penalty in ((prompt[None], 1.0), (other, 1.3)):
            made = model.generate(input_ids=begun, attention_mask=torch.ones_like(begun), max_new_tokens=24, do_sample=False,
                                  pad_token_id=0, repetition_penalty=penalty)
            said.append(made[:, begun.shape[1] :])
        said, penalised = said
    print(f"{name}: greedy {said.tolist()}, penalised {penalised.tolist()}, |logits| up to {logits.abs().max():.1f}")
    about = json.loads(config.to_json_string(use_diff=False)) | {"speech_tokens": [first, Q, V], "architectures": ["LlamaForCausalLM"]}
    write(name, model, about, "torch transformers", ids=ids, prompt=prompt[None], logits=logits, said=said, codes=codes,
          other=other, penalised=penalised)


def orpheus() -> None:
    orpheus_case("orpheus", 0, 29, 7, 5, 2, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
                 tie_word_embeddings=True)


def orpheus_wide() -> None:
    orpheus_case("orpheus_wide", 4, 37, 9, 3, 1, hidden_size=30, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=False)


# ---- Higgs Audio v3 ----

def higgs_v3_case(name: str, seed: int, words: int, Q: int, V: int, T: int, **more: object) -> None:
    """A prompt with a reference and a few frames, learnt by heart by transformers' Qwen3 on summed embeddings: logits behind every
    column, and the columns of greedy generation as the official sampler makes them: the first codebook decides when it ends."""
    from transformers import Qwen3Config, Qwen3Model
    config = Qwen3Config(vocab_size=words, intermediate_size=44, num_hidden_layers=2, num_key_value_heads=1, rope_theta=1e6,
                         max_position_embeddings=128, rms_norm_eps=1e-6, attn_implementation="eager", **more)
    body = scramble(Qwen3Model(config), seed)
    tied = nn.Embedding(Q * V, config.hidden_size)
    scramble(tied, seed + 1)
    begin, end = V - 2, V - 1

    def delayed(frames: Tensor) -> Tensor:                                                  # (T, Q) -> (T + Q - 1, Q)
        rows = torch.full((len(frames) + Q - 1, Q), end)
        for k in range(Q):
            rows[:k, k], rows[k : k + len(frames), k] = begin, frames[:, k]
        return rows

    def embedded(parts: list[Tensor]) -> Tensor:
        return torch.cat([body.embed_tokens(p) if p.dim() == 1 else tied(p + V * torch.arange(Q)).sum(1) for p in parts])[None]

    def heads(x: Tensor) -> Tensor:                                                         # (1, S, D) -> (S, Q, V)
        return (body(inputs_embeds=x).last_hidden_state[0] @ tied.weight.T).view(-1, Q, V)

    said, text = draw(words - 6, 4, seed=seed), draw(words - 6, 5, seed=seed + 1)
    reference, frames = draw(V - 2, T - 1, Q, seed=seed + 2), draw(V - 2, T, Q, seed=seed + 3)
    tts, ref_text, ref_audio, begins, audio = range(words - 5, words)
    prompt = [torch.tensor([tts, ref_text, *said.tolist(), ref_audio]), delayed(reference), torch.tensor([begins, *text.tolist(), audio])]
    columns = delayed(frames)
    optimiser = torch.optim.Adam([*body.parameters(), *tied.parameters()], 1e-2)
    for _ in range(90):
        optimiser.zero_grad()
        logits = heads(embedded([*prompt, columns]))[-len(columns) - 1 : -1]
        held = torch.arange(len(columns))[:, None] < torch.arange(Q)                        # begin ids are written, not drawn
        nn.functional.cross_entropy(logits.flatten(0, 1), columns.masked_fill(held, -100).flatten()).backward()
        optimiser.step()
    with torch.no_grad():
        logits, made = heads(embedded([*prompt, columns])), columns[:0]
        over = 10**9
        while len(made) < min(over + Q - 1, 40):
            new = heads(embedded([*prompt, made]))[-1].argmax(-1)
            new[len(made) + 1 :] = begin
            over = min(over, len(made)) if new[0] == end and len(made) >= Q else over
            made = torch.cat([made, new[None]])
    print(f"{name}: {over} frames in {made.tolist()}, |logits| up to {logits.abs().max():.1f}")
    both = nn.Module()
    both.state_dict = lambda: {
        "tied.embedding.text_embedding.weight": body.embed_tokens.weight,
        "tied.embedding.modality_embeddings.0.embedding.weight": tied.weight,
        "tied.embedding.modality_embeddings.0.model.fc.weight": torch.ones(2, 2),           # of the codec that lies in the file
    } | {f"body.{key}": value for key, value in body.state_dict().items() if not key.startswith("embed_tokens")}
    about = {"architectures": ["HiggsMultimodalQwen3ForConditionalGeneration"], "model_type": "higgs_multimodal_qwen3",
             "audio_token_id": -100, "text_config": json.loads(config.to_json_string(use_diff=False)), "audio_start_token_id": audio,
             "audio_encoder_config": {"encoder_type": "discrete", "num_codebooks": Q, "vocab_size": V, "out_dim": config.hidden_size,
                                      "tie_word_embeddings": True, "use_delay_pattern": True, "model_type": "higgs_audio_encoder"}}
    grid = torch.full((1 + Q, sum(map(len, prompt)) + len(columns)), -1)
    at = 0
    for part in [*prompt, columns]:
        grid[slice(0, 1) if part.dim() == 1 else slice(1, None), at : at + len(part)] = part if part.dim() == 1 else part.T
        at += len(part)
    write(name, both, about, "torch transformers", grid=grid, prompt=torch.tensor([sum(map(len, prompt))]), logits=logits.transpose(0, 1),
          made=made.T, frames=torch.stack([made[k : k + over, k] for k in range(Q)]))


def higgs_v3() -> None:
    higgs_v3_case("higgs_v3", 0, 41, 5, 13, 6, hidden_size=20, num_attention_heads=3, head_dim=6)


def higgs_v3_wide() -> None:
    higgs_v3_case("higgs_v3_wide", 7, 53, 3, 9, 9, hidden_size=30, num_attention_heads=2, head_dim=10)


# ---- Higgs Audio v2 ----

def higgs() -> None:
    """Two left-padded prompts with an earlier clip each: text and audio logits, and greedy columns through EOS."""
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
    K, C = 5, 14                                    # 12 codes, start 12, end 13
    config = HiggsAudioV2Config(
        vocab_size=64, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=6,
        max_position_embeddings=4096, num_codebooks=K, codebook_size=C, audio_token_id=50, audio_bos_token_id=51, audio_delay_token_id=52,
        audio_stream_bos_id=12, audio_stream_eos_id=13, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32})
    model = scramble(HiggsAudioV2ForConditionalGeneration(config, use_text_head=True), 3)
    with torch.no_grad():
        ends = model.audio_lm_head.weight.view(K, C, -1)[:, 13]         # the first codebook ends the clip, in a while
        ends *= torch.tensor([1.2, 0.3, 0.3, 0.3, 0.3])[:, None]
    lengths, L = (11, 9), 11
    ids, mask = torch.zeros(2, 26, dtype=torch.long), torch.zeros(2, 26, dtype=torch.long)
    audio, audio_mask = torch.full((2, L, K), 13), torch.zeros(2, L, dtype=torch.bool)
    for b, n in enumerate(lengths):                 # text, clip, text, start of audio; left-padded
        row = torch.cat([draw(48, 6, seed=b) + 2, torch.full((n - K + 1,), 50), torch.full((K - 1,), 52), draw(48, 7, seed=b + 5) + 2,
                         torch.tensor([51])])
        ids[b, -len(row) :], mask[b, -len(row) :] = row, 1
        audio[b, :n], audio_mask[b, :n] = draw(14, n, K, seed=b + 9), True
    given = {"input_ids": ids, "attention_mask": mask, "audio_input_ids": audio, "audio_input_ids_mask": audio_mask}
    with torch.no_grad():
        h = model.model(**given).last_hidden_state
        columns = model.generate(**given, max_new_tokens=60, do_sample=False)[:, L:]
    print(f"higgs: greedy {columns[0, :, 0].tolist()} {columns[1, :, 0].tolist()}")
    about = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["HiggsAudioV2ForConditionalGeneration"]}
    write("higgs", model, about, "torch transformers", ids=ids, mask=mask, audio=audio, audio_mask=audio_mask, columns=columns,
          text_logits=model.text_lm_head(h), audio_logits=model.audio_lm_head(h).unflatten(-1, (K, C)))


def boson(name: str, kind: str, layers: list[int]) -> None:
    """The first release: dual layers only where listed; with fast-forward the others pass audio by."""
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
    K = 3
    text = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "eos_token_id": 2}
    config = HiggsAudioConfig(
        text_config=dict(text), audio_adapter_type=kind, audio_dual_ffn_layers=layers, audio_num_codebooks=K, audio_codebook_size=16,
        audio_stream_bos_id=16, audio_stream_eos_id=17, audio_in_token_idx=49, audio_out_token_idx=50, audio_out_bos_token_id=51,
        audio_eos_token_id=53, pad_token_id=0, encode_whisper_embed=False, skip_audio_tower=True,
        encode_audio_in_tokens=True, use_delay_pattern=True)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    config.hidden_size = 18
    model = scramble(HiggsAudioModel(config), 5)
    reference, answer = draw(18, K, 6, seed=1), draw(18, K, 8, seed=2)                  # delayed columns already
    words = [draw(46, n, seed=n) + 2 for n in (5, 4, 3)]
    ids = torch.cat([words[0], torch.tensor([49]), words[1], torch.tensor([51, 50]), words[2]])[None]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), audio_in_ids=reference, audio_in_ids_start=torch.tensor([0]),
                    audio_out_ids=answer, audio_out_ids_start=torch.tensor([0]), label_ids=ids)
    length = ids.shape[1] - 2 + reference.shape[1] + answer.shape[1]          # the model pads to a multiple of 8, on the left
    about = json.loads(config.to_json_string(use_diff=False)) | {"text_config": text, "architectures": ["HiggsAudioModel"]}
    write(name, model, about, "torch transformers boson-multimodal", ids=ids, audio_in=reference, audio_out=answer,
          text_logits=out.logits[:, -length:], audio_logits=out.audio_logits.view(-1, K, 18))


def boson_list() -> None:
    boson("boson_list", "dual_ffn", [0, 2])


def boson_forward() -> None:
    boson("boson_forward", "dual_ffn_fast_forward", [1])


# ---- Moshi ----

MOSHI = {"dim": 24, "text_card": 30, "existing_text_padding_id": 3, "n_q": 5, "dep_q": 3, "card": 11, "num_heads": 3, "num_layers": 2,
         "hidden_scale": 4.125, "causal": True, "layer_scale": None, "context": 5, "max_period": 10000, "gating": "silu",
         "norm": "rms_norm_f32", "positional_embedding": "rope",
         "depformer_dim": 18, "depformer_dim_feedforward": 74, "depformer_num_heads": 3,
         "depformer_num_layers": 2, "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": 8,
         "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none", "depformer_weights_per_step": True,
         "delays": [0, 0, 1, 1, 0, 1]}


def moshi_case(name: str, kwargs: dict) -> None:
    """Teacher-forced logits over a window shorter than the sequence, and greedy frames of the streaming generator."""
    from moshi.models import LMGen
    from moshi.models.lm import LMModel
    model = scramble(LMModel(device="cpu", dtype=torch.float32, **kwargs), 21, gain=1.0)
    K, users = kwargs["n_q"] + 1, kwargs["n_q"] - kwargs["dep_q"]
    codes = draw(kwargs["card"], 2, K, 13, seed=7)
    codes[:, 0] = draw(kwargs["text_card"], 2, 13, seed=8)
    codes[0, 0, 4], codes[1, 2, 5], codes[1, 4, 3] = -1, -1, -1         # "nothing here": zero as input, no target
    user = draw(kwargs["card"], 2, users, 12, seed=9)
    with torch.no_grad():
        out = model(codes)
        generator, frames = LMGen(model, use_sampling=False), []
        with generator.streaming(2):
            for t in range(user.shape[-1]):
                frame = generator.step(user[:, :, t : t + 1])
                frames += [] if frame is None else [frame]
    about = kwargs | {"model_type": "moshi", "lora": False}
    write(name, model, about, "torch moshi", codes=codes, user=user, frames=torch.cat(frames, -1), mask=out.mask,
          logits=out.logits.nan_to_num(0.0), text_logits=out.text_logits[:, 0], text_mask=out.text_mask[:, 0])


def moshi() -> None:
    moshi_case("moshi", MOSHI)


def moshi_steps() -> None:
    """Some depth steps share their weights."""
    moshi_case("moshi_steps", MOSHI | {"depformer_weights_per_step_schedule": [0, 1, 1], "num_heads": 2, "context": 7, "max_period": 1e5})


# ---- MOSS-Speech ----

MOSS = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6,
        "max_position_embeddings": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def moss_pair(shared: int, tail: int, text_vocab: int, audio_vocab: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """No package of it exists; two Qwen3 that share their first layers are what its modeling file computes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    text, audio = (scramble(Qwen3ForCausalLM(Qwen3Config(
        vocab_size=v, num_hidden_layers=shared + tail, attn_implementation="eager", **MOSS)), seed + v) for v in (text_vocab, audio_vocab))
    audio.model.layers[:shared].load_state_dict(text.model.layers[:shared].state_dict())
    return text, audio


def moss_logits(text: nn.Module, audio: nn.Module, rows: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Both heads behind every column of rows (2, S)."""
    is_audio = rows[0] == pad
    words = text.model.embed_tokens(rows[0].masked_fill(is_audio, 0))
    x = torch.where(is_audio[:, None], audio.model.embed_tokens(rows[1]), words)[None]
    return text(inputs_embeds=x).logits, audio(inputs_embeds=x).logits


def write_moss(name: str, text: nn.Module, audio: nn.Module, shared: int, ids: dict[str, int | list[int]], **tensors: Tensor) -> None:
    weights = {"model.embed_tokens.weight": text.model.embed_tokens.weight, "model.audio_embed.weight": audio.model.embed_tokens.weight}
    for side, model in (("text", text), ("audio", audio)):
        weights |= {f"model.{side}_norm.weight": model.model.norm.weight, f"{side}_lm_head.weight": model.lm_head.weight}
        for key, p in model.model.layers.named_parameters():
            n, _, rest = key.partition(".")
            own = int(n) - shared
            weights[f"model.shared_block.layers.{n}.{rest}" if own < 0 else f"model.{side}_block.layers.{own}.{rest}"] = p
    layers = text.config.num_hidden_layers
    about = {"architectures": ["MossSpeechForCausalLM"], "model_type": "moss_speech", **MOSS, "num_hidden_layers": layers,
             "hidden_act": "silu", "attention_bias": False, "vocab_size": text.config.vocab_size,
             "audio_vocab_size": audio.config.vocab_size,
             "num_shared_layers": shared, "num_modality_layers": layers - shared, "channels": 2, **ids}
    holder = nn.Module()
    holder.state_dict = lambda: {k: v.detach() for k, v in weights.items()}
    write(name, holder, about, "torch transformers", **tensors)


@torch.no_grad()
def moss() -> None:
    pad, begin = 47, 44
    text, audio = moss_pair(2, 1, 48, 30, 31)
    rows = torch.stack([draw(40, 17, seed=1), draw(30, 17, seed=2)])                     # text row, audio row
    rows[0, 6:12], rows[0, 5] = pad, begin
    text_logits, audio_logits = moss_logits(text, audio, rows, pad)
    ids = {"modality_pad_token_id": pad, "sosp_token_id": begin, "eosp_token_id": 20, "eos_token_id": [45]}
    write_moss("moss", text, audio, 2, ids, rows=rows, text_logits=text_logits, audio_logits=audio_logits)


PAD, BEGIN, END, FILLER, STOP = 111, 100, 64, 5, 101


def moss_prompt(seed: int, speech: bool) -> Tensor:
    """Text, a recording, the head of a reply, and the mark that opens speech where it is wanted."""
    words, codes = draw(100, 4 + seed % 7, seed=seed), draw(64, 3 + seed % 5, seed=seed + 1000)
    head = torch.tensor([7, 8, *[BEGIN] * speech])
    text = torch.cat([words, torch.tensor([BEGIN]), torch.full((len(codes) + 1,), PAD), head])
    heard = torch.cat([codes, torch.tensor([END])])
    return torch.stack([text, torch.cat([torch.full((len(words) + 1,), FILLER), heard, torch.full_like(head, FILLER)])])


def moss_reply(text: nn.Module, audio: nn.Module, rows: Tensor, early: int, most: int = 40) -> Tensor:
    """Its state machine row by row, every step computed from the first row on: nothing ends in the first `early` steps."""
    speaking = False
    for n in range(most):
        speaking = bool(rows[0, -1] == BEGIN) if not speaking else bool(rows[1, -1] != END)
        said, spoken = (logits[0, -1] for logits in moss_logits(text, audio, rows, PAD))
        spoken[END + 1 :] = -torch.inf
        if n < early:
            spoken[END] = said[STOP] = -torch.inf
        new = torch.stack([torch.tensor(PAD) if speaking else said.argmax(), spoken.argmax()])
        rows = torch.cat([rows, new[:, None]], 1)
        if new[0] == STOP:
            break
    return rows


@torch.no_grad()
def moss_talk() -> None:
    """Replies that go through both modes and end; heads are scaled so that some do."""
    text, audio = moss_pair(2, 2, 120, 80, 7)
    text.lm_head.weight[[BEGIN, STOP]] *= torch.tensor([2.5, 1.8])[:, None]
    audio.lm_head.weight[END] *= 1.8
    cases, wanted, seed = {}, ["text", "text", "text", "speech", "speech", "speech", "early", "early"], 0
    while len(cases) < 2 * len(wanted):
        seed += 1
        n = len(cases) // 2
        prompt = moss_prompt(seed, wanted[n] != "text")
        made = moss_reply(text, audio, prompt, 9 * (wanted[n] == "early"))[:, prompt.shape[1] :]
        spoken = int((made[0] == PAD).sum())
        if made[0, -1] == STOP and 2 < spoken < made.shape[1] - 1:
            cases |= {f"{n}-{wanted[n]}/prompt": prompt, f"{n}-{wanted[n]}/made": made}
    print({name: made.shape[1] for name, made in cases.items() if name.endswith("made")}, "of", seed, "prompts")
    write_moss("moss_talk", text, audio, 2, {"modality_pad_token_id": PAD, "sosp_token_id": BEGIN, "eosp_token_id": END,
                                             "eos_token_id": [STOP]}, **cases)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or sys.exit(__doc__):
        torch.manual_seed(0)                    # for what a package draws on its own
        globals()[case]()
