"""From recordings and texts to a prepared data set: read it when you bring your own data.

    data_config.py     DataConfig: every option of a data set
    manifest.py        rows: their fields and what they must have
    layouts.py         the layouts people have -> rows
    checks.py          faults of recordings; `data.py check`
    cache.py           recordings -> codes on disk
    index.py           rows -> entries with ids; `data.py prepare`
    examples.py        entries, or a prompt -> examples for a layout function
    bundled.py         small data sets made from the bundled recordings
    annotate.py        transcripts and word times by Whisper, and fixing them
    phone_calls.py     phone calls -> conversations; invented facts in replies
    swap_tokenizer.py  replace the tokenizer of a model
"""
