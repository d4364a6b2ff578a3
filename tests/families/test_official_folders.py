"""Other people's folders, whole: what official loaders wrote, with all that stands around released weights.

tests/golden/folders/* come from transformers, boson-multimodal and slavivo/dsaa themselves (golden/make_folders.py), Moshi's are
laid out here around golden weights as its repositories are. Each is loaded, trained, resumed, sampled, merged and exported;
where the official package is installed its loader and script read the export again.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import official_scripts
import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file, save_file
from tables import random_ids
from test_parity import Golden

import lora
from audio import load_codec
from audio.wav import load_wav
from checkpoint import Extras, export, load, save
from corpus.bundled import demo_dialogues
from corpus.cache import encode
from corpus.data_config import DataConfig
from corpus.examples import build_example, prompt_example, reply_example
from corpus.index import check_fit, codebooks_of, new_chat, prepare, prompt_facts
from families.family import family_of, lay_out, on_base, other_grid, with_tokenizer_ids
from families.formats import official_files
from families.moshi import HIBIKI_2B, MOSHI_7B, STT_1B, TTS_1_6B, predict_user
from generation.command_line import Job, load_for_sampling, usual_rules
from generation.decode_step import SampleConfig
from generation.dialogue import dialogue_prompt
from layers.architecture import ModelConfig, StackConfig
from lora import LoraConfig
from model import MultistreamLM
from sample import generate, reply
from streams import Example, Stream, StreamTable, codebooks
from text.tokenizers import load_tokenizer
from text.word_times import timed_transcript, timed_words

FOLDERS = ROOT / "tests/golden/folders"


def official(name: str, folder: Path, **generation: object) -> Path:
    """A copy of an official folder; `generation` changes its generation_config.json."""
    if not (FOLDERS / name).is_dir():
        Golden(name).write(folder)
    else:
        shutil.copytree(FOLDERS / name, folder)
    if generation:
        path = folder / "generation_config.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | generation))
    return folder


def adapter_run(base: Path, folder: Path, config: object = None, targets: tuple[str, ...] = ("attn.q", "attn.v")) -> Path:
    """A checkpoint of a LoRA run on a base."""
    model = load(base, config=config)
    torch.manual_seed(0)
    lora.inject(model, LoraConfig(rank=2, targets=targets))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return save(model, folder, Extras(base=str(base)))


# ---- ids that end a text ----

STOPS = {"moss": [45, 44], "higgs": [261, 257]}             # the others' folders name two


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "higgs", "moss"])
def test_a_run_on_a_released_folder_is_read_whatever_the_order_of_its_stop_ids(name, tmp_path):
    base = official(name, tmp_path / "base", **({"eos_token_id": STOPS[name]} if name in STOPS else {}))
    config = load(base).config
    stop = config.table.stop
    assert len(stop) == 2
    ours = replace(config, dropout=0.1, table=replace(config.table, stop=stop[::-1]))
    run = load(adapter_run(base, tmp_path / "run", ours))
    assert set(run.table.stop) == set(stop) and run.config.table == run.table and len(run.table.stop) == 2
    imported = export(base, tmp_path / "imported")                          # checkpoint.py import, then --init
    assert set(load(imported, config=ours).table.stop) == set(stop)
    assert set(load(adapter_run(imported, tmp_path / "second", ours)).table.stop) == set(stop)
    assert set(load(export(tmp_path / "second", tmp_path / "out", to="hf")).table.stop) == set(stop)


def test_what_a_run_learnt_to_end_with_ends_although_its_base_does_not_know_it(tmp_path):
    """A plain Qwen2.5 names the end of a text only; a run on it closes turns."""
    base = official("qwen2", tmp_path / "base", eos_token_id=512)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"eos_token_id": 512}))
    config = load(base).config
    assert config.table.stop == (512,)
    run = adapter_run(base, tmp_path / "run", replace(config, table=replace(config.table, stop=(514, 512))))
    assert load(run).table.stop == (514, 512) and load(export(run, tmp_path / "merged")).table.stop == (514, 512)


ROWS = (Stream("text", "text", 41, 40, start=40), *codebooks(2, 17, 16, 16, delays=(0, 1)), *codebooks(2, 17, 0, 16, delays=(0, 1)))
TABLE = StreamTable(ROWS, "duplex", aligned=True, stop=(3, 2))


def test_a_grid_is_its_rows_delays_and_ids_not_its_names():
    named = tuple(replace(s, name=f"other {n}") for n, s in enumerate(ROWS))
    assert not other_grid(TABLE, replace(TABLE, streams=named, layout="text", stop=(2, 3, 9)))
    assert on_base(TABLE, replace(TABLE, stop=(9, 2))).stop == (3, 2, 9)
    for change, named in (({"pad": 7}, "pad: 3 -> 7"), ({"audio_start": 5}, "audio_start: -1 -> 5"),
                          ({"streams": (*ROWS[:2], replace(ROWS[2], delay=2), *ROWS[3:])}, "audio row 2, delay: 1 -> 2"),
                          ({"streams": (replace(ROWS[0], start=1), *ROWS[1:])}, "text row 0, start: 40 -> 1"),
                          ({"streams": ROWS[:-1]}, "audio row 4: ")):
        assert other_grid(TABLE, replace(TABLE, **change))[0].startswith(named)


def test_delays_of_a_config_and_of_its_weights_are_compared(tmp_path):
    """The config of a run replaces that of the weights, but not what its grid is."""
    base = official("moshi", tmp_path / "base")
    config = load(base).config
    streams = tuple(replace(s, delay=0) for s in config.table.streams)
    with pytest.raises(ValueError, match=r"base has another stream table than the config's model: audio row \d+, delay: 1 -> 0"):
        load(base, config=replace(config, table=replace(config.table, streams=streams)))


# ---- what a Moshi folder names ----

def kyutai(folder: Path, name: str = "moshi", **about: object) -> Path:
    """A folder as Kyutai publishes: flat config.json and weights; `about` changes the config."""
    case = Golden(name)
    case.config |= about
    return case.write(folder)


def pieces(folder: Path, name: str = "tokenizer_spm.model", size: int = 28, **options: object) -> Path:
    """A SentencePiece model made by the package itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"line {n} says {'abcdefgh'[n % 8]} and {'stuvwxyz'[n % 8]} to you" for n in range(64)]
    with open(folder / name, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, vocab_size=size,
                                                 hard_vocab_limit=False, minloglevel=2, **options)
    return folder / name


def test_a_folder_without_codec_or_tokenizer_never_gets_the_demos(tmp_path, capsys):
    folder = kyutai(tmp_path / "consolidated")
    for given, missing in (((), "codec"), (("--codec=tiny",), "tokenizer")):
        rc, _, err = call("sample.py", f"--ckpt={folder}", f"--user={ROOT}/assets/speech/0.wav", f"--out={tmp_path}/x.wav", *given)
        assert rc == 2 and f"does not say which {missing} the model was made for; name it with --{missing}=FILE" in err, err


def test_the_codec_and_the_tokenizer_that_a_config_names_are_taken(tmp_path):
    folder = kyutai(tmp_path / "m", mimi_name="mine.safetensors", tokenizer_name="words.model", moshi_name=None)
    for name in ("mine.safetensors", "tokenizer-other.safetensors", "words.model", "other.model"):
        (folder / name).write_bytes(b"")
    assert official_files(folder) == {"codec": str(folder / "mine.safetensors"), "tokenizer": str(folder / "words.model")}
    (folder / "words.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer_name in .*config.json is words.model, which is not there; fetch it, or name"):
        official_files(folder)
    assert official_files(folder, ("tokenizer",)) == {"codec": str(folder / "mine.safetensors")}
    other = kyutai(tmp_path / "n")
    for name in ("a.model", "b.model"):
        (other / name).write_bytes(b"")
    with pytest.raises(ValueError, match="holds a.model, b.model: name the tokenizer with --tokenizer=FILE"):
        official_files(other)


