"""Attention over a sequence that several devices share: ring attention.

Each device has its share of the positions of q, k and v. The shares of k and v go
round the ring of devices by `jax.lax.ppermute`; at every stop a device computes
attention of its queries to the keys that it has just then, and merges the result into
what it has so far by `jaxsoftmax.merge_attention`. No device ever has all keys, and
none has an array of queries x keys.

The backward pass goes round once more: with k and v travel their gradients, to which
every device adds its part. It keeps q, k, v, the result and its log-sum-exp, each for
the device's own positions.

    python examples/ring_attention.py             # half a minute on two cores
    python examples/ring_attention.py --quick     # a shorter sequence

Devices are simulated on the CPU. Value and gradients are compared with those of
`jaxsoftmax.dot_product_attention` on one device, with and without a causal mask: it is
an error if they differ, or if anything but k, v and their gradients moves. Printed are
the bytes that each device sends and the temporary memory that each program needs.
"""

import argparse
import functools
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxsoftmax import dot_product_attention, merge_attention

AXIS = "sequence"
BATCH, HEADS, KEY_HEADS, DEPTH = 1, 4, 2, 64
LENGTH, QUICK_LENGTH = 8192, 512
MIB = 2**20
TOLERANCE = 2e-5  # of the largest entry: float32, sums in another order


# --- ring attention, for use inside jax.shard_map -------------------------------------


def attend(q, k, v, diagonal):
    """Attention to one share of the keys: `out` in float32, and `lse`."""
    out, lse = dot_product_attention(q, k, v, is_causal=diagonal, return_residual=True)
    return out.astype(lse.dtype), lse


def send_on(*arrays):
    """Each device gives its arrays to the next."""
    devices = lax.axis_size(AXIS)
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return tuple(lax.ppermute(x, AXIS, ring) for x in arrays)


