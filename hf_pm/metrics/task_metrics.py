"""How one task is scored: the table of task metrics, and the functions that compare an answer with its reference.

A score is a mean over rows, and every row has a score of its own in [0, 1], so that intervals can be had by resampling
rows. A metric of a whole set that is no mean over rows (macro F1, corpus BLEU) has no place here.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


MODULES = Path(__file__).parent / "evaluate_modules"


def same(prediction: str, reference: str) -> float:
    """1 if the two texts are equal but for white space at their ends."""
    return float(prediction.strip() == reference.strip())


def same_first_character(prediction: str, reference: str) -> float:
    """1 if both texts begin with the same character after white space; an empty text equals nothing."""
    return float(prediction.strip()[:1] == reference.strip()[:1] != "")


def common_subsequence(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of a longest common subsequence, by the bit-parallel recurrence of Hyyrö (2004).

    Bit i of `rows` is 0 if the subsequence grows by one at element i of `a`: one step on whole integers does what the
    textbook's table does element by element.
    """
    where: dict[Any, int] = {}
    for i, symbol in enumerate(a):
        where[symbol] = where.get(symbol, 0) | 1 << i
    everything = (1 << len(a)) - 1
    rows = everything
    for symbol in b:
        matches = rows & where.get(symbol, 0)
        rows = (rows + matches | rows - matches) & everything
    return len(a) - rows.bit_count()


def _overlap(common: int, prediction: Sequence[Any], reference: Sequence[Any]) -> float:
    """F1 of precision `common` / |prediction| and recall `common` / |reference|; 1 if both are empty."""
    total = len(prediction) + len(reference)
    return 2 * common / total if total else 1.0


def token_f1(prediction: str, reference: str) -> float:
    """F1 over the words both texts share, counted with repetition, as SQuAD counts (Rajpurkar et al. 2016).

    Lower case; punctuation and the articles a, an, the do not count.
    """

    def words(text: str) -> list[str]:
        text = re.sub(r"[^\w\s]|_", "", text.lower())
        return [word for word in text.split() if word not in ("a", "an", "the")]

    said, wanted = words(prediction), words(reference)
    return _overlap((Counter(said) & Counter(wanted)).total(), said, wanted)


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L of one sentence), without stemming.

    Words are runs of letters and digits in lower case, of any script.
    """
    said, wanted = (re.findall(r"[^\W_]+", text.lower()) for text in (prediction, reference))
    return _overlap(common_subsequence(said, wanted), said, wanted)


def edit_similarity(prediction: str, reference: str) -> float:
    """1 - (insertions + deletions that turn one text into the other) / (characters of both).

    TRACE takes this number, in per cent and rounded, for Py150. As there, the placeholders of that corpus
    (`<NUM_LIT:2>`, `<STR_LIT>`) are replaced by what they stand for in both texts first.
    """

    def literals(text: str) -> str:
        text = text.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", text, flags=re.DOTALL).strip()

    said, wanted = literals(prediction), literals(reference)
    return _overlap(common_subsequence(said, wanted), said, wanted)


def sari(prediction: str, reference: str, source: str) -> float:
    """SARI (Xu et al. 2016) against one reference: how well words were kept, deleted and added.

    For n = 1..4, the mean of F1 of the n-grams kept, precision of those deleted and F1 of those added, where 0/0 = 1;
    then the mean over n. Words and punctuation marks in lower case, as mteval-v13a separates them. Precision is a mean
    over different n-grams, recall of the kept ones over all of them, as in the corrected implementations.
    """
    before, said, wanted = (_mteval_words(text.lower()) for text in (source, prediction, reference))
    total = 0.0
    for n in (1, 2, 3, 4):
        s, c, r = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (before, said, wanted))
        kept, deleted, keepable = s & c, s - c, s & r
        well_kept, well_deleted = kept & r, deleted - r
        added, addable = c.keys() - s.keys(), r.keys() - s.keys()
        well_added = added & addable
        keep = _f1(
            _ratio(sum(well_kept[gram] / kept[gram] for gram in well_kept), len(kept)),
            _ratio(well_kept.total(), keepable.total()),
        )
        delete = _ratio(sum(well_deleted[gram] / deleted[gram] for gram in well_deleted), len(deleted))
        add = _f1(_ratio(len(well_added), len(added)), _ratio(len(well_added), len(addable)))
        total += (keep + delete + add) / 3
    return total / 4


def _mteval_words(text: str) -> list[str]:
    """Words and marks: a period or comma stays between digits, a hyphen and an apostrophe inside words."""
    text = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class TaskMetric(NamedTuple):
    """A row of the table.

    Args:
        needs (`str`): What the model has to do. `"teacher_forced"`: one forward pass over prompt and answer.
            `"options"`: the likelihood of every option. `"text"`: generate an answer.
        formula (`str`): Score of one row, in [0, 1]; the task's score is the mean.
        row (`Callable`, *optional*): Compares prediction and reference (and source) of one row; `None` where the pass
            itself gives the verdict.
        max_new_tokens (`int`, *optional*): All the metric looks at; `None` for the whole answer.
    """

    needs: str
    formula: str
    row: Callable[..., float] | None = None
    max_new_tokens: int | None = None


# TRACE scores C-STANCE, FOMC and both NumGLUE tasks by equal text (`exact_match`), ScienceQA by the option's letter
# (`first_character`), MeetingBank by `rougeL`, 20Minuten by `sari` and Py150 by `edit_similarity`.
TASK_METRICS: dict[str, TaskMetric] = {
    "exact_match": TaskMetric(
        "teacher_forced", "1 if the greedy answer equals the reference token by token, its end included"
    ),
    "accuracy": TaskMetric(
        "options", "1 if the option with the largest log p(option and end of sequence | prompt) is the reference", same
    ),
    "accuracy_normalized": TaskMetric(
        "options", "1 if the option with the largest log p(option and end | prompt) / tokens is the reference", same
    ),
    "first_character": TaskMetric(
        "text", "1 if the greedy answer and the reference begin with the same character", same_first_character, 8
    ),
    "f1": TaskMetric("text", "2 |words in common| / (|words of answer| + |words of reference|)", token_f1),
    "rougeL": TaskMetric("text", "2 LCS(words) / (|words of answer| + |words of reference|)", rouge_l),
    "edit_similarity": TaskMetric("text", "2 LCS(characters) / (|answer| + |reference|)", edit_similarity),
    "sari": TaskMetric("text", "mean over n = 1..4 of (F1 kept + precision deleted + F1 added n-grams) / 3", sari),
}


@cache
def load_module(metric: str) -> Any:
    """The `evaluate` module of a metric, from the package's own folder: nothing is fetched."""
    import evaluate

    return evaluate.load(str(MODULES / "task_scores.py"), metric, keep_in_memory=True)


def score_rows(
    metric: str, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
) -> list[float]:
    """Score of every row, in [0, 1], by the metric's `evaluate` module.

    Args:
        metric (`str`): A row of `TASK_METRICS` with a `row` function.
        predictions (`Sequence[str]`): What the model said.
        references (`Sequence[str]`): What it should have said.
        sources (`Sequence[str]`, *optional*): What it was given; SARI compares with it.
    """
    if not predictions:
        return []
    inputs = {"predictions": list(predictions), "references": list(references)}
    if metric == "sari":
        inputs["sources"] = list(sources)
    return load_module(metric).compute(**inputs)["scores"]