def test_weights_are_the_file_that_a_config_names_and_null_is_the_usual_one(tmp_path):
    expected = load(kyutai(tmp_path / "plain")).weights()
    for name, file in ((None, "model.safetensors"), ("moshiko@120.safetensors", "moshiko@120.safetensors")):
        folder = kyutai(tmp_path / str(name), moshi_name=name)
        (folder / "model.safetensors").rename(folder / file)
        save_file({"x": torch.ones(1)}, folder / "tokenizer-e351c8d8-checkpoint125.safetensors")
        assert all(torch.equal(t, expected[n]) for n, t in load(folder).weights().items())
    with pytest.raises(ValueError, match="config.json is gone.safetensors, which is not there"):
        load(kyutai(tmp_path / "gone", moshi_name="gone.safetensors"))
    folder = kyutai(tmp_path / "finetuned", lora=True)                   # moshi-finetune's merged weights say lora, and are whole
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    save_file({"x": torch.ones(1)}, folder / "mimi-pytorch-e351c8d8@125.safetensors")
    assert all(torch.equal(t, expected[n]) for n, t in load(folder).weights().items())


def test_a_finetuned_folder_keeps_the_names_of_its_base(tmp_path):
    """moshi-finetune copies config.json and writes consolidated.safetensors beside it."""
    folder = kyutai(tmp_path / "checkpoints/checkpoint_000500/consolidated", moshi_name="model.safetensors", lora=False)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    expected = load(kyutai(tmp_path / "plain")).weights()
    for path in (folder, folder / "consolidated.safetensors", folder / "config.json"):
        assert all(torch.equal(t, expected[n]) for n, t in load(path).weights().items())
    with pytest.raises(FileNotFoundError, match="give .*checkpoint_000500/consolidated"):
        load(tmp_path)
    other = tmp_path / "plain/other.safetensors"
    save_file({n: t + 1 for n, t in Golden("moshi").weights.items()}, other)
    edit(tmp_path / "plain/config.json", moshi_name="model.safetensors")
    assert not torch.equal(load(other).text_head.weight, expected["text_head.weight"])      # the file that was given, not the one named


