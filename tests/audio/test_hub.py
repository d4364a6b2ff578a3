"""Hub ids: codecs, tokenizers and models are found in the local cache; what is not there ends in one line with its command."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from huggingface_hub import constants
from test_higgs_codec import case, codec, folder  # noqa: F401

from audio import hub, load_codec
from checkpoint import Extras, load, save
from layers.architecture import ModelConfig, StackConfig
from model import MultistreamLM
from streams import Stream, StreamTable
from text.tokenizers import load_tokenizer, tokenizer_file

TOKENIZER = ROOT / "assets" / "tiny_tokenizer.json"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An offline hub cache; `cached("owner/name")` is the folder of a snapshot in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(name: str) -> Path:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc")
        (home / "snapshots" / "abc").mkdir(parents=True)
        return home / "snapshots" / "abc"
    return add


@pytest.mark.parametrize(("name", "wanted"), [("bosonai/higgs-audio-v2-tokenizer", True), ("Qwen/Qwen2.5-1.5B", True), ("tiny", False),
                                              ("a/b/c", False), ("./a/b", False), ("assets/none", False), ("a/b.safetensors", False)])
def test_what_is_a_hub_id(name, wanted):
    assert hub.is_id(name) == wanted


def test_a_codec_is_loaded_by_its_hub_id(cached, folder, codec):  # noqa: F811
    shutil.copytree(folder, cached("someone/codec"), dirs_exist_ok=True)
    codes = torch.randint(0, 4, (1, codec.num_codebooks, 3))
    assert torch.equal(load_codec("someone/codec").decode(codes), codec.decode(codes))


def test_a_tokenizer_is_loaded_by_its_hub_id_and_travels_with_the_checkpoint(cached, tmp_path):
    shutil.copy(TOKENIZER, cached("someone/Words-1.5B") / "tokenizer.json")
    assert load_tokenizer("someone/Words-1.5B").content == TOKENIZER.read_bytes()
    table = StreamTable((Stream("text", "text", 288, 288),), "text")
    model = MultistreamLM(ModelConfig(table, StackConfig(dim=8, layers=1, heads=1, ffn=8)))
    save(model, tmp_path / "with", Extras(data={"codec": "tiny", "tokenizer": "someone/Words-1.5B", "normaliser": "none"}))
    assert load(tmp_path / "with").extras.data["tokenizer"] == str(tmp_path / "with" / "tokenizer.json")
    save(model, tmp_path / "without", Extras(data={"codec": "tiny", "tokenizer": "nobody/Words-1.5B", "normaliser": "none"}))
    assert load(tmp_path / "without").extras.data["tokenizer"] == "nobody/Words-1.5B"     # asked for when it is needed
    assert tokenizer_file(TOKENIZER.parent / "speech") == TOKENIZER.parent / "speech" / "tokenizer.json"


@pytest.mark.parametrize("ask", [load_codec, load_tokenizer, load])
def test_what_is_not_cached_is_named_with_the_command_that_fetches_it(ask, cached):
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither .* when online run: hf download nobody/nothing"):
        ask("nobody/nothing")


def test_a_folder_that_was_never_filled_is_named_with_the_command_that_fills_it(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"when online run: hf download OWNER/Qwen2.5-1.5B --local-dir models/Qwen2.5-1.5B"):
        load("models/Qwen2.5-1.5B")


def test_the_recipe_names_what_it_lacks(cached, tmp_path):
    (tmp_path / "ar.jsonl").write_text('{"audio": "a.wav", "text": "x"}\n')
    rc, _, err = call("train.py", "configs/higgs_ar.py", f"--data.sources={tmp_path}/ar.jsonl", f"--data.cache={tmp_path}/cache",
                      f"--out={tmp_path}/run")
    assert rc == 2 and "hf download bosonai/higgs-audio-v2-generation-3B-base" in err and err.count("\n") == 1, err


