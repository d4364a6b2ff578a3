"""One file a family: published sizes, stream table, layout, chat template, sampling rules, official files.

    family.py          what the rest of the code asks a family, and how families are found
    formats.py         the engine that turns official names and configs into ours and back
    tensor_files.py    files of tensors, read and written one tensor at a time
    adapters.py        PEFT adapters, and what readers of adapter files share
    tiny.py, tiny_clone.py                           embedded, trained on a CPU in minutes
    higgs.py, moshi.py, moss.py, qwen.py, dsaa.py, csm.py    published

`python -m families` lists them. A new family is one new file here that defines FAMILIES (family.py).
"""
