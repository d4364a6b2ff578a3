"""/api/chat: the websocket that clients of full-duplex speech models speak (Kyutai's protocol).

    byte 0   0 handshake   the server is ready; the client sends nothing before
             1 audio       Ogg/Opus, one continuous mono stream each way; with ?format=pcm16 little-endian samples instead
             2 text        UTF-8, a piece of what the agent says, blanks included
             3 control     ignored      5 error   UTF-8, then the connection is closed
             4 metadata    JSON: {"queue": 2}, {"sample_rate": 16000, ...}, {"late_frames": 3, ...}; of speech to text {"word": 1.2},
                           the second at which the next word begins and the one before ended, {"pause": 0.9} when the speaker pauses
             6 ping        answered by a ping; unknown kinds are ignored

Query parameters: text_temperature, text_topk, audio_temperature, audio_topk, text_seed, audio_seed, max_steps; for models that
take a role (PersonaPlex) text_prompt and voice_prompt, a name of /voices. Those that this server does not know are refused by
name; what is known to mean nothing here (email, worker_auth_id, image_*) is not.
"""

import asyncio
import json
import math
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import sphn
from aiohttp import WSMessage, WSMsgType, web

from families.family import family_of
from generation.conversation import masked
from generation.decode_step import SampleConfig
from generation.dialogue import Persona, make_persona
from options import unknown
from serving.limits import Gate, Limits, Rate, printable
from serving.scheduler import Conversation, Scheduler
from streams import StreamTable
from text.tokenizers import Tokenizer

HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
SILENT = ("email", "worker_auth_id", "worker_addr", "image_url", "image_resolution", "token", "format")
NEUTRAL = {"pad_mult": 0.0, "repetition_penalty": 1.0, "repetition_penalty_context": 64.0}     # known, and honoured at this value alone
PARAMETERS = {"text_temperature": (0.0, 10.0), "text_topk": (0, 100_000), "audio_temperature": (0.0, 10.0), "audio_topk": (0, 100_000),
              "text_seed": (0, 2**53), "audio_seed": (0, 2**53), "max_steps": (1, 10**7)}
PERSONA = ("text_prompt", "voice_prompt")
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
SAMPLES = 65_536                # decoded from one message at most


def number(name: str, text: str) -> float:
    """A query parameter as a number within its range."""
    low, high = PARAMETERS[name]
    try:
        value = float(text) if isinstance(low, float) else int(text)
    except ValueError:
        raise ValueError(f"{name}={printable(text)} is no number") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={printable(text)} is outside {low:g} to {high:g}")
    return value


def session_rules(query: Mapping[str, str], usual: SampleConfig, table: StreamTable, limits: Limits, frame_rate: float) -> SampleConfig:
    """The sampling rules of a session: the server's, changed by query parameters; ValueError for what cannot be honoured."""
    given: dict[str, float] = {}
    for name, text in query.items():
        if name in SILENT or name in PERSONA:
            continue
        if name in NEUTRAL:
            if text not in (f"{NEUTRAL[name]:g}", str(NEUTRAL[name]), "1", "0"):
                raise ValueError(f"{name} is not honoured by this server; leave it out")
        elif name not in PARAMETERS:
            raise ValueError(unknown(printable(name), [*PARAMETERS], "parameter"))
        else:
            given[name] = number(name, text)
    texts, streams = len(table.text_out), len(table.text_out) + len(table.audio_out)
    changes: dict[str, Any] = {"max_frames": min(int(given.get("max_steps", 10**9)), round(limits.session_seconds * frame_rate))}
    for field, text, audio in (("temperature", "text_temperature", "audio_temperature"), ("top_k", "text_topk", "audio_topk")):
        rule = getattr(usual, field)
        values = list(rule) if isinstance(rule, tuple) else [rule] * streams
        values[:texts] = [given.get(text, value) for value in values[:texts]]
        values[texts:] = [given.get(audio, value) for value in values[texts:]]
        changes[field] = tuple(values)
    seeds = {given[name] for name in ("text_seed", "audio_seed") if name in given}
    if len(seeds) > 1:
        raise ValueError("text_seed and audio_seed differ; one seed is that of a whole session here")
    return replace(usual, **changes, seed=int(seeds.pop()) if seeds else usual.seed)


class OpusEar:
    """Samples out of the client's Ogg/Opus stream."""

    def __init__(self, rate: int) -> None:
        if rate not in OPUS_RATES:
            raise ValueError(f"Opus knows no {rate} Hz; connect with ?format=pcm16")
        self.reader = sphn.OpusStreamReader(rate)

    def __call__(self, data: bytes) -> np.ndarray:
        try:
            samples = self.reader.append_bytes(data)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"this is no Ogg/Opus stream ({printable(str(error))})") from None
        return np.zeros(0, np.float32) if samples is None else samples


