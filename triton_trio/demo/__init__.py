"""``make demo``: the server with its bundled models, driven by the stock ``tritonclient``, and what a cancel does."""
