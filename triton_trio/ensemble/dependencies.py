"""Which models depend on which: an ensemble on its steps, a step on nobody."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from ..errors import InvalidArgument

#: The names of the models that an ensemble is made of; of other models: none.
StepsOf = Callable[[str], Iterable[str]]


def check_no_cycle(name: str, steps_of: StepsOf) -> None:
    """Raise :exc:`InvalidArgument` if ``name`` is one of its own steps, or a step of a step."""
    upstream = [(step, name) for step in steps_of(name)]
    seen = set()
    while upstream:
        step, user = upstream.pop()
        if step == name:
            raise InvalidArgument(f"circular dependency between ensembles: {name} -> ... -> {user} -> {name}")
        if step not in seen:
            seen.add(step)
            upstream += [(each, step) for each in steps_of(step)]


def find_dependents(name: str, steps: Mapping[str, Collection[str]], explicit: Collection[str]) -> list[str]:
    """What goes along when ``name`` is unloaded with its dependents.

    That is every ensemble that has it as a step, and every model that was only loaded along with one of these and is a
    step of no other.

    Args:
      name: the model to be unloaded.
      steps: of each loaded ensemble, its steps.
      explicit: the models that somebody asked for by name.
    """
    gone = {name: None}
    while users := [user for user, its in steps.items() if user not in gone and not gone.keys().isdisjoint(its)]:
        gone.update(dict.fromkeys(users))

    def only_for_them(step: str) -> bool:
        return step not in explicit and all(user in gone for user, its in steps.items() if step in its)

    while brought := [
        step for user in gone for step in steps.get(user, ()) if step not in gone and only_for_them(step)
    ]:
        gone.update(dict.fromkeys(brought))
    del gone[name]
    return list(gone)