def test_the_adapter_that_a_config_names_is_applied(tmp_path):
    run = adapter_run(kyutai(tmp_path / "base"), tmp_path / "run", targets=("temporal.*",))
    adapter = export(run, tmp_path / "adapter", to="moshi-lora")
    about = json.loads((adapter / "config.json").read_text())
    folder = kyutai(tmp_path / "both", lora=True, lora_name="fine.safetensors", lora_rank=about["lora_rank"],
                    lora_scaling=about["lora_scaling"])
    shutil.copy(adapter / "lora.safetensors", folder / "fine.safetensors")
    ours, theirs = load(run), load(folder)
    assert lora.norms(theirs).keys() == lora.norms(ours).keys() and min(lora.norms(theirs).values()) > 0
    grid = torch.stack([random_ids(s.vocab, (9,), k) for k, s in enumerate(ours.table.streams)])[None]
    for one, other in zip(ours(grid), theirs(grid), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    trained = load(folder, config=theirs.config)                         # a run puts its own adapters on top
    assert getattr(trained, "lora", None) is None or not list(lora.adapters(trained))
    with pytest.raises(ValueError, match="names an adapter, lora_name fine.safetensors, and says lora = False"):
        load(kyutai(tmp_path / "wrong", lora=False, lora_name="fine.safetensors"))


@pytest.mark.parametrize(("about", "words"), [
    ({"depformer_frobnicate": 3}, "depformer_frobnicate = 3, which this code does not know"),
    ({"delays": [0, 0, -1, 1, 0, 1]}, "delay of -1"),
    ({"mimi_config_name": "mimi.json"}, "mimi_config_name = 'mimi.json'")])
def test_a_config_that_says_more_than_we_know_is_refused(about, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load(kyutai(tmp_path, **about))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_8_bits_without_their_scales_are_refused(dtype, tmp_path):
    case = Golden("moshi")
    name = next(n for n in case.weights if "linear_in" in n)
    case.weights[name] = case.weights[name].to(dtype)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is {dtype} and means nothing without its scales"):
        load(case.write(tmp_path))


def test_names_of_flat_linears_are_read(tmp_path):
    case = Golden("moshi")
    case.weights = {re.sub(r"\.linear_(in|out)\.weight$", r".linear_\1_weight", n): t for n, t in case.weights.items()}
    assert any(n.endswith("linear_in_weight") for n in case.weights)
    assert all(torch.equal(t, load(kyutai(tmp_path / "a")).weights()[n]) for n, t in load(case.write(tmp_path / "b")).weights().items())


def test_a_folder_without_its_config_says_what_is_missing(tmp_path):
    folder = kyutai(tmp_path / "jmoshi")
    (folder / "config.json").rename(folder / "moshi_lm_kwargs.json")         # what J-Moshi calls it
    assert all(torch.equal(t, load(kyutai(tmp_path / "a")).weights()[n]) for n, t in load(folder).weights().items())
    (folder / "moshi_lm_kwargs.json").unlink()
    with pytest.raises(FileNotFoundError, match="weights without a config.json; fetch that of their repository"):
        load(folder)


def test_as_many_codebooks_of_a_mimi_as_the_model_has_rows(tmp_path):
    for name, count in (("moshi", 3), ("stt", None), ("hibiki", None)):
        table = load(kyutai(tmp_path / name, name)).table
        heard = len(table.audio) - len(table.audio_out)
        assert codebooks_of(table) == max(heard, len(table.audio_out)) == (count or codebooks_of(table))
    assert codebooks_of(MOSHI_7B.table) == codebooks_of(predict_user(MOSHI_7B).table) == 8
    assert (codebooks_of(HIBIKI_2B.table), codebooks_of(STT_1B.table), codebooks_of(TTS_1_6B.table)) == (16, 32, 32)


# ---- adapters ----

def moshi_adapter(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = kyutai(tmp_path / "base")
    run = adapter_run(base, tmp_path / "run", targets=("temporal.*", "depth.*"))
    return base, run, export(run, tmp_path / "adapter", to="moshi-lora")


def edit(path: Path, **values: object) -> None:
    about = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v != "gone"}
    path.write_text(json.dumps(about))


def test_a_moshi_adapter_is_scaled_by_its_factor_alone(tmp_path):
    base, run, adapter = moshi_adapter(tmp_path)
    expected = lora.norms(load(run))
    assert set(load(base, adapter=adapter).lora.alphas) <= set() and load(base, adapter=adapter).lora.rank == 2
    edit(adapter / "config.json", lora_rank="gone")
    for place in (adapter, adapter / "lora.safetensors"):                    # a folder or the file itself
        found = lora.norms(load(base, adapter=place))
        assert found.keys() == expected.keys() and all(found[n] == pytest.approx(expected[n], rel=1e-5) for n in expected)
    edit(adapter / "config.json", lora_rank=7)
    with pytest.raises(ValueError, match="lora_rank is 7 in its config.json and 2 in its tensors"):
        load(base, adapter=adapter)
    edit(adapter / "config.json", lora_rank=2, delays=[0, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"made for another model than this one \(audio row \d, delay: 0 -> 1"):
        load(base, adapter=adapter)


@pytest.mark.parametrize("name", ["moshi", "hibiki", "tts"])
@torch.no_grad()
def test_embeddings_trained_beside_a_moshi_adapter_go_and_come(name, tmp_path):
    """ft_embed of moshi-finetune, of narrow tables too: their maps are Linears, which moshi names otherwise once they are adapted."""
    base = kyutai(tmp_path / "base", name)
    model = load(base)
    torch.manual_seed(0)
    lora.inject(model, LoraConfig(rank=3, alpha=6.0, targets=("temporal.*", "depth.*"), train=("embed.*", "depth.text", "depth.audio")))
    for path, p in model.named_parameters():
        if "lora_B" in path or path in lora.trained_parameters(model, model.lora):
            p.add_(0.1 * torch.randn(p.shape))
    adapter = export(model, tmp_path / "adapter", to="moshi-lora")
    again = dict(load(base, adapter=adapter).named_parameters())
    assert all(torch.equal(p, again[path]) for path, p in model.named_parameters() if "lora_" not in path)
    names = load_file(adapter / "lora.safetensors").keys()
    assert any(n.endswith("low_rank.frozen_W.weight") for n in names) is (name == "tts")
    try:
        from moshi.models.loaders import get_moshi_lm
    except ImportError:
        return
    kwargs = {k: v for k, v in json.loads((adapter / "config.json").read_text()).items() if k != "model_type"}
    theirs = get_moshi_lm(base / "model.safetensors", lm_kwargs=kwargs, device="cpu", dtype=torch.float32,
                          lora_weights=adapter / "lora.safetensors", fuse_lora=True)
    rows = theirs.emb[0].weight
    assert torch.equal(rows, model.embed["audio"].weight[: len(rows)])


@torch.no_grad()
def test_a_narrow_table_trained_beside_its_pair_is_one_weight(tmp_path):
    """ft_embed of moshi-finetune where LoRA has wrapped the map of the table, too."""
    base = kyutai(tmp_path / "base", "tts")
    model = load(base)
    lora.inject(model, LoraConfig(rank=3, alpha=6.0, targets=("temporal.*",), train=("embed.*", "depth.text", "depth.audio")))
    for _, _, pair in lora.adapters(model):
        pair.lora_B.normal_()
    adapter = export(model, tmp_path / "adapter", to="moshi-lora")
    tensors = load_file(adapter / "lora.safetensors")
    name = next(n for n in tensors if n.endswith("low_rank.frozen_W.weight"))
    stem = name.removesuffix("frozen_W.weight")
    a, b = torch.randn(3, tensors[name].shape[1]), torch.randn(tensors[name].shape[0], 3)
    save_file(tensors | {f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}, adapter / "lora.safetensors")
    about = json.loads((adapter / "config.json").read_text())
    plain = export(model, tmp_path / "other", to="moshi-lora")
    one, other = (dict(load(base, adapter=path).named_parameters()) for path in (adapter, plain))
    changed = [n for n in one if not torch.equal(one[n], other[n])]
    assert len(changed) == 1 and one.keys() == other.keys()
    difference = one[changed[0]] - other[changed[0]]
    wanted = about["lora_scaling"] * b @ a
    assert any(torch.allclose(part, wanted, atol=1e-5) for part in (difference if difference.dim() == 3 else [difference]))


def test_the_files_of_a_moshi_serve_under_an_adapter_of_its_trainer(tmp_path):
    base = official("moshi", tmp_path / "base")
    adapter = export(adapter_run(base, tmp_path / "run", targets=("temporal.*",)), tmp_path / "adapter", to="moshi-lora")
    for keep in (True, False):                                              # names of files that lie beside the base, or none
        edit(adapter / "config.json", **({} if keep else dict.fromkeys(("tokenizer_name", "mimi_name", "moshi_name"), "gone")))
        (adapter / "tokenizer_spm_32k_3.model").unlink(missing_ok=True)
        _, data = load_for_sampling(Job(ckpt=str(base), adapter=str(adapter), codec="tiny:2"))
        assert data.tokenizer == str(base / "tokenizer_spm_32k_3.model")


def test_an_adapter_alone_finds_its_base_or_says_how_to_name_it(tmp_path):
    base, _, adapter = moshi_adapter(tmp_path)
    rc, _, err = call("sample.py", f"--ckpt={adapter}", "--user=x.wav")
    assert rc == 2 and f"does not say which model it belongs to; name both: --ckpt=MODEL --adapter={adapter}" in err, err
    qwen = official("qwen2", tmp_path / "qwen")
    run = adapter_run(qwen, tmp_path / "qwen_run")
    peft = export(run, tmp_path / "peft", to="peft")
    expected, found = lora.norms(load(run)), lora.norms(load(peft))
    assert found == pytest.approx(expected)
    merged = export(peft, tmp_path / "merged")                              # checkpoint.py merge of an adapter folder
    assert not list(lora.adapters(load(merged)))
    tensors = load_file(peft / "adapter_model.safetensors")
    (peft / "adapter_model.safetensors").unlink()
    torch.save(tensors, peft / "adapter_model.bin")
    assert lora.norms(load(peft)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="are both adapters"):
        load(peft, adapter=peft)


def test_what_an_adapter_of_peft_says_wrongly_is_one_line(tmp_path):
    qwen = official("qwen2", tmp_path / "qwen")
    peft = export(adapter_run(qwen, tmp_path / "run"), tmp_path / "peft", to="peft")
    for change, words in (({"peft_type": "VERA"}, "peft/adapter_config.json has peft_type = 'VERA'.*merge it"),
                          ({"base_model_name_or_path": "./gone/base"}, "was made for ./gone/base, which is not here; name both")):
        kept = (peft / "adapter_config.json").read_text()
        edit(peft / "adapter_config.json", **change)
        with pytest.raises(ValueError, match=words):
            load(peft)
        (peft / "adapter_config.json").write_text(kept)
    tensors = load_file(peft / "adapter_model.safetensors")
    resized = torch.zeros(551, 24)
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": resized, "base_model.model.lm_head.weight": resized.clone()},
              peft / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"embed.text.weight is \(551, 24\), the model needs \(544, 24\)"):
        load(peft)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint .*; give .*/peft"):
        load(tmp_path / "peft" / "..")


@torch.no_grad()
def test_an_adapter_of_csm_keeps_head_table_and_codec_as_peft_has_them(tmp_path):
    """Its head lies turned there, two modules share its tables, and Mimi's Linears have the same names as the model's."""
    base = official("csm", tmp_path / "base")
    model = load(base)
    lora.inject(model, LoraConfig(rank=2, targets=("attn.q",), train=("depth.head", "embed.audio")))
    for p in lora.trained_parameters(model, model.lora).values():
        p.add_(torch.randn(p.shape))
    for _, _, pair in lora.adapters(model):
        pair.lora_B.normal_()
    peft = export(model, tmp_path / "peft", to="peft")
    again, tensors = dict(load(base, adapter=peft).named_parameters()), load_file(peft / "adapter_model.safetensors")
    assert all(torch.equal(p, again[n]) for n, p in model.named_parameters())
    head = "base_model.model.depth_decoder.codebooks_head.weight"
    assert torch.equal(tensors[head], model.get_parameter("depth.head.weight").mT)
    about = json.loads((peft / "adapter_config.json").read_text())
    assert "depth_decoder.model.embed_tokens" in about["modules_to_save"] and all("." in name for name in about["target_modules"])
    file = peft / "adapter_model.safetensors"
    pair = {f"base_model.model.codec_model.x.q_proj.lora_{x}.weight": torch.full((2, 2), float(x == "A")) for x in "AB"}
    save_file(tensors | pair, file)
    assert all(torch.equal(p, load(base, adapter=peft).get_parameter(n)) for n, p in list(model.named_parameters())[:3])
    for broken, words in ((tensors | {n: t + 1 for n, t in pair.items()}, "changes the codec"),
                          ({n: t for n, t in tensors.items() if "depth_decoder.model.embed_tokens" not in n}, "which are one here"),
                          ({n: t + ("depth_decoder.model.embed_tokens" in n) for n, t in tensors.items()}, "which are one here")):
        save_file(broken, file)
        with pytest.raises(ValueError, match=words):
            load(base, adapter=peft)


def test_two_statements_of_how_positions_turn_are_compared(tmp_path):
    """transformers takes rope_scaling where somebody added it to a config with rope_parameters."""
    base = official("qwen2", tmp_path / "base")
    expected = load(base).config
    edit(base / "config.json", rope_scaling={"type": "default"})
    assert load(base).config == expected
    edit(base / "config.json", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    with pytest.raises(ValueError, match="rope_parameters .* and another rope_scaling .*keep one"):
        load(base)


def test_weights_in_pytorchs_own_file_are_read_and_nothing_in_it_is_run(tmp_path):
    folder = official("qwen2", tmp_path / "base")
    expected = load(folder).weights()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert all(torch.equal(t, expected[n]) for n, t in load(folder).weights().items())
    half = len(tensors) // 2
    names = sorted(tensors)
    (folder / "pytorch_model.bin").unlink()
    for k, part in enumerate((names[:half], names[half:]), 1):
        torch.save({n: tensors[n] for n in part}, folder / f"pytorch_model-0000{k}-of-00002.bin")
    index = {n: f"pytorch_model-0000{1 + (n in names[half:])}-of-00002.bin" for n in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert all(torch.equal(t, expected[n]) for n, t in load(folder).weights().items())
    torch.save({"x": Path("/")}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load(folder)


@pytest.mark.parametrize(("name", "tied"), [("peft_embed", False), ("peft_head", False), ("peft_both", True)])
@torch.no_grad()
def test_an_adapter_on_a_tied_model_is_what_peft_computes(name, tied, tmp_path):
    """PEFT adapts embedding or head alone and leaves the other as it was; here, through every way that it goes on."""
    case = load_file(FOLDERS.parent / f"{name}.safetensors")
    grid = torch.nn.functional.pad(case["ids"], (0, 1), value=-1)[:, None]

    def error(model: torch.nn.Module) -> float:
        return float((model(grid)[0] - case["logits"]).abs().max())

    model = load(FOLDERS / name)                                            # finds its base by itself
    assert model.config.tied is tied and error(model) < 1e-5
    model.extras.base = str(FOLDERS / "qwen2")
    run = save(model, tmp_path / "run")
    assert error(load(run)) < 1e-5
    for to, folder in (("multistream", "merged"), ("hf", "hf")):
        again = load(export(run, tmp_path / folder, to=to))
        assert again.config.tied is tied and error(again) < 1e-5
    peft = export(run, tmp_path / "peft", to="peft")
    assert error(load(FOLDERS / "qwen2", adapter=peft)) < 1e-5
    if name == "peft_both":
        saved = load_file(peft / "adapter_model.safetensors")
        both = [saved[f"base_model.model.{part}.weight"] for part in ("model.embed_tokens", "lm_head")]
        about = json.loads((peft / "adapter_config.json").read_text())
        assert torch.equal(*both) and about["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError:
        return                                                              # the official loader again, where it is installed
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDERS / "qwen2"), peft).eval()
    assert float((theirs(input_ids=case["ids"]).logits - case["logits"]).abs().max()) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert float((merged(input_ids=case["ids"]).logits - case["logits"]).abs().max()) < 1e-5


def test_an_adapter_of_another_base_is_told_by_the_weight_that_it_brings(tmp_path):
    base = official("qwen2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({n: t + 0.1 * (n == "model.embed_tokens.weight") for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="brings a lm_head.weight that is not this model's; it was trained on another base"):
        load(base, adapter=FOLDERS / "peft_head")


# ---- what was trained is what is sampled ----

def sampled(run: Path, **options: object) -> DataConfig:
    """The data facts that sample.py reads off a checkpoint."""
    return load_for_sampling(Job(ckpt=str(run), **options))[1]


def trained_run(folder: Path, table: StreamTable, data: DataConfig) -> Path:
    """A checkpoint as train.py writes it: a small model with the facts that shape a prompt."""
    stack = StackConfig(dim=12, layers=1, heads=2, ffn=8)
    depth = StackConfig(dim=8, layers=1, heads=2, ffn=8, rope_theta=0.0, steps=len(table.audio_out)) if table.monologue else None
    tail = {"moss": {"tail": 1}}.get(table.layout, {})
    model = MultistreamLM(ModelConfig(table, replace(stack, layers=2 if tail else 1), depth=depth, **tail))
    return save(model, folder, Extras(data=prompt_facts(data, table)))


CHAT = {"qwen2": ("tiny_qwen_tokenizer.json", 544, 0), "qwen3": ("tiny_qwen_tokenizer.json", 544, 0),
        "moss": ("tiny_qwen_tokenizer.json", 544, 1), "chatml": ("tiny_tokenizer.json", 288, 8)}


@pytest.mark.parametrize("change", [
    {}, {"scene": "A quiet room."}, {"reference_in": "system"}, {"scene": "A hall.", "reference_in": "system"}, {"system": "Be brief."},
    {"normaliser": "english-v1"}, {"thought": "none"}], ids=lambda c: "-".join(c) or "plain")
@pytest.mark.parametrize("layout", sorted(CHAT))
def test_the_prompt_of_a_conversation_is_the_training_grid(layout, change, tmp_path):
    file, words, Q = CHAT[layout]
    path = str(ROOT / "assets" / file)
    tokenizer, rows = load_tokenizer(path), codebooks(Q, 258, 258, 256 if layout == "chatml" else -1, 257, range(Q))
    table = with_tokenizer_ids(StreamTable((Stream("text", "text", words, words), *rows), layout), tokenizer)
    data = DataConfig(tokenizer=path, codec="tiny" if Q == 8 else "tiny:1", **change)
    run = trained_run(tmp_path, table, data)
    now, chat = sampled(run), new_chat(data, tokenizer, table)
    said, codes = "Dr. Smith owes 5 dollars", random_ids(256, (max(Q, 1), 4), 5)
    if layout == "chatml":
        codec, voice = load_codec("tiny"), min((ROOT / "assets/speech/allison").glob("*.opus"))
        segments = chat.spoken(said, codes, [("one two", encode(codec, load_wav(voice, codec.sample_rate)[0]))])
        prompt = prompt_example(said, now, tokenizer, codec, [(str(voice), "one two")], table)
    else:
        reply = [{"type": "audio"}] if Q else "Yes."
        segments = chat.segments([{"role": "user", "content": said}, {"role": "assistant", "content": reply}], [codes] * bool(Q))
        prompt = prompt_example(said, now, tokenizer, None, (), table)
    trained, asked = lay_out(Example(torch.zeros(0), segments=segments), table)[0], lay_out(prompt, table)[0]
    assert torch.equal(trained[:, : asked.shape[1]], asked) and asked.shape[1] < trained.shape[1]


def test_the_user_may_say_otherwise(tmp_path):
    path = str(ROOT / "assets/tiny_tokenizer.json")
    rows = (Stream("text", "text", 288, 288), *codebooks(8, 258, 258, 256, 257, range(8)))
    table = with_tokenizer_ids(StreamTable(rows, "chatml"), load_tokenizer(path))
    run = trained_run(tmp_path, table, DataConfig(tokenizer=path, scene="A hall.", reference_in="system", system="Be brief."))
    kept, other = sampled(run), sampled(run, scene="", ref_in="assistant", system="Be loud.")
    assert (kept.scene, kept.reference_in, kept.system) == ("A hall.", "system", "Be brief.")
    assert (other.scene, other.reference_in, other.system) == ("", "assistant", "Be loud.")


@pytest.mark.parametrize("change", [{}, {"contextual": True}, {"spaces": False, "contextual": True}, {"interleaver": "reference"}],
                         ids=lambda c: "-".join(c) or "plain")
def test_the_prompt_of_a_dialogue_is_the_training_grid(change, tmp_path):
    manifest = Path(demo_dialogues(tmp_path / "talks", 1))
    rows = codebooks(8, 257, 256, 256), codebooks(8, 257, 0, 256, name="user")
    table = StreamTable((Stream("text", "text", 300, 299, start=299), *rows[0], *rows[1]), "duplex", aligned=True)
    data = DataConfig(sources=(str(manifest),), cache=str(tmp_path / "cache"), tokenizer="bytes", split="manifest", max_seconds=60.0,
                      chunk_seconds=60.0, held_out=0.0, **change)
    index = prepare(data, table)
    number = next(n for n, e in enumerate(index.entries) if e.split == "train")
    trained = build_example(index, number, table)
    run = trained_run(tmp_path / "run", table, data)
    frames = dialogue_prompt(next(manifest.parent.glob("*.wav")), load_codec("tiny"), load_tokenizer("bytes"), table, sampled(run))
    assert torch.equal(frames[0], trained.text) and torch.equal(frames[1:9], trained.codes) and torch.equal(frames[9:], trained.user)


# ---- Qwen3's two kinds of chat templates ----

@pytest.mark.parametrize(("template", "thought"), [("{% if enable_thinking %}", True), ("{{ messages }}", False), (None, True)])
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_thought_is_opened_where_the_folders_template_does(template, thought, place, tmp_path):
    folder = official("qwen3", tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / place).write_text(template if place.endswith("jinja") else json.dumps({"chat_template": template}))
    tokenizer, table = load_tokenizer(folder), load(folder).table
    data = DataConfig(tokenizer=str(folder))
    asked = tokenizer.decode(lay_out(prompt_example("Hi", data, tokenizer, table=table), table)[0][0].tolist())
    assert asked.endswith("<think>\n\n</think>\n\n") is thought and "assistant\n" in asked
    assert sampled(trained_run(tmp_path / "run", table, data)).thought == ("" if thought else "none")


# ---- what stands around the weights ----

AROUND = {"qwen2": ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
          "higgs": ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"),
          "boson": ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
          "moss": ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"),
          "orpheus": ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")}
KYUTAI = ("moshi", "hibiki", "stt")
TO = {"boson": "boson", "dsaa": "dsaa"} | dict.fromkeys(KYUTAI, "moshi")        # the others' layout is that of transformers


def ways(name: str, tmp_path: Path) -> dict[str, Path]:
    """An official folder exported by every way that leads there."""
    base = official(name, tmp_path / "base")
    data = {"tokenizer": str(base / "tokenizer.json"), "codec": "tiny"}
    run = adapter_run(base, tmp_path / "run")
    imported = export(base, tmp_path / "imported")
    whole = save(load(base), tmp_path / "whole", Extras(data=data, folder=str(base)))              # a full fine-tune
    started = adapter_run(imported, tmp_path / "started")
    found = {"itself": base, "run": run, "imported": imported, "whole": whole, "started": started,
             "merged": export(run, tmp_path / "merged")}
    return {way: export(path, tmp_path / f"out_{way}", to=TO.get(name, "hf")) for way, path in found.items()}


@pytest.mark.parametrize("name", sorted(AROUND))
def test_an_export_carries_what_stood_around_its_base(name, tmp_path):
    out = ways(name, tmp_path)
    base = tmp_path / "base"
    about = json.loads((base / "config.json").read_text())
    for way, folder in out.items():
        for file in AROUND[name]:
            assert (folder / file).read_bytes() == (base / file).read_bytes(), (way, file)
        wrote = json.loads((folder / "config.json").read_text())
        for found, base_says in ((wrote, about), (wrote.get("text_config", {}), about.get("text_config", {}))):
            for key in ("max_position_embeddings", "bos_token_id", "pad_token_id", "audio_in_token_idx", "audio_out_token_idx"):
                assert found.get(key) == base_says.get(key), (way, key)
        assert set(load(folder).table.stop) == set(load(base).table.stop), way
    peft = export(tmp_path / "run", tmp_path / "peft", to="peft")
    assert (peft / "tokenizer_config.json").is_file() and not (peft / "config.json").is_file()


def same_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """The same names, types, shapes and values."""
    again = load_file(file)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(t, again[name]) and t.dtype == again[name].dtype for name, t in tensors.items())


CODEC_NAMES = "codec_model."


def codec_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(folder / "model.safetensors").items() if name.startswith(CODEC_NAMES)}


@torch.no_grad()
def test_a_csm_export_carries_its_mimi_and_speaks_as_the_official_class_does(tmp_path, capsys):
    """Its codec lies in the file of the weights; of a full fine-tune, which keeps small files only, it says what is missing."""
    out = ways("csm", tmp_path)
    expected = codec_of(tmp_path / "base")
    for way in ("itself", "run"):
        found = codec_of(out[way])
        assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items()), way
    capsys.readouterr()
    assert not codec_of(export(tmp_path / "whole", tmp_path / "again", "hf", print)) and "without the codec" in capsys.readouterr().out
    transformers = pytest.importorskip("transformers")
    text = torch.tensor([[256, 91, 48, 93, 72, 105, 257]])                  # <|begin_of_text|>[0]Hi<|end_of_text|>
    for folder in (tmp_path / "base", out["itself"], out["run"]):
        theirs, info = transformers.CsmForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        codes = theirs.eval().generate(input_ids=text, max_new_tokens=6, do_sample=False, depth_decoder_do_sample=False)[0]
        prompt = torch.cat([text, torch.full((4, text.shape[1]), -1)])[None]
        ours = torch.stack([f[0, 1:] for f in generate(load(folder), prompt, SampleConfig(temperature=0, max_frames=6))])
        assert torch.equal(ours, codes), folder


def test_the_weights_that_a_config_of_transformers_names_are_read(tmp_path):
    """CSM's folder holds the same model in two layouts; what `transformers_weights` names is transformers' own."""
    base = official("csm", tmp_path / "base")
    expected = load(base).weights()
    (base / "model.safetensors").rename(base / "transformers-00001-of-00001.safetensors")
    save_file({"backbone.layers.0.attn.q_proj.weight": torch.ones(2, 2)}, base / "model.safetensors")
    names = load_file(base / "transformers-00001-of-00001.safetensors")
    (base / "transformers.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "transformers-00001-of-00001.safetensors")}))
    for name in ("transformers-00001-of-00001.safetensors", "transformers.safetensors.index.json"):
        edit(base / "config.json", transformers_weights=name)
        assert all(torch.equal(t, expected[n]) for n, t in load(base).weights().items())
    out = export(adapter_run(base, tmp_path / "run"), tmp_path / "out", to="hf")
    assert "transformers_weights" not in json.loads((out / "config.json").read_text()) and codec_of(out)
    for name, words in (("gone.safetensors", "is gone.safetensors, which is not there"), ("../base/x.safetensors", "outside its folder")):
        edit(base / "config.json", transformers_weights=name)
        with pytest.raises(ValueError, match=words):
            load(base)


def test_stop_ids_that_a_run_learnt_reach_generation_config(tmp_path):
    base = official("qwen2", tmp_path / "base", eos_token_id=512)
    edit(base / "config.json", eos_token_id=512)
    config = load(base).config
    run = adapter_run(base, tmp_path / "run", replace(config, table=replace(config.table, stop=(514, 512))))
    assert json.loads((export(run, tmp_path / "out", to="hf") / "generation_config.json").read_text())["eos_token_id"] == [512, 514]


def test_another_tokenizer_does_not_travel_with_the_files_of_the_bases(tmp_path):
    base = official("qwen2", tmp_path / "base")
    other = tmp_path / "tokenizer.json"
    other.write_text((base / "tokenizer.json").read_text() + " ")
    run = save(load(base), tmp_path / "run", Extras(data={"tokenizer": str(other), "codec": "tiny"}, folder=str(base)))
    out = export(run, tmp_path / "out", to="hf")
    assert (out / "tokenizer.json").read_bytes() == other.read_bytes() and not (out / "tokenizer_config.json").is_file()
    assert (out / "generation_config.json").is_file()


def test_a_moshi_export_carries_codec_tokenizer_and_rules(tmp_path):
    told = {"mimi_name": "mimi.safetensors", "tokenizer_name": "spm.model", "lm_gen_config": {"temp": 0.5}, "model_id": {"sig": "abc"}}
    folder = kyutai(tmp_path / "base", **told)
    for name in ("mimi.safetensors", "spm.model"):
        (folder / name).write_bytes(name.encode())
    out = export(adapter_run(folder, tmp_path / "run", targets=("temporal.*",)), tmp_path / "out", to="moshi")
    about = json.loads((out / "config.json").read_text())
    assert all((out / about[f"{what}_name"]).is_file() for what in ("mimi", "tokenizer"))
    assert {key: about[key] for key in told} == told and about["lora"] is False


@pytest.mark.parametrize("name", ["higgs", "qwen2"])
@torch.no_grad()
def test_the_official_loader_reads_the_export_and_answers_as_before(name, tmp_path):
    """Live: tokenizer, model and its generation_config by the Auto classes; equal tokens, and those of ours."""
    transformers = pytest.importorskip("transformers")
    out = ways(name, tmp_path)
    kind = transformers.AutoModelForCausalLM if name == "qwen2" else getattr(transformers, "HiggsAudioV2ForConditionalGeneration", None)
    if kind is None:
        pytest.skip("this transformers has no Higgs Audio v2")
    options = {} if name == "qwen2" else {"use_text_head": True}
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "base", *out.values())]
    talk = [{"role": "user", "content": "Where is my order?"}]
    texts = [t.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for t in tokenizers]
    assert len(set(texts)) == 1 and len({tuple(t(texts[0])["input_ids"]) for t in tokenizers}) == 1
    model = kind.from_pretrained(out["itself"], **options).eval()
    expected = kind.from_pretrained(tmp_path / "base", **options).eval()
    assert model.generation_config.to_diff_dict() == expected.generation_config.to_diff_dict()
    if name != "qwen2":
        assert (model.generation_config.ras_win_len, model.config.max_position_embeddings) == (7, 2048)
        return
    case = json.loads((FOLDERS / name / "expected.json").read_text())
    ids = torch.tensor([case["ids"]])
    tokens = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=16, attention_mask=torch.ones_like(ids))
    assert tokens[0, ids.shape[1]:].tolist() == case["tokens"]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_our_greedy_words_are_those_of_the_official_script(name):
    case = json.loads((FOLDERS / name / "expected.json").read_text())
    model, prompt = load(FOLDERS / name), torch.tensor(case["ids"])[None, None]
    frames = list(generate(model, prompt, SampleConfig(temperature=0, max_frames=16)))
    assert torch.cat(frames, -1)[0].tolist() == case["tokens"]


@pytest.mark.parametrize("name", KYUTAI)
@torch.no_grad()
def test_a_reply_is_that_of_the_official_script(name):
    """LMGen as run_inference.py has it: the first frame twice, Hibiki told to sound very good and deaf to an early end."""
    case = json.loads((FOLDERS / name / "expected.json").read_text())
    model, _ = load_for_sampling(Job(ckpt=str(FOLDERS / name), codec="tiny:2"))
    rules = SampleConfig(**usual_rules(model.table, (), model.extras) | {"temperature": 0.0})
    frames = reply(model, torch.tensor([case["user"]]), rules)[0, [0, *model.table.audio_out]]
    count = min(len(case["frames"]), frames.shape[1])
    assert frames.mT.tolist()[:count] == case["frames"][:count] and count > 11


@torch.no_grad()
def test_a_boson_export_speaks_as_the_server_of_its_release_did(tmp_path):
    """Prompt and columns are those of HiggsAudioServeEngine; where the package is installed its class reads each export again."""
    case = json.loads((FOLDERS / "boson/expected.json").read_text())
    columns, Q = torch.tensor(case["columns"]), len(case["columns"])
    wanted = torch.stack([row[k + 1 : k + columns.shape[1] - Q] for k, row in enumerate(columns)])         # the delays undone
    out = ways("boson", tmp_path)
    tensors = load_file(tmp_path / "base/model.safetensors")
    for way in ("itself", "imported"):
        same_file(tensors, out[way] / "model.safetensors")
    model = load(tmp_path / "base")
    data = DataConfig(tokenizer=str(tmp_path / "base"), codec="tiny")
    prompt = lay_out(prompt_example("Where is my order?", data, load_tokenizer(data.tokenizer), table=model.table), model.table)[0]
    assert prompt[0].tolist() == case["ids"]

    def spoken(folder: Path) -> torch.Tensor:
        frames = generate(load(folder), prompt, SampleConfig(temperature=0, max_frames=columns.shape[1], closing="boson"))
        frames = torch.stack(list(frames), -1)[0, 1:]
        return frames[:, (frames >= 0).all(0)]

    assert torch.equal(spoken(tmp_path / "base"), wanted) and torch.equal(spoken(out["itself"]), wanted)
    out["run"] = export(load(tmp_path / "run"), tmp_path / "fp32", to="boson")        # a merged weight in bf16 is rounded
    adapted = spoken(out["run"])
    assert torch.equal(spoken(tmp_path / "run"), adapted) and not torch.equal(adapted, wanted)
    try:
        from boson_multimodal.model.higgs_audio import HiggsAudioModel
        from transformers import AutoTokenizer
    except ImportError:
        return
    for folder, ours in ((tmp_path / "base", wanted), (out["itself"], wanted), (out["run"], adapted), (out["started"], None)):
        theirs, info = HiggsAudioModel.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
        assert not any(info.values()), info
        theirs.eval().set_audio_special_tokens(AutoTokenizer.from_pretrained(folder))
        theirs.generation_config.generation_kwargs = {}
        ids = torch.tensor([case["ids"]])
        none = dict.fromkeys(("audio_out_ids", "audio_out_ids_start", "audio_in_ids", "audio_in_ids_start"))
        found = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, do_sample=False,
                                max_new_tokens=columns.shape[1], **none)[1][0]
        undelayed = torch.stack([row[k + 1 : k + 1 + found.shape[1] - Q] for k, row in enumerate(found)])
        assert ours is None or torch.equal(undelayed[:, : ours.shape[1]], ours), folder


