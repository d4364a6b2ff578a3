"""How clean speech sounds: DNSMOS P.835 (Reddy et al., 2022, arXiv:2110.01763) with the weights of the package speechmos.

    dnsmos(wav, rate)       {"dnsmos": 3.1, "dnsmos_signal": 3.4, "dnsmos_background": 4.0}, each a mean opinion from 1 to 5

A network that was fitted to people's opinions hears windows of 9.01 s, one a second; a shorter recording is repeated.
Only the weights are read: pip install speechmos onnxruntime brings them (9 MB, MIT), without librosa, which speechmos itself uses.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from audio.wav import resample

RATE, SECONDS = 16_000, 9.01
CURVES = {"dnsmos": (-0.06766283, 1.11546468, 0.04602535), "dnsmos_signal": (-0.08397278, 1.22083953, 0.0052439),
          "dnsmos_background": (-0.13166888, 1.60915514, -0.39604546)}          # from the network's scale to opinions
OUTPUTS = ("dnsmos_signal", "dnsmos_background", "dnsmos")                      # in the order of the network


def missing() -> str:
    """What to say where the weights or what runs them are not installed, else nothing."""
    lacks = [name for name in ("speechmos", "onnxruntime") if not find_spec(name)]
    return f"DNSMOS needs {' and '.join(lacks)}; run: pip install -e \".[speechmos]\"" if lacks else ""


@lru_cache(maxsize=1)
def load_dnsmos() -> Any:
    """Load the network once; ValueError with the remedy where it is missing."""
    if missing():
        raise ValueError(missing())
    import onnxruntime
    path = Path(str(find_spec("speechmos").origin)).parent / "dnsmos_models/sig_bak_ovr.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def dnsmos(wav: Tensor, rate: int) -> dict[str, float]:
    """Mean opinions of a recording (1, W); {} for one without a sample."""
    sound = resample(wav.detach().float().cpu().reshape(-1), rate, RATE).clamp(-1, 1).numpy()
    if not len(sound):
        return {}
    while len(sound) < int(SECONDS * RATE):
        sound = np.append(sound, sound)
    count = int(len(sound) // RATE - SECONDS) + 1
    windows = [sound[n * RATE : int((n + SECONDS) * RATE)] for n in range(count)]
    raw = np.array([load_dnsmos().run(None, {"input_1": window[None]})[0][0] for window in windows if len(window) == int(SECONDS * RATE)],
                   dtype=np.float64)
    return {name: float(np.polyval(CURVES[name], raw[:, n]).mean()) for n, name in enumerate(OUTPUTS)}
