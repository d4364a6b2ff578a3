"""From a folder of recordings to a voice: 60 clips of a stand-in person, 8 of them faulty, and the five commands of the README.

    python tests/voice.py                     in out/voice_test: transcribe, check, train, sample; WER, similarity, minutes
    python tests/voice.py --only=corpus       only the recordings

The person is a speech synthesiser (Debian: apt-get install flite). Half of the clips have a transcript; twelve more sentences
are one long recording. It says whole words that occur in the recordings, in sentences that do not.
"""

import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audio import speaker
from audio.recogniser import transcribe
from audio.wav import load_wav, save_wav
from evaluation.metrics import wer
from options import apply, edge, read_rows, split_arguments, write_json, write_text

ROOT = Path(__file__).parents[1]
DIGITS = "zero one two three four five six seven eight nine".split()
SENTENCES = ("the number is {}", "your code is {}", "please call {}", "room {} is open", "bus {} leaves now", "thank you for calling {}")
DEFECTS = ("silent", "clipped", "noise", "cut off", "empty file", "wrong transcript", "the same again", "not a number")


@dataclass(frozen=True)
class Options:
    out: str = "out/voice_test"     # folder of the recordings and of the run
    only: str = ""                  # "corpus" = write the recordings and stop
    voice: str = "slt"              # voice of flite
    steps: int = 0                  # training steps, 0 = those of the recipe
    sentences: int = 12             # sentences that are spoken and scored at the end


def sentence(draw: random.Random) -> str:
    return draw.choice(SENTENCES).format(" ".join(draw.choice(DIGITS) for _ in range(draw.randint(2, 4))))


def speak(text: str, path: Path, voice: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["flite", "-voice", voice, "-o", str(path), "-t", text], check=True)


def record(folder: Path, voice: str) -> tuple[list[str], dict[str, str]]:
    """Write the recordings; returns the sentences, and the defect of each faulty file."""
    if shutil.which("flite") is None:
        raise ValueError("the stand-in voice is flite, which is not installed; run: apt-get install flite")
    draw, faulty = random.Random(0), {}
    said = [sentence(draw) for _ in range(72)]
    for n, text in enumerate(said[:60]):
        path = folder / f"{n:02d}.wav"
        speak(text, path, voice)
        if n < 30:
            write_text(path.with_suffix(".txt"), text + "\n")
        if n % 7 == 3 and len(faulty) < len(DEFECTS):
            faulty[path.name] = DEFECTS[len(faulty)]
            spoil(path, faulty[path.name])
    parts = []
    for text in said[60:]:
        speak(text, folder / "long.wav", voice)
        wav, rate = load_wav(folder / "long.wav")
        parts += [wav, torch.zeros(1, rate * 2 // 3)]
    save_wav(folder / "long.wav", torch.cat(parts, 1), rate)
    return said, faulty


def spoil(path: Path, defect: str) -> None:
    wav, rate = load_wav(path)
    hiss = 0.1 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    changed = {"silent": 0 * wav, "clipped": 30 * wav, "noise": hiss}.get(defect)
    if changed is not None:
        save_wav(path, changed.clamp(-1, 1), rate)
    elif defect == "not a number":
        soundfile.write(path, (wav * float("nan"))[0].numpy(), rate, subtype="FLOAT")
    elif defect in ("cut off", "empty file"):
        path.write_bytes(path.read_bytes()[: 30 if defect == "cut off" else 0])
    elif defect == "wrong transcript":
        write_text(path.with_suffix(".txt"), "good morning everybody how are we doing\n")
    elif defect == "the same again":
        shutil.copyfile(path.with_name("00.wav"), path)
        write_text(path.with_suffix(".txt"), path.with_name("00.txt").read_text())


def run(*command: object) -> float:
    """Run a command of the repository and show it; returns its minutes."""
    words, began = [str(word) for word in command], time.monotonic()
    print(f"$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, flush=True)
    if done.returncode:
        raise ValueError(f"python {' '.join(words)} ended with code {done.returncode}: its output stands above")
    return (time.monotonic() - began) / 60


def score(folder: Path, person: Path) -> dict[str, float]:
    """Word error rate of the spoken sentences, and how much they sound like the person."""
    rows = [row for _, row in read_rows(folder / "samples.jsonl", "sample", text=str, wav=str)]
    wavs = [load_wav(folder / row["wav"]) for row in rows]
    found = {"wer": sum(wer(row["text"], heard) for row, heard in zip(rows, transcribe(wavs), strict=True)) / len(rows)}
    if not speaker.missing():
        own = [speaker.embed(*load_wav(person / f"{n:02d}.wav")) for n in (1, 2, 4, 5)]
        found["similarity"] = sum(float(speaker.embed(*wav) @ vector) for wav in wavs for vector in own) / len(wavs) / len(own)
        found["similarity of the person's own recordings"] = sum(float(a @ b) for a in own for b in own if a is not b) / 12
    return found


def main() -> None:
    words, pairs = split_arguments(sys.argv[1:])
    if words:
        raise ValueError(f"tests/voice.py takes options only, got {words}; --out=FOLDER, --only=corpus, --steps=N")
    job = apply(Options(), pairs)
    out = Path(job.out).resolve()
    person, run_folder, minutes = out / "person", out / "run", {}
    if person.exists():
        raise ValueError(f"{person} exists; choose another --out, or delete it")
    said, faulty = record(person, job.voice)
    print(f"{person}: 60 clips and long.wav; faulty: {', '.join(f'{name} ({what})' for name, what in faulty.items())}")
    if job.only == "corpus":
        return
    draw = random.Random(1)
    wanted = [text for text in (sentence(draw) for _ in range(10 * job.sentences)) if text not in said][: job.sentences]
    write_text(out / "texts.txt", "".join(f"{text}\n" for text in wanted))
    listed = person / "transcribed.jsonl"
    steps = [f"--steps={job.steps}"] if job.steps else []
    for name, command in (
            ("transcribe", ("data.py", "transcribe", person)), ("check", ("data.py", "check", listed, "--doubtful=drop")),
            ("train", ("train.py", "configs/tiny.py", "--preset=voice", f"--data.sources={listed}", f"--out={run_folder}",
                       f"--data.tokenizer={person / 'transcribed.words.json'}", f"--data.cache={out / 'cache'}", *steps)),
            ("sample", ("sample.py", "--ckpt", run_folder, "--texts", out / "texts.txt", "--out", out / "said"))):
        minutes[name] = run(*command)
    result = score(out / "said", person) | {f"minutes of {name}": round(spent, 2) for name, spent in minutes.items()}
    write_json(out / "result.json", result)
    print(*(f"{name}: {value:.3f}" for name, value in result.items()), f"listen: {out / 'said'}", sep="\n")
    print(f"live:   python serve.py --ckpt {run_folder}")


if __name__ == "__main__":
    edge(main)
