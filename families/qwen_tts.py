"""Qwen3-TTS 0.6B and 1.7B, 12.5 Hz: text to speech in the voice of a recording, of a list, or tuned. Aligned rows, no delays.

    text   role  pad     pad       pad      pad     tts_bos  t0  t1  tts_eos  pad  pad ... pad      only read
    cb 1         nothink think_bos think_eos speaker pad     pad pad pad      bos  a0  ... aT eos   trained from a0 on
    cb 2..16                                                                       b0  ... bT       prefix depth transformer

With a language the marks are think, think_bos, LANGUAGE, think_eos; a model without a speaker leaves that column out. An
instruction stands before as a turn of the user. With a reference its text stands before the text, its codes before the codes.
`streaming=1` puts the text over the codes instead, which the official script calls streaming mode: t0 over bos, t1 over a0, ..., then
tts_eos and pad; `TextFeed` fills it in while sampling. What prompts hold is `table.choice`: language=english,speaker=vivian.
The speaker is an id of codebook 0, whose embedding is the voice: one of the list, or row 3000, into which `tuned_voice` writes
the vector of a recording (audio/ecapa.py). A tuned model is of the type custom_voice, as the official script writes it. Official
cloning has both that vector and the reference in front: add-voice, then --ref.

The loss of the official script: the mean of the first codebook plus 0.3 times the mean of the others. Its three faults
(QwenLM/Qwen3-TTS issue 371) cannot arise here, as no code shifts but model.py: the talker learnt frame j + 2, the depth
transformer read the state behind the frame that it predicts, and its labels were one codebook late.
Sources: qwen-tts 0.1.1 with transformers 4.57.3, its fine-tuning script; the released config.json. Next: audio/qwen.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.ecapa import PREFIX as ENCODER
from audio.ecapa import RATE, SpeakerEncoder
from audio.wav import load_wav
from families.family import Family
from families.formats import About, Conversion, Format, Tensors, by_model_type, llama, official_files, require, stack, write_llama
from families.qwen import CHATML
from layers.architecture import ModelConfig, StackConfig
from streams import Example, Grid, Stream, StreamTable, codebooks, join
from text.conversation import Message, Template

# Our name of an id -> the official one, of the text row and of codebook 0.
TEXT_IDS = {"text_pad": "tts_pad_token_id", "text_bos": "tts_bos_token_id", "text_eos": "tts_eos_token_id", "turn": "im_start_token_id",
            "turn_end": "im_end_token_id"}
CODE_IDS = {"pad": "codec_pad_id", "think": "codec_think_id", "nothink": "codec_nothink_id", "think_bos": "codec_think_bos_id",
            "think_eos": "codec_think_eos_id"}
RELEASED = {"text_pad": 151671, "text_bos": 151672, "text_eos": 151673, "turn": 151644, "turn_end": 151645, "pad": 2148, "think": 2154,
            "nothink": 2155, "think_bos": 2156, "think_eos": 2157}
LANGUAGES = {"chinese": 2055, "english": 2050, "german": 2053, "italian": 2070, "portuguese": 2071, "spanish": 2054, "japanese": 2058,
             "korean": 2064, "french": 2061, "russian": 2069, "beijing_dialect": 2074, "sichuan_dialect": 2062}
COMPANIONS = {"tokenizer": "Qwen/Qwen3-0.6B"}         # the same pieces; the released folders have no tokenizer.json
TUNED = 3000            # row of codebook 0 for a voice of one's own, in a table of 3072


def stream_table(words: int, first: int, codes: int, Q: int, bos: int, eos: int, ids: dict[str, int]) -> StreamTable:
    """A text row that is only read, codebook 0 with marks behind its codes, and Q - 1 codebooks without."""
    marked = Stream("cb1", "audio", first, first, 0, bos, eos, code_count=codes)
    return StreamTable((Stream("text", "text", words, fill=ids["text_pad"]), marked, *codebooks(Q, codes, codes, -1)[1:]), "qwen3_tts",
                       aligned=True, audio_start=ids["turn_end"], stop=(ids["turn_end"],), ids=tuple(ids.items()))


def talker(dim: int, ffn: int) -> ModelConfig:
    deep = StackConfig(dim=1024, layers=5, heads=16, kv_heads=8, head_dim=128, ffn=3072, norm_eps=1e-6, rope_theta=1e6, qk_norm=True)
    ids = RELEASED | {f"language.{name}": id for name, id in LANGUAGES.items()}
    return ModelConfig(stream_table(151936, 3072, 2048, 16, 2149, 2150, ids), replace(deep, dim=dim, layers=28, ffn=ffn,
                       head_dim=128 if dim == 1024 else 0), text_width=2048, depth_tied=True,
                       depth=replace(deep, steps=16, prefix=True, projection="" if dim == 1024 else "bias"))


QWEN3_TTS_0_6B = talker(1024, 3072)
QWEN3_TTS_1_7B = talker(2048, 6144)


# ---- the grid ----

def known(table: StreamTable, kind: str) -> dict[str, int]:
    """Languages or speakers of a model: name -> id of codebook 0."""
    return {name.removeprefix(f"{kind}."): id for name, id in table.ids if name.startswith(f"{kind}.")}


def chosen(table: StreamTable) -> dict[str, int]:
    """The ids of a table, and those of its choice as "language", "speaker" and "streaming".

    language=auto: the model finds it; speaker=none: none. ValueError for a name that the model does not know. A speaker of a dialect
    brings it along where Chinese or no language is chosen.
    """
    ids = dict(table.ids)
    choices = {"language": {"auto": None} | known(table, "language"), "speaker": {"none": None} | known(table, "speaker"),
               "streaming": {"0": None, "1": 1}}
    for part in (part for part in table.choice.split(",") if part.strip()):
        kind, _, name = (x.strip().lower() for x in part.partition("="))
        if name not in choices.get(kind, {}):
            can = ", ".join(f"{kind}={'|'.join(names)}" for kind, names in choices.items())
            raise ValueError(f"{part.strip()!r} is unknown to this model; it takes {can}")
        ids.pop(kind, None)                             # the last one holds
        ids |= {} if choices[kind][name] is None else {kind: choices[kind][name]}
    speaker = next((name for name, id in known(table, "speaker").items() if id == ids.get("speaker")), "")
    chinese = ids.get("language.chinese")
    if f"dialect.{speaker}" in ids and ids.get("language", chinese) == chinese:
        ids["language"] = ids[f"dialect.{speaker}"]
    return ids


def columns(text: Tensor | Sequence[int], first: Tensor | Sequence[int], table: StreamTable) -> Tensor:
    """Columns with these ids in the text row and in codebook 0, -1 = nothing.   -> (K, n)"""
    tokens = torch.full((len(table), max(len(text), len(first))), -1)
    for row, ids in ((0, text), (table.lead, first)):
        tokens[row, : len(ids)] = torch.as_tensor(ids)
    return tokens


def turns_of(example: Example, turn: int) -> list[list[tuple[Tensor, float]]]:
    """The segments of an example by turns: each begins with the ids of its header."""
    turns: list[list[tuple[Tensor, float]]] = []
    for part, weight in example.segments:
        if part.dim() == 1 and len(part) and int(part[0]) == turn:
            turns.append([])
        turns[-1].append((part, weight))
    return turns


class Said(NamedTuple):
    """What an example says."""

    before: Tensor          # ids of an instruction
    role: Tensor            # ids of the header
    text: Tensor            # ids of all that is said
    codes: Tensor           # (Q, T)
    weights: Tensor         # (T,)
    end: float | None       # weight of the end behind them, None = a prompt, whose last text is not spoken yet


def said(example: Example, table: StreamTable) -> Said:
    """Read the segments of text/conversation.py; ValueError for a conversation that is no speech of one voice."""
    marks = dict(table.ids)
    turns = turns_of(example, marks["turn"])
    role, parts = turns[-1][0][0], [[part for part, _ in turn] for turn in turns]
    first = next(n for n, turn in enumerate(turns) if torch.equal(turn[0][0], role))
    before, spoken = parts[:first], parts[first:]
    if any(not torch.equal(turn[0], role) for turn in spoken) or any(part.dim() == 2 for turn in before for part in turn):
        raise ValueError("Qwen3-TTS speaks and does not listen; keep the assistant's messages, and an instruction in front of them")
    if any(turn[1].dim() == 2 or turn[1].tolist() == [marks["turn_end"]] for turn in spoken):
        raise ValueError("a recording has no text; write what it says into the same message, in front of it")
    counts = [torch.full((part.shape[1],), weight) for turn in turns for part, weight in turn if part.dim() == 2]
    codes = [part for turn in spoken for part in turn if part.dim() == 2]
    end = next((weight for part, weight in turns[-1] if part.dim() == 2), None)
    if len(codes) != len(spoken) - (end is None):
        raise ValueError("each message of the assistant is a text and one recording of it; write it so, or leave it out")
    none = torch.empty(len(table.audio), 0, dtype=torch.long)
    return Said(torch.cat([none[0], *(part for turn in before for part in turn)]), role, torch.cat([turn[1] for turn in spoken]),
                torch.cat([none, *codes], 1), torch.cat([torch.empty(0), *counts]), end)


def opening(role: Tensor, ids: dict[str, int], table: StreamTable) -> Tensor:
    """The role and the marks in front of the text.   -> (K, n)"""
    marks = ["think", "think_bos", "language", "think_eos"] if "language" in ids else ["nothink", "think_bos", "think_eos"]
    first = [ids[name] for name in (*marks, *["speaker"] * ("speaker" in ids), "pad")]
    text = [ids["text_pad"]] * (len(first) - 1) + [ids["text_bos"]]
    return torch.cat([columns(role, [], table), columns(text, first, table)], 1)


def grid(example: Example, table: StreamTable) -> Grid:
    """Training grid, or without the last turn's codes its prompt, which ends with the column before the first frame.

    What a streaming prompt has not read of its text becomes `example.text`, which `TextFeed` gets.
    """
    ids, (before, role, text, frames, counts, end), stream = chosen(table), said(example, table), table.streams[table.lead]
    whole, T = torch.cat([text, torch.tensor([ids["text_eos"]])]), frames.shape[1]
    spoken = columns([], [stream.start, *frames[0].tolist(), *[stream.end] * (end is not None)], table)
    spoken[table.lead + 1 :, 1 : T + 1] = frames[1:]
    weights = torch.zeros(spoken.shape)
    weights[table.lead :, 1 : T + 1] = counts
    weights[table.lead, T + 1 :] = end or 0.0
    if "streaming" in ids:
        over = whole[: spoken.shape[1]]
        example.text = whole[spoken.shape[1] :] if end is None else example.text
        middle = torch.empty(len(table), 0, dtype=torch.long)
    else:
        over, middle = whole[:0], columns(whole, [ids["pad"]] * len(whole), table)
    spoken[0] = ids["text_pad"]
    spoken[0, : len(over)] = over
    front = torch.cat([columns(before, [], table), opening(role, ids, table), middle], 1)
    return join([(front, torch.zeros(front.shape)), (spoken, weights)])


class TextFeed:
    """Fill the text row while sampling: the text that a streaming prompt has left, then padding. `state` is changed in place."""

    def __init__(self, texts: Sequence[Tensor], table: StreamTable) -> None:
        self.pad = table.streams[0].fill
        texts = torch.nn.utils.rnn.pad_sequence([text.long() for text in texts], True, self.pad)
        self.text = F.pad(texts, (0, 1), value=self.pad)                     # (B, n + 1)
        self.state = [torch.zeros(len(texts), dtype=torch.long)]

    def to(self, device: torch.device) -> "TextFeed":
        self.text, self.state = self.text.to(device), [t.to(device) for t in self.state]
        return self

    def place(self, row: int, other: "TextFeed") -> None:
        """Let an item go on as the only item of another feed does."""
        self.text = F.pad(self.text, (0, max(0, other.text.shape[1] - self.text.shape[1])), value=self.pad)
        self.text[row] = self.pad
        self.text[row, : other.text.shape[1]], self.state[0][row] = other.text[0], other.state[0][0]

    def __call__(self, column: Tensor) -> Tensor:
        at = self.state[0]
        column[:, 0] = self.text.gather(1, at.clamp(max=self.text.shape[1] - 1)[:, None])[:, 0]
        at.add_(1)
        return column


# ---- how turns are written ----

def voices(text: str, references: Sequence[str] = (), scene: str = "", in_system: bool = False) -> list[Message]:
    """The turns of a prompt: an instruction (--scene), what a reference recording says with its speech, and the text."""
    if in_system or any(words.startswith("profile:") for words in references):
        raise ValueError("Qwen3-TTS takes a recording of the voice or an instruction (--scene); leave --ref_in=system and profile: out")
    turns = [{"role": "assistant", "content": [words, {"type": "audio"}]} for words in references]
    return [*([{"role": "user", "content": scene}] if scene else []), *turns, {"role": "assistant", "content": text}]


TEMPLATE = Template("Qwen3-TTS", "<|im_start|>{role}\n", "<|im_end|>", "<|endoftext|>", CHATML, CHATML, separator="\n",
                    audio_in="<|im_end|>", audio_out="<|im_end|>", targets="clone", joint_header=True, one_turn=True, clone_prompt=voices)


# ---- the official layout ----

FIRST, REST = "talker.model.codec_embedding.weight", "talker.code_predictor.model.codec_embedding.{}.weight"
TALKER, DEPTH = "talker.model", "talker.code_predictor"
NAMES = (("embed.text.weight", f"{TALKER}.text_embedding.weight"), ("embed.text.up.{p}", "talker.text_projection.linear_fc1.{p}"),
         ("embed.text.down.{p}", "talker.text_projection.linear_fc2.{p}"), ("embed.audio.weight", "codec_embeddings"),
         *stack("temporal.layers", f"{TALKER}.layers"), ("temporal.norm.weight", f"{TALKER}.norm.weight"),
         ("audio_head.weight", "talker.codec_head.weight"), *stack("depth.layers", f"{DEPTH}.model.layers"),
         ("depth.norm.weight", f"{DEPTH}.model.norm.weight"), ("depth.input.{p}", f"{DEPTH}.small_to_mtp_projection.{{p}}"),
         ("depth.head.weight", f"{DEPTH}.lm_head.{{k}}.weight"))


def tables(config: ModelConfig) -> list[str]:
    """The official names of the codebooks' tables, which we keep as one."""
    return [FIRST, *(REST.format(k) for k in range(len(config.table.audio) - 1))]


