"""One column of a generation: what is drawn by the rules, fed, given or held, and the frame that it completes.

    text row  ->  rows that are only read (feed)  ->  audio rows, all at once or codebook by codebook

sample.py runs it column after column. Where the items stand between text and speech is turns.py; how a row of logits
becomes an id is kernels/sample.py. Next: sample.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from guidance import Guidance
from kernels.attention import Cache
from kernels.sample import Noise, Rules, sample
from model import MultistreamLM
from turns import FREE, DecodeState, forced, settle

Feed = Callable[[Tensor], Tensor]
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
    min_frames: int = 0             # columns in which nothing may end yet
    max_speech: int = 0             # frames of speech after which it is closed, not cut: text may follow; 0 = when the model closes it
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


def draw(logits: Tensor, config: SampleConfig, rows: slice, noise: Noise, history: Tensor | None = None) -> Tensor:
    """Draw one id for each row.   logits (B, R, V) fp32, `rows` the places of R among the predicted streams -> (B, R)"""
    if config.temperature == 0 and not config.ras_window:
        return logits.argmax(-1)                                              # the rules keep the likeliest
    rules = rules_of(config, rows.start, rows.stop, logits.dtype, logits.device)
    recent = history[..., -config.ras_window :] if history is not None and config.ras_window > 0 else None
    return sample(logits, rules, noise, rows, recent, config.ras_repeats)


@lru_cache(maxsize=256)
def rules_of(config: SampleConfig, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Rules:
    """Temperature, top-k, top-p and min-p of the predicted streams start..stop-1, made once."""
    rules = []
    for rule in (config.temperature, config.top_k, config.top_p, config.min_p):
        values = rule[start:stop] if isinstance(rule, tuple) else (rule,) * (stop - start)
        if len(values) != stop - start:
            raise ValueError(f"a sampling rule has {len(rule)} values, the model predicts more streams; give one value or one for each")
        rules.append(values)
    plain = not any(rules[1]) and min(rules[2]) >= 1 and not any(rules[3])
    return Rules(*(torch.tensor(values, dtype=dtype, device=device)[:, None] for values in rules), plain)


def prefill(model: MultistreamLM, prompt: Tensor, padding: Tensor, cache: Cache, guide: Guidance,
            chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Read the prompt into the cache, `chunk` columns at a time; -> states of its last column, (B, 1, D) twice"""
    if bool((prompt >= model.table.column("vocab").to(prompt.device)).any()):
        raise ValueError(f"the prompt holds ids above the vocabulary: up to {prompt.amax((0, 2)).tolist()} in rows of "
                         + f"{[s.vocab for s in model.table.streams]} ids; use the tokenizer and the codec that belong to the model")
    positions = torch.arange(prompt.shape[2], device=prompt.device)[None] - padding[:, None]
    positions = positions.clamp(min=-1)                                       # padding has position -1 and is never seen
    prompt, positions = guide.both(prompt, positions), guide.twice(positions)
    for at in range(0, prompt.shape[2], chunk):
        h = model.hidden(prompt[..., at : at + chunk], positions[:, at : at + chunk], cache=cache)
    return h[0][:, -1:], h[1][:, -1:]


def next_column(model: MultistreamLM, h: tuple[Tensor, Tensor], state: DecodeState, config: SampleConfig, noise: Noise,
                feed: Feed | None) -> Tensor:
    """Sample the next column (B, K): the text row, what `feed` fills or is given, then the audio rows."""
    table, speaking, owed = model.table, [turn.speaking for turn in state.turns], [turn.owed for turn in state.turns]
    h_text, h_audio = (x[:, -1] for x in h)                                   # (B, 1, D) -> (B, D)
    column = torch.full((len(speaking), len(table)), -1, device=h_text.device)
    if table.conditions:
        column[:, table.conditions] = state.undelay.newest()[:, table.conditions]
    if table.text_out and (table.aligned or not all(speaking)):
        logits = state.guide.mix(model.text_head(h_text), text=True).float()[:, None]
        if noise.column < config.min_frames:
            logits[..., list(table.stop)] = -torch.inf
        drawn = draw(logits, config, slice(0, 1), noise)[:, 0]
        if max(owed) >= 0 or any(speaking) and not table.aligned:
            fixed = torch.tensor([-1 if s and not table.aligned else FREE if o < 0 else o for s, o in zip(speaking, owed, strict=True)])
            drawn = torch.where(fixed.to(drawn.device) == FREE, drawn, fixed.to(drawn.device))
        column[:, table.text_out[0]] = drawn
    if feed is not None:
        column = feed(column)
    if state.given is not None:
        column = torch.where(state.given == FREE, column, state.given)
    if table.audio_out and any(speaking):
        sample_audio(model, h_audio, column, state, config, noise, feed.may_end().to(column.device) if hasattr(feed, "may_end") else None)
    return column


