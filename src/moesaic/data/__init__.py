"""Text -> documents -> tokenizer -> memory-mapped tokens -> batches."""

from moesaic.data.batches import Batches, validation_windows
from moesaic.data.documents import Corpus, Document, Skipped
from moesaic.data.sources import load_corpus
from moesaic.data.split import split_corpus
from moesaic.data.tokenizer import check_fits, encode_documents, load_tokenizer, train_tokenizer
from moesaic.data.tokens import Count, TokenData, prepare

__all__ = [
    "Batches",
    "Corpus",
    "Count",
    "Document",
    "Skipped",
    "TokenData",
    "check_fits",
    "encode_documents",
    "load_corpus",
    "load_tokenizer",
    "prepare",
    "split_corpus",
    "train_tokenizer",
    "validation_windows",
]
