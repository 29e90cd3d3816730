"""Cross-entropy behind a linear layer."""
