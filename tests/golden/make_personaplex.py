"""Write the golden files of PersonaPlex: what NVIDIA's generator makes of a voice, a role and a user, at two small shapes.

    PYTHONPATH=personaplex/moshi python tests/golden/make_personaplex.py personaplex personaplex_late

Environment A of make.py, with the package of NVIDIA/personaplex (commit 3428dfd) in front of moshi. Its constants of eight codebooks are
replaced by those of the small shapes. `embeddings` and `cache` are the voice as its .pt files store it.
"""

import sys
import tempfile
from pathlib import Path

import torch
from make import MOSHI, draw, scramble, write
from moshi.models import lm
from torch import Tensor

LONG = MOSHI | {"context": 64}      # its generator departs from its own forward pass where the window is shorter than the conversation
SHAPES = {"personaplex": LONG | {"n_q": 6, "dep_q": 6, "delays": [0, 0, 1, 1, 0, 1, 1], "depformer_dim": 12,
                                 "depformer_dim_feedforward": 50},
          "personaplex_late": LONG | {"n_q": 4, "dep_q": 4, "num_heads": 2, "delays": [0, 0, 2, 0, 2], "depformer_num_layers": 1}}


@torch.no_grad()
def case(name: str, seed: int) -> None:
    config = SHAPES[name]
    Q, card = config["n_q"] // 2, config["card"]
    model = scramble(lm.LMModel(device="cpu", dtype=torch.float32, **config), seed, gain=1.0)
    lm.AUDIO_TOKENS_PER_STREAM = Q
    lm.SILENCE_TOKENS, lm.SINE_TOKENS = draw(card, Q, seed=3).numpy(), draw(card, Q, seed=4).numpy()
    lm.LMGen._encode_zero_frame, lm.LMGen._encode_sine_frame = (
        (lambda self, ids=ids: torch.as_tensor(ids).view(1, Q, 1)) for ids in (lm.SILENCE_TOKENS, lm.SINE_TOKENS))
    voice, role, user = draw(card, 1, Q, 9, seed=5), draw(29, 5, seed=6) + 1, draw(card, 1, Q, 12, seed=7)
    codes = torch.cat([draw(config["text_card"], 2, 1, 11, seed=8), draw(card, 2, 2 * Q, 11, seed=9)], 1)
    out = model.forward_train(codes)
    found = {"mask": out.mask, "logits": out.logits.nan_to_num(0.0), "text_logits": out.text_logits[:, 0]}

    def talk(stored: Path | None) -> tuple[Tensor, object]:
        generator, frames = lm.LMGen(model, "cpu", use_sampling=False, audio_silence_frame_cnt=6, text_prompt_tokens=role.tolist(),
                                     save_voice_prompt_embeddings=stored is None, sample_rate=24000, frame_rate=12.5), []
        generator._encode_voice_prompt_frames = lambda mimi: voice.split(1, -1)
        with tempfile.TemporaryDirectory() as folder, generator.streaming(1):
            if stored is None:
                generator.voice_prompt, generator.voice_prompt_audio = f"{folder}/voice.wav", torch.zeros(1, 1)
            else:
                generator.load_voice_prompt_embeddings(stored)
            generator.step_system_prompts(None)
            made = torch.load(f"{folder}/voice.pt", weights_only=True) if stored is None else None
            generator.return_logits = generator.save_voice_prompt_embeddings = False
            for t in range(user.shape[-1]):
                frames.append(generator.step(user[..., t : t + 1]))
        return torch.cat(frames, -1), made

    frames, made = talk(None)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(made, file.name)
        assert torch.equal(talk(Path(file.name))[0], frames), "a stored voice is the recording"
    write(name, model, config | {"model_type": "personaplex"}, "torch", codes=codes, **found, voice=voice[0], role=role, user=user,
          silence=torch.as_tensor(lm.SILENCE_TOKENS), sine=torch.as_tensor(lm.SINE_TOKENS), frames=frames, **made)
    print(frames[0].tolist())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, name in enumerate(sys.argv[1:] or sys.exit(__doc__)):
        case(name, 51 + number)