# ---- a run of DSAA's own trainer ----

def dsaa_run(folder: Path) -> tuple[Path, dict]:
    """What its checkpointer left, with the one key that a person adds: which text model; and what its LMGen made of it."""
    official("dsaa", folder)
    edit(folder / "config.json", text_llm={"hf_repo_id": str(FOLDERS / "qwen2")})
    return folder, json.loads((folder / "expected.json").read_text())


def dsaa_config() -> dict:
    return json.loads((FOLDERS / "dsaa/config.json").read_text())


@torch.no_grad()
def test_a_run_of_dsaa_has_the_ids_that_it_was_trained_with(tmp_path):
    """Its config.json names the padding of the Moshi that it began with, and Moshi's tokenizer."""
    folder, case = dsaa_run(tmp_path / "base")
    for name in ("tokenizer_spm_32k_3.model", "tokenizer-e351c8d8-checkpoint125.safetensors"):
        (folder / name).write_bytes(b"")                                    # a hub repository has both
    assert dsaa_config()["existing_text_padding_id"] == 3 and "existing_bos_id" not in dsaa_config()
    model = load(folder / "consolidated.safetensors")
    assert [model.table.streams[0].start, model.table.pad, model.table.epad] == [case["ids"][f"existing_{n}_id"] for n in (
        "bos", "text_padding", "text_end_padding")]
    assert official_files(folder) == {"codec": str(folder / "tokenizer-e351c8d8-checkpoint125.safetensors")}
    frames = reply(model, torch.tensor([case["user"]]), SampleConfig(temperature=0), skip_first_frame=True)
    assert frames[0, [0, *model.table.audio_out]].mT.tolist() == case["frames"]


