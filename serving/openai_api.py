"""OpenAI's protocols over the same sessions: /v1/realtime, /v1/audio/speech, /v1/chat/completions. Thin: what is not here is refused.

    realtime          input_audio_buffer.append {"audio": base64} -> response.output_audio.delta, ..._transcript.delta
                      samples of 16 bits at 24 kHz, or what session.update says: {"audio": {"input": {"format": {"type": "audio/pcm",
                      "rate": 16000}}}}; "audio/opus" is Ogg/Opus
    audio/speech      {"input": text, "voice": name, "response_format": "wav" | "pcm" | "opus"} -> sound as it is spoken; in place of
                      a name a voice of one's own: {"ref_audio": base64 of a sound file, "ref_text": what it says}
    chat/completions  {"messages": [...], "stream": true} -> text as it is written, {"modalities": ["text", "audio"]} -> also speech,
                      samples of 16 bits at 24 kHz
"""

import asyncio
import base64
import binascii
import json
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sphn
import torch
from aiohttp import WSMsgType, web

from audio.wav import resample
from corpus.data_config import DataConfig
from corpus.examples import prompt_example
from families.family import family_of, lay_out
from generation.conversation import COMMANDS, ChatConfig, Session, read_lookup
from generation.decode_step import SampleConfig
from options import parse_row
from sample import sounding
from serving.chat_socket import OpusEar, Outbox, Pieces, pcm16, session_rules, to_pcm16
from serving.limits import Gate, Rate, printable
from serving.scheduler import Conversation, Scheduler, frames_of
from text.tokenizers import Tokenizer

RATE = 24_000               # of OpenAI's 16-bit samples, unless a client says otherwise


