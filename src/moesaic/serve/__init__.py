"""Many requests, one model: the engine, and the server around it."""
