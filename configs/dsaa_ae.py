"""Sparse autoencoders on the concatenated states of DSAA, which its projectors read.

    python evaluate.py sae configs/dsaa_ae.py --run=out/dsaa
    python evaluate.py sae configs/dsaa_ae.py --smoke        on out/smoke_dsaa, the run of configs/dsaa.py --smoke

Not measured on released weights.  The reference uses (width, k) = (2048, 16) for the concatenated state and
(1024, 8) for the input of each depth step, six epochs at 1e-3; it validates on training batches, here a share is held out.
"""

from dataclasses import replace

from evaluation.sparse_autoencoder import SaeConfig

config = SaeConfig(run="out/dsaa", states=("state", "projected text"), width=2048, k=16)
smoke = replace(config, run="out/smoke_dsaa", columns=600, width=64, k=4, epochs=3, batch=64)
