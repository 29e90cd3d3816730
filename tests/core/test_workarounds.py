"""Faults of jax and XLA that the package works around, a test for each.

A test passes while the fault is there. One that fails says that the workaround which it
names can go, once no supported version of jax has the fault.
"""

import functools
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import jet

# In a process of its own: here the package has added its rules to jet's table.
_JET = """
import jax, jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
"""


def _gone(workaround: str) -> str:
    return f"jax {jax.__version__} no longer has the fault: see {workaround}"


class TestJet:
    """`_compat.primitive` adds the rules; `row_loss.within_range` avoids a clamp."""

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            ("jax.checkpoint(jnp.sin)", "KeyError"),
            ("lambda x: checkpoint_name(jnp.sin(x), 'sin')", "KeyError"),
            # https://github.com/jax-ml/jax/issues/30352
            ("jax.nn.relu", "UnexpectedTracerError"),
        ],
    )
    def test_without_rules(self, call, error):
        program = f"{_JET}\njet.jet({call}, (1.0,), ([1.0],))"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True
        )
        assert error in done.stderr, _gone("_complete_jet")

    @pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="mended in jax 0.12")
    def test_bound_without_dimensions(self):
        with pytest.raises(TypeError, match="same shapes"):
            jet.jet(
                lambda x: jnp.minimum(x, jnp.float32(3)),
                (jnp.ones(3),),
                ([jnp.ones(3)],),
            )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="faults of XLA for CPU")
class TestXlaForCpu:
    """Whether an array is written to memory: its bytes among the temporary ones."""

    @staticmethod
    def compiled(f, *arrays):
        structs = [jax.ShapeDtypeStruct(*each) for each in arrays]
        return jax.jit(f).lower(*structs).compile()

    @classmethod
    def temporary(cls, f, *arrays):
        return cls.compiled(f, *arrays).memory_analysis().temp_size_in_bytes

    @staticmethod
    def derivative(p, t):
        return p * (t - jnp.sum(p * t, -1, keepdims=True))

    @classmethod
    def selecting(cls, p, t):
        return jnp.where(p == 0, 0, cls.derivative(p, jnp.where(p == 0, 0, t)))

    def test_a_select_is_not_fused_with_a_sum_of_rows(self):
        """`_rows.xla.softmax_derivative` does without."""
        x = (256, 4096), "float32"
        assert self.temporary(self.derivative, x, x) < 2**20
        assert self.temporary(self.selecting, x, x) >= 2**22, _gone("_rows.xla")

    def test_a_branch_has_memory_of_its_own(self):
        """`_rows.xla` has a loop of no steps instead, which has that of a piece.

        Whether out is copied too depends on the order of the branches:
        https://github.com/jax-ml/jax/issues/39449.
        """

        def again(p, t):
            out = self.derivative(p, t)
            isnan = jnp.isnan(out[:, 0]).any()
            return lax.cond(isnan, lambda: self.selecting(p, t), lambda: out)

        x = (256, 4096), "float32"
        assert self.temporary(again, x, x) >= 2**22, _gone("_rows.xla")

    def test_a_maximum_of_converted_entries_writes_them(self):
        """`_rows.xla_loss` takes the maximum of the entries as they are."""

        def sums(dtype, x):
            wide, place = x.astype("float32"), lax.broadcasted_iota("int32", x.shape, 1)
            row_max = jnp.max(x.astype(dtype), -1, keepdims=True).astype("float32")
            return jnp.sum(jnp.where(place == 7, 0, jnp.exp(wide - row_max)), -1)

        def written(dtype):
            f = functools.partial(sums, dtype)
            program = self.compiled(f, ((256, 4096), "bfloat16")).as_text()
            program = program[program.index("ENTRY") :]
            return len(re.findall(r"= f32\[256,4096\]", program))

        assert written("bfloat16") == 1
        assert written("float32") == 2, _gone("xla_loss._rows")

    def test_products_of_16_bits_copy_their_operands(self):
        """`_linear.rules` computes the gradient of logits in float32 to begin with."""

        def product(x, d):
            return lax.dot_general(x, d, (((0,), (0,)), ((), ())))

        x, d = ((512, 64), "bfloat16"), ((512, 2048), "bfloat16")
        copies = 4 * 512 * (64 + 2048)
        assert self.temporary(product, x, d) >= copies, _gone("_gradients_of_group")

    @pytest.mark.slow  # it looks at the clock
    def test_columns_are_not_computed_in_vectors(self):
        """`row_loss.in_vectors` has them as rows."""
        log1p = jax.jit(jnp.log1p)

        def seconds(x):
            start = time.perf_counter()
            jax.block_until_ready(log1p(x))
            return time.perf_counter() - start

        row = jnp.linspace(0, 1, 2**16)
        column = row[:, None]
        ratios = []
        for _ in range(5):
            times = [[seconds(x) for _ in range(10)] for x in (row, column)]
            ratios.append(min(times[1]) / min(times[0]))
        assert max(ratios) > 2, _gone("in_vectors")

    @pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="mended in jax 0.11")
    def test_all_of_what_a_piece_is_written_to_is_converted(self):
        """`_linear.rules` computes weights' gradients in float32."""

        def write(whole, part, i):
            return lax.dynamic_update_slice(whole, part[None], (i, 0, 0))

        arrays = ((8, 64, 16), "bfloat16"), ((64, 16), "bfloat16"), ((), "int32")
        structs = [jax.ShapeDtypeStruct(*each) for each in arrays]
        program = jax.jit(write, donate_argnums=0).lower(*structs).compile()
        assert re.search(r"f32\[8,64,16\]\S* convert", program.as_text()), _gone(
            "_gradients_of_group"
        )


