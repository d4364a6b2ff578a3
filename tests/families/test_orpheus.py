"""Orpheus: what transformers computes, ours computes; codes in the text row; its prompt and ids are the official ones; the smoke twin
runs from training to the official files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, killed_and_resumed
from safetensors.torch import load_file
from test_parity import Golden, check
from test_sample import overfit

from audio import load_codec
from checkpoint import export, load
from corpus.examples import build_example, prompt_example, spoken_prompt
from corpus.index import check_fit, open_cache
from families.family import family_of, lay_out, recognise_format, with_tokenizer_ids
from families.orpheus import ORPHEUS_3B, SPECIAL, TEMPLATE, stream_table
from generation.decode_step import SampleConfig
from generation.reply_stream import reply_pieces
from generation.sessions import SessionBatch
from layers.architecture import ModelConfig
from model import MultistreamLM
from options import run_config
from sample import generate, speak_examples
from streams import Example, StreamTable
from text.conversation import Chat, token_ids
from text.tokenizers import load_tokenizer
from training.monitor import Meter

CASES = ["orpheus", "orpheus_wide"]
SMOKE = run_config(ROOT / "configs/orpheus.py", "smoke")
TOKENIZER = load_tokenizer(ROOT / "assets/tiny_marks_tokenizer.json")
CHAT = Chat(TOKENIZER, TEMPLATE)
GREEDY = SampleConfig(temperature=0, max_frames=90)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_frames_equal_transformers_to_the_end(name, tmp_path):
    case = Golden(name)
    model = load(case.write(tmp_path))
    with torch.inference_mode():
        text, audio = model(torch.nn.functional.pad(case["ids"], (0, 1), value=-1)[None])
    check(name, text, case["logits"])
    assert audio is None
    got = torch.stack([frame[0] for frame in generate(model, case["prompt"], GREEDY)], 1)                # (1 + Q, columns)
    Q = case["codes"].shape[1]
    assert torch.equal(got[:1], case["said"]) and got.shape == (1 + Q, 2 * Q + 1)
    first, _, V = model.table.flat
    assert torch.equal(got[1:, [Q - 1, 2 * Q - 1]].T, case["codes"] - first - V * torch.arange(Q))
    assert (got[1:, [k for k in range(2 * Q + 1) if k % Q != Q - 1 or k == 2 * Q]] == -1).all()


@pytest.mark.parametrize("name", CASES)
def test_repeated_ids_are_penalised_as_in_transformers(name, tmp_path):
    case = Golden(name)
    model, rules = load(case.write(tmp_path)), replace(GREEDY, max_frames=24, repetition_penalty=1.3)
    alone = [int(frame[0, 0]) for frame in generate(model, case["other"], rules)]
    assert alone == case["penalised"][0].tolist() != [int(frame[0, 0]) for frame in generate(model, case["other"], GREEDY)]
    both = [torch.cat([torch.full((1, 3), -1), case["other"]], 1), case["prompt"]]
    assert [int(frame[0, 0]) for frame in generate(model, torch.stack(both), rules)][: len(alone)] == alone
    batch = SessionBatch(model, 2, rules, columns=96)
    batch.begin(0, case["prompt"], rules, 3)
    said = [batch.begin(1, case["other"], rules, 0)]
    while len(said) < len(alone):
        said.append(batch.step({}).get(1))
    assert [int(frame[0]) for frame in said] == alone


@pytest.mark.parametrize("name", CASES)
def test_official_files_come_back_bit_for_bit(name, tmp_path):
    case = Golden(name)
    export(load(case.write(tmp_path / "a")), tmp_path / "b", "hf")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert case.weights.keys() == written.keys() and all(torch.equal(written[k], t) for k, t in case.weights.items())
    assert load(tmp_path / "b").config == load(tmp_path / "a").config


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_transformers_loads_what_we_export(name, tmp_path):
    transformers, case = pytest.importorskip("transformers"), Golden(name)
    folder = export(load(case.write(tmp_path / "a")), tmp_path / "b", "hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"]], info
    said = theirs.eval().generate(input_ids=case["prompt"], max_new_tokens=90, do_sample=False, pad_token_id=0)
    assert torch.equal(said[:, case["prompt"].shape[1] :], case["said"])


def test_the_published_model():
    """Llama-3.2-3B has 3,212,749,824 parameters, and this one 28684 more ids of 3072 numbers; its config.json is a plain Llama's."""
    with torch.device("meta"):
        assert MultistreamLM(ORPHEUS_3B).count_parameters() == 3_212_749_824 + (156_940 - 128_256) * 3072
    about = family_of(ORPHEUS_3B.table).formats[0].write(ORPHEUS_3B, "bfloat16")
    assert "speech_tokens" not in about and recognise_format(about).name == "Orpheus"
    assert recognise_format(about | {"vocab_size": 128_256}) is None
    assert family_of(ORPHEUS_3B.table).formats[0].read(about, {}) == ORPHEUS_3B
    assert ORPHEUS_3B.table.flat == (128_266, 7, 4096) and ORPHEUS_3B.table.stop == (128_258,)


