"""``python -m bench [NAME] [options]``: one benchmark, or all that this machine can run."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys

NAMES = {
    "codec": "messages: upb behind betterproto2 classes, against betterproto2's own codec",
    "rpc": "(a) CPU µs for each unary RPC, against echoes and the real Triton",
    "cancel": "(b) from the client's cancel to what it frees",
    "curve": "(c) throughput and cancel latency against chunk time",
    "inflight": "(d) 10,000 requests in flight",
    "schedulers": "(e) what scheduling costs, without a network",
    "checkpoints": "(f) what checkpoints cost and buy, on an emulated device",
    "worker": "(g) a JAX model in a worker process, against one in the server",
    "generation": "(h) tokens a second: in flight, one at a time, llama.cpp",
    "first_token": "(i) the first token behind long prompts that were cancelled",
    "leaving": "(j) what readers who walk away cost those who stay",
    "soak": "(k) ten thousand generations with random cancels",
}


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in NAMES:
        name = sys.argv.pop(1)
        runpy.run_module(f"bench.{name}", run_name="__main__")
        return 0
    if len(sys.argv) > 1:
        print("usage: python -m bench [NAME] [options]; without NAME, all of:", file=sys.stderr)
        for name, what in NAMES.items():
            print(f"  {name:11} {what}", file=sys.stderr)
        return 2
    failed = []
    for name, what in NAMES.items():
        print(f"\n== {name}: {what}", flush=True)
        if name == "rpc" and shutil.which("h2load") is None:
            print("skipped: needs h2load (Debian: apt-get install nghttp2-client)")
        elif subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
