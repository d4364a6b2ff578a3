"""One thread steps all sessions of a server; connections talk to it through thread-safe calls.

    session = Conversation(scheduler, rules, seed, on_event)      or Generation(...)
    scheduler.enter(session)            takes a free row, or waits in the queue
    session.hear(samples)               from the connection, at any time
    on_event("ready" | "queue" | "audio" | "text" | "end" | "error", value)      in the scheduler's thread

A conversation is paced by those who speak: a step is made as soon as every session has its frame, and at the latest a frame
(and half of one, for jitter) after the last. Who is late then gets silence, and it is counted; nobody waits for him. Text to
speech and turn-based replies have no clock: they are stepped as fast as the machine can. Next: chat_socket.py.
"""

import math
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio.together import together
from families.family import family_of
from generation.decode_step import SampleConfig
from generation.dialogue import Persona, behind, user_rows
from generation.sessions import SessionBatch
from model import MultistreamLM

Event = Callable[[str, Any], None]
SLACK = 0.5                 # frames that a step waits for late audio
AHEAD = 10.0                # seconds of audio that a client may be ahead of the clock
COUNTED = ("sessions", "frames", "late_frames", "refused", "errors", "dropped_readers")
FAULTS = (ValueError, AssertionError, RuntimeError)          # what can go wrong in one session: it ends, the others go on


class Generation:
    """A session that speaks or writes by itself: a prompt, and frames until it ends."""

    paced, before, given, alone = False, None, None, None

    def __init__(self, prompt: Tensor, rules: SampleConfig, on_event: Event, feed: Any = None) -> None:
        self.prompt, self.rules, self.on_event, self.feed = prompt, rules, on_event, feed
        self.slot, self.cancelled, self.running, self.steps = -1, False, False, 0
        self.asked = time.monotonic()                       # since when somebody waits for the first sound

    def give(self, frame: Tensor, wav: Tensor | None = None) -> None:
        self.on_event("frame", frame)

    def over(self) -> bool:
        return self.cancelled or self.steps >= self.rules.max_frames

    def finish(self) -> None:
        """Nothing more will come."""


class Conversation(Generation):
    """A full-duplex session: the user's sound goes in a frame at a time, the agent's sound and text come out."""

    paced = True

    def __init__(self, scheduler: "Scheduler", rules: SampleConfig, on_event: Event, persona: Persona | None = None,
                 skip_first_frame: bool = False) -> None:
        """`persona`: what stands in front of the conversation; then the first frame that is skipped is one of its own."""
        table = scheduler.model.table
        super().__init__(table.column("start"), rules, on_event)
        self.persona, self.scheduler, self.codec, self.table, self.skip = persona, scheduler, scheduler.codec, table, skip_first_frame
        if persona is not None:
            frames, self.skip = persona.of_batch(1, skip_first_frame)[0][0], False
            (self.prompt, self.given), self.before = behind(frames, table), frames[user_rows(table)]
        self.ear, self.mouth = self.codec.stream(), self.codec.stream()
        self.hop = round(self.codec.sample_rate / self.codec.frame_rate)
        self.pending, self.codes = deque[np.ndarray](), deque[Tensor]()
        self.waiting = self.late = 0                        # samples not encoded yet; frames of silence that stand for late ones
        self.heard, self.paused, self.frames = False, False, 0
        if front := table.timing.silence:                   # recognition hears it first
            self.pending.append(np.zeros(front * self.hop, dtype=np.float32))
            self.waiting = front * self.hop

    def read_prompt(self, batch: SessionBatch) -> None:
        """Step what stands in front of the conversation, before its user is told to speak."""
        if self.persona is not None:
            self.alone = batch.read_prompt(self.prompt, self.feed, self.persona.inputs)

    def hear(self, samples: np.ndarray) -> None:
        """Take mono samples at the codec's rate; ValueError for a client that is too far ahead."""
        with self.scheduler.changed:
            if (self.waiting + len(samples)) / self.codec.sample_rate + len(self.codes) / self.codec.frame_rate > AHEAD:
                raise ValueError(f"more than {AHEAD:g} s of audio are waiting; send it as it is recorded")
            self.pending.append(np.ascontiguousarray(samples, dtype=np.float32))
            self.waiting += len(samples)
            self.scheduler.changed.notify()

    @property
    def has_frame(self) -> bool:
        """Whether a column's worth of the user's sound is there, encoded or not."""
        return bool(self.codes) or self.waiting >= self.hop

    def frame(self, silence: bool = False) -> Tensor:
        """The next samples (1, 1, hop) to encode. `silence`: in place of what is late."""
        self.asked, self.heard = self.asked if self.heard else time.monotonic(), True
        self.late += silence
        with self.scheduler.changed:
            joined = np.concatenate([*self.pending, np.zeros(self.hop if silence else 0, dtype=np.float32)])
            first, rest = (joined[-self.hop :], joined[: -self.hop]) if silence else (joined[: self.hop], joined[self.hop :])
            self.pending.clear()
            self.pending.append(rest)
            self.waiting = len(rest)
        return torch.from_numpy(first.copy())[None, None].to(self.scheduler.codec_device)

    def listen(self, codes: Tensor) -> None:
        """Take the codes (1, Q, t) of samples."""
        for frame in codes[0].cpu().unbind(-1):
            if self.skip:                                   # as the official server: its first frame lies in the past
                self.skip, self.ear = False, self.codec.stream()
                continue
            self.codes.append(frame)

    def sound(self, frame: Tensor) -> Tensor:
        """The codes (1, Q, 1) of a frame, fit for the codec."""
        codes = frame[self.table.audio_out][: self.codec.num_codebooks].clamp(0, self.codec.codebook_size - 1)
        return codes[None, :, None].to(self.scheduler.codec_device)

    def give(self, frame: Tensor, wav: Tensor | None = None) -> None:
        if wav is not None and wav.shape[-1]:
            self.on_event("audio", wav[0, 0].float().cpu().numpy())
        self.frames += 1
        if (behind := self.table.timing.silence - self.table.timing.lead) > 0 and int(frame[0]) == self.table.epad:
            self.on_event("word", max(0.0, (self.frames - behind) / self.codec.frame_rate))
        self.on_event("text", int(frame[0]))

    def note_pause(self, odds: float) -> None:
        """Say once that the speaker pauses."""
        if odds > 0.5 and not self.paused:
            self.on_event("pause", odds)
        self.paused = odds > 0.5


