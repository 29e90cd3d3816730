"""Run the notebooks of this folder, and check them against their sources.

A notebook is a pair: `NAME.py`, in jupytext's py:percent format, is what one edits;
`NAME.ipynb` has the same cells with the outputs of a run.

    python examples/run_notebooks.py            # run all; fails at the first error
    python examples/run_notebooks.py --quick    # with NOTEBOOK_QUICK set: fewer steps
    python examples/run_notebooks.py --write    # run all, and write the .ipynb files

Without `--write` no file is changed. Pairs whose cells differ, and stored outputs that
are missing or from cells run in another order, are errors. Runs on the CPU unless
JAX_PLATFORMS says otherwise. Needs jupytext, nbclient and ipykernel (`make notebooks`).
"""

import argparse
import os
import pathlib
import sys
import time

import jupytext
import nbclient
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
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run and check the notebooks.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--quick", action="store_true", help="set NOTEBOOK_QUICK")
    choice.add_argument("--write", action="store_true", help="write the .ipynb files")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.pop("NOTEBOOK_QUICK", None)
    if arguments.quick:
        os.environ["NOTEBOOK_QUICK"] = "1"

    found = sources()
    orphans = {p.stem for p in FOLDER.glob("*.ipynb")} - {p.stem for p in found}
    wrong = [f"{name}.ipynb has no source {name}.py" for name in sorted(orphans)]
    for source in found:
        start = time.perf_counter()
        notebook = execute(source)
        print(f"{source.stem}: ran in {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.write:
            nbformat.write(notebook, source.with_suffix(".ipynb"))
        wrong += problems(source)
    for problem in wrong:
        print(f"error: {problem} (run with --write to make it)", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
