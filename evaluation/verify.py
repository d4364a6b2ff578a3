"""Is a checkpoint what it says, on this machine? One table; a row that differs says what it means and what to do.

    python evaluate.py verify out/higgs_ar                      a run: against its own held-out rows and recorded losses
    python evaluate.py verify models/moshiko --sources=clips    any checkpoint or official folder, on rows that you name

    weights         all are there, finite, and those that the checksums were made of
    config          architecture and stream table are those of the run
    adapter         it changes the model, and merged into the weights it still does the same
    data            codec, tokenizer and text options are those of the training; the codec gives the codes that were trained on
    prompt          what sampling reads before it answers is what training read; what it draws is what training predicts
    decoding        one column at a time, in a batch, gives the logits of the whole example at once
    graphs          CUDA graphs give the same frames as without them
    held-out loss   the loss that the run recorded at this step; below a random guess; below that without the adapter
    export          written in its official layout and read again, it is the same model
    sound           decoding codes piece by piece gives the same sound as at once
    sample          one text spoken: its length, its silence, and whether the model ended it

The exit code is 1 when a row differs. "look" is no fault by itself, "-" was not verified. Next: consistency.py.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lora
from checkpoint import export, load, merge_error, recognise, resolve
from config import TrainConfig
from corpus.cache import encode_clip
from corpus.data_config import DataConfig, source_weight
from corpus.examples import build_example, spoken_prompt
from corpus.index import Index, fitting_codec, prepare, prompt_facts
from corpus.layouts import read_manifest
from data import Batch, Loader
from evaluation.consistency import decoding_error, disagreement, example_grids, prompted, random_grids
from evaluation.report import of_run
from families.family import all_families, family_of, lay_out, other_grid
from families.formats import config_differences
from generation.command_line import check_device, check_names
from generation.decode_step import SampleConfig
from layers.batch_plan import make_plan
from model import MultistreamLM
from options import check_types, difference, from_json, read_json, visible
from sample import generate, speak_examples
from text.tokenizers import load_tokenizer, tokenizer_file
from training.evaluation_samples import silence
from training.monitor import read_metrics
from training.objective import Contrast, Likelihood, Preference
from training.plan import computed_type

OK, DIFFERS, LOOK, NONE = "ok", "differs", "look", "-"
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}          # of a logit, as a share of the largest


@dataclass(frozen=True)
class VerifyConfig:
    """Options of `python evaluate.py verify RUN`."""

    sources: tuple[str, ...] = ()  # manifests or folders to verify on; () = the held-out rows of the run
    rows: int = 2                  # number of examples that are laid out and decoded column by column
    adapter: str = ""              # folder of an adapter to load on top; "" = none
    export: str = "auto"           # write and read an official export: "on", "off", or "auto" = below 2 GiB of weights
    device: str = "cpu"            # device of the model: cpu or cuda
    dtype: str = "fp32"            # type of the weights: fp32, bf16 or fp16

    def __post_init__(self) -> None:
        check_types(self)
        assert self.rows > 0, "rows is at least 1"
        assert self.export in ("on", "off", "auto"), f"export {self.export!r} is none of on, off, auto"
        check_names(self.device, self.dtype)


@dataclass
class Finding:
    """A row of the table: what was found, and what to do where it differs."""

    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass
class Subject:
    """What is verified: a model, the config of its run where there is one, and prepared rows."""

    path: str
    job: VerifyConfig
    model: MultistreamLM
    run: Path | None = None             # the folder of its run
    config: TrainConfig | None = None   # of that run
    data: DataConfig | None = None
    index: Index | None = None
    entries: tuple[int, ...] = ()       # of the index, to verify on
    codec: Any = None                   # the one of the checkpoint, where it fits

    @property
    def facts(self) -> DataConfig | None:
        """What sampling knows of the data: what the checkpoint itself says."""
        said = self.model.extras.data
        return from_json(DataConfig, said, f"{self.model.extras.folder}/config.json data") if said else self.data

    def within(self, error: float, largest: float) -> str:
        return OK if error <= TOLERANCES[self.job.dtype] * max(1.0, largest) else DIFFERS


def verify(path: str, job: VerifyConfig) -> list[Finding]:
    """All findings about a run folder, a checkpoint, an official folder or a hub id."""
    check_device(job.device, job.dtype)
    try:
        model = load(path, job.device, job.dtype, job.adapter or None)
    except ValueError as error:
        return [Finding("weights", DIFFERS, str(error), "they are damaged, incomplete or of different models; fetch or export them again")]
    subject, found = Subject(path, job, model), [Finding("weights", OK, f"{model.count_parameters():,} parameters, all finite")]
    for name, check in CHECKS.items():
        try:
            found += [Finding(name, *row) for row in check(subject)]
        except (ValueError, FileNotFoundError) as error:
            found.append(Finding(name, DIFFERS, str(error)))
    return found


def check_config(s: Subject) -> Iterator[tuple[str, ...]]:
    """Find the run that the checkpoint belongs to, and prepare its rows."""
    s.run = next((f for f in (Path(s.path), *Path(s.path).resolve().parents[:2]) if is_run(f)), None)
    s.config = from_json(TrainConfig, read_json(s.run / "config.json"), f"{s.run}/config.json") if s.run else None
    if s.config is not None:
        mine, table = s.config.model, s.model.table
        if lines := other_grid(mine.table, table) + config_differences(replace(mine, table=table), s.model.config):
            yield (DIFFERS, f"run -> checkpoint: {'; '.join(lines[:3])}",
                   "the checkpoint or its base is not of this run, or its config.json was changed; take another checkpoint")
    data = s.config.data if s.config else of_run(Path(s.path), s.model)[0]
    data = replace(data, sources=s.job.sources, split="manifest") if s.job.sources else data
    if data.sources:
        index = prepare(data, s.model.table)
        held = [n for n, entry in enumerate(index.entries) if entry.split == "held-out"]
        s.data, s.index, s.entries = data, index, tuple(held or [n for n, entry in enumerate(index.entries) if entry.split])


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "steps" in (read_json(folder / "config.json") or {})


def check_adapter(s: Subject) -> Iterator[tuple[str, ...]]:
    if getattr(s.model, "lora", None) is None:
        return
    norms = lora.norms(s.model)
    if not any(norms.values()):
        yield (DIFFERS, f"all {len(norms)} adapters are zero: the model is its base",
               "the adapter was never trained, or its B matrices were lost; take another checkpoint")
        return
    error, largest = merge_error(s.model)
    yield (s.within(error, largest), f"{len(norms)} adapters, |BA|/|W| up to {max(norms.values()):.2g}; "
           + f"merged, logits differ by {error:.1g} of {largest:.2g}",
           "do not merge this adapter in this dtype: merge in fp32, or keep it apart")


def check_data(s: Subject) -> Iterator[tuple[str, ...]]:
    facts = s.facts
    if facts is None:
        yield LOOK, "the checkpoint names neither codec nor tokenizer", "name rows with --sources; sampling needs --codec and --tokenizer"
        return
    if s.data is not None and s.model.extras.data:
        both = [from_json(DataConfig, prompt_facts(c, s.model.table)) for c in (s.data, facts)]
        files = [path.read_bytes() if (path := tokenizer_file(one.tokenizer, local=True)).is_file() else one.tokenizer for one in both]
        if lines := [line for line in difference(*both) if not line.startswith("tokenizer:") or files[0] != files[1]]:
            yield (DIFFERS, f"training -> checkpoint: {'; '.join(lines)}",
                   "sampling would read another prompt, or other codes, than training did; correct config.json of the checkpoint")
    tokenizer = load_tokenizer(facts.tokenizer)
    s.codec = fitting_codec(facts.codec, s.model.table, tokenizer)
    names = f"tokenizer {tokenizer.name}" + (f", codec {s.codec.name}" if s.codec is not None else "")
    share = encoded_again(s) if s.codec is not None and s.index is not None else None
    if share is None:
        yield OK, f"{names}: they fit the grid"
    else:
        yield (OK if share > 0.98 else DIFFERS, f"{names}; a recording encoded again has {share:.1%} of the codes that were trained on",
               "this is another codec than the one that encoded the training data; name that one, or prepare and train again")


def encoded_again(s: Subject) -> float | None:
    """The share of equal codes when the first recording of the data is encoded again; None where there is none."""
    numbers = {entry.id: n for n, entry in enumerate(s.index.entries) if entry.key}
    for source in s.data.sources:
        manifest = read_manifest(source_weight(source)[0], s.data.allow_outside, s.data.assistant_text, s.data.agent)
        for clip in (clip for clip in manifest.clips.values() if clip.get("file") and clip["id"] in numbers):
            number = numbers[clip["id"]]
            entry, once = s.index.entries[number], replace(s.data, variants=1)
            made = encode_clip(entry.key, clip, s.codec, s.index.info["duplex"], once, s.model.table.timing.around)
            if isinstance(made, list):
                kept, codes = s.index.codes(number, 0), torch.from_numpy(made[0].astype("int64"))
                return float((kept == codes).float().mean()) if kept.shape == codes.shape else 0.0
    return None


def check_prompt(s: Subject) -> Iterator[tuple[str, ...]]:
    if s.index is None or s.facts is None:
        return
    table, columns, rows = s.model.table, 0, 0
    for number in s.entries[:32]:
        if rows == s.job.rows or (prompt := prompted(s.index, number, s.facts, table)) is None:
            continue
        if fault := disagreement(table, *lay_out(build_example(s.index, number, table), table), prompt):
            yield (DIFFERS, f"{visible(s.index.entries[number].id)}: {fault}",
                   "sample with the scene, system message, normaliser and template of the training; where they are the same, "
                   + "the family's layout and its sampling disagree: report it")
            return
        columns, rows = columns + prompt.shape[1], rows + 1
    if rows:
        yield OK, f"{rows} prompts of {columns} columns are those of the training, and every drawn id was a target"


def check_decoding(s: Subject) -> Iterator[tuple[str, ...]]:
    grids = example_grids(s.index, s.entries[: s.job.rows], s.model.table) if s.index is not None else random_grids(s.model.table)
    error, largest = decoding_error(s.model, [(tokens.to(s.job.device), prompt) for tokens, prompt in grids])
    if not math.isfinite(error + largest):
        yield DIFFERS, f"logits are not finite in {s.job.dtype}", "numbers overflow in this dtype; use bf16 or fp32"
        return
    yield (s.within(error, largest), f"{len(grids)} examples as a batch: logits differ by {error:.1g}, the largest is {largest:.2g}",
           "sampling reads other states than training did, by its cache, positions or padding; report it")


def check_graphs(s: Subject) -> Iterator[tuple[str, ...]]:
    if s.job.device != "cuda":
        yield NONE, "not verified: --device=cuda does it"
        return
    tokens, prompt = (example_grids(s.index, s.entries[:1], s.model.table) if s.index is not None else random_grids(s.model.table))[0]
    frames = []
    with lora.merging(s.model) if getattr(s.model, "lora", None) else nullcontext():
        for graphs in ("auto", "off"):
            rules = SampleConfig(temperature=0.0, max_frames=64, graphs=graphs)
            frames.append([frame.tolist() for frame in generate(s.model, tokens[:, :prompt], rules)])
    yield (OK if frames[0] == frames[1] else DIFFERS, f"{len(frames[0])} greedy frames with graphs, {len(frames[1])} without",
           "sample with --graphs=off, and report it")


# ---- losses ----

@torch.no_grad()
def check_loss(s: Subject) -> Iterator[tuple[str, ...]]:
    batches = list(held_out(s)) if s.index is not None else []
    if not batches:
        yield NONE, "not verified: name rows with --sources"
        return
    numbers, step, table = losses(s, batches), s.model.extras.step, s.model.table
    if not math.isfinite(numbers["loss"]):
        yield DIFFERS, f"the loss is {numbers['loss']} in {s.job.dtype}", "numbers overflow in this dtype; use bf16 or fp32"
        return
    file = s.run / "metrics.jsonl" if s.run is not None and not s.job.sources else None
    recorded = dict(read_metrics(file).get("val/loss", [])).get(step) if file is not None and file.is_file() else None
    if recorded is not None:
        exact = s.job.dtype == "fp32" and computed_type(s.config, s.job.device) == torch.float32
        limit = 0.03 if s.config.quantize or s.job.dtype != "fp32" else 1e-3 if exact else 5e-3
        off = abs(numbers["loss"] - recorded) > limit * max(abs(recorded), 0.1)
        yield (DIFFERS if off else OK, f"{numbers['loss']:.4f} on {len(batches)} batches; the run recorded {recorded:.4f} at step {step}",
               "weights, adapter, its base, codec, tokenizer or config are not those of that step; compare them with the run's, "
               + "or take another checkpoint")
    for name, rows in (("text", table.text_out), ("audio", table.audio_out)):
        if f"{name}_loss" in numbers:
            guess, loss = math.log(table.streams[rows[0]].classes), numbers[f"{name}_loss"]
            yield (OK if loss <= 0.9 * guess else LOOK, f"{name} {loss:.2f}, a random guess has {guess:.2f}",
                   "hardly trained; or codec, tokenizer, delays or RoPE base are wrong")
    config = getattr(s.model, "lora", None)
    if config is not None and not config.train and "reward_margin" not in numbers:
        with lora.switched_off(s.model):
            base = losses(s, batches)["loss"]
        yield (OK if numbers["loss"] < base else LOOK, f"{numbers['loss']:.4f} with the adapter, {base:.4f} without it",
               "the adapter does not help on these rows: it was trained on other data, or on another base")


def held_out(s: Subject) -> Iterator[Batch]:
    """The batches that the run evaluates, of all its ranks; all rows of --sources where none is held out."""
    pairs, size = s.config is not None and s.config.dpo is not None, s.config.batch_size if s.config else 1
    most = s.config.eval_batches if s.config and s.config.eval_batches else math.inf
    world = max(1, len(list((Path(s.model.extras.folder) / "state").glob("rng_rank*")))) if s.config else 1
    for rank in range(world):
        loader = Loader(s.data, s.model.table, "held-out", size, rank, world, pairs=pairs)
        if not any(loader.sources):
            loader.sources = [[n for n in s.entries if s.index.entries[n].source == source] for source in range(len(s.data.sources))]
        for n, batch in enumerate(loader):
            if n >= most:
                break
            yield batch


def losses(s: Subject, batches: Sequence[Batch]) -> dict[str, float]:
    """The metrics of batches, by the objective and in the precision of the run."""
    config = s.config or TrainConfig(model=s.model.config, data=s.data)
    if config.dpo is not None and getattr(s.model, "lora", None) is not None:
        goal = Preference(s.model, config.dpo)
    else:
        goal = (Contrast if config.loss.contrastive else Likelihood)(s.model.table, config.loss)
    dtype = computed_type(config, s.job.device) if s.config and s.job.dtype == "fp32" else torch.float32
    total = goal.zero()
    with torch.autocast(s.job.device, dtype) if dtype != torch.float32 else nullcontext():
        for batch in batches:
            tensors = (batch.tokens, batch.weights, batch.positions, batch.segments, batch.speakers)
            plan = make_plan(s.model.config, *tensors[:4]).to(s.job.device)
            total += goal.sums(s.model, [t.to(s.job.device) for t in tensors], plan)[1].cpu()
    return goal.report(total)


# ---- files and sound ----

def check_export(s: Subject) -> Iterator[tuple[str, ...]]:
    size = sum(p.numel() * p.element_size() for p in s.model.parameters())
    if s.job.export == "off" or (s.job.export == "auto" and size > 2 << 30):
        yield NONE, "not verified: --export=on does it"
        return
    if any(path in s.model.config.tied_heads for path, *_ in lora.adapters(s.model)):
        yield NONE, "not verified: an adapter on a tied head is exported with --to=peft alone"
        return
    official = recognise(resolve(s.path))
    fitting = [form.to for family in all_families() for form in family.formats if form.fits(s.model.config)]
    to = official.to if official is not None and official.to in fitting else next(iter(fitting), "multistream")
    with tempfile.TemporaryDirectory() as folder:
        again = load(export(s.model, Path(folder) / "export", to), s.job.device, s.job.dtype)
        error, largest = merge_error(s.model, again)
    yield (s.within(error, largest), f"--to={to}: logits differ by {error:.1g}, the largest is {largest:.2g}",
           "do not publish this export; report it")


def check_sound(s: Subject) -> Iterator[tuple[str, ...]]:
    if not s.model.table.codes_out or s.codec is None:
        return
    codec, clip = s.codec, next((n for n in s.entries if s.index.entries[n].key), None)
    random = torch.randint(0, codec.codebook_size, (1, codec.num_codebooks, 24), generator=torch.Generator().manual_seed(0))
    codes = random if clip is None else s.index.codes(clip, 0)[None, : codec.num_codebooks, :96]
    whole, stream = codec.decode(codes), codec.stream()
    wav = torch.cat([*(stream.decode(piece) for piece in codes.split(5, 2)), stream.flush()], -1)
    error = float((wav - whole).abs().max()) if wav.shape == whole.shape else math.inf
    yield (OK if error < 1e-3 else DIFFERS, f"codec {codec.name}: {wav.shape[-1]} samples in pieces, {whole.shape[-1]} at once, "
           + f"they differ by {error:.1g}", "sample without --stream, and report it")


def check_sample(s: Subject) -> Iterator[tuple[str, ...]]:
    table, family = s.model.table, family_of(s.model.table)
    spoken = (n for n in s.entries if (s.index.entries[n].key or s.index.entries[n].parts) and s.index.entries[n].text.strip())
    if not family.text_to_speech or s.codec is None or (number := next(spoken, None)) is None:
        return
    entry, codec = s.index.entries[number], s.codec
    frames = sum(s.index.entries[n].frames[0] for n in entry.parts or [number])
    rules = SampleConfig(**family.rules(table) | {"max_frames": (50 + 2 * frames) * table.columns_per_frame})
    speech = speak_examples(s.model, [spoken_prompt(s.index, number, -1, s.data, table)], rules, codec)[0]
    quiet, ended = silence(speech.wav, codec.sample_rate), "ended by itself" if speech.ended else "cut"
    good = speech.ended and 0.5 <= speech.frames / frames <= 2 and quiet < 0.8
    yield (OK if good else LOOK,
           f"{visible(entry.text[:40])!r}: {speech.frames / codec.frame_rate:.1f} s, {quiet:.0%} of it silent, {ended}; "
           + f"the recording has {frames / codec.frame_rate:.1f} s", "listen to it; early in training this is usual")


CHECKS = {"config": check_config, "adapter": check_adapter, "data": check_data, "prompt": check_prompt, "decoding": check_decoding,
          "graphs": check_graphs, "held-out loss": check_loss, "export": check_export, "sound": check_sound, "sample": check_sample}


def verify_command(path: str, job: VerifyConfig) -> None:
    """Print the table; exit code 1 when something differs."""
    found = verify(path, job)
    for row in found:
        print(f"{row.state:<8} {row.name:<14} {row.found}")
        if row.remedy and row.state in (DIFFERS, LOOK):
            print(f"{'':<23} -> {row.remedy}")
    bad = dict.fromkeys(row.name for row in found if row.state == DIFFERS)
    print(f"{path}: " + (f"differs in {', '.join(bad)}" if bad else "is what it says"))
    if bad:
        raise SystemExit(1)
