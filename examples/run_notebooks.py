"""Run the notebooks of this folder, and check them against their sources.

A notebook is a pair: `NAME.py`, in jupytext's py:percent format, is what one edits;
`NAME.ipynb` has the same cells with the outputs of a run.

    python examples/run_notebooks.py            # run all; fails at the first error
    python examples/run_notebooks.py --quick    # with NOTEBOOK_QUICK set: fewer steps
    python examples/run_notebooks.py --write    # run all, and write the .ipynb files
    python examples/run_notebooks.py identity   # run this one

Without `--write` no file is changed. Pairs whose cells differ, and stored outputs that
are missing or from cells run in another order, are errors. Runs on the CPU unless
JAX_PLATFORMS says otherwise. Needs jupytext, nbclient and ipykernel (`make notebooks`).
"""

import argparse
import concurrent.futures
import os
import pathlib
import sys
import time

import jupytext
import nbclient
import nbclient.exceptions
import nbformat

FOLDER = pathlib.Path(__file__).parent
TIMEOUT = 600  # seconds a cell may take


def sources() -> list[pathlib.Path]:
    """The .py files that are notebooks: those with jupytext's header."""
    found = sorted(FOLDER.glob("*.py"))
    return [path for path in found if path.read_text().startswith("# ---\n# jupyter:")]


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def problems(source: pathlib.Path) -> list[str]:
    """What is wrong with the .ipynb of `source`."""
    path = source.with_suffix(".ipynb")
    if not path.exists():
        return [f"{path.name} is missing"]
    stored = nbformat.read(path, as_version=4)
    if cells(stored) != cells(jupytext.read(source)):
        return [f"{path.name} and {source.name} have different cells"]
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        return [f"{path.name}: not all cells were run, or not in order"]
    kinds = {output.output_type for cell in code for output in cell.outputs}
    return [f"{path.name} has an error in its outputs"] if "error" in kinds else []


def execute(source: pathlib.Path) -> nbformat.NotebookNode:
    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # random ones would differ in every run
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        coalesce_streams=True,  # or how often a cell flushes is stored too
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute()


def run(source: pathlib.Path, write: bool) -> tuple[float, list[str]]:
    """Seconds that the notebook took, and what is wrong with it."""
    start = time.perf_counter()
    try:
        notebook = execute(source)
    except nbclient.exceptions.CellExecutionError as error:
        return time.perf_counter() - start, [f"{source.name} failed:\n{error}"]
    seconds = time.perf_counter() - start
    if write:
        nbformat.write(notebook, source.with_suffix(".ipynb"))
    hint = "(run with --write to make it)"
    return seconds, [f"{problem} {hint}" for problem in problems(source)]


def named(names: list[str]) -> list[pathlib.Path]:
    """The notebooks of these names, or all; an error says which there are."""
    found = {path.stem: path for path in sources()}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SystemExit(
            f"error: no notebook {unknown[0]!r}; there are {', '.join(found)}"
        )
    return [found[name] for name in names or found]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run and check the notebooks.")
    parser.add_argument("names", nargs="*", help="which to run (default: all)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--quick", action="store_true", help="set NOTEBOOK_QUICK")
    choice.add_argument("--write", action="store_true", help="write the .ipynb files")
    parser.add_argument("--jobs", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.pop("NOTEBOOK_QUICK", None)
    if arguments.quick:
        os.environ["NOTEBOOK_QUICK"] = "1"
        # Most of the time of a short run is compilation.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

    chosen = named(arguments.names)
    orphans = {p.stem for p in FOLDER.glob("*.ipynb")} - {p.stem for p in sources()}
    wrong = [f"{name}.ipynb has no source {name}.py" for name in sorted(orphans)]
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        runs = {pool.submit(run, path, arguments.write): path for path in chosen}
        for done in concurrent.futures.as_completed(runs):
            seconds, found = done.result()
            print(f"{runs[done].stem}: ran in {seconds:.0f} s", flush=True)
            wrong += found
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
