"""Write the golden files of Moshi's relatives: what Hibiki, the recogniser and the speaking model add to it.

    python tests/golden/make_moshi.py hibiki stt tts voices moshi_guided moshi_lora moshi_hf

Environment A of make.py, which tells the rest.

hibiki  a condition chosen from a table and added to every column; greedy frames with it and with guidance by it
stt     every audio row is read, the text is predicted, small heads beside it
tts     two text rows in one (id = left + (right + 1) * rows), tables of low rank, a weight schedule, two conditions
voices  the speaking model's other half: cross-attention to features of speakers, guided by leaving them and the conditions out
moshi_guided  plain Moshi with guidance by a past without text, and by one whose first frames are hidden; holes in the user's rows
moshi_hf  the names of transformers
moshi_lora  an adapter file as moshi-finetune writes it (on the weights of moshi.safetensors), then with trained embeddings
"""

import copy
import json
import sys

import torch
from make import MOSHI, draw, scramble, write
from moshi.conditioners import ConditionAttributes, TensorCondition
from moshi.models import LMGen
from moshi.models.lm import LMModel
from moshi.models.loaders import get_condition_fuser, get_conditioner_provider
from moshi.modules.lora import replace_all_linear_with_lora, replace_lora_with_linear
from torch import Tensor, nn

HIBIKI = MOSHI | {"n_q": 6, "delays": [0, 0, 2, 2, 0, 2, 2], "max_period": 100000.0, "context": 9, "num_heads": 2,
                  "conditioners": {"description": {"type": "lut", "lut": {
                      "n_bins": 7, "dim": 5, "tokenizer": "noop", "possible_values": ["very_bad", "bad", "neutral", "good", "very_good"]}}},
                  "fuser": {"sum": ["description"], "prepend": [], "cross": [], "cross_attention_pos_emb": False,
                            "cross_attention_pos_emb_scale": 1}}
STT = MOSHI | {"n_q": 5, "dep_q": 0, "delays": [0] * 6, "context": 7, "max_period": 100000.0, "extra_heads_num_heads": 4}
TTS = MOSHI | {"n_q": 4, "dep_q": 4, "delays": [0, 0, 2, 2, 2], "depformer_low_rank_embeddings": 7, "demux_second_stream": True,
               "depformer_weights_per_step_schedule": [0, 1, 2, 2], "depformer_dim_feedforward": [50, 50, 50], "text_card_out": 5,
               "conditioners": {"control": {"type": "lut", "lut": {"n_bins": 1, "dim": 24, "tokenizer": "noop", "possible_values": ["ok"]}},
                                "cfg": {"type": "lut", "lut": {"n_bins": 3, "dim": 6, "tokenizer": "noop"}}},
               "fuser": {"sum": ["control", "cfg"], "prepend": [], "cross": []}}


VOICES = MOSHI | {"n_q": 3, "delays": [0, 0, 2, 2], "depformer_num_layers": 1, "cross_attention": True, "conditioners": {
    "speaker_wavs": {"type": "tensor", "tensor": {"dim": 7}},
    "control": {"type": "lut", "lut": {"n_bins": 1, "dim": 4, "tokenizer": "noop", "possible_values": ["ok"]}}},
    "fuser": {"sum": ["control"], "prepend": [], "cross": ["speaker_wavs"], "cross_attention_pos_emb": True,
              "cross_attention_pos_emb_scale": 0.7}}


def build(config: dict, seed: int) -> LMModel:
    """The package's model of a config.json, as its loader builds it."""
    kwargs = copy.deepcopy(config)                 # its builders write into it
    if "conditioners" in kwargs:
        provider = get_conditioner_provider(kwargs["dim"], "cpu", kwargs)
        kwargs.pop("conditioners")
        kwargs |= {"condition_provider": provider, "fuser": get_condition_fuser(kwargs)}
    if "demux_second_stream" in kwargs:
        kwargs["demux_second_text_stream"] = kwargs.pop("demux_second_stream")
    return scramble(LMModel(device="cpu", dtype=torch.float32, **kwargs), seed, gain=1.0)


def conditions(model: LMModel, *chosen: dict[str, str | None]) -> dict:
    return model.condition_provider.prepare_and_provide([ConditionAttributes(text=c) for c in chosen])


