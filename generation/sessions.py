"""Many generations at once, a row of one batch each: they begin and end without touching the others.

    batch = SessionBatch(model, slots=8, config=SampleConfig())
    batch.begin(3, prompt, rules, seed=7)       the prompt (K, S) is read and its first column drawn alone, then it moves into row 3
    frames = batch.step({3: codes})             a column of every row: what each user said -> the frames that became complete
    batch.end(3)

All rows write a step into the same place of the ring of the KV cache. Each row has its own positions for the attention mask, which
restart with a session, so nothing is shifted or cleared for the other rows. Seeds, sampling rules and column numbers are
per row, too: a session samples what it would sample alone, up to the rounding of sums in a batch.

On CUDA one step is one graph (cuda_graphs.py), captured once for the number of rows. Next: serving/scheduler.py.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from families.family import closings, family_of
from generation.cuda_graphs import capture, why_not
from generation.decode_step import ColumnKind, DecodeStep, Rules, SampleConfig, SamplingNoise, column_kind, completed_frame
from generation.dialogue import PAUSE, user_rows
from generation.turns import FREE, ItemState, advance, close_fed, required_ids, start_state, with_endings
from kernels.attention import KVCache
from kernels.sample import MIX2
from layers.conditioning import with_conditions
from model import MultistreamLM
from streams import StreamTable

LONGEST = 1 << 16           # columns of a session whose model has a window: angles of RoPE are made for so many


class SlotNoise:
    """What the draws of each row depend on: its seed, its column number, its rules. Stands where `SamplingNoise` does."""

    def __init__(self, items: int, streams: int, device: torch.device, static: bool = False) -> None:
        """`static`: what is read lies where it lies, so that a captured graph serves all rules."""
        self.items, self.streams, self.step = items, streams, torch.zeros((), dtype=torch.int64, device=device)
        self.words = torch.arange(1, 2 * streams + 1, device=device).view(streams, 2) << 32
        self.seeds, self.steps = self.words.repeat(items, 1, 1), torch.zeros(items, dtype=torch.int64, device=device)
        kinds = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
        self.values = {name: torch.zeros(items, streams, dtype=dtype, device=device) for name, dtype in kinds.items()}
        self.values["top_p"].fill_(1.0)
        self.ready: dict[int, Tensor] = {}
        self.parts: dict[tuple[int, int], Rules] = {}                     # rules of the streams that are drawn together
        self.static, self.cold, self.folded = static, not static, self.seeds.clone()

    def put(self, row: int, rules: SampleConfig, seed: int) -> None:
        """Begin a row: it draws as item 0 of a batch that was started with this seed."""
        self.seeds[row], self.steps[row] = (seed & 0xFFFFFFFF) | self.words, 0
        for name, values in self.values.items():
            rule = getattr(rules, name)
            given = rule if isinstance(rule, tuple) else (rule,) * self.streams
            if len(given) != self.streams:
                raise ValueError(f"{name} has {len(given)} values, the model predicts {self.streams} streams; give one or as many")
            values[row] = torch.tensor(given).to(values)
        self.cold = not self.static and not bool(self.values["temperature"].any())
        for (first, last), part in list(self.parts.items()):
            if self.static:
                for own, values in zip(part, self.values.values(), strict=True):
                    own.copy_(values[:, first:last].flatten())
            else:
                del self.parts[first, last]
        self.fold()

    def fold(self) -> None:
        """The number of a row's column becomes part of its seeds (kernels/sample.py xors both)."""
        self.folded.copy_(self.seeds ^ ((self.steps * MIX2) & 0xFFFFFFFF)[:, None, None])

    def advance(self, moves: Tensor | bool = True) -> None:
        self.steps.add_(moves)
        self.fold()

    @property
    def columns(self) -> Tensor:
        return self.steps[:, None]

    def of(self, rows: slice, again: bool = False) -> Tensor:
        return self.folded[:, rows, int(again)].flatten()

    prepare = SamplingNoise.prepare                     # the same, of these seeds

    def rules(self, config: SampleConfig, rows: slice) -> Rules:
        """A value of each rule for every row, or one for all: on a CPU what all have in common needs no sorting."""
        key = rows.start, rows.stop
        if key not in self.parts:
            found: list[Any] = [values[:, rows].flatten() for values in self.values.values()]
            if not self.static:
                same = [bool((part == part[0]).all()) for part in found]
                found = [part[0].item() if one else part for part, one in zip(found, same, strict=True)]
                found = [None if value == nothing else value for value, nothing in zip(found, (-1.0, 0, 1.0, 0.0), strict=True)] \
                    if all(same) else found
            self.parts[key] = tuple(found)
        return self.parts[key]

    def greedy(self, config: SampleConfig) -> bool:
        return self.cold and not config.ras_window


