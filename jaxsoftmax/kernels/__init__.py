"""The implementations: one module a backend, all with the signatures of `xla`."""
