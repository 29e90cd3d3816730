"""Parts of a page that programs write: text between two comments of Markdown.

    <!-- begin NAME -->
    ...
    <!-- end NAME -->

What stands around them is written by hand. Imports nothing but the standard library.
"""

import argparse
import difflib
import pathlib
import re
import sys

_BLOCK = r"(?ms)^<!-- begin {0} -->\n(.*?)^<!-- end {0} -->\n"


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


def options(description, path):
    """The arguments: where the page is, and whether it is only compared."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--page", type=pathlib.Path, default=path)
    parser.add_argument(
        "--check", action="store_true", help="compare the page, and do not write it"
    )
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


def table(header, rows, align=()):
    """A table; columns from the second on are right-aligned unless `align` says."""
    marks = list(align) or ["---", *["--:"] * (len(header) - 1)]
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
