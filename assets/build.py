"""Rebuild everything under assets/ (maintainers only; users never run this).

    python assets/build.py speech --work build      the bundled voices: assets/speech/
    python assets/build.py codec  --work build      the codec fitted on them: assets/tiny_codec.safetensors

`speech` takes two Debian packages of Asterisk prompts (`apt-get download`: a Debian system with network), decodes
their G.722 with PyAV, trims silence, writes Ogg Opus, renders the synthetic voices with flite and espeak-ng, finds
word starts with the recogniser of evaluate.py, and writes manifest.jsonl: two minutes.  It needs dpkg-deb, flite
2.2, espeak-ng 1.51 and pip install av -e ".[eval]".  A rebuild gives the same samples and the same manifest; the
files' bytes differ, since the Ogg container draws a random serial number.

`codec` fits the tables (k-means, 30 s), saves a codec that decodes by Griffin-Lim, then trains the vocoder (--steps;
10 to 15 minutes on one core with bf16) and saves again.  Seeded: a repeat on the same machine gives the same file.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from audio.recogniser import load_whisper, prepare  # noqa: E402
from audio.rvq import ResidualVQ, nearest  # noqa: E402  (the root has to be on the path first)
from audio.tiny import DIM, EDGE, FRAME, MELS, STACK, TinyCodec, log_mel  # noqa: E402
from audio.wav import load_wav, resample  # noqa: E402
from evaluation.metrics import normalise  # noqa: E402
from options import read_rows, write_rows  # noqa: E402

SPEECH = ROOT / "assets" / "speech"
PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-g722")      # transcripts, recordings
RATE = 16_000
MAX_SECONDS = 4.0
MARGIN = 0.06               # seconds of quiet kept around the speech
HELD_OUT = 24
SYNTHETIC_PROMPTS = 50      # besides the ten digits, for each flite voice

SPELLING = {"fourtieth": "fortieth", "un-indentified": "unidentified", "witheld": "withheld"}
MISREAD = {"spy-h323"}      # its transcript "H.323" does not say how the number is read

# id: vocalised text for the synthesiser; the manifest carries it without the vowel marks
ARABIC = {
    "0": "صِفْر", "1": "وَاحِد", "2": "اِثْنَان", "3": "ثَلَاثَة", "4": "أَرْبَعَة", "5": "خَمْسَة", "6": "سِتَّة", "7": "سَبْعَة",
    "8": "ثَمَانِيَة", "9": "تِسْعَة", "10": "عَشَرَة",
    "hello": "مَرْحَبًا", "peace": "اَلسَّلَامُ عَلَيْكُم", "welcome": "أَهْلًا وَسَهْلًا", "morning": "صَبَاحُ الْخَيْر",
    "evening": "مَسَاءُ الْخَيْر", "goodbye": "مَعَ السَّلَامَة", "thanks": "شُكْرًا جَزِيلًا", "please": "مِنْ فَضْلِك",
    "sorry": "نَحْنُ آسِفُون", "yes": "نَعَم", "no": "لَا", "how-are-you": "كَيْفَ حَالُك",
    "wait": "يُرْجَى الِانْتِظَار", "busy": "اَلْخَطُّ مَشْغُول", "call-later": "اِتَّصِلْ لَاحِقًا",
    "leave-message": "اُتْرُكْ رِسَالَةً بَعْدَ النَّغْمَة", "enter-number": "أَدْخِلْ رَقْمَ الْهَاتِف",
    "wrong-number": "اَلرَّقْمُ غَيْرُ صَحِيح", "press-one": "اِضْغَطْ وَاحِد", "press-two": "اِضْغَطْ اِثْنَان",
    "press-zero": "اِضْغَطْ صِفْر لِلْمُسَاعَدَة", "no-messages": "لَا تُوجَدُ رَسَائِل", "new-message": "لَدَيْكَ رِسَالَةٌ جَدِيدَة",
    "password": "أَدْخِلْ كَلِمَةَ السِّرّ", "try-again": "حَاوِلْ مَرَّةً أُخْرَى", "transfer": "جَارِي تَحْوِيلُ الْمُكَالَمَة",
    "not-available": "اَلْمُشْتَرِكُ غَيْرُ مُتَاح", "conference": "أَنْتَ فِي الْمُؤْتَمَر", "today": "اَلْيَوْم", "tomorrow": "غَدًا",
    "one-moment": "لَحْظَةً وَاحِدَة",
}


# ---- text ----

def read_transcripts(path: Path) -> dict[str, str]:
    """Read `id: transcript` lines; tones, silences and ambiguous entries are left out."""
    transcripts = {}
    for line in gzip.open(path, "rt", encoding="utf-8"):
        name, colon, text = line.strip().partition(":")
        if colon and not name.startswith((";", "silence/")) and not re.search(r"[\[<]", text):
            transcripts[name] = spoken_words(text)
    return {name: text for name, text in transcripts.items() if text and name not in MISREAD}


def spoken_words(text: str) -> str:
    """Normalise a transcript to the words spoken: lower case, digits and signs spelled, apostrophes kept."""
    text = re.sub(r"\(.*?\)", " ", text.lower())
    for wrong, right in SPELLING.items():
        text = text.replace(wrong, right)
    text = re.sub(r"\b(re|de|un|non)-(?=[a-z])", r"\1", text)                   # re-enter -> reenter
    text = re.sub(r"#", " pound ", text)
    text = re.sub(r"\d", lambda digit: f" {normalise(digit[0])} ", text)
    return " ".join(word.strip("'") for word in re.findall(r"[a-z']+", text) if word.strip("'"))


def group_of(name: str) -> str:
    """The manifest's group of an Allison clip, by its id."""
    folder, _, leaf = name.partition("/")
    if folder == "phonetic":
        return "phonetic"
    if folder == "letters":
        return "letters" if re.fullmatch(r"[a-z]|zed", leaf) else "prompt"
    if folder != "digits" or leaf in ("star", "pound", "at"):
        return "prompt"
    if re.fullmatch(r"\d", leaf):
        return "digits"
    dates = r"(day|mon)-\d+|h-(1?\d|20|30)|a-m|p-m|oclock|today|tomorrow|yesterday"
    return "dates" if re.fullmatch(dates, leaf) else "numbers"


