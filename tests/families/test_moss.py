"""MOSS-Speech: generation through both modes, split models, replies in pieces, the recipe from calls to export."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, call
from test_parity import Golden
from test_qwen import CHATS, HEARD, IDS, TABLES, TOKENIZER, WORDS, grid, ids, speech, turn

import checkpoint
from audio import load_codec
from audio.wav import load_wav
from checkpoint import converted, load
from corpus.bundled import demo_calls
from families.qwen import SOSP
from generation.decode_step import SampleConfig
from generation.reply_stream import reply_pieces
from layers.architecture import ModelConfig, StackConfig
from loss import LossConfig, loss_scale
from model import MultistreamLM
from sample import generate, pad_left
from text.tokenizers import TextStream, load_tokenizer

Q3 = StackConfig(dim=20, layers=4, heads=3, kv_heads=1, head_dim=6, ffn=28, norm_eps=1e-6, rope_theta=1e6, qk_norm=True)
Q2 = replace(Q3, qk_norm=False, qkv_bias=True)


def drawn(model: MultistreamLM, seed: int = 0) -> MultistreamLM:
    """Every parameter drawn again, norms and biases too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.3 if p.dim() == 1 else 0.25))
    return model.eval()


def text_model(stack: StackConfig = Q3, tied: bool = False) -> MultistreamLM:
    return drawn(MultistreamLM(ModelConfig(TABLES["qwen3" if stack.qk_norm else "qwen2"], stack, tied=tied)))


# ---- against two Qwen3 that share their first layers ----

TALK = sorted({name.split("/")[0] for name in Golden("moss_talk").tensors})


def columns(rows: torch.Tensor, pad: int) -> torch.Tensor:
    """The official rows (2, S), each with a value in both, as our grid."""
    audio = rows[0] == pad
    return torch.stack([rows[0].masked_fill(audio, -1), rows[1].masked_fill(~audio, -1)])


def replies(model: MultistreamLM, prompts: list[torch.Tensor], **rules: object) -> torch.Tensor:
    config = SampleConfig(**{"temperature": 0, "max_frames": 40, **rules})
    return torch.stack(list(generate(model, pad_left(prompts), config)), -1)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    golden = Golden("moss_talk")
    return load(golden.write(tmp_path_factory.mktemp("moss"))), golden


@pytest.mark.parametrize("name", TALK)
def test_greedy_replies_equal_the_reference_through_both_modes(talker, name):
    """Text, speech, text again, the end: with caches ours, recomputed from the first row theirs."""
    model, golden = talker
    pad = golden.config["modality_pad_token_id"]
    made = columns(golden[f"{name}/made"], pad)
    wanted = made.clone()
    wanted[1][made[1] == golden.config["eosp_token_id"]] = -1            # the end of speech is no code
    ours = replies(model, [columns(golden[f"{name}/prompt"], pad)], min_frames=9 * name.endswith("early"))[0]
    assert torch.equal(ours, wanted) and (wanted[1] >= 0).sum() > 2 and (wanted[0] >= 0).any()


def test_speech_that_is_too_long_is_closed_and_the_reply_goes_on(talker):
    """Two frames, the end id, then what the model writes behind it; until then nothing differs."""
    model, golden = talker
    pad = golden.config["modality_pad_token_id"]
    name = max((n for n in TALK if not n.endswith("text")), key=lambda n: int((golden[f"{n}/made"][0] == pad).int().cumprod(0).sum()))
    prompt = columns(golden[f"{name}/prompt"], pad)
    whole, short = (replies(model, [prompt], max_speech=n)[0] for n in (0, 2))
    assert torch.equal(short[:, :2], whole[:, :2]) and short[:, 2].tolist() == [-1, -1] and short[0, 3] >= 0
    runs = "".join("s" if code >= 0 else "t" for code in short[1].tolist()).split("t")
    assert max(map(len, runs)) == 2 and torch.equal(replies(model, [prompt], max_speech=99)[0], whole)


def test_left_padded_replies_equal_single_ones(talker):
    """One batch in which some speak while others write, and end at different times."""
    model, golden = talker
    prompts = [columns(golden[f"{name}/prompt"], golden.config["modality_pad_token_id"]) for name in TALK]
    together = replies(model, prompts)
    assert len({p.shape[1] for p in prompts}) > 3
    for n, prompt in enumerate(prompts):
        alone = replies(model, [prompt])[0]
        assert torch.equal(together[n][:, : alone.shape[1]], alone) and together[n][:, alone.shape[1] :].eq(-1).all()


