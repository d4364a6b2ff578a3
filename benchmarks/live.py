"""Many conversations at once with serve.py, in real time: does every frame come in time?

    python -m benchmarks.live --ckpt=out/talk --sessions=8 --seconds=60
    python -m benchmarks.live --url=http://127.0.0.1:8998 --sessions=4          a server that runs already

Clients of their own phase send noise in pieces of 20 ms and note when each piece of the agent's sound arrives. `late` is how far a piece
is behind the schedule of its session's earliest piece: a player that holds back that much never stops. Server and clients share
the machine. The last line is JSON; exit code 1 when a frame in a hundred is later than its length, or a step takes longer.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import origin, spread
from options import apply, edge, help_text, split_arguments

ROOT = Path(__file__).parents[1]
PIECE = 0.02                # seconds of sound in a message of a client
SETTLE = 2.0                # seconds at both ends that are not counted: sessions begin and end, libraries make their plans


@dataclass(frozen=True)
class Job:
    """What is measured."""

    ckpt: str = "out/talk"     # full-duplex model to serve
    url: str = ""              # server to measure; "" = start one
    sessions: int = 8          # conversations at once
    seconds: float = 60.0      # length of each

    def __post_init__(self) -> None:
        assert self.sessions > 0 and self.seconds > 2 * SETTLE, f"sessions are at least 1, seconds more than {2 * SETTLE:g}"


async def client(http: Any, url: str, phase: float, seconds: float) -> tuple[list[float], int]:
    """One conversation; -> seconds that each piece of its sound came behind schedule, frames of silence it got for late ones."""
    late = 0
    async with http.ws_connect(f"{url}/api/chat?format=pcm16") as ws:
        while (message := await ws.receive(timeout=30)).data[:1] != b"\4" or b"sample_rate" not in message.data:
            if not isinstance(message.data, bytes) or message.data[:1] == b"\5":
                raise ValueError(f"the server ended the session: {message.data!r}")
        about = json.loads(message.data[1:])
        await asyncio.sleep(phase)
        begun, arrived = time.perf_counter(), list[tuple[float, float]]()          # (when, seconds of sound before it)

        async def talk() -> None:
            samples = round(PIECE * about["sample_rate"])
            for n in range(round(seconds / PIECE)):
                await asyncio.sleep(begun + n * PIECE - time.perf_counter())
                await ws.send_bytes(b"\1" + os.urandom(2 * samples))

        talking, heard = asyncio.create_task(talk()), 0.0
        while not talking.done():
            message = await ws.receive(timeout=30)
            if not isinstance(message.data, bytes) or message.data[:1] == b"\5":
                raise ValueError(f"the server ended the session: {message.data!r}")
            if message.data[:1] == b"\1":
                arrived.append((time.perf_counter(), heard))
                heard += (len(message.data) - 1) / 2 / about["sample_rate"]            # behind the byte that says what it is
            elif message.data[:1] == b"\4":
                late = json.loads(message.data[1:]).get("late_frames", late)
        await talking
    behind = [when - before for when, before in arrived if begun + SETTLE < when < begun + seconds - SETTLE]
    return [x - min(behind) for x in behind], late


async def measure(url: str, job: Job) -> dict[str, Any]:
    import aiohttp
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{url}/about") as response:
            about = await response.json()
        if about["kind"] != "duplex":
            raise ValueError(f"{about['model']} at {url} is no full-duplex model; its sessions have no clock")
        found = await asyncio.gather(*(client(http, url, PIECE * n * 0.77 % 0.04, job.seconds) for n in range(job.sessions)))
        async with http.get(f"{url}/metrics") as response:
            metrics = dict(re.findall(r"multistream_(\S+) (\S+)", await response.text()))
    frame, late = about["frame_seconds"], [x for each, _ in found for x in each]
    if not late:
        raise ValueError("no sound came; raise --seconds")
    step = {f"p{share * 100:.0f}": 1e3 * float(metrics[f'step_seconds{{quantile="{share}"}}']) for share in (0.5, 0.95, 0.99)}
    return {"sessions": job.sessions, "frames": len(late), "frame_ms": 1e3 * frame, "step_ms": step, "RTF": step["p50"] / 1e3 / frame,
            "late_ms": spread(late, 1e3, (95, 99)), "over_a_frame": sum(x > frame for x in late) / len(late),
            "late_clients": sum(n for _, n in found)}


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    if "help" in pairs or words:
        return print(__doc__, help_text(Job(), "python -m benchmarks.live --ckpt=out/talk"), sep="\n")
    job, server, url = apply(Job(), pairs), None, pairs.get("url", "")
    if not url:
        command = [sys.executable, str(ROOT / "serve.py"), f"--ckpt={job.ckpt}", "--port=0", f"--slots={job.sessions}", "--drain=0",
                   f"--limits.sessions_per_address={job.sessions}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while server is not None and not url:
            line = server.stdout.readline()
            if not line:
                raise ValueError("serve.py did not start; its message is above")
            url = next(iter(re.findall(r"http://\S+", line)), "")
        row = asyncio.run(measure(url.rstrip("/"), job))
    finally:
        if server is not None:
            server.terminate()
            server.wait(30)
    step, late = row["step_ms"], row["late_ms"]
    print(f"{row['sessions']} sessions, {row['frames']} frames of {row['frame_ms']:.0f} ms, real-time factor {row['RTF']:.2f}")
    print(f"a step takes {step['p50']:.1f} ms (p99 {step['p99']:.1f})")
    print(f"frames are late by {late['median']:.1f} ms (p99 {late['p99']:.1f}), {row['over_a_frame']:.2%} of them by more than a frame")
    print(f"frames of clients that came too late: {row['late_clients']}")
    print(json.dumps(row | {"options": asdict(job)} | origin(("aiohttp",))))
    sys.exit(row["late_ms"]["p99"] > row["frame_ms"] or row["step_ms"]["p99"] > row["frame_ms"])


if __name__ == "__main__":
    edge(main)