def hashed(name: str) -> str:
    """An order that does not change when clips come or go."""
    return hashlib.sha256(name.encode()).hexdigest()


def choose_held_out(texts: dict[str, str]) -> set[str]:
    """24 prompts by hash: three words or more, spoken in no other clip, so that training never heard them."""
    spoken = list(texts.values())
    able = [name for name, text in texts.items() if group_of(name) == "prompt" and len(text.split()) >= 3 and spoken.count(text) == 1]
    return set(sorted(able, key=hashed)[:HELD_OUT])


# ---- sound ----

def decode_g722(path: Path) -> Tensor:
    """Decode a headerless 64 kbit/s G.722 file to (W,) at 16 kHz."""
    import av  # maintainers only: libsndfile knows no G.722

    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return torch.from_numpy(np.concatenate(frames)).float() / 32768


def trim(wav: Tensor) -> Tensor:
    """Cut the quiet (40 dB under the loudest 10 ms) before and after the speech (W,), but for a margin."""
    hop = RATE // 100
    level = wav[: len(wav) // hop * hop].view(-1, hop).square().mean(1).sqrt()
    loud = (level > 0.01 * level.max()).nonzero().flatten()
    first = max(0, int(loud[0]) * hop - int(MARGIN * RATE))
    last = min(len(wav), (int(loud[-1]) + 1) * hop + int(MARGIN * RATE))
    return wav[first:last]


def synthesise(engine: str, text: str, work: Path) -> Tensor:
    """Speak with flite (voice rms or slt) or espeak-ng (voice ar) and return trimmed (W,) at 16 kHz."""
    target = work / "synthetic.wav"
    command = (["espeak-ng", "-v", "ar", "-s", "140", "-w", str(target), text] if engine == "ar"
               else ["flite", "-voice", engine, "-t", text, "-o", str(target)])
    subprocess.run(command, check=True, capture_output=True)
    wav, rate = load_wav(target)
    return trim(resample(wav[0], rate, RATE))


# ---- word starts ----

def word_starts(wav: Tensor, words: list[str], language: str) -> list[list]:
    """[[word, start in seconds], ...]: the recogniser's times where it heard these words, else by letters."""
    starts = heard_starts(wav, words) if len(words) > 1 and language == "en" else None
    if starts is None:
        speech = len(wav) / RATE - 2 * MARGIN
        sizes = np.cumsum([0] + [len(word) + 1 for word in words])
        starts = (MARGIN + speech * sizes[:-1] / sizes[-1]).tolist()
        starts[0] = 0.0
    return [[word, round(start, 2)] for word, start in zip(words, starts, strict=True)]


def heard_starts(wav: Tensor, words: list[str]) -> list[float] | None:
    """The recogniser's word starts, or None unless it heard exactly these words."""
    segments, _ = load_whisper().transcribe(prepare(wav, RATE).numpy(), language="en", beam_size=1, temperature=0.0, word_timestamps=True,
                                            condition_on_previous_text=False)
    heard, starts = [], []
    for token in (word for segment in segments for word in segment.words):
        parts = normalise(token.word, digit_by_digit=True).split()
        heard += parts
        step = (token.end - token.start) / max(len(parts), 1)                   # "492" is three words
        starts += [token.start - 0.3 + i * step for i in range(len(parts))]     # prepare() put 0.3 s in front
    if heard != [normalise(word) for word in words]:
        return None
    starts = [min(max(start, 0.0), len(wav) / RATE) for start in starts]
    return None if any(b <= a for a, b in zip(starts, starts[1:], strict=False)) else starts


# ---- vocoder ----

def train_vocoder(codec: TinyCodec, clips: list[Tensor], weights: Tensor, steps: int = 4500,
                  batch_size: int = 12, lr: float = 2e-3, seed: int = 0) -> TinyCodec:
    """Train a vocoder for the codec's tables on clips (W,) at 16 kHz; weights (N,) favours some clips.

    Crops of 0.8 s, multi-resolution STFT and mel losses, no GAN.  Returns a codec that decodes with it.
    """
    torch.manual_seed(seed)
    trained = TinyCodec("vocoder")
    fresh = {name: tensor for name, tensor in trained.state_dict().items() if name.startswith("vocoder.")}
    tables = {name: tensor for name, tensor in codec.state_dict().items() if name not in fresh}
    trained.load_state_dict(tables | fresh)
    optimizer = torch.optim.AdamW(trained.vocoder.parameters(), lr, betas=(0.8, 0.99))
    chance = weights * torch.tensor([len(clip) for clip in clips])
    progress = tqdm(range(steps), disable=not sys.stderr.isatty(), desc="vocoder")
    for step in progress:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 100) * (1 - step / steps)
        wav = torch.stack([_crop(clips[i]) for i in torch.multinomial(chance, batch_size, replacement=True)])
        mel = trained.mel(trained.encode(wav[:, None]))[:, STACK:-STACK]        # the outer frames saw a cut
        with torch.autocast("cpu", torch.bfloat16):
            output = trained.vocoder(mel)
        loss = spectral_loss(output, wav[:, FRAME:-FRAME])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.vocoder.parameters(), 10.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return trained.half().float().eval()


