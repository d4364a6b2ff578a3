"""From recordings and texts to a prepared data set: read it when you bring your own data.

    data_config.py     DataConfig: every option of a data set
    manifest.py        rows: what may stand in them, what they must have
    layouts.py         the layouts people have -> rows
    checks.py          what is wrong with recordings; `data.py check`
    cache.py           recordings -> codes on disk
    index.py           rows -> entries with ids; `data.py prepare`
    examples.py        entries, or a prompt -> what a layout function needs
    bundled.py         small data sets made of the bundled recordings
    annotate.py        word times by Whisper, and fixing them
    phone_calls.py     stereo phone calls -> conversations; what a reply may say
    swap_tokenizer.py  a model for another tokenizer
"""
