"""`hf-pm`: run a recipe, the demo, a report, a comparison. Heavy imports wait until a command needs them."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .errors import UserError


EPILOG = "Exit code: 0 done, 2 the input is wrong (one line says how to repair it), 130 interrupted, 1 anything else."


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (the process's arguments by default), run the command, return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        options.handler(options, rest)
    except UserError as error:
        print(f"hf-pm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-pm: interrupted. Start the same command again to continue the run.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-pm", description="One language model that keeps learning.", epilog=EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, handler: Any, text: str, usage: str | None = None) -> argparse.ArgumentParser:
        more = " Every recipe key (a field of hf_pm.config.Recipe) can be given as `--key value`." if usage else ""
        command = commands.add_parser(name, help=text, description=text + more, usage=usage, allow_abbrev=False)
        command.set_defaults(handler=handler)
        return command

    add("run", run_command, "Learn the stream of a recipe, or continue it.", "hf-pm run RECIPE [--key value ...]")
    text = "Learn the embedded stream sequentially and with P&M, offline; one run folder per method."
    demo = add("demo", demo_command, text, "hf-pm demo [--output_dir DIR] [--key value ...]")
    demo.add_argument("--output_dir", default="runs/demo")
    text = "Say what a recipe will take (disk, memory, scores) and check its input, without training."
    plan = add("plan", plan_command, text, "hf-pm plan RECIPE [--key value ...]")
    plan.add_argument("recipe", help="a YAML file")
    report = add("report", report_command, "Write report.html of a run.")
    report.add_argument("run", help="a run folder")
    compare = add("compare", compare_command, "Compare runs: one table and one page.")
    compare.add_argument("runs", nargs="+", help="run folders; seeds of one method are averaged")
    compare.add_argument("--output", default="compare.html", help="the page to write")
    return parser


def run_command(options: argparse.Namespace, words: list[str]) -> None:
    from .config import parse_recipe

    # `accelerate launch scripts/train.py --config FILE` is how HF's recipes are started; the bare file is shorter.
    named = [words.pop(0)] if words and not words[0].startswith("--") else []
    while "--config" in words[:-1]:
        position = words.index("--config")
        named.append(words[position + 1])
        del words[position : position + 2]
    if len(named) > 1:
        raise UserError(f"Two recipes are given, {named[0]!r} and {named[1]!r}. Name one.")
    if not named and not words:
        raise UserError("There is no recipe. Give a YAML file: `hf-pm run recipes/bench/pm.yaml`.")
    run_recipe(parse_recipe(named[0] if named else None, words))


def run_recipe(recipe: Any) -> dict[str, Any]:
    """Train the stream of a `Recipe`; returns the content of `results.json`."""
    from .loading import build_trainer, quiet

    quiet()
    trainer = build_trainer(recipe)
    results = trainer.train_stream()
    if trainer.is_world_process_zero():
        print(f"Results, report and releases: {recipe.output_dir}")
    return results


def plan_command(options: argparse.Namespace, words: list[str]) -> None:
    from .config import parse_recipe
    from .loading import quiet
    from .plan import format_plan, plan_recipe

    quiet()
    print(format_plan(plan_recipe(parse_recipe(options.recipe, words))))


def demo_command(options: argparse.Namespace, overrides: list[str]) -> None:
    # The demo must work without a network, and must not wait for one either; read when the client is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from importlib.resources import as_file, files

    import torch

    from .comparison import write_comparison
    from .config import parse_recipe
    from .report import format_table

    # A model this small gains nothing from a second thread, and loses much where the cores are shared.
    torch.set_num_threads(1)
    runs = []
    with as_file(files("hf_pm") / "demo") as demo:
        for method in ("sequential", "pm"):
            print(f"\n== {method} ==", flush=True)
            output = Path(options.output_dir) / method
            words = ["--method", method, "--output_dir", str(output), *overrides]
            runs.append((method, output, run_recipe(parse_recipe(demo / "recipe.yaml", words))))
    page = write_comparison([output for _, output, _ in runs], Path(options.output_dir) / "compare.html")
    for method, _, results in runs:
        print(f"\n{method}\n{format_table(results)}")
    print(f"\nSide by side: {page}")


def report_command(options: argparse.Namespace, overrides: list[str]) -> None:
    from .report import write_report

    _refuse(overrides)
    print(write_report(_run_folder(options.run)))


def compare_command(options: argparse.Namespace, overrides: list[str]) -> None:
    from .comparison import compare, write_comparison

    _refuse(overrides)
    folders = [_run_folder(run) for run in options.runs]
    print(compare(folders).markdown)
    print(write_comparison(folders, Path(options.output)))


def _run_folder(name: str) -> Path:
    if not (Path(name) / "results.json").is_file():
        raise UserError(f"{name!r} is not a run folder: it has no results.json. Give the `output_dir` of a run.")
    return Path(name)


def _refuse(words: list[str]) -> None:
    if words:
        raise UserError(f"Unexpected argument {words[0]!r}. See `hf-pm --help`.")


if __name__ == "__main__":
    sys.exit(main())
