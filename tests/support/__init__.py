"""What tests share: oracles, cases, stand-ins for kernels."""