def comes_before(step):
    """Whether the keys that are here after `step` moves precede this device's."""
    # They come from `step` devices before, or, past device 0, from the end.
    return step <= lax.axis_index(AXIS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ring_attention(q, k, v, is_causal):
    """Attention to the keys of all devices; shapes as in `dot_product_attention`."""
    return forward(q, k, v, is_causal)[0]


def forward(q, k, v, is_causal):
    def step(state, i):
        out, lse, k, v = state
        k, v = send_on(k, v)

        def merge_part(out, lse, k, v):
            return merge_attention(out, lse, *attend(q, k, v, diagonal=False))

        if is_causal:  # a share of keys that all come later is passed on unread
            out, lse = lax.cond(
                comes_before(i), merge_part, lambda *now: now[:2], out, lse, k, v
            )
        else:
            out, lse = merge_part(out, lse, k, v)
        return (out, lse, k, v), None

    out, lse = attend(q, k, v, diagonal=is_causal)
    steps = jnp.arange(1, lax.axis_size(AXIS))
    (out, lse, *_), _ = lax.scan(step, (out, lse, k, v), steps)
    return out.astype(q.dtype), (q, k, v, out, lse)


def backward(is_causal, kept, d_out):
    q, k, v, out, lse = kept
    d_out = d_out.astype(lse.dtype)
    d_dot_out = jnp.sum(d_out * out, axis=-1)

    def gradients(k, v, diagonal):
        """What this device adds to the gradients of q, and of the k and v it has.

        The result is the sum of each part's `out` times `share`, which is how much of
        a query's weights the part has. Its derivatives are the cotangents of the part.
        """
        (part, part_lse), pull = jax.vjp(
            functools.partial(attend, diagonal=diagonal), q, k, v
        )
        share = jnp.exp(part_lse - lse)
        d_part_lse = share * (jnp.sum(d_out * part, axis=-1) - d_dot_out)
        found = pull((share[..., None] * d_out, d_part_lse))
        return tuple(x.astype(lse.dtype) for x in found)

    def step(state, i):
        dq, *travelling = state
        k, v, dk, dv = send_on(*travelling)

        def add(dq, dk, dv):
            more = gradients(k, v, diagonal=False)
            return tuple(a + b for a, b in zip((dq, dk, dv), more, strict=True))

        if is_causal:
            dq, dk, dv = lax.cond(comes_before(i), add, lambda *now: now, dq, dk, dv)
        else:
            dq, dk, dv = add(dq, dk, dv)
        return (dq, k, v, dk, dv), None

    dq, dk, dv = gradients(k, v, diagonal=is_causal)
    steps = jnp.arange(1, lax.axis_size(AXIS))
    (dq, _, _, dk, dv), _ = lax.scan(step, (dq, k, v, dk, dv), steps)
    dk, dv = send_on(dk, dv)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


ring_attention.defvjp(forward, backward)


# --- comparison with one device -------------------------------------------------------


def value_and_gradients(attention):
    """A jitted function of q, k, v and the cotangent of the result."""

    def run(q, k, v, d_out):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


def check_equal(got, want):
    names = ("out", "gradient of q", "gradient of k", "gradient of v")
    for name, x, y in zip(names, got, want, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        error = np.abs(x - y).max() / np.abs(y).max()
        assert error < TOLERANCE, f"{name}: differs by {error:.1e}"


def check_moves(compiled):
    """Nothing but `ppermute` moves arrays between the devices."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf"= .*?\b({kinds})(?:-start)?\(", compiled.as_text())
    assert set(found) == {"collective-permute"}, found


def sent_bytes(devices, k, v):
    """What each device sends: k and v in both passes, and their float32 gradients."""
    share = (k.nbytes + v.nbytes) // devices
    gradients = 4 * (k.size + v.size) // devices
    return {
        "forward": (devices - 1) * share,
        "backward": (devices - 1) * share + devices * gradients,
    }


def arrays(length):
    rng = np.random.default_rng(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)  # of q, k, v and the cotangent
    shapes = [(BATCH, length, n, DEPTH) for n in heads]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a shorter sequence")
    parser.add_argument("--length", type=int, help="positions, of all devices")
    options = parser.parse_args(argv)
    length = options.length or (QUICK_LENGTH if options.quick else LENGTH)

    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), (AXIS,), (jax.sharding.AxisType.Auto,))
    by_position = PartitionSpec(None, AXIS)
    whole = [jax.device_put(x, jax.devices()[0]) for x in arrays(length)]
    shared = [jax.device_put(x, NamedSharding(mesh, by_position)) for x in whole]

    _, k, v, _ = whole
    print(f"jax {jax.__version__}, {devices} devices, {length} positions, float32")
    print(f"{HEADS} query heads and {KEY_HEADS} key heads of depth {DEPTH}")
    for name, sent in sent_bytes(devices, k, v).items():
        print(f"each device sends, {name}: {sent / MIB:.1f} MiB")
    for is_causal in (False, True):
        ring = jax.shard_map(
            functools.partial(ring_attention, is_causal=is_causal),
            mesh=mesh,
            in_specs=(by_position,) * 3,
            out_specs=by_position,
        )
        alone = functools.partial(dot_product_attention, is_causal=is_causal)
        programs = {
            "ring, on each device": value_and_gradients(ring).lower(*shared).compile(),
            "one device": value_and_gradients(alone).lower(*whole).compile(),
        }
        got, want = (
            program(*inputs)
            for program, inputs in zip(programs.values(), (shared, whole), strict=True)
        )
        check_equal(got, want)
        assert all(x.sharding.spec == by_position for x in got)
        check_moves(programs["ring, on each device"])
        print(f"\n{'causal' if is_causal else 'every key'}: value and gradients agree")
        for name, program in programs.items():
            temporary = program.memory_analysis().temp_size_in_bytes
            print(f"  temporary memory, {name}: {temporary / MIB:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
