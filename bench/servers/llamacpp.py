"""llama.cpp's own server, with slots and continuous batching, inside a process that answers JSON lines.

    llamacpp.py MODEL.gguf SLOTS CONTEXT THREADS

Each line has ``prompts`` and ``tokens``; all prompts are completed side by side, greedily.  Without HTTP: its best case.
"""

import json
import os
import sys
import threading
import time

import xllamacpp

# The library prints to standard output; what we answer goes where it cannot.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

weights, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = weights
params.n_parallel = slots
params.n_ctx = slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_gpu_layers = 0
params.verbosity = -1
server = xllamacpp.Server(params)


def complete(prompt: list[int], tokens: int, into: list[str], index: int) -> None:
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    into[index] = server.handle_completions(asked)["choices"][0]["text"]


print("READY {}", file=answers, flush=True)
for line in sys.stdin:
    command = json.loads(line)
    texts = [""] * len(command["prompts"])
    began = time.perf_counter()
    working = [
        threading.Thread(target=complete, args=(prompt, command["tokens"], texts, index))
        for index, prompt in enumerate(command["prompts"])
    ]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    print(json.dumps({"seconds": time.perf_counter() - began, "texts": texts}), file=answers, flush=True)
