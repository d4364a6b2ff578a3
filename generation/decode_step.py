"""One column of a generation: what is drawn by the rules, fed, given or held, and the frame that it completes.

    text row  ->  rows that are only read (feed)  ->  audio rows, all at once or codebook by codebook  ->  the model reads it

`DecodeStep` does that without looking at a single value, so that a graph can be captured of it (cuda_graphs.py); whoever runs it
column after column decides what must stand in them: `EagerRunner` here. Where the items stand between text and speech is
turns.py; how a row of logits becomes an id is kernels/sample.py. Next: sample.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from families.family import closings
from generation.guidance import Guidance
from generation.turns import FREE, DecodeState, flat_frames, next_is_audio, recent_codes, required_ids, with_endings
from kernels.attention import KVCache
from kernels.choice import device_constant, use_triton
from kernels.sample import gumbel, sample
from model import MultistreamLM

Feed = Callable[[Tensor], Tensor]
Rule = float | tuple[float, ...]
Rules = tuple[float | Tensor | None, ...]


@dataclass(frozen=True)
class SampleConfig:
    """How tokens are sampled. A rule is one value, or one for each predicted stream (text first)."""

    temperature: Rule = 0.3         # sampling temperature; 0 = greedy
    top_k: Rule = 0                 # sample among the k most likely ids, 0 = all
    top_p: Rule = 1.0               # sample among the most likely ids that together have this probability, 1 = all
    min_p: Rule = 0.0               # drop ids whose probability is below this share of the most likely one, 0 = none
    ras_window: int = 0             # repetition-aware sampling: look back this many columns, 0 = off
    ras_repeats: int = 2            # with ras_window: sample again from all ids when a code occurs this often in the window
    repetition_penalty: float = 1.0 # ids of the text row, prompt included, else first codes drawn: logits / p, or * p below 0; 1 = off
    max_frames: int = 500           # largest number of columns to generate
    min_frames: int = 0             # columns before which nothing may end
    max_speech: int = 0             # frames after which a speech segment is closed; text may follow; 0 = when the model closes it
    cfg: float = 1.0                # classifier-free guidance scale; 1 = off
    condition: str = ""             # Hibiki: description=very_good; Qwen3-TTS: language=english,speaker=vivian
    cfg_condition: str = ""         # guidance: the condition of the unguided side, description=very_bad; "" = it has none
    cfg_no_text: bool = False       # guidance: the unguided side reads no text
    cfg_hide: int = 0               # guidance: the unguided side does not read this many frames at the beginning
    closing: str = "frame"          # how audio ends: "frame" as trained, or as an official implementation does (python -m families)
    graphs: str = "auto"            # CUDA graphs: "on", "off", or "auto" = where the model can be captured
    seed: int = 0                   # random seed; item i of a batch uses seed + i, whatever the batch

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            rule = getattr(self, name)
            assert all(v >= 0 for v in (rule if isinstance(rule, tuple) else (rule,))), f"{name} {rule} is negative"
        assert self.repetition_penalty > 0, f"repetition_penalty {self.repetition_penalty} is not positive"
        assert self.closing in closings(), f"closing {self.closing!r} is none of {', '.join(closings())}"
        assert self.graphs in ("auto", "on", "off"), f"graphs {self.graphs!r} is none of auto, on, off"
        assert 0 < self.max_frames <= 2**24, f"max_frames {self.max_frames} is not in 1..2^24"


@cache         # a captured graph reads these tensors where they lie
@torch.inference_mode(False)
def sampling_rules(given: tuple[Rule, Rule, Rule, Rule], start: int, stop: int, items: int, device: torch.device) -> Rules:
    """Temperature, top-k, top-p and min-p of the predicted streams start..stop-1, as kernels/sample.py takes them, made once."""
    rules: list[float | Tensor | None] = []
    for rule, nothing, kind in zip(given, (None, 0, 1, 0), (float, int, float, float), strict=True):
        values = [kind(v) for v in (rule[start:stop] if isinstance(rule, tuple) else (rule,) * (stop - start))]
        if len(values) != stop - start:
            raise ValueError(f"a sampling rule has {len(rule)} values, the model predicts more streams; give one value or one for each")
        same = len(set(values)) == 1
        rules.append(None if same and values[0] == nothing else values[0] if same else torch.tensor(values * items, device=device))
    return tuple(rules)


class SamplingNoise:
    """What draws depend on: a number for each item and predicted stream, and that of the column; all on the device.

    An item of a batch draws what it draws alone. Two numbers a stream: where a draw is repeated it takes the second.
    """

    def __init__(self, seed: int, items: int, streams: int, device: torch.device) -> None:
        self.step, self.items = torch.zeros((), dtype=torch.int64, device=device), items
        self.words = torch.arange(1, 2 * streams + 1).view(streams, 2) << 32
        self.parts: dict[tuple[int, int, bool], Tensor] = {}
        self.ready: dict[int, Tensor] = {}                  # noise (B, V) of streams that one column draws one after the other
        self.start(seed)

    def start(self, seed: int) -> None:
        """Begin anew, in the same memory. Item i draws from seed + i."""
        own = (torch.arange(self.items) + seed) & 0xFFFFFFFF
        self.seeds = (own[:, None, None] | self.words).to(self.step.device)                              # (B, streams, 2)
        self.step.zero_()
        for (first, last, again), part in self.parts.items():
            part.copy_(self.seeds[:, first:last, int(again)].flatten())

    def rules(self, config: SampleConfig, rows: slice) -> Rules:
        """What `sample` takes of the rules of the predicted streams `rows`."""
        given = config.temperature, config.top_k, config.top_p, config.min_p
        return sampling_rules(given, rows.start, rows.stop, self.items, self.step.device)

    def greedy(self, config: SampleConfig) -> bool:
        """Whether every draw takes the likeliest id."""
        return config.temperature == 0 and not config.ras_window

    @property
    def columns(self) -> Tensor:
        """Columns drawn so far, () or (B, 1)."""
        return self.step

    def advance(self, moves: Tensor | bool = True) -> None:
        """A column was drawn and read."""
        self.step.add_(moves)

    def of(self, rows: slice, again: bool = False) -> Tensor:
        """Seeds of the predicted streams `rows` of all items.   -> (B * R,)"""
        key = rows.start, rows.stop, again
        if key not in self.parts:
            self.parts[key] = self.seeds[:, rows, int(again)].flatten()
        return self.parts[key]

    def prepare(self, rows: slice, V: int) -> None:
        """Make the noise of several streams at once: a dozen operations that each would need by itself."""
        made = gumbel(self.of(rows), self.step, V).view(self.items, -1, V).unbind(1)
        self.ready = dict(zip(range(rows.start, rows.stop), made, strict=True))


def sample_ids(logits: Tensor, config: SampleConfig, rows: slice, noise: SamplingNoise, history: Tensor | None = None) -> Tensor:
    """Draw one id for each row.   logits (B, R, V) fp32, `rows` the places of R among the predicted streams -> (B, R)

    Repetition-aware (VALL-E 2): an id that stands `ras_repeats` times in its row's `history` (B, R, n) is drawn again, without rules.
    """
    if noise.greedy(config):
        return logits.argmax(-1)                                              # the rules keep the likeliest
    (B, R, _), flat = logits.shape, logits.flatten(0, 1)
    drawn = sample(flat, *noise.rules(config, rows), noise.of(rows), noise.step, noise.ready.pop(rows.start, None)).view(B, R)
    if history is None or not config.ras_window:
        return drawn
    seen = (history[..., -config.ras_window :] == drawn[..., None]).sum(-1)
    again = sample(flat, 1.0, None, None, None, noise.of(rows, again=True), noise.step).view(B, R)
    return torch.where(seen >= config.ras_repeats, again, drawn)


def hide(logits: Tensor, start: int, stop: int) -> None:
    """The ids start..stop-1 cannot be drawn."""
    if start < stop:
        logits[..., start:stop] = -torch.inf


class ColumnKind(NamedTuple):
    """Which heads a column needs, and whether it is an audio column: for all items, None if they differ or it is unknown."""

    text: bool
    audio: bool
    side: bool | None


def column_kind(state: DecodeState, given: bool = False) -> ColumnKind:
    table, side = state.table, next_is_audio(state)
    text, audio = table.aligned or side is not True, table.aligned or side is not False
    return ColumnKind(text and bool(table.text_out), audio and bool(table.audio_out), None if given else side)


class DecodeStep:
    """Draws a column from the states of the one before it, and reads it. Nothing here waits for the device."""

    def __init__(self, model: MultistreamLM, prompt: Tensor, config: SampleConfig, columns: int, feed: Feed | None = None,
                 voice: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """prompt (B, K, S) on the model's device, padded on the left; room for `columns` columns. `inputs` as in `generate`."""
        B, table, device = len(prompt), model.table, prompt.device
        self.model, self.table, self.config, self.columns = model, table, config, columns
        self.feed = feed.to(device) if hasattr(feed, "to") else feed
        self.fed = [k for k in getattr(feed, "rows", ()) if k in table.audio_out]         # what is heard overrides what is drawn
        self.guide = Guidance(config, table)
        sides = 2 * B if self.guide.on else B                                 # rows that the model reads
        self.cache, self.depth = model.cache(sides, columns), model.depth.cache(sides) if model.config.depth else None
        self.cache.voice = self.guide.voice_features(model, voice)
        self.noise = SamplingNoise(config.seed, B, len(table.text_out) + len(table.audio_out), device)
        first = table.streams[table.audio_out[0]] if table.audio_out else None
        self.end, self.codes = (first.end, first.code_count) if first else (-1, 0)
        self.seen, self.first = None, (*table.text_out, *table.audio_out)[0]  # which ids of the first row occurred (B, V + 1); V = none
        if config.repetition_penalty != 1:
            self.seen = torch.zeros(B, table.streams[self.first].classes + 1, dtype=torch.bool, device=device)
        self.begin(prompt, inputs)

    def again(self, prompt: Tensor, seed: int, inputs: Tensor | None = None) -> None:
        """Start over, in the same memory, behind a prompt of the same batch size."""
        self.noise.start(seed)
        self.cache.clear()
        self.begin(prompt, inputs)

    def begin(self, prompt: Tensor, inputs: Tensor | None = None) -> None:
        """Read the prompt."""
        self.padding = (prompt < 0).all(1).cumprod(1).sum(1)                  # (B,) columns of -1 on the left
        self.position = (prompt.shape[2] - self.padding)[:, None]             # (B, 1) of the column that is read next
        self.recent = recent_codes(prompt, self.table, self.config.ras_window) if self.config.ras_window else None
        if self.seen is not None:
            self.seen.zero_()
            if self.table.text_out:
                self.see(prompt)
        self.h = prefill(self.model, prompt, self.padding, self.cache, self.guide, inputs)

    def draw(self, known: Tensor, kind: ColumnKind, free: bool = False) -> Tensor:
        """The next column (B, K).   known (B, K) as in turns.py, `free`: every id that is drawn is free"""
        config, table, row = self.config, self.table, self.table.text_out[0] if self.table.text_out else 0
        h_text, h_audio = (x[:, -1] for x in self.h)                          # (B, 1, D) -> (B, D)
        column = known.clamp(min=-1)
        if kind.text:
            logits = self.penalised(self.guide.mix(self.model.text_head(h_text), text=True).float())[:, None]
            if config.min_frames:
                for id in table.stop:
                    logits[..., id].masked_fill_(self.noise.columns < config.min_frames, -torch.inf)
            column[:, row] = self.kept(sample_ids(logits, config, slice(0, 1), self.noise)[:, 0], known[:, row], free)
        if self.feed is not None:
            fills = device_constant(tuple(s.fill if s.fill >= 0 else FREE for s in table.streams), column.device)
            column = self.feed(column)
            column = column if free else torch.where((known == FREE) | (known == fills), column, known)
            if self.fed:
                known, free = known.clone(), False
                known[:, self.fed] = column[:, self.fed]
        if kind.audio:
            self.draw_audio(h_audio, column, known, free)
        return column

    def see(self, columns: Tensor, moves: Tensor | bool = True) -> None:
        """Note the ids of the first predicted row.   columns (B, K, n)"""
        ids, V = columns[:, self.first], self.seen.shape[1] - 1
        real = (ids >= 0) & (ids < V)
        self.seen.scatter_(1, torch.where(real if moves is True else real & moves, ids, V), True)

    def penalised(self, logits: Tensor) -> Tensor:
        """Logits (B, V) of the first predicted row: ids that occurred become less likely."""
        if self.seen is None:
            return logits
        p = self.config.repetition_penalty
        return torch.where(self.seen[:, : logits.shape[1]], torch.where(logits > 0, logits / p, logits * p), logits)

    @staticmethod
    def kept(drawn: Tensor, known: Tensor, free: bool) -> Tensor:
        """What was drawn, where nothing is known."""
        return drawn if free else torch.where(known == FREE, drawn, known)

    def draw_audio(self, h: Tensor, column: Tensor, known: Tensor, free: bool) -> None:
        """Fill the predicted audio rows of a column in place: all at once, or step by step through the depth transformer."""
        model, table, config, end = self.model, self.table, self.config, self.end
        out, held, first, history = column[:, self.table.spoken], known[:, self.table.spoken], len(table.text_out), self.recent      # views
        predicted = [table.streams[k] for k in table.audio_out]
        Q, may_end = len(predicted), getattr(self.feed, "may_end", lambda: None)()
        if history is not None and closings()[config.closing].by_row:                    # start and end ids do not count as repetition
            starts, ends = (device_constant(tuple(ids), h.device)[:, None]
                            for ids in zip(*((s.start, s.end) for s in predicted), strict=True))
            history = history.masked_fill((history == starts) | (history == ends), -1)

        def choose(logits: Tensor, at: slice) -> Tensor:
            logits = self.guide.mix(logits).float()
            own_end = 0 <= end < logits.shape[-1] and not table.joint_end     # otherwise it is a code like others, or not in this head
            if at.start == first == 0:
                logits[:, 0] = self.penalised(logits[:, 0])
            if own_end:                                                       # ids before it are no codes, those behind it pad the table
                hide(logits, self.codes or end, end)
                hide(logits, end + 1, logits.shape[-1])
            if end >= 0 and config.min_frames and (own_end or at.start == 0):
                logits[..., end].masked_fill_(self.noise.columns < config.min_frames, -torch.inf)      # `columns` is () or (B, 1)
            if own_end and may_end is not None:
                logits[..., end].masked_fill_(~may_end[:, None], -torch.inf)
            places = slice(first + at.start, first + at.stop)
            return sample_ids(logits, config, places, self.noise, None if history is None else history[:, at])

        if self.depth is None:
            drawn = choose(model.audio_logits(h, column[:, :0]).transpose(0, 1), slice(0, Q))
            out.copy_(self.kept(drawn, held, free))
            return
        greedy = self.noise.greedy(config) and may_end is None and end < 0
        if not greedy and not use_triton(h):
            own = int(model.config.depth.prefix)                              # the first codebook has a head, and noise, of its own
            self.noise.prepare(slice(first + own, first + Q), model.depth.head.weight.shape[-2])
        token = column[:, table.text[0] : table.text[0] + model.depth.texts]
        written = table.aligned and model.depth.texts == 1 and table.text[:1] == table.text_out       # the model wrote that row itself
        for k in range(Q):
            logits = model.codebook_logits(k, h, self.guide.twice(token), self.depth, known=free and (k > 0 or written))
            drawn = self.guide.mix(logits).argmax(-1) if greedy else choose(logits[:, None], slice(k, k + 1))[:, 0]
            out[:, k] = token = self.kept(drawn, held[:, k], free)

    def read(self, column: Tensor, kind: ColumnKind, moves: Tensor | bool = True) -> None:
        """Let the model read a column (B, K); with `moves` false () nothing of it remains."""
        if self.recent is not None and kind.audio:
            newer = torch.cat([self.recent[..., 1:], column[:, self.table.spoken, None]], -1)
            spoken = (column[:, self.table.spoken] >= 0).any(1)[:, None, None] & moves
            self.recent.copy_(torch.where(spoken, newer, self.recent))
        if self.seen is not None:
            self.see(column[..., None], moves)
        at, self.cache.side = self.position, kind.side
        h = self.model.hidden(self.guide.both(column[..., None], at), self.guide.twice(at), cache=self.cache)
        self.h = h if moves is True else tuple(old.copy_(torch.where(moves, new, old)) for old, new in zip(self.h, h, strict=True))
        self.position.add_(moves)
        self.noise.advance(moves)


