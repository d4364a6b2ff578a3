"""Sampling: one generator for every family.

    python sample.py --ckpt out/demo --text "four nine two seven" --out x.wav
    out/demo/ckpt/latest: step 650, no adapter; x.wav: 2.4 s, ended by itself

    python sample.py --ckpt out/moshi_lora --user in.wav --out reply.wav
    talks with the recording: left the model, right the user, reply.txt what the model says and when

`generate` yields one frame (B, K) at a time, already un-delayed: text rows as they come, audio rows as soon as every
codebook of a frame exists. Writing a file, streaming and live chat all consume it. The prompt is built by the layout
function that built the training grids. Next: checkpoint.py.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import lora
from audio import load_codec
from audio.wav import WavWriter, save_wav
from chatml import chunks
from checkpoint import DTYPES, load
from data import DataConfig, load_tokenizer, prompt_example
from dialogue import recorded, write_reply
from duplex import UserFeed, moshi_rules, official_files
from guidance import Guidance, chosen
from kernels.sample import Noise, sample
from model import Cache, MultistreamLM
from options import apply, edge, from_json, help_text, read_lines, replace_file, split_arguments
from streams import FEEDS, delay, lay_out
from turns import FREE, DecodeState, finish, forced, settle, start_state

Rule = float | tuple[float, ...]


@dataclass(frozen=True)
class SampleConfig:
    """How tokens are drawn. A rule is one value, or one for each predicted stream (text first)."""

    temperature: Rule = 0.3         # 0 = greedy
    top_k: Rule = 0                 # keep the k likeliest, 0 = all
    top_p: Rule = 1.0               # keep the likeliest that together have this probability
    min_p: Rule = 0.0               # drop what is less likely than this share of the likeliest
    ras_window: int = 0             # repetition-aware sampling: look back this many columns, 0 = off
    ras_repeats: int = 2            # redraw from the full distribution when a code was drawn so often there
    max_frames: int = 500           # columns generated at most
    cfg: float = 1.0                # guidance: how much what the condition changes is exaggerated; 1 = off
    cfg_no_text: bool = False       # the unguided side reads no text
    cfg_hide: int = 0               # nor the first frames, this many
    closing: str = "frame"          # how audio ends: "frame" as trained, or as "boson" or "hf" (transformers) end it
    seed: int = 0                   # item i of a batch draws from seed + i, whatever the batch

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            rule = getattr(self, name)
            assert all(v >= 0 for v in (rule if isinstance(rule, tuple) else (rule,))), f"{name} {rule} is negative"
        assert self.closing in ("frame", "boson", "hf"), f"closing {self.closing!r} is none of frame, boson, hf"
        assert self.max_frames > 0, f"max_frames {self.max_frames} is not positive"


# ---- drawing one token a row ----

def draw(logits: Tensor, config: SampleConfig, rows: slice, noise: Noise, history: Tensor | None = None) -> Tensor:
    """Draw one id for each row.   logits (B, R, V) fp32, `rows` the places of R among the predicted streams -> (B, R)"""
    if config.temperature == 0 and not config.ras_window:
        return logits.argmax(-1)                                              # the rules keep the likeliest
    rules = []
    for rule in (config.temperature, config.top_k, config.top_p, config.min_p):
        values = rule[rows] if isinstance(rule, tuple) else (rule,) * (rows.stop - rows.start)
        if len(values) != rows.stop - rows.start:
            raise ValueError(f"a sampling rule has {len(rule)} values, the model predicts more streams; give one value or one for each")
        rules.append(torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None])
    recent = history[..., -config.ras_window :] if history is not None and config.ras_window > 0 else None
    return sample(logits, tuple(rules), noise, rows, recent, config.ras_repeats)


# ---- the generator ----

Feed = Callable[[Tensor], Tensor]


@torch.inference_mode()
def generate(model: MultistreamLM, prompt: Tensor, config: SampleConfig | None = None, feed: Feed | None = None,
             given: Tensor | None = None) -> Iterator[Tensor]:
    """Continue a prompt grid (B, K, S) or (K, S); yield frames (B, K) int64 as they become complete.

    Rows that have nothing in a frame hold -1; an item that has ended holds -1 everywhere. Prompts of different lengths
    are padded on the left with columns of -1. `feed(column) -> column` fills the rows that the model only reads (word
    rows, the user's codes); its `may_end()`, if it has one, tells which items may close their audio. `given` (B, K, n)
    are the ids of the next n columns, FREE where the model draws: forced text or codes, or -1 for nothing.
    """
    config, table, training = config or SampleConfig(), model.table, model.training
    model.eval()
    prompt = (prompt[None] if prompt.dim() == 2 else prompt).to(model.temporal.layers[0].attn.o.weight.device)
    B, K, S = prompt.shape
    if K != len(table):
        raise ValueError(f"the prompt has {K} rows, the model's table {len(table)}: {[s.name for s in table.streams]}")
    padding = (prompt < 0).all(1).cumprod(1).sum(1)                           # columns of -1 on the left
    position = S - padding
    guide = Guidance(config, table)
    sides = 2 * B if guide.on else B                                          # rows that the model reads
    state, cache = start_state(prompt, table, config.ras_window, config.closing), model.cache(sides, S + config.max_frames)
    state.guide, state.depth = guide, model.depth.cache(sides) if model.config.depth else None
    try:
        h = prefill(model, prompt, padding, cache, guide)
        for n in range(config.max_frames):
            state.given = given[..., n].to(prompt) if given is not None and n < given.shape[-1] else None
            mixed = state.given is not None or bool(state.speaking.any()) != bool(state.speaking.all())
            cache.side = None if mixed else bool(state.speaking[0])
            column = next_column(model, h, state, config, Noise(config.seed, B, n, prompt.device), feed)
            frame = state.undelay.push(column)
            number = state.count - 1 - state.undelay.lag                      # of the newest frame that is complete
            real = state.speaking & (number >= 0) & (number < state.closed)
            frame[:, table.lead :].masked_fill_(~real[:, None], -1)
            frame.masked_fill_(state.done[:, None], -1)
            finish(state, column, table)
            if not table.aligned or real.any():
                yield frame
            if state.done.all():
                break
            at = position[:, None] + n
            h = model.hidden(guide.both(column[..., None], at), guide.twice(at), cache=cache)
    finally:                                                                  # also when the caller stops listening
        model.train(training)


def prefill(model: MultistreamLM, prompt: Tensor, padding: Tensor, cache: Cache, guide: Guidance,
            chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Read the prompt into the cache, `chunk` columns at a time; -> states of its last column, (B, 1, D) twice"""
    positions = torch.arange(prompt.shape[2], device=prompt.device)[None] - padding[:, None]
    positions = positions.clamp(min=-1)                                       # padding has position -1 and is never seen
    prompt, positions = guide.both(prompt, positions), guide.twice(positions)
    for at in range(0, prompt.shape[2], chunk):
        h = model.hidden(prompt[..., at : at + chunk], positions[:, at : at + chunk], cache=cache)
    return h[0][:, -1:], h[1][:, -1:]


def next_column(model: MultistreamLM, h: tuple[Tensor, Tensor], state: DecodeState, config: SampleConfig, noise: Noise,
                feed: Feed | None) -> Tensor:
    """Sample the next column (B, K): the text row, what `feed` fills or is given, then the audio rows."""
    table, B = model.table, len(state.count)
    h_text, h_audio = (x[:, -1] for x in h)                                   # (B, 1, D) -> (B, D)
    column = torch.full((B, len(table)), -1, device=h_text.device)
    column[:, table.conditions] = state.undelay.recent[0][:, table.conditions]
    texts = len(table.text_out)
    if texts and (table.aligned or not bool(state.speaking.all())):
        drawn = draw(state.guide.mix(model.text_head(h_text), text=True).float()[:, None], config, slice(0, 1), noise)[:, 0]
        drawn = torch.where(state.owed >= 0, state.owed, drawn)
        column[:, table.text_out[0]] = drawn if table.aligned else torch.where(state.speaking, -1, drawn)
    if feed is not None:
        column = feed(column)
    if state.given is not None:
        column = torch.where(state.given == FREE, column, state.given)
    if table.audio_out and bool(state.speaking.any()):
        sample_audio(model, h_audio, column, state, config, noise, feed.may_end().to(column.device) if hasattr(feed, "may_end") else None)
    return column


def sample_audio(model: MultistreamLM, h: Tensor, column: Tensor, state: DecodeState, config: SampleConfig,
                 noise: Noise, may_end: Tensor | None) -> None:
    """Fill the predicted audio rows of a column in place: all at once, or step by step through the depth transformer."""
    table, rows, first = model.table, model.table.audio_out, len(model.table.text_out)
    end, out = table.streams[rows[0]].end, column[:, rows[0] : rows[-1] + 1]   # `out` is a view
    history = state.heard                                                     # (B, Q, n)
    if config.closing == "hf":                                                # start and end ids do not count as repetition
        history = history.masked_fill((history == state.edges[0, :, None]) | (history == state.edges[1, :, None]), -1)

    def choose(logits: Tensor, at: slice) -> Tensor:
        logits = state.guide.mix(logits).float()
        if end >= 0 and may_end is not None:
            logits[~may_end, :, end] = -torch.inf
        places = slice(first + at.start, first + at.stop)
        return draw(logits, config, places, noise, history[:, at])

    held = forced(state, rows)
    if model.config.depth is None:
        drawn = choose(model.audio_logits(h, column[:, :0]).transpose(0, 1), slice(0, len(rows)))
        out.copy_(torch.where(held == FREE, drawn, held))
    else:
        token, free = column[:, table.text[: model.depth.texts]], held == FREE
        for k in range(len(rows)):
            drawn = choose(model.depth.step(k, h, state.guide.twice(token), state.depth)[:, None], slice(k, k + 1))[:, 0]
            out[:, k] = token = torch.where(free[:, k], drawn, held[:, k])
    if any(table.streams[k].end >= 0 for k in rows):
        settle(state, column, state.count, table, state.speaking)
        held = forced(state, rows)                                            # a row below the one that ended ends with it
        out.copy_(torch.where(held == FREE, out, held))
    if config.ras_window:
        newer = torch.cat([state.heard[..., 1:], column[:, rows, None]], -1)
        state.heard = torch.where(state.speaking[:, None, None], newer, state.heard)


# ---- text to speech ----

@dataclass
class Speech:
    """What came of one text: wav (1, W) at the codec's rate, and whether the model ended it before the length cap."""

    wav: Tensor
    ended: bool
    frames: int
    codes: Tensor = field(default_factory=lambda: torch.empty(0, 0))            # (Q, T)


def speak(model: MultistreamLM, texts: Sequence[str], data: DataConfig, config: SampleConfig, codec: object | None = None,
          reference: tuple[str, str] | None = None, on_audio: Callable[[Tensor], None] | None = None,
          progress: bool = False, before: Sequence[tuple[str, Tensor]] = ()) -> list[Speech]:
    """Speak texts as one batch. `reference` is (wav file, its transcript); `on_audio` gets the first one's (1, n) samples early.

    A conversation goes on behind `before`, pairs of text and codes (Q, T) that were spoken already.
    """
    codec, tokenizer, table = codec or load_codec(data.codec), load_tokenizer(data.tokenizer), model.table
    examples = [prompt_example(text, data, tokenizer, codec, reference, table, before) for text in texts]
    prompt = pad_left([lay_out(example, table)[0] for example in examples])
    feed = FEEDS[table.layout]([e.text for e in examples], table) if table.layout in FEEDS else None
    frames: list[Tensor] = []
    decoder = codec.stream() if on_audio else None
    bar = tqdm(total=config.max_frames, unit="frame", disable=not (progress and sys.stderr.isatty()))
    for frame in generate(model, prompt, config, feed):
        codes = frame[:, table.audio_out].cpu()                           # the codec may live elsewhere
        frames.append(codes)
        bar.update()
        if decoder is not None and bool((codes[0] >= 0).all()):
            on_audio(decoder.decode(sounding(codes[:1, :, None], codec))[0])
    bar.close()
    if decoder is not None:
        on_audio(decoder.flush()[0])
    stacked = torch.stack(frames, dim=-1) if frames else torch.empty(len(texts), len(table.audio_out), 0, dtype=torch.long)
    capped = len(frames) >= config.max_frames - (max(table.delays) if table.aligned else 0)
    return [_decoded(codes, codec, capped) for codes in stacked]


def speak_long(model: MultistreamLM, text: str, data: DataConfig, config: SampleConfig, codec: object, limit: int,
               reference: tuple[str, str] | None = None, on_audio: Callable[[Tensor], None] | None = None) -> Speech:
    """Speak a text in pieces of `limit` words, or of speakers' turns; in a conversation each goes on from the last one's voice."""
    spoken: list[tuple[str, Speech]] = []
    for piece in chunks(text, limit):
        last = [(said, speech.codes) for said, speech in spoken[-1:] if model.table.layout == "chatml"]
        spoken.append((piece, *speak(model, [piece], data, config, codec, reference, on_audio, progress=True, before=last)))
    speeches = [speech for _, speech in spoken]
    codes = torch.cat([speech.codes for speech in speeches], dim=1)
    wav = codec.decode(codes[None])[0] if codes.shape[1] else torch.zeros(1, 0)
    return Speech(wav, all(speech.ended for speech in speeches), codes.shape[1], codes)


def sounding(codes: Tensor, codec: object) -> Tensor:
    """Keep ids inside the codec's tables: a start or end id in the middle of speech sounds like the nearest code."""
    return codes.clamp(max=codec.codebook_size - 1)


def _decoded(codes: Tensor, codec: object, capped: bool) -> Speech:
    spoken = sounding(codes[:, (codes >= 0).all(0)], codec)                  # (Q, T): frames after the end hold -1
    wav = codec.decode(spoken[None])[0] if spoken.shape[1] else torch.zeros(1, 0)
    return Speech(wav, not capped or bool(codes.shape[1] and (codes[:, -1] < 0).all()), spoken.shape[1], spoken)


def pad_left(grids: Sequence[Tensor]) -> Tensor:
    """Stack prompts (K, S_i) into (B, K, S), columns of -1 on the left."""
    S = max(g.shape[1] for g in grids)
    return torch.stack([torch.nn.functional.pad(g, (S - g.shape[1], 0), value=-1) for g in grids])


# ---- conversation ----

def reply(model: MultistreamLM, user: Tensor | None, config: SampleConfig, exact_moshi: bool = False, conditions: Tensor | None = None,
          given: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Talk with a recorded user: hear codes (B, Q, T) frame by frame.   -> frames (B, K, T), both sides and the text

    `before` (B, K, t) are the first frames of all rows: the model goes on from there, and `user` is None when it speaks
    for both (max_frames says how long). `conditions` (C, 1) or (B, C, 1) are the ids of the condition rows, `given` as in
    `generate`. `exact_moshi`: as moshi's generator, which never hears the first frame and gives fewer.
    """
    table, lag = model.table, max(model.table.delays)
    before = torch.empty(len(user), len(table), 0, dtype=torch.long) if before is None else before
    prompt = delay(before, table.delays, table.column("start"))
    if conditions is not None:
        prompt[:, table.conditions] = conditions
    feed, columns = None, config.max_frames + lag
    if user is not None:
        feed, columns = UserFeed(user, table, exact_moshi, prompt.shape[-1]), user.shape[-1] - before.shape[-1] + lag * (not exact_moshi)
    bar = tqdm(generate(model, prompt, replace(config, max_frames=columns), feed, given), total=columns, unit="frame", disable=None)
    return torch.cat([before[..., : max(before.shape[-1] - lag, 0)], torch.stack([frame.cpu() for frame in bar], dim=-1)], -1)


# ---- command line ----

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
    exact_moshi: bool = False    # with user: miss its first frame as moshi's generator does
    ref: str = ""                # reference recording of the voice to clone
    ref_text: str = ""           # what the reference says
    ref_in: str = "assistant"    # conversations: where it stands, in an "assistant" turn or in the "system" message
    scene: str = ""              # conversations: scene description
    chunk_words: int = 0         # speak a long text in pieces of so many words, or of speakers' turns; 0 = whole
    codec: str = ""              # codec, tokenizer and normaliser where the checkpoint names none, as official ones do
    tokenizer: str = ""          # by default the one in the checkpoint's folder
    normaliser: str = ""
    adapter: str = ""            # checkpoint folder of an adapter to put on top
    device: str = "cpu"          # cpu or cuda
    dtype: str = "fp32"          # fp32, bf16 or fp16
    stream: bool = False         # write the wav while it grows
    batch: int = 16              # texts spoken at once

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.ref_in in ("assistant", "system") and self.chunk_words >= 0, "ref_in is assistant or system, chunk_words not negative"
        assert self.batch > 0, f"batch {self.batch} is not positive"
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
    folder = Path(model.extras.folder)
    facts = dict(model.extras.data or official_files(folder))
    facts |= {key: getattr(job, key) for key in ("codec", "tokenizer", "normaliser") if getattr(job, key)}
    facts |= {"scene": job.scene, "reference_in": job.ref_in}
    return model, from_json(DataConfig, facts, f"{folder}/config.json data")


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help", "stream"))
    if "help" in pairs:
        print(help_text(Job(), "python sample.py --ckpt out/demo --text 'four nine two seven' --out x.wav"))
        return
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options look like --text=\"...\"")
    if pairs.get("stream") == "":
        pairs["stream"] = "true"
    job = apply(Job(), pairs)
    if job.user or job.prompt:
        return converse(job, bool({"temperature", "top_k"} & pairs.keys()))
    texts = read_lines(job.texts) if job.texts else [job.text]
    if not any(text.strip() for text in texts):
        raise ValueError("nothing to say; add --text=\"...\" or --texts=FILE with one text a line")
    if bool(job.ref) != bool(job.ref_text):
        raise ValueError("a reference needs both --ref=voice.wav and --ref_text=\"what it says\"")
    if job.stream and job.texts:
        raise ValueError("--stream writes one growing wav; use it with --text, not with --texts")
    say(job, texts)


def converse(job: Job, ruled: bool = True) -> None:
    """Answer the recording job.user, or go on with the dialogue job.prompt: both sides as a stereo wav, and a transcript.

    Where no sampling rule was given (`ruled`), Moshi's own hold.
    """
    model, data = load_for_sampling(job)
    table = model.table
    if table.layout != "duplex":
        given = "--user" if job.user else "--prompt"
        raise ValueError(f"{given} needs a model that listens, {job.ckpt} has layout {table.layout!r}; give it --text")
    job = job if ruled else replace(job, **moshi_rules(len(table.audio_out)))
    codec, tokenizer = load_codec(data.codec), load_tokenizer(data.tokenizer)
    before, user, wav = recorded(job, codec, tokenizer, table, data)
    job = replace(job, max_frames=round(job.seconds * codec.frame_rate))
    frames = reply(model, user, job, job.exact_moshi, chosen(table, job.condition), before=before)[0]       # (K, T)
    print(write_reply(job.out, frames, None if job.prompt else wav, codec, tokenizer, table))


def say(job: Job, texts: list[str]) -> None:
    """Speak texts, a batch at a time, into job.out: one wav, or with --texts a folder of them and samples.jsonl."""
    model, data = load_for_sampling(job)
    if model.table.layout == "duplex":
        raise ValueError(f"{job.ckpt} talks with somebody; give it a recording with --user=in.wav instead of a text")
    codec, reference, rows = load_codec(data.codec), (job.ref, job.ref_text) if job.ref else None, []
    for at in range(0, len(texts), job.batch):
        part = texts[at : at + job.batch]
        with WavWriter(job.out, codec.sample_rate) if job.stream else nullcontext() as writer:
            hear = writer and writer.append
            spoken = ([speak_long(model, text, data, job, codec, job.chunk_words, reference, hear) for text in part] if job.chunk_words
                      else speak(model, part, data, job, codec, reference, hear, progress=True))
        for n, (text, speech) in enumerate(zip(part, spoken, strict=True), at):
            path = Path(job.out) / f"{n:03d}.wav" if job.texts else Path(job.out)
            if not job.stream:
                save_wav(path, speech.wav, codec.sample_rate)
            rows.append({"text": text, "wav": str(path.resolve()), "seconds": speech.frames / codec.frame_rate, "ended": speech.ended})
            print(f"{path}: {rows[-1]['seconds']:.1f} s, {'ended by itself' if speech.ended else 'cut at --max_frames'}: {text}")
    if job.texts:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(Path(job.out) / "samples.jsonl", lambda temporary: Path(temporary).write_text(lines, encoding="utf-8"))
        print(f"{job.out}/samples.jsonl: {len(rows)} recordings")


if __name__ == "__main__":
    edge(main)
