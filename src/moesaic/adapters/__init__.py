"""Fine-tuned variants of a model: whole experts or low-rank parts, trained, saved, merged and served."""
