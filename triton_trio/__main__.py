"""``python -m triton_trio``: the server, with tritonserver's flags."""

from .cli import main

raise SystemExit(main())
