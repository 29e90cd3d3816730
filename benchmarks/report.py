"""Pages of what was measured, by the standard library alone: tables, parts, pictures.

A part of a page that a program writes is the text between two comments of Markdown:

    <!-- begin NAME -->
    ...
    <!-- end NAME -->

What stands around them is written by hand.
"""

import argparse
import difflib
import pathlib
import re
import sys

_BLOCK = r"(?ms)^<!-- begin {0} -->\n(.*?)^<!-- end {0} -->\n"


# --- tables ---------------------------------------------------------------------------


def table(header, rows, marks=None, space=""):
    """Lines; columns from the second on are right-aligned unless `marks` says.

    `space` is around what stands for the alignment: pages differ in that.
    """
    marks = marks or ["---", *["--:"] * (len(header) - 1)]
    rule = f"|{'|'.join(f'{space}{mark}{space}' for mark in marks)}|"
    first, *others = (
        "| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)
    )
    return [first, rule, *others, ""]


def text_table(header, rows, marks=None):
    return "\n".join(table(header, rows, marks, " ")[:-1])


def megabytes(nbytes):
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e6:.2f} MB"


def versions(result):
    return ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)


def heading(title, result, note):
    """The first lines of a page."""
    return [
        f"# {title} on {result['device']}",
        "",
        f"Made by `{result['command']}`; {versions(result)}; driver "
        f"{result['driver']}; clock: {result['clock']}. What is timed, and how, says "
        f"the program's docstring. {note}",
        "",
        *result.get("notes", []),
    ]


def not_run(name, found, columns):
    """A row of a table for a contender that did not run."""
    reason = "not run: " + found["not_run"].split("(")[0][:60]
    return [name, reason, *[""] * (columns - 2)]


def power_label(n):
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 1024}k" if n >= 1024 else str(n)


# --- pictures -------------------------------------------------------------------------


def pyplot():
    """That of matplotlib, which only pictures need, for files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def power_axis(axes, ticks):
    """Powers of 2 along x, and what is around a panel."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [power_label(n) for n in ticks])
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


# --- parts of a page that programs write ----------------------------------------------


def names(page):
    return re.findall(r"(?m)^<!-- begin (.*) -->$", page)


def block(page, name):
    """What stands between the comments of that name."""
    found = re.search(_BLOCK.format(re.escape(name)), page)
    if found is None:
        raise ValueError(f"no lines '<!-- begin {name} -->' and '<!-- end {name} -->'")
    return found[1]


def replaced(page, blocks):
    """The page with what is in `blocks`, by name, between its comments."""
    for name, text in blocks.items():
        old = block(page, name)
        begin = f"<!-- begin {name} -->\n"
        page = page.replace(begin + old, f"{begin}\n{text.strip()}\n\n")
    return page


def difference(page, blocks, counts=None):
    """Lines of a diff from the page to what it should be; empty if they agree.

    `counts`, if given, says of a line of the page whether it is compared.
    """
    pair = (page.splitlines(), replaced(page, blocks).splitlines())
    compared = [list(filter(counts, lines)) if counts else lines for lines in pair]
    return list(difflib.unified_diff(*compared, "page", "measured", lineterm=""))


def options(description, path, **flags):
    """The arguments: where the page is, whether it is only compared, and `flags`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--page", type=pathlib.Path, default=path)
    flags["check"] = "compare the page, and do not write it"
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def finish(path, blocks, *, check, counts=None):
    """Writes the page; or, to check, compares some blocks. Returns the exit status."""
    page = path.read_text()
    if not check:
        if sorted(names(page)) != sorted(blocks):
            raise ValueError(f"{path} has {names(page)}, there are {list(blocks)}")
        path.write_text(replaced(page, blocks))
        return 0
    lines = difference(page, blocks, counts)
    if lines:
        print("\n".join(lines))
        command = f"python {sys.argv[0]}"
        print(f"error: {path} disagrees; to write it: {command}", file=sys.stderr)
    return 1 if lines else 0