class Resampler:
    """Samples piece by piece from one rate to another; the pieces joined are the whole, up to what is held back (half a filter)."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        common = math.gcd(from_rate, to_rate)
        self.rates, self.up, self.down = (from_rate, to_rate), to_rate // common, from_rate // common
        self.edge = -(-math.ceil(64 * max(1.0, self.down / self.up)) // self.down) * self.down      # of context, a multiple of `down`
        self.kept = np.zeros(self.edge, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        if self.up == self.down:
            return samples
        self.kept = np.concatenate([self.kept, samples])
        whole = max(0, len(self.kept) - 2 * self.edge) // self.down * self.down
        if not whole:
            return np.zeros(0, np.float32)
        made = resample(torch.from_numpy(self.kept[: whole + 2 * self.edge]), *self.rates).numpy()
        begin = self.edge * self.up // self.down
        self.kept = self.kept[whole:]
        return made[begin : begin + whole * self.up // self.down]


class OpenAI:
    """The handlers; `voices` maps a name to (recording, what it says)."""

    def __init__(self, scheduler: Scheduler, gate: Gate, usual: SampleConfig, data: DataConfig, tokenizer: Tokenizer,
                 voices: dict[str, tuple[str, str]], lookup: str = "", log: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.scheduler, self.gate, self.usual, self.data, self.tokenizer, self.voices = scheduler, gate, usual, data, tokenizer, voices
        self.table, self.family, self.codec, self.log = scheduler.model.table, family_of(scheduler.model.table), scheduler.codec, log
        self.chat = self.family.template and Session(
            self.table, data, ChatConfig(budget=scheduler.columns * 3 // 4, grounded=bool(lookup)), say=lambda prompt: iter(()),
            lookup=read_lookup(lookup) if lookup else None, reply="text", codec=self.codec, commands=COMMANDS if lookup else ())

    # ---- speech and text ----

    async def speech(self, request: web.Request) -> web.StreamResponse:
        """Speak a text; the sound is sent as it is made."""
        body = await self.body(request, self.gate.limits.voice_bytes, input=str)
        kind = body.get("response_format", "wav")
        if kind not in ("wav", "pcm", "opus"):
            raise web.HTTPBadRequest(text=f"response_format {printable(str(kind))} is none of wav, pcm, opus\n")
        if not self.table.codes_out or self.family.user_audio == "duplex":
            raise web.HTTPBadRequest(text=f"a {self.family.name} model speaks no given text\n")
        rules = self.rules(body)
        try:
            prompt, feed = await asyncio.to_thread(self.spoken_prompt, body)
        except (ValueError, OSError) as error:                             # OSError: a voice's file has gone
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        response = web.StreamResponse(headers={"Content-Type": {"wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg"}[kind],
                                               "X-Sample-Rate": str(self.codec.sample_rate)})
        address = self.gate.enter(request)
        try:
            await response.prepare(request)
            rate = self.codec.sample_rate
            mouth = sphn.OpusStreamWriter(rate) if kind == "opus" else None
            if kind == "wav":                                              # also of a model that ends at once: a file without sound
                await asyncio.wait_for(response.write(wav_header(rate)), self.gate.limits.send_seconds)
            async with aclosing(threaded(lambda: self.spoken(prompt, feed, rules))) as pieces:
                async for wav in pieces:
                    data = mouth.append_pcm(wav) if mouth else to_pcm16(wav)
                    await asyncio.wait_for(response.write(data), self.gate.limits.send_seconds)
            await response.write_eof()
        finally:
            self.gate.leave(address)
        return response

    def spoken_prompt(self, body: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        text, voice = body["input"], body.get("voice", "")
        if not 0 < len(text.strip()) <= self.gate.limits.text_characters:
            raise ValueError(f"input has {len(text)} characters, 1 to {self.gate.limits.text_characters} are spoken")
        if voice and voice not in self.voices:
            raise ValueError(f"voice {printable(str(voice))} is none of {', '.join(self.voices) or 'none'}")
        with uploaded(body) as own:
            if own and voice:
                raise ValueError("voice and ref_audio are two voices; give one of them")
            voices = own or ([self.voices[voice]] if voice else [])
            example = prompt_example(text, self.data, self.tokenizer, self.codec, voices, self.table)
        return lay_out(example, self.table)[0], self.family.feed and self.family.feed([example.text], self.table)

    def spoken(self, prompt: torch.Tensor, feed: Any, rules: SampleConfig) -> Iterator[np.ndarray]:
        mouth, heard = self.codec.stream(), False
        with closing(frames_of(self.scheduler, prompt, rules, feed)) as frames:
            for frame in frames:
                codes = frame[:, self.table.codes_out]
                if bool((codes >= 0).all()):
                    wav, heard = mouth.decode(sounding(codes[..., None], self.codec))[0, 0], True
                    yield wav.float().numpy()
        if heard:
            yield mouth.flush()[0, 0].float().numpy()

    def rules(self, body: dict[str, Any]) -> SampleConfig:
        """The server's rules with what a request changes."""
        found = {name: body[key] for name, key in (("temperature", "temperature"), ("top_p", "top_p"), ("seed", "seed"),
                                                   ("max_frames", "max_tokens")) if body.get(key) is not None}
        try:
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 2**31 for v in found.values()):
                raise ValueError(f"{', '.join(found)} are numbers that are not negative")
            return replace(self.usual, **found)
        except (ValueError, AssertionError, TypeError) as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer messages with text, and with speech where that is asked for."""
        body = await self.body(request, self.gate.limits.body_bytes, messages=list)
        if self.chat is None:
            raise web.HTTPBadRequest(text=f"a {self.family.name} model has no chat template\n")
        rules, rows = self.rules(body), list[dict[str, Any]]()
        try:
            turns = [parse_row(json.dumps(m), role=str, content=str) for m in body["messages"]]
            if not turns or turns[-1]["role"] != "user" or not {m["role"] for m in turns} <= {"system", "user", "assistant"}:
                raise ValueError("messages are of system, user and assistant, and the last one is the user's")
            session = self.chat.behind(turns[:-1], lambda prompt: frames_of(self.scheduler, prompt, rules), rows.append)
            session.answer_in("speech" if "audio" in (body.get("modalities") or ()) else "text")
        except (ValueError, KeyError, TypeError) as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        about = {"id": f"chatcmpl-{uuid.uuid4().hex[:20]}", "created": int(time.time()), "model": body.get("model", self.family.name)}
        pieces = threaded(lambda: session.hear(turns[-1]["content"], files=False))
        address = self.gate.enter(request)
        try:
            async with aclosing(pieces):
                return await (self.stream if body.get("stream") else self.whole)(request, pieces, rows, about)
        finally:
            self.gate.leave(address)
            if self.log is not None and rows:
                self.log(rows[0])

    async def whole(self, request: web.Request, pieces: AsyncIterator[tuple[str, Any]], rows: list[dict[str, Any]],
                    about: dict[str, Any]) -> web.Response:
        """A reply in one piece."""
        said, heard = "", list[np.ndarray]()
        async for kind, piece in pieces:
            said, heard = (said + piece, heard) if kind == "text" else (said, [*heard, piece[0].float().cpu().numpy()])
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if heard:
            wav = wav_header(self.codec.sample_rate) + to_pcm16(np.concatenate(heard))
            message["audio"] = {"data": base64.b64encode(wav).decode(), "transcript": said}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(rows)}
        return web.json_response(about | {"object": "chat.completion", "choices": [choice]})

    async def stream(self, request: web.Request, pieces: AsyncIterator[tuple[str, Any]], rows: list[dict[str, Any]],
                     about: dict[str, Any]) -> web.StreamResponse:
        """A reply as it comes, in server-sent events."""
        response, mouth = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}), None

        async def send(delta: dict[str, Any], reason: str | None = None) -> None:
            event = about | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            await asyncio.wait_for(response.write(data), self.gate.limits.send_seconds)

        await response.prepare(request)
        async for kind, piece in pieces:
            if kind == "text":
                await send({"content": piece})
                continue
            mouth = mouth or self.mouth("audio/pcm", RATE)
            await send({"audio": {"data": base64.b64encode(mouth(piece[0].float().cpu().numpy())).decode()}})
        await send({}, finish_reason(rows))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def body(self, request: web.Request, most: int, **fields: type) -> dict[str, Any]:
        self.gate.check(request)
        if len(raw := await request.read()) > most:
            raise web.HTTPRequestEntityTooLarge(most, len(raw), text=f"the body has {len(raw)} bytes, {most} are the limit\n")
        try:
            return parse_row(raw.decode(), **fields)
        except (ValueError, UnicodeDecodeError) as error:
            raise web.HTTPBadRequest(text=f"the body is no such JSON: {error}\n") from None

    # ---- realtime ----

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        """A conversation as JSON events."""
        self.gate.check(request)
        if self.family.user_audio != "duplex":
            raise web.HTTPBadRequest(text=f"a {self.family.name} model does not listen while it speaks; use /v1/chat/completions\n")
        limits, address = self.gate.limits, self.gate.enter(request)
        ws = web.WebSocketResponse(max_msg_size=2 * limits.message_bytes, heartbeat=20, compress=False)
        box, session = None, None
        try:
            await ws.prepare(request)
            box = Outbox(limits)
            rules = session_rules({}, self.usual, self.table, limits, self.codec.frame_rate)
            session = Conversation(self.scheduler, rules, box.put)
            self.scheduler.enter(session)
            formats = {"input": ("audio/pcm", RATE), "output": ("audio/pcm", RATE)}
            reader = asyncio.create_task(self.read(ws, session, box, formats))
            try:
                await self.write(ws, box, formats)
            finally:
                reader.cancel()
        except ValueError as error:
            with suppress(ConnectionError, RuntimeError):
                await ws.send_json({"type": "error", "error": {"type": "invalid_request_error", "message": str(error)}})
        except (ConnectionError, RuntimeError):
            self.scheduler.metrics.counts["dropped_readers"] += 1
        finally:
            if session is not None:
                self.scheduler.leave(session)
            self.gate.leave(address)
            with suppress(ConnectionError, RuntimeError, TimeoutError):
                await asyncio.wait_for(ws.close(), 2)
        return ws

    async def read(self, ws: web.WebSocketResponse, session: Conversation, box: Outbox, formats: dict[str, tuple[str, int]]) -> None:
        rate, ear, error = Rate(self.gate.limits.messages_per_second), None, ""
        try:
            async for message in ws:
                if not rate.allow():
                    raise ValueError(f"more than {self.gate.limits.messages_per_second:g} messages a second")
                if message.type is not WSMsgType.TEXT:
                    raise ValueError("events are JSON text")
                event = parse_row(message.data, type=str)
                if event["type"] == "session.update":
                    formats |= wanted_formats(event.get("session"))
                    ear = None
                    box.put("updated", None)
                elif event["type"] == "input_audio_buffer.append":
                    ear = ear or self.ear(*formats["input"])
                    session.hear(ear(decoded(event.get("audio"))))
                elif event["type"] not in ("input_audio_buffer.commit", "input_audio_buffer.clear", "response.create", "response.cancel"):
                    raise ValueError(f"event {printable(event['type'])} is unknown here")     # those four mean nothing without turns
        except ValueError as fault:
            error = str(fault)
        box.put("error" if error else "end", error)

    def ear(self, kind: str, rate: int) -> Callable[[bytes], np.ndarray]:
        if kind == "audio/opus":
            return OpusEar(self.codec.sample_rate)
        resampler = Resampler(rate, self.codec.sample_rate)
        return lambda data: resampler(pcm16(data))

    async def write(self, ws: web.WebSocketResponse, box: Outbox, formats: dict[str, tuple[str, int]]) -> None:
        mouth, piece, about = None, Pieces(self.tokenizer, self.table), {"response_id": f"resp_{uuid.uuid4().hex[:20]}"}
        while True:
            kind, value = await box.queue.get()
            event: dict[str, Any] | None = None
            if kind == "ready":
                event = {"type": "session.created", "session": {"model": self.family.name}}
            elif kind == "updated":
                mouth, event = None, {"type": "session.updated", "session": {"audio": {k: dict(zip(("type", "rate"), v, strict=True))
                                                                                       for k, v in formats.items()}}}
            elif kind == "audio":
                mouth = mouth or self.mouth(*formats["output"])
                data = mouth(value)
                event = {"type": "response.output_audio.delta", **about, "delta": base64.b64encode(data).decode()} if data else None
            elif kind == "text" and (said := piece(value)):
                event = {"type": "response.output_audio_transcript.delta", **about, "delta": said}
            elif kind == "error":
                raise ValueError(value)
            elif kind == "end":
                return
            if event is not None:
                await box.send(lambda event=event: ws.send_json(event))

    def mouth(self, kind: str, rate: int) -> Callable[[np.ndarray], bytes]:
        if kind == "audio/opus":
            return sphn.OpusStreamWriter(self.codec.sample_rate).append_pcm
        resampler = Resampler(self.codec.sample_rate, rate)
        return lambda samples: to_pcm16(resampler(samples))


def decoded(audio: Any) -> bytes:
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("audio is no base64") from None


def wanted_formats(session: Any) -> dict[str, tuple[str, int]]:
    """What session.update says of the audio, each side that it names."""
    audio = session.get("audio", {}) if isinstance(session, dict) else None
    if not isinstance(audio, dict):
        raise ValueError('session.update wants {"session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}}}}}')
    found = {}
    for side in ("input", "output"):
        form = audio.get(side, {}).get("format") if isinstance(audio.get(side, {}), dict) else None
        if form is None:
            continue
        kind, rate = (form.get("type"), form.get("rate", RATE)) if isinstance(form, dict) else (None, None)
        if kind not in ("audio/pcm", "audio/opus") or not isinstance(rate, int) or not 8_000 <= rate <= 48_000 or rate % 1000:
            raise ValueError("a format is audio/pcm with a rate of 8000 to 48000, or audio/opus")
        found[side] = kind, rate
    return found


def wav_header(rate: int) -> bytes:
    """The header of a wav whose length nobody knows yet."""
    return b"".join([b"RIFF", b"\xff" * 4, b"WAVEfmt ", (16).to_bytes(4, "little"), (1).to_bytes(2, "little"), (1).to_bytes(2, "little"),
                     rate.to_bytes(4, "little"), (2 * rate).to_bytes(4, "little"), (2).to_bytes(2, "little"), (16).to_bytes(2, "little"),
                     b"data", b"\xff" * 4])


def finish_reason(rows: Sequence[dict[str, Any]]) -> str:
    """Of a turn whose log entry was written."""
    return "length" if rows and rows[0]["cut"] == "length" else "stop"


@contextmanager
def uploaded(body: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """The voice that a request brings along, [] without one. It is a file only as long as it is read."""
    if not body.get("ref_audio"):
        yield []
        return
    said = body.get("ref_text")
    if not isinstance(said, str) or not said.strip():
        raise ValueError("ref_audio needs ref_text: what the recording says, word for word")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ref_audio"
        path.write_bytes(decoded(body["ref_audio"]))
        try:
            yield [(str(path), said)]
        except ValueError as error:                                        # no paths of this machine
            raise ValueError(str(error).replace(str(path), path.name)) from None


async def threaded(make: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
    """Run an iterator in a thread; closing this one closes it."""
    loop, queue, stop = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]](), threading.Event()

    def put(kind: str, value: Any) -> None:
        with suppress(RuntimeError):                                    # the loop has closed
            loop.call_soon_threadsafe(queue.put_nowait, (kind, value))

    def work() -> None:
        try:
            with closing(make()) as items:
                for item in items:
                    if stop.is_set():
                        return
                    put("item", item)
            put("end", None)
        except (ValueError, OSError) as error:
            put("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = await queue.get()
            if kind == "item":
                yield value
            elif kind == "error":
                raise web.HTTPServiceUnavailable(text=f"{value}\n") if not isinstance(value, OSError) else value
            else:
                return
    finally:
        stop.set()