def _crop(clip: Tensor, size: int = 22 * FRAME) -> Tensor:
    """A random piece (22 frames) at a random loudness, at times reaching over the clip's edges into silence."""
    clip = F.pad(clip, (FRAME * 4, max(FRAME * 4, size - len(clip))))
    start = int(torch.randint(len(clip) - size + 1, ()))
    gain = 10 ** ((float(torch.rand(())) * 8 - 4) / 20)
    return gain * clip[start: start + size]


def spectral_loss(output: Tensor, target: Tensor) -> Tensor:
    """Spectral convergence + log magnitude over five resolutions + log-mel L1, for (B, W) against (B, W)."""
    mels = [log_mel(F.pad(x, (EDGE, EDGE))) for x in (output, target)]
    loss = F.l1_loss(*mels)
    for size in (128, 256, 512, 1024, 2048):
        window = torch.hann_window(size)
        y, t = (torch.stft(x, size, size // 4, window=window, return_complex=True).abs().clamp(min=1e-5) for x in (output, target))
        loss = loss + ((t - y).norm() / t.norm() + F.l1_loss((y + 1e-2).log(), (t + 1e-2).log())) / 5
    return loss


# ---- commands ----

def fetch(work: Path) -> Path:
    """Download and unpack the two packages under `work`, unless that was done before."""
    root = work / "packages"
    if not (root / "usr").is_dir():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True)
        for package in sorted(root.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return root / "usr" / "share"


def build_speech(work: Path) -> None:
    """Write allison/, synthetic/, manifest.jsonl and words.json, the vocabulary of configs/tiny.py.

    The READMEs, the licence texts and demo.jsonl, the demo's mix of them, are kept by hand."""
    share = fetch(work)
    sounds = share / "asterisk" / "sounds" / "en_US_f_Allison"
    texts = read_transcripts(share / "doc" / PACKAGES[0] / "core-sounds-en.txt.gz")
    files = {name: sounds / f"{name}.g722" for name in texts}
    clips = {name: decode_g722(file) for name, file in files.items() if file.is_file()}
    clips = {name: trim(wav) for name, wav in clips.items() if len(wav) <= MAX_SECONDS * RATE}
    texts = {name: texts[name] for name in sorted(clips)}
    held_out = choose_held_out(texts)
    for folder in [SPEECH / "allison", *(SPEECH / "synthetic" / voice for voice in ("rms", "slt", "ar"))]:
        for old in folder.glob("**/*.opus"):
            old.unlink()
    rows = [row_of(name, f"allison/{name}.opus", clips[name], text, "allison", "en",
                   "held-out" if name in held_out else "train", group_of(name))
            for name, text in texts.items()]
    rows += synthetic_rows({name: text for name, text in texts.items() if name not in held_out}, work)
    write_rows(SPEECH / "manifest.jsonl", rows)
    words = sorted({word for row in rows if row["language"] == "en" for word in row["text"].split()})
    (SPEECH / "words.json").write_text(json.dumps(words, indent=0) + "\n", encoding="utf-8")
    print(f"{len(rows)} clips, {len(held_out)} held out")


def row_of(name: str, audio: str, wav: Tensor, text: str, speaker: str, language: str, split: str, group: str) -> dict:
    """Write one clip and return its line of the manifest."""
    path = SPEECH / audio
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav.numpy(), RATE, format="OGG", subtype="OPUS")
    return {"id": name, "audio": audio, "text": text, "speaker": speaker, "language": language,
            "words": word_starts(wav, text.split(), language), "synthetic": speaker != "allison",
            "split": split, "group": group}


def synthetic_rows(texts: dict[str, str], work: Path) -> list[dict]:
    """Render digits and training prompts with two flite voices, and the Arabic phrases with espeak-ng."""
    prompts = [name for name in texts if group_of(name) == "prompt" and 2 <= len(texts[name].split()) <= 7]
    seen, chosen = set(), [f"digits/{d}" for d in range(10)]
    for name in sorted(prompts, key=hashed):
        if texts[name] not in seen and len(seen) < SYNTHETIC_PROMPTS:
            seen.add(texts[name])
            chosen.append(name)
    rows = []
    for voice in ("rms", "slt"):
        for name in chosen:
            rows.append(row_of(f"{voice}/{name}", f"synthetic/{voice}/{name}.opus", synthesise(voice, texts[name], work), texts[name],
                               voice, "en", "train", group_of(name)))
    for name, text in ARABIC.items():
        plain = re.sub("[\u064b-\u0652]", "", text)
        rows.append(row_of(f"ar/{name}", f"synthetic/ar/{name}.opus", synthesise("ar", text, work), plain,
                           "espeak-ar", "ar", "train", "digits" if name in "0123456789" else
                           "numbers" if name == "10" else "prompt"))
    return rows


@torch.no_grad()
def fit_rvq(x: Tensor, num_codebooks: int, codebook_size: int, iterations: int = 20, seed: int = 0) -> ResidualVQ:
    """Fit a quantiser to x (N, D) by k-means on what each codebook leaves over.

    Raises ValueError with fewer rows than entries.  An entry that wins nothing moves to a random row.
    """
    N, D = x.shape
    if codebook_size > N:
        raise ValueError(f"{N} vectors cannot fill a codebook of {codebook_size}; add speech or lower codebook_size")
    generator = torch.Generator().manual_seed(seed)
    quantiser = ResidualVQ(num_codebooks, codebook_size, D).to(x)
    residual = x
    for book in quantiser.codebooks:
        book.copy_(residual[torch.randperm(N, generator=generator)[:codebook_size]])
        for _ in range(iterations):
            code = nearest(residual, book)
            count = torch.bincount(code, minlength=codebook_size)
            total = torch.zeros_like(book).index_add_(0, code, residual)
            spare = residual[torch.randint(N, (codebook_size,), generator=generator)]
            book.copy_(torch.where((count > 0)[:, None], total / count.clamp(min=1)[:, None], spare))
        residual = residual - book[nearest(residual, book)]
    return quantiser


@torch.no_grad()
def fit_tables(clips: list[Tensor], iterations: int = 20, shifts: int = 4, seed: int = 0) -> TinyCodec:
    """Fit mean, PCA and codebooks on clips (W,) at 16 kHz, each taken at `shifts` starts within a frame."""
    rows = []
    for clip in clips:
        for start in range(0, FRAME, FRAME // shifts):
            wav = F.pad(clip, (EDGE + start, EDGE + -(len(clip) + start) % FRAME))
            rows.append(log_mel(wav[None].double()).reshape(-1, STACK * MELS))
    x = torch.cat(rows)                                                         # (N, 320)
    codec = TinyCodec("griffin_lim")
    codec.mean.copy_(x.mean(0))
    _, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))         # ascending
    codec.basis.copy_(vectors[:, -DIM:].flip(1).T)
    x = ((x - x.mean(0)) @ codec.basis.double().T).float()                      # -> (N, 64)
    codec.rvq = fit_rvq(x, codec.num_codebooks, codec.codebook_size, iterations, seed)
    return codec.half().float().eval()          # as the file will hold it: saving changes no code


