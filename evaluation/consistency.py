"""Whether sampling is the model that was trained: prompts and drawn ids against training grids, cached against whole logits.

`prompted` makes the prompt that sampling would make of a row of the data, `disagreement` leads the rules of sampling along
the training grid of that row, `decoding_error` reads grids a column at a time, as a batch. Used by verify.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.data_config import DataConfig
from corpus.examples import build_example, prompt_example, reply_example, spoken_prompt
from corpus.index import Index
from families.family import family_of, lay_out
from generation.decode_step import ColumnKind, DecodeStep, SampleConfig
from generation.turns import FREE, advance, required_ids, start_state, with_endings
from model import MultistreamLM
from sample import pad_left
from streams import StreamTable, is_audio
from text.conversation import clips
from text.tokenizers import load_tokenizer

COLUMNS = 400                # columns of an example that are decoded one at a time, at most
Prompted = tuple[Tensor, int]       # a grid (K, S), and how many of its columns are the prompt


def prompted(index: Index, number: int, facts: DataConfig, table: StreamTable) -> Tensor | None:
    """The prompt (K, P) that sampling with `facts` makes of an entry; None where its kind has none."""
    entry, family = index.entries[number], family_of(table)
    if table.monologue or entry.reference >= 0:
        return None
    tokenizer = load_tokenizer(facts.tokenizer)
    if entry.messages:
        last = max((n for n, m in enumerate(entry.messages) if m["role"] == "assistant"), default=0)
        before = entry.messages[:last]
        if not before or before[-1]["role"] == "assistant":
            return None
        codes = [index.codes(n, 0) for n in entry.clips[: sum(len(clips(m["content"])) for m in before)]]
        reply = "speech" if clips(entry.messages[last]["content"]) else "text"
        return lay_out(reply_example(before, codes, facts, tokenizer, table, reply), table)[0]
    if not family.text_to_speech or not (entry.key or entry.parts):
        return None
    if entry.scene:
        return lay_out(spoken_prompt(index, number, -1, facts, table), table)[0]
    return lay_out(prompt_example(entry.text, facts, tokenizer, table=table), table)[0]


def disagreement(table: StreamTable, tokens: Tensor, weights: Tensor, prompt: Tensor) -> str:
    """Where a training grid (K, S) is another one than sampling behind a prompt (K, P) would write; "" = nowhere."""
    P, S = prompt.shape[1], tokens.shape[1]
    if P > S:
        return f"the prompt has {P} columns, the whole training example {S}"
    if not torch.equal(tokens[:, :P], prompt):
        at = int((tokens[:, :P] == prompt).all(0).int().argmin())
        return f"column {at} of the prompt is {prompt[:, at].tolist()}, in training {tokens[:, at].tolist()}"
    state = start_state(tokens[None, :, :P], table)
    for c in range(P, S):
        if all(turn.done for turn in state.turns):
            return f"sampling has ended before column {c} of {S}" if weights[:, c:].any() else ""
        known, column = required_ids(state)[0][0].tolist(), tokens[:, c]
        for k in (*table.text_out, *table.audio_out):
            id, row = int(column[k]), table.streams[k].name
            if known[k] != FREE and known[k] != id:
                return f"row {row}, column {c}: sampling writes {known[k]}, training has {id}"
            if known[k] == FREE and id >= 0 and k in table.audio_out and not weights[k, c]:
                return f"row {row}, column {c}: sampling draws an id that training never predicts"
        with_endings(state, column[None].clone())
        advance(state, column[None])
    return ""


def example_grids(index: Index, numbers: Sequence[int], table: StreamTable) -> list[Prompted]:
    """Grids of entries, cut at the first target."""
    found = []
    for n in numbers:
        tokens, weights = (t[:, :COLUMNS] for t in lay_out(build_example(index, n, table), table))
        first = int((weights > 0).any(0).int().argmax())
        found += [(tokens, min(max(2, first), tokens.shape[1] - 1))] if tokens.shape[1] > 2 else []
    return found


def random_grids(table: StreamTable) -> list[Prompted]:
    """Two grids of random ids, for a model without data."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, row.classes or row.vocab, (24,), generator=draw) for row in table.streams])
    if table.audio and not table.aligned:
        tokens[table.audio, :8], tokens[table.text, 8:] = -1, -1
    return [(tokens, 9), (tokens[:, 3:], 7)]


@torch.inference_mode()
def decoding_error(model: MultistreamLM, grids: Sequence[Prompted]) -> tuple[float, float]:
    """The largest difference of a logit between grids read a column at a time, as one batch, and each read whole; the largest logit.

    Both are infinite or NaN where logits are.
    """
    table, differences, sizes = model.table, [], []
    grids = grids or random_grids(table)
    whole = [model(tokens[None]) for tokens, _ in grids]
    step = DecodeStep(model, pad_left([tokens[:, :P] for tokens, P in grids]), SampleConfig(temperature=0.0), COLUMNS + 8)
    for n in range(max(tokens.shape[1] - P for tokens, P in grids)):
        columns = torch.stack([tokens[:, min(P + n, tokens.shape[1] - 1)] for tokens, P in grids])
        spoken = [bool(is_audio(column[None, :, None], table)) for column in columns]
        heads = []
        if table.text_out:
            heads.append((0, model.text_head(step.h[0][:, -1])[None]))
        if table.audio_out:
            heads.append((1, column_logits(model, step, step.h[1][:, -1], columns)))
        for b, (tokens, P) in enumerate(grids):
            for head, logits in heads if P + n < tokens.shape[1] else ():
                if not table.aligned and spoken[b] != bool(head):               # this head is not asked here
                    continue
                at = whole[b][head][0]
                expected = at[None, P + n - 1] if head == 0 else at[:, P + n - 1]
                possible = expected != -torch.inf                               # ids that a smaller head does not have
                differences.append((logits[:, b, : expected.shape[-1]] - expected)[possible].abs().max().float())
                sizes.append(expected[possible].abs().max().float())
        step.read(columns, ColumnKind(bool(table.text_out), bool(table.audio_out),
                                      None if table.aligned or len(set(spoken)) > 1 else spoken[0]))
    return tuple(float(torch.stack(values).max()) if values else 0.0 for values in (differences, sizes))


def column_logits(model: MultistreamLM, step: DecodeStep, h: Tensor, columns: Tensor) -> Tensor:
    """Logits (Q, B, V) of the audio rows of columns (B, K), codebook by codebook where there is a depth transformer."""
    table = model.table
    if model.config.depth is None:
        return model.audio_logits(h, columns[:, :0])
    token, found = columns[:, table.text[0] : table.text[0] + model.depth.texts], []
    for k, row in enumerate(table.audio_out):
        found.append(model.codebook_logits(k, h, token, step.depth))
        token = columns[:, row]
    widest = max(logits.shape[-1] for logits in found)
    return torch.stack([F.pad(logits, (0, widest - logits.shape[-1]), value=-torch.inf) for logits in found])