def test_reduce_precision_has_no_subnormals():
    """`_attend.call` rounds those of float16 itself."""
    x = jnp.float32(2.0**-20)
    assert x.astype("float16").astype("float32") == x
    rounded = jax.jit(
        functools.partial(lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    )(x)
    assert rounded == 0, _gone("_attend.call")


class TestCudnn:
    def test_lse_has_16_bits(self, monkeypatch):
        """`_compat.cudnn` calls what jax.nn calls, which has it in float32."""

        def cudnn(query, *_, **__):
            batch, queries, heads, _ = query.shape
            return query, jnp.zeros((batch, heads, queries), "float32")

        name = "jax._src.nn.functions.cudnn_dot_product_attention"
        monkeypatch.setattr(name, cudnn)
        x = jax.ShapeDtypeStruct((1, 8, 2, 8), "bfloat16")
        options = {"implementation": "cudnn", "return_residual": True}
        f = functools.partial(jax.nn.dot_product_attention, **options)
        _, lse = jax.eval_shape(f, x, x, x)
        assert lse.dtype == "bfloat16", _gone("_compat.cudnn")

    @pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
    def test_gradients_beyond_the_lengths_are_not_written(self):
        """`_attend.cudnn` puts 0 there."""
        x = jnp.ones((1, 128, 2, 64), "bfloat16")
        lengths = jnp.array([64], "int32")
        options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        f = functools.partial(
            jax.nn.dot_product_attention, implementation="cudnn", **options
        )
        gradient = jax.jit(lambda x, g: jax.vjp(lambda k: f(x, k, x), x)[1](g)[0])
        gradient(x, x).block_until_ready()
        # What is freed is what the next call writes to.
        for each in [jnp.full(x.shape, np.nan, x.dtype) for _ in range(64)]:
            each.block_until_ready().delete()
        assert (gradient(x, x)[:, 64:] != 0).any(), _gone("_attend.cudnn")


_GATHER_IN_A_PART = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

def part(x):
    here = jax.sharding.get_abstract_mesh()
    x = jax.lax.with_sharding_constraint(x, NamedSharding(here, P("c", "b")))
    return jnp.take_along_axis(x, jnp.argmax(x, -1, keepdims=True), -1, mode="clip")

f = jax.shard_map(
    part, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"},
    check_vma=False,
)
jax.jit(f).lower(jnp.ones((8, 16))).compile()
"""


def test_a_gather_in_a_part_of_a_mesh():
    """`_RowOperation.lower` has XLA partition no gather there: it aborts."""
    done = subprocess.run(
        [sys.executable, "-c", _GATHER_IN_A_PART], capture_output=True, text=True
    )
    assert "Check failed" in done.stderr, _gone("_RowOperation.lower")
