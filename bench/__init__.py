"""One script for each claim in the README.  ``python -m bench`` runs what the machine has; see bench/README.md."""
