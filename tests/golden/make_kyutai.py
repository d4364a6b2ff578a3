"""Write the golden files of Kyutai's delayed streams: what moshi's scripts make of texts and of a user.

    python tests/golden/make_kyutai.py kyutai_tts kyutai_plain hibiki_end

Environment A of make.py, which tells the rest.

kyutai_tts    TTSModel on two scripts: words ahead in a second row, two voices of features, conditions
kyutai_plain  TTSModel without a second row and without voices
hibiki_end    run_inference on a user that is over: the column of start ids, silence until the text ends, guidance against very_bad
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from make import MOSHI, draw, write
from make_moshi import HIBIKI, build
from moshi.models.tts import StateMachine, TokenIds, TTSModel
from moshi.run_inference import InferenceState
from safetensors.torch import save_file

TEXTS = [["Hi there: my (big) friend <break time=\"0.4s\"/> so go", "ok then"], ["one two three four five"]]
LUT = {"type": "lut", "lut": {"n_bins": 1, "dim": 8, "tokenizer": "noop", "possible_values": ["ok"]}}
TTS = MOSHI | {"n_q": 4, "dep_q": 4, "delays": [0, 0, 2, 2, 2], "depformer_low_rank_embeddings": 7, "demux_second_stream": True,
               "depformer_num_layers": 1, "text_card_out": 5, "cross_attention": True, "conditioners": {
                   "speaker_wavs": {"type": "tensor", "tensor": {"dim": 7}}, "control": LUT,
                   "cfg": {"type": "lut", "lut": {"n_bins": 3, "dim": 6, "tokenizer": "noop", "possible_values": ["1.0", "2.0"]}}},
               "fuser": {"sum": ["control", "cfg"], "prepend": [], "cross": ["speaker_wavs"]}}
PLAIN = MOSHI | {"n_q": 3, "delays": [0, 0, 1, 1], "depformer_num_layers": 1, "conditioners": {"control": LUT},
                 "fuser": {"sum": ["control"], "prepend": [], "cross": []}}


class Letters:
    """A tokenizer of at most three letters a word, as the test has it."""

    def encode(self, word: str) -> list[int]:
        return [4 + ord(letter) % 20 for letter in word[:3]]

    def eos_id(self) -> int:
        return 2


@torch.no_grad()
def speech(name: str, config: dict, tts: dict, seed: int) -> None:
    model = build(config, seed)
    machine = StateMachine(TokenIds(config["text_card"] + 1), tts.get("second_stream_ahead", 0), max_padding=8)
    speaker = TTSModel(model, SimpleNamespace(frame_rate=12.5), Letters(), "", "", machine, int(tts["audio_delay"] * 12.5),
                       n_q=config["dep_q"], max_gen_length=120)
    features = torch.randn(2, 1, 7, 3, generator=torch.Generator().manual_seed(5))
    entries = [speaker.prepare_script(turns, padding_between=1) for turns in TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        voices = [Path(folder) / f"{n}.safetensors" for n in range(2)]
        for path, speaker_wavs in zip(voices, features, strict=True):
            save_file({"speaker_wavs": speaker_wavs.contiguous()}, path)
        told = [speaker.make_condition_attributes(voices if speaker.multi_speaker else [], 2.0 if speaker.valid_cfg_conditionings else None)
                for _ in TEXTS]
    if not speaker.valid_cfg_conditionings:
        for one in told:
            del one.text["cfg"]
    result = speaker.generate(entries, told, use_sampling=False)
    frames, ends = torch.cat(result.frames, -1), torch.tensor(result.end_steps)
    write(name, model, config | {"model_type": "tts", "tts_config": tts}, "torch moshi", frames=frames, ends=ends, features=features)
    print(ends.tolist(), frames[:, 0].tolist())


@torch.no_grad()
def hibiki_end() -> None:
    """A fake codec: what it encodes of the user and of silence is drawn beforehand."""
    T = 8
    heard = draw(HIBIKI["card"], 1, 3, 60, seed=9)
    left = iter(heard.split(1, -1))
    codec = SimpleNamespace(sample_rate=24000, frame_rate=12.5, cardinality=HIBIKI["card"], num_codebooks=3, channels=1,
                            streaming_forever=lambda items: None, encode=lambda wav: next(left),
                            decode=lambda codes: torch.zeros(1, 1, 1920))
    results = {}
    for cfg in (1.0, 2.0):
        model = build(HIBIKI, 106)
        model.text_linear.weight[2] *= 1.8              # the end of a text is likelier than a word
        left = iter(heard.split(1, -1))
        state = InferenceState(SimpleNamespace(model_type="hibiki"), codec, Letters(), model, 1, cfg, "cpu", use_sampling=False)
        state.text_tokenizer.id_to_piece = str
        spoken = []
        codec.decode = lambda codes, spoken=spoken: spoken.append(codes) or torch.zeros(1, 1, 1920)
        text = torch.stack(state.run(torch.zeros(1, 1, 1920 * T))[0][0].split(1)).flatten()
        results["guided" if cfg > 1 else "plain"] = torch.cat([text.view(1, 1, -1), torch.cat(spoken, -1)[..., : len(text)]], 1)
        print(cfg, text.tolist())
    write("hibiki_end", model, HIBIKI | {"model_type": "hibiki"}, "torch moshi", heard=heard, **results)


CASES = {"kyutai_tts": lambda: speech("kyutai_tts", TTS, {"audio_delay": 0.48, "second_stream_ahead": 2}, 61),
         "kyutai_plain": lambda: speech("kyutai_plain", PLAIN, {"audio_delay": 0.24}, 63), "hibiki_end": hibiki_end}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or sys.exit(__doc__):
        torch.manual_seed(0)
        CASES[case]()
