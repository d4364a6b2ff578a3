"""A family is one file: a toy one, written here into a folder of its own, is laid out, trained, sampled, exported and read back
without touching another file (README, "Add a family")."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from safetensors import safe_open

import families
from audio.wav import save_wav
from checkpoint import export, load
from families.family import Family, all_families, closings, family_of, lay_out
from options import read_json, run_config
from streams import Example, Stream, StreamTable, codebooks

TOY = '''"""Toy: speech first, then what it says (a recogniser without a template)."""

from dataclasses import replace

from families.family import Family
from families.formats import Format, by_model_type
from layers.architecture import ModelConfig, StackConfig
from streams import Stream, StreamTable, audio_block, codebooks, join, text_block

TINY = ModelConfig(StreamTable((Stream("text", "text", 300, 300), *codebooks(8, 258, 258, 256, 257, range(8))), "toy", stop=(299,)),
                   StackConfig(dim=16, layers=1, heads=2, ffn=16))
NAMES = (("embed.{x}.weight", "{x}.weight"), ("{x}_head.weight", "to_{x}.weight"), ("temporal.norm.weight", "norm.weight"),
         *((f"temporal.layers.{{n}}.{part}.weight", f"block.{{n}}.{part}") for part in (
             "attn_norm", "ffn_norm", *(f"attn.{x}" for x in "qkvo"), *(f"ffn.{x}" for x in ("gate", "up", "down")))))


def speech_then_text(example, table):
    blocks = [audio_block(example.codes, 0.0, table)] if example.codes is not None else []
    return join([*blocks, text_block(example.text, 1.0, table)])


def read(about, tensors):
    return replace(TINY, temporal=replace(TINY.temporal, ffn=about["width"]))


FAMILIES = (Family("Toy", "toy", "a family of the tests", speech_then_text, rules=lambda table: {"temperature": 0.0},
                   formats=(Format("toy", "toy", lambda c: NAMES, read, lambda c, dtype: {"model_type": "toy", "width": c.temporal.ffn},
                                   lambda c: c.table.layout == "toy", by_model_type("toy"), lambda tensors, config: tensors),)),)
'''
RUN = '''"""A run of the toy family."""
from pathlib import Path

from config import DataConfig, TrainConfig
from families.toy import TINY

here = Path(__file__).parent
config = TrainConfig(model=TINY, data=DataConfig(sources=(str(here / "clips"),), cache=str(here / "cache"), split="manifest", columns=160,
                                                 window=4, prefetch=0),
                     out=str(here / "run"), steps=2, log_every=1, dtype="fp32", device="cpu")
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds toy.py and counts as part of families/."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "more")])
    monkeypatch.setattr("families.family._found", {})
    yield tmp_path
    import sys
    sys.modules.pop("families.toy", None)


def test_every_layout_has_one_family_and_all_are_listed():
    layouts = [family.layout for family in all_families() if family.layout]
    assert len(layouts) == len(set(layouts)) and {"words", "clone", "chatml", "duplex", "moss", "qwen2", "qwen3", "text"} <= set(layouts)
    assert {form.to for family in all_families() for form in family.formats} == {"hf", "boson", "moshi", "dsaa"}
    assert {"frame", "boson", "hf", "first"} == closings().keys()
    code, out, _ = call("families/__main__.py")
    assert code == 0 and all(family.name in out for family in all_families())
    with pytest.raises(ValueError, match="is unknown; known are"):
        family_of(StreamTable((Stream("text", "text", 4),), "nobody"))


def test_a_toy_family_is_one_file(toy: Path):
    clips = toy / "clips"
    for n in range(4):
        save_wav(clips / f"{n}.wav", 0.1 * torch.sin(torch.arange(8000) * (n + 1) / 20)[None], 16_000)
        (clips / f"{n}.txt").write_text("one two")
    (toy / "toy_run.py").write_text(RUN)
    table = StreamTable((Stream("text", "text", 300, 300), *codebooks(2, 18, 18, 16, 17, range(2))), "toy")
    assert isinstance(family_of(table), Family) and "Toy" in [family.name for family in all_families()]
    tokens, weights = lay_out(Example(torch.tensor([5, 6]), torch.zeros(2, 3, dtype=torch.long)), table)
    assert tokens[0, -2:].tolist() == [5, 6] and weights[0].tolist() == [0.0] * (tokens.shape[1] - 2) + [1.0, 1.0] and not weights[1:].any()
    for _ in range(2):                                          # the second time there is nothing left to do
        code, out, err = call("train.py", toy / "toy_run.py")
        assert code == 0, err
    code, out, err = call("sample.py", f"--ckpt={toy}/run", "--text=one", "--max_frames=3", "--reply=text")
    assert code == 0, err
    export(toy / "run", toy / "official", "toy")
    with safe_open(toy / "official" / "model.safetensors", "pt") as file:
        assert "block.0.attn.q" in file.keys() and read_json(toy / "official" / "config.json")["model_type"] == "toy"
    ours, again = load(toy / "run"), load(toy / "official")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in ours.state_dict().items())


def test_the_layouts_that_fit_a_model_are_of_one_family(monkeypatch):
    """Else names of another family are taken for its own: adapters of PEFT, --to=hf."""
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "configs").glob("*.py")):
        for preset in ("config", "smoke"):
            config = getattr(run_config(path, preset), "model", None)
            fitting = [family.name for family in all_families() if config and any(form.fits(config) for form in family.formats)]
            assert len(fitting) < 2, (path, fitting)
