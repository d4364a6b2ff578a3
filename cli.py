"""The command line of sample.py: what is loaded, who speaks, what is written.

    python sample.py --ckpt out/demo --text "four nine two seven" --out x.wav       one wav; with --texts a folder and samples.jsonl
    python sample.py --ckpt out/higgs_ar --text "..." --ref voice.wav --ref-text "..."    in the voice of a recording
    python sample.py --ckpt out/moshi_lora --user in.wav --out reply.wav            both sides of a dialogue, and what was said
    python sample.py --ckpt out/ivr_qwen --chat                                     turn by turn in the terminal (chat.py)
"""

import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import lora
from audio import load_codec
from audio.wav import WavWriter, load_wav, save_wav
from cache import encode, reply_example
from chat import ChatConfig, talk
from chatml import OFFICIAL, pair_voices, usual_rules
from checkpoint import DTYPES, load
from data import DataConfig, load_tokenizer, prompt_example
from dialogue import recorded, write_reply
from duplex import moshi_rules, official_files
from guidance import chosen
from model import MultistreamLM
from options import apply, from_json, help_text, read_lines, split_arguments, write_rows
from replies import tell
from sample import SampleConfig, generate, reply, speak, speak_long
from streams import lay_out


@dataclass(frozen=True)
class Job(SampleConfig):
    """What `python sample.py` does."""

    ckpt: str = ""               # run folder, checkpoint folder, file or hub id
    text: str = ""               # what to say
    texts: str = ""              # or a file with one text a line
    out: str = "out/sample.wav"  # wav to write; with texts, a folder for wavs and samples.jsonl
    user: str = ""               # or a recording to talk with: out becomes stereo (left the model), its words a .txt beside it
    prompt: str = ""             # or a stereo dialogue to go on with, left the model; then it speaks with user, or for both
    seconds: float = 20.0        # with prompt: go on for so long
    condition: str = ""          # what Hibiki and its like are told: description=very_good
    chat: ChatConfig | None = None  # --chat: converse at the terminal (chat.py), a line at a time
    reply: str = ""              # conversations: "text", printed as it comes, or "speech"; "" = speech where there is any
    system: str = ""             # conversations: system message, "" = as in training
    exact_moshi: bool = False    # with user: miss its first frame as moshi's generator does
    ref: tuple[str, ...] = ()    # recording of the voice to clone, or "profile:" and words; several are [SPEAKER0], [SPEAKER1]
    ref_text: tuple[str, ...] = ()  # what each recording says
    ref_in: str = "assistant"    # conversations: where it stands, in an "assistant" turn or in the "system" message
    scene: str = ""              # conversations: scene description
    chunk_words: int = 0         # speak a long text in pieces of so many words, or of speakers' turns; 0 = whole
    chunk_buffer: int = 1        # pieces before that the next one goes on from, beside the references
    codec: str = ""              # codec, tokenizer and normaliser where the checkpoint names none, as official ones do
    tokenizer: str = ""          # by default the one in the checkpoint's folder
    normaliser: str = ""
    adapter: str = ""            # checkpoint folder of an adapter to put on top
    device: str = "cpu"          # cpu or cuda
    dtype: str = "fp32"          # fp32, bf16 or fp16
    quantize: str = ""           # "int8": weights of 8 bits, half the bytes of bf16 to read for each column
    stream: bool = False         # write the wav while it grows
    batch: int = 16              # texts spoken at once

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.ref_in in ("assistant", "system"), "ref_in is assistant or system"
        assert min(self.chunk_words, self.chunk_buffer) >= 0, "chunk_words and chunk_buffer are not negative"
        assert self.reply in ("", "text", "speech"), f"reply {self.reply!r} is neither text nor speech"
        assert self.batch > 0, f"batch {self.batch} is not positive"
        assert self.quantize in ("", "int8"), f"quantize {self.quantize!r} is neither empty nor int8"
        assert self.dtype in DTYPES, f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}"
        assert self.device in ("cpu", "cuda"), f"device {self.device!r} is neither cpu nor cuda"


def load_for_sampling(job: Job) -> tuple[MultistreamLM, DataConfig]:
    """Load the model and say what was loaded, the adapter included."""
    if not job.ckpt:
        raise ValueError("no checkpoint given; add --ckpt out/demo, or any run folder, file or hub id")
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: this machine shows no CUDA device; use --device=cpu")
    model = load(job.ckpt, job.device, job.dtype, job.adapter or None)
    found = lora.norms(model)
    applied = f"adapter applied: {2 * len(found)} tensors, |BA|/|W| up to {max(found.values()):.2g}" if found else "no adapter"
    print(f"{job.adapter or model.extras.folder}: step {model.extras.step}, {applied}")
    lora.strip(model)                                # merged adapters go the fast way
    if job.quantize:
        lora.quantize(model.requires_grad_(False))
    folder = Path(model.extras.folder)
    facts = dict(model.extras.data or OFFICIAL.get(model.table.layout, {}) | official_files(folder))
    facts |= {key: getattr(job, key) for key in ("codec", "tokenizer", "normaliser") if getattr(job, key)}
    facts |= {"scene": job.scene, "reference_in": job.ref_in} | ({"system": job.system} if job.system else {})
    return model, from_json(DataConfig, facts, f"{folder}/config.json data")


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help", "stream", "chat"), ("ref", "ref_text"))
    if "help" in pairs:
        print(help_text(Job(), "python sample.py --ckpt out/demo --text 'four nine two seven' --out x.wav"))
        return
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options look like --text=\"...\"")
    if pairs.get("stream") == "":
        pairs["stream"] = "true"
    job = apply(Job(chat=ChatConfig() if pairs.pop("chat", "false") != "false" else None), pairs)
    if job.chat is not None:
        return hold(job, pairs.keys())
    if job.user or job.prompt:
        return converse(job, pairs.keys())
    texts = read_lines(job.texts) if job.texts else [job.text]
    if not any(text.strip() for text in texts):
        raise ValueError("nothing to say; add --text=\"...\" or --texts=FILE with one text a line")
    voices = pair_voices(job.ref, job.ref_text, texts)
    if job.stream and job.texts:
        raise ValueError("--stream writes one growing wav; use it with --text, not with --texts")
    say(job, texts, voices, pairs.keys())