@torch.no_grad()
def frames(model: LMModel, user: Tensor, **options: object) -> Tensor:
    """Greedy frames of the streaming generator.   user (B, Q, T)"""
    generator, found = LMGen(model, use_sampling=False, **options), []
    with generator.streaming(len(user)):
        for t in range(user.shape[-1]):
            frame = generator.step(user[:, :, t : t + 1])
            found += [] if frame is None else [frame]
    return torch.cat(found, -1)


def codes(config: dict, T: int = 13) -> Tensor:
    found = draw(config["card"], 2, config["n_q"] + 1, T, seed=7)
    found[:, 0] = draw(config["text_card"], 2, T, seed=8)
    found[0, 0, 4], found[1, 2, 5] = -1, -1
    return found


def logits(out: object) -> dict[str, Tensor]:
    return {"mask": out.mask, "logits": out.logits.nan_to_num(0.0), "text_logits": out.text_logits[:, 0], "text_mask": out.text_mask[:, 0]}


@torch.no_grad()
def hibiki() -> None:
    model, given = build(HIBIKI, 31), codes(HIBIKI)
    good, bad, none = ({"description": value} for value in ("very_good", "bad", None))
    out = model(given, conditions(model, good, none))
    user = draw(HIBIKI["card"], 2, 3, 14, seed=9)
    write("hibiki", model, HIBIKI | {"model_type": "hibiki"}, "torch moshi", codes=given, user=user, **logits(out),
          frames=frames(model, user, condition_tensors=conditions(model, good, bad)),
          guided=frames(model, user, condition_tensors=conditions(model, good, bad, none, none), cfg_coef=2.5))


@torch.no_grad()
def stt() -> None:
    """The package's teacher-forced forward pass wants a depth transformer; its halves do not."""
    model, given = build(STT, 33), codes(STT)
    start = model._get_initial_token().expand(2, -1, -1)
    h, text = model.forward_text(torch.cat([start, given[..., :-1]], -1))
    extra = torch.stack([head(h).softmax(-1) for head in model.extra_heads], 1)
    user = draw(STT["card"], 2, 5, 14, seed=9)
    write("stt", model, STT | {"model_type": "stt"}, "torch moshi", codes=given, text_logits=text[:, 0], extra=extra, user=user,
          frames=frames(model, user))


@torch.no_grad()
def tts() -> None:
    model, given = build(TTS, 35), codes(TTS)
    given[:, 0] = torch.where(given[:, 0] < 0, -1, given[:, 0] + (draw(6, 2, 13, seed=11) * 5) * 31)     # right: none or 4, 9, ...
    said, other = {"control": "ok", "cfg": "2.0"}, {"control": None, "cfg": "1.0"}
    out = model(given, conditions(model, said, other))
    ahead = draw(30, 2, 12, seed=12)
    count = iter(range(12))

    def look(token: Tensor) -> None:
        token += (ahead[:, next(count)] + 1) * 31

    user = torch.empty(2, 0, 12, dtype=torch.long)
    found = frames(model, user, condition_tensors=conditions(model, said, other), on_text_hook=look)
    write("tts", model, TTS | {"model_type": "tts"}, "torch moshi", codes=given, ahead=ahead, frames=found, **logits(out))


@torch.no_grad()
def voices() -> None:
    model, given = build(VOICES, 41), codes(VOICES)
    features = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(42))

    def told(*known: bool) -> dict:
        return model.condition_provider.prepare_and_provide([
            ConditionAttributes(text={"control": "ok" if yes else None}, tensor={"speaker_wavs": TensorCondition(
                features[n % 2 : n % 2 + 1], torch.full((1, 5), yes))}) for n, yes in enumerate(known)])

    user, out = torch.empty(2, 0, 12, dtype=torch.long), model(given, told(True, True))
    write("voices", model, VOICES | {"model_type": "tts"}, "torch moshi", codes=given, features=features, **logits(out),
          frames=frames(model, user, condition_tensors=told(True, True)),
          guided=frames(model, user, condition_tensors=told(True, True, False, False), cfg_coef=2.0))


