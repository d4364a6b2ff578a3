"""Orpheus 3B by Canopy Labs: speech from text; a Llama whose vocabulary holds the codes.

    text   <3> <|begin_of_text|> tara: Hello. <|eot_id|> <4> <5> <1>   c0 c1a c2a c2b c1b c2c c2d  c0 ...  <2>  <6>

<n> is <custom_token_n>, id 128256 + n: 3 and 4 enclose what a human says, 5 and 6 what the model says, 1 and 2 speech. There is no
audio row: code c of place k in a frame of seven is the id 128266 + 4096 k + c (StreamTable.flat), in the order of audio/snac.py,
83 ids a second. Everything from the text on is trained, as in the official recipe, except the <6> behind the end.
A fine-tuned voice is named before the text ("tara: Hello."): --scene=tara, or "scene" of a row. The pretrained model takes turns of
text and speech before the prompt as voices.
Sources: canopyai/Orpheus-TTS, commit 835ac7c (engine_class.py: prompt and sampling; decoder.py: ids; finetune/: the recipe); its issue
200 (vocabulary of 156940: two spare ids behind the codes); Llama-3.2-3B's config.json. Next: qwen.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from families.family import Family
from families.formats import About, Format, Tensors, drop_buffers, ids, llama, write_llama
from families.qwen import NAMES
from layers.architecture import ModelConfig, StackConfig
from streams import Stream, StreamTable, chat_grid
from text.conversation import Message, Template

SPECIAL, SPARE = 10, 2              # ids before the codes: <custom_token_0> to <custom_token_9>; ids behind them
MARK = "<custom_token_{}>"
BEGIN, SAID = "<|begin_of_text|>", "<|eot_id|>"
END_OF_SPEECH = 2


def stream_table(words: int, Q: int = 7, codes: int = 4096, spare: int = SPARE) -> StreamTable:
    """One row of `words` ids of text, the special ids, and Q x `codes` ids of speech."""
    first = words + SPECIAL
    vocab = first + Q * codes + spare
    return StreamTable((Stream("text", "text", vocab, vocab),), "orpheus", stop=(words + END_OF_SPEECH,), flat=(first, Q, codes))


# Llama-3.2-3B with 28684 more ids.
ORPHEUS_3B = ModelConfig(
    stream_table(128256), StackConfig(dim=3072, layers=28, heads=24, kv_heads=8, ffn=8192, rope_theta=500000.0,
                                      rope_scaling=(32.0, 1.0, 4.0, 8192.0)), tied=True)


# ---- how turns are written ----

def voices(text: str, references: Sequence[str] = (), scene: str = "", in_system: bool = False) -> list[Message]:
    """The turns of a prompt: what each reference recording says, with its speech, then the text; `scene` is the name of the voice."""
    if in_system or any(said.startswith("profile:") for said in references):
        raise ValueError("Orpheus takes recordings of voices and names of voices only; leave --ref_in=system and profile: out")
    name = f"{scene}: " if scene else ""
    said = [{"role": "assistant", "content": [name + words, {"type": "audio"}]} for words in references]
    return [*said, {"role": "assistant", "content": name + text}]


SPEAK = (SAID, *(MARK.format(n) for n in (4, 5, 1)))                # from the end of the text to the begin of speech
TEMPLATE = Template("Orpheus", MARK.format(3) + BEGIN, MARK.format(END_OF_SPEECH), "",
                    (BEGIN, *SPEAK, *(MARK.format(n) for n in (END_OF_SPEECH, 3, 6, SPECIAL))),
                    (BEGIN, SAID, "<|end_of_text|>", "<custom_token_"), separator=MARK.format(6), audio_in="".join(SPEAK),
                    audio_out="".join(SPEAK), predicts_audio_start=True, targets="clone", joint_header=True, one_turn=True,
                    clone_prompt=voices, codes=MARK.format(SPECIAL))


# ---- the layout of transformers ----

KEY = "speech_tokens"               # of our exports only: where their ids are not those of the released models


def read(about: About, tensors: Tensors) -> ModelConfig:
    vocab = about["vocab_size"]
    first, Q, codes = about.get(KEY) or ORPHEUS_3B.table.flat
    table = stream_table(first - SPECIAL, Q, codes, vocab - first - Q * codes)
    table = replace(table, stop=tuple(dict.fromkeys((*table.stop, *ids(about.get("eos_token_id"))))))
    return ModelConfig(table, llama(about, about["num_hidden_layers"], 1e-6), tied=about.get("tie_word_embeddings", False))


def write(c: ModelConfig, dtype: str) -> About:
    own = {} if is_released({"vocab_size": c.table.streams[0].vocab}) else {KEY: list(c.table.flat)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **write_llama(c, c.temporal.layers, dtype), "mlp_bias": False,
            "eos_token_id": list(c.table.stop), "max_position_embeddings": 131072} | own


def is_released(about: About) -> bool:
    return about.get("vocab_size") == ORPHEUS_3B.table.streams[0].vocab


RULES = {"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.3, "max_frames": 1200}       # of engine_class.py; columns: 14 s
FAMILIES = (Family(
    "Orpheus", "orpheus", "Orpheus 3B: speech of named voices, its codes in the vocabulary", chat_grid, TEMPLATE,
    rules=lambda table: RULES, companions={"codec": "hubertsiuzdak/snac_24khz"}, text_to_speech=True, references=99,
    formats=(Format("Orpheus", "hf", lambda c: NAMES, read, write, lambda c: bool(c.table.flat),
                    lambda about: about.get("model_type") == "llama" and (is_released(about) or KEY in about), drop_buffers,
                    shards=True, peft=True, task_type="CAUSAL_LM"),)),)