@torch.no_grad()
def test_a_dsaa_export_is_what_its_own_loader_reads(tmp_path, monkeypatch):
    """LoRA on Moshi's half, merged, exported; with a checkout of slavivo/dsaa on the path its loader and LMGen go over it again."""
    folder, case = dsaa_run(tmp_path / "base")
    user, config = torch.tensor([case["user"]]), SampleConfig(temperature=0)
    run = adapter_run(folder, tmp_path / "run", targets=("temporal.*", "depth.layers.*"))
    out = {"base": export(folder, tmp_path / "itself", to="dsaa"), "run": export(load(run), tmp_path / "out", to="dsaa")}
    ours = {name: reply(load(path), user, config, skip_first_frame=True) for name, path in (("base", folder), ("run", run))}
    same_file(load_file(folder / "consolidated.safetensors"), out["base"] / "dsaa.safetensors")
    for name, path in out.items():
        about = json.loads((path / "config.json").read_text())
        assert {k: about[k] for k in case["ids"]} == case["ids"] and about["lora"] is False
        assert torch.equal(reply(load(path), user, config, skip_first_frame=True), ours[name])
    assert not torch.equal(*ours.values())
    try:
        import modules
        import moshi.models.lm as lm
        from moshi.models.loaders import get_moshi_lm
        from transformers import AutoModelForCausalLM
        assert lm.TextLMModel
    except (ImportError, AttributeError):                                   # the moshi of the index has no such model
        return
    DT, DA, DD, H = 24, 24, 10, 7                                           # it fixes those of Moshi 7B
    monkeypatch.setattr(lm, "TextPreservingProjector", lambda *_: modules.TextPreservingProjector(DT, DA, H, DT))
    monkeypatch.setattr(lm, "ResidualProjector", lambda *_: modules.ResidualProjector(DT + DA + DD, H, DD))
    for name, path in out.items():
        llm = AutoModelForCausalLM.from_pretrained(FOLDERS / "qwen2", rope_theta=1e6, output_hidden_states=True, torch_dtype=torch.float32)
        about = json.loads((path / "config.json").read_text())
        kwargs = {k: v for k, v in about.items() if not k.endswith("_name") and k not in ("model_type", "text_llm")}      # text_llm is ours
        theirs = get_moshi_lm(path / about["moshi_name"], kwargs, "cpu", torch.float32, llm)
        generator = lm.LMGen(theirs, use_sampling=False, temp=0.0, temp_text=0.0)
        with generator.streaming(1):
            steps = [found[0, :, 0] for t in range(user.shape[2]) if (found := generator.step(user[:, :, t : t + 1])) is not None]
        assert torch.equal(torch.stack(steps, -1), ours[name][0, [0, *load(path).table.audio_out]]), name


