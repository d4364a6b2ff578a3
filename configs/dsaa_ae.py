"""Sparse autoencoders on the joined states of DSAA: which directions its projectors read.

    python evaluate.py sae configs/dsaa_ae.py --run=out/dsaa
    python evaluate.py sae configs/dsaa_ae.py --smoke        on out/smoke_dsaa, which configs/dsaa.py --smoke leaves

Needs: not yet measured.  Expect: not yet measured.  The reference codes the joined state with (2048, 16) and each depth step's
input with (1024, 8), six epochs at 1e-3; its validation read batches that were trained on, here a share is held out.
"""

from dataclasses import replace

from evaluation.sparse_autoencoder import SaeConfig

config = SaeConfig(run="out/dsaa", states=("state", "projected text"), width=2048, k=16)
smoke = replace(config, run="out/smoke_dsaa", columns=600, width=64, k=4, epochs=3, batch=64)
