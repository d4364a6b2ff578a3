"""Parts of a model that only some families have, and what the blocks of a stack share. Read a file when model.py uses it.

    architecture.py    StackConfig, ModelConfig: a model in numbers
    batch_plan.py      attention masks, positions and routing of a batch, computed once
    conditioning.py    low-rank embeddings, conditions, voices (Moshi's relatives)
    fusion.py          a frozen text model beside the temporal transformer (DSAA)
    depth.py           depth transformers: Moshi's, and one that reads a prefix (CSM)
    int8_base.py       a frozen base of 8 bits
    contrastive.py     the contrastive term for voice cloning
"""
