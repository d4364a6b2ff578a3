"""Folders of the Hugging Face hub, fetched or found in its local cache.

    is_id("bosonai/higgs-audio-v2-tokenizer")                           OWNER/NAME, and no local file of that name
    snapshot("bosonai/higgs-audio-v2-tokenizer", ["*.json", "*.pth"])   -> the folder with those files
    torch_tensors("model.pth")                                          the tensors of a file that torch.save wrote

HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT are honoured. huggingface_hub is imported when an id is asked for, not before.
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES = (".json", ".jsonl", ".model", ".pt", ".pth", ".bin", ".safetensors", ".wav")     # ends of file names, not of ids


def is_id(name: str | Path) -> bool:
    """Whether a name can be a hub id: OWNER/NAME that is no path of this machine."""
    fits = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None
    return fits and not str(name).endswith(FILES) and not Path(name).exists() and not Path(name).parent.is_dir()


def snapshot(name: str, patterns: Sequence[str], local: bool = False) -> Path:
    """The folder of a hub id with the files of some patterns; `local` looks into the cache only.

    FileNotFoundError, one line with the command that fetches it, where it is neither cached nor can be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), local_files_only=local))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        folder, _, rest = str(name).partition("/")
        fetch = f"OWNER/{rest} --local-dir {name}" if folder == "models" else name         # where our configs keep what was fetched
        raise FileNotFoundError(f"{name} is neither a folder here nor can it be fetched ({type(error).__name__}); "
                                + f"when online run: hf download {fetch}") from None


def torch_tensors(path: Path, unread: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote (.pth, .pt, .bin), without those of the names `unread`."""
    state = torch_file(path)
    state = {name: value for name, value in state.items() if name not in unread} if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds more than a dict of tensors; save its state_dict() alone, or fetch its .safetensors")
    return state


def torch_file(path: Path) -> Any:
    """What torch.save wrote, mapped where its format allows it; nothing that stands in it is run. ValueError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:                      # torch raises whatever the file makes it raise
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} cannot be read as weights ({reason}); fetch it again") from None
