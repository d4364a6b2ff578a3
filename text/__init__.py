"""Text <-> ids, usable alone: normalisation, tokenization, word times, chat templates. Read it when you change what a prompt says.

    normalisers.py     versioned normalisation of texts
    tokenizers.py      bytes, word lists, SentencePiece, tokenizer.json
    word_times.py      words with times -> the text row of an aligned grid
    conversation.py    messages -> segments, by the chat template of a family
    chat_formats.py    conversations as other tools write them -> messages; pairs of replies
    figures.py         figures by value: numbers, money, times, dates
    personal.py        personal data, found and masked
    passages.py        passages of documents that belong to a question
    coverage.py        how well a tokenizer covers the texts of a data set
"""
