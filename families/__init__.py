"""One file a family: published sizes, stream table, layout, chat template, sampling rules, official files.

    family.py          the interface of a family, and how families are found
    folder_files.py    files beside official weights: what a checkpoint keeps and an export carries
    other_trainers.py  configs of other trainers, as options of train.py
    formats.py         conversion of official names and configs, in both directions
    tensor_files.py    files of tensors, read and written one tensor at a time
    adapters.py        PEFT adapters, and helpers for other adapter files
    tiny.py, tiny_clone.py, tiny_duplex.py           embedded, trained on a CPU in minutes
    higgs.py, moshi.py, personaplex.py, kyutai.py, moss.py, qwen.py, dsaa.py, csm.py, orpheus.py, higgs_v3.py,
    qwen_tts.py        published

`python -m families` lists them. A new family is one new file here that defines FAMILIES (family.py). Read it when you
add a model or change how an official file is read.
"""