def pcm16(data: bytes) -> np.ndarray:
    if len(data) % 2:
        raise ValueError("16-bit samples come in pairs of bytes")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def to_pcm16(samples: np.ndarray) -> bytes:
    return (samples * 32767).clip(-32768, 32767).round().astype("<i2").tobytes()


class Pieces:
    """Text ids as pieces of text with their blanks; padding says nothing."""

    def __init__(self, tokenizer: Tokenizer, table: StreamTable) -> None:
        self.quiet, self.tokenizer, self.model = {table.pad, table.epad, -1}, tokenizer, None
        if tokenizer.name.endswith(".model"):
            from sentencepiece import SentencePieceProcessor
            self.model = SentencePieceProcessor(model_proto=tokenizer.content)

    def __call__(self, id: int) -> str:
        if id in self.quiet:
            return ""
        if self.model is not None:
            return self.model.id_to_piece(id).replace("\u2581", " ") if id < self.model.vocab_size() else ""
        return " " + self.tokenizer.decode([id]).strip()


class Outbox:
    """Messages from the scheduler's thread to one websocket: a reader that is too slow is dropped."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.loop, self.queue = limits, asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()

    def put(self, kind: str, value: Any) -> None:
        """From any thread."""
        with suppress(RuntimeError):                                    # the loop has closed: nobody reads any more
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (kind, value))

    async def send(self, call: Callable[[], Awaitable[None]]) -> None:
        """Send one message; ConnectionError for a reader that does not read."""
        try:
            await asyncio.wait_for(call(), self.limits.send_seconds)
        except TimeoutError:
            raise ConnectionError("the client does not read") from None
        if self.queue.qsize() > self.limits.unsent_messages:
            raise ConnectionError("the client reads too slowly")


class ChatSocket:
    """One connection of /api/chat."""

    def __init__(self, scheduler: Scheduler, gate: Gate, usual: SampleConfig, tokenizer: Tokenizer, skip_first_frame: bool = False,
                 log: Callable[[dict[str, Any]], None] | None = None, voices: Mapping[str, tuple[str, str]] | None = None,
                 role: str = "") -> None:
        self.scheduler, self.gate, self.usual, self.tokenizer = scheduler, gate, usual, tokenizer
        self.skip, self.log, self.voices, self.table = skip_first_frame, log, voices or {}, scheduler.model.table
        self.role = role if family_of(self.table).persona else ""

    def persona(self, query: Mapping[str, str]) -> Persona | None:
        """The role and the voice that a client asks for, else the server's role; ValueError for what there is not."""
        role, voice = (query.get(name, "").strip() for name in PERSONA)
        if (role or voice) and family_of(self.table).persona is None:
            raise ValueError(f"a {family_of(self.table).name} model of this kind takes no text_prompt and no voice_prompt; leave them out")
        if len(role) > self.gate.limits.text_characters:
            raise ValueError(f"text_prompt has {len(role)} characters, {self.gate.limits.text_characters} are the limit")
        voice = voice if voice in self.voices else voice.removesuffix(".pt").removesuffix(".wav")       # official clients name files
        if voice and voice not in self.voices:
            raise ValueError(f"voice_prompt {printable(voice)} is none of {', '.join(self.voices) or 'none'}")
        voices = [self.voices[voice][0]] if voice else []
        return make_persona(role or self.role, voices, self.scheduler.codec, self.tokenizer, self.table)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.gate.check(request)
        limits, scheduler = self.gate.limits, self.scheduler
        raw = request.query.get("format", "opus")
        try:
            if raw not in ("opus", "pcm16"):
                raise ValueError(f"format={printable(raw)} is neither opus nor pcm16")
            rules = session_rules(request.query, self.usual, scheduler.model.table, limits, scheduler.codec.frame_rate)
            ear = OpusEar(scheduler.codec.sample_rate) if raw == "opus" else pcm16
            persona = await asyncio.to_thread(self.persona, request.query)
        except (ValueError, OSError) as error:                          # OSError: a voice's file has gone
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        address = self.gate.enter(request)
        ws = web.WebSocketResponse(max_msg_size=limits.message_bytes, heartbeat=20, compress=False)
        try:
            await ws.prepare(request)
            await self.converse(ws, rules, ear, raw == "opus", persona)
        finally:
            self.gate.leave(address)
        return ws

    async def converse(self, ws: web.WebSocketResponse, rules: SampleConfig, ear: Callable[[bytes], np.ndarray], opus: bool,
                       persona: Persona | None) -> None:
        box, said = Outbox(self.gate.limits), list[int]()

        def on_event(kind: str, value: Any) -> None:
            if kind == "text" and self.log is not None:
                said.append(value)
            box.put(kind, value)

        session = Conversation(self.scheduler, rules, on_event, persona, self.skip)
        try:
            self.scheduler.enter(session)
        except ValueError as error:
            await self.say(box, ws, ERROR, str(error).encode())
            await ws.close(code=1013)
            return
        reader = asyncio.create_task(self.read(ws, session, ear, box))
        try:
            await self.write(ws, session, box, opus)
        except (ConnectionError, RuntimeError):                         # aiohttp says RuntimeError of a socket that is closing
            self.scheduler.metrics.counts["dropped_readers"] += 1
        finally:
            self.scheduler.leave(session)
            reader.cancel()
            if self.log is not None:
                text = "".join(map(Pieces(self.tokenizer, self.scheduler.model.table), said)).strip()
                self.log({"frames": session.steps, "late_frames": session.late, "said": masked(text, {})})
            with suppress(ConnectionError, RuntimeError, TimeoutError):
                await asyncio.wait_for(ws.close(), 2)

    async def read(self, ws: web.WebSocketResponse, session: Conversation, ear: Callable[[bytes], np.ndarray], box: Outbox) -> None:
        """Client to server. What cannot be read ends this session, with one line that says why."""
        limits, error = self.gate.limits, ""
        rate = Rate(limits.messages_per_second)
        try:
            while True:
                try:
                    message = await ws.receive(limits.idle_seconds)
                except TimeoutError:
                    if session.slot >= 0:
                        raise ValueError(f"nothing came for {limits.idle_seconds:g} s") from None
                    continue                                            # still in the queue
                if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                    error = f"a message is longer than {limits.message_bytes} bytes" if ws.close_code == 1009 else ""
                    break
                self.take(message, rate, session, ear, box)
        except ValueError as fault:
            error = str(fault)
        box.put("error" if error else "end", error)

    def take(self, message: WSMessage, rate: Rate, session: Conversation, ear: Callable[[bytes], np.ndarray], box: Outbox) -> None:
        """One message of the client; ValueError for what no client of this protocol sends."""
        if not rate.allow():
            raise ValueError(f"more than {self.gate.limits.messages_per_second:g} messages a second")
        if message.type is not WSMsgType.BINARY:
            raise ValueError("messages are binary: a byte for the kind, then the data")
        kind = message.data[:1]
        if kind == b"\1":
            if session.slot < 0:
                raise ValueError("audio came before the handshake")
            samples = ear(message.data[1:])
            if len(samples) > SAMPLES or not np.isfinite(samples).all():
                raise ValueError("a message holds too much audio, or none that can be played")
            session.hear(samples)
        elif kind == b"\6":
            box.put("ping", None)

    async def write(self, ws: web.WebSocketResponse, session: Conversation, box: Outbox, opus: bool) -> None:
        """Server to client: events in their order; every two silent seconds its place in the queue, or how often it was late."""
        told, mouth = session.late, sphn.OpusStreamWriter(self.scheduler.codec.sample_rate) if opus else None
        piece = Pieces(self.tokenizer, self.scheduler.model.table)
        while True:
            try:
                kind, value = await asyncio.wait_for(box.queue.get(), 2)
            except TimeoutError:
                await self.tell(box, ws, {"queue": self.scheduler.position(session)} if session.slot < 0 else {"late_frames": session.late})
                continue
            for code, data in self.messages(kind, value, mouth, piece):
                await self.say(box, ws, code, data)
            if kind in ("error", "end"):
                return
            if not opus and session.late > told:                        # our page shows it at once
                told = session.late
                await self.tell(box, ws, {"late_frames": told})

    def messages(self, kind: str, value: Any, mouth: Any, piece: Pieces) -> list[tuple[int, bytes]]:
        """What an event is to the client."""
        if kind == "ready":
            about = {"sample_rate": self.scheduler.codec.sample_rate, "frame_seconds": 1 / self.scheduler.codec.frame_rate}
            return [(HANDSHAKE, b"")] + ([] if mouth else [(METADATA, json.dumps(about).encode())])
        if kind == "audio":
            data = mouth.append_pcm(value) if mouth else to_pcm16(value)
            return [(AUDIO, data)] if data else []
        if kind in ("word", "pause"):
            return [(METADATA, json.dumps({kind: round(value, 3)}).encode())]
        if kind == "text":
            return [(TEXT, said.encode())] if (said := piece(value)) else []
        return [(PING, b"")] if kind == "ping" else [(ERROR, value.encode())] if kind == "error" else []

    async def tell(self, box: Outbox, ws: web.WebSocketResponse, about: dict[str, Any]) -> None:
        await self.say(box, ws, METADATA, json.dumps(about).encode())

    @staticmethod
    async def say(box: Outbox, ws: web.WebSocketResponse, kind: int, data: bytes) -> None:
        await box.send(lambda: ws.send_bytes(struct.pack("B", kind) + data))
