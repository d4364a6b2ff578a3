"""CSM-1B by Sesame: conversational speech from text, in the voices of the turns before. A prefix depth transformer writes codebooks.

    text     <|begin_of_text|> [0] Hello. <|end_of_text|>                                     read, never predicted
    cb 1..32                                               a0 a1 ... aT 0                     trained; a frame of zeros ends it

Every turn is its text, "[speaker]" in front, and its 32 Mimi codebooks at 12.5 Hz, without delays; turns of the past stand
before it. Codebook 0 comes from a head of the temporal transformer, the others from layers/depth.py, which the
official training runs on a sixteenth of the frames. Sources: the released config.json and chat template of sesame/csm-1b;
transformers 5.23 (csm), whose sampling ends a turn when all codebooks but the last are 0.
"""

from collections.abc import Sequence

from families.family import Family
from families.formats import About, Format, Tensors, by_model_type, drop_duplicate, llama, require, stack, write_llama
from layers.architecture import ModelConfig, StackConfig
from streams import Example, Grid, Stream, StreamTable, chat_grid, codebooks
from text.conversation import Message, Template

BEGIN, END, AUDIO, AUDIO_END = "<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>"


def stream_table(words: int, codes: int, Q: int, end: int = 0, audio_start: int = 128001) -> StreamTable:
    """One text row that is only read, Q codebooks of one size, and the id that all of them hold in the last frame."""
    return StreamTable((Stream("text", "text", words), *codebooks(Q, codes, codes, -1, end)), "csm", audio_start=audio_start,
                       joint_end=True)


# CSM-1B: Llama-3.2-1B and a depth transformer; of 2051 ids 2048 are codes. Both llama3 scalings are one, written for two lengths.
CSM_1B = ModelConfig(
    stream_table(128256, 2051, 32),
    StackConfig(dim=2048, layers=16, heads=32, kv_heads=8, ffn=8192, rope_theta=500000.0, rope_scaling=(32.0, 0.125, 0.5, 1024.0)),
    depth=StackConfig(dim=1024, layers=4, heads=8, kv_heads=2, ffn=8192, rope_theta=500000.0, steps=32, prefix=True, projection="linear",
                      rope_scaling=(32.0, 0.001953125, 0.0078125, 16.0)),
    depth_tied=True, depth_share=1 / 16)


# ---- how turns are written ----

def voices(text: str, references: Sequence[str] = (), scene: str = "", in_system: bool = False) -> list[Message]:
    """The turns of a prompt: what each reference recording says, with its speech, then the text that the first voice is to say."""
    if scene or in_system or any(said.startswith("profile:") for said in references):
        raise ValueError("CSM takes recordings of voices only; leave --scene, --ref_in=system and profile: out")
    said = [{"role": str(n) if n else "assistant", "content": [words, {"type": "audio"}]} for n, words in enumerate(references)]
    return [*said, {"role": "assistant", "content": text}]


TEMPLATE = Template("CSM", BEGIN + "[{role}]", "", "", (BEGIN, END), (BEGIN, END, AUDIO, AUDIO_END), audio_in=END, audio_out=END,
                    targets="clone", joint_header=True,
                    roles=(("assistant", "0"), ("user", "1")), one_turn=True, clone_prompt=voices)


def grid(example: Example, table: StreamTable) -> Grid:
    """Turns one behind the other; the text is never a target."""
    tokens, weights = chat_grid(example, table)
    return tokens, weights * (table.column("classes") > 0)


# ---- the layout of transformers ----

DEPTH = "depth_decoder.model"
NAMES = (("embed.text.weight", "embed_text_tokens.weight"),
         ("embed.audio.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight"),
         *stack("temporal.layers", "backbone_model.layers"), ("temporal.norm.weight", "backbone_model.norm.weight"),
         ("audio_head.weight", "lm_head.weight"), *stack("depth.layers", f"{DEPTH}.layers"), ("depth.norm.weight", f"{DEPTH}.norm.weight"),
         ("depth.input.weight", f"{DEPTH}.inputs_embeds_projector.weight"), ("depth.head.weight", "depth_decoder.codebooks_head.weight"))
