"""Published task streams as tables. An id carries its source, since "order 4" means three things in the literature.

What is pinned is quoted from public code; what could not be checked says so beside it.
"""

from typing import Any, NamedTuple

from ..errors import UserError, choose
from .formats import definition, local_files
from .stream import Task, TaskStream


class Benchmark(NamedTuple):
    """One task as its benchmark defines it.

    Args:
        instruction (`str`): First line of the prompt; empty where the data bring their own.
        options (`list[str]`, *optional*): The answers, in the order in which they are printed.
        template (`str`, *optional*): The prompt of `prompt: published`.
        folders (`tuple[str]`): Where the authors' own files lie below `data_dir`, if not under the task's name.
        train_size (`int`): Training rows as published.
        test_size (`int`, *optional*): Test rows as published; `None` where that could not be checked.
        hub (`dict`, *optional*): Where the rows are on the Hub, as the arguments of a `Task`; `None` if nowhere known.
        metric (`str`): How the benchmark scores it, a row of `task_metrics.TASK_METRICS`.
        epochs (`float`, *optional*): Where the benchmark fixes them.
        cut (`str`): Where a text that is too long is cut.
    """

    instruction: str
    options: list[str] | None
    template: str | None
    folders: tuple[str, ...]
    train_size: int
    test_size: int | None
    hub: dict[str, Any] | None = None
    metric: str = "exact_match"
    epochs: float | None = None
    cut: str = "end"


# ---- Standard and long sequence: the 15 classification tasks of Progressive Prompts (arXiv 2301.12314) --------------
# Prompts, answers and their order as in O-LoRA's repository (arXiv 2310.14152): instruction_config, uie_dataset_lora,
# uie_collator and labels.json. Training sets have at most 1,000 rows of each class; the papers select on 500 more of
# each (`validation_samples: 500` here), but in the files of O-LoRA and SAPT the validation split is the test split.
# Test sets have at most 7,600 rows; which ones of a larger set was not recorded, so ours are drawn anew.
# Test rows of rte, cb, wic, copa, boolqa, multirc, sst2, mnli and qqp come from the public validation splits.
# The published rows of agnews, amazon, dbpedia, yahoo and yelp end with a line break, which the Hub's do not have.
TRAIN_PER_CLASS = 1000

TOPIC = "What is the topic of the following paragraph?"
SENTIMENT = "What is the sentiment of the following paragraph?"
INFERENCE = 'What is the logical relationship between the "sentence 1" and the "sentence 2"?'
PARAPHRASE = 'Whether the "first sentence" and the "second sentence" have the same meaning?'
YES_NO = "According to the following passage, is the question true or false?"
READING = "According to the following passage and question, is the candidate answer true or false?"
SENSE = "Given a word and two sentences, whether the word is used with the same sense in both sentence?"

FIVE_STARS = ["very negative", "negative", "neutral", "positive", "very positive"]
# The names of the task and the dataset come first: with them the model is told which task it has before it.
OLORA = "Task:%s\nDataset:%s\n{instruction} Choose one from the option.\nOption: {options} \n{text}\nAnswer:"
OLORA_BARE = "Task:%s\nDataset:%s\n{text}\nAnswer:"

