"""Sampling: one generator for every family.

    python sample.py --ckpt out/demo --text "four nine two seven" --out x.wav
    out/demo/ckpt/latest: step 650, no adapter; x.wav: 2.4 s, ended by itself

    python sample.py --ckpt out/moshi_lora --user in.wav --out reply.wav
    talks with the recording: left the model, right the user, reply.txt what the model says and when

`generate` yields one frame (B, K) at a time, already un-delayed: text rows as they come, audio rows as soon as every
codebook of a frame exists. Writing a file, streaming and live chat all consume it. The prompt is built by the layout
function that built the training grids. Next: checkpoint.py.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import replay
from audio import load_codec
from audio.wav import load_wav
from cache import encode
from chatml import chunks
from data import DataConfig, load_tokenizer, prompt_example
from dialogue import mean, measure_file, write_reply
from drawing import Feed, SampleConfig, complete
from duplex import UserFeed, moshi_rules
from model import MultistreamLM
from options import edge
from streams import FEEDS, Example, delay, lay_out
from turns import finish, start_state

# ---- the generator ----

@torch.inference_mode()
def generate(model: MultistreamLM, prompt: Tensor, config: SampleConfig | None = None, feed: Feed | None = None,
             given: Tensor | None = None, voice: Tensor | None = None) -> Iterator[Tensor]:
    """Continue a prompt grid (B, K, S) or (K, S); yield frames (B, K) int64 on the host as they become complete.

    Rows that have nothing in a frame hold -1; an item that has ended holds -1 everywhere. Prompts of different lengths
    are padded on the left with columns of -1. `feed(column) -> column` fills the rows that the model only reads (word
    rows, the user's codes); its `may_end()`, if it has one, tells which items may close their audio. `given` (B, K, n)
    are the ids of the next n columns, FREE where the model draws: forced text or codes, or -1 for nothing. `voice` (B, n, F)
    are features of the speakers, where the model listens to them.
    """
    config, table, training = config or SampleConfig(), model.table, model.training
    model.eval()
    prompt = (prompt[None] if prompt.dim() == 2 else prompt).to(model.temporal.layers[0].attn.o.weight.device)
    K = prompt.shape[1]
    if K != len(table):
        raise ValueError(f"the prompt has {K} rows, the model's table {len(table)}: {[s.name for s in table.streams]}")
    state = start_state(prompt, table, config.closing, config.max_speech)
    runner = replay.start(model, prompt, config, feed, voice)
    try:
        for n in range(config.max_frames):
            column = runner(state, given[..., n].cpu() if given is not None and n < given.shape[-1] else None)
            frame = complete(state, column)
            finish(state, column)
            if frame is not None:
                yield frame
            if all(turn.done for turn in state.turns):
                break
    finally:                                                                  # also when the caller stops listening
        if not training:                                                      # between steps of training memory is wanted elsewhere
            replay.keep(model, runner)
        model.train(training)


# ---- text to speech ----

@dataclass
class Speech:
    """What came of one text: wav (1, W) at the codec's rate, and whether the model ended it before the length cap."""

    wav: Tensor
    ended: bool
    frames: int
    codes: Tensor = field(default_factory=lambda: torch.empty(0, 0))            # (Q, T)


def speak(model: MultistreamLM, texts: Sequence[str], data: DataConfig, config: SampleConfig, codec: object | None = None,
          voices: Sequence[tuple[str, str]] = (), on_audio: Callable[[Tensor], None] | None = None,
          progress: bool = False, before: Sequence[tuple[str, Tensor]] = ()) -> list[Speech]:
    """Speak texts as one batch. `voices` are (wav file, its transcript); `on_audio` gets the first one's (1, n) samples early.

    A conversation goes on behind `before`, pairs of text and codes (Q, T) that were spoken already.
    """
    codec, tokenizer, table = codec or load_codec(data.codec), load_tokenizer(data.tokenizer), model.table
    examples = [prompt_example(text, data, tokenizer, codec, voices, table, before) for text in texts]
    return speak_examples(model, examples, config, codec, on_audio, progress)


def speak_examples(model: MultistreamLM, examples: Sequence[Example], config: SampleConfig, codec: object,
                   on_audio: Callable[[Tensor], None] | None = None, progress: bool = False) -> list[Speech]:
    """Speak prompts, examples without codes, as one batch."""
    table = model.table
    prompt = pad_left([lay_out(example, table)[0] for example in examples])
    feed = FEEDS[table.layout]([e.text for e in examples], table) if table.layout in FEEDS else None
    frames: list[Tensor] = []
    decoder, heard = codec.stream() if on_audio else None, False
    bar = tqdm(total=config.max_frames, unit="frame", disable=not (progress and sys.stderr.isatty()))
    for frame in generate(model, prompt, config, feed):
        codes = frame[:, table.audio_out].cpu()                           # the codec may live elsewhere
        frames.append(codes)
        bar.update()
        if decoder is not None and bool((codes[0] >= 0).all()):
            on_audio(decoder.decode(sounding(codes[:1, :, None], codec))[0])
            heard = True
    bar.close()
    if heard:
        on_audio(decoder.flush()[0])
    stacked = torch.stack(frames, dim=-1) if frames else torch.empty(len(examples), len(table.audio_out), 0, dtype=torch.long)
    capped = len(frames) >= config.max_frames - (max(table.delays) if table.aligned else 0)
    return [_decoded(codes, codec, capped) for codes in stacked]


def speak_long(model: MultistreamLM, text: str, data: DataConfig, config: SampleConfig, codec: object, limit: int,
               voices: Sequence[tuple[str, str]] = (), on_audio: Callable[[Tensor], None] | None = None, keep: int = 1) -> Speech:
    """Speak a text in pieces of `limit` words, or of speakers' turns; in a conversation each goes on from the last `keep` of them."""
    spoken: list[tuple[str, Speech]] = []
    for piece in chunks(text, limit):
        last = [(said, speech.codes) for said, speech in spoken[len(spoken) - min(keep, len(spoken)) :] if model.table.layout == "chatml"]
        spoken.append((piece, *speak(model, [piece], data, config, codec, voices, on_audio, progress=True, before=last)))
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


def answer(model: MultistreamLM, recordings: Sequence[str], data: DataConfig, codec: object, folder: Path) -> dict[str, float]:
    """Answer recordings, of a stereo one its right side, into wavs of `folder`; returns how the conversations went (dialogue.py)."""
    tokenizer, rows = load_tokenizer(data.tokenizer), []
    for path in recordings:
        user = load_wav(path, codec.sample_rate, None)[0][-1:]
        frames = reply(model, encode(codec, user)[None], SampleConfig(**moshi_rules(len(model.table.audio_out))))[0]
        write_reply(folder / f"{Path(path).stem}.wav", frames, user, codec, tokenizer, model.table)
        rows.append(measure_file(folder / f"{Path(path).stem}.wav"))
    return mean(rows)


if __name__ == "__main__":
    from cli import main  # the command line stands one floor up, and is all that this file is as a script
    edge(main)
