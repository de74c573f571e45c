"""One page per purification run: what became of a corpus, for whoever has to answer for it."""