def build_codec(steps: int, seed: int) -> None:
    """Fit the tables, save; train the vocoder, save again."""
    torch.set_num_threads(1)            # steps this small gain little from a second core, and repeat exactly
    rows = [row for _, row in read_rows(SPEECH / "manifest.jsonl", "clip") if row["split"] == "train"]
    clips = [load_wav(SPEECH / row["audio"])[0][0] for row in rows]
    path = ROOT / "assets" / "tiny_codec.safetensors"
    codec = fit_tables(clips, seed=seed)
    codec.save(path)
    seconds = sum(map(len, clips)) / RATE
    print(f"tables fitted on {len(clips)} clips, {seconds:.0f} s; {path.stat().st_size:,} bytes")
    if steps:
        weights = torch.tensor([1.0 if row["synthetic"] else 2.0 for row in rows])          # the human voice comes first
        codec = train_vocoder(codec, clips, weights, steps=steps, seed=seed)
        codec.save(path)
        print(f"vocoder trained for {steps} steps; {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("speech", "codec"))
    parser.add_argument("--work", type=Path, default=Path("build"), help="scratch folder for packages")
    parser.add_argument("--steps", type=int, default=4500, help="vocoder steps; 0 stops after the tables")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "speech":
        if missing := [tool for tool in ("dpkg-deb", "flite", "espeak-ng") if not shutil.which(tool)]:
            sys.exit(f"build.py: not installed: {', '.join(missing)}; apt-get install dpkg flite espeak-ng")
        args.work.mkdir(parents=True, exist_ok=True)
        build_speech(args.work)
    else:
        build_codec(args.steps, args.seed)


if __name__ == "__main__":
    main()