# ---- tokenizers ----

def test_a_tokenizer_that_stores_truncation_and_padding_reads_whole_texts(tmp_path):
    """What Trainer and pipelines leave in tokenizer.json."""
    from tokenizers import Tokenizer as Fast
    text = "Where is my order? I have been waiting for it since Monday."
    plain = load_tokenizer(FOLDERS / "qwen2/tokenizer.json").encode(text)
    fast = Fast.from_file(str(FOLDERS / "qwen2/tokenizer.json"))
    fast.enable_truncation(5)
    fast.enable_padding(length=64)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text) == plain and len(plain) > 5


def test_padding_of_the_text_row_is_no_piece_of_text(tmp_path):
    rows = (*codebooks(2, 17, 16, 16), *codebooks(2, 17, 0, 16, name="user"))
    table = StreamTable((Stream("text", "text", 61, 60, start=60), *rows), "duplex", aligned=True)
    good = load_tokenizer(pieces(tmp_path, "good.model", 40, pad_id=3))
    assert check_fit(table, good, None) is False
    lettered = load_tokenizer(pieces(tmp_path, "lettered.model", 40))               # ids 0, 1, 2 are marks, 3 is text
    with pytest.raises(ValueError, match="id 3 is padding in the text row and '.+' in tokenizer lettered.model: words would lose letters"):
        check_fit(table, lettered, None)
    with pytest.raises(ValueError, match="id 7 is padding before a word in the text row"):
        check_fit(replace(table, epad=7), good, None)


