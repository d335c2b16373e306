"""The tests' world: offline, one torch thread, pico models and a word tokenizer made on the spot."""

import base64
import gc
import importlib.util
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_pm import PMConfig, Task, TaskStream
from hf_pm.report import figures, page


# Drawing is a third of the time of a stream of pico models. Most tests get this pixel and what was to be drawn.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
DRAWN = {name: getattr(figures, name) for name in ("matrix_png", "curves_png", "coefficients_png")}
# No machine loses its power in these tests. Where the order of the calls matters, a test counts them itself.
os.fsync = lambda descriptor: None

WORDS = (
    "What is the colour mood of this thing ? Choose one from the option . Option : red blue green happy sad calm , "
    "Answer apple sky grass fire sea leaf party funeral lake wedding storm nap a b c d e f"
).split()


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_finish(session):
    """What the imports made stays for good: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def pixels():
    """Pictures of runs are one pixel, also in fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(figures, name, lambda *given, name=name: PIXEL + repr((name, given)).encode())
        yield


@pytest.fixture
def pictures(monkeypatch):
    """For tests of what is drawn: the real pictures."""
    for name, function in DRAWN.items():
        monkeypatch.setattr(figures, name, function)
    page._drawn.cache_clear()
    yield
    page._drawn.cache_clear()


@pytest.fixture(scope="session")
def tokenizer():
    names = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def seq2seq_tokenizer(tokenizer):
    words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build(kind: str):
    """A pico model of `kind`, always with the same weights."""
    set_seed(7)
    # Larger initial weights than usual: a frozen random model must still tell its inputs apart.
    size = {
        "initializer_range": 0.3,
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
    }
    if kind == "llama":
        config = LlamaConfig(
            **size, num_key_value_heads=2, intermediate_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        return LlamaForCausalLM(config)
    if kind == "gpt2":
        config = GPT2Config(
            initializer_range=0.3,
            vocab_size=64,
            n_layer=2,
            n_head=2,
            n_embd=16,
            n_positions=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return GPT2LMHeadModel(config)
    if kind == "t5":
        config = T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    size |= {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**size, intermediate_size=32, max_position_embeddings=128, num_labels=3, pad_token_id=0)
    return BertForSequenceClassification(config)


@pytest.fixture
def model(tmp_path_factory):
    """A pico Llama that was saved and loaded, so that it has a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


COLOUR = {"apple": "red", "fire": "red", "sky": "blue", "sea": "blue", "grass": "green", "leaf": "green"}
MOOD = {"party": "happy", "wedding": "happy", "funeral": "sad", "storm": "sad", "lake": "calm", "nap": "calm"}


def rows(answers: dict[str, str], repeat: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    filler = "a b c d e f".split()
    texts, labels = [], []
    for i in range(repeat * len(answers)):
        word, label = list(answers.items())[i % len(answers)]
        extra = [filler[int(k)] for k in torch.randint(6, (1 + i % 4,), generator=generator)]
        texts.append(" ".join([*extra, word]))
        labels.append(label)
    return Dataset.from_dict({"text": texts, "label": labels})


@pytest.fixture
def stream():
    """Two tasks with three answers each."""
    return TaskStream(
        [
            Task("colour", rows(COLOUR, 8, 0), rows(COLOUR, 3, 1), instruction="What is the colour ?",
                 options=["red", "blue", "green"]),
            Task("mood", rows(MOOD, 8, 2), rows(MOOD, 3, 3), instruction="What is the mood ?",
                 options=["happy", "sad", "calm"]),
        ]
    )  # fmt: skip


@pytest.fixture
def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture
def config(tmp_path):
    """A factory: `config(**overrides)` with settings under which a pico model learns in a second."""

    def make(cls=PMConfig, **overrides):
        values = {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": 2e-2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "max_length": 64,
            "curvature_num_samples": 24,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "seed": 0,
        }
        return cls(**values | overrides)

    return make


@pytest.fixture(scope="session")
def bench_dir() -> Path:
    """Real text and a small pre-trained model, where they are available."""
    folder = os.environ.get("HF_PM_BENCH_DIR")
    if not folder or not (Path(folder) / "pm-lm-8m").is_dir():
        pytest.skip("HF_PM_BENCH_DIR does not name a folder with pm-lm-8m and data")
    return Path(folder)
