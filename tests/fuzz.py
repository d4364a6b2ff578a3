"""The fuzzer: files that people bring, damaged at random, through every loader.

    python tests/fuzz.py --cases=20000 --seed=0       so many cases (without: until Ctrl-C); exit code 1 when one is at fault
    python tests/fuzz.py --case=1234                  one of them, with its trace

A case takes a good file, damages it (bits, cuts, pieces twice or moved; of JSON also wrong types, missing and strange fields, huge
numbers, deep nesting) and loads it. The loader may succeed, or end in a ValueError or OSError of one line below 500 characters.
Anything else is a fault: another exception, a line of several, more than 20 seconds, and a success whose result differs from that
of the file before although a checksum covers it, or is not the same after it was saved and loaded again.
What clients send to serve.py is such a file too: bytes of a connection, from the request line to the frames of a websocket. The
server may answer, refuse or close; a trace in its log, a status of 500, silence, or a server that is gone are faults.
"""

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from conftest import CONFIG, write_clips  # noqa: E402
from safetensors import safe_open  # noqa: E402

import lora  # noqa: E402
from audio import load_codec  # noqa: E402
from audio.mimi import MimiCodec  # noqa: E402
from audio.tiny import TinyCodec  # noqa: E402
from audio.wav import load_wav  # noqa: E402
from checkpoint import Extras, base_of, export, load, save  # noqa: E402
from config import TrainConfig  # noqa: E402
from corpus.bundled import DIGITS  # noqa: E402
from corpus.index import open_cache, prepare  # noqa: E402
from corpus.layouts import read_manifest  # noqa: E402
from evaluation.duplex_measures import measure_file  # noqa: E402
from evaluation.speech_measures import samples  # noqa: E402
from generation.conversation import read_lookup  # noqa: E402
from model import MultistreamLM  # noqa: E402
from options import apply, error_line, from_json, out_of_memory, read_json, run_config, to_json  # noqa: E402
from text.tokenizers import load_tokenizer  # noqa: E402
from text.word_times import parse_alignments  # noqa: E402
from training.monitor import read_metrics, rewind  # noqa: E402
from training.run_state import RunState, check_run, load_run, save_run  # noqa: E402

SECONDS = 20
STRANGE = (None, True, -1, 0, 2**31, 2**63, 10**12, 10**30, 1e400, float("nan"), -0.5, "", "x", "\x1b[31m\n",
           "9" * 5000, [], {}, [[]], ["x"],
           {"x": 1}, [1, 2, 3], "../../x", "\udc80")


@dataclass
class Loader:
    """How one kind of file is loaded, and which files of a folder may be damaged."""

    run: Callable[[Path], Any]                  # a folder -> what was loaded, in a form that can be compared
    files: Callable[[Path], list[Path]]
    covered: bool = False                       # a checksum covers these files: a damaged one never loads as something else


# ---- good files ----

def weights(model: MultistreamLM) -> dict[str, Any]:
    return {"config": to_json(model.config), **{name: p.detach().clone() for name, p in model.named_parameters()}}


def loaded_twice(folder: Path, again: Path) -> dict[str, Any]:
    """A model, which is the same after it was saved and loaded again."""
    model = load(folder)
    found = weights(model)
    shutil.rmtree(again, ignore_errors=True)
    save(model, again, replace(model.extras, base="", data=None))
    if not equal(found, weights(load(again))):
        raise AssertionError("saved and loaded again it is another model")
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return json.dumps(a, default=str) == json.dumps(b, default=str)


