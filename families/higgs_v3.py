"""Higgs Audio v3 4B by Boson AI: speech from text, in the voice of a recording; Qwen3-4B whose audio heads are its audio embedding.

    text   <|tts|> <|ref_text|> what it says <|ref_audio|>            <|text|> Hello. <|audio|>               read, never predicted
    cb 1                                          r0 r1 .. EOC EOC                     a0 a1 a2 .. EOC EOC    trained
    cb 8                                          BOC BOC .. r0 .. rT                  BOC BOC .. a0 .. aT

Eight codebooks of the tokenizer of v2 at 25 Hz with delays 0..7, as in v2; but no column of begin ids stands before them (bare),
and none in which the last row ends: T frames are T + 7 columns. There is no text head. The first codebook alone ends the speech.
Sources: sgl-project/sglang-omni, models/higgs_tts (prompt, delays, sampler, names of tensors) and vllm-omni, deploy/
higgs_multimodal_qwen3.yaml (sampling), both as of 2026-06; the id of <|audio|> and the count of quantised weights, 3,633,315,840 in
252 matrices, as people published them who read the released files. The official code rounds the tables of RoPE to bf16; ours does not.
The released file also holds the codec, and may hold heads that its inference does not read: they are left out. Next: moshi.py.
"""

from collections.abc import Sequence

from families.family import Closing, Family
from families.formats import About, Format, Tensors, by_model_type, drop_duplicate, llama, require, stack, write_llama
from layers.architecture import ModelConfig, StackConfig
from streams import Example, Grid, Stream, StreamTable, audio_block, codebooks, join, text_block
from text.conversation import Message, Template

TTS, REF_TEXT, REF_AUDIO, TEXT, AUDIO = MARKS = ("<|tts|>", "<|ref_text|>", "<|ref_audio|>", "<|text|>", "<|audio|>")
CODEC = "bosonai/higgs-audio-v2-tokenizer"
AUDIO_ID = 151670                       # of <|audio|> in the released tokenizer


def stream_table(words: int, Q: int = 8, codes: int = 1026, audio_start: int = AUDIO_ID) -> StreamTable:
    """A text row that is only read, and Q delayed codebooks whose last two ids are begin and end of codes."""
    rows = codebooks(Q, codes, codes, codes - 2, codes - 1, range(Q))
    return StreamTable((Stream("text", "text", words), *rows), "higgs-v3", audio_start=audio_start, bare=True)


HIGGS_V3_4B = ModelConfig(
    stream_table(151936), StackConfig(dim=2560, layers=36, heads=32, kv_heads=8, head_dim=128, ffn=9728, norm_eps=1e-6, rope_theta=1e6,
                                      qk_norm=True), audio_tied=True)


# ---- how turns are written ----

def voices(text: str, references: Sequence[str] = (), scene: str = "", in_system: bool = False) -> list[Message]:
    """The turns of a prompt: a reference recording and what it says, then the text."""
    if scene or in_system or len(references) > 1 or any(said.startswith("profile:") for said in references):
        raise ValueError("Higgs Audio v3 takes one recording of a voice; leave --scene, --ref_in=system, profile: and further voices out")
    return [*({"role": "user", "content": [said, {"type": "audio"}]} for said in references), {"role": "assistant", "content": text}]


TEMPLATE = Template("Higgs Audio v3", "{role}", "", "", MARKS, MARKS, begin=TTS, audio_in=REF_AUDIO, audio_out=AUDIO,
                    roles=(("user", REF_TEXT), ("assistant", TEXT)), one_turn=True, clone_prompt=voices)


def grid(example: Example, table: StreamTable) -> Grid:
    """Text is never a target; speech ends with the last code of its last row, whose end id has no column."""
    blocks = [text_block(part, 0.0, table) if part.dim() == 1 else tuple(x[:, :-1] for x in audio_block(part, weight, table))
              for part, weight in example.segments]
    return join(blocks)


# ---- the official layout ----

HEAD, TABLE = "tied.head.modality_heads.0.weight", "tied.embedding.modality_embeddings.0.embedding.weight"
UNREAD = ("tied.embedding.modality_embeddings.0.model.", "tied.head.text_head.")
NAMES = (("embed.text.weight", "tied.embedding.text_embedding.weight"), ("embed.audio.weight", TABLE), ("audio_head.weight", HEAD),
         *stack("temporal.layers", "body.layers"), ("temporal.norm.weight", "body.norm.weight"))
KEY = "audio_start_token_id"            # of our exports only: where the id is not that of the released tokenizer


def tidy(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Without the codec, which audio/ reads from a repository of its own, and without the text head; one copy of tied weights."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNREAD)}
    if config.audio_tied:
        drop_duplicate(kept, TABLE, HEAD)
    return kept


def read(about: About, tensors: Tensors) -> ModelConfig:
    text, codes = about["text_config"], about["audio_encoder_config"]
    require(text, {"model_type": ("qwen3",)})
    require(codes, {"encoder_type": ("discrete",), "use_delay_pattern": (True,), "out_dim": (text["hidden_size"], None)})
    rope = {key: value for key, value in (text.get("rope_parameters") or {}).items() if value is not None}
    if text.get("rope_theta") is None:                                      # the released config says null, and means Qwen3's
        text = {key: value for key, value in text.items() if key != "rope_theta"} | {"rope_parameters": {"rope_theta": 1e6} | rope}
    table = stream_table(text["vocab_size"], codes["num_codebooks"], codes["vocab_size"], about.get(KEY, AUDIO_ID))
    return ModelConfig(table, llama(text, text["num_hidden_layers"], 1e-6, qk_norm=True), audio_tied=codes.get("tie_word_embeddings", True))


def write(c: ModelConfig, dtype: str) -> About:
    text = write_llama(c, c.temporal.layers, dtype) | {"model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 32768}
    codes = {"model_type": "higgs_audio_encoder", "encoder_type": "discrete", "num_codebooks": len(c.table.audio),
             "use_delay_pattern": True, "vocab_size": c.table.streams[1].vocab, "out_dim": c.temporal.dim,
             "tie_word_embeddings": c.audio_tied}
    return {"architectures": ["HiggsMultimodalQwen3ForConditionalGeneration"], "model_type": "higgs_multimodal_qwen3", "torch_dtype": dtype,
            "audio_token_id": -100, "audio_tokenizer_id": CODEC, "sample_rate": 24000, "mel_per_sample": 8,
            "text_config": text, "audio_encoder_config": codes} | ({} if c.table.audio_start == AUDIO_ID else {KEY: c.table.audio_start})


RULES = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_frames": 2048, "closing": "first"}
FAMILIES = (Family(
    "Higgs Audio v3", "higgs-v3", "Higgs Audio v3 4B: speech in the voice of a recording", grid, TEMPLATE, rules=lambda table: RULES,
    companions={"codec": CODEC}, text_to_speech=True, references=1, closings={"first": Closing(grace=2**20, first=True)},
    formats=(Format("Higgs Audio v3", "hf", lambda c: NAMES, read, write, lambda c: c.table.bare and not c.tail and c.depth is None,
                    by_model_type("higgs_multimodal_qwen3"), tidy, shards=True),)),)
