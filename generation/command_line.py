"""The command line of sample.py: its options, and the model and the data facts that they name."""

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lora
from checkpoint import DTYPES, Extras, load, official_folder
from corpus.data_config import DataConfig
from corpus.examples import prompt_example
from families.family import family_of
from families.folder_files import sampling_rules
from families.formats import official_files
from generation.conversation import ChatConfig
from generation.decode_step import SampleConfig
from kernels.choice import slow_dtype
from layers.int8_base import quantize
from model import MultistreamLM
from options import from_json, locate, visible
from streams import StreamTable
from text.tokenizers import Tokenizer


def check_names(device: str, dtype: str) -> None:
    """Assert that there are such devices and dtypes."""
    assert dtype in DTYPES, f"dtype {dtype!r} is none of {', '.join(DTYPES)}"
    assert device in ("cpu", "cuda"), f"device {device!r} is neither cpu nor cuda"


@dataclass(frozen=True)
class ModelOptions(SampleConfig):
    """Which model, how it is loaded and how it samples: what sample.py and serve.py have in common."""

    ckpt: str = ""               # model: run folder, checkpoint folder, file or hub id
    codec: str = ""              # codec file, folder or name; "" = the one that the checkpoint names
    tokenizer: str = ""          # tokenizer file or folder; "" = the one that the checkpoint names
    normaliser: str = ""         # text normaliser; "" = the one that the checkpoint names
    adapter: str = ""            # folder of an adapter to load on top of --ckpt; "" = none
    device: str = "cpu"          # device to run on: cpu or cuda
    dtype: str = "fp32"          # type of the weights: fp32, bf16 or fp16
    quantize: str = ""           # "int8": keep the weights in 8 bits, half the memory of bf16; "" = off
    system: str | None = None    # conversations: system message; none = as in training
    scene: str | None = None     # conversations: description of the scene, "" = without one; none = as in training
    ref_in: str | None = None    # conversations: put the voice in an "assistant" turn or in the "system" message; none = as in training
    skip_first_frame: bool = False    # skip the first frame of what a user says, as Moshi's official generator does
    condition: str = ""          # Hibiki: description=very_good; Qwen3-TTS: language=english,speaker=vivian

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.quantize in ("", "int8"), f"quantize {self.quantize!r} is neither empty nor int8"
        check_names(self.device, self.dtype)
        assert self.ref_in in (None, "assistant", "system"), "ref_in is assistant or system"


@dataclass(frozen=True)
class Job(ModelOptions):
    """What `python sample.py` does."""

    text: str = ""               # text to speak
    texts: str = ""              # file with one text a line, instead of --text
    out: str = "out/sample.wav"  # wav file to write; with --texts, the folder for wavs and samples.jsonl
    user: str = ""               # recording to answer: --out becomes stereo (left the model, right the user), with a transcript .txt
    prompt: str = ""             # stereo dialogue to continue, left the model; without --user the model speaks for both
    seconds: float = 20.0        # with --prompt: seconds to generate
    chat: ChatConfig | None = None  # --chat: converse at the terminal, a line at a time
    reply: str = ""              # conversations: "text", printed as it comes, or "speech"; "" = speech where there is any
    ref: tuple[str, ...] = ()    # recording of the voice to clone, or "profile:" and words; several are [SPEAKER0], [SPEAKER1]
    ref_text: tuple[str, ...] = ()  # transcript of each --ref recording
    chunk_words: int = 0         # speak a long text in pieces of this many words (Chinese, Japanese, Thai: letters) or of turns; 0 = in one
    chunk_buffer: int = 1        # with --chunk_words: earlier pieces that the next one reads as context
    stream: bool = False         # write the wav while it is generated
    batch: int = 16              # texts generated at once, in one batch

    def __post_init__(self) -> None:
        super().__post_init__()
        assert min(self.chunk_words, self.chunk_buffer) >= 0, "chunk_words and chunk_buffer are not negative"
        assert self.reply in ("", "text", "speech"), f"reply {self.reply!r} is neither text nor speech"
        assert 0 < self.batch <= 2**16, f"batch {self.batch} is not positive and at most 2^16"


