"""``python -m triton_trio``: the server, with tritonserver's flags."""

from .cli import run

raise SystemExit(run())
