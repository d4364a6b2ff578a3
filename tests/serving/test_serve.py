"""serve.py: clients of the protocols get what sample.py makes, many at once, and none of them can hurt the others."""

import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, call

aiohttp = pytest.importorskip("aiohttp")
sphn = pytest.importorskip("sphn")

import dialogues  # noqa: E402
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer  # noqa: E402

import serve  # noqa: E402
from audio import load_codec  # noqa: E402
from audio.mimi import MimiCodec, MimiConfig  # noqa: E402
from checkpoint import Extras, export, save  # noqa: E402
from corpus.bundled import DIGITS, digit_dialogues  # noqa: E402
from corpus.data_config import DataConfig  # noqa: E402
from generation.conversation import SENTENCES  # noqa: E402
from generation.decode_step import SampleConfig  # noqa: E402
from generation.sessions import SessionBatch  # noqa: E402
from generation.turns import FREE  # noqa: E402
from layers.architecture import ModelConfig, StackConfig  # noqa: E402
from model import MultistreamLM  # noqa: E402
from options import run_config  # noqa: E402
from sample import generate, reply  # noqa: E402
from sample import speak as spoken  # noqa: E402
from serving import scheduler  # noqa: E402
from serving.chat_socket import ChatSocket, session_rules  # noqa: E402
from serving.limits import Limits, Rate  # noqa: E402
from serving.openai_api import Resampler  # noqa: E402
from serving.scheduler import Conversation  # noqa: E402
from streams import Stream, StreamTable, codebooks, delay  # noqa: E402

MALFORMED = 5_000
REOPENED = 201


@contextmanager
def serving(job: serve.Serve) -> Iterator[tuple[serve.Server, str]]:
    """A server in a thread of its own; -> it and its address."""
    server, there, found = serve.Server(job, set()), threading.Event(), {}

    def started(port: int, stop: Callable[[], None]) -> None:
        found.update(port=port, stop=stop)
        there.set()

    thread = threading.Thread(target=lambda: asyncio.run(server.run(started)))
    thread.start()
    assert there.wait(30)
    try:
        yield server, f"http://127.0.0.1:{found['port']}"
    finally:
        found["stop"]()
        thread.join(30)
    assert not thread.is_alive()


def client(call: Callable[[aiohttp.ClientSession], Awaitable[object]]) -> object:
    async def run() -> object:
        async with aiohttp.ClientSession() as http:
            return await asyncio.wait_for(call(http), 60)
    return asyncio.run(run())


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    """A tiny duplex model with random weights, as a run would leave it."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "words.json").write_text(json.dumps(["<s>", "</s>", "<pad>", *DIGITS, *(f"({word})" for word in DIGITS)]))
    torch.manual_seed(4)
    config = run_config(ROOT / "configs/tiny_duplex.py").model
    model = MultistreamLM(replace(config, temporal=replace(config.temporal, dim=32, layers=2, heads=2, ffn=48)))
    model.extras = Extras(1, {"codec": "tiny", "tokenizer": str(folder / "words.json"), "normaliser": "none"})
    save(model, folder / "run")
    return folder / "run"


def job(talk: Path, **more: object) -> serve.Serve:
    return serve.Serve(**{"ckpt": str(talk), "port": 0, "slots": 3, "drain": 0.0, "temperature": 0.8} | more)


def speech(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    n = np.arange(round(seconds * rate))
    return (0.3 * np.sin(n / 20) * np.abs(np.sin(n / 3000)) + 0.02 * draw.standard_normal(len(n))).astype(np.float32)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine makes nobody late."""
    monkeypatch.setattr(scheduler, "SLACK", 100.0)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """The frames that each conversation was given, by its seed."""
    found: dict[int, list[torch.Tensor]] = {}
    original = Conversation.give

    def give(self: Conversation, frame: torch.Tensor, wav: torch.Tensor | None = None) -> None:
        found.setdefault(self.rules.seed, []).append(frame.clone())
        original(self, frame, wav)

    monkeypatch.setattr(Conversation, "give", give)
    return found


# ---- /api/chat ----

def small_mimi(size: int) -> MimiCodec:
    config = MimiConfig(width=4, dim=32, layers=1, heads=4, ffn=32, window=20, num_codebooks=8, codebook_size=size, codebook_dim=16)
    mimi = MimiCodec(config)
    for p in mimi.parameters():
        p.data.mul_(1.5)
    return mimi