class Metrics:
    """Numbers of a server, as Prometheus reads them."""

    def __init__(self) -> None:
        self.counts, self.times = Counter[str](), {name: deque[float](maxlen=2000) for name in ("step", "first_audio")}

    def text(self, active: int, waiting: int) -> str:
        lines = [f"sessions_active {active}", f"sessions_queued {waiting}"]
        lines += [f"{name}_total {self.counts[name]}" for name in COUNTED]
        for name, values in self.times.items():
            ordered = sorted(values)
            for share in (0.5, 0.95, 0.99) if ordered else ():
                place = min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)
                lines.append(f'{name}_seconds{{quantile="{share}"}} {ordered[place]:.6f}')
            lines.append(f"{name}_seconds_count {len(ordered)}")
        return "".join(f"multistream_{line}\n" for line in lines)


class Scheduler:
    """Steps the sessions of one model in a thread of its own."""

    def __init__(self, model: MultistreamLM, codec: Any, slots: int, shared: SampleConfig, columns: int = 2048,
                 most_waiting: int = 32) -> None:
        self.model, self.codec, self.slots, self.shared, self.columns, self.most = model, codec, slots, shared, columns, most_waiting
        self.codec_device = next(iter(codec.buffers()), torch.zeros(0)).device if codec is not None else torch.device("cpu")
        self.paced = family_of(model.table).user_audio == "duplex"
        self.period = 1 / codec.frame_rate if codec is not None else 0.0
        self.batch = SessionBatch(model, slots, shared, columns)
        self.changed = threading.Condition(threading.RLock())
        self.queue, self.active = deque[Generation](), dict[int, Generation]()
        self.stopping, self.due, self.metrics = False, math.inf, Metrics()
        self.thread = threading.Thread(target=self.run, name="scheduler", daemon=True)

    def start(self) -> "Scheduler":
        self.thread.start()
        return self

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join(timeout=30)

    # ---- called by connections ----

    def enter(self, session: Generation) -> int:
        """Queue a session; -> its position, 0 = a row is free. ValueError when the queue is full."""
        with self.changed:
            free = self.slots - len(self.active) - len(self.queue)
            if len(self.queue) >= self.most + max(0, free):
                self.metrics.counts["refused"] += 1
                raise ValueError(f"the server is full: {len(self.active)} sessions, {len(self.queue)} waiting; try again later")
            self.queue.append(session)
            self.metrics.counts["sessions"] += 1
            self.changed.notify()
            return max(0, 1 - free)

    def position(self, session: Generation) -> int:
        """How many wait in front of a session, itself included; 0 = it has begun, or is over."""
        with self.changed:
            return next((n for n, waiting in enumerate(self.queue, 1) if waiting is session), 0)

    def leave(self, session: Generation) -> None:
        """End a session, or take it out of the queue."""
        with self.changed:
            session.cancelled = True
            if session in self.queue:
                self.queue.remove(session)
            self.changed.notify()

    # ---- the thread ----

    def run(self) -> None:
        while not self.stopping:
            self.admit()
            try:
                if self.wait():
                    self.step()
            except FAULTS as error:                         # of the whole batch: all end, and the server starts anew
                print(f"a step failed: {error}", file=sys.stderr, flush=True)
                for session in list(self.active.values()):
                    self.close(session, f"the server failed: {error}")
                self.batch = SessionBatch(self.model, self.slots, self.shared, self.columns)

    def admit(self) -> None:
        """Give free rows to those who wait."""
        while len(self.active) < self.slots:
            with self.changed:
                if not self.queue:
                    return
                session = self.queue.popleft()
                session.slot = next(n for n in range(self.slots) if n not in self.active)
                self.active[session.slot] = session
            if session.paced:
                self.guarded(session, session.read_prompt, self.batch)
            if self.active.get(session.slot) is session:
                session.on_event("ready", None)
            if not session.paced:
                self.guarded(session, self.begin, session)

    def begin(self, session: Generation) -> None:
        """Start a session in its row: a conversation when the first frame of its user is there."""
        session.running, session.steps = True, 1
        alone, session.alone = session.alone, None
        first = self.batch.begin(session.slot, session.prompt, session.rules, session.rules.seed, session.feed, session.before,
                                 session.given, alone)
        if first is not None:
            self.give({session: first})

    def wait(self) -> bool:
        """Wait until a step is due; False when sessions came or went meanwhile."""
        with self.changed:
            for session in [s for s in self.active.values() if s.cancelled]:
                self.close(session)
            if not self.active:
                self.changed.wait(0.5)
                return False
        if not self.paced:
            return True
        with self.changed:
            started = [s for s in self.active.values() if s.running or s.has_frame]
            now = time.monotonic()
            self.due = self.due if started else math.inf                # the clock begins with the first frame of somebody
            if not started or not (now >= self.due or all(s.has_frame for s in started)):
                if not (self.queue and len(self.active) < self.slots):
                    self.changed.wait(min(0.5, max(0.001, self.due - now)))
                return False
        self.encode([s for s in started if not s.codes and s.has_frame])
        started = [s for s in started if s.running or s.codes]          # of the first samples no frame may be whole yet
        return bool(started) and (now >= self.due or all(s.codes for s in started))

    def encode(self, sessions: Sequence[Conversation], silence: bool = False) -> None:
        """Encode a frame of each."""
        heard = together([s.ear for s in sessions], "encode", [s.frame(silence) for s in sessions])
        for session, codes in zip(sessions, heard, strict=True):
            session.listen(codes)

    def give(self, frames: dict[Generation, Tensor]) -> None:
        """Give sessions their frames: the sound of all is decoded at once."""
        talking = [s for s in frames if s.paced and len(s.table.audio_out)]
        wavs = together([s.mouth for s in talking], "decode", [s.sound(frames[s]) for s in talking])
        heard = dict(zip(talking, wavs, strict=True))
        for session, frame in frames.items():
            self.guarded(session, session.give, frame, heard.get(session))

    def guarded(self, session: Generation, call: Callable[..., None], *args: Any) -> None:
        """Run what concerns one session: a fault ends that one."""
        try:
            call(*args)
        except FAULTS as error:
            self.close(session, str(error))

    def step(self) -> None:
        """A column of everybody."""
        began = time.monotonic()
        if self.paced:
            late = [s for s in self.active.values() if s.running and not s.codes]
            self.encode(late, silence=True)
            self.metrics.counts["late_frames"] += len(late)
            for session in [s for s in self.active.values() if s.codes and not s.running]:
                self.guarded(session, self.begin, session)
            ready = {slot: s.codes.popleft() for slot, s in self.active.items() if s.codes}
            frames = self.batch.step(ready)
            early = began < self.due
            self.due = (began if early else self.due) + self.period * (1 + SLACK * early)
            if self.due < began - 1:                                    # the machine could not keep up: no race behind a lost second
                self.due = began + self.period
        else:
            ready = dict.fromkeys(self.active)
            frames = self.batch.step()
        self.give({self.active[slot]: frame for slot, frame in frames.items() if slot in self.active})
        for slot, odds in enumerate(self.batch.pauses()):
            if slot in frames and slot in self.active:
                self.active[slot].note_pause(odds)
        for slot, session in list(self.active.items()):
            session.steps += slot in ready
            if slot in frames and session.asked:
                self.metrics.times["first_audio"].append(time.monotonic() - session.asked)
                session.asked = 0.0
            if slot in self.active and session.running and (session.over() or self.batch.done(slot)):
                self.close(session)
        self.metrics.counts["frames"] += len(frames)
        self.metrics.times["step"].append(time.monotonic() - began)

    def close(self, session: Generation, error: str = "") -> None:
        """Free a session's row and say so."""
        if self.active.get(session.slot) is not session:
            return
        with self.changed:
            del self.active[session.slot]
            self.batch.end(session.slot)
        if error:
            self.metrics.counts["errors"] += 1
            session.on_event("error", error)
        else:
            session.finish()
        session.on_event("end", None)


def frames_of(scheduler: Scheduler, prompt: Tensor, rules: SampleConfig, feed: Any = None) -> Iterator[Tensor]:
    """The frames (1, K) of a generation among others, as `generate` would yield them; close it and the row is free."""
    events: deque[tuple[str, Any]] = deque()
    there = threading.Semaphore(0)

    def on_event(kind: str, value: Any) -> None:
        events.append((kind, value))
        there.release()

    session = Generation(prompt, rules, on_event, feed)
    scheduler.enter(session)
    try:
        while True:
            there.acquire()
            kind, value = events.popleft()
            if kind == "frame":
                yield value[None]
            elif kind == "error":
                raise ValueError(value)
            elif kind == "end":
                return
    finally:
        scheduler.leave(session)