def tidy(tensors: Tensors, config: ModelConfig) -> Tensors:
    """One table of all codebooks; the speaker encoder, which audio/ecapa.py reads, is left out."""
    kept = {name: t for name, t in tensors.items() if not name.startswith(ENCODER)}
    if all(name in kept for name in tables(config)):
        kept["codec_embeddings"] = torch.cat([kept.pop(name) for name in tables(config)])
    return kept


def untidy(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Undo `tidy`."""
    if "codec_embeddings" not in tensors:                # an adapter's
        return tensors
    whole, sizes = tensors["codec_embeddings"], [config.table.streams[k].vocab for k in config.table.audio]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    parts = {name: whole[a : a + n] for name, a, n in zip(tables(config), starts, sizes, strict=True)}
    return {name: t for name, t in tensors.items() if name != "codec_embeddings"} | parts


def read(about: About, tensors: Tensors) -> ModelConfig:
    first = about["talker_config"]
    deep, Q = first["code_predictor_config"], first["num_code_groups"]
    require(about, {"tokenizer_type": ("qwen3_tts_tokenizer_12hz",)})
    require(deep, {"num_code_groups": (Q,), "attention_bias": (False,)})
    ids = {ours: about[theirs] for ours, theirs in TEXT_IDS.items()} | {ours: first[theirs] for ours, theirs in CODE_IDS.items()}
    languages, speakers = first.get("codec_language_id") or {}, first.get("spk_id") or {}
    ids |= {f"language.{name}": id for name, id in languages.items()} | {f"speaker.{name}": id for name, id in speakers.items()}
    ids |= {f"dialect.{name}": languages[spoken] for name, spoken in (first.get("spk_is_dialect") or {}).items() if spoken}
    table = stream_table(first["text_vocab_size"], first["vocab_size"], deep["vocab_size"], Q, first["codec_bos_id"],
                         first["codec_eos_token_id"], ids)
    table = replace(table, choice=f"speaker={next(iter(speakers))}" if len(speakers) == 1 else "")         # a tuned voice
    wide = deep["hidden_size"] != first["hidden_size"]
    rope = {key: value for key, value in (first.get("rope_scaling") or {}).items() if key not in ("mrope_section", "interleaved")}
    return ModelConfig(table, llama(first | {"rope_scaling": rope}, first["num_hidden_layers"], 1e-6, qk_norm=True), depth_tied=True,
                       depth=llama(deep, deep["num_hidden_layers"], 1e-6, qk_norm=True, steps=Q, prefix=True,
                                   projection="bias" if wide else ""), text_width=first["text_hidden_size"])


def write(c: ModelConfig, dtype: str) -> About:
    ids, (text, first, rest, *_), Q = dict(c.table.ids), c.table.streams, len(c.table.audio)
    speakers, languages = known(c.table, "speaker"), known(c.table, "language")
    dialects = {id: name for name, id in languages.items()}

    def part(stack: StackConfig, codes: int) -> About:
        fields = write_llama(replace(c, temporal=stack, depth=None, depth_tied=False, text_width=0, table=replace(
            c.table, streams=(replace(text, vocab=codes),))), stack.layers, dtype)
        return fields | {"vocab_size": codes, "num_code_groups": Q, "sliding_window": None, "use_sliding_window": False}

    deep = part(c.depth, rest.vocab) | {"model_type": "qwen3_tts_talker_code_predictor", "max_position_embeddings": 65536}
    half = c.temporal.head // 2
    mrope = {"interleaved": True, "mrope_section": [half - 2 * (half * 5 // 16), *[half * 5 // 16] * 2], "rope_type": "default"}
    main = part(c.temporal, first.vocab) | {
        "model_type": "qwen3_tts_talker", "max_position_embeddings": 32768, "rope_scaling": mrope, "position_id_per_seconds": 13,
        "text_hidden_size": c.text_width, "text_vocab_size": text.vocab, "codec_bos_id": first.start, "codec_eos_token_id": first.end,
        "codec_language_id": languages, "spk_id": speakers, "code_predictor_config": deep,
        "spk_is_dialect": {name: dialects.get(ids.get(f"dialect.{name}"), False) for name in speakers},
        **{theirs: ids[ours] for ours, theirs in CODE_IDS.items()}}
    return {"architectures": ["Qwen3TTSForConditionalGeneration"], "model_type": "qwen3_tts", "tokenizer_type": "qwen3_tts_tokenizer_12hz",
            **({"tts_model_type": "custom_voice"} if speakers else {}), "tts_model_size": "0b6" if c.temporal.dim <= 1024 else "1b7",
            "torch_dtype": dtype, "talker_config": main, **{theirs: ids[ours] for ours, theirs in TEXT_IDS.items()}}


# ---- a voice of one's own ----

def tuned_voice(model: Any, wav: str = "", speaker: str = "me", language: str = "", encoder: str = "") -> tuple[ModelConfig, Tensors, Any]:
    """The model with a speaker more: the vector of a recording in a row of codebook 0, chosen in every prompt from now on.

    `encoder` is the folder of a Base model, whose speaker encoder reads the recording; "" = the model's own.
    """
    table, first, name = model.config.table, model.config.table.streams[model.config.table.lead], speaker.strip().lower()
    if not wav or not name or set(name) & set("=,|"):
        raise ValueError("add-voice needs --wav=RECORDING and takes --speaker=NAME, a word without = and comma")
    vector = SpeakerEncoder.load(encoder or model.extras.folder).embed(load_wav(wav, RATE)[0])
    if len(vector) != model.config.temporal.dim:
        raise ValueError(f"the speaker encoder gives {len(vector)} numbers, the model has {model.config.temporal.dim}; name its own Base")
    ids = dict(table.ids)
    taken = {first.start, first.end, *(id for key, id in ids.items() if key not in TEXT_IDS)}
    free = [n for n in (*range(TUNED, first.vocab), *range(first.vocab - 1, first.code_count - 1, -1)) if n not in taken]
    row = known(table, "speaker").get(name, free[0] if free else -1)
    if row < 0:
        raise ValueError("codebook 0 has no row without a meaning; give --speaker one that the model knows, whose voice is replaced")
    ids |= {f"speaker.{name}": row}
    choice = f"speaker={name}" + (f",language={language}" if language else "")
    table = replace(table, ids=tuple((key, id) for key, id in ids.items() if key != f"dialect.{name}"), choice=choice)
    chosen(table)                                        # the language is known
    weights = model.weights()
    embedded = weights["embed.audio.weight"].clone()
    embedded[row] = vector.to(embedded)
    facts = COMPANIONS | official_files(Path(model.extras.folder)) | dict(model.extras.data or {})
    return replace(model.config, table=table), weights | {"embed.audio.weight": embedded}, facts if "codec" in facts else None


def rules(table: StreamTable) -> dict[str, Any]:
    """The official generator's; 2048 frames are 164 s."""
    return {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.05, "min_frames": 2, "max_frames": 2048}


FAMILIES = (Family(
    "Qwen3-TTS", "qwen3_tts", "Qwen3-TTS 0.6B and 1.7B: text to speech in the voice of a recording", grid, TEMPLATE, feed=TextFeed,
    rules=rules, companions=COMPANIONS, text_to_speech=True, references=1,
    formats=(Format("qwen3_tts", "hf", lambda c: NAMES, read, write, lambda c: c.text_width > 0, by_model_type("qwen3_tts"), tidy, untidy,
                    peft=True, codec=ENCODER),),
    conversions=(Conversion("add-voice", """add-voice CKPT --wav=FILE --out=DIR    Qwen3-TTS: one speaker more, by a Base model's encoder;
    --speaker=me, --language=english, --encoder=FOLDER of the Base model where CKPT is none""",
                            tuned_voice, options=("wav", "speaker", "language", "encoder")),)),)