def test_the_flow_of_the_official_client_gets_the_frames_of_sample(tmp_path, monkeypatch, given, patient):
    """Its messages byte by byte: wait for 0x00, then 0x01 and what its Opus writer gives for 1,920 samples at a time."""
    torch.manual_seed(5)
    mimi = small_mimi(256)
    monkeypatch.setattr(serve, "load_codec", lambda name, device: mimi)
    SentencePieceTrainer.train(sentence_iterator=iter(["hello there my old friend", "who is there", "the old man says hello"] * 9),
                               model_prefix=str(tmp_path / "spm"), vocab_size=24, minloglevel=2, pad_id=3, bos_id=1, eos_id=2, unk_id=0)
    smoke = run_config(ROOT / "configs/moshi_full.py", "smoke").model
    model = MultistreamLM(smoke)
    model.text_head.weight.data[24:] = 0                                  # mostly ids that the tokenizer has
    official = export(model, tmp_path / "official", to="moshi")
    made = serve.Serve(ckpt=str(official), port=0, slots=2, codec="tiny", tokenizer=str(tmp_path / "spm.model"), drain=0.0)
    pcm, sent, heard, texts, kinds = speech(2.5, 24_000), [], [], [], []

    async def talk(http: aiohttp.ClientSession) -> None:
        async with http.ws_connect(f"{url}/api/chat?text_seed=11&audio_seed=11") as ws:
            writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
            assert (await ws.receive()).data == b"\0"
            for at in range(0, len(pcm) - 1919, 1920):
                data = writer.append_pcm(pcm[at : at + 1920])
                if len(data):
                    sent.append(data)
                    await ws.send_bytes(b"\1" + data)
            while sum(map(len, heard)) < 1920 * 24:
                message = await ws.receive()
                kinds.append(message.data[0])
                if message.data[0] == 1:
                    heard.append(reader.append_bytes(message.data[1:]))
                elif message.data[0] == 2:
                    texts.append(message.data[1:].decode())

    with serving(made) as (server, url):
        client(talk)
    reader = sphn.OpusStreamReader(24_000)
    user = np.concatenate([reader.append_bytes(data) for data in sent])
    codes, ear = mimi.encode(torch.from_numpy(user)[None, None]), mimi.stream()
    rules = replace(server.usual, seed=11)
    assert rules.temperature == (0.7, *[0.8] * 8)                         # as the official server draws
    wanted = reply(model, codes[..., : len(user) // 1920], rules)[0].T
    frames = torch.stack(given[11])
    agent = [0, *model.table.audio_out]
    live = torch.cat([ear.encode(torch.from_numpy(user)[None, None, n : n + 1920]) for n in range(0, len(user) - 1919, 1920)], -1)
    assert torch.equal(live, codes[..., : live.shape[-1]])
    count = min(len(frames), len(user) // 1920 - 1)                                         # behind it the server hears silence
    assert count > 20 and torch.equal(frames[:count, agent], wanted[:count, agent])
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    said = [pieces.id_to_piece(int(i)).replace("\u2581", " ") for i in wanted[:count, 0] if i not in (0, 3) and i < 24]
    assert texts[: len(said)] == said and set(kinds) <= {1, 2, 4}
    stream = mimi.stream()
    spoken = torch.cat([stream.decode(f[1:9].clamp(0, 255)[None, :, None]) for f in frames[:20]], -1)[0, 0].numpy()
    writer, again = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
    expected = np.concatenate([again.append_bytes(writer.append_pcm(spoken[n : n + 1920])) for n in range(0, 1920 * 20, 1920)])
    assert np.allclose(np.concatenate(heard)[: len(expected)], expected, atol=1e-3)


async def converse(http: aiohttp.ClientSession, url: str, seed: int, seconds: float = 1.2, cut: float = 9.0, pace: float = 0.0) -> int:
    """Talk in PCM for a while; -> samples heard."""
    pcm, heard = (speech(seconds, 16_000, seed) * 32767).astype("<i2"), 0
    async with http.ws_connect(f"{url}/api/chat?format=pcm16&audio_seed={seed}") as ws:
        while (await ws.receive()).data[:1] != b"\0":
            pass
        for at in range(0, len(pcm) - 639, 640):
            await ws.send_bytes(b"\1" + pcm[at : at + 640].tobytes())
            await asyncio.sleep(pace)
            if at > cut * 16_000:
                return heard
        while heard < len(pcm) - 6 * 640:
            message = await ws.receive()
            assert message.type is aiohttp.WSMsgType.BINARY, message
            heard += len(message.data) // 2 if message.data[0] == 1 else 0
    return heard


def test_several_at_once_get_what_they_get_alone_and_the_next_waits_with_a_position(talk, given, patient):
    async def all_of_them(http: aiohttp.ClientSession) -> list[int]:
        return await asyncio.gather(*(converse(http, url, seed) for seed in (1, 2, 3, 4)))

    with serving(job(talk, slots=2)) as (server, url):
        assert min(client(all_of_them)) > 10_000
        assert server.scheduler.metrics.counts["sessions"] == 4
    model, codec = server.scheduler.model, load_codec("tiny")
    for seed in (1, 2, 3, 4):
        pcm = (speech(1.2, 16_000, seed) * 32767).astype("<i2").astype(np.float32) / 32768
        codes = codec.encode(torch.from_numpy(pcm)[None, None])
        wanted = reply(model, codes[..., :28], replace(server.usual, seed=seed))[0].T
        frames, agent = torch.stack(given[seed]), [0, *model.table.audio_out]
        assert len(frames) >= 24 and torch.equal(frames[:24, agent], wanted[:24, agent]), f"session {seed}"


def test_a_full_server_says_so_and_who_waits_is_told_his_place(talk):
    async def wait(http: aiohttp.ClientSession) -> None:
        async with http.ws_connect(f"{url}/api/chat") as first:
            assert (await first.receive()).data == b"\0"
            async with http.ws_connect(f"{url}/api/chat") as second:
                message = await second.receive(timeout=10)
                assert message.data[:1] == b"\4" and json.loads(message.data[1:]) == {"queue": 1}
                async with http.ws_connect(f"{url}/api/chat") as third:
                    refused = await third.receive(timeout=10)
                    assert refused.data[:1] == b"\5" and b"the server is full" in refused.data
                await first.close()
                while (message := await second.receive(timeout=10)).data[:1] == b"\4":
                    pass
                assert message.data == b"\0"

    with serving(job(talk, slots=1, limits=Limits(most_waiting=1))) as (_, url):
        client(wait)


def test_a_late_client_gets_silence_and_is_counted(talk, given):
    async def slow(http: aiohttp.ClientSession) -> None:
        async with http.ws_connect(f"{url}/api/chat?format=pcm16&audio_seed=5") as ws:
            assert (await ws.receive()).data == b"\0"
            await ws.send_bytes(b"\1" + bytes(2 * 1280))
            while server.scheduler.metrics.counts["late_frames"] < 5 or len(given.get(5, ())) < 5:
                await asyncio.sleep(0.05)

    with serving(job(talk)) as (server, url):
        client(slow)


def test_a_role_and_a_voice_stand_in_front_of_a_conversation(tmp_path, monkeypatch, given, patient):
    """PersonaPlex's shape: both sides are predicted, and what the user says replaces what was drawn for him."""
    (tmp_path / "words.json").write_text(json.dumps(["<s>", "</s>", "<pad>", "<system>", *DIGITS]))
    (tmp_path / "voices").mkdir()
    soundfile.write(tmp_path / "voices" / "ann.wav", speech(1.0, 16_000), 16_000)
    torch.manual_seed(8)
    mimi = small_mimi(2048)
    monkeypatch.setattr(serve, "load_codec", lambda name, device: mimi)
    table = StreamTable((Stream("text", "text", 16, 15, start=15), *codebooks(16, 2049, 2048, 2048, delays=(0, *[1] * 7) * 2)),
                        "personaplex", aligned=True)
    model = MultistreamLM(ModelConfig(table, StackConfig(dim=32, layers=2, heads=2, ffn=48, window=300),
                                      depth=StackConfig(dim=16, layers=1, heads=2, ffn=24, rope_theta=0.0, steps=16)))
    model.extras = Extras(1, {"codec": "tiny", "tokenizer": str(tmp_path / "words.json"), "normaliser": "none"})
    save(model, tmp_path / "run")
    asked, pcm = {"text_prompt": "one two", "voice_prompt": "ann.wav", "audio_seed": "6"}, (speech(2.0, 24_000) * 32767).astype("<i2")
    order, read = [], SessionBatch.read_prompt
    monkeypatch.setattr(SessionBatch, "read_prompt", lambda *given, **more: order.append("read") or read(*given, **more))
    said = ChatSocket.messages
    monkeypatch.setattr(ChatSocket, "messages", lambda self, kind, *rest: order.append(kind) or said(self, kind, *rest))

    async def talk(http: aiohttp.ClientSession) -> list[int]:
        refused = []
        for wrong in ({"voice_prompt": "../ann"}, {"voice_prompt": "bob"}, {"text_prompt": "one " * 999}):
            async with http.get(f"{url}/api/chat", params=asked | wrong) as response:
                refused.append(response.status)
        async with http.ws_connect(f"{url}/api/chat?format=pcm16", params=asked) as ws:
            while (await ws.receive()).data[:1] != b"\0":
                pass
            for at in range(0, len(pcm) - 1919, 1920):
                await ws.send_bytes(b"\1" + pcm[at : at + 1920].tobytes())
            while len(given.get(6, ())) < 22:
                await ws.receive()
        return refused

    with serving(job(tmp_path / "run", voices=str(tmp_path / "voices"))) as (server, url):
        assert client(talk) == [400] * 3
        before = server.chat.persona(asked).frames
    assert order[:2] == ["read", "ready"]                                 # the handshake goes out when the prompt was stepped
    assert before[0].tolist() == [3] * 19 + [*server.chat.tokenizer.encode("<system> one two <system>")] + [3] * 6
    codes = mimi.encode(torch.from_numpy(pcm.astype(np.float32) / 32768)[None, None])[0]
    prompt, start = delay(before, table.delays, table.column("start")), table.column("start")
    user = delay(torch.cat([before[9:], codes], 1), table.delays[9:], start[9:])[:, prompt.shape[1] :]
    forced = torch.full((1, len(table), user.shape[1]), FREE)
    forced[0, 9:], forced[0, 2:9, 0] = user, before[2:9, -1]              # the late codes of the prompt's last frame
    rules = replace(server.usual, seed=6, max_frames=user.shape[1])
    wanted = torch.cat([*generate(server.scheduler.model, prompt, rules, given=forced)])
    assert torch.equal(torch.stack(given[6])[:22, :9], wanted[:22, :9])


def test_held_out_dialogues_are_answered_live_and_measured(talk, tmp_path, monkeypatch, capsys):
    digit_dialogues(tmp_path / "digits", 0, 1)
    reference = json.loads((tmp_path / "digits" / "0000.json").read_text())["alignments"]
    words = [word for word, _, who in reference if who == "SPEAKER_OTHER"]
    monkeypatch.setattr(dialogues, "transcribe", lambda clips: ["nothing at all"] * len(clips))
    monkeypatch.setattr(sys, "argv", ["dialogues", f"--ckpt={talk}", f"--dialogues={tmp_path}/digits"])
    dialogues.main()
    *rows, last = capsys.readouterr().out.splitlines()
    asked = sum(int(row.split()[0]) * int(re.search(r"(\d+) turns", row)[1]) for row in rows)
    assert asked == len(words) and all(row.endswith("0 in the sound") for row in rows) and last.startswith("latency of ")
    made, hop = dialogues.Talk(), 640
    made.sent = 5 * hop
    made("audio", np.zeros(3 * hop, np.float32))
    made("audio", np.full(hop, 0.5, np.float32))                          # loud after 3 frames of a stream that began 5 frames late
    assert dialogues.delay_of(made, 0.0, 9.0, 16_000) == pytest.approx(8 * hop / 16_000)


# ---- safety ----

def garbage(draw: random.Random) -> bytes:
    kind = draw.randrange(8)
    body = draw.randbytes(draw.choice([0, 1, 7, 200, 4000]))
    page = b"OggS" + bytes(draw.choice([0, 22, 300])) + body
    any_kind, silence = bytes([draw.randrange(256)]) + body, b"\1" + bytes(60_000)
    return (any_kind, b"", b"\1" + body, b"\1" + page, b"\1OggS", b"\2" + body, b"\5", silence)[kind]


def test_malformed_messages_and_vanishing_clients_end_only_their_own_session(talk, given, capfd):
    draw, counts = random.Random(7), {"sent": 0}

    async def attack(http: aiohttp.ClientSession) -> None:
        while counts["sent"] < MALFORMED:
            query = draw.choice(("", "?format=pcm16", "?text_temperature=nan",
                                 "?max_steps=0", "?nonsense=1", "?format=%00", "?audio_topk=1e9"))
            counts["sent"] += 1
            try:
                async with http.ws_connect(f"{url}/api/chat{query}") as ws:
                    if draw.random() < 0.7:
                        await ws.receive(timeout=3)
                    for _ in range(draw.randrange(6)):
                        counts["sent"] += 1
                        await (ws.send_str("{") if draw.random() < 0.1 else ws.send_bytes(garbage(draw)))
                    if draw.random() < 0.3:
                        ws._response.connection.transport.abort()        # vanishes without a word
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                continue

    async def both(http: aiohttp.ClientSession) -> None:
        survivor = asyncio.create_task(converse(http, url, 42, seconds=3.0, pace=0.03))
        await asyncio.gather(*(attack(http) for _ in range(3)))
        assert await survivor > 30_000
        async with http.get(f"{url}/health") as response:
            assert (await response.json())["ok"]

    limits = Limits(sessions_per_address=50, most_waiting=60)
    with serving(job(talk, slots=3, limits=limits)) as (server, url):
        asyncio.run(asyncio.wait_for(with_session(both), 600))
        deadline = time.monotonic() + 60
        while (server.scheduler.active or server.scheduler.queue or server.gate.here) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.scheduler.active and not server.scheduler.queue and not server.gate.here
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    if server.scheduler.metrics.counts["late_frames"] == 0:              # on a loaded machine the survivor may have been late himself
        pcm = (speech(3.0, 16_000, 42) * 32767).astype("<i2").astype(np.float32) / 32768
        wanted = reply(server.scheduler.model, load_codec("tiny").encode(torch.from_numpy(pcm)[None, None]), replace(server.usual, seed=42))
        agent = [0, *server.table.audio_out]
        assert torch.equal(torch.stack(given[42])[:60, agent], wanted[0].T[:60, agent])


def test_sessions_that_are_cut_and_reopened_leave_nothing_behind(talk, given, patient):
    """The memory of the process is flat, and who talks through all of it gets what he would get alone."""
    memory = list[int]()

    async def all_of_them(http: aiohttp.ClientSession) -> None:
        survivor = asyncio.create_task(converse(http, url, 77, seconds=120.0, pace=0.02))
        draw = random.Random(1)

        async def churn(first: int) -> None:
            for seed in range(first, first + REOPENED, 3):
                await converse(http, url, seed, seconds=2.0, cut=draw.uniform(0.05, 0.6), pace=0.002)
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

        await asyncio.gather(*(churn(1000 + n) for n in range(3)))
        survivor.cancel()

    with serving(job(talk, slots=4, limits=Limits(sessions_per_address=50, most_waiting=60))) as (server, url):
        asyncio.run(asyncio.wait_for(with_session(all_of_them), 600))
        assert server.scheduler.metrics.counts["sessions"] == len(memory) + 1 == REOPENED + 1
    assert memory[-1] - memory[len(memory) // 3] < 24 * 2**20, [n >> 20 for n in memory]
    pcm = (speech(120.0, 16_000, 77) * 32767).astype("<i2").astype(np.float32) / 32768
    frames, agent = torch.stack(given[77]), [0, *server.table.audio_out]
    codes = load_codec("tiny").encode(torch.from_numpy(pcm[: 640 * (len(frames) + 4)])[None, None])
    wanted = reply(server.scheduler.model, codes, replace(server.usual, seed=77))[0].T
    assert torch.equal(frames[:, agent], wanted[: len(frames), agent])


async def with_session(call: Callable[[aiohttp.ClientSession], Awaitable[object]]) -> None:
    async with aiohttp.ClientSession() as http:
        await call(http)


def test_who_reads_too_slowly_is_dropped(talk):
    async def deaf(http: aiohttp.ClientSession) -> None:
        ws = await http.ws_connect(f"{url}/api/chat?format=pcm16")
        ws._response.connection.protocol.pause_reading()
        for _ in range(400):
            try:
                await ws.send_bytes(b"\1" + bytes(1280))
            except ConnectionError:                                      # dropped already
                break
            await asyncio.sleep(0.002)
        for _ in range(100):
            if not server.scheduler.active:
                return
            await asyncio.sleep(0.1)
        raise AssertionError("it still holds a row")

    with serving(job(talk, limits=Limits(send_seconds=0.3, messages_per_second=5000, session_seconds=3.0))) as (server, url):
        client(deaf)


@pytest.mark.parametrize(("headers", "path", "status"), [
    ({"Origin": "https://evil.example"}, "/about", 403), ({"Host": "evil.example"}, "/about", 403), ({}, "/about", 200),
    ({}, "/users/nobody", 404), ({}, "/users/..%2f..%2fetc%2fpasswd", 404), ({}, "/web/../serve.py", 404), ({}, "/run/index", 404),
    ({}, "/health", 200), ({}, "/metrics", 200), ({}, "/voices", 200), ({}, "/", 200), ({}, "/api/chat?pad_mult=3", 400)])
def test_who_may_ask_for_what(server_of_all, headers, path, status):
    async def ask(http: aiohttp.ClientSession) -> int:
        async with http.get(server_of_all + path, headers=headers) as response:
            return response.status
    assert client(ask) == status


@pytest.fixture(scope="module")
def server_of_all(talk) -> Iterator[str]:
    with serving(job(talk)) as (_, url):
        yield url


def test_a_token_is_wanted_where_there_is_one(talk):
    async def ask(http: aiohttp.ClientSession) -> list[int]:
        found, wrong, right = [], {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s3cret"}
        for headers, query in (({}, ""), (wrong, ""), (right, ""), ({}, "?token=s3cret")):
            async with http.get(f"{url}/about{query}", headers=headers) as response:
                found.append(response.status)
        return found

    with serving(job(talk, token="s3cret")) as (_, url):
        assert client(ask) == [401, 401, 200, 200]
    assert call("serve.py", "--ckpt=x", "--host=0.0.0.0")[0] == 2


def test_rules_of_a_session_are_the_servers_until_it_says_otherwise(talk):
    table = run_config(ROOT / "configs/tiny_duplex.py").model.table
    usual = SampleConfig(temperature=(0.7, *[0.8] * 8), top_k=(25.0, *[250.0] * 8))
    rules = session_rules({"text_temperature": "0.1", "audio_topk": "7", "max_steps": "9", "email": "a@b"}, usual, table, Limits(), 25)
    assert rules.temperature == (0.1, *[0.8] * 8) and rules.top_k == (25.0, *[7] * 8) and rules.max_frames == 9
    for query, words in (({"text_temprature": "1"}, "nearest is text_temperature"), ({"audio_topk": "-1"}, "outside"),
                         ({"audio_temperature": "inf"}, "outside"), ({"text_seed": "1", "audio_seed": "2"}, "differ")):
        with pytest.raises(ValueError, match=words):
            session_rules(query, usual, table, Limits(), 25)


def test_a_rate_is_a_bucket(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = Rate(10)
    assert sum(rate.allow() for _ in range(100)) == 20
    now[0] = 1.0
    assert sum(rate.allow() for _ in range(100)) >= 9


def test_sigterm_tells_who_talks_ends_the_process_and_nothing_is_written(talk, tmp_path):
    async def interrupted(http: aiohttp.ClientSession) -> bytes:
        async with http.ws_connect(f"http://127.0.0.1:{port}/api/chat?format=pcm16") as ws:
            await ws.receive()
            await ws.send_bytes(b"\1" + bytes(8 * 1280))
            while (message := await ws.receive()).data[:1] != b"\5":
                if message.data[:1] == b"\1":
                    process.send_signal(signal.SIGTERM)
            return message.data

    command = [sys.executable, str(ROOT / "serve.py"), f"--ckpt={talk}", "--port=0", "--slots=1", "--drain=0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    line = ""
    while "http://" not in line:
        line = process.stdout.readline()
        assert line or process.poll() is None, process.stderr.read()
    port = re.search(r":(\d+) ", line)[1]
    assert client(interrupted) == b"\5the server is going down"
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == "" and list(tmp_path.iterdir()) == []


def test_a_log_is_masked_and_written_where_it_is_asked_for(talk, tmp_path):
    with serving(job(talk, log=str(tmp_path / "log.jsonl"))) as (_, url):
        client(lambda http: converse(http, url, 3, 0.8))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["frames"] > 5 and "time" in rows[0]
    assert not re.search(r"(zero|one|two|three|four|five|six|seven|eight|nine)( \1)? (zero|one) (zero|one) (zero|one)", rows[0]["said"])


# ---- OpenAI's protocols ----

def test_realtime_speaks_the_same_session(talk):
    async def realtime(http: aiohttp.ClientSession) -> dict[str, int]:
        found: dict[str, int] = {}
        async with http.ws_connect(f"{url}/v1/realtime") as ws:
            assert (await ws.receive_json())["type"] == "session.created"
            form = {"format": {"type": "audio/pcm", "rate": 24_000}}
            await ws.send_json({"type": "session.update", "session": {"audio": {"input": form, "output": form}}})
            pcm = (speech(2.0, 24_000) * 32767).astype("<i2").tobytes()
            for at in range(0, len(pcm), 4800):
                await ws.send_json({"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm[at : at + 4800]).decode()})
            while found.get("response.output_audio.delta", 0) < 24_000:
                event = await ws.receive_json(timeout=20)
                size = len(base64.b64decode(event["delta"])) // 2 if "audio.delta" in event["type"] else 1
                found[event["type"]] = found.get(event["type"], 0) + size
            await ws.send_str('{"type": "no.such.event"}')
            while (event := await ws.receive_json(timeout=20))["type"] != "error":
                pass
            assert "unknown" in event["error"]["message"]
        return found

    with serving(job(talk)) as (_, url):
        assert client(realtime)["session.updated"] == 1


def test_pieces_resampled_are_the_whole():
    from audio.wav import resample
    wav, made, resampler, draw = speech(1.0, 24_000), [], Resampler(24_000, 16_000), random.Random(1)
    at = 0
    while at < len(wav):
        n = draw.randrange(1, 3000)
        made.append(resampler(wav[at : at + n]))
        at += n
    whole, joined = resample(torch.from_numpy(wav), 24_000, 16_000).numpy(), np.concatenate(made)
    assert len(whole) - len(joined) < 200 and np.allclose(joined[200:], whole[200 : len(joined)], atol=1e-4)


def test_speech_is_streamed_and_is_that_of_sample(tiny_run):
    async def speak(http: aiohttp.ClientSession) -> tuple[list[bytes], int]:
        wavs = []
        for seed in range(8):                                                # one of which may end at once: a file without sound
            async with http.post(f"{url}/v1/audio/speech", json={"input": "one two", "seed": seed}) as response:
                assert response.status == 200 and response.content_type == "audio/wav"
                wavs.append(await response.read())
        async with http.post(f"{url}/v1/audio/speech", json={"input": "xylophone"}) as response:
            assert response.status == 400 and "xylophone" in await response.text()
        async with http.post(f"{url}/v1/audio/speech", data=b"{") as response:
            return wavs, response.status

    with serving(serve.Serve(ckpt=str(tiny_run), port=0, slots=2, drain=0.0, max_frames=40)) as (server, url):
        wavs, refused = client(speak)
    assert refused == 400 and max(map(len, wavs)) > 44
    data = DataConfig(**{k: getattr(server.api.data, k) for k in ("codec", "tokenizer", "normaliser")})
    for seed, wav in enumerate(wavs):
        wanted = spoken(server.scheduler.model, ["one two"], data, replace(server.usual, seed=seed))[0].wav[0].numpy()
        assert wav[:4] == b"RIFF" and len(wav) == 44 + 2 * len(wanted)
        assert np.allclose(np.frombuffer(wav[44:], "<i2") / 32767, wanted, atol=2e-3)


def test_a_voice_may_be_brought_along_and_never_as_a_path(tmp_path):
    """What a model says in an uploaded voice is what sample.py says in that of the file."""
    smoke = run_config(ROOT / "configs/tiny_clone.py", "smoke")
    torch.manual_seed(2)
    model = MultistreamLM(smoke.model)
    model.extras = Extras(1, {"codec": "tiny", "tokenizer": "bytes", "normaliser": smoke.data.normaliser})
    save(model, tmp_path / "run")
    voice = (str(ROOT / "assets/speech/allison/vm-youhave.opus"), "you have")
    own = {"input": "two", "seed": 3, "ref_audio": base64.b64encode(Path(voice[0]).read_bytes()).decode(), "ref_text": voice[1]}

    async def ask(http: aiohttp.ClientSession) -> list[tuple[int, bytes]]:
        found = []
        for change in ({}, {"ref_text": ""}, {"ref_audio": "bm8gc291bmQ="}, {"voice": "ann"}, {"ref_audio": voice[0]}):
            async with http.post(f"{url}/v1/audio/speech", json=own | change) as response:
                found.append((response.status, await response.read()))
        return found

    with serving(serve.Serve(ckpt=str(tmp_path / "run"), port=0, slots=1, drain=0.0, max_frames=12)) as (server, url):
        (status, wav), *refused = client(ask)
    wanted = spoken(server.scheduler.model, ["two"], server.api.data, replace(server.usual, seed=3), voices=[voice])[0]
    assert status == 200 and len(wav) == 44 + 2 * wanted.wav.shape[1] > 44
    assert [status for status, _ in refused] == [400] * 4
    assert not any(b"/tmp" in text or b"assets" in text for _, text in refused)


def test_completions_answer_with_text(tmp_path):
    from test_qwen import TABLES, TOKENIZER

    torch.manual_seed(1)
    model = MultistreamLM(ModelConfig(TABLES["qwen2"], StackConfig(dim=32, layers=1, heads=2, ffn=32)))
    model.extras = Extras(1, {"tokenizer": str(TOKENIZER), "normaliser": "none", "codec": "tiny"})
    save(model, tmp_path / "run")
    asked = {"messages": [{"role": "user", "content": "Hello"}], "seed": 3, "max_tokens": 12, "temperature": 0.9}

    (tmp_path / "orders.json").write_text('{"48213": {"order": "48213", "status": "shipped"}}')
    history = [{"role": "user", "content": "Order 48213?"}, {"role": "assistant", "content": "It was shipped."}]
    unknown = {"messages": [*history, {"role": "user", "content": "And 99999?"}]}
    wrong = ([{"role": 3}], [], history, [history[1], *asked["messages"]], [{"role": "tool", "content": "x"}])

    async def ask(http: aiohttp.ClientSession) -> tuple[str, str, str, list[int]]:
        async def content(body: dict) -> str:
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                return (await response.json())["choices"][0]["message"]["content"]

        async with http.post(f"{url}/v1/chat/completions", json=asked | {"stream": True}) as response:
            events = [json.loads(line[6:]) for line in (await response.text()).splitlines() if line.startswith("data: {")]
        refused = []
        for messages in wrong:
            async with http.post(f"{url}/v1/chat/completions", json={"messages": messages}) as response:
                refused.append(response.status)
        streamed = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        sound = str(ROOT / "assets/speech/allison/vm-youhave.opus")                    # words here, no file
        await content(asked | {"messages": [{"role": "user", "content": sound}]})
        return await content(asked), streamed, await content(unknown), refused

    files = {"lookup": str(tmp_path / "orders.json"), "log": str(tmp_path / "log")}
    with serving(serve.Serve(ckpt=str(tmp_path / "run"), port=0, slots=2, drain=0.0, **files)) as (_, url):
        whole, streamed, looked_up, refused = client(ask)
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert whole == streamed != "" and refused == [400] * 5
    assert looked_up == SENTENCES["en"]["unknown"].format(numbers="99999")
    assert rows[-1]["heard"] == "And #####?" and rows[-1]["outcome"] == "unknown" and len(rows) == 4


def test_completions_speak_where_the_model_does(tmp_path):
    """The samples of a stream are those of the whole reply, but for the end of the resampler's filter."""
    from test_moss import Q3, drawn

    from families.family import with_tokenizer_ids
    from text.tokenizers import load_tokenizer
    words = ROOT / "assets/tiny_qwen_tokenizer.json"
    rows = (Stream("text", "text", 544, 544), *codebooks(1, 384, 384, -1, 256))
    table = with_tokenizer_ids(StreamTable(rows, "moss"), load_tokenizer(words))
    model = drawn(MultistreamLM(ModelConfig(table, Q3, tail=1)))
    model.extras = Extras(1, {"tokenizer": str(words), "normaliser": "none", "codec": "tiny:1"})
    save(model, tmp_path / "run")
    asked = {"messages": [{"role": "user", "content": "Hello"}], "seed": 3, "max_tokens": 12, "modalities": ["text", "audio"]}

    async def ask(http: aiohttp.ClientSession) -> tuple[bytes, bytes]:
        async with http.post(f"{url}/v1/chat/completions", json=asked) as response:
            whole = (await response.json())["choices"][0]["message"]["audio"]["data"]
        async with http.post(f"{url}/v1/chat/completions", json=asked | {"stream": True}) as response:
            events = [json.loads(line[6:]) for line in (await response.text()).splitlines() if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        return base64.b64decode(whole), b"".join(base64.b64decode(d["audio"]["data"]) for d in deltas if "audio" in d)

    with serving(serve.Serve(ckpt=str(tmp_path / "run"), port=0, slots=1, drain=0.0, min_frames=12)) as (server, url):
        whole, streamed = client(ask)
    seconds = len(whole[44:]) / 2 / server.codec.sample_rate
    assert whole[:4] == b"RIFF" and seconds > 0.3 and len(streamed) / 2 / 24_000 == pytest.approx(seconds, abs=0.01)


def test_a_run_is_shown_and_nothing_beside_it(tiny_run):
    folder = tiny_run / "samples" / "step_000004"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.wav").write_bytes(b"RIFF")

    async def look(http: aiohttp.ClientSession) -> tuple[dict, list[int]]:
        async with http.get(f"{url}/run/index") as response:
            index, found = await response.json(), []
        for path in ("step_000004/a.wav", "step_000004/config.json", "..%2f..%2fckpt/a.wav", "step_000004/..%2f..%2fconfig.json"):
            async with http.get(f"{url}/run/{path}") as response:
                found.append(response.status)
        return index, found

    with serving(serve.Serve(ckpt=str(tiny_run), port=0, slots=1, drain=0.0, run=str(tiny_run))) as (_, url):
        index, statuses = client(look)
    assert statuses == [200, 404, 404, 404] and index["steps"][0]["files"][0]["name"] == "a.wav" and "train/loss" in index["curves"]