def test_the_prompt_is_the_official_one_and_training_goes_on_from_it():
    """engine_class.py: 128259, the ids of the text with <|begin_of_text|>, 128009 128260 128261 128257; then codes, 128258, 128262."""
    table = SMOKE.model.table
    mark = [*token_ids(TOKENIZER, [f"<custom_token_{n}>" for n in range(11)], "Orpheus").values()]
    begin, said = TOKENIZER.encode("<|begin_of_text|><|eot_id|>")
    opening, close = [mark[3], begin], [said, mark[4], mark[5], mark[1]]
    wanted = opening + TOKENIZER.encode("tara: Hello.") + close
    prompt, _ = lay_out(Example(torch.zeros(0), segments=CHAT.prompt("Hello.", scene="tara")), table)
    assert prompt.tolist() == [wanted]
    codes = torch.randint(0, 256, (8, 3), generator=torch.Generator().manual_seed(0))
    tokens, weights = lay_out(Example(torch.zeros(0), segments=CHAT.spoken("Hello.", codes, scene="tara")), table)
    spelled = [mark[10] + 256 * k + int(codes[k, t]) for t in range(3) for k in range(8)]
    assert tokens.tolist() == [wanted + spelled + [mark[2], mark[6]]]
    assert weights.tolist() == [[0.0] * 2 + [1.0] * (len(wanted) - 2 + 24 + 1) + [0.0]]
    turns = CHAT.prompt("Hello.", [("One.", codes)])
    tokens, _ = lay_out(Example(torch.zeros(0), segments=turns), table)
    assert tokens.tolist() == [opening + TOKENIZER.encode("One.") + close + spelled + [mark[2], mark[6]] + opening
                               + TOKENIZER.encode("Hello.") + close]
    for text in ("<custom_token_12>", "a <|eot_id|>"):
        with pytest.raises(ValueError, match="holds"):
            CHAT.prompt(text)
    with pytest.raises(ValueError, match="--ref_in"):
        CHAT.prompt("Hello.", [("profile:a deep voice", codes[:, :0])])


def test_a_tokenizer_and_a_codec_of_another_model_are_refused():
    table = SMOKE.model.table
    assert CHAT.check_tokenizer(table) is CHAT and not check_fit(table, TOKENIZER, load_codec("tiny"))
    with pytest.raises(ValueError, match="custom_token_10"):
        CHAT.check_tokenizer(replace(table, flat=(table.flat[0] - 1, *table.flat[1:])))
    for flat in ((table.flat[0], 7, 256), (table.flat[0], 8, 255)):
        with pytest.raises(ValueError, match=r"the model \d audio rows of 25\d; choose the codec"):
            check_fit(replace(table, flat=flat), TOKENIZER, load_codec("tiny"))
    with pytest.raises(AssertionError, match="flat"):
        StreamTable(table.streams, "orpheus", flat=(table.flat[0] + 1, 8, 256))


TABLE = stream_table(30, 3, 5, 0)               # codes from 40 on


def forced(model: MultistreamLM, ids: list[list[int]], **rules: object) -> torch.Tensor:
    """The frames (B, 1 + Q, n) when these ids are given."""
    given = torch.tensor(ids)[:, None]
    prompt = torch.zeros(len(ids), 1, 1, dtype=torch.long)
    return torch.stack(list(generate(model, prompt, SampleConfig(temperature=0, max_frames=given.shape[2], **rules), given=given)), -1)


def tiny(seed: int = 0) -> MultistreamLM:
    torch.manual_seed(seed)
    return MultistreamLM(ModelConfig(TABLE, replace(SMOKE.model.temporal, dim=16, ffn=16, heads=2, kv_heads=1), tied=True)).eval()


def test_an_id_out_of_turn_drops_its_frame_and_no_other():
    whole, broken = [40, 46, 52], [41, 51]
    got = forced(tiny(), [[*whole, *broken, *whole, 0], [*whole, 44, *whole, 32, 0], [40, 45, 31, *whole, 54, 40, 45]])
    frames = [[row[1:, n].tolist() for n in range(row.shape[1]) if row[1, n] >= 0] for row in got]
    assert frames == [[[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 1, 2]], [[0, 1, 2]]]
    assert got[1, 0].tolist() == [*whole, 44, *whole, 32, -1] and (got[1, 1:, 7:] == -1).all()          # 32 ends it


