"""What the rest of the code asks a family, and how families are found.

A family is a file in this folder that defines FAMILIES, a tuple of `Family` values: one for each layout that it lays out.
Nobody else branches on a family's name: what differs is a field here, or a number in the model's config.

    family_of(table).lay_out(example, table)        the grid of an example, or its prompt
    family_of(table).template                       how conversations are written, None for a family without turns
    every()                                         all families, in the order of their file names

Files are found by looking into the folder, so a new family is one new file. `python -m families` lists them.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import families
from families.formats import About, AdapterFormat, Conversion, Format, Tensors, lost, read_config, to_theirs
from layers.architecture import ModelConfig
from streams import Example, Grid, StreamTable
from text.conversation import Template


@dataclass(frozen=True)
class Closing:
    """How audio ends once an end id was drawn: which columns of the other rows hold theirs without being drawn (generation/turns.py)."""

    grace: int = 0               # columns that the other rows are still drawn in, behind the place where training put their end id
    by_row: bool = False         # row k closes k + 1 columns after the column of the first end id, whichever row had it


FRAME = Closing()                # every row ends in the frame in which the first one did: the place where training put it


@dataclass(frozen=True)
class Family:
    """One layout and all that follows from it. Functions take the stream table, numbers of a model stand in its config."""

    name: str                                                   # what messages call it
    layout: str                                                 # StreamTable.layout; "" = examples are laid out by another family
    about: str                                                  # one line for `python -m families`
    lay_out: Callable[[Example, StreamTable], Grid] | None = None       # an example -> its grid; without codes its prompt
    template: Template | None = None                            # how conversations are written
    feed: Callable[..., Any] | None = None                      # fills rows that are only read while sampling: feed(texts, table)
    rules: Callable[[StreamTable], dict[str, Any]] = lambda table: {}   # SampleConfig fields of the official inference script
    companions: dict[str, str] = field(default_factory=dict)    # DataConfig fields that go with official weights: codec, normaliser
    reads_aloud: bool = False                                   # text to speech: what a held-out recording says can be spoken again
    references: int = 0                                         # recordings of a voice that a prompt may hold
    listens: str = ""                                           # how a user is heard: "turns", recordings between turns, or "duplex"
    token_rows: int | None = None                               # text rows that hold ids of the tokenizer, None = all
    formats: tuple[Format, ...] = ()                            # official file layouts
    adapters: tuple[AdapterFormat, ...] = ()                    # adapter files of other libraries, beside PEFT's
    conversions: tuple[Conversion, ...] = ()                    # commands of checkpoint.py that make one model out of others
    consolidated: dict[str, str] = field(default_factory=dict)  # formats a trainer's scripts look for: name -> file in consolidated/
    closings: dict[str, Closing] = field(default_factory=dict)  # how its official implementations end audio, by name


_found: dict[str, Family] = {}


def every() -> tuple[Family, ...]:
    """All families, read from the files of the folder."""
    names = sorted(info.name for info in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"families.{name}") for name in names if name != "__main__"]
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


def family_of(table: StreamTable) -> Family:
    """The family that lays out a table's examples; ValueError when no file defines its layout."""
    if table.layout not in _found:
        _found.update({family.layout: family for family in every() if family.layout})
    if table.layout not in _found:
        raise ValueError(f"layout {table.layout!r} belongs to no family; there are {', '.join(sorted(_found))} (python -m families)")
    return _found[table.layout]


def lay_out(example: Example, table: StreamTable) -> Grid:
    """Build the grid of an example, or its prompt, with the family's layout function."""
    return family_of(table).lay_out(example, table)


def marks_of_turns() -> tuple[str, ...]:
    """What no text of a conversation may hold, whichever family reads it: it would be structure."""
    return tuple(dict.fromkeys(mark for family in every() if family.template for mark in family.template.refused))


def steered(table: StreamTable, tokenizer: Any) -> StreamTable:
    """A table of conversations whose steering ids are those of a tokenizer."""
    return family_of(table).template.steered(table, tokenizer)


def closings() -> dict[str, Closing]:
    """How audio may end, by name; "frame" is the way that training laid it out."""
    return {"frame": FRAME} | {name: closing for family in every() for name, closing in family.closings.items()}


def consolidated_files(config: ModelConfig) -> dict[str, str]:
    """Formats in which a run can leave each checkpoint for another trainer's scripts, and the file they look for."""
    fitting = [family for family in every() if any(form.fits(config) for form in family.formats)]
    return {name: file for family in fitting for name, file in family.consolidated.items()}


# ---- official layouts ----

def recognise_format(about: About) -> Format | None:
    """Tell an official layout by the content of its config.json; None when it is no known one."""
    return next((form for family in every() for form in family.formats if form.recognise(about)), None)


def choose_format(config: ModelConfig, to: str) -> Format:
    """The layout that `--to` means for a model of this family."""
    fitting = [form for family in every() for form in family.formats if form.fits(config)]
    for form in fitting:
        if form.to == to:
            return form
    known = ", ".join(["multistream", *(form.to for form in fitting)])
    raise ValueError(f"--to={to} is no layout of this model's family; there is {known}")


def export_model(config: ModelConfig, tensors: Tensors, to: str, dtype: str) -> tuple[About, Tensors]:
    """Official config.json and tensors of a plain model; ValueError names the field that the layout cannot express."""
    form = choose_format(config, to)
    about = form.write(config, dtype)
    result = to_theirs(form, tensors, config)
    gone = lost(config, read_config(form, about, result, to))
    if gone:
        raise ValueError(f"the {form.name} layout cannot express this model: {'; '.join(gone[:3])}")
    return about, result