CODEC = "codec_model."                                   # Mimi's weights, which audio/ reads from their own file
TABLES = ("backbone_model.embed_tokens.embed_audio_tokens.weight", f"{DEPTH}.embed_tokens.weight")
HEADS = "depth_decoder.codebooks_head.weight"           # (Q - 1, d, V) there, (Q - 1, V, d) here


def tidy(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Without the codec, which audio/ reads; one copy of the tables that both transformers share."""
    kept = {n: t.transpose(1, 2) if n == HEADS else t for n, t in tensors.items() if not n.startswith(CODEC)}
    drop_duplicate(kept, *TABLES)
    if TABLES[1] in kept:                               # transformers may store the shared tables under this name alone
        kept[TABLES[0]] = kept.pop(TABLES[1])
    return kept


def untidy(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Undo `tidy`: the depth transformer's name of the shared tables is the one that transformers stores."""
    return {TABLES[1] if n == TABLES[0] else n: t.transpose(1, 2) if n == HEADS else t for n, t in tensors.items()}


def read(about: About, tensors: Tensors) -> ModelConfig:
    deep, Q, codes = about["depth_decoder_config"], about["num_codebooks"], about["vocab_size"]
    require(about, {"tie_codebooks_embeddings": (True,)})
    require(deep, {"num_codebooks": (Q,), "vocab_size": (codes,), "backbone_hidden_size": (about["hidden_size"],)})
    start = about.get("bos_token_id", 128000) + 1       # <|end_of_text|> stands behind <|begin_of_text|> in the released tokenizer
    return ModelConfig(
        stream_table(about["text_vocab_size"], codes, Q, about["codebook_eos_token_id"], start),
        llama(about, about["num_hidden_layers"], 1e-5),
        depth=llama(deep, deep["num_hidden_layers"], 1e-5, steps=Q, prefix=True, projection="linear"), depth_tied=True)


def write(c: ModelConfig, dtype: str) -> About:
    def part(stack: StackConfig, codes: int) -> About:
        fields = write_llama(ModelConfig(c.table, stack, depth=c.depth, depth_tied=True), stack.layers, dtype)
        scaling = fields.pop("rope_scaling") or {"rope_type": "default"}
        return fields | {"rope_parameters": {**scaling, "rope_theta": fields.pop("rope_theta")}, "vocab_size": codes}

    if not c.depth_tied or c.depth is None:
        raise ValueError("transformers has CSM with shared codebook tables only; export --to=multistream")
    codes, Q = c.table.streams[1].vocab, len(c.table.audio)
    deep = part(c.depth, codes) | {"model_type": "csm_depth_decoder_model", "num_codebooks": Q, "backbone_hidden_size": c.temporal.dim,
                                   "max_position_embeddings": Q + 1, "tie_word_embeddings": False}
    return part(c.temporal, codes) | {
        "architectures": ["CsmForConditionalGeneration"], "model_type": "csm", "num_codebooks": Q,
        "text_vocab_size": c.table.streams[0].vocab,
        "codebook_eos_token_id": c.table.streams[1].end, "codebook_pad_token_id": codes - 1, "tie_codebooks_embeddings": True,
        "bos_token_id": c.table.audio_start - 1, "audio_token_id": c.table.audio_start + 1, "audio_eos_token_id": c.table.audio_start + 2,
        "pad_token_id": c.table.audio_start + 1, "max_position_embeddings": 2048, "depth_decoder_config": deep,
        "codec_config": {"model_type": "mimi", "num_quantizers": Q}}


RULES = {"temperature": 0.9, "top_k": 50, "max_frames": 1125}           # the official generator's, 90 s at 12.5 Hz
FAMILIES = (Family(
    "CSM", "csm", "CSM-1B: conversational speech in the voices of the turns before", grid, TEMPLATE, rules=lambda table: RULES,
    companions={"codec": "kyutai/mimi"}, text_to_speech=True, references=99,
    formats=(Format("csm", "hf", lambda c: NAMES, read, write, lambda c: c.table.joint_end and c.depth is not None and c.depth.prefix,
                    by_model_type("csm"), tidy, untidy,
                    stacked=True, peft=True, codec=CODEC, turned=(HEADS,), shared=(TABLES,)),)),)
