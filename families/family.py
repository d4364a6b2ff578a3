"""The interface of a family to the rest of the code, and how families are found.

A family is a file in this folder that defines FAMILIES, a tuple of `Family` values, one for each layout. No other code
branches on a family's name: a difference is a field here, or a number in the model's config.

    family_of(table).lay_out(example, table)        the grid of an example, or its prompt
    family_of(table).template                       its chat template, None for a family without turns
    all_families()                                  all families, in the order of their file names

All files of the folder are imported, so a new family is one new file. `python -m families` lists them.
Next: formats.py, for official files.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import families
from families.formats import About, AdapterFormat, Conversion, Format, Tensors, config_differences, read_config, to_theirs
from layers.architecture import ModelConfig
from options import difference
from streams import Example, Grid, StreamTable
from text.conversation import Template


@dataclass(frozen=True)
class Closing:
    """How audio ends after one row sampled its end id: where the other rows get theirs without sampling (generation/turns.py)."""

    grace: int = 0               # columns in which the other rows are still sampled, after the place of their end id in training
    by_row: bool = False         # row k ends k + 1 columns after the first end id, whichever row sampled it
    first: bool = False          # only the end id of the first row ends the audio


FRAME = Closing()                # every row ends in the frame of the first end id, as in training


@dataclass(frozen=True)
class Family:
    """A layout and everything specific to it. Functions take the stream table; sizes are in the model's config."""

    name: str                                                   # name in messages
    layout: str                                                 # StreamTable.layout; "" = another family lays out its examples
    about: str                                                  # one line for `python -m families`
    lay_out: Callable[[Example, StreamTable], Grid] | None = None       # example -> grid; without codes its prompt
    template: Template | None = None                            # chat template
    feed: Callable[..., Any] | None = None                      # fills input-only rows while sampling: feed(texts, table)
    rules: Callable[[StreamTable], dict[str, Any]] = lambda table: {}   # SampleConfig fields of the official inference script
    condition: Callable[[StreamTable], str] = lambda table: ""          # what the official inference script tells a model with conditions
    before_sampling: Callable[[Any], None] = lambda model: None         # what it changes in the model
    companions: dict[str, str] = field(default_factory=dict)    # DataConfig fields that go with official weights: codec, normaliser
    spell: Callable[[str, Any, StreamTable], list[int]] | None = None       # what `feed` takes of a text, instead of its ids
    text_rows: Callable[..., Tensor] | None = None              # the text rows of a dialogue, where they are not text/word_times.py's
    voice_features: Callable[[Sequence[str]], Tensor] | None = None         # features (n, F) of the files of voices
    text_to_speech: bool = False                                   # TTS: the text of a held-out recording can be synthesised
    references: int = 0                                         # most voice references of a prompt
    user_audio: str = ""                                           # "turns": recordings as turns; "duplex": a user stream; "" = none
    persona: Callable[[Tensor, Tensor, StreamTable], Tensor] | None = None     # frames before a conversation: of the ids of a role and
    role: Callable[[str], str] = lambda text: text              # codes of a voice; how the text of a role is written
    stored_voice: Callable[[Path, StreamTable], tuple[Tensor, Tensor]] | None = None      # codes and inputs of a voice in an official file
    ends: int | None = None                                     # the text id that ends a reply after its user
    token_rows: int | None = None                               # number of text rows with ids of the tokenizer, None = all
    formats: tuple[Format, ...] = ()                            # official checkpoint layouts
    adapters: tuple[AdapterFormat, ...] = ()                    # adapter files of other libraries, besides PEFT
    conversions: tuple[Conversion, ...] = ()                    # commands of checkpoint.py that build a model from others
    consolidated: dict[str, str] = field(default_factory=dict)  # formats of other trainers: name -> file in consolidated/
    closings: dict[str, Closing] = field(default_factory=dict)  # by name, how official implementations end audio


_found: dict[str, Family] = {}


def all_families() -> tuple[Family, ...]:
    """All families, read from the files of the folder."""
    names = sorted(info.name for info in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"families.{name}") for name in names if name != "__main__"]
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


def family_of(table: StreamTable) -> Family:
    """The family that lays out a table's examples; ValueError when no file defines its layout."""
    if table.layout not in _found:
        _found.update({family.layout: family for family in all_families() if family.layout})
    if table.layout not in _found:
        raise ValueError(f"layout {table.layout!r} is unknown; known are {', '.join(sorted(_found))} (python -m families)")
    return _found[table.layout]