# Revisions that public code pins (each found in several repositories).
GLUE = {"train": "nyu-mll/glue", "revision": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", "test_split": "validation"}
SUPER_GLUE = {
    "train": "aps/super_glue",
    "revision": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "test_split": "validation",
}
PAIR = "sentence 1: {premise}\nsentence 2: {hypothesis}"

CLASSIFICATION: dict[str, Benchmark] = {
    "agnews": Benchmark(
        TOPIC,
        ["World", "Sports", "Business", "Science or Technology"],
        OLORA % ("TC", "agnews"),
        ("TC/agnews", "Long_Sequence/agnews"),
        4000,
        7600,
        # Title and text are one column here; the published rows are `Title: ...\nText: ...`.
        {"train": "fancyzhx/ag_news", "revision": "eb185aade064a813bc0b7f42de02595523103ca4", "text": "Text: {text}"},
    ),
    "amazon": Benchmark(
        SENTIMENT,
        FIVE_STARS,
        OLORA % ("SC", "amazon"),
        ("SC/amazon", "Long_Sequence/amazon"),
        5000,
        7600,
        {
            "train": "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
            "revision": None,  # No public code that pins it was found: the rows are whatever the Hub has today.
            "text": "Title: {review_title}\nText: {review_text}",
            "label": "class_index",
            "label_names": dict(zip("12345", FIVE_STARS, strict=True)),
            "test_samples": 7600,
        },
    ),
    "boolqa": Benchmark(
        YES_NO,
        ["True", "False"],
        OLORA % ("BoolQA", "BoolQA"),
        ("boolq", "BoolQA/BoolQA", "Long_Sequence/boolq"),
        2000,
        3270,
        SUPER_GLUE
        | {
            "config": "boolq",
            "text": "question: {question}\npassage: {passage}",
            "label_names": ["False", "True"],
        },
    ),
    "cb": Benchmark(
        INFERENCE,
        ["entailment", "contradiction", "neutral"],
        OLORA % ("NLI", "CB"),
        ("NLI/CB", "Long_Sequence/cb"),
        250,
        56,
        SUPER_GLUE | {"config": "cb", "text": PAIR},
        cut="middle",  # the second sentence is the shorter one, and comes last
    ),
    "copa": Benchmark(
        "",  # The question names its two answers itself.
        ["A", "B"],
        OLORA_BARE % ("COPA", "COPA"),
        ("COPA/COPA", "Long_Sequence/copa"),
        400,
        100,
        SUPER_GLUE
        | {
            "config": "copa",
            "text": 'Which sentence is the {question} of "{premise}"? Choose one between A and B.\n'
            "A: {choice1}\nB: {choice2}",
        },
    ),
    "dbpedia": Benchmark(
        TOPIC,
        [
            *("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation"),
            *("Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
        ],
        OLORA % ("TC", "dbpedia"),
        ("TC/dbpedia", "Long_Sequence/dbpedia"),
        14000,
        7600,
        {
            "train": "fancyzhx/dbpedia_14",
            "revision": "9abd46cf7fc8b4c64290f26993c540b92aa145ac",
            "text": "Title: {title}\nText: {content}",
            "test_samples": 7600,
        },
    ),
    "imdb": Benchmark(
        SENTIMENT,
        ["Good", "Bad"],
        OLORA % ("SC", "IMDB"),
        ("SC/IMDB", "Long_Sequence/imdb"),
        2000,
        7600,
        {
            "train": "stanfordnlp/imdb",
            "revision": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
            "label_names": ["Bad", "Good"],
            "test_samples": 7600,
        },
    ),
    "mnli": Benchmark(
        INFERENCE,
        ["neutral", "entailment", "contradiction"],
        OLORA % ("NLI", "MNLI"),
        ("NLI/MNLI", "Long_Sequence/mnli"),
        3000,
        7600,
        GLUE
        | {
            "config": "mnli",
            "test_split": "validation_matched",
            "text": PAIR,
            "label_names": ["entailment", "neutral", "contradiction"],
            "test_samples": 7600,
        },
        cut="middle",
    ),
    "multirc": Benchmark(
        READING,
        ["False", "True"],
        OLORA % ("MultiRC", "MultiRC"),
        ("MultiRC/MultiRC", "Long_Sequence/multirc"),
        2000,
        4848,
        SUPER_GLUE
        | {
            "config": "multirc",
            "text": "paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}",
        },
        cut="middle",  # the candidate answer comes last
    ),
    "qqp": Benchmark(
        PARAPHRASE,
        ["False", "True"],
        OLORA % ("QQP", "QQP"),
        ("QQP/QQP", "Long_Sequence/qqp"),
        2000,
        7600,
        GLUE
        | {
            "config": "qqp",
            "text": "first sentence: {question1}\nsecond sentence: {question2}",
            "test_samples": 7600,
        },
    ),
    "rte": Benchmark(
        INFERENCE,
        ["contradiction", "entailment"],  # so published: `contradiction` stands for "not entailed"
        OLORA % ("NLI", "RTE"),
        ("NLI/RTE", "Long_Sequence/rte"),
        2000,
        277,
        SUPER_GLUE | {"config": "rte", "text": PAIR, "label_names": ["entailment", "contradiction"]},
        cut="middle",
    ),
    "sst2": Benchmark(
        SENTIMENT,
        ["Good", "Bad"],
        OLORA % ("SC", "SST-2"),
        ("SC/SST-2", "Long_Sequence/sst2"),
        2000,
        872,
        GLUE | {"config": "sst2", "text": "Text: {sentence}", "label_names": ["Bad", "Good"]},
    ),
    "wic": Benchmark(
        SENSE,
        ["True", "False"],
        OLORA % ("WiC", "WiC"),
        ("WiC/WiC", "Long_Sequence/wic"),
        2000,
        638,
        SUPER_GLUE
        | {"config": "wic", "text": "word: {word}\n{sentence1}\n{sentence2}", "label_names": ["False", "True"]},
    ),
    "yahoo": Benchmark(
        TOPIC,
        [
            *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference"),
            *("Computers & Internet", "Sports", "Business & Finance", "Entertainment & Music"),
            *("Family & Relationships", "Politics & Government"),
        ],
        OLORA % ("TC", "yahoo"),
        ("TC/yahoo", "Long_Sequence/yahoo"),
        10000,
        7600,
        {
            "train": "community-datasets/yahoo_answers_topics",
            "revision": "6652a1e7c94f7260a0bfd0c9092dd48e2d536ea1",
            # The published rows put a title that has a body under `Title:` and one without under `Question:`.
            "text": "Question: {question_title} {question_content}\nAnswer: {best_answer}",
            "label": "topic",
            "test_samples": 7600,
        },
    ),
    "yelp": Benchmark(
        SENTIMENT,
        FIVE_STARS,
        OLORA % ("SC", "yelp"),
        ("SC/yelp", "Long_Sequence/yelp"),
        5000,
        7600,
        {
            "train": "Yelp/yelp_review_full",
            "revision": "c1f9ee939b7d05667af864ee1cb066393154bf85",
            "text": "Text: {text}",
            "test_samples": 7600,
        },
    ),
}

# ---- SuperNI: 15 tasks of Super-NaturalInstructions as SAPT sampled them (arXiv 2401.08295) -------------------------
# Each file has the task's definition and its instances: 1,000 to train on, 100 to test, the same 100 to validate. SAPT
# scores every task by Rouge-L. Which instances it drew is known from its files only, so there is no Hub source.
SUPERNI_TEMPLATE = "Definition: {instruction}\n\nNow complete the following example -\nInput: {text}\nOutput:"
SUPERNI_ORDER_1 = [
    *("task1572_samsum_summary", "task363_sst2_polarity_classification", "task1290_xsum_summarization"),
    *("task181_outcome_extraction", "task002_quoref_answer_generation", "task1510_evalution_relation_extraction"),
    *("task639_multi_woz_user_utterance_generation", "task1729_personachat_generate_next"),
    *("task073_commonsenseqa_answer_generation", "task1590_diplomacy_text_generation"),
    *("task748_glucose_reverse_cause_event_detection", "task511_reddit_tifu_long_text_summarization"),
    *("task591_sciq_answer_generation", "task1687_sentiment140_classification", "task875_emotion_classification"),
]
SUPERNI_ORDER_2 = [
    *("task748_glucose_reverse_cause_event_detection", "task073_commonsenseqa_answer_generation"),
    *("task1590_diplomacy_text_generation", "task639_multi_woz_user_utterance_generation", "task1572_samsum_summary"),
    *("task1687_sentiment140_classification", "task591_sciq_answer_generation"),
    *("task363_sst2_polarity_classification", "task1510_evalution_relation_extraction"),
    *("task1729_personachat_generate_next", "task181_outcome_extraction"),
    *("task511_reddit_tifu_long_text_summarization", "task002_quoref_answer_generation"),
    *("task1290_xsum_summarization", "task875_emotion_classification"),
]
SUPERNI: dict[str, Benchmark] = {
    name: Benchmark("", None, SUPERNI_TEMPLATE, (f"SuperNI/{name}",), 1000, 100, metric="rougeL")
    for name in SUPERNI_ORDER_1
}


# ---- TRACE: 8 tasks (arXiv 2310.06762), from its authors' archive only ----------------------------------------------
# The rows bring their prompts. A prompt begins with the instruction and ends with a cue ("Summary:"), so a long one
# loses its middle. Test sets have up to 2,000 rows; how many each of them has could not be checked.
def _trace(name: str, epochs: float, metric: str) -> Benchmark:
    folders = (f"LLM-CL-Benchmark_5000/{name}", f"TRACE-Benchmark/LLM-CL-Benchmark_5000/{name}")
    return Benchmark("", None, "{text}", folders, 5000, None, metric=metric, epochs=epochs, cut="middle")


TRACE: dict[str, Benchmark] = {
    "C-STANCE": _trace("C-STANCE", 5, "exact_match"),
    "FOMC": _trace("FOMC", 3, "exact_match"),
    "MeetingBank": _trace("MeetingBank", 7, "rougeL"),
    "Py150": _trace("Py150", 5, "edit_similarity"),
    "ScienceQA": _trace("ScienceQA", 3, "first_character"),
    "NumGLUE-cm": _trace("NumGLUE-cm", 5, "exact_match"),
    "NumGLUE-ds": _trace("NumGLUE-ds", 5, "exact_match"),
    "20Minuten": _trace("20Minuten", 7, "sari"),
}

BENCHMARKS: dict[str, Benchmark] = CLASSIFICATION | SUPERNI | TRACE

# ---- Orders ---------------------------------------------------------------------------------------------------------
LONG_A = "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo".split()
LONG_B = "multirc boolqa wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo".split()
LONG_C = "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolqa wic".split()

STREAMS: dict[str, list[str]] = {
    # O-LoRA's scripts; four tasks, although the benchmark is often called "5-task".
    "olora/order1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "olora/order2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "olora/order3": ["yahoo", "amazon", "agnews", "dbpedia"],
    # As printed in the papers (Progressive Prompts, O-LoRA); O-LoRA's repository has a script for order 6 only.
    "olora/order4": LONG_A,
    "olora/order5": LONG_B,
    "olora/order6": LONG_C,
    # SAPT's generators count on from SuperNI: their orders 1 and 2 are SuperNI, 4 and 5 the long sequence.
    "sapt/order1": SUPERNI_ORDER_1,
    "sapt/order2": SUPERNI_ORDER_2,
    "sapt/order4": LONG_C,
    "sapt/order5": LONG_A,
    # The same four lists by what they hold.
    "superni/order1": SUPERNI_ORDER_1,
    "superni/order2": SUPERNI_ORDER_2,
    "sapt/long1": LONG_C,
    "sapt/long2": LONG_A,
    "trace": list(TRACE),
    # Not published: the four tasks whose data can be kept locally without yahoo.
    "local/order1": ["dbpedia", "amazon", "yelp", "agnews"],
    "local/order2": ["yelp", "agnews", "dbpedia", "amazon"],
}


# Beginning of a stream's id -> whose tasks and whose order; the longest beginning counts.
PUBLISHED = {
    "olora/": "O-LoRA, arXiv 2310.14152: the standard benchmark, its own orders",
    "olora/order4": "Progressive Prompts, arXiv 2301.12314: the long sequence, as O-LoRA numbers it",
    "olora/order5": "Progressive Prompts, arXiv 2301.12314: the long sequence, as O-LoRA numbers it",
    "olora/order6": "Progressive Prompts, arXiv 2301.12314: the long sequence, as O-LoRA numbers it",
    "sapt/": "SAPT, arXiv 2401.08295: tasks of Super-NaturalInstructions, its own orders",
    "sapt/order4": "Progressive Prompts, arXiv 2301.12314: the long sequence, as SAPT numbers it (arXiv 2401.08295)",
    "sapt/order5": "Progressive Prompts, arXiv 2301.12314: the long sequence, as SAPT numbers it (arXiv 2401.08295)",
    "sapt/long": "Progressive Prompts, arXiv 2301.12314: the long sequence, in the orders of SAPT (arXiv 2401.08295)",
    "superni/": "SAPT, arXiv 2401.08295: tasks of Super-NaturalInstructions, its own orders",
    "trace": "TRACE, arXiv 2310.06762",
    "local/": "not published: tasks of the standard benchmark and yelp",
}


def describe_streams(name: str | None = None) -> list[dict[str, Any]]:
    """The registered streams for people and scripts.

    Args:
        name (`str`, *optional*): One of them; all by default.

    Returns:
        `list[dict]`: Per stream `stream`, `source`, `rows` and `tasks`; per task its name, the number of rows as
        published (`None` where that could not be checked), metric, options, and where its rows are on the Hub.

    Raises:
        UserError: An unknown name.
    """
    names = STREAMS if name is None else [choose("stream", name, STREAMS)]
    return [
        {
            "stream": stream,
            "source": PUBLISHED[max((start for start in PUBLISHED if stream.startswith(start)), key=len)],
            "rows": "the Hub, or `data_dir`" if all(BENCHMARKS[t].hub for t in STREAMS[stream]) else "`data_dir` only",
            "tasks": [_describe_task(task) for task in STREAMS[stream]],
        }
        for stream in names
    ]


def _describe_task(name: str) -> dict[str, Any]:
    known = BENCHMARKS[name]
    hub = known.hub or {}
    return {
        "name": name,
        "train": known.train_size,
        "test": known.test_size,
        "metric": known.metric,
        "options": known.options,
        "epochs": known.epochs,
        "hub": hub.get("train"),
        "config": hub.get("config"),
        "revision": hub.get("revision"),
        "folder": known.folders[0] if known.folders else None,
    }


def load_stream(name: str, data_dir: str | None = None) -> TaskStream:
    """The stream registered under `name`.

    Args:
        name (`str`): An id of `STREAMS`.
        data_dir (`str`, *optional*): A local copy; from the Hub by default. Either `<data_dir>/<task>/{train,test}`
            with the ending `.jsonl`, `.json`, `.parquet` or `.csv` and the columns `text` and `label` (or another pair
            of `formats.COLUMN_PAIRS`), or the folder that the benchmark's authors distribute: `CL_Benchmark` of O-LoRA
            or SAPT, TRACE's archive.

    Raises:
        UserError: Unknown name, a file that is missing from `data_dir`, or a task that is on no Hub.
    """
    order = STREAMS[choose("`stream`", name, STREAMS)]
    return TaskStream([_task(task, name, data_dir) for task in order])


def _task(name: str, stream: str, data_dir: str | None) -> Task:
    known = BENCHMARKS[name]
    fields: dict[str, Any] = {"instruction": known.instruction, "options": known.options, "template": known.template}
    if name in CLASSIFICATION and stream.startswith("sapt/"):
        fields["template"] = None  # SAPT prints the definition of its own files
    if data_dir is not None:
        fields |= local_files(name, data_dir, known.folders)
        found = definition(fields["train"])
        if found is not None and name in SUPERNI:
            fields["instruction"] = found
        elif found is not None and stream.startswith("sapt/"):
            found = found.replace("{", "{{").replace("}", "}}")
            fields["template"] = f"{found}\n{{text}}\nOutput:" if found else "{text}\nOutput:"
    elif known.hub is not None:
        fields |= known.hub
    else:
        raise UserError(
            f"Task {name!r} of `stream` {stream!r} is on no Hub that we know of. Set `data_dir` to the folder that "
            f"its authors distribute, <data_dir>/{known.folders[0]}/{{train,test}}.json, or to one with {name}/"
            "{train,test}.jsonl (columns `text` and `label`)."
        )
    return Task(
        name=name,
        **fields,
        train_per_class=TRAIN_PER_CLASS if name in CLASSIFICATION and not stream.startswith("local/") else None,
        metric=known.metric,
        num_train_epochs=known.epochs,
        cut=known.cut,
    )
