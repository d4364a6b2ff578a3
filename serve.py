"""Serve a model live: a page to talk to it, and the protocols that clients speak already. Needs pip install -e ".[serve]".

    python serve.py --ckpt out/talk                     http://127.0.0.1:8998, loopback only
    python serve.py --ckpt out/demo --run out/demo      also what the run has spoken, with its curves
    python serve.py --ckpt X --host 0.0.0.0 --token=SECRET --slots=16 --device=cuda --dtype=bf16

    /api/chat              the websocket of full-duplex speech models, Ogg/Opus (serving/chat_socket.py)
    /v1/realtime  /v1/audio/speech  /v1/chat/completions          OpenAI's (serving/openai_api.py)
    /health  /metrics  /voices  /about                            is it up, how is it, whose voices, what it can do

One batched step serves all sessions; a full server queues. Nothing that is said is kept, unless --log names a file. Next: serving/.
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import asyncio
import json
import logging
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import sphn  # noqa: F401
    from aiohttp import web
    from aiohttp.http_exceptions import HttpProcessingError
except ImportError as missing:
    raise SystemExit(f"error: serve.py needs the package {missing.name}; run pip install -e \".[serve]\"") from None

from audio import load_codec
from audio.wav import SOUNDS, load_wav
from corpus.bundled import recorded_users
from families.family import family_of
from generation.command_line import ModelOptions, load_for_sampling, usual_rules
from generation.decode_step import SampleConfig
from options import apply, edge, help_text, split_arguments
from serving.chat_socket import PARAMETERS, ChatSocket, to_pcm16
from serving.limits import LOOPBACK, Gate, Limits
from serving.openai_api import OpenAI, wav_header
from serving.run_samples import RunSamples
from serving.scheduler import Scheduler
from text.tokenizers import load_tokenizer

WEB = Path(__file__).resolve().parent / "web"
PAGES = {"/": "index.html"} | {f"/web/{name}": name for name in ("app.js", "sound.js", "recorder.js", "style.css")}
POLICY = "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; connect-src 'self' blob:; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
FAREWELL = 2.0              # seconds in which the sessions that a drain cuts off hear of it
# A request that is no HTTP is answered with 400, and who has gone is not answered: their traces would only fill the log.
QUIET = (HttpProcessingError, ConnectionError)
logging.getLogger("aiohttp.server").addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], QUIET)))


@dataclass(frozen=True)
class Serve(ModelOptions):
    """What `python serve.py` does."""

    host: str = "127.0.0.1"      # address to bind; anything but loopback wants a token
    port: int = 8998             # 0 = any free one
    token: str = ""              # what clients must know; "" = nothing, on loopback alone
    origins: tuple[str, ...] = ()  # other pages that may use this server, such as https://example.org behind a TLS proxy
    slots: int = 8               # sessions at once; more wait in a queue
    columns: int = 2048          # longest session of a model without a window
    run: str = ""                # run folder whose samples and curves the page shows
    voices: str = ""             # folder of voices to speak in: NAME.wav, and NAME.txt with what it says
    users: str = ""              # folder of recordings that a visitor without a microphone may play
    lookup: str = ""             # conversations: JSON file of facts by number, as for sample.py --chat; replies name no other figures
    log: str = ""                # jsonl file to append to: a masked line a conversation, of text a line a turn
    drain: float = 10.0          # seconds that running sessions get after SIGTERM
    limits: Limits = field(default_factory=Limits)      # what a client may do

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.slots > 0 and self.columns > 1 and 0 <= self.port < 65536 and self.drain >= 0
        assert fits, "slots, columns, port or drain is out of range"
        assert self.token or self.host in LOOPBACK, f"host {self.host} is not loopback; add --token=SECRET that clients must know"


class Server:
    """The model, its scheduler, and the routes."""

    def __init__(self, job: Serve, given: set[str]) -> None:
        self.job, self.draining = job, False
        model, data = load_for_sampling(job)
        self.table, self.family = model.table, family_of(model.table)
        job = replace(job, **usual_rules(self.table, given))
        self.usual = SampleConfig(**{f.name: getattr(job, f.name) for f in fields(SampleConfig)})
        self.codec = load_codec(data.codec, device=job.device) if self.table.codes else None
        self.scheduler = Scheduler(model, self.codec, job.slots, self.usual, job.columns, job.limits.most_waiting)
        self.gate, tokenizer = Gate(job.limits, job.token, job.origins), load_tokenizer(data.tokenizer)
        self.roles = self.family.persona is not None
        self.voices, self.users = voices_of(job.voices, said=not self.roles), users_of(job.users, tokenizer)
        log = self.write_log if job.log else None
        self.chat = ChatSocket(self.scheduler, self.gate, self.usual, tokenizer, job.skip_first_frame, log, self.voices, data.system)
        self.api = OpenAI(self.scheduler, self.gate, self.usual, data, tokenizer, self.voices, job.lookup, log)
        self.samples = RunSamples(Path(job.run), self.gate) if job.run else None
        self.log_lock = threading.Lock()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=max(self.job.limits.body_bytes, self.job.limits.voice_bytes), middlewares=[self.guard])
        routes = [("GET", path, self.page) for path in PAGES]
        routes += [("GET", f"/{name}", getattr(self, name)) for name in ("health", "metrics", "about")]
        routes += [("GET", "/voices", self.list_voices), ("GET", "/users/{name}", self.user)]
        routes += [("GET", "/api/chat", self.converse), ("GET", "/v1/realtime", self.api.realtime)]
        routes += [("POST", "/v1/audio/speech", self.api.speech), ("POST", "/v1/chat/completions", self.api.completions)]
        if self.samples:
            routes += [("GET", "/run/index", self.samples.index), ("GET", "/run/{step}/{name}", self.samples.file)]
        app.add_routes([web.route(*route) for route in routes])
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """No new sessions while draining; security headers on everything."""
        if self.draining and (request.path.startswith("/v1/") or request.path == "/api/chat"):
            raise web.HTTPServiceUnavailable(text="the server is going down\n", headers={"Retry-After": "10"})
        try:
            response = await handler(request)
        except ValueError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def page(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(WEB / PAGES[request.path], headers={"Cache-Control": "no-cache"})

    async def converse(self, request: web.Request) -> web.StreamResponse:
        if self.family.user_audio != "duplex":
            raise web.HTTPBadRequest(text=f"a {self.family.name} model does not listen while it speaks; the page shows what it can do\n")
        return await self.chat.handle(request)

    async def health(self, request: web.Request) -> web.Response:
        alive = self.scheduler.thread.is_alive()
        return web.json_response({"ok": alive, "draining": self.draining}, status=200 if alive and not self.draining else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        self.gate.check(request)
        return web.Response(text=self.scheduler.metrics.text(len(self.scheduler.active), len(self.scheduler.queue)))

    async def list_voices(self, request: web.Request) -> web.Response:
        self.gate.check(request)
        return web.json_response({"voices": sorted(self.voices)})

    async def about(self, request: web.Request) -> web.Response:
        """What the page shows: what this model does, its options with their ranges."""
        self.gate.check(request)
        family, rules = self.family, self.usual
        kind = "duplex" if family.user_audio == "duplex" else "chat" if family.template and not family.text_to_speech else "speech"

        def usual(rule: Any, last: bool) -> float:
            return (rule[-1 if last else 0]) if isinstance(rule, tuple) else rule

        values = {"text_temperature": usual(rules.temperature, False), "text_topk": usual(rules.top_k, False),
                  "audio_temperature": usual(rules.temperature, True), "audio_topk": usual(rules.top_k, True)}
        most = {"text_temperature": 2.0, "audio_temperature": 2.0, "text_topk": 500, "audio_topk": 500}
        options = [{"name": name, "low": PARAMETERS[name][0], "high": most[name], "value": value} for name, value in values.items()]
        return web.json_response({
            "model": family.name, "kind": kind, "sample_rate": self.codec.sample_rate if self.codec else 0,
            "frame_seconds": self.scheduler.period, "slots": self.job.slots,
            "options": options, "voices": sorted(self.voices), "users": sorted(self.users), "run": self.samples is not None,
            "text_characters": self.job.limits.text_characters,
            "speaks": kind == "chat" and bool(family.template.audio_out),
            "roles": self.roles, "clones": kind == "speech" and bool(family.references or family.template)})

    async def user(self, request: web.Request) -> web.Response:
        """A recorded user."""
        self.gate.check(request)
        wav = self.users.get(request.match_info["name"])
        if wav is None or self.codec is None:
            raise web.HTTPNotFound(text="there is no such recording\n")
        wav, rate = (wav, 16_000) if not isinstance(wav, Path) else load_wav(wav, self.codec.sample_rate)
        return web.Response(body=wav_header(rate) + to_pcm16(wav[0].numpy()), content_type="audio/wav")

    def write_log(self, row: dict[str, Any]) -> None:
        """One masked line a conversation."""
        with self.log_lock, Path(self.job.log).open("a", encoding="utf-8") as file:
            print(json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **row}, ensure_ascii=False), file=file)

    async def run(self, started: Any = None) -> None:
        """Serve until SIGTERM or SIGINT, then let running sessions finish."""
        self.scheduler.start()
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, self.job.host, self.job.port)
        await site.start()
        port = runner.addresses[0][1]
        print(f"http://{self.job.host}:{port} serves {self.job.ckpt} to {self.job.slots} sessions at once; Ctrl-C ends it", flush=True)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ():
            loop.add_signal_handler(name, stop.set)
        if started is not None:
            started(port, lambda: loop.call_soon_threadsafe(stop.set))
        await stop.wait()
        self.draining, until = True, time.monotonic() + self.job.drain
        while self.scheduler.active and time.monotonic() < until:
            await asyncio.sleep(0.1)
        for session in [*self.scheduler.active.values(), *self.scheduler.queue]:
            session.on_event("error", "the server is going down")
        while self.gate.here and time.monotonic() < until + FAREWELL:
            await asyncio.sleep(0.02)
        await runner.cleanup()
        self.scheduler.stop()


def voices_of(folder: str, said: bool = True) -> dict[str, tuple[str, str]]:
    """The voices of a folder by name: a recording, and what it says in the .txt beside it, if that is asked for (`said`)."""
    if not folder:
        return {}
    paths = [path for path in sorted(Path(folder).iterdir(), key=lambda path: (path.suffix != ".pt", path))
             if path.suffix.lower() in (SOUNDS if said else (".pt", *SOUNDS))]
    found = {path.stem: (str(path), path.with_suffix(".txt")) for path in paths}       # of a name twice the recording
    lacking = [name for name, (_, text) in found.items() if said and not text.is_file()]
    if lacking:
        raise ValueError(f"--voices={folder}: {lacking[0]} has no {lacking[0]}.txt beside it with what it says")
    return {name: (path, text.read_text(encoding="utf-8").strip() if said else "") for name, (path, text) in found.items()}


def users_of(folder: str, tokenizer: Any) -> dict[str, Any]:
    """Recorded users by name: those of a folder, or digits of the bundled voices where the model's words are those."""
    if folder:
        return {path.stem: path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in SOUNDS}
    try:
        tokenizer.encode("(one)")
    except ValueError:
        return {}
    return recorded_users() if tokenizer.decode(tokenizer.encode("(one)")) == "(one)" and tokenizer.size < 100 else {}


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    if "help" in pairs or not pairs:
        print(help_text(Serve(), "python serve.py --ckpt out/talk [--host 127.0.0.1 --port 8998]"))
        return
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options look like --port=8998")
    job = apply(Serve(), pairs)
    asyncio.run(Server(job, set(pairs)).run())


if __name__ == "__main__":
    edge(main)