def sample_audio(model: MultistreamLM, h: Tensor, column: Tensor, state: DecodeState, config: SampleConfig,
                 noise: Noise, may_end: Tensor | None) -> None:
    """Fill the predicted audio rows of a column in place: all at once, or step by step through the depth transformer."""
    table, rows, first = model.table, model.table.audio_out, len(model.table.text_out)
    end, out = table.streams[rows[0]].end, column[:, rows[0] : rows[-1] + 1]   # `out` is a view
    history = state.heard                                                     # (B, Q, n)
    if config.closing == "hf":                                                # start and end ids do not count as repetition
        edges = torch.tensor(state.edges, device=h.device)[..., None]         # (Q, 3, 1)
        history = history.masked_fill((history == edges[:, 0]) | (history == edges[:, 1]), -1)

    greedy = config.temperature == 0 and not config.ras_window and may_end is None

    def choose(logits: Tensor, at: slice) -> Tensor:
        logits = state.guide.mix(logits).float()
        if end >= 0:                                                          # ids behind it pad the table of MOSS-Speech
            logits[..., end + (noise.column >= config.min_frames) :] = -torch.inf
        if end >= 0 and may_end is not None:
            logits[~may_end, :, end] = -torch.inf
        places = slice(first + at.start, first + at.stop)
        return draw(logits, config, places, noise, history[:, at])

    held = forced(state, rows, h.device)
    if model.config.depth is None:
        drawn = choose(model.audio_logits(h, column[:, :0]).transpose(0, 1), slice(0, len(rows)))
        out.copy_(drawn if held is None else torch.where(held == FREE, drawn, held))
    else:
        token = column[:, table.text[0] : table.text[0] + model.depth.texts]
        written = table.aligned and model.depth.texts == 1 and table.text[:1] == table.text_out       # the model wrote that row itself
        for k in range(len(rows)):
            logits = model.depth.step(k, h, state.guide.twice(token), state.depth, known=held is None and (k > 0 or written))
            drawn = state.guide.mix(logits).argmax(-1) if greedy else choose(logits[:, None], slice(k, k + 1))[:, 0]
            out[:, k] = token = drawn if held is None else torch.where(held[:, k] == FREE, drawn, held[:, k])
    if state.ends and settle(state, out):
        held = forced(state, rows, h.device)                                  # a row below the one that ended ends with it
        out.copy_(torch.where(held == FREE, out, held))
    if config.ras_window:
        newer = torch.cat([state.heard[..., 1:], column[:, rows, None]], -1)
        speaking = torch.tensor([turn.speaking for turn in state.turns], device=h.device)
        state.heard = torch.where(speaking[:, None, None], newer, state.heard)


def complete(state: DecodeState, column: Tensor) -> Tensor | None:
    """The newest frame (B, K) that a column completes, -1 where an item has none; None when an aligned layout has none at all."""
    frame, lag, lead = state.undelay.push(column), state.undelay.lag, state.table.lead
    real = [turn.speaking and 0 <= turn.count - 1 - lag < turn.closed for turn in state.turns]
    for b, turn in enumerate(state.turns):
        if turn.done:
            frame[b] = -1
        elif not real[b]:
            frame[b, lead:] = -1
    return frame if any(real) or not state.table.aligned else None