def test_ids_that_a_tokenizer_does_not_have_are_unknown_not_a_trace(tmp_path):
    tokenizer = load_tokenizer(pieces(tmp_path, size=40, pad_id=3))
    known = tokenizer.encode("line 1 says")
    assert tokenizer.decode([*known, tokenizer.size, 59]).startswith(tokenizer.decode(known)) and tokenizer.size < 59
    text = torch.tensor([3, *known, 59, 3])
    assert "says" in timed_transcript(text, tokenizer, 12.5, 3, 0) and timed_words(text, tokenizer, 12.5, 3, 0)


# ---- official scripts ----

def test_rules_lie_beside_the_weights_and_go_with_a_run(tmp_path, capsys):
    qwen2 = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    for name, wanted in (("qwen2", qwen2), ("qwen3", {"temperature": 0.6, "top_p": 0.95}),
                         ("higgs", {"temperature": 1.0, "ras_window": 7, "ras_repeats": 2})):
        base = official(name, tmp_path / name)
        beside = base / "generation_config.json"
        beside.write_text(json.dumps(json.loads(beside.read_text()) | {"no_repeat_ngram_size": 3}))
        for folder in (base, adapter_run(base, tmp_path / f"{name}_run"), export(base, tmp_path / f"{name}_imported")):
            model = load(folder)
            assert usual_rules(model.table, (), model.extras).items() >= wanted.items(), (name, folder)
            assert "top_k" not in usual_rules(model.table, ("top_k",), model.extras)
    assert "asks for no_repeat_ngram_size 3, which is not done here" in capsys.readouterr().out
    told = {"temp": 0.5, "temp_text": 0.0, "top_k": 9, "top_k_text": 3, "cfg_coef": 2.0, "check": True}
    model = load(kyutai(tmp_path / "moshi", lm_gen_config=told))
    Q = len(model.table.audio_out)
    assert usual_rules(model.table, (), model.extras) == {"temperature": (0.0, *[0.5] * Q), "top_k": (3.0, *[9.0] * Q), "cfg": 2.0}
    assert "lm_gen_config check, which is not done here" in capsys.readouterr().out


def test_hibiki_is_told_to_sound_very_good_and_reads_padding_for_an_early_end(tmp_path):
    case = Golden("hibiki")
    lut = next(iter(case.config["conditioners"].values()))["lut"]
    lut["possible_values"] = ["very_bad", "bad", "neutral", "good", "very_good"][: lut["n_bins"]]
    folder = case.write(tmp_path / "m")
    model = load(folder)
    good = "very_good" in model.table.streams[model.table.conditions[0]].values
    assert good and usual_rules(model.table, (), model.extras)["condition"] == "description=very_good"
    before = model.embed["text"].weight.detach().clone()
    family_of(model.table).before_sampling(model)
    after = model.embed["text"].weight
    assert torch.equal(after[2], before[model.table.pad]) and torch.equal(after[3:], before[3:]) and not torch.equal(after[2], before[2])
    other = load(kyutai(tmp_path / "moshi"))
    before = other.embed["text"].weight.detach().clone()
    family_of(other.table).before_sampling(other)
    assert torch.equal(before, other.embed["text"].weight) and "condition" not in usual_rules(other.table, (), other.extras)


def test_a_higgs_config_without_rope_fields_is_the_class_itself(tmp_path):
    base = official("higgs", tmp_path / "base")
    expected = load(base).config
    edit(base / "config.json", rope_parameters="gone")
    assert load(base).config == expected and expected.temporal.rope_theta == 500000.0


