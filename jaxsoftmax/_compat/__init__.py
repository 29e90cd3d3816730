"""The one home of everything in jax that is version-dependent or not fully public.

A module for each topic, which other modules import by name (`from jaxsoftmax._compat
import trace`). Its docstring, or that of a function, says for which versions of jax it
was checked. Nothing here knows anything else of jaxsoftmax, and nothing is imported
here: what is slow (`jax.extend`, Pallas) waits until it is needed.
"""