def build(home: Path) -> dict[str, tuple[Path, Loader]]:
    """Good files of every kind: name -> their folder, and how they are loaded."""
    torch.manual_seed(0)
    write_clips(home / "clips", 6)
    (home / "tiny_run.py").write_text(CONFIG)
    config: TrainConfig = run_config(home / "tiny_run.py")
    table, data = config.model.table, config.data
    model = MultistreamLM(config.model)
    save(model, home / "own", Extras(data={"tokenizer": "bytes", "codec": "tiny", "normaliser": "none"}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    state = RunState(step=3, loader={"draw": 1, "counts": [1], "row": 0})
    step = save_run(home / "run", model, optimizer, state, config, Extras(), None, 0)
    text = MultistreamLM(run_config(ROOT / "configs/ivr_dpo.py", "smoke").model)
    official = export(text, home / "hf", "hf")
    lora.inject(text, lora.LoraConfig(2, 4.0, ("attn.q",)))
    for _, _, adapter in lora.adapters(text):
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    text.extras = Extras(folder=str(official))
    export(text, home / "peft", "peft")
    save(text, home / "own_adapter", Extras(base=str(official)))
    prepare(data, table)
    (home / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "val/loss": 2.25}\n')
    (home / "samples.jsonl").write_text('{"text": "one", "wav": "0.wav"}\n')
    (home / "facts.json").write_text('{"48213": {"order": "48213", "status": "shipped"}}')
    (home / "two.json").write_text(json.dumps({"alignments": [["hi", [0.0, 0.4], "SPEAKER_MAIN"]], "text": [1, 2], "pads": [3, 0]}))
    soundfile.write(home / "two.wav", torch.randn(8000, 2).mul(0.1).numpy(), 16000)
    soundfile.write(home / "one.flac", torch.randn(8000).mul(0.1).numpy(), 16000)
    (home / "config.json").write_text(json.dumps(to_json(config)))
    kinds: dict[str, Loader] = {
        "own": Loader(lambda f: loaded_twice(f / "own", f / "again"), lambda f: [p for p in (f / "own").iterdir()], True),
        "official": Loader(lambda f: loaded_twice(f / "hf", f / "again"), lambda f: [p for p in (f / "hf").iterdir()]),
        "peft": Loader(lambda f: weights(load(f / "hf", adapter=f / "peft")), lambda f: [p for p in (f / "peft").iterdir()]),
        "base_of": Loader(lambda f: base_of(str(f / "peft")), lambda f: [f / "peft/adapter_config.json"]),
        "own_adapter": Loader(lambda f: weights(load(f / "own_adapter")), lambda f: [p for p in (f / "own_adapter").iterdir()], True),
        "run": Loader(lambda f: resumed(f / step.relative_to(home), config), lambda f: [
            p for p in (f / step.relative_to(home)).rglob("*") if p.is_file()], True),
        "cache": Loader(lambda f: cached(replace(data, cache=str(f / "cache")), table), lambda f: [
            p for p in (f / "cache").rglob("*") if p.is_file()], True),
        "manifest": Loader(lambda f: sorted(read_manifest(str(f / "clips")).clips), lambda f: [f / "clips/manifest.jsonl"]),
        "tokenizer": Loader(lambda f: load_tokenizer(f / "tokenizer.json").encode("one two"), lambda f: [f / "tokenizer.json"]),
        "words": Loader(lambda f: load_tokenizer(f / "clips/words.json").size, lambda f: [f / "clips/words.json"]),
        "metrics": Loader(lambda f: (read_metrics(f / "metrics.jsonl"), str(rewind(f / "metrics.jsonl", 2, 2)))[0],
                          lambda f: [f / "metrics.jsonl"]),
        "samples": Loader(lambda f: samples(f / "samples.jsonl"), lambda f: [f / "samples.jsonl"]),
        "facts": Loader(lambda f: read_lookup(str(f / "facts.json")) is None, lambda f: [f / "facts.json"]),
        "alignments": Loader(lambda f: list(map(list, parse_alignments(read_json(f / "two.json")))), lambda f: [f / "two.json"]),
        "dialogue": Loader(lambda f: measure_file(f / "two.wav"), lambda f: [f / "two.json", f / "two.wav"]),
        "sound": Loader(lambda f: load_wav(f / "one.flac", 8000)[0], lambda f: [f / "one.flac"]),
        "config": Loader(lambda f: to_json(from_json(TrainConfig, read_json(f / "config.json"))), lambda f: [f / "config.json"]),
        "codec": Loader(lambda f: len(TinyCodec.load(f / "codec.safetensors").state_dict()), lambda f: [f / "codec.safetensors"]),
        "option": Loader(lambda f: to_json(apply(config, dict(
            line.split("=", 1) for line in (f / "options.txt").read_text(errors="replace").splitlines() if "=" in line))),
            lambda f: [f / "options.txt"]),
    }
    shutil.copy(ROOT / "assets/tiny_qwen_tokenizer.json", home / "tokenizer.json")
    shutil.copy(ROOT / "assets/tiny_codec.safetensors", home / "codec.safetensors")
    kinds |= codecs(home)
    if absent := [name for name in ("aiohttp", "sphn") if not importlib.util.find_spec(name)]:
        print(f"sockets are left out: {' and '.join(absent)} not installed", file=sys.stderr)
    else:
        kinds |= sockets(home, config.model)
    (home / "options.txt").write_text("lr=1e-3\nbetas=0.9,0.95\nmodel.temporal.layers=2\nrates=(('*',0.5),)\nseed=3\n")
    return {name: (home, loader) for name, loader in kinds.items()}


# ---- codecs ----

def codecs(home: Path) -> dict[str, Loader]:
    """A codec of each kind, in the layouts in which they are published."""
    import test_higgs_codec
    import test_mimi
    import test_moss_codec
    test_higgs_codec.Golden("higgs_codec").write(home / "higgs")
    test_moss_codec.write(home / "moss")
    golden = test_mimi.GOLDEN
    with safe_open(golden, "pt") as file:
        about = json.loads(file.metadata()["hf_config"]) | {"codebook_size": test_mimi.TINY.codebook_size}
        state = {n.removeprefix("weights/"): file.get_tensor(n).float() for n in file.keys() if n.startswith("weights/")}
    folder = test_mimi.write(home / "mimi", test_mimi.transformers_state(MimiCodec(test_mimi.TINY, 8), state), "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about))

    def run(name: str, folder: Path) -> list[str]:
        codec = load_codec(folder / name)
        if broken := [n for n, t in codec.state_dict().items() if not t.isfinite().all()]:
            raise AssertionError(f"{broken[0]} is not finite")
        return [n for n, _ in codec.named_parameters()]

    return {name: Loader(partial(run, name), lambda f, name=name: [p for p in (f / name).rglob("*") if p.is_file()])
            for name in ("higgs", "mimi", "moss")}


# ---- sockets ----

class Raised(logging.Handler):
    """What a server logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.getMessage()} {type(error).__name__}: {error}")


def sockets(home: Path, speaking: Any) -> dict[str, Loader]:
    """Three servers (a duplex model, one that speaks, one that writes), and what a client of each protocol sends them."""
    import serve
    from serving.limits import Limits
    logged = Raised()
    logging.getLogger().addHandler(logged)
    limits = Limits(sessions_per_address=1000, most_waiting=1000, session_seconds=2.0, idle_seconds=1.0, send_seconds=2.0)

    def start(name: str, model: MultistreamLM, tokenizer: Path) -> int:
        save(model, home / "served" / name, Extras(1, {"codec": "tiny", "tokenizer": str(tokenizer), "normaliser": "none"}))
        job = serve.Serve(ckpt=str(home / "served" / name), port=0, slots=2, drain=0.0, max_frames=6, limits=limits)
        server, ready, found = serve.Server(job, {"max_frames"}), threading.Event(), []

        def started(port: int, _: Any) -> None:
            found.append(port)
            ready.set()

        threading.Thread(target=lambda: asyncio.run(server.run(started)), daemon=True).start()
        assert ready.wait(60)
        return found[0]

    duplex = run_config(ROOT / "configs/tiny_duplex.py").model
    duplex = replace(duplex, temporal=replace(duplex.temporal, dim=16, layers=1, heads=2, ffn=16))
    words = home / "digits.json"
    words.write_text(json.dumps(["<s>", "</s>", "<pad>", *DIGITS, *(f"({word})" for word in DIGITS)]))
    talk = start("talk", MultistreamLM(duplex), words)
    speak = start("speak", MultistreamLM(speaking), home / "clips/words.json")
    write = start("write", MultistreamLM(run_config(ROOT / "configs/ivr_dpo.py", "smoke").model), ROOT / "assets/tiny_qwen_tokenizer.json")
    sound = base64.b64encode(bytes(1280)).decode()
    events = ({"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}},
              {"type": "input_audio_buffer.append", "audio": sound})
    speech = {"input": "one two", "response_format": "wav", "seed": 5, "temperature": 0.5}
    turns = {"messages": [{"role": "user", "content": "Hello"}], "seed": 3, "max_tokens": 4, "temperature": 0.9, "stream": True}
    sent: dict[str, tuple[int, bytes, Callable[[bytes], bytes]]] = {          # the server, a file, and what a client makes of it
        "chat_socket": (talk, upgrade("/api/chat?format=pcm16&text_temperature=0.5&max_steps=4") + b"".join(
            frame(2, b"\1" + bytes(1280)) for _ in range(4)) + frame(2, b"\6") + frame(8, b"\x03\xe8"), bytes),
        "opus_socket": (talk, upgrade("/api/chat?max_steps=4") + b"".join(frame(2, b"\1" + piece) for piece in sphn_opus())
                        + frame(8, b""), bytes),
        "realtime.jsonl": (talk, b"\n".join(json.dumps(event).encode() for event in events), lambda lines: upgrade("/v1/realtime")
                           + b"".join(frame(1, line) for line in lines.split(b"\n")) + frame(8, b"")),
        "speech_request": (speak, post("/v1/audio/speech", json.dumps(speech).encode()), bytes),
        "speech.json": (speak, json.dumps(speech).encode(), partial(post, "/v1/audio/speech")),
        "completions.json": (write, json.dumps(turns).encode(), partial(post, "/v1/chat/completions")),
    }
    (home / "sockets").mkdir()
    for name, (_, content, _) in sent.items():
        (home / "sockets" / name).write_bytes(content)

    def run(name: str, folder: Path) -> str:
        port, good, request = sent[name]
        content, logged.lines = (folder / "sockets" / name).read_bytes(), []
        answer = exchange(port, request(content), SECONDS if content == good else 0.3)
        status = answer[9:12].decode("latin-1")
        if logged.lines or status.startswith("5") and status != "503":
            raise AssertionError(f"{status} {logged.lines}")
        if not exchange(port, get("/health", "Connection: close\r\n")).startswith(b"HTTP/1.1 200"):       # is the scheduler alive?
            raise AssertionError("the server is gone")
        if status[:1] != "2" and status != "101":
            raise ValueError(f"status {status}")
        return status

    return {name.partition(".")[0]: Loader(partial(run, name), lambda f, name=name: [f / "sockets" / name]) for name in sent}


def sphn_opus() -> list[bytes]:
    import sphn
    writer = sphn.OpusStreamWriter(16_000)
    return [piece for _ in range(8) if (piece := writer.append_pcm(np.zeros(1920, np.float32)))]


def get(path: str, more: str = "", body: bytes = b"", method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode() + body


def post(path: str, body: bytes) -> bytes:
    return get(path, f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n", body, "POST")


def upgrade(path: str) -> bytes:
    return get(path, "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
               + base64.b64encode(bytes(16)).decode() + "\r\n")


def frame(kind: int, data: bytes) -> bytes:
    """A frame of a websocket's client, masked by zeros."""
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data)) if len(data) < 1 << 16 else (
        b"\xff" + struct.pack(">Q", len(data)))
    return bytes([0x80 | kind]) + size + bytes(4) + data


def exchange(port: int, content: bytes, patience: float = SECONDS) -> bytes:
    """Send bytes as a client does, frames after the server's handshake, and read until the server closes.

    After `patience` without a word the client says that no more will come.
    """
    head, _, rest = content.partition(b"\r\n\r\n")
    answer = b""

    def read(until: bytes) -> None:
        nonlocal answer
        while not (until and until in answer) and (piece := there.recv(1 << 16)):
            answer += piece

    with socket.create_connection(("127.0.0.1", port)) as there, contextlib.suppress(ConnectionError):       # it may close at once
        there.settimeout(patience)
        there.sendall(content[: len(content) - len(rest)])
        with contextlib.suppress(TimeoutError):
            if b"websocket" in head:
                read(b"\x82\x01\0" if b"realtime" not in head else b"session.created")
            there.sendall(rest)
            read(b"")
        there.settimeout(None)                                      # the alarm of the case ends what hangs
        there.shutdown(socket.SHUT_WR)
        read(b"")
    return answer


def resumed(folder: Path, config: TrainConfig) -> dict[str, Any]:
    check_run(folder)
    model = MultistreamLM(config.model)
    run, _ = load_run(folder, model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), 0)
    return {"run": to_json(run), **weights(model)}


