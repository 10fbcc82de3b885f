"""Pictures of recorded runs: ``record`` watches a run on the simulated clock, ``draw`` makes an SVG of what it saw."""
