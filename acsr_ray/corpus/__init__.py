"""Images on disk: finding shards, planning units, safe decoding, publishing units."""
