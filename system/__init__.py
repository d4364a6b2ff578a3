"""What the machine gives: files and packages. Read it when a write has to survive a kill, or a script should say how to set up.

    setup_check.py     imported first by every script: which packages are missing, in one line
    torch_stand_in.py  why --help does not wait for torch
    tables.py          rows of parquet and Arrow files, where pyarrow is there
    unchanged.py       whether files are as they were, without opening them
    files.py           files written whole, locks, checksums
    prefetch.py        an iterator that a thread runs ahead
    progress.py        how far a long command is, and how much time is left
"""