@torch.no_grad()
def test_logits_of_a_left_padded_batch_and_of_single_columns_equal_the_whole(tmp_path):
    golden = Golden("moss")
    model, whole = load(golden.write(tmp_path)), columns(golden["rows"], golden.config["modality_pad_token_id"])
    grids = [whole, whole[:, 3:14], whole[:, 6:12], whole[:, :5]]
    batch = pad_left(grids)
    positions = torch.arange(batch.shape[2]) - torch.tensor([[batch.shape[2] - g.shape[1]] for g in grids])
    padded = model.hidden(batch, positions.clamp(min=-1))
    for n, g in enumerate(grids):
        text, audio = (x[0] for x in model.hidden(g[None]))
        cache = model.cache(1, g.shape[1])              # what a step gives, the next one may overwrite
        steps = [[x.clone() for x in model.hidden(g[None, :, s : s + 1], torch.tensor([[s]]), cache=cache)] for s in range(g.shape[1])]
        for whole, side, head in ((text, 0, model.text_head), (audio, 1, model.audio_head)):
            for other in (padded[side][n, -g.shape[1] :], torch.cat([step[side][0] for step in steps])):
                assert (head(whole) - head(other)).abs().max() <= 1e-5 * max(1.0, float(head(whole).abs().max()))


# ---- split ----

@pytest.mark.parametrize("stack", [Q3, Q2], ids=["qwen3", "qwen2"])
@pytest.mark.parametrize(("tail", "tied"), [(1, False), (3, True)])
def test_a_split_model_has_the_text_logits_of_its_source(stack, tail, tied):
    source = text_model(stack, tied)
    kept = {name: p.clone() for name, p in source.named_parameters()}
    split = converted("split-from-qwen", source, tail=tail, codes=64, tokenizer=TOKENIZER)
    assert split.config.tail == tail and split.config.temporal.layers == 4 - tail and not split.config.tied
    assert split.table.audio_start == IDS[SOSP] and split.table.streams[1].end == 64 and split.table.streams[1].vocab == 128
    words = torch.randint(0, 500, (2, 1, 9), generator=torch.Generator().manual_seed(1))
    none = torch.full_like(words, -1)
    with torch.inference_mode():
        assert torch.equal(split(torch.cat([words, none], 1))[0], source(words)[0])
    drawn(split, 5)
    assert all(torch.equal(p, kept[name]) for name, p in source.named_parameters())          # nothing is shared with the source
    small = converted("split-from-qwen", source, tail=tail, codes=64, words=520, tokenizer=TOKENIZER)
    with torch.inference_mode():
        assert (small(torch.cat([words, none], 1))[0] - source(words)[0][..., :520]).abs().max() <= 1e-5


