"""Write the cards in `model_cards/` from their data, with the code as it is; a test demands that they are up to date.

    python scripts/write_model_cards.py [--record RUN NAME]

`demo-lm.md` is about the model the package ships: its template is filled with what that model's files say. Each other
card is a release's: `NAME.json` holds what the card says, recorded from a run folder with `--record`.
"""

import argparse
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from safetensors import safe_open

from hf_pm.hub.cards import Card, validate_card


CARDS = Path(__file__).resolve().parents[1] / "model_cards"
# What of results.json a card reads.
READ = (
    *("schema", "method", "metric", "tasks", "stream", "matrix", "base_row", "metrics", "coefficients"),
    *("coefficient_terms", "eval_samples", "seed", "versions"),
)


def demo_facts() -> dict:
    """What the files of the embedded demo say of its model and its tasks."""
    demo = Path(str(files("hf_pm"))) / "demo"
    model = demo / "model" / "model.safetensors"
    with safe_open(model, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
    weights = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        weights += size
    tasks = yaml.safe_load((demo / "recipe.yaml").read_text())["tasks"]
    for task in tasks:
        task["rows"] = {split: len((demo / task[split]).read_text().splitlines()) for split in ("train", "test")}
    return {
        "config": json.loads((demo / "model" / "config.json").read_text()),
        "weights": weights,
        "megabytes": model.stat().st_size / 1e6,
        "tasks": tasks,
    }


def cards() -> dict[Path, str]:
    """Every card of the folder as it should be."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = (CARDS / "demo-lm.md.jinja").read_text(encoding="utf-8")
    written = {CARDS / "demo-lm.md": environment.from_string(template).render(demo_facts())}
    for data in sorted(CARDS.glob("*.json")):
        text = Card(**json.loads(data.read_text(encoding="utf-8"))).render()
        validate_card(text)
        written[data.with_suffix(".md")] = text
    return written


def record(run: str, name: str) -> None:
    """Keep what the card of a run's newest release says, without the run."""
    from hf_pm.hub.releases import Releases

    releases = Releases.open(run)
    card = asdict(releases.card(len(releases.ledger), "merged", None))
    results = card["results"]
    parity = [{"parity": task["parity"]} for task in results["per_task"]]
    card["results"] = {key: results[key] for key in READ} | {"per_task": parity}
    card["picture"] = False  # a picture is part of a release
    (CARDS / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs=2, metavar=("RUN", "NAME"))
    options = parser.parse_args()
    if options.record:
        record(*options.record)
    for path, text in cards().items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