class UserRows:
    """The user's rows of a session: his codes as they come, delayed as in training."""

    def __init__(self, table: StreamTable, before: Tensor | None = None) -> None:
        self.rows = user_rows(table)
        self.delays = [table.delays[k] for k in self.rows]
        most = max(self.delays, default=0)
        start = table.column("start", self.rows)[:, 0]
        frames = [] if before is None else list(before.unbind(-1))[-most:] if most else []
        self.last = deque([*[start] * (most - len(frames)), *frames], maxlen=most + 1)

    def push(self, codes: Tensor) -> Tensor:
        """The next frame (Q,) -> what stands in the next column (Q,)."""
        if len(codes) != len(self.rows):
            raise ValueError(f"the codec gives {len(codes)} codebooks, the model hears {len(self.rows)}; use the codec it was made for")
        self.last.append(codes)
        return torch.stack([self.last[-1 - delay][q] for q, delay in enumerate(self.delays)])


class SessionBatch:
    """Rows of one batch, each a generation of its own."""

    @torch.inference_mode()
    def __init__(self, model: MultistreamLM, slots: int, config: SampleConfig | None = None, columns: int = 2048) -> None:
        """`columns` bounds a session of a model without a window; `config` holds what all share: guidance, closing, repetition."""
        self.model, self.table, self.slots, self.config = model.eval(), model.table, slots, config or SampleConfig()
        if model.voice is not None:
            raise ValueError("this model listens to features of voices, which live sessions cannot give it yet; use sample.py")
        self.device, family = model.temporal.layers[0].attn.o.weight.device, family_of(self.table)
        empty = torch.zeros(1, dtype=torch.long)
        feed = family.feed and family.feed([empty] * slots, self.table)
        start = self.table.column("start")[None].expand(slots, -1, -1).contiguous()
        self.decode_step = decode_step = DecodeStep(model, start.to(self.device), self.config, columns, feed)
        self.counted = not why_not(model, self.device, feed) and self.config.graphs != "off"
        decode_step.noise = SlotNoise(slots, len(self.table.text_out) + len(self.table.audio_out), self.device, self.counted)
        self.state = start_state(start, self.table, closings()[self.config.closing], self.config.max_speech)
        self.state.turns = [ItemState(self.table.aligned, 1, done=True) for _ in range(slots)]
        self.state.undelay.remember(start[..., -1])
        self.column, self.kind = start[..., -1].clone(), column_kind(self.state)
        self.users: dict[int, UserRows] = {}
        self.given: dict[int, list[Tensor]] = {}        # ids of the next columns of a session, (K,) each
        self.idle = torch.ones(slots, 1, dtype=torch.bool, device=self.device)
        self.lengths = [0] * slots                      # columns of each session
        for cache in self.caches(decode_step.cache):
            cache.plain = False                         # rows differ in what they may see
        self.longest = LONGEST if model.config.temporal.window else decode_step.cache.capacity
        if self.counted:
            self.start_counting()

    @staticmethod
    def caches(cache: KVCache) -> list[KVCache]:
        """The cache of a model, and that of a text tower beside it."""
        tower = getattr(cache, "tower", None)
        return [cache] if tower is None else [cache, tower]

    def free(self) -> int | None:
        """A row without a session."""
        return next((n for n, turn in enumerate(self.state.turns) if self.lengths[n] == 0 and turn.done), None)

    def done(self, slot: int) -> bool:
        """Whether a session has ended by itself, or is as long as the cache allows."""
        return self.state.turns[slot].done or self.lengths[slot] >= self.longest

    # ---- a session begins ----

    @torch.inference_mode()
    def read_prompt(self, prompt: Tensor, feed: Any = None, inputs: Tensor | None = None) -> DecodeStep:
        """Let the model read a prompt (K, S) alone, before its session has a user. `inputs` (n, D) as in `generate`."""
        S = prompt.shape[1]
        if S >= self.longest:
            raise ValueError(f"the prompt has {S} columns, a session holds {self.longest}; shorten it or raise --columns")
        prompt = with_conditions(prompt, self.table, self.config.condition)
        return DecodeStep(self.model, prompt[None].to(self.device), self.config, S, feed, inputs=None if inputs is None else inputs[None])

    @torch.inference_mode()
    def begin(self, slot: int, prompt: Tensor, rules: SampleConfig | None = None, seed: int = 0, feed: Any = None,
              before: Tensor | None = None, given: Tensor | None = None, alone: DecodeStep | None = None) -> Tensor | None:
        """Start a session in a row behind a prompt (K, S); -> the first frame (K,) if it is complete already.

        `rules` are its temperature, top-k, top-p and min-p; `feed` fills rows that are only read; `before`
        (Q, t) are frames of the user that the prompt holds, so that his delayed rows go on with them; `given` (K, n) are ids of
        the next columns, FREE where the model draws; `alone` is what `read_prompt` made of the prompt.
        """
        assert self.lengths[slot] == 0, f"slot {slot} is taken"
        alone, prompt = alone or self.read_prompt(prompt, feed), with_conditions(prompt, self.table, self.config.condition)
        prompt, S = prompt[None].to(self.device), prompt.shape[1]
        columns = [] if given is None else list(given.unbind(-1))
        alone.noise = SlotNoise(1, self.decode_step.noise.streams, self.device)
        for noise, row in ((alone.noise, 0), (self.decode_step.noise, slot)):
            noise.put(row, rules or self.config, seed)
        state = start_state(prompt, self.table, self.state.closing, self.state.limit)
        first = columns.pop(0)[None] if columns else None
        (known, free), kind = required_ids(state, first), column_kind(state, first is not None)
        column = with_endings(state, alone.draw(known.to(self.device), kind, free).cpu(), first)
        close_fed(state, alone.feed)
        frame = completed_frame(state, column)
        advance(state, column)
        self.take_over(slot, alone, state, column)
        if any(self.lengths):                           # columns of both kinds may stand side by side now
            side = kind.side if kind.side == self.kind.side else None
            kind = ColumnKind(kind.text or self.kind.text, kind.audio or self.kind.audio, side)
        self.kind = kind
        self.users[slot], self.lengths[slot], self.given[slot] = UserRows(self.table, before), S, columns
        self.idle[slot] = False
        return frame[0] if frame is not None and bool((frame >= 0).any()) else None

    def take_over(self, slot: int, alone: DecodeStep, state: Any, column: Tensor) -> None:
        """Move a batch of one into a row: cache, turn, newest columns, what was heard, the column that was drawn."""
        decode_step, mine, one = self.decode_step, self.state.undelay, state.undelay
        for cache, taken in zip(self.caches(decode_step.cache), self.caches(alone.cache), strict=True):
            self.move_cache(cache, taken, [slot, self.slots + slot] if decode_step.guide.on else [slot])
        self.state.turns[slot], self.state.conditions[slot], self.state.last = state.turns[0], state.conditions[0], (None, None)
        n = min(one.next, mine.kept)
        mine.columns[mine.next - n : mine.next, slot] = one.columns[one.next - n : one.next, 0]
        if decode_step.recent is not None:
            decode_step.recent[slot] = alone.recent[0]
        if decode_step.seen is not None:
            decode_step.seen[slot] = alone.seen[0]
        decode_step.position[slot] = alone.position[0]
        if alone.feed is not None:
            decode_step.feed.place(slot, alone.feed)
        self.column[slot] = column[0]

    def move_cache(self, cache: KVCache, taken: KVCache, rows: list[int]) -> None:
        """Copy the keys and values of a prompt into rows of the ring, in front of the place that is written next."""
        n = min(taken.live, cache.capacity)
        if self.counted:
            count = int(cache.counter[0])
        else:
            cache.count += cache.capacity if cache.count < n else 0       # positions after those in use: no query attends to them yet
            cache.live, count = min(cache.count, cache.capacity), cache.count
        places = torch.arange(count - n, count, device=self.device) % cache.capacity
        order = torch.arange(taken.count - n, taken.count, device=self.device) % taken.capacity
        for b, row in enumerate(rows):
            cache.positions[row] = -1
            cache.positions[row, places] = taken.positions[b, order]
            cache.audio[row, places] = taken.audio[b, order]
            cache.store[:, :, row][:, :, :, places] = taken.store[:, :, b][:, :, :, order]            # (layers, 2, H_kv, n, head)
            if hasattr(taken, "held"):                                    # a text tower
                cache.counts[row], cache.held[row] = taken.counts[b], taken.held[b]
            if self.counted:
                cache.padding[row] = count - n

    @torch.inference_mode()
    def end(self, slot: int) -> None:
        """Free a row."""
        self.state.turns[slot] = ItemState(self.table.aligned, 1, done=True)
        self.lengths[slot], self.idle[slot], self.state.last = 0, True, (None, None)
        self.users.pop(slot, None)
        self.given.pop(slot, None)

    # ---- a column of all ----

    @torch.inference_mode()
    def step(self, heard: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
        """Read the columns that were drawn, with what users said in them (Q,), and draw the next. -> complete frames (K,) by row"""
        for slot, codes in (heard or {}).items():
            user = self.users[slot]
            self.column[slot, user.rows] = user.push(codes)
        running = [slot for slot, turn in enumerate(self.state.turns) if not turn.done]
        given = self.next_given()
        known, free = required_ids(self.state, given)
        kind = column_kind(self.state)
        drawn = self.replay(known) if self.counted else self.eager(known, kind, free)
        drawn = with_endings(self.state, drawn, given)
        close_fed(self.state, self.decode_step.feed)
        real = [slot for slot in running if not self.table.aligned or self.frame_due(slot)]
        frame = completed_frame(self.state, drawn)
        advance(self.state, drawn)
        self.column, self.kind = drawn, kind
        for slot in running:
            self.lengths[slot] += 1
        return {} if frame is None else {slot: frame[slot] for slot in real if bool((frame[slot] >= 0).any())}

    def pauses(self) -> list[float]:
        """How probable it is in the column that was drawn last that the speaker of each row pauses; [] without a head for it."""
        head, kind = PAUSE
        if self.model.config.extra_heads <= head:
            return []
        return self.model.extra_odds(self.decode_step.h[0][:, -1:])[: self.slots, head, 0, kind].tolist()

    def next_given(self) -> Tensor | None:
        """What is known of the next column of the rows (B, K), FREE elsewhere; None of none."""
        if not any(self.given.values()):
            return None
        given = torch.full_like(self.column, FREE)
        for slot, columns in self.given.items():
            if columns:
                given[slot] = columns.pop(0)
        return given

    def frame_due(self, slot: int) -> bool:
        """Whether the column that was drawn completes a frame of an aligned row."""
        turn = self.state.turns[slot]
        return 0 <= turn.count - 1 - self.state.undelay.lag < turn.closed

    def eager(self, known: Tensor, kind: ColumnKind, free: bool) -> Tensor:
        decode_step = self.decode_step
        for cache in self.caches(decode_step.cache):
            cache.count -= cache.capacity if cache.count >= 2 * cache.capacity else 0      # a server runs for months
        if decode_step.cache.rope is not None and self.model.config.temporal.rope_theta:
            decode_step.cache.rope.extend(max(self.lengths) + 2)
        decode_step.read(self.column.to(self.device), self.kind)
        decode_step.position.masked_fill_(self.idle, -1)
        return decode_step.draw(known.to(self.device), kind, free).cpu()

    # ---- on CUDA ----

    def start_counting(self) -> None:
        """Let the device count columns, from a full ring whose positions are all masked, so that one graph serves every step."""
        cache = self.decode_step.cache
        cache.counter = torch.full((len(cache.positions),), cache.capacity, device=self.device)
        cache.padding = cache.counter.clone()
        if self.model.config.temporal.rope_theta:
            cache.rope.extend(self.longest + 2)
        self.read, self.known, self.result = (self.column.clone().to(self.device) for _ in range(3))
        self.every = ColumnKind(bool(self.table.text_out), bool(self.table.audio_out), None)
        self.graph: Callable[[], None] | None = None

    def counted_step(self) -> None:
        decode_step = self.decode_step
        decode_step.read(self.read, self.every)
        decode_step.cache.counter.add_(1)
        decode_step.position.masked_fill_(self.idle, -1)
        self.result.copy_(decode_step.draw(self.known, self.every))

    def replay(self, known: Tensor) -> Tensor:
        self.read.copy_(self.column)
        self.known.copy_(known)
        if self.graph is None:                          # the first column runs as it is: libraries make their plans
            self.graph = self.counted_step
        elif self.graph == self.counted_step:
            self.graph = capture(self.counted_step)
        self.graph()
        return self.result.cpu()
