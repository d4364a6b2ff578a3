"""Text <-> ids, usable alone: what a string becomes before a model reads it, and when each word is said.

    normalisers.py     versioned rewriting of texts
    tokenizers.py      bytes, word lists, SentencePiece, tokenizer.json
    word_times.py      words with times -> the text row of an aligned grid
    conversation.py    messages -> segments, by the chat template of a family
    coverage.py        how well a tokenizer covers the texts of a data set
"""
