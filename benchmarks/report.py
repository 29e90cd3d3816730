"""Tables and pictures of what was measured, by the standard library alone."""


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(header))))
    lines[-1] += "|"
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, ""]


def megabytes(nbytes):
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e6:.2f} MB"


def heading(title, result, note):
    """The first lines of a page."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    return [
        f"# {title} on {result['device']}",
        "",
        f"Made by `{result['command']}`; {versions}; driver {result['driver']}; clock: "
        f"{result['clock']}. What is timed, and how, says the program's docstring. "
        f"{note}",
        "",
        *result.get("notes", []),
    ]


def not_run(name, found, columns):
    """A row of a table for a contender that did not run."""
    reason = "not run: " + found["not_run"].split("(")[0][:60]
    return [name, reason, *[""] * (columns - 2)]


def power_label(n):
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 1024}k" if n >= 1024 else str(n)
