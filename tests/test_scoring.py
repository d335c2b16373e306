import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import COLOUR, MOOD, build, rows
from datasets import Dataset
from peft import LoraConfig

from hf_pm import PMTrainer, Task, TaskStream, UserError
from hf_pm.evaluation.answers import Filler
from hf_pm.evaluation.scoring import Cell, Scorer, metric_of
from hf_pm.metrics.task_metrics import rouge_l


ROOT = Path(__file__).parent.parent
COLOURS = ["red", "blue", "green"]
PREFIXES = {"apple": "red", "fire": "red blue", "sky": "blue", "grass": "green"}

# What `Trainer` gives a loader, here for rows without workers.
LOADING = {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None, "dataloader_pin_memory": False}


def stream_of(metric: str) -> TaskStream:
    """Options of which one begins with another, and free text."""
    options = None if metric in ("rougeL", "first_character") else ["red", "red blue", "blue", "green"]
    train, test = (rows(PREFIXES, repeat, seed) for repeat, seed in ((8, 0), (9, 1)))
    return TaskStream(
        [Task("colour", train, test, instruction="What is the colour ?", options=options, metric=metric)]
    )


@pytest.fixture
def make(model, tokenizer, lora, config):
    """A trainer whose adapter is not zero, and its scorer."""

    def trainer_and_scorer(stream, model=model, path=None, **overrides):
        trainer = PMTrainer(
            model=model, args=config(**overrides), stream=stream, processing_class=tokenizer, peft_config=lora
        )
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.5, generator=generator)
        return trainer, Scorer(trainer, trainer.rows, path)

    return trainer_and_scorer


@pytest.mark.parametrize(
    ("count", "world", "size"), [(33, 2, 8), (1, 2, 8), (16, 2, 8), (17, 3, 4), (5, 1, 2), (3, 4, 1)]
)
def test_every_rank_gets_as_many_batches(count, world, size):
    """The rows of all ranks are the rows, once each; what fills up comes last."""
    data = Dataset.from_dict({"labels": list(range(count))})
    seen, numbers = [], set()
    for rank in range(world):
        args = SimpleNamespace(process_index=rank, world_size=world, disable_tqdm=True, **LOADING)
        trainer = SimpleNamespace(args=args, _bars=False, _prepare_input=lambda batch: batch)
        trainer.stream_collator = lambda rows: {"labels": [row["labels"] for row in rows]}
        given = list(PMTrainer.batches(trainer, data, size, "label"))
        real = [batch for batch in given if not isinstance(batch, Filler)]
        assert given[: len(real)] == real and all(batch["labels"] == [0] for batch in given[len(real) :])
        mine = [label for batch in real for label in batch["labels"]]
        assert mine == list(range(rank, count, world))
        seen += mine
        numbers.add(len(given))
    assert sorted(seen) == list(range(count)) and len(numbers) == 1


