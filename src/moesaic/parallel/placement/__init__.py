"""Which experts share a rank, by what a routing trace says."""
