"""Everything between waveform and codes: frozen, and usable without the rest of the repository.

    codec = load_codec("tiny")
    codes = codec.encode(wav)       # (B, 1, W) at codec.sample_rate -> (B, Q, T) int64
    wav = codec.decode(codes)       # -> (B, 1, W)
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from audio.higgs import HiggsCodec, is_higgs
from audio.mimi import MimiCodec, is_mimi
from audio.moss import MossCodec, is_moss
from audio.tiny import TinyCodec

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny_codec.safetensors"


def _is_tiny(path: Path) -> bool:
    """A safetensors file whose metadata says so."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("codec") == "tiny"
    except SafetensorError:
        return False


NAMES = {"tiny": (TinyCodec.load, TINY)}            # name -> (loader, the file it reads)
KINDS = [                                           # what a file or folder holds -> loader
    (_is_tiny, TinyCodec.load), (is_higgs, HiggsCodec.load), (is_moss, MossCodec.load), (is_mimi, MimiCodec.load)]


def load_codec(path_or_name, device: str = "cpu"):
    """Load a codec by name ("tiny") or from a file or folder, recognised by its content; else ValueError."""
    if str(path_or_name) in NAMES:
        loader, path = NAMES[str(path_or_name)]
        return loader(path, device=device)
    path = Path(path_or_name)
    for fits, loader in KINDS:
        if fits(path):
            return loader(path, device=device)
    state = "holds no codec known here" if path.exists() else "is neither a codec's name nor a file"
    kinds = f"{', '.join(NAMES)}, a tiny codec's .safetensors file, a Higgs tokenizer's or MOSS codec's folder, or Mimi's file or folder"
    raise ValueError(f"{path_or_name} {state}; name one of: {kinds}")