def test_exact_match_of_each_row_in_the_rows_order(make):
    trainer, scorer = make(stream_of("exact_match"), per_device_eval_batch_size=5, num_train_epochs=3)
    trainer.train()
    cell = scorer.score_task(0)
    expected = []
    trainer.model.eval()
    for row in trainer.rows.test[0]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            said = trainer.model(input_ids=ids).logits[0, :-1].argmax(-1)
        wanted = labels[1:] != -100
        expected.append(float(bool((said[wanted] == labels[1:][wanted]).all())))
    assert cell.row_scores == expected
    assert 5 < sum(expected) < 31
    assert cell.score == sum(expected) / 36 and cell.rows == 36 and cell.metric == "exact_match"
    assert cell.interval[0] <= cell.score <= cell.interval[1]
    assert cell.seconds > 0 and cell.summary()["rows_per_second"] == cell.rows / cell.seconds
    assert scorer.score(0) == cell.score


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_normalized"])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_accuracy_is_the_option_with_the_largest_likelihood(make, metric, batch_size):
    trainer, scorer = make(stream_of(metric), per_device_eval_batch_size=batch_size)
    cell = scorer.score_task(0)
    tokenizer, options = trainer.encoder.tokenizer, trainer.stream[0].options
    trainer.model.eval()
    expected, chosen = [], []
    for row, text in zip(trainer.rows.test[0], trainer.rows.test_rows[0], strict=True):
        prompt = row["input_ids"][: row["labels"].count(-100)]
        scores = []
        for option in options:
            ids = [*tokenizer(option)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            total = logits.log_softmax(-1)[range(len(ids)), ids].sum()
            scores.append(float(total / len(ids) if metric == "accuracy_normalized" else total))
        chosen.append(options[scores.index(max(scores))])
        expected.append(float(chosen[-1] == text["label"]))
    assert cell.row_scores == expected
    assert len(set(chosen)) > 1


def test_the_two_accuracies_differ_in_length_only(make, monkeypatch):
    """Longer options lose by the sum and may win by the mean."""
    sums = torch.tensor([[-3.0, -4.0, -3.5, -9.0]]).repeat(36, 1)  # 2, 3, 2 and 2 tokens with the end
    monkeypatch.setattr("hf_pm.evaluation.scoring.option_log_likelihoods", lambda *args, **kwargs: sums)
    for metric, best in (("accuracy", "red"), ("accuracy_normalized", "red blue")):
        trainer, scorer = make(stream_of(metric))
        labels = trainer.rows.test_rows[0]["label"]
        assert scorer.score_task(0).row_scores == [float(label == best) for label in labels]


def test_texts_are_generated_and_compared_with_the_rows_own_label(make):
    trainer, scorer = make(stream_of("rougeL"), per_device_eval_batch_size=5, num_train_epochs=10)
    trainer.train()
    cell = scorer.score_task(0)
    tokenizer, longest = trainer.encoder.tokenizer, 3  # "red blue" and the end
    trainer.model.eval()
    expected = []
    for row, text in zip(trainer.rows.test[0], trainer.rows.test_rows[0], strict=True):
        prompt = torch.tensor([row["input_ids"][: row["labels"].count(-100)]])
        out = trainer.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                     max_new_tokens=longest, eos_token_id=2, pad_token_id=0)  # fmt: skip
        said = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        expected.append(rouge_l(said, text["label"]))
    assert cell.row_scores == expected
    assert len(set(expected)) == 3  # wrong, half of it, right
    assert cell.metric == "rougeL"


def test_a_metric_that_reads_one_character_generates_little(make, monkeypatch):
    asked = []

    def generate(model, batches, tokenizer, max_new_tokens, **kwargs):
        asked.append(max_new_tokens)
        return ["rain" for batch in batches for _ in batch["labels"]]

    monkeypatch.setattr("hf_pm.evaluation.scoring.generate_answers", generate)
    trainer, scorer = make(stream_of("first_character"))
    cell = scorer.score_task(0)
    assert cell.row_scores == [float(label.startswith("r")) for label in trainer.rows.test_rows[0]["label"]]
    assert asked == [8]


def test_classification_head(make, lora):
    lora.task_type, lora.target_modules = "SEQ_CLS", ["query", "value"]
    trainer, scorer = make(
        TaskStream([Task("mood", rows(MOOD, 8, 0), rows(MOOD, 4, 1), options=["happy", "sad", "calm"])]), build("bert")
    )
    cell = scorer.score_task(0)
    trainer.model.eval()
    expected = []
    for row in trainer.rows.test[0]:
        with torch.no_grad():
            best = int(trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax())
        expected.append(float(best == row["labels"]))
    assert cell.row_scores == expected and cell.metric == "accuracy"
    text = Task("mood", rows(MOOD, 1, 0), rows(MOOD, 1, 1), options=["happy", "sad", "calm"], metric="rougeL")
    with pytest.raises(UserError, match="`metric: rougeL` of task 'mood' compares texts, but a classification head"):
        metric_of(text, "SEQ_CLS")
    assert metric_of(text, "CAUSAL_LM") == "rougeL"