def check_device(device: str, dtype: str) -> None:
    """ValueError where the machine lacks the device; a warning where the device emulates the dtype."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: this machine shows no CUDA device; use --device=cpu")
    if slow := slow_dtype(DTYPES[dtype], device):
        print(slow, file=sys.stderr)


def load_for_sampling(job: ModelOptions) -> tuple[MultistreamLM, DataConfig]:
    """Load the model and say what was loaded, the adapter included."""
    if not job.ckpt:
        raise ValueError("no checkpoint given; add --ckpt out/demo, or any run folder, file or hub id")
    check_device(job.device, job.dtype)
    model = load(job.ckpt, job.device, job.dtype, job.adapter or None)
    found = lora.norms(model)
    applied = f"adapter applied: {2 * len(found)} tensors, |BA|/|W| up to {max(found.values()):.2g}" if found else "no adapter"
    print(f"{job.adapter or model.extras.folder}: step {model.extras.step}, {applied}")
    lora.strip(model)                                # merged adapters go the fast way
    if job.quantize:
        quantize(model.requires_grad_(False))
    family_of(model.table).before_sampling(model)
    if job.condition and model.table.ids:
        model.table = replace(model.table, choice=f"{model.table.choice},{job.condition}")
    folder = Path(model.extras.folder)
    given = {key: getattr(job, key) for key in ("codec", "tokenizer", "normaliser") if getattr(job, key)}
    origin = official_folder(model.extras) or folder              # under an adapter of another library the base's own
    facts = dict(model.extras.data or family_of(model.table).companions | official_files(origin, given)) | given
    for what in ("codec",) * bool(model.table.codes) + ("tokenizer",):
        if what not in facts:
            raise ValueError(f"{folder} does not say which {what} the model was made for; name it with --{what}=FILE, a folder or hub id")
    said = {"scene": job.scene, "reference_in": job.ref_in, "system": job.system}             # None: as in training
    facts |= {name: value for name, value in said.items() if value is not None}
    return model, from_json(DataConfig, facts, f"{folder}/config.json data")


FEATURES = ".safetensors"        # a voice as features, which says nothing


def pair_voices(refs: Sequence[str], transcripts: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """(recording, transcript) of each voice, or ("", "profile:..."); ValueError when they do not fit each other or the texts."""
    said = iter(transcripts)
    voices = [("", ref) if ref.startswith("profile:") else (str(locate(ref)), "" if ref.endswith(FEATURES) else next(said, ""))
              for ref in refs]
    if any(not (text.strip() or name.endswith(FEATURES)) for name, text in voices) or next(said, None) is not None:
        found = f"{sum(bool(ref) for ref, _ in voices)} recordings, {len(transcripts)} transcripts"
        raise ValueError(f"a reference needs both --ref=voice.wav and --ref_text=\"what it says\"; got {found}")
    highest = max((int(n) for text in texts for n in re.findall(r"\[SPEAKER(\d+)\]", text)), default=0)
    if voices and highest >= len(voices):
        raise ValueError(f"the text names [SPEAKER{highest}], there are {len(voices)} voices; give a --ref and a --ref_text to each")
    return voices


def sayable(texts: Sequence[str], data: DataConfig, tokenizer: Tokenizer, table: StreamTable) -> Iterator[tuple[int, str]]:
    """The texts of a list that can be said, with their numbers; the others are named. ValueError when there is none."""
    bad = []
    for n, text in enumerate(texts):
        try:
            prompt_example(text, data, tokenizer, table=table)
        except ValueError as error:
            bad.append(error)
            print(visible(f"left out: text {n}: {error}"), file=sys.stderr)
        else:
            yield n, text
    if len(bad) == len(texts):
        raise ValueError(f"none of the {len(texts)} texts can be said: {bad[0]}")


def usual_rules(table: StreamTable, given: Collection[str], extras: Extras | None = None) -> dict[str, Any]:
    """The sampling rules of a family's official script and of the files beside its weights, without those the user gave; prints them."""
    folder, family = official_folder(extras) if extras else None, family_of(table)
    rules = family.rules(table) | ({"condition": family.condition(table)} if family.condition(table) else {})
    rules = {k: v for k, v in (rules | (sampling_rules(folder, table, print) if folder else {})).items() if k not in given}
    if rules:
        print("sampling as the official example does: " + ", ".join(f"{name} {value}" for name, value in rules.items()))
    return rules
