"""Published task streams as tables. An id carries its source, since "order 4" means three things in the literature."""

from typing import NamedTuple

from .errors import choose
from .stream import Task, TaskStream, local_files


class Benchmark(NamedTuple):
    """One task as its benchmark defines it: where the rows are and what is asked."""

    hub_id: str
    config: str | None
    text: str
    label: str
    instruction: str
    options: list[str]


TOPIC = "What is the topic of the following paragraph?"
SENTIMENT = "What is the sentiment of the following paragraph?"
FIVE_STARS = ["very negative", "negative", "neutral", "positive", "very positive"]

# The standard continual-learning benchmark (Zhang et al. 2015) with O-LoRA's label names (arXiv 2310.14152).
BENCHMARKS: dict[str, Benchmark] = {
    "agnews": Benchmark(
        "fancyzhx/ag_news", None, "text", "label", TOPIC, ["World", "Sports", "Business", "Science or Technology"]
    ),
    # The same question as the published corpus (Zhang et al.'s Amazon reviews), asked of another one.
    "amazon": Benchmark("SetFit/amazon_reviews_multi_en", None, "text", "label", SENTIMENT, FIVE_STARS),
    "dbpedia": Benchmark(
        "fancyzhx/dbpedia_14",
        None,
        "content",
        "label",
        TOPIC,
        [
            "Company",
            "Educational Institution",
            "Artist",
            "Athlete",
            "Office Holder",
            "Mean of Transportation",
            "Building",
            "Natural Place",
            "Village",
            "Animal",
            "Plant",
            "Album",
            "Film",
            "Written Work",
        ],
    ),
    "yahoo": Benchmark(
        "community-datasets/yahoo_answers_topics",
        None,
        "question_title",
        "topic",
        TOPIC,
        [
            "Society & Culture",
            "Science & Mathematics",
            "Health",
            "Education & Reference",
            "Computers & Internet",
            "Sports",
            "Business & Finance",
            "Entertainment & Music",
            "Family & Relationships",
            "Politics & Government",
        ],
    ),
    "yelp": Benchmark("Yelp/yelp_review_full", None, "text", "label", SENTIMENT, FIVE_STARS),
}

STREAMS: dict[str, list[str]] = {
    # O-LoRA's scripts; four tasks, although the benchmark is often called "5-task".
    "olora/order1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "olora/order2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "olora/order3": ["yahoo", "amazon", "agnews", "dbpedia"],
    # Not published: the four tasks whose data can be kept locally without yahoo.
    "local/order1": ["dbpedia", "amazon", "yelp", "agnews"],
    "local/order2": ["yelp", "agnews", "dbpedia", "amazon"],
}


def load_stream(name: str, data_dir: str | None = None) -> TaskStream:
    """The stream registered under `name`.

    Args:
        name (`str`): An id of `STREAMS`.
        data_dir (`str`, *optional*): A local copy, `<data_dir>/<task>/{train,test}` with the ending `.jsonl`, `.json`,
            `.parquet` or `.csv` and the columns `text` and `label`; from the Hub by default.

    Raises:
        UserError: Unknown name, or a file that is missing from `data_dir`.
    """
    order = STREAMS[choose("`stream`", name, STREAMS)]
    # O-LoRA trains on 1,000 rows of each class.
    per_class = 1000 if name.startswith("olora/") else None
    return TaskStream([_task(task, data_dir, per_class) for task in order])


def _task(name: str, data_dir: str | None, per_class: int | None) -> Task:
    known = BENCHMARKS[name]
    if data_dir is None:
        return Task(
            name=name,
            train=known.hub_id,
            test=known.hub_id,
            text=known.text,
            label=known.label,
            instruction=known.instruction,
            options=known.options,
            config=known.config,
            train_per_class=per_class,
        )
    files = local_files(name, data_dir)
    return Task(name=name, **files, instruction=known.instruction, options=known.options, train_per_class=per_class)