def test_options_that_a_tokenizer_joins_with_the_text_are_refused(make):
    trainer, scorer = make(stream_of("accuracy"))
    table = trainer.rows.test[0].to_list()
    table[7]["labels"][-2] = 5
    trainer.rows.test[0] = type(trainer.rows.test[0]).from_list(table)
    with pytest.raises(UserError, match="`metric: accuracy` of task 'colour' .* Use `metric: exact_match`"):
        scorer.score_task(0)


@pytest.mark.parametrize("metric, epochs", [("exact_match", 3), ("accuracy", 3), ("rougeL", 10)])
def test_answers_are_those_that_were_scored(make, metric, epochs):
    trainer, scorer = make(stream_of(metric), per_device_eval_batch_size=5, num_train_epochs=epochs)
    trainer.train()
    scores, labels = scorer.score_task(0).row_scores, trainer.rows.test_rows[0]["label"]
    assert 0 < sum(score == 1 for score in scores) < len(scores)
    order = list(range(len(labels)))[::-1]
    said = scorer.answers(0, order)
    right = [answer == labels[row] for row, answer in zip(order, said, strict=True)]
    assert right == [scores[row] == 1 for row in order]
    # Alone, in float32, a row is answered as among others.
    assert [scorer.answers(0, [row])[0] for row in order[:4]] == said[:4]
    assert len(set(said)) > 1 and scorer.answers(0, []) == []


def test_a_classifier_says_its_best_option(tokenizer, stream, config):
    trainer = PMTrainer(
        model=build("bert"),
        args=config(),
        stream=stream,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
    )
    scorer = Scorer(trainer, trainer.rows)
    for task in (0, 1):
        scores, labels = scorer.score_task(task).row_scores, trainer.rows.test_rows[task]["label"]
        said = scorer.answers(task, range(len(labels)))
        assert [float(answer == label) for answer, label in zip(said, labels, strict=True)] == scores
        assert set(said) <= set(stream[task].options)


# ---- Cells that were scored already ---------------------------------------------------------------------------------


def two_tasks():
    return TaskStream(
        [
            Task(
                "colour", rows(COLOUR, 4, 0), rows(COLOUR, 3, 1), options=["red", "blue", "green"], metric="accuracy"
            ),
            Task("mood", rows(MOOD, 4, 2), rows(MOOD, 3, 3), options=["happy", "sad", "calm"], metric="accuracy"),
        ]
    )


def forbid_scoring(trainer, monkeypatch):
    def refuse(*args):
        raise AssertionError("a cell was scored twice")

    monkeypatch.setattr(trainer, "batches", refuse)


def test_nothing_is_scored_twice_across_restarts(make, tmp_path, monkeypatch):
    path = tmp_path / "run" / "cells.json"
    trainer, scorer = make(two_tasks(), path=path)
    scorer.state_key = "after-1"
    cells = [scorer.score_task(t) for t in (0, 1)]
    assert cells[0].row_scores != cells[1].row_scores
    trainer, again = make(two_tasks(), path=path)
    again.state_key = "after-1"
    forbid_scoring(trainer, monkeypatch)
    assert [again.score_task(t) for t in (0, 1)] == cells
    assert again.cached(1) == cells[1]


@pytest.mark.parametrize("change", ["state", "data", "metric", "no key"])
def test_another_state_or_data_or_metric_is_scored_anew(make, tmp_path, monkeypatch, change):
    path = tmp_path / "run" / "cells.json"
    _, scorer = make(two_tasks(), path=path)
    scorer.state_key = "after-1"
    scorer.score_task(0)
    stream = two_tasks()
    if change == "data":
        stream[0].test = rows(COLOUR, 3, 9)
    trainer, again = make(stream, path=path)
    if change == "metric":
        again.metrics[0] = "accuracy_normalized"
    again.state_key = {"state": "after-2", "no key": None}.get(change, "after-1")
    assert again.cached(0) is None
    before = path.read_bytes()
    forbid_scoring(trainer, monkeypatch)
    with pytest.raises(AssertionError, match="scored twice"):
        again.score_task(0)
    assert path.read_bytes() == before


