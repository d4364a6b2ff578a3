"""PersonaPlex 7B by NVIDIA: Moshi whose conversations begin with a voice and a role. Both speakers are predicted, one is heard.

    text     PAD ... PAD  | PAD x 6  | <system> You are ... <system>  | PAD x 6  |  EPAD hello ...
    cb 1..8  a voice      | silence  | silence                        | silence  |  the agent
    user     a sine of 440 Hz through all of it                                  |  the user; what is heard replaces what was drawn

Those frames are read and never trained. A row of a data set says "text_prompt" (else data.system) and "voice_prompt", a recording
(else data.reference chooses another one of its speaker). Official voices, voices.tgz, are .pt files of what the model
read before, and of its newest columns; they are read without unpickling.

Sizes are families/moshi.py's, with all 16 codebooks predicted: the released config.json has none, 475 tensors hold 8.37 billion
numbers. Sources: arXiv:2602.06053, NVIDIA/personaplex (2026-03: models/lm.py, loaders.py, server.py). Next: moss.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from audio.hub import torch_tensors
from families.family import Family
from families.moshi import duplex_grid, rules
from streams import StreamTable

# In the codes of the released Mimi: no sound, a sine; half a second of frames between the parts.
SILENCE, SINE, GAP = (948, 243, 1178, 546, 1736, 1030, 1978, 2008), (430, 1268, 381, 1611, 1095, 1495, 56, 472), 6


def role(text: str) -> str:
    """A role as it was trained, in its marks."""
    text = text.strip()
    return text if not text or text.startswith("<system>") and text.endswith("<system>") else f"<system> {text} <system>"


def persona(ids: Tensor, voice: Tensor, table: StreamTable) -> Tensor:
    """The frames (K, T) in front of a conversation: a voice (Q, t), silence, the role (n,) with an id a frame, silence."""
    if len(table.audio) != 2 * len(SILENCE) or table.streams[-1].vocab <= max(*SILENCE, *SINE):
        raise ValueError("a voice and a role are written in 2 x 8 codebooks of 2048 codes, this model has "
                         + f"{len(table.audio)} audio rows of {table.streams[-1].vocab - 1}; leave them out")
    gap, still = torch.full((GAP,), table.pad), torch.tensor(SILENCE)[:, None]
    text = torch.cat([torch.full((voice.shape[1],), table.pad), gap, ids, gap])
    agent = torch.cat([voice, still.expand(-1, len(text) - voice.shape[1])], 1)
    return torch.cat([text[None], agent, torch.tensor(SINE)[:, None].expand(-1, len(text))])


def stored_voice(path: Path, table: StreamTable) -> tuple[Tensor, Tensor]:
    """An official voice: codes (Q, T) of its frames, -1 where only their embedding is known, and embeddings (T, D) of the columns
    in front of the last frame, the start column first."""
    found = torch_tensors(path)
    x, newest, rows, most = found.get("embeddings"), found.get("cache"), len(table.audio) // 2, max(table.delays)
    if x is None or newest is None or x.dim() != 4 or x.shape[1:3] != (1, 1) or len(x) < 1 or newest.shape[:2] != (1, len(table)) \
            or newest.shape[2] < most + 2:
        raise ValueError(f"{path} is no voice of this model: it holds " + ", ".join(f"{n} {tuple(t.shape)}" for n, t in found.items())
                         + "; take a .pt of its voices.tgz, or a recording")
    T = len(x)
    codes = torch.full((rows, T), -1)
    for column in range(T, T + most + 1):                    # of the last frames all codes are known: they come late
        for k, delay in enumerate(table.delays[table.lead : table.lead + rows]):
            if 0 < column - delay <= T:
                codes[k, column - delay - 1] = newest[0, table.lead + k, column % newest.shape[2]]
    return codes, x[:, 0, 0]


# The official scripts' role.
USUAL = "You are a wise and friendly teacher. Answer questions or provide advice in a clear and engaging way."
FAMILIES = (Family("PersonaPlex", "personaplex", "PersonaPlex 7B: Moshi in the voice and the role of a prompt", duplex_grid, rules=rules,
                   companions={"system": USUAL}, user_audio="duplex", persona=persona, role=role, stored_voice=stored_voice),)
