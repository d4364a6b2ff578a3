"""Our codecs beside the official ones on a clip, with equal random weights: Mimi against moshi's, Higgs' against transformers'.

    python tests/codec_speed.py --model=moshi --frames=25 --clock=cpu          higgs; --batch clips at once, --pairs

Codes must be equal and waves within 1e-5 before anything is timed. What is printed is what bench.py prints of other measurements.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from audio.higgs import HiggsCodec, HiggsCodecConfig
from audio.mimi import MimiCodec
from benchmarks.measure import CLOCKS, Side, alternate, check, compare, origin, show
from benchmarks.peers import absent
from benchmarks.workloads import Job
from options import apply, edge, split_arguments

CODECS = {"moshi": (MimiCodec, "moshi"), "higgs": (HiggsCodec, "transformers")}      # ours, and the package of the official one


@torch.no_grad()
def codecs(name: str, folder: Path) -> tuple[Any, dict[str, Side], str]:
    """Our codec, encode and decode of the official one with the same random weights, and the reason if there is none."""
    if name not in CODECS:
        raise ValueError(f"codec measures those of {' and '.join(CODECS)}, not of {name}; add --model=moshi")
    kind, package = CODECS[name]
    if why := f"not measured: pip install {package}" if absent(package) else "":
        return kind().eval(), {}, why
    if name == "moshi":
        from moshi.models.loaders import get_mimi
        net, books = get_mimi(None, num_codebooks=8), "embedding_sum"
        sides = {"encode": net.encode, "decode": net.decode}
    else:
        from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel
        ratios = HiggsCodecConfig().ratios
        dac = {"downsampling_ratios": ratios, "upsampling_ratios": ratios, "decoder_hidden_size": 1024, "hidden_size": 256}
        config = HiggsAudioV2TokenizerConfig(acoustic_model_config=dac, target_bandwidths=(0.5, 1, 1.5, 2))      # 8 codebooks
        net, books = HiggsAudioV2TokenizerModel(config), "codebook.embed"
        sides = {"encode": lambda wav: net.encode(wav).audio_codes, "decode": lambda codes: net.decode(codes).audio_values}
    for book in (tensor for place, tensor in net.eval().named_buffers() if place.endswith(books)):
        book.normal_()
    save_file({place: tensor.contiguous() for place, tensor in net.state_dict().items()}, folder / "codec.safetensors")
    return kind.load(folder / "codec.safetensors"), sides, ""


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """A clip of --frames frames, encoded and decoded by both codecs with the same random weights."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        codec, theirs, why = codecs(job.model, Path(folder))
        shape = job.batch or 1, 1, round((job.frames or 50) * codec.sample_rate / codec.frame_rate)
        wav = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
        codes = codec.encode(wav)
        for what, given in (("encode", wav), ("decode", codes)):
            ours, peer = (side and partial(side, given) for side in (getattr(codec, what), theirs.get(what)))
            checked = why or check(ours(), peer(), what, limit=1e-5)
            times = alternate(ours, peer, job.pairs, 1, clock=CLOCKS[job.clock])
            yield {"what": f"{what} codec {job.model}", **compare(*times, len(codes) * codes.shape[2]), "checked": checked, "target": 0.8}


def main() -> None:
    job = apply(Job(), split_arguments(sys.argv[1:])[1])
    torch.set_num_threads(job.threads)
    for row in rows(job):
        print(json.dumps(row | origin((CODECS[job.model][1],))), show(row), sep="\n", flush=True)


if __name__ == "__main__":
    edge(main)