@torch.no_grad()
def moshi_guided() -> None:
    model = build(MOSHI, 37)
    user = draw(MOSHI["card"], 2, 2, 14, seed=9)
    user[0, 1, 3], user[1, :, 6:9] = -1, -1
    write("moshi_guided", model, MOSHI | {"model_type": "moshi"}, "torch moshi", user=user, plain=frames(model, user),
          no_text=frames(model, user, cfg_coef=3.0, cfg_is_no_text=True),
          masked=frames(model, user, cfg_coef=2.0, cfg_is_masked_until=[3, 5]))


@torch.no_grad()
def moshi_lora() -> None:
    """Pairs for every Linear, random B; logits unfused and fused, and with the embeddings that ft_embed trains beside them."""
    model = scramble(LMModel(device="cpu", dtype=torch.float32, **MOSHI), 21, gain=1.0)
    replace_all_linear_with_lora(model, 3, 1.5, device="cpu")
    g = torch.Generator().manual_seed(40)
    for name, p in sorted(model.named_parameters()):
        if "lora" in name:
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    given, found = draw(MOSHI["card"], 2, 6, 13, seed=7), {}
    plain = model(given)
    user = draw(MOSHI["card"], 2, 2, 12, seed=9)
    spoken = frames(model, user)
    for name, p in sorted(model.named_parameters()):
        if "emb" in name:
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    trained = {k: v.clone() for k, v in model.state_dict().items() if "lora" in k or "emb" in k}
    embedded = model(given)
    replace_lora_with_linear(model)
    fused = model(given)
    for name, out in (("", plain), ("embedded_", embedded), ("fused_", fused)):
        found |= {name + key: value for key, value in logits(out).items() if "logits" in key or not name}
    holder = nn.Module()
    holder.state_dict = lambda: trained
    about = MOSHI | {"model_type": "moshi", "lora": True, "lora_rank": 3, "lora_scaling": 1.5}
    write("moshi_lora", holder, about, "torch moshi", codes=given, user=user, frames=spoken, **found)


@torch.no_grad()
def moshi_hf() -> None:
    """Both decoders of transformers' class, over columns that are delayed already; its codec is left out.

    That class never applies its sliding_window, and is causal over the depth steps with sdpa only.
    """
    from transformers import MoshiConfig, MoshiForConditionalGeneration
    mimi = {"model_type": "mimi", "hidden_size": 16, "num_filters": 2, "codebook_size": 16, "codebook_dim": 4, "num_quantizers": 3,
            "vector_quantization_hidden_dimension": 4, "upsample_groups": 16, "num_hidden_layers": 1, "intermediate_size": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
    config = MoshiConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, head_dim=8, ffn_dim=34, audio_vocab_size=13,
        num_codebooks=3, sliding_window=64, max_position_embeddings=64, audio_encoder_config=mimi, depth_decoder_config={
            "hidden_size": 18, "num_hidden_layers": 1, "num_attention_heads": 3, "head_dim": 6, "ffn_dim": 26, "sliding_window": 3,
            "max_position_embeddings": 4}, attn_implementation="sdpa")
    model = scramble(MoshiForConditionalGeneration(config), 43, gain=1.0)
    columns = torch.cat([draw(30, 2, 1, 12, seed=1), draw(13, 2, 6, 12, seed=2)], 1)
    columns[..., 0] = torch.tensor([30, *[13] * 6])
    read, said = columns[..., :-1], columns[:, :3, 1:]                               # what is read; the text and codes of the next column
    out = model(input_ids=read[:, 0], moshi_audio_codes=read[:, 1:4], user_audio_codes=read[:, 4:])
    h = out.last_hidden_state.flatten(0, 1)[:, None]
    codes = model.depth_decoder(last_hidden_state=h, input_ids=said.transpose(1, 2).flatten(0, 1)).logits
    holder = nn.Module()
    holder.state_dict = lambda: {k: v for k, v in model.state_dict().items() if not k.startswith("audio_encoder.")}
    about = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["MoshiForConditionalGeneration"]}
    write("moshi_hf", holder, about, "torch transformers", columns=columns, text_logits=out.logits, logits=codes.unflatten(0, (2, 11)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or sys.exit(__doc__):
        torch.manual_seed(0)
        globals()[case]()
