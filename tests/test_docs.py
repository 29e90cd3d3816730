"""Every public name is documented, and every page of the API names what exists.

The pages are read as text: no test needs Sphinx.
"""

import importlib
import inspect
import pathlib
import re
import textwrap
import tomllib
import types

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
MODULES = ("jaxsoftmax", "jaxsoftmax.flax", "jaxsoftmax.naive")
DIRECTIVE = re.compile(r"^\.\. auto(module|function|class|exception):: (\S+)$", re.M)


def exported(module):
    """Its `__all__`, or what it binds of this package without an underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "").split(".")[0] == "jaxsoftmax"
    ]


def public_names():
    return [
        f"{name}.{member}"
        for name in MODULES
        for member in exported(importlib.import_module(name))
    ]


def found(name):
    if name in MODULES:
        return importlib.import_module(name)
    module, _, member = name.rpartition(".")
    return getattr(importlib.import_module(module), member)


def kind(value):
    """What autodoc calls it."""
    if inspect.ismodule(value):
        return "module"
    if inspect.isfunction(value):
        return "function"
    return "exception" if issubclass(value, Exception) else "class"


def section(docstring, title):
    """The names in a section of a docstring: those at its first level."""
    lines = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", re.M)
    if lines is None:
        return []
    return re.findall(r"^\*{0,2}(\w+): ", textwrap.dedent(lines[1]), re.M)


def listed():
    """(kind, name) of every directive in the pages of the API."""
    pages = sorted((DOCS / "api").glob("*.md"))
    return [entry for page in pages for entry in DIRECTIVE.findall(page.read_text())]


def test_the_public_names_are_found():
    names = public_names()
    assert {"jaxsoftmax.softmax", "jaxsoftmax.PerformanceWarning"} <= set(names)
    assert "jaxsoftmax.flax.attention_fn" in names
    assert "jaxsoftmax.naive.softmax_vjp" in names


def test_the_pages_list_every_public_name_once():
    expected = [*MODULES[1:], *public_names()]
    assert sorted(name for _, name in listed()) == sorted(expected)


@pytest.mark.parametrize(("directive", "name"), listed())
def test_a_listed_name_exists(directive, name):
    assert kind(found(name)) == directive


@pytest.mark.parametrize("name", public_names())
def test_a_docstring_has_parameters_and_an_example(name):
    value = found(name)
    docstring = inspect.getdoc(value) or ""
    assert ">>> " in docstring
    if inspect.isfunction(value):
        assert section(docstring, "Args") == list(inspect.signature(value).parameters)
    else:
        fields = getattr(value, "_fields", getattr(value, "__dataclass_fields__", ()))
        assert section(docstring, "Attributes") == list(fields)


def test_extras_that_are_named_exist():
    """In messages, pages and examples, as in jaxsoftmax[flax,cuda12]."""
    root = DOCS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = set()
    for pattern in ("jaxsoftmax/**/*.py", "docs/*.md", "examples/*.py", "*.md"):
        for path in root.glob(pattern):
            for names in re.findall(r"jaxsoftmax\[([\w,]+)\]", path.read_text()):
                named.update(names.split(","))
    assert {"cuda12", "cuda13"} < named <= extras
