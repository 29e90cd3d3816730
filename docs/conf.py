"""Settings of the documentation site, which `make docs` builds.

Its source folder is the root of the repository, not this one: links between files, such
as ../examples/language_model.ipynb, then lead to the same pages on the site as where
the repository is browsed. A linked file that is no page, such as a program, is a
download.
"""

import ast
import importlib.util
import inspect
import pathlib
import re
import textwrap

from sphinx.errors import ExtensionError

import jaxsoftmax

project = "jaxsoftmax"
author = copyright = "The jaxsoftmax authors"
version = release = jaxsoftmax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "examples/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
]
exclude_patterns = ["**/.*", "build", "dist"]
templates_path = ["_templates"]

# --- pages and notebooks --------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_dmath_double_inline = True  # as Jupyter shows $$ within a line
myst_heading_anchors = 4
nb_execution_mode = "off"  # shown with the outputs that are stored
nb_merge_streams = True
# Indented formulas are no Python. Doctests are found by their prompt all the same.
highlight_language = "none"

# --- API ------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # see signature_as_written
napoleon_numpy_docstring = False
napoleon_use_rtype = False
viewcode_line_numbers = True

# `x` in a docstring is a link if it is documented here, as `softmax` is.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),  # parameters, and what other packages document
    ("py:class", r"ArrayLike|DTypeLike|Any|Callable|Sequence|UserWarning"),
    ("py:class", r"jax\..*|jaxsoftmax\._.*"),
]

# Names of unions that are private to the package.
ALIASES = {
    "Axis": "int | Sequence[int] | None",
    "Einsum": "Callable[[str, jax.Array, jax.Array], jax.Array]",
    "Implementations": "str | Sequence[str] | None",
    "LossResult": "jax.Array | tuple[jax.Array | jaxsoftmax.LossAux, ...]",
}


def signature_as_written(app, what, name, obj, options, signature, returns):
    """The parameters and their types as in the source.

    autodoc would spell out jax.typing.ArrayLike, a union, at each of them, and show
    every overload.
    """
    if what != "function":
        return None
    tree = ast.parse(textwrap.dedent(inspect.getsource(obj)))
    function = tree.body[0]
    names = re.compile(rf"\b({'|'.join(ALIASES)})\b")
    return tuple(
        names.sub(lambda found: ALIASES[found[0]], text)
        for text in (f"({ast.unparse(function.args)})", ast.unparse(function.returns))
    )


def without_blank_end(app, doctree):
    """Removes the blank line at the end of an example, which only doctest needs."""
    for block in doctree.findall(lambda node: node.tagname == "literal_block"):
        text = block.astext().rstrip("\n")
        block.rawsource = text
        block[:] = [type(block[0])(text)] if len(block) else []


# What a page would fetch from elsewhere to be shown: links to other sites are none.
FETCHED = (
    re.compile(
        r"<(?:script|img|iframe|source|link(?=[^>]*\brel=[\"'](?:stylesheet|preload|icon))"
        r")\b[^>]*?\b(?:src|href)=[\"'](?:https?:)?//[^\"']+"
    ),
    re.compile(r"(?:@import\s+|\burl\()[\"']?(?:https?:)?//[^\"')]+"),
)


def check_offline(app, exception):
    """The site is whole without a network."""
    if exception is not None:
        return
    for path in sorted(pathlib.Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            found = {each for pattern in FETCHED for each in pattern.findall(text)}
            if found:
                raise ExtensionError(f"{path} fetches from a server: {sorted(found)}")


def setup(app):
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("doctree-read", without_blank_end)
    app.connect("build-finished", check_offline)


# --- HTML -----------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "jaxsoftmax"
# MathJax in one file that needs no fonts: formulas are drawn as SVG.
MATHJAX = pathlib.Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
html_static_path = ["_static", str(MATHJAX / "static" / "mathjax" / "tex-svg.js")]
mathjax_path = "tex-svg.js"
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_index.html"}
html_theme_options = {
    "navbar_persistent": [],  # there is a search field in the sidebar
    "show_toc_level": 2,
    "use_fullscreen_button": False,
}
maximum_signature_line_length = 88
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