def test_split_on_the_command_line_and_what_does_not_fit(tmp_path):
    checkpoint.save(text_model(), tmp_path / "q", checkpoint.Extras(data={"tokenizer": str(TOKENIZER), "codec": "tiny"}))
    rc, out, err = call("checkpoint.py", "split-from-qwen", tmp_path / "q", "--out", tmp_path / "z", "--tail=2", "--codes=256")
    assert rc == 0 and out == f"wrote {tmp_path / 'z'}\n", err
    made = load(tmp_path / "z")
    assert made.config.tail == 2 and made.extras.data == {"tokenizer": str(tmp_path / "z" / TOKENIZER.name)}
    for args, told in ((("--tail=4",), "--tail=4 does not fit 4 layers; give 1 to 3"), (("--tail=0",), "--tail=0 does not fit"),
                       (("--words=515", "--tail=1"), "id 515 that opens speech must lie below 515 kept text ids, of 544 in the model"),
                       (("--words=600", "--tail=1"), "must lie below 600 kept text ids, of 544"),
                       (("--codes=0", "--tail=1"), "and --codes above 0"),
                       (("--tail=x",), "--tail=x is no whole number"), (("--tails=2",), "nearest is --tail")):
        rc, _, err = call("checkpoint.py", "split-from-qwen", tmp_path / "q", "--out", tmp_path / "y", *args)
        assert rc == 2 and told in err and err.count("\n") == 1 and not (tmp_path / "y").exists(), err
    with pytest.raises(ValueError, match="only a text model can be split"):
        converted("split-from-qwen", made)
    with pytest.raises(ValueError, match="id 151646 that opens speech must lie below 544"):
        converted("split-from-qwen", text_model(), tail=1)
    bare = checkpoint.export(text_model(), tmp_path / "hf", to="hf")                          # an official folder, its tokenizer beside it
    (bare / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    assert converted("split-from-qwen", bare, tail=1, codes=64).table.audio_start == IDS[SOSP]


# ---- learning ----

def test_an_overfitted_spoken_exchange_comes_back_exactly():
    """More than 99 % of the codes, in fact all, drawn greedily behind its prompt; then <|im_end|> and nothing else."""
    talk, g = [turn("user", [HEARD]), turn("assistant", [HEARD])], torch.Generator().manual_seed(3)
    heard, said = (torch.randint(0, 64, (1, n), generator=g) for n in (7, 12))
    tokens, weights = grid(CHATS["moss"].segments(talk, [heard, said]), TABLES["moss"])
    torch.manual_seed(0)
    model = MultistreamLM(ModelConfig(TABLES["moss"], replace(Q3, dim=32, ffn=48), tail=1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        sums = model(tokens[None], weights[None])
        (sums.nll.sum() / sums.weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(sums.hits.sum()) == int(sums.count.sum()) == 12 + 1 + 1
    prompt, _ = grid(CHATS["moss"].segments(talk[:1], [heard], reply="speech"), TABLES["moss"])
    made = replies(model.eval(), [prompt])[0]
    assert made[1][made[1] >= 0].tolist() == said[0].tolist() and made[0, -1] == IDS["<|im_end|>"] and made.shape[1] == 14


def test_losses_of_text_and_speech_share_one_normaliser():
    """L = (sum of text nll + sum of audio nll) / (text targets + audio targets), by hand."""
    talk = [turn("user", "Hi"), turn("assistant", [HEARD]), turn("user", "Hi"), turn("assistant", "Yes.")]
    tokens, weights = grid(CHATS["moss"].segments(talk, [speech(3, 5, 9)]), TABLES["moss"])
    model = drawn(MultistreamLM(ModelConfig(TABLES["moss"], Q3, tail=1)))
    with torch.no_grad():
        text, audio = model(tokens[None])
        sums = model(tokens[None], weights[None])
    total, count = 0.0, 0
    for s in range(tokens.shape[1] - 1):
        for row, logits in ((0, text[0, s]), (1, audio[0, 0, s])):
            if weights[row, s + 1]:
                total, count = total - float(logits.log_softmax(-1)[tokens[row, s + 1]]), count + 1
    assert count == 4 + 1 + len(ids("Yes.<|im_end|>"))
    scale = loss_scale(sums.weight, TABLES["moss"], LossConfig(groups="all"))
    assert float((scale * sums.nll).sum()) == pytest.approx(total / count, rel=1e-5)


# ---- ids, pieces ----

def test_text_comes_as_soon_as_its_bytes_are_whole():
    text = "It's 4 €: مرحبا 👩‍👩‍👧 你好"
    stream, said = TextStream(WORDS), []
    for token in ids(text):
        said.append(stream.push(token))
    assert "".join(said) == text and "" in said and not any("\ufffd" in piece for piece in said)
    half = TextStream(WORDS)
    assert half.push(ids("€")[0]) == "" and half.flush() == "\ufffd"
    letters = TextStream(load_tokenizer("bytes"))
    assert [letters.push(b) for b in "é!".encode()] == ["", "é", "!"]


def test_pieces_of_a_reply():
    """Five frames of codes at a time, the rest when speech ends; marks are not said; a reply that was cut says so."""
    table, end = TABLES["moss"], IDS["<|im_end|>"]
    word = ids("a")[0]
    columns = [(word, -1), (IDS[SOSP], -1), *[(-1, c) for c in range(7)], (-1, -1), (word, -1), (end, -1)]
    frames = [torch.tensor([column, (3, 4)]) for column in columns]
    made = [(kind, piece.tolist() if kind == "codes" else piece) for kind, piece in reply_pieces(frames, table, WORDS)]
    assert made == [("text", "a"), ("codes", [[0, 1, 2, 3, 4]]), ("codes", [[5, 6]]), ("text", "a")]
    assert [kind for kind, _ in reply_pieces(frames[:5], table, WORDS)] == ["text", "codes", "cut"]


def test_a_text_model_answers_on_the_command_line_token_by_token(tmp_path):
    """What is printed is the greedy reply to the prompt of the conversation; with --system, of that conversation."""
    model = text_model(Q2)
    checkpoint.save(model, tmp_path / "q", checkpoint.Extras(data={"tokenizer": str(TOKENIZER), "normaliser": "none"}))
    for more, system in (((), ""), (("--system", "Be brief."), "Be brief.")):
        prompt, _ = grid(replace(CHATS["qwen2"], system=system).prompt("Hello?"), TABLES["qwen2"])
        wanted = [int(frame[0, 0]) for frame in generate(model, prompt, SampleConfig(temperature=0, max_frames=12))]
        rc, out, err = call("sample.py", "--ckpt", tmp_path / "q", "--text", "Hello?", "--temperature=0", "--max_frames=12", *more)
        said = WORDS.decode([i for i in wanted if i < WORDS.size and i not in TABLES["qwen2"].stop])
        ended = wanted[-1] in TABLES["qwen2"].stop
        assert rc == 0 and out.split("\n", 1)[1] == said + ("" if ended else " (cut at --max_frames)") + "\n", err
    for args, told in ((("--user=x.wav",), "--user needs a model that listens"), (("--text=is it <think>?",), "holds <think>"),
                       (("--text=hi", "--reply=song"), "neither text nor speech")):
        rc, _, err = call("sample.py", "--ckpt", tmp_path / "q", *args)
        assert rc == 2 and told in err and err.count("\n") == 1, err


def test_ids_above_the_vocabulary_are_named():
    model = drawn(MultistreamLM(ModelConfig(TABLES["moss"], Q3, tail=1)))
    with pytest.raises(ValueError, match=r"ids above the vocabulary: up to \[544, -1\] in rows of \[544, 80\] ids; use the tokenizer"):
        next(generate(model, torch.tensor([[1, 544], [-1, -1]])))


# ---- the recipe ----

def run(*args: object) -> str:
    rc, out, err = call(*args)
    assert rc == 0, out + err
    return out + err


def test_bundled_calls_are_spoken_and_written_on_both_sides(tmp_path):
    path = demo_calls(tmp_path, 16)
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    kinds = {tuple("speech" if isinstance(m["content"], list) else "text" for m in row["messages"]) for row in rows}
    assert kinds == {(a, b) for a in ("speech", "text") for b in ("speech", "text")} and {row["split"] for row in rows} == {"train", "test"}
    assert demo_calls(tmp_path) == path                                     # made once
    spoken = next(row for row in rows if isinstance(row["messages"][1]["content"], list))
    assert spoken["messages"][1]["content"][0]["text"].startswith("the number i have is ")
    codec = load_codec("tiny:1")
    wav, rate = load_wav(tmp_path / spoken["messages"][1]["content"][0]["audio_url"], codec.sample_rate)
    codes = codec.encode(wav[None])
    assert rate == 16000 and codes.shape[1] == 1 and torch.equal(codes, load_codec("tiny").encode(wav[None])[:, :1])
    stream = codec.stream()
    pieces = [stream.decode(part) for part in codes.split(5, 2)]
    assert torch.allclose(torch.cat([*pieces, stream.flush()], 2), codec.decode(codes), atol=1e-5)


@pytest.mark.slow
def test_smoke_trains_resumes_is_evaluated_replies_and_is_exported(tmp_path):
    """Spoken question to spoken and to written answer; the adapter and the merged model give the same logits again."""
    common = ("configs/ivr_moss.py", "--smoke", f"--data.cache={tmp_path}/cache", f"--out={tmp_path}/run")
    run("train.py", *common, "--steps=20", "--schedule=constant")
    assert "resuming" in run("train.py", *common)
    numbers = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert [row["step"] for row in numbers if "train/loss" in row] == list(range(40))
    assert [row["val/audio_loss"] for row in numbers if "val/loss" in row][-1] < 0.6 * math.log(384)
    run("evaluate.py", "report", tmp_path / "run", "--rounds=20")
    told = json.loads((tmp_path / "run/report/summary.json").read_text())
    found = {(line["model"], line["stream"]): line["loss"][0] for line in told["losses"]}
    assert found["run", "audio"] < 0.5 * found["base", "audio"] and found["run", "text"] < 0.5 * found["base", "text"]
    asked = ROOT / "out/cache/calls/003-user.wav"
    said = run("sample.py", "--ckpt", tmp_path / "run", "--user", asked, "--out", tmp_path / "a.wav", "--max_frames=60")
    wav, rate = load_wav(tmp_path / "a.wav")
    assert f"{wav.shape[1] / rate:.1f} s" in said.splitlines()[-1] and wav.shape[1] % 640 == 0 and wav.abs().max() > 0.01
    assert "the" in run("sample.py", "--ckpt", tmp_path / "run", "--user", asked, "--reply=text", "--temperature=0")
    grids = torch.stack([torch.tensor([[5, 6, IDS[SOSP], -1, -1, 9]]), torch.tensor([[-1, -1, -1, 7, 256, -1]])], 1)
    model = load(tmp_path / "run")
    for layout in ("hf", "peft"):
        run("checkpoint.py", "export", tmp_path / "run", f"--to={layout}", f"--out={tmp_path}/{layout}")
    run("checkpoint.py", "import", tmp_path / "hf", f"--out={tmp_path}/back")
    with torch.inference_mode():
        wanted = model(grids)
        for other in (load(tmp_path / "back"), load(tmp_path / "run" / "base", adapter=tmp_path / "peft")):
            assert all(float((a - b).abs().max()) < 1e-4 for a, b in zip(other(grids), wanted, strict=True))
