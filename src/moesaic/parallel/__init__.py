"""Where expert layers run: the layout of their weights over ranks, and the exchange of tokens and weights."""
