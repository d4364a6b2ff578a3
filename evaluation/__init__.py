"""What evaluate.py calls: read it when you want to know how good a run is.

    verify.py                is a checkpoint what it says, on this machine?
    consistency.py           whether sampling is the model that was trained: prompts, drawn ids, cached logits
    metrics.py               WER, CER, BLEU, ROUGE, bootstrap, paired tests
    speech_measures.py       recordings of known texts: error rates, similarity, DNSMOS, durations, loops
    speech_report.py         lists spoken and measured, systems compared and listened to
    duplex_measures.py       latency, overlap and padding of full-duplex conversations
    report.py                the evaluation report: losses, replies, slices
    html_page.py             one HTML page with curves and players
    minimal_pairs.py         likelihoods of pairs and spoken choices
    representations.py       how states resemble each other, how the loss bends
    sparse_autoencoder.py    sparse autoencoders of a model's states
"""
