"""Sampling: one generator for every family.

    python sample.py --ckpt out/demo --text "four nine two seven" --out x.wav
    out/demo/ckpt/latest: step 650, no adapter; x.wav: 2.4 s, ended by itself

    python sample.py --ckpt out/moshi_lora --user in.wav --out reply.wav
    talks with the recording: left the model, right the user, reply.txt what the model says and when

`generate` yields one frame (B, K) at a time, already un-delayed: text rows as they come, audio rows as soon as every
codebook of a frame exists. Writing a file, streaming and live chat all consume it. The prompt is built by the layout
function that built the training grids. The options of the command line are generation/command_line.py. Next: checkpoint.py.
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from audio.wav import WavWriter, save_wav
from corpus.cache import encode
from corpus.data_config import DataConfig
from corpus.examples import prompt_example, reply_example
from corpus.index import fitting_codec
from families.family import closings, family_of, lay_out
from generation import cuda_graphs
from generation.command_line import Job, load_for_sampling, pair_voices, sayable, usual_rules
from generation.conversation import ChatConfig, chat_in_terminal
from generation.decode_step import Feed, SampleConfig, completed_frame
from generation.dialogue import Persona, UserFeed, behind, conversation_input, make_persona, pauses, user_rows, user_side, write_reply
from generation.plan import plan_sampling
from generation.reply_stream import print_reply
from generation.turns import advance, close_fed, start_state
from layers.conditioning import with_conditions
from model import MultistreamLM
from options import apply, edge, help_text, locate, read_lines, split_arguments, visible, write_rows
from streams import Example
from text.conversation import chunks
from text.normalisers import normalise
from text.tokenizers import load_tokenizer


@torch.inference_mode()
def generate(model: MultistreamLM, prompt: Tensor, config: SampleConfig | None = None, feed: Feed | None = None,
             given: Tensor | None = None, voice: Tensor | None = None, inputs: Tensor | None = None) -> Iterator[Tensor]:
    """Continue a prompt grid (B, K, S) or (K, S); yield frames (B, K) int64 on the host as they become complete.

    Rows that have nothing in a frame hold -1; an item that has ended holds -1 everywhere. Prompts of different lengths are padded on the
    left with columns of -1. `feed(column) -> column` fills the rows that the model only reads (word rows, the user's codes); its
    `may_end()`, if it has one, tells which items may close their audio. `given` (B, K, n) are the ids of the next n columns, FREE where the
    model draws: forced text or codes, or -1 for nothing. `voice` (B, n, F) are voice features of the speakers, for models that attend to
    them; `inputs` (B, n, D) stand for the embeddings of the prompt's first n columns.
    """
    config, table, training = config or SampleConfig(), model.table, model.training
    model.eval()
    prompt = with_conditions(prompt[None] if prompt.dim() == 2 else prompt, table, config.condition)
    K, prompt = prompt.shape[1], prompt.to(model.temporal.layers[0].attn.o.weight.device)
    if K != len(table):
        raise ValueError(f"the prompt has {K} rows, the model's table {len(table)}: {[s.name for s in table.streams]}")
    state = start_state(prompt, table, closings()[config.closing], config.max_speech)
    runner = cuda_graphs.start_runner(model, prompt, config, feed, voice, inputs)
    try:
        for n in range(config.max_frames):
            column = runner(state, given[..., n].cpu() if given is not None and n < given.shape[-1] else None)
            close_fed(state, feed)
            frame = completed_frame(state, column)
            advance(state, column)
            if frame is not None:
                yield frame
            if all(turn.done for turn in state.turns):
                break
    finally:                                                                  # also when the caller stops listening
        if not training:                                                      # between training steps the memory is needed elsewhere
            cuda_graphs.keep_graphs(model, runner)
        model.train(training)


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
    table, tokenizer = model.table, load_tokenizer(data.tokenizer)
    codec = codec or fitting_codec(data.codec, table, tokenizer)
    voice, features = None, family_of(table).voice_features
    if features and voices:
        if model.voice is None:
            raise ValueError("this model takes no voices; leave --ref out")
        voice, voices = features([name for name, _ in voices]).expand(len(texts), -1, -1), ()
    examples = [prompt_example(text, data, tokenizer, codec, voices, table, before) for text in texts]
    return speak_examples(model, examples, config, codec, on_audio, progress, voice)


def speak_examples(model: MultistreamLM, examples: Sequence[Example], config: SampleConfig, codec: object,
                   on_audio: Callable[[Tensor], None] | None = None, progress: bool = False, voice: Tensor | None = None) -> list[Speech]:
    """Speak prompts, examples without codes, as one batch. `voice` as in `generate`."""
    table = model.table
    prompt = pad_left([lay_out(example, table)[0] for example in examples])
    feed = family_of(table).feed
    feed = feed and feed([e.text for e in examples], table)
    frames: list[Tensor] = []
    silent = torch.zeros(len(examples), dtype=torch.bool)                       # whose speech is over in the last frame
    decoder, any_audio = codec.stream() if on_audio else None, False
    bar = tqdm(total=config.max_frames, unit="frame", disable=not (progress and sys.stderr.isatty()))
    for frame in generate(model, prompt, config, feed, voice=voice):
        codes = frame[:, table.codes_out].cpu()                           # the codec may live elsewhere
        silent = torch.isin(frame[:, 0].cpu(), torch.tensor([-1, *table.stop])) if table.flat else (codes < 0).all(1)
        frames.append(codes)
        bar.update()
        if decoder is not None and bool((codes[0] >= 0).all()):
            on_audio(decoder.decode(sounding(codes[:1, :, None], codec))[0])
            any_audio = True
    bar.close()
    if any_audio:
        on_audio(decoder.flush()[0])
    stacked = torch.stack(frames, dim=-1) if frames else torch.empty(len(examples), len(table.codes_out), 0, dtype=torch.long)
    capped = len(frames) >= config.max_frames - (max(table.delays) if table.aligned else 0)
    return [_decoded(codes, codec, not capped or bool(over)) for codes, over in zip(stacked, silent, strict=True)]


def speak_long(model: MultistreamLM, text: str, data: DataConfig, config: SampleConfig, codec: object, limit: int,
               voices: Sequence[tuple[str, str]] = (), on_audio: Callable[[Tensor], None] | None = None, keep: int = 1) -> Speech:
    """Speak a text in pieces of `limit` words, or of speakers' turns; in a conversation each goes on from the last `keep` of them."""
    spoken: list[tuple[str, Speech]] = []
    keep = keep if family_of(model.table).template else 0
    voices = [(name, normalise(said, data.normaliser) if name else said) for name, said in voices]
    normalised = replace(data, normaliser="none")
    for piece in chunks(text, limit, data.normaliser):
        last = [(said, speech.codes) for said, speech in spoken[len(spoken) - min(keep, len(spoken)) :]]
        spoken.append((piece, *speak(model, [piece], normalised, config, codec, voices, on_audio, progress=True, before=last)))
    speeches = [speech for _, speech in spoken]
    codes = torch.cat([speech.codes for speech in speeches], dim=1)
    wav = codec.decode(codes[None])[0] if codes.shape[1] else torch.zeros(1, 0)
    return Speech(wav, all(speech.ended for speech in speeches), codes.shape[1], codes)


def sounding(codes: Tensor, codec: object) -> Tensor:
    """Keep ids inside the codec's tables: a start or end id in the middle of speech sounds like the nearest code."""
    return codes.clamp(max=codec.codebook_size - 1)


def _decoded(codes: Tensor, codec: object, ended: bool) -> Speech:
    spoken = sounding(codes[:, (codes >= 0).all(0)], codec)                  # (Q, T): frames after the end hold -1
    wav = codec.decode(spoken[None])[0] if spoken.shape[1] else torch.zeros(1, 0)
    return Speech(wav, ended, spoken.shape[1], spoken)


def pad_left(grids: Sequence[Tensor]) -> Tensor:
    """Stack prompts (K, S_i) into (B, K, S), columns of -1 on the left."""
    S = max(g.shape[1] for g in grids)
    return torch.stack([torch.nn.functional.pad(g, (S - g.shape[1], 0), value=-1) for g in grids])


def reply(model: MultistreamLM, user: Tensor | None, config: SampleConfig, skip_first_frame: bool = False, conditions: Tensor | None = None,
          given: Tensor | None = None, before: Tensor | None = None, persona: Persona | None = None,
          ends: tuple[int, int] | None = None) -> Tensor:
    """Talk with a recorded user: hear codes (B, Q, T) frame by frame.   -> frames (B, K, T), both sides and the text

    `before` (B, K, t) are the first frames of all rows: the model goes on from there, and `user` is None when it speaks for both
    (max_frames says how long). `conditions` (C, 1) or (B, C, 1) are the ids of the condition rows, `given` as in `generate`.
    `skip_first_frame`: as the official generator, which skips the first frame and yields fewer. Behind a `persona` that is one of its own
    frames, and what is heard after it comes whole. `ends`: frames that the user speaks, and the text id that ends the reply after them.
    """
    table, lag, first, inputs = model.table, max(model.table.delays), 0, None
    if persona is not None:
        front, inputs = persona.of_batch(1 if user is None else len(user), skip_first_frame)
        before = front if before is None else torch.cat([front, before], -1)
        user = user if user is None else torch.cat([front[:, user_rows(table)], user], -1)
        first, skip_first_frame = front.shape[-1], False
    before = torch.empty(len(user), len(table), 0, dtype=torch.long) if before is None else before
    prompt, late = behind(before, table)
    given = late if given is None else given
    if conditions is not None:
        prompt[:, table.conditions] = conditions
    feed, columns = None, config.max_frames + lag
    if user is not None:
        feed, columns = UserFeed(user, table, skip_first_frame, prompt.shape[-1]), user.shape[-1] - before.shape[-1]
        columns += lag * (not skip_first_frame)
    made = generate(model, prompt, replace(config, max_frames=columns), feed, given, inputs=inputs)
    frames: list[Tensor] = []
    for frame in tqdm(made, total=columns, unit="frame", disable=None):
        frames.append(frame.cpu())
        if ends is not None and len(frames) > ends[0] - lag and bool((frames[-1][:, 0] == ends[1]).all()):
            break
    return torch.cat([before[..., : max(before.shape[-1] - lag, 0)], torch.stack(frames, dim=-1)], -1)[..., first:]


# ---- the command line ----

def chat(job: Job, given: Collection[str]) -> None:
    """Hold a conversation at the terminal."""
    if said := [name for name in ("text", "texts", "user", "prompt") if getattr(job, name)]:
        raise ValueError(f"--chat reads what is said line by line; leave --{said[0]} out")
    model, data = load_for_sampling(job)
    job = replace(job, **usual_rules(model.table, given, model.extras))
    chat_in_terminal(model.table, data, job.chat, lambda prompt: generate(model, prompt, job), job.reply, job.out)


def answer_recording(job: Job, given: Collection[str]) -> None:
    """Answer the recording job.user, or go on with the dialogue job.prompt: both sides as a stereo wav, and a transcript.

    `given` are the options that the user chose; other sampling rules are the family's own.
    """
    model, data = load_for_sampling(job)
    table, family = model.table, family_of(model.table)
    turns = family.user_audio == "turns" and bool(job.user)
    if not turns and family.user_audio != "duplex":
        option, what = ("--user", "listens") if job.user else ("--prompt", "hears both sides at once")
        raise ValueError(f"{option} needs a model that {what}, {job.ckpt} is a {family.name} model; give it --text")
    job = replace(job, **usual_rules(table, given, model.extras))
    tokenizer = load_tokenizer(data.tokenizer)
    codec = fitting_codec(data.codec, table, tokenizer)
    if turns:
        codes = encode(codec, user_side(job.user, codec.sample_rate, dialogue=False))
        asked = {"role": "user", "content": [{"type": "audio", "audio_url": job.user}]}
        prompt = lay_out(reply_example([asked], [codes], data, tokenizer, table, job.reply), table)[0]
        return print_reply(generate(model, prompt, job), table, tokenizer, "" if job.reply == "text" else job.out, codec)
    persona = make_persona(data.system if family.persona else job.system or "", job.ref, codec, tokenizer, table)
    before, user, wav = conversation_input(job, codec, tokenizer, table, data)
    job = replace(job, max_frames=round(job.seconds * codec.frame_rate))
    ends = (int(-(-wav.shape[1] * codec.frame_rate // codec.sample_rate)), family.ends) if job.user and family.ends is not None else None
    frames = reply(model, user, job, job.skip_first_frame, before=before, persona=persona, ends=ends)[0]       # (K, T)
    print(write_reply(job.out, frames, None if job.prompt else wav, codec, tokenizer, table, pauses(model, frames)))


def speak_texts(job: Job, texts: list[str], voices: Sequence[tuple[str, str]] = (), given: Collection[str] = ()) -> None:
    """Speak texts, a batch at a time, into job.out: one wav, or with --texts a folder of them and samples.jsonl."""
    model, data = load_for_sampling(job)
    if family_of(model.table).user_audio == "duplex":
        raise ValueError(f"{job.ckpt} talks with somebody; give it a recording with --user=in.wav instead of a text")
    job = replace(job, **usual_rules(model.table, given, model.extras))
    tokenizer = load_tokenizer(data.tokenizer)
    named = list(enumerate(texts) if not job.texts else sayable(texts, data, tokenizer, model.table))
    if not model.table.codes_out or job.reply == "text":
        for _, text in named:
            prompt = lay_out(prompt_example(text, data, tokenizer, table=model.table, reply="text"), model.table)[0]
            print_reply(generate(model, prompt, job), model.table, tokenizer)
        return
    codec, rows = fitting_codec(data.codec, model.table, tokenizer), []
    for at in range(0, len(named), job.batch):
        numbers, part = zip(*named[at : at + job.batch], strict=True)
        with WavWriter(job.out, codec.sample_rate) if job.stream else nullcontext() as writer:
            hear = writer and writer.append
            long = job.chunk_words and [speak_long(model, text, data, job, codec, job.chunk_words, voices, hear, job.chunk_buffer)
                                        for text in part]
            spoken = long or speak(model, part, data, job, codec, voices, hear, progress=True)
        for n, text, speech in zip(numbers, part, spoken, strict=True):
            path = Path(job.out) / f"{n:03d}.wav" if job.texts else Path(job.out)
            if not job.stream:
                save_wav(path, speech.wav, codec.sample_rate)
            rows.append({"text": text, "wav": str(path.resolve()), "seconds": speech.frames / codec.frame_rate, "ended": speech.ended})
            print(f"{path}: {rows[-1]['seconds']:.1f} s, {'ended by itself' if speech.ended else 'cut at --max_frames'}: {visible(text)}")
    if job.texts:
        write_rows(Path(job.out) / "samples.jsonl", rows)
        print(f"{job.out}/samples.jsonl: {len(rows)} recordings")


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help", "stream", "chat", "plan"), ("ref", "ref_text"))
    if "help" in pairs or not sys.argv[1:]:
        return print(help_text(Job(), "python sample.py --ckpt out/demo --text 'four nine two seven' --out x.wav"))
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options look like --text=\"...\"")
    card = pairs.pop("plan", None)                   # what it needs in memory; nothing is loaded
    if pairs.get("stream") == "":
        pairs["stream"] = "true"
    pairs |= {name: str(locate(pairs[name])) for name in ("user", "prompt") if pairs.get(name)}
    job = apply(Job(chat=ChatConfig() if pairs.pop("chat", "false") != "false" else None), pairs)
    if card is not None:
        return print(*plan_sampling(job, card), sep="\n")
    if job.chat is not None:
        return chat(job, pairs.keys())
    if job.user or job.prompt:
        return answer_recording(job, pairs.keys())
    texts = read_lines(job.texts) if job.texts else [job.text]
    if not any(text.strip() for text in texts):
        raise ValueError("nothing to say; add --text=\"...\" or --texts=FILE with one text a line")
    voices = pair_voices(job.ref, job.ref_text, texts)
    if job.stream and job.texts:
        raise ValueError("--stream writes one growing wav; use it with --text, not with --texts")
    speak_texts(job, texts, voices, pairs.keys())


if __name__ == "__main__":
    edge(main)