class EagerRunner:
    """Runs a `DecodeStep` column by column: what must stand in a column is decided on the host when the one before is known."""

    def __init__(self, decode_step: DecodeStep) -> None:
        self.decode_step, self.drawn = decode_step, None

    def __call__(self, state: DecodeState, given: Tensor | None) -> Tensor:
        """The next column (B, K), on the host."""
        decode_step = self.decode_step
        if self.drawn is not None:
            decode_step.read(*self.drawn)
        (known, free), kind = required_ids(state, given), column_kind(state, given is not None)
        column = decode_step.draw(known.to(decode_step.position.device), kind, free).cpu()
        column = with_endings(state, column, given)
        self.drawn = column.to(decode_step.position.device), kind
        return column


def prefill(model: MultistreamLM, prompt: Tensor, padding: Tensor, cache: KVCache, guide: Guidance,
            inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Read the prompt into the cache, piece by piece; -> states of its last column, (B, 1, D) twice"""
    chunk = model.config.temporal.chunk
    if bool((prompt >= model.table.column("vocab").to(prompt.device)).any()):
        raise ValueError(f"the prompt holds ids above the vocabulary: up to {prompt.amax((0, 2)).tolist()} in rows of "
                         + f"{[s.vocab for s in model.table.streams]} ids; use the tokenizer and the codec that belong to the model")
    positions = torch.arange(prompt.shape[2], device=prompt.device)[None] - padding[:, None]
    positions = positions.clamp(min=-1)                                       # padding has position -1 and is never seen
    prompt, positions = guide.both(prompt, positions), guide.twice(positions)
    for at in range(0, prompt.shape[2], chunk):
        own = None if inputs is None or at >= inputs.shape[1] else guide.twice(inputs[:, at : at + chunk].to(prompt.device))
        h = model.hidden(prompt[..., at : at + chunk], positions[:, at : at + chunk], cache=cache, inputs=own)
    return h[0][:, -1:], h[1][:, -1:]


def completed_frame(state: DecodeState, column: Tensor) -> Tensor | None:
    """The newest frame (B, K) that a column completes, -1 where an item has none; None when an aligned layout has none at all.

    In a flat table Q rows of codes stand behind the text row.
    """
    frame, lag, lead = state.undelay.push(column), state.undelay.lag, state.table.lead
    real = [turn.speaking and 0 <= turn.count - 1 - lag < turn.closed for turn in state.turns]
    for b, turn in enumerate(state.turns):
        if turn.done:
            frame[b] = -1
        elif not real[b]:
            frame[b, lead:] = -1
    if state.table.flat:
        return torch.cat([frame, flat_frames(state, column)], 1)
    return frame if any(real) or not state.table.aligned else None
