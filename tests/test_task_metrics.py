import random
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from hf_pm.metrics.task_metrics import (
    MODULES,
    TASK_METRICS,
    common_subsequence,
    edit_similarity,
    rouge_l,
    same,
    same_first_character,
    sari,
    score_rows,
    token_f1,
)


ROOT = Path(__file__).parent.parent


def longest_by_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_common_subsequence_equals_the_textbooks_table():
    generator = random.Random(0)
    for size in range(300):
        a, b = ("".join(generator.choices("abcd", k=generator.randrange(size // 4 + 2))) for _ in range(2))
        assert common_subsequence(a, b) == longest_by_table(a, b), (a, b)
    assert common_subsequence("", "abc") == common_subsequence("abc", "") == 0
    assert common_subsequence(["red", "blue"], ["blue", "red"]) == 1


def test_texts_by_hand():
    assert same(" red ", "red\n") == 1 and same("Red", "red") == 0
    assert same_first_character("\n B. because", "B") == 1 and same_first_character("A", "B") == 0
    assert same_first_character("", "") == 0
    # the, a: no words; cat sat mat against cat sat on mat
    assert token_f1("The cat, sat: a mat!", "cat sat on the mat") == pytest.approx(2 * 3 / (3 + 4))
    assert token_f1("b b b", "b c") == pytest.approx(2 * 1 / 5)
    assert token_f1("x", "y") == token_f1("", "y") == 0
    assert token_f1("a the", "") == 1
    # cat .. on .. mat of 5 and 4 words
    assert rouge_l("The cat lay on mats, mat", "cat sat on mat") == pytest.approx(2 * 3 / (6 + 4))
    assert rouge_l("Ünïcode straße 2", "ünïcode STRASSE 2") == pytest.approx(2 * 2 / 6)
    assert rouge_l("", "") == 1 and rouge_l("", "cat") == 0
    # abc -> axc: one deletion, one insertion, 6 characters
    assert edit_similarity("abc", "axc") == pytest.approx(1 - 2 / 6)
    assert edit_similarity("f ( <NUM_LIT:2> , <STR_LIT> )", "f ( 2 ,  )") == 1
    assert edit_similarity("if x == <NUM_LIT> :", "if x == 0 :") == 1


def test_sari_by_hand():
    # words: a kept well (1), b deleted well (1), c added for d (0); pairs: nothing to keep (1), "a b" deleted well
    # (1), "a c" added for "a d" (0); three and four words: nothing to do (1)
    assert sari("a c", "a d", "a b") == pytest.approx((2 / 3 + 2 / 3 + 1 + 1) / 4)
    assert sari("the cat sat .", "The cat sat.", "a dog ran .") == 1
    # repeating the source: nothing deleted (1), nothing added of what was due (F1 of 1 and 0)
    source, reference = "a b c d e", "a b c d f"
    keep = [2 * 4 / 5 / (4 / 5 + 1), 2 * 3 / 4 / (3 / 4 + 1), 2 * 2 / 3 / (2 / 3 + 1), 2 * 1 / 2 / (1 / 2 + 1)]
    assert sari(source, reference, source) == pytest.approx(sum((k + 1 + 0) / 3 for k in keep) / 4)


def sari_by_lists(prediction, reference, source):
    """SARI with counts of lists and sums over different n-grams, written from the formulas."""

    def divide(a, b):
        return a / b if b else 1

    def f1(p, r):
        return 2 * p * r / (p + r) if p + r else 0

    total = 0
    for n in range(1, 5):
        grams = [
            [tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)]
            for t in (source, prediction, reference)
        ]
        s, c, r = (lambda gram, rows=rows: rows.count(gram) for rows in grams)
        different = {gram for rows in grams for gram in rows}
        kept = {g: min(s(g), c(g)) for g in different if s(g) and c(g)}
        good = {g: min(k, r(g)) for g, k in kept.items()}
        keep = f1(
            divide(sum(good[g] / kept[g] for g in kept), len(kept)),
            divide(sum(good.values()), sum(min(s(g), r(g)) for g in different)),
        )
        gone = {g: s(g) - c(g) for g in different if s(g) > c(g)}
        delete = divide(sum(max(k - r(g), 0) / k for g, k in gone.items()), len(gone))
        new, due = ({g for g in different if other(g) and not s(g)} for other in (c, r))
        add = f1(divide(len(new & due), len(new)), divide(len(new & due), len(due)))
        total += (keep + delete + add) / 12
    return total


def test_sari_equals_its_formulas_on_lists():
    generator = random.Random(1)
    for _ in range(200):
        texts = [" ".join(generator.choices("abcdef", k=generator.randrange(1, 12))) for _ in range(3)]
        assert sari(*texts) == pytest.approx(sari_by_lists(*texts)), texts


def test_sari_reads_words_as_mteval_does():
    # the apostrophe, the decimal point and the hyphen between letters stay; other marks are words of their own
    assert sari("it's 3.5 well-known , ok .", "It's 3.5 well-known, OK.", "x") == 1
    assert sari("1990 - 95", "1990-95", "x") == 1
    assert sari("3 . 5", "3.5", "x") < 1


def test_every_row_of_the_table():
    assert {metric.needs for metric in TASK_METRICS.values()} == {"teacher_forced", "options", "text"}
    assert next(iter(TASK_METRICS)) == "exact_match"
    for name, metric in TASK_METRICS.items():
        assert (metric.row is None) == (metric.needs == "teacher_forced"), name
    words = "red blue green 1 2 . , (x) <NUM_LIT:7>".split()
    generator = random.Random(2)
    for name, metric in TASK_METRICS.items():
        for _ in range(50 if metric.row else 0):
            texts = [" ".join(generator.choices(words, k=generator.randrange(6))) for _ in range(3)]
            texts = texts if name == "sari" else texts[:2]
            assert 0 <= metric.row(*texts) <= 1, (name, texts)
            if name != "sari" and texts[1].strip():
                assert metric.row(texts[1], texts[1]) == 1, (name, texts)


def test_through_evaluate_without_a_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    predictions, references, sources = ["red apple", "blue"], ["red", "blue"], ["red fruit", "sky"]
    assert score_rows("f1", predictions, references) == pytest.approx([2 / 3, 1])
    assert score_rows("accuracy", predictions, references, sources) == [0, 1]
    both = zip(predictions, references, sources, strict=True)
    assert score_rows("sari", predictions, references, sources) == pytest.approx([sari(*row) for row in both])
    assert score_rows("rougeL", [], []) == []
    module = evaluate.load(str(MODULES / "task_scores.py"), "rougeL", keep_in_memory=True)
    found = module.compute(predictions=predictions, references=references)
    assert found == {"rougeL": pytest.approx((2 / 3 + 1) / 2), "scores": pytest.approx([2 / 3, 1])}
    with pytest.raises(ValueError, match="must be one of .*'rougeL'.*: 'rouge'"):
        evaluate.load(str(MODULES / "task_scores.py"), "rouge")


def test_the_table_is_light_to_import():
    code = "import sys, hf_pm.metrics.task_metrics as m; m.rouge_l('a', 'b'); "
    code += "print({'numpy', 'torch', 'transformers', 'datasets', 'evaluate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
