"""What every function shares: derivatives, primitives, dispatch, devices."""
