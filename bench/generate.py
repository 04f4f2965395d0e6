"""Tokens a second of medtrain's decoding, beside plain `model.generate` in the same run.

    python bench/generate.py MODEL_DIR [--prompts 64] [--tokens 64] [--batch-size 16] [--samples 2]
        [--way auto|slots|batches] [--beside-batches]

Needs a model directory with a tokenizer; a model of a few million parameters takes a minute on two
CPU cores. Both sides decode the same prompts in the same batches with the same sampling, nobody
stops early, and the two take turns; of the repeats the fastest counts, since a busy machine only
ever slows one down. `--way slots` decodes on a CPU as on a GPU, only step by step, and
`--beside-batches` shows what slots gain over batch by batch. `--clock cpu` counts processor
seconds: for a CPU that others use too, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from medtrain.console import quiet_libraries

ASKED = ("What are the symptoms of", "How is", "What causes", "Who should be tested for")
ABOUT = (
    "anaemia", "asthma", "high blood pressure", "type 2 diabetes and kidney disease", "migraine",
    "a broken wrist", "measles in adults", "sleep apnoea", "gout", "iron overload",
    "an underactive thyroid", "shingles", "coeliac disease", "heart failure", "eczema", "malaria",
)  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    model = model.to("cuda" if on_gpu else "cpu")
    questions = [f"Question: {asked} {about}? Answer:" for about in ABOUT for asked in ASKED]
    prompts = [tokenizer(questions[i % len(questions)])["input_ids"]
               for i in range(arguments.prompts)]  # fmt: skip
    prompts.sort(key=len)
    size = arguments.batch_size
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    chosen = decoder_of(model, len(tokenizer), arguments, arguments.way)
    sides = {
        "medtrain": lambda: with_medtrain(chosen, batches, arguments),
        "model.generate": lambda: with_generate(model, batches, arguments),
    }
    if arguments.beside_batches:
        plain = decoder_of(model, len(tokenizer), arguments, "batches")
        sides["batches"] = lambda: with_medtrain(plain, batches, arguments)
    times = take_turns(sides, arguments.repeats, clock)
    seconds = {name: min(measured) for name, measured in times.items()}
    tokens = arguments.prompts * arguments.samples * arguments.tokens
    result = {f"{name} tokens_per_s": round(tokens / s, 1) for name, s in seconds.items()}
    result["ratio"] = round(seconds["model.generate"] / seconds["medtrain"], 2)
    shape = {
        "tokens": tokens,
        "dtype": str(dtype),
        "batch_size": size,
        "samples": arguments.samples,
    }
    print(json.dumps({**shape, "decoder": type(chosen).__name__, **result}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens an answer")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts a batch")
    parser.add_argument("--samples", type=int, default=2, help="answers a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=("auto", "slots", "batches"), default="auto")
    parser.add_argument("--beside-batches", action="store_true", help="also batch by batch")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args()


def take_turns(
    sides: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            started = clock()
            side()
            times[name].append(clock() - started)
    return {name: measured[1:] for name, measured in times.items()}


def decoder_of(model: Any, vocabulary_size: int, arguments: argparse.Namespace, way: Any) -> Any:
    from medtrain.console import Console
    from medtrain.generate.decode import Vocabulary
    from medtrain.generate.decoders import choose_decoder
    from medtrain.generate.sampling import Sampling

    sampling = Sampling(0.7, 50, 0.9, arguments.tokens, arguments.samples)
    vocabulary = Vocabulary(vocabulary_size, 0, frozenset())
    size = arguments.batch_size
    return choose_decoder(model, sampling, vocabulary, Console(), prompts=size, way=way)


def with_medtrain(
    decoder: Any, batches: list[list[list[int]]], arguments: argparse.Namespace
) -> None:
    from medtrain.generate.decode import Question, Row

    units = (
        [Question(prompt, [Row(seed, arguments.tokens) for seed in range(arguments.samples)])
         for prompt in batch]
        for batch in batches
    )  # fmt: skip
    for _ in decoder.answer(units):
        pass


def with_generate(
    model: Any, batches: list[list[list[int]]], arguments: argparse.Namespace
) -> None:
    import torch

    for batch in batches:
        longest = max(map(len, batch))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        with torch.inference_mode():
            model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                temperature=0.7,
                top_k=50,
                top_p=0.9,
                num_return_sequences=arguments.samples,
                max_new_tokens=arguments.tokens,
                min_new_tokens=arguments.tokens,
                pad_token_id=0,
            )


if __name__ == "__main__":
    main()
