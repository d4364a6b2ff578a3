"""What serve.py calls: read it when you change how a model is served live.

    scheduler.py       one thread that steps all sessions; the clock; the queue
    limits.py          what a client may do: origins, tokens, rates, lengths
    chat_socket.py     /api/chat: the websocket of full-duplex speech models, Ogg/Opus both ways
    openai_api.py      /v1/realtime, /v1/audio/speech, /v1/chat/completions
    run_samples.py     what a training run has spoken, for the page's second view
"""