def cached(data: Any, table: Any) -> list[Any]:
    index = open_cache(data, table)
    return [[entry.id, entry.text, index.text(n).tolist(), index.codes(n, 0).tolist()] for n, entry in enumerate(index.entries)]


# ---- damage ----

def damage(content: bytes, draw: random.Random, is_json: bool) -> bytes:
    if is_json and draw.random() < 0.7:
        with contextlib.suppress(ValueError):
            return damage_json(content, draw)
    data, kind = bytearray(content), draw.randrange(6)
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    if kind == 0 and data:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        del data[a:b]
    elif kind == 3:
        data[a:a] = data[a:b]
    elif kind == 4:
        data[a:a] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 300))))
    else:
        head = min(len(data), 200)                          # headers decide most
        for _ in range(4 if head else 0):
            data[draw.randrange(head)] = draw.randrange(256)
    return bytes(data)


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Change one node of a JSON text, or of one of its lines."""
    several = b"\n{" in content.strip() and content.lstrip()[:1] == b"{" and len(content) < 4000
    lines = content.splitlines(keepends=True) if several else [content]
    try:
        found = json.loads(lines[0])
    except ValueError:
        lines, found = [content], json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(value)
    walk(found)
    if not places or draw.random() < 0.05:
        return json.dumps(draw.choice(STRANGE)).encode("utf-8", "surrogatepass")
    node, key = draw.choice(places)
    kind = draw.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[draw.choice(("x", "", "\x1b[2J", *map(str, node)))] = draw.choice(STRANGE)
    elif kind == 2:
        deep: Any = draw.choice(STRANGE)
        for _ in range(draw.choice((1, 3, 900))):
            deep = [deep] if draw.random() < 0.5 else {"x": deep}
        node[key] = deep
    else:
        node[key] = draw.choice(STRANGE)
    return b"".join([json.dumps(found).encode("utf-8", "surrogatepass") + b"\n" * (len(lines) > 1), *lines[1:]])


# ---- cases ----

class Slow(BaseException):
    pass


def late(*_: Any) -> None:
    raise Slow(f"more than {SECONDS} seconds")


def try_case(number: int, seed: int, kinds: dict[str, tuple[Path, Loader]], wanted: dict[str, Any]) -> tuple[str, str, str]:
    """Kind, outcome ("loaded", "refused" or "fault") and what there is to say of a case."""
    draw = random.Random(f"{seed}/{number}")
    name = draw.choice(sorted(kinds))
    home, loader = kinds[name]
    path = draw.choice(sorted(loader.files(home)))
    good = path.read_bytes()
    bad = damage(good, draw, path.suffix in (".json", ".jsonl"))
    about = f"case {number}: {name}, {path.relative_to(home)}, {len(good)} -> {len(bad)} bytes"
    path.write_bytes(bad)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = loader.run(home)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if loader.covered and path.name != "checksums.json" and not equal(found, wanted[name]):
            return name, "fault", f"{about}: loaded as something else, nobody saw it"
        return name, "loaded", about
    except (ValueError, OSError) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = error_line(error)
        if isinstance(error, UnicodeError) or len(line) > 600 or not line.isprintable():
            return name, "fault", f"{about}: {type(error).__name__} {line[:300]}"
        return name, "refused", f"{about}: {line}"
    except BaseException as error:                          # a library that panics raises no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        signal.setitimer(signal.ITIMER_REAL, 0)
        if out_of_memory(error):
            return name, "fault", f"{about}: asked for more memory than there is"
        last = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return name, "fault", f"{about}: {type(error).__name__}: {str(error)[:200]} {last}"
    finally:
        path.write_bytes(good)


def main(argv: list[str]) -> int:
    options = dict(word[2:].split("=", 1) for word in argv if word.startswith("--"))
    most, seed, seconds = int(options.get("cases", 0)), int(options.get("seed", 0)), float(options.get("seconds", 0))
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    signal.signal(signal.SIGALRM, late)
    counts: dict[str, dict[str, int]] = {}
    faults = 0
    with tempfile.TemporaryDirectory(dir=options.get("dir")) as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            kinds = build(Path(folder))
            wanted = {name: loader.run(home) for name, (home, loader) in kinds.items()}
        names = options["kinds"].split(",") if "kinds" in options else list(kinds)
        kinds = {name: kinds[name] for name in names}
        until, number = time.time() + seconds if seconds else float("inf"), int(options.get("case", options.get("first", 0)))
        end = number + 1 if "case" in options else number + most if most else sys.maxsize
        while number < end and time.time() < until:
            name, outcome, said = try_case(number, seed, kinds, wanted)
            counts.setdefault(name, {"loaded": 0, "refused": 0, "fault": 0})[outcome] += 1
            if outcome == "fault" or "case" in options:
                print(said, flush=True)
            faults += outcome == "fault"
            number += 1
    print(json.dumps({"cases": sum(sum(c.values()) for c in counts.values()), "faults": faults, "kinds": counts}))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
