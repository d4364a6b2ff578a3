"""The embedded voice cloning family: text and speech take turns, as in Higgs Audio, without a chat template.

    reference transcript, audio_start, its codes, audio_end, transcript, audio_start, codes, audio_end

A config of this family is in configs/tiny_clone.py. Next: higgs.py.
"""

import torch

from families.family import Family
from streams import Example, Grid, StreamTable, audio_block, join, text_block


def clone_grid(example: Example, table: StreamTable) -> Grid:
    """Reference transcript, reference speech, transcript, speech (tiny_clone: the Higgs turn order in small).

    Only the last speech and the id that ends it are targets. Without `codes` the grid is the prompt: it ends with
    `audio_start`, after which the model speaks.
    """
    begin, finish = torch.tensor([table.audio_start]), torch.tensor([table.audio_end])
    blocks = []
    for part, weight in ((example.reference, 0.0), (example, 1.0)):
        if part is None:
            continue
        blocks += [text_block(torch.cat([part.text, begin]), 0.0, table)]
        if part.codes is not None:
            blocks += [audio_block(part.codes, weight, table), text_block(finish, weight, table)]
    return join(blocks)


FAMILIES = (Family("tiny_clone", "clone", "embedded: sequential voice cloning on a CPU (configs/tiny_clone.py)", clone_grid,
                   text_to_speech=True, references=1),)