def lay_out(example: Example, table: StreamTable) -> Grid:
    """Build the grid of an example, or its prompt, with the family's layout function."""
    return family_of(table).lay_out(example, table)


RECIPES = {"dialogues": "configs/moshi_lora.py", "speech": "configs/higgs_ar.py", "text": "configs/ivr_qwen.py"}     # to begin with


def special_tokens() -> tuple[str, ...]:
    """Special tokens of all families, which no text of a conversation may contain."""
    return tuple(dict.fromkeys(mark for family in all_families() if family.template for mark in family.template.refused))


def with_tokenizer_ids(table: StreamTable, tokenizer: Any) -> StreamTable:
    """The table with audio_start, audio_end and stop taken from a tokenizer."""
    return family_of(table).template.with_tokenizer_ids(table, tokenizer)


def closings() -> dict[str, Closing]:
    """All ways to end audio, by name; "frame" is the one of training."""
    return {"frame": FRAME} | {name: closing for family in all_families() for name, closing in family.closings.items()}


def consolidated_files(config: ModelConfig) -> dict[str, str]:
    """Formats in which a run can also save its checkpoints for other trainers: name -> file name."""
    fitting = [family for family in all_families() if any(form.fits(config) for form in family.formats)]
    return {name: file for family in fitting for name, file in family.consolidated.items()}


# ---- one grid or two ----

COMPARED = ("aligned", "audio_start", "audio_end", "pad", "epad", "timing", "bare", "flat")


def other_grid(one: StreamTable, other: StreamTable) -> list[str]:
    """What differs between the grids of two tables, one line each: rows, ids that may stand in them, delays, start and end ids.

    What rows are called, which family lays examples out, and the set of ids that end a text say nothing about the grid.
    """
    def rows(table: StreamTable) -> dict[str, Any]:
        named = ((f"{s.kind} row {n}", s if s.kind == "condition" else replace(s, name="")) for n, s in enumerate(table.streams))
        return dict(named) | {k: getattr(table, k) for k in COMPARED}

    before, after = rows(one), rows(other)
    lines = []
    for name in dict.fromkeys((*before, *after)):
        if name in before and name in after and "row" in name:
            lines += [f"{name}, {line}" for line in difference(before[name], after[name])]
        elif before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}")
    ids, others = dict(one.ids), dict(other.ids)                        # one may know more speakers
    return lines + [f"id of {name}: {id} -> {others[name]}" for name, id in ids.items() if others.get(name, id) != id]


def on_base(run: StreamTable, base: StreamTable) -> StreamTable:
    """The table of a run on the weights of a base: its own rows and layout; a text ends at the ids of either, and it knows the ids of both.

    A base names them in its generation_config.json, in any order, and may not know the one that closes a turn.
    """
    return replace(run, stop=tuple(dict.fromkeys((*run.stop, *base.stop))), choice=run.choice or base.choice,
                   ids=tuple((dict(base.ids) | dict(run.ids)).items()))


# ---- official layouts ----

def recognise_format(about: About) -> Format | None:
    """Recognise an official layout by its config.json; None when it is unknown."""
    return next((form for family in all_families() for form in family.formats if form.recognise(about)), None)


def choose_format(config: ModelConfig, to: str) -> Format:
    """The layout that `--to` means for a model of this family."""
    fitting = [form for family in all_families() for form in family.formats if form.fits(config)]
    for form in fitting:
        if form.to == to:
            return form
    known = ", ".join(["multistream", *(form.to for form in fitting)])
    raise ValueError(f"--to={to} is not a layout of this model; choose one of {known}")


def export_model(config: ModelConfig, tensors: Tensors, to: str, dtype: str) -> tuple[About, Tensors]:
    """Official config.json and tensors of a model without adapters; ValueError names a field that the layout cannot express."""
    form = choose_format(config, to)
    about = form.write(config, dtype)
    result = to_theirs(form, tensors, config)
    gone = config_differences(config, read_config(form, about, result, to))
    if gone:
        raise ValueError(f"the {form.name} layout cannot express this model: {'; '.join(gone[:3])}")
    return about, result