def hold(job: Job, given: Collection[str]) -> None:
    """Hold a conversation at the terminal."""
    if said := [name for name in ("text", "texts", "user", "prompt") if getattr(job, name)]:
        raise ValueError(f"--chat reads what is said line by line; leave --{said[0]} out")
    model, data = load_for_sampling(job)
    job = replace(job, **usual_rules(model.table.layout, given))
    talk(model.table, data, job.chat, lambda prompt: generate(model, prompt, job), job.reply, job.out)


def converse(job: Job, given: Collection[str] = ("temperature",)) -> None:
    """Answer the recording job.user, or go on with the dialogue job.prompt: both sides as a stereo wav, and a transcript.

    Where `given`, the options that the user chose, holds no sampling rule, the family's own hold.
    """
    model, data = load_for_sampling(job)
    table = model.table
    if table.layout == "moss" and job.user:
        codec, tokenizer = load_codec(data.codec), load_tokenizer(data.tokenizer)
        codes = encode(codec, load_wav(job.user, codec.sample_rate)[0])
        asked = {"role": "user", "content": [{"type": "audio", "audio_url": job.user}]}
        prompt = lay_out(reply_example([asked], [codes], data, tokenizer, table, job.reply), table)[0]
        job = replace(job, **usual_rules(table.layout, given))
        return tell(generate(model, prompt, job), table, tokenizer, "" if job.reply == "text" else job.out, codec)
    if table.layout != "duplex":
        option = "--user" if job.user else "--prompt"
        raise ValueError(f"{option} needs a model that listens, {job.ckpt} has layout {table.layout!r}; give it --text")
    job = job if {"temperature", "top_k"} & set(given) else replace(job, **moshi_rules(len(table.audio_out)))
    codec, tokenizer = load_codec(data.codec), load_tokenizer(data.tokenizer)
    before, user, wav = recorded(job, codec, tokenizer, table, data)
    job = replace(job, max_frames=round(job.seconds * codec.frame_rate))
    frames = reply(model, user, job, job.exact_moshi, chosen(table, job.condition), before=before)[0]       # (K, T)
    print(write_reply(job.out, frames, None if job.prompt else wav, codec, tokenizer, table))


def say(job: Job, texts: list[str], voices: Sequence[tuple[str, str]] = (), given: Collection[str] = ()) -> None:
    """Speak texts, a batch at a time, into job.out: one wav, or with --texts a folder of them and samples.jsonl."""
    model, data = load_for_sampling(job)
    if model.table.layout == "duplex":
        raise ValueError(f"{job.ckpt} talks with somebody; give it a recording with --user=in.wav instead of a text")
    job = replace(job, **usual_rules(model.table.layout, given))
    if not model.table.audio_out or job.reply == "text":
        tokenizer = load_tokenizer(data.tokenizer)
        for text in texts:
            prompt = lay_out(prompt_example(text, data, tokenizer, table=model.table, reply="text"), model.table)[0]
            tell(generate(model, prompt, job), model.table, tokenizer)
        return
    codec, rows = load_codec(data.codec), []
    for at in range(0, len(texts), job.batch):
        part = texts[at : at + job.batch]
        with WavWriter(job.out, codec.sample_rate) if job.stream else nullcontext() as writer:
            hear = writer and writer.append
            long = job.chunk_words and [speak_long(model, text, data, job, codec, job.chunk_words, voices, hear, job.chunk_buffer)
                                        for text in part]
            spoken = long or speak(model, part, data, job, codec, voices, hear, progress=True)
        for n, (text, speech) in enumerate(zip(part, spoken, strict=True), at):
            path = Path(job.out) / f"{n:03d}.wav" if job.texts else Path(job.out)
            if not job.stream:
                save_wav(path, speech.wav, codec.sample_rate)
            rows.append({"text": text, "wav": str(path.resolve()), "seconds": speech.frames / codec.frame_rate, "ended": speech.ended})
            print(f"{path}: {rows[-1]['seconds']:.1f} s, {'ended by itself' if speech.ended else 'cut at --max_frames'}: {text}")
    if job.texts:
        write_rows(Path(job.out) / "samples.jsonl", rows)
        print(f"{job.out}/samples.jsonl: {len(rows)} recordings")
