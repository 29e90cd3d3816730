"""Functions of rows: the softmax family and cross-entropy, a file a backend."""
