"""Everything between waveform and codes: frozen codecs, usable without the rest of the repository. Start with wav.py.

    codec = load_codec("tiny")
    codes = codec.encode(wav)       # (B, 1, W) at codec.sample_rate -> (B, Q, T) int64
    wav = codec.decode(codes)       # -> (B, 1, W)
"""

from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from audio import hub
from audio.higgs import HiggsCodec, is_higgs
from audio.mimi import MimiCodec, is_mimi
from audio.moss import MossCodec, is_moss
from audio.qwen import QwenCodec, is_qwen
from audio.snac import SnacCodec, is_snac
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


OWN = ("speech_tokenizer/*", "model.pth", "tokenizer-*.safetensors", "mimi-*.safetensors")     # codec weights in official repositories
REST = ("model.safetensors", "pytorch_model.bin", "voice.safetensors", "flow/*")       # other files of a codec
NAMES = {"tiny": (TinyCodec.load, TINY), **{f"tiny:{n}": (partial(TinyCodec.load_coarse, codebooks=n), TINY) for n in range(1, 8)}}
KINDS = [                                           # (recogniser of a file or folder, loader)
    (_is_tiny, TinyCodec.load), (is_higgs, HiggsCodec.load), (is_moss, MossCodec.load), (is_snac, SnacCodec.load),
    (is_qwen, QwenCodec.load), (is_mimi, MimiCodec.load)]


def load_codec(path_or_name, device: str = "cpu", codebooks: int = 0):
    """Load a codec by name ("tiny"), from a file or folder, recognised by its content, or by hub id; ValueError otherwise.

    `codebooks`: how many of its codebooks are wanted where a codec can do with fewer (Mimi); 0 = its usual number.
    """
    if str(path_or_name) in NAMES:
        loader, path = NAMES[str(path_or_name)]
        return loader(path, device=device)
    path = from_hub(str(path_or_name)) if hub.is_id(path_or_name) else Path(path_or_name)
    for fits, loader in KINDS:
        if fits(path):
            return loader(path, device=device, **({"num_codebooks": codebooks or None} if fits is is_mimi else {}))
    kinds = "tiny, tiny:1, a tiny codec's file, the folder of a Higgs, SNAC, Qwen or MOSS codec, Mimi's file or folder, or a hub id"
    state = "contains no known codec" if path.exists() else "is neither a codec's name nor a file"
    raise ValueError(f"{path_or_name} {state}; name one of: {kinds}")


def codec_path(name: str) -> Path:
    """The file or folder of a codec, which is not opened; FileNotFoundError for a hub id that was not fetched."""
    if name in NAMES:
        return NAMES[name][1]
    return hub.snapshot(name, ["*"], local=True) if hub.is_id(name) else Path(name)


def from_hub(name: str) -> Path:
    """The folder of a codec's hub id: its own file, and only where there is none the model.safetensors that may hold much more."""
    folder = hub.snapshot(name, ["*.json", *OWN])
    return folder if any(path for mark in OWN for path in folder.glob(mark)) else hub.snapshot(name, ["*.json", *REST])
