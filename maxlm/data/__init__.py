"""Text in, batches out: tokenizers, sources of documents, the token store, and the loader."""