def test_without_a_key_nothing_is_remembered(make, tmp_path):
    path = tmp_path / "run" / "cells.json"
    trainer, scorer = make(two_tasks(), path=path)
    first = scorer.score_task(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(-1)
    assert scorer.score_task(1).row_scores != first.row_scores
    assert not path.exists()


def test_only_the_main_process_writes(make, tmp_path, monkeypatch):
    path = tmp_path / "run" / "cells.json"
    trainer, scorer = make(two_tasks(), path=path)
    scorer.state_key = "after-1"
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    cell = scorer.score_task(0)
    assert not path.exists()
    assert scorer.cached(0) == cell  # but it knows as much as the others


def test_the_file_is_small_and_keeps_every_rows_score(make, tmp_path):
    path = tmp_path / "run" / "cells.json"
    _, scorer = make(two_tasks(), path=path)
    scorer.state_key = "after-1"
    scores = [1 / 3, 0.1, 1.0, 0.0, 2 / 7] * 20
    cell = Cell(sum(scores) / 100, (0.2, 0.4), 100, "rougeL", 1.5, scores)
    scorer.remember(0, cell)
    _, again = make(two_tasks(), path=path)
    again.state_key = "after-1"
    assert again.cached(0) == cell
    assert len(path.read_text().splitlines()) < 20  # not a line a row


# ---- Several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world, total", [(2, 9), (3, 9), (4, 3), (1, 5)])
def test_shares_are_put_back_into_the_rows_order(world, total):
    scores = [i / 10 for i in range(total)]
    shares = [scores[rank::world] for rank in range(world)]
    longest = -(-total // world)

    class Accelerator:
        num_processes, device = world, "cpu"

        def gather(self, tensor):
            """What every rank's collective would put together: the bits of float64 numbers."""
            assert tensor.dtype == torch.int32 and tensor.view(torch.float64)[: len(self.share)].tolist() == self.share
            padded = [torch.tensor(s + [0.0] * (longest - len(s)), dtype=torch.float64) for s in shares]
            return torch.cat(padded).view(torch.int32)

    scorer = Scorer.__new__(Scorer)
    scorer.trainer = type("Trainer", (), {"accelerator": Accelerator()})()
    scorer.rows = type("Rows", (), {"test": [range(total)]})()
    for share in shares:
        scorer.trainer.accelerator.share = share
        assert scorer.gather(0, share) == scores


SCORE = """
import sys, json, torch
from pathlib import Path
sys.path.insert(0, "tests")
import conftest, test_scoring
from peft import LoraConfig
from hf_pm import PMConfig, PMTrainer
from hf_pm.evaluation.scoring import Scorer

torch.set_num_threads(1)
found = {}
for metric in ("exact_match", "accuracy", "rougeL"):
    args = PMConfig(output_dir=sys.argv[1], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4)
    trainer = PMTrainer(
        model=conftest.build("llama"), args=args, stream=test_scoring.stream_of(metric),
        processing_class=conftest.tokenizer.__wrapped__(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    scorer = Scorer(trainer, trainer.rows, Path(sys.argv[1]) / f"{metric}.json")
    scorer.state_key = "k"
    cell = scorer.score_task(0)
    assert scorer.cached(0) == cell
    found[metric] = cell.row_scores
# One file a rank: lines of two processes on one pipe are cut into each other.
Path(f"{sys.argv[1]}-{args.process_index}of{args.world_size}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_score_the_rows_that_one_does(tmp_path):
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    seen = {}
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
        command = [sys.executable, *launch, str(script), str(tmp_path / str(world))]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        seen[world] = [json.loads((tmp_path / f"{world}-{rank}of{world}.json").read_text()) for rank in range(world)]
    assert seen[2] == seen[1] * 2
    assert len(seen[1][0]["rougeL"]) == 36
