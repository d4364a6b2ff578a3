"""What sample.py calls: read it when you change how a model generates.

    turns.py           where each item stands between text and audio, and how audio ends
    decode_step.py     one column: draw, feed, read; SampleConfig
    guidance.py        classifier-free guidance
    cuda_graphs.py     one graph a column on CUDA
    sessions.py        many generations at once, a row each
    dialogue.py        a full-duplex conversation as files
    reply_stream.py    a reply piece by piece
    conversation.py    turn-based chat: lookups, barge-in, logs
    command_line.py    the options of sample.py
    plan.py            what sampling needs in memory, before anything is loaded
"""
