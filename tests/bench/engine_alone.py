"""Runs the engine of the bundled LLM alone, in the environment of the models.

    python engine_alone.py MODEL_FOLDER WEIGHTS CONFIG_PBTXT

Reads lines of JSON, {"prompts": [str], "max_tokens": int}; generates all prompts at once, each in a
thread, as the model on Triton does; answers each line with {"tokens": int, "seconds": float}.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    """Answers requests until the input ends."""
    folder, weights, config = sys.argv[1:]
    sys.path.insert(0, folder)
    engine_module = importlib.import_module("engine")

    parameters = dict(
        re.findall(r'key: "(\w+)" value \{ string_value: "([^"]*)" \}', Path(config).read_text())
    )
    engine = engine_module.Engine(Path(weights), parameters)

    def generate(prompt: str, max_tokens: int, counts: list[int]) -> None:
        tokens = engine.tokenize_conversation([{"role": "user", "content": prompt}])
        with engine.session("", tokens) as session:
            run = session.run(
                tokens,
                max_tokens=max_tokens,
                sampling=engine_module.Sampling(0.0, 1.0, None),
                on_piece=lambda _piece: True,
                is_cancelled=lambda: False,
            )
        counts.append(run.token_count)

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        counts: list[int] = []
        started = time.perf_counter()
        threads = [
            threading.Thread(target=generate, args=(prompt, request["max_tokens"], counts))
            for prompt in request["prompts"]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": sum(counts), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