def test_the_files_of_the_base_serve_under_an_adapter_of_another_library(tmp_path):
    """The tokenizer lies beside the base, not beside the adapter."""
    base = official("qwen2", tmp_path / "base")
    peft = export(adapter_run(base, tmp_path / "run"), tmp_path / "peft", to="peft")
    for file in peft.glob("tokenizer*"):
        file.unlink()
    model, data = load_for_sampling(Job(ckpt=str(base), adapter=str(peft)))
    assert data.tokenizer == str(base / "tokenizer.json")


@pytest.mark.parametrize("apart", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_base_of_two_number_types_is_merged_and_written(apart, tmp_path):
    """Some releases keep norms or the embedding in fp32 beside bf16."""
    base = official("qwen2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({name: t if name == apart else t.bfloat16() for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    run = adapter_run(base, tmp_path / "run")
    written = load_file(export(run, tmp_path / "out", to="hf") / "model.safetensors")
    assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in load_file(base / "model.safetensors").items()}
    grid = random_ids(544, (2, 1, 9), 1)
    assert float((load(run)(grid)[0] - load(tmp_path / "out")(grid)[0]).abs().max()) < 0.1


# ---- the whole way, by the commands of the README ----

RUN = '''"""A LoRA run on an official folder."""
from dataclasses import replace
from pathlib import Path

from checkpoint import load
from config import DataConfig, LoraConfig, TrainConfig

here = Path(__file__).parent
config = TrainConfig(
    model=load(here / "base").config, init=str(here / "base"), lora=LoraConfig(rank=2, alpha=4.0, targets=("attn.*",)),
    data=replace(DataConfig(sources=(str(here / "data.jsonl"),), cache=str(here / "cache"), codec="tiny", tokenizer=str(here / "base"),
                            split="manifest", columns=512, window=4, prefetch=0, allow_outside=True), **DATA),
    out=str(here / "run"), steps=2, lr=5e-2, schedule="constant", dtype="fp32", device="cpu", log_every=1)
'''
CLIP = ROOT / "assets/speech/allison/digits/4.opus"
SPOKEN = {"audio": str(CLIP), "text": "four", "speaker": "a"}
TALK = {"messages": [{"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "On its way."}]}
CALL = {"messages": [{"role": role, "content": [{"type": "audio", "audio_url": str(CLIP)}]} for role in ("user", "assistant")]}
WAYS: dict[str, tuple[dict | None, dict]] = {              # what a row is, None = stereo dialogues; options of its data
    "qwen2": (TALK, {}), "qwen3": (TALK, {}),
    **dict.fromkeys(("higgs", "boson"), (SPOKEN, {"codec": "tiny", "scene": "A quiet room."})),
    "csm": (SPOKEN, {"codec": "tiny:4"}), "orpheus": (SPOKEN, {"codec": "tiny"}), "moss": (CALL, {"codec": "tiny:1"}),
    **dict.fromkeys(KYUTAI, (None, {"codec": "tiny:2"})),
    "dsaa": (None, {"codec": "tiny:2", "tokenizer": str(FOLDERS / "qwen2")})}
SCRIPTS = dict.fromkeys(("qwen2", "qwen3"), official_scripts.qwen) | dict.fromkeys(KYUTAI, official_scripts.kyutai)
HEARD = random_ids(256, (1, 2, 12), 4)


def done(*args: object) -> str:
    rc, out, err = call(*args)
    assert rc == 0, out + err
    return out


def write_data(name: str, here: Path) -> dict:
    """What a run on the folder reads, beside it; the options of its DataConfig."""
    row, data = WAYS[name]
    if row is None:
        return data | {"sources": (demo_dialogues(here / "talks", 3),), "held_out": 0.0, "split": "hash", "chunk_seconds": 2.0}
    (here / "data.jsonl").write_text("".join(json.dumps(row | {"id": str(n), "split": "train"}) + "\n" for n in range(3)))
    return data


def greedy_tokens(folder: Path, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """What sample.py draws from a folder by its own rules, greedily: the prompt or what was heard, and what is said, rows of the grid."""
    model, data = load_for_sampling(Job(ckpt=str(folder), **options))
    config = SampleConfig(**usual_rules(model.table, (), model.extras) | {"temperature": 0.0, "max_frames": 20, "ras_window": 0})
    if family_of(model.table).user_audio == "duplex":
        frames = reply(model, HEARD, config, skip_first_frame=model.config.fusion is not None)
        return HEARD, frames[0, [0, *model.table.audio_out]]
    tokenizer = load_tokenizer(data.tokenizer)
    if model.table.layout == "moss":
        codes = random_ids(256, (1, 5), 4)
        asked = [{"role": "user", "content": [{"type": "audio", "audio_url": "x.wav"}]}]
        example = reply_example(asked, [codes], data, tokenizer, model.table, "")
    else:
        example = prompt_example("Where is my order?", data, tokenizer, table=model.table)
    prompt = lay_out(example, model.table)[0]
    return prompt, torch.stack(list(generate(model, prompt, config)), -1)[0]


@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_the_whole_way_on_an_official_folder(name, tmp_path):
    """load -> LoRA -> resume -> sample -> merge -> export; where the official package is installed its loader says what ours says."""
    base = dsaa_run(tmp_path / "base")[0] if name == "dsaa" else official(name, tmp_path / "base")
    (tmp_path / "run.py").write_text(RUN.replace("DATA", repr(write_data(name, tmp_path))))
    with torch.enable_grad():
        done("train.py", tmp_path / "run.py")
        assert "resuming" in done("train.py", tmp_path / "run.py", "--steps=4")
    done("checkpoint.py", "merge", tmp_path / "run", f"--out={tmp_path}/merged")
    done("checkpoint.py", "export", tmp_path / "merged", f"--to={TO.get(name, 'hf')}", f"--out={tmp_path}/out")
    heard = WAYS[name][0] in (None, CALL)
    asked = f"--user={CLIP}" if heard else "--text=Where is my order?"
    given = {key: value for key, value in WAYS[name][1].items() if key in ("codec", "scene")}      # what an official folder does not say
    for folder, more in (("run", {}), ("merged", {}), ("out", given)):
        options = (f"--{key}={value}" for key, value in more.items())
        told = done("sample.py", f"--ckpt={tmp_path}/{folder}", asked, f"--out={tmp_path}/{folder}.wav", "--max_frames=12",
                    "--temperature=0", *options)
        assert ("adapter applied" in told) is (folder == "run")
    wavs = [path.read_bytes() for path in (tmp_path / "merged.wav", tmp_path / "out.wav") if path.is_file()]
    assert len(wavs) == (0 if name in ("qwen2", "qwen3", "stt") else 2) and len(set(wavs)) < 2
    (prompt, said), (_, again), (_, before) = (greedy_tokens(tmp_path / folder, **options) for folder, options in (
        ("merged", {}), ("out", given), ("base", given | {"tokenizer": WAYS[name][1].get("tokenizer", str(base))})))       # rounded once
    assert torch.equal(said, again) and not torch.equal(said, before) and sampled(tmp_path / "run").scene == given.get("scene", "")
    script, asks = SCRIPTS.get(name, getattr(official_scripts, name, None)), {tmp_path / "out": (prompt, said)}
    if name not in ("boson", "dsaa"):                      # whose releases know no adapters
        adapter = export(tmp_path / "run", tmp_path / "adapter", to="moshi-lora" if name in KYUTAI else "peft")
        asked, adapted = greedy_tokens(tmp_path / "run")
        assert torch.equal(adapted, greedy_tokens(base, adapter=str(adapter), **given | {"tokenizer": str(base)})[1])
        asks |= {} if name == "moss" else {adapter: (asked, adapted)}
    for folder, ask in asks.items() if script else ():
        options = {} if folder.name == "out" else {"adapter": folder}
        if (pair := script(tmp_path / "out" if folder.name == "out" else base, *ask, **options)) is not None:
            assert torch.equal(*pair) and pair[0].shape[1] > 3, folder