def test_an_overfitted_clip_comes_back_and_is_spoken():
    codes = torch.randint(0, 16, (8, 4), generator=torch.Generator().manual_seed(1))
    table = with_tokenizer_ids(stream_table(TOKENIZER.size - SPECIAL - 1, 8, 16, 0), TOKENIZER)          # small, so that it learns fast
    model = overfit(replace(SMOKE.model, tied=False, table=table), Example(torch.zeros(0), segments=CHAT.spoken("four", codes)), steps=70)
    prompt = Example(torch.zeros(0), segments=CHAT.prompt("four"))
    rules, codec, live = SampleConfig(temperature=0, max_frames=60), load_codec("tiny"), []
    speech, cut = (speak_examples(model, [prompt, prompt], replace(rules, max_frames=n), codec, live.append)[0] for n in (60, 20))
    assert torch.equal(speech.codes, codes) and speech.ended and torch.equal(cut.codes, codes[:, :2]) and not cut.ended
    assert torch.allclose(torch.cat(live, -1)[:, : speech.wav.shape[1]], speech.wav, atol=1e-4)
    pieces = list(reply_pieces(generate(model, lay_out(prompt, model.table)[0], rules), model.table, TOKENIZER))
    assert torch.equal(torch.cat([piece for kind, piece in pieces if kind == "codes"], 1), codes)
    assert not [piece for kind, piece in pieces if kind != "codes"]
    batch = SessionBatch(model, 2, columns=96)                                                                # live, beside another
    batch.begin(1, lay_out(prompt, model.table)[0], SampleConfig(max_frames=60), 3)
    frames = [batch.begin(0, lay_out(prompt, model.table)[0], rules, 0)]
    while not batch.done(0):
        frames.append(batch.step({}).get(0))
    found = [frame[1:] for frame in frames if frame is not None and bool((frame[1:] >= 0).all())]
    assert torch.equal(torch.stack(found, 1), codes)


def test_training_counts_the_frames_of_a_text_row():
    tokens = torch.tensor([[[3, 40, 46, 52, 41, 47, 53, 32, 36]]])
    meter = Meter(TABLE, 12.5)
    meter.add(tokens)
    assert meter.counts.tolist() == [9, 9, 2]


@pytest.mark.slow
def test_smoke_trains_resumes_samples_exports_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "orpheus"
    options = (f"--data.cache={tmp_path}/cache", "--data.sources=assets/speech/chat.jsonl", "--eval_every=0",
               "--prompts=()", "--listen=0")
    killed_and_resumed("orpheus", out, *options)
    monkeypatch.chdir(ROOT)
    data = replace(SMOKE.data, tokenizer=str(ROOT / SMOKE.data.tokenizer))
    model = load(out)
    prompt = lay_out(prompt_example("thank you", data, TOKENIZER, load_codec("tiny"), table=model.table), model.table)[0]
    assert len(list(generate(model, prompt, SampleConfig(**family_of(model.table).rules(model.table) | {"max_frames": 3})))) <= 3
    index = open_cache(replace(SMOKE.data, sources=("assets/speech/chat.jsonl",), cache=f"{tmp_path}/cache"), model.table)
    drawn = [n for n, entry in enumerate(index.entries) if entry.key and entry.split]
    for n in drawn:                                     # conversations become recordings with their texts, as they are asked for
        tokens = lay_out(build_example(index, n, model.table), model.table)[0]
        asked = lay_out(spoken_prompt(index, n, index.entries[n].reference, data, model.table), model.table)[0]
        assert not index.entries[n].messages and torch.equal(tokens[:, : asked.shape[1]], asked)
    assert len(drawn) == 2
    code, text, err = call("sample.py", f"--ckpt={out}", "--text=thank you", "--max_frames=20", f"--out={tmp_path}/x.wav")
    assert code == 0 and (tmp_path / "x.wav").is_file(), err
    export(out, tmp_path / "official", "hf")
    again, merged = load(tmp_path / "official"), load(out)
    tokens = torch.randint(0, merged.table.streams[0].vocab, (1, 1, 30), generator=torch.Generator().manual_seed(0))
    assert again.table.flat == merged.table.flat and torch.allclose(again(tokens)[0], merged(tokens)[0], atol=1e-5)
