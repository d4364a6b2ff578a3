"""Make tests/golden/speech_scores.json and duplex_scores.json: what the published scripts say of bundled recordings.

    python tests/golden/make_evaluation_scores.py --seed-tts-eval=CLONE --full-duplex-bench=CLONE

CLONE are checkouts of BytedanceSpeech/seed-tts-eval and DanielLin94144/Full-Duplex-Bench, whose own files are run here. Needs jiwer,
zhon, scipy, librosa, praat-parselmouth, silero-vad and speechmos, and neither a network nor a GPU: the judge of relevance, UTMOS and
SQUIM are stood in for, and their numbers are not kept. `samples` builds the recordings; the tests build the same.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from audio.wav import load_wav, save_wav  # noqa: E402
from evaluation.duplex_measures import TASKS, write_words  # noqa: E402
from options import read_rows, write_json  # noqa: E402

RATE = 16_000
SPEECH = ROOT / "assets/speech"
HUMAN = [1.0, 2.0, 5.0, 3.0, 0.5, 0.1, 1.5]                     # a distribution of backchannels, for the sake of the arithmetic
PAIRS = [("it's five o'clock, isn't it?", "It's 5 o'clock isn't it", "en"), ("Hello, world -- again!", "hello word again and again", "en"),
         ("你好，世界！今天天气很好。", "你好世界今天天汽好", "zh"), ("A B C", "", "en"), ("one  two", "one two three four five", "en"),
         ("It’s  the “end”…", "its the end", "en"), ("他说：“GPT很好”", "他说gpt很好", "zh")]
OPINIONS = [f"assets/speech/{name}.opus" for name in ("allison/queue-thankyou", "allison/tt-monkeysintro", "synthetic/slt/vm-undelete")]


# ---- recordings in the layout of Full-Duplex-Bench ----

def placed(names: list[tuple[str, float]], seconds: float) -> tuple[torch.Tensor, list[tuple[str, float, float]]]:
    """Bundled clips at times of a recording, and their words.   -> (1, W), words"""
    rows = {row["id"]: row for _, row in read_rows(SPEECH / "manifest.jsonl", "clip")}
    wav, words = torch.zeros(1, round(seconds * RATE)), []
    for name, at in names:
        clip, _ = load_wav(SPEECH / rows[name]["audio"], RATE)
        first = round(at * RATE)
        wav[:, first : first + clip.shape[1]] += clip[:, : wav.shape[1] - first]
        starts = [start for _, start in rows[name]["words"]] + [clip.shape[1] / RATE]
        words += [(word, round(at + start, 3), round(at + end, 3))
                  for (word, start), end in zip(rows[name]["words"], starts[1:], strict=True)]
    return wav, words


SAMPLES = {  # task -> sample -> clips of the user, clips of the agent, seconds, what the task's own file says
    "pause_handling": {
        "1": ([("slt/vm-undelete", 0.4)], [("digits/4", 2.1)], 5.0, [{"text": "[PAUSE]", "timestamp": [2.0, 2.6]}]),
        "2": ([("slt/vm-undelete", 0.4)], [("queue-thankyou", 1.5)], 5.0, [{"text": "[PAUSE]", "timestamp": [2.0, 2.6]}]),
        "3": ([("slt/vm-undelete", 0.4)], [], 5.0, [{"text": "[PAUSE]", "timestamp": [2.0, 2.6]}])},
    "smooth_turn_taking": {
        "1": ([("slt/dir-nomatch", 0.3)], [("transfer", 3.1)], 7.0, [{"text": "[TURN-TAKING]", "timestamp": [2.4, 2.7]}]),
        "2": ([("slt/dir-nomatch", 0.3)], [("queue-thankyou", 2.2)], 7.0, [{"text": "[TURN-TAKING]", "timestamp": [2.4, 2.7]}]),
        "3": ([("slt/dir-nomatch", 0.3)], [("digits/9", 3.0)], 7.0, [{"text": "[TURN-TAKING]", "timestamp": [2.4, 2.7]}])},
    "user_interruption": {
        "1": ([("slt/check-number-dial-again", 2.0)], [("vm-sorry", 4.6)], 8.0,
              [{"context": "a", "interrupt": "b", "timestamp": [2.0, 4.1]}]),
        "2": ([("slt/check-number-dial-again", 2.0)], [], 8.0, [{"context": "a", "interrupt": "b", "timestamp": [2.0, 4.1]}])},
    "backchannel": {
        "1": ([("slt/tt-monkeysintro", 0.2)], [("digits/1", 1.2), ("digits/8", 3.4)], 7.0, None),
        "2": ([("slt/tt-monkeysintro", 0.2)], [("digits/1", 0.8), ("tt-monkeysintro", 2.0)], 9.0, None),
        "3": ([("slt/tt-monkeysintro", 0.2)], [], 6.0, None)},
    "overlap": {
        "1": ([("slt/vm-calldiffnum", 0.5), ("slt/conf-unlockednow", 4.2)], [("tt-monkeysintro", 2.4), ("privacy-incorrect", 7.0)], 12.0,
              {"timestamps": [4.2, 6.3]}),
        "2": ([("slt/vm-calldiffnum", 0.5), ("slt/conf-hasleft", 5.0)], [("confbridge-lock-no-join", 2.6), ("queue-thankyou", 6.9)], 10.0,
              {"timestamps": [5.0, 6.5]})}}
FILES = {task: name for name, task in TASKS.items()}


def samples(folder: Path) -> Path:
    """Build the samples of all tasks: folder/TASK/N/{input.wav, output.wav, output.json, the file of the task}."""
    for task, rows in SAMPLES.items():
        for name, (user, agent, seconds, about) in rows.items():
            here = folder / task / name
            here.mkdir(parents=True, exist_ok=True)
            save_wav(here / "input.wav", placed(user, seconds)[0], RATE)
            wav, words = placed(agent, seconds)
            save_wav(here / "output.wav", wav, RATE)
            write_words(here / "output.json", words)
            if about is not None:
                (here / FILES[task]).write_text(json.dumps(about))
    return folder


# ---- the published scripts ----

def stand_ins() -> None:
    """Modules that the scripts import and that are not needed for the numbers that are kept."""
    def module(name: str, **attributes: object) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)

    def load(path: object) -> tuple[torch.Tensor, int]:
        return load_wav(path)

    def resample(wav: torch.Tensor, before: int, after: int) -> torch.Tensor:
        assert before == after, "the samples have 16 kHz"
        return wav

    module("torchaudio", load=load)
    module("torchaudio.functional", resample=resample)
    sys.modules["torchaudio"].functional = sys.modules["torchaudio.functional"]
    module("torchaudio.pipelines", SQUIM_OBJECTIVE=None, SQUIM_SUBJECTIVE=None)
    module("utmosv2")
    silero = importlib.import_module("silero_vad")
    silero.get_speech_timestamps = squeezed(silero.get_speech_timestamps)
    utils, model = (silero.get_speech_timestamps, None, None, None, None), silero.load_silero_vad()
    torch.hub.load = lambda *_, repo_or_dir="", **__: (model, utils)


CALLS: list[list[list[float]]] = []                             # the spans that silero found, call by call


def squeezed(function):
    def call(wav: torch.Tensor, *rest: object, **options: object):
        found = function(wav.squeeze(), *rest, **options)
        CALLS.append([[row[k] / (1 if options.get("return_seconds") else RATE) for k in ("start", "end")] for row in found])
        return found
    return call


def printed(function, *arguments: object) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        function(*arguments)
    return text.getvalue()


def numbers(text: str) -> dict[str, float]:
    """The lines "Name: 0.5" and "Name - Mean: 0.5 ± 0.1" of a result."""
    found = re.findall(r"^([A-Za-z ]+?)(?: - Mean)?:\s+(-?[\d.]+)", text[text.rindex("[Result]") :], re.M)
    return {name.strip().lower().replace(" ", "_"): float(value) for name, value in found}


class Judge:
    """Stands in for the judge of relevance."""

    class chat:
        class completions:
            @staticmethod
            def create(**_: object):
                said = types.SimpleNamespace(content="Analysis: none.\nI would rate the AI's response as 3")
                return types.SimpleNamespace(choices=[types.SimpleNamespace(message=said)])


def full_duplex_bench(clone: Path) -> dict[str, object]:
    stand_ins()
    sys.path.insert(0, str(clone / "v1_v1.5/evaluation"))
    with tempfile.TemporaryDirectory() as name:
        folder = samples(Path(name))
        os.chdir(folder)
        (folder / "icc_gt_distribution.json").write_text(json.dumps(dict.fromkeys("123", HUMAN)))
        result: dict[str, object] = {}
        for task, *client in (("pause_handling",), ("smooth_turn_taking",), ("backchannel",), ("user_interruption", Judge)):
            script = importlib.import_module(f"eval_{task}")
            if task == "backchannel":                                       # which lists its samples in any order
                script.os.listdir = lambda path, listed=os.listdir: sorted(listed(path))
            result[task] = numbers(printed(getattr(script, f"eval_{task}"), str(folder / task), *client))
        result["user_interruption"].pop("average_rating")
        result["backchannel"]["spans"] = dict(zip("123", CALLS, strict=True))
        timing, general = importlib.import_module("get_timing"), importlib.import_module("eval_general_before_after")
        settings = {"trim_silence": True, "speaking_rate": True, "trim_mode": "silero", "pitch": True, "intensity": True}
        result["overlap"] = {}
        for sample in sorted((folder / "overlap").iterdir()):
            CALLS.clear()
            printed(timing.process_folder, sample)
            parts: list[dict[str, object]] = []
            files = (str(sample / f) for f in ("output.wav", "output.json", "metadata.json"))
            printed(lambda files=files, parts=parts: parts.append(general.eval_general_split(settings, *files)))
            result["overlap"][sample.name] = json.loads((sample / "latency_intervals.json").read_text()) | {
                key: parts[0][key] for key in ("pre", "post", "split_t")} | {"spans": list(CALLS)}
        return result


def seed_tts(clone: Path) -> list[dict[str, object]]:
    """WER by the function of run_wer.py, whose recognisers are not loaded."""
    source = (clone / "run_wer.py").read_text()
    body = source[source.index("def process_one") : source.index("def run_asr")]
    body = body.replace("compute_measures(truth, hypo)", "measures_of(truth, hypo)")            # jiwer 4 has another name for it
    found = []
    for text, heard, language in PAIRS:
        import jiwer
        from zhon.hanzi import punctuation

        def measures_of(truth: str, hypo: str) -> dict[str, float]:
            out = jiwer.process_words(truth, hypo)
            return {k: getattr(out, k) for k in ("wer", "substitutions", "deletions", "insertions")}

        scope = {"lang": language, "measures_of": measures_of,
                 "punctuation_all": punctuation + "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"}
        exec(body, scope)
        found.append({"text": text, "heard": heard, "language": language, "wer": scope["process_one"](heard, text)[2]})
    return found


def opinions() -> dict[str, dict[str, float]]:
    from speechmos import dnsmos
    found = {name: dnsmos.run(load_wav(ROOT / name, RATE)[0][0].numpy(), RATE) for name in OPINIONS}
    return {name: {"dnsmos": float(r["ovrl_mos"]), "dnsmos_signal": float(r["sig_mos"]), "dnsmos_background": float(r["bak_mos"])}
            for name, r in found.items()}


def commit(clone: Path) -> str:
    return subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    clones = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
    seed, bench = (Path(clones[name]).resolve() for name in ("seed-tts-eval", "full-duplex-bench"))
    golden = ROOT / "tests/golden"
    write_json(golden / "speech_scores.json", {"made": {"seed-tts-eval": commit(seed), "command": "make_evaluation_scores.py"},
                                               "seed_tts_wer": seed_tts(seed), "dnsmos": opinions()})
    found = {"made": {"full-duplex-bench": commit(bench)}} | full_duplex_bench(bench)
    (golden / "duplex_scores.json").write_text(json.dumps(found, indent=None) + "\n")
