"""A new tokenizer: pieces that both know keep their rows in every table, the others start near the mean."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from sentencepiece import SentencePieceTrainer
from tables import CONFIGS, random_ids
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint import export, load, save
from corpus.swap_tokenizer import match_pieces, piece_keys, swap_tokenizer
from layers.architecture import ModelConfig
from model import MultistreamLM
from options import run_config
from streams import StreamTable
from text.tokenizers import load_tokenizer

ENGLISH = ["hello there how are you", "the other one is over there", "she sells sea shells", "how is the weather", "hello world"]
DUTCH = ["hallo daar hoe is het weer", "de ander is over de zee", "het is hier heel mooi", "zij ziet schelpen in de zee", "hallo wereld"]


def spm(path: Path, lines: list[str], size: int, pad: int = 3) -> Path:
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(lines * 3), model_writer=model, vocab_size=size, pad_id=pad, minloglevel=2,
                               model_type="bpe", byte_fallback=True, hard_vocab_limit=False)
    path.write_bytes(model.getvalue())
    return path


def bpe(path: Path, lines: list[str], size: int, special: tuple[str, ...]) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("tokenizers")
    return {"en": spm(here / "en.model", ENGLISH, 310), "nl": spm(here / "nl.model", DUTCH, 330),
            "nopad": spm(here / "nopad.model", DUTCH, 320, pad=-1), "bpe": bpe(here / "bpe.json", DUTCH, 300, ("<|end|>",)),
            "bpe_en": bpe(here / "bpe_en.json", ENGLISH, 290, ("<|end|>", "<|more|>")),
            "bare": bpe(here / "bare.json", ENGLISH, 280, ())}


def resized(config: ModelConfig, size: int, **table: object) -> MultistreamLM:
    """A tiny model whose text row has `size` ids for a tokenizer, and what its family keeps behind them."""
    behind = config.table.streams[0].vocab - config.table.streams[0].classes
    first = replace(config.table.streams[0], vocab=size + behind, classes=size, start=size if behind else -1)
    torch.manual_seed(0)
    return MultistreamLM(replace(config, table=replace(config.table, streams=(first, *config.table.streams[1:]), **table))).eval()


def swapped(model: MultistreamLM, old: Path, new: Path) -> tuple[MultistreamLM, list[int]]:
    """The model under other ids, and the new id of every old piece, -1 where it is gone."""
    before, after = load_tokenizer(old), load_tokenizer(new)
    state = {n: t for n, t in model.state_dict().items() if not (model.config.tied and n == "text_head.weight")}
    config, tensors, count = swap_tokenizer(model.config, state, before, after)
    other = MultistreamLM(config).eval()
    assert not other.load_state_dict(tensors, strict=False).unexpected_keys
    ids = [-1] * before.size
    for i, j in enumerate(match_pieces(piece_keys(before), piece_keys(after))):
        if j >= 0:
            ids[j] = i
    assert count >= sum(i >= 0 for i in ids) > 20 and -1 in ids
    return other, ids


def test_what_a_piece_stands_for_is_the_same_in_every_kind_of_file(files, tmp_path):
    found = {name: piece_keys(load_tokenizer(path)) for name, path in files.items()}
    special = [("special", name) for name in (b"<unk>", b"<s>", b"</s>", b"<pad>")]
    assert found["en"][:4] == special and found["en"][4:260] == [("byte", bytes([i])) for i in range(256)]
    assert ("text", b" the") in found["en"] and found["bpe"][-1] == ("special", b"<|end|>")
    assert all(("text", b" de") in found[name] for name in ("nl", "bpe")) and ("text", b"e") in found["en"]
    assert {("text", bytes([i])) for i in range(256)} <= set(found["bpe"])
    (tmp_path / "words.json").write_text(json.dumps(["the", "sea"]))
    assert piece_keys(load_tokenizer(tmp_path / "words.json")) == [("special", b"no word"), ("text", b" the"), ("text", b" sea")]
    assert piece_keys(load_tokenizer("bytes")) == [("text", bytes([i])) for i in range(256)]
    assert match_pieces([("byte", b"e"), ("text", b"e")], [("text", b"e"), ("byte", b"e"), ("text", b"f")]) == [1, 0, -1]
    assert match_pieces([("byte", b"e")], [("text", b"e"), ("special", b"e")]) == [0, -1]


@pytest.mark.parametrize("new", ["nl", "nopad", "bpe"])
@torch.no_grad()
def test_moshi_says_the_same_of_shared_pieces_and_follows_its_padding(new, files):
    """Grids written with the new ids: audio logits are bit for bit what they were, and so are the text logits of shared pieces,
    but for the rounding of a product with other rows beside them."""
    model = resized(CONFIGS["duplex"], load_tokenizer(files["en"]).size)
    other, ids = swapped(model, files["en"], files[new])
    table, size = other.table, load_tokenizer(files[new]).size
    own = (3, 0) if new == "nl" else (size, size + 1)
    assert (table.pad, table.epad) == own and table.streams[0].classes == size + 2 * (new != "nl") == table.streams[0].start
    ids[3], ids[0] = own
    both = torch.tensor([i for i, j in enumerate(ids) if j >= 0])
    to = torch.tensor(ids)[both]
    tokens = random_ids(16, (2, len(table), 9), 1)
    pick = random_ids(len(both), (2, 9), 2)
    tokens[:, 0, 1:], new_tokens = both[pick][:, 1:], tokens.clone()
    tokens[:, 0, 0] = model.table.streams[0].start
    new_tokens[:, 0] = torch.cat([torch.full((2, 1), table.streams[0].start), to[pick][:, 1:]], 1)
    before, after = model(tokens), other(new_tokens)
    assert torch.equal(after[1], before[1]) and (after[0][..., to] - before[0][..., both]).abs().max() <= 1e-5
    for name in ("embed.text.weight", "depth.text.weight", "text_head.weight"):
        rows, old = other.state_dict()[name], model.state_dict()[name][: len(ids)]
        fresh = torch.ones(len(rows), dtype=torch.bool)
        old_keys, new_keys = (piece_keys(load_tokenizer(files[language])) for language in ("en", new))
        fresh[[i for i, j in enumerate(match_pieces(old_keys, new_keys)) if j >= 0]] = False
        fresh[[*own, *range(table.streams[0].classes, len(rows))]] = False
        distance = (rows[fresh] - old.mean(0)).norm(dim=1) / (old - old.mean(0)).norm(dim=1).mean()
        assert fresh.sum() > 10 and 0.0005 < float(distance.median()) < 0.02 and float(distance.max()) < 0.1      # sqrt(1e-5) = 0.003
        assert len({tuple(row.tolist()) for row in rows[fresh]}) == int(fresh.sum())


@torch.no_grad()
def test_a_text_model_keeps_its_stop_by_name_and_its_tied_head(files):
    old = load_tokenizer(files["bpe"])
    model = resized(CONFIGS["text"], old.size, stop=(old.size - 1,))
    other, ids = swapped(model, files["bpe"], files["bpe_en"])
    assert other.table.stop == (load_tokenizer(files["bpe_en"]).size - 2,) and ids[-1] == other.table.stop[0]
    assert other.text_head.weight is other.embed["text"].weight
    with pytest.raises(ValueError, match="bare.json has no piece '<|end|>', which the model uses as a control token"):
        swap_tokenizer(model.config, dict(model.state_dict()), old, load_tokenizer(files["bare"]))
    with pytest.raises(ValueError, match="are not those of nl.model"):
        swap_tokenizer(model.config, dict(model.state_dict()), load_tokenizer(files["nl"]), old)


@torch.no_grad()
def test_ids_behind_the_tokenizer_stay_behind_it_and_word_rows_change_together(tmp_path, files):
    clone = CONFIGS["clone"]                                     # bytes would be 256; its own ids lie behind a small word list
    (tmp_path / "a.json").write_text(json.dumps(["one", "two", "three"]))
    (tmp_path / "b.json").write_text(json.dumps(["two", "four", "one", "five", "six"]))
    old, new = load_tokenizer(tmp_path / "a.json"), load_tokenizer(tmp_path / "b.json")
    for config in (clone, CONFIGS["words"]):
        model = MultistreamLM(config)
        changed, tensors, _ = swap_tokenizer(config, model.state_dict(), old, new)
        before, after = config.table, changed.table
        ids, rows = [0, 3, 1, -1], range(3 if config is CONFIGS["words"] else 1)
        assert after.audio_start == (before.audio_start + 2 if before.audio_start >= 0 else -1)
        assert after.stop == tuple(i + 2 for i in before.stop)
        texts = [t.split([x.streams[k].vocab for k in x.text]) for x, t in
                 ((before, model.embed["text"].weight), (after, tensors["embed.text.weight"]))]
        for k in range(len(before.text)):
            a, b = texts[0][k], texts[1][k]
            if k in rows:
                assert len(b) == len(a) + 2 and torch.equal(b[6:], a[4:])
                assert all(torch.equal(b[j], a[i]) for i, j in enumerate(ids) if j >= 0)
            else:
                assert torch.equal(a, b)                         # an age, an advance: no words
        MultistreamLM(changed).load_state_dict(tensors)
        assert isinstance(after, StreamTable) and changed.temporal == config.temporal


def test_the_command_writes_a_model_with_its_tokenizer(files, tmp_path):
    old = load_tokenizer(files["en"])
    model = resized(run_config(ROOT / "configs/moshi_full.py", "smoke").model, old.size)
    official = export(model, tmp_path / "moshi", to="moshi")
    (official / "old.model").write_bytes(old.content)
    rc, told, err = call("checkpoint.py", "swap-tokenizer", official, f"--tokenizer={files['nopad']}", f"--out={tmp_path}/out")
    assert (rc, err) == (0, "") and "pieces kept their rows" in told
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"checksums.json", "config.json", "model.safetensors", "nopad.model"}
    size = load_tokenizer(files["nopad"]).size
    other = load(tmp_path / "out")
    assert (other.table.pad, other.table.epad) == (size, size + 1)
    again = load(export(other, tmp_path / "again", to="moshi"))               # its config.json names the padding ids
    assert (again.table.pad, again.table.epad) == (size, size + 1)
    save(other, tmp_path / "plain")
    for folder, options, words in ((tmp_path / "plain", ("--tokenizer=x", "--out=y"), "tokenizer x does not exist"),
                                   (tmp_path / "plain", (f"--tokenizer={files['nl']}", "--out=y"), "name it with --from"),
                                   (official, ("--out=y",), "needs --tokenizer=FILE"),
                                   (official, ("--tokeniser=y",), "nearest is --tokenizer")):
        rc, _, err = call("checkpoint.py", "swap-tokenizer", folder, *options, cwd=tmp_path)
        assert rc == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "y").exists()
