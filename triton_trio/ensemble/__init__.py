"""Ensembles: models whose requests are data flows through other models.

``graph.py`` checks at load that the steps fit together, and plans which of them a request needs; ``flow.py`` runs one
request, a nursery of steps inside the request's own scope; ``model.py`` is the model that clients see.
"""

from .dependencies import check_no_cycle as check_no_cycle
from .dependencies import find_dependents as find_dependents
from .model import EnsembleModel as EnsembleModel
from .model import complete_ensemble as complete_ensemble
