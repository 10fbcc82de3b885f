"""Draws a recording: time goes to the right, a lane for each request and each scope.

The picture has its own background and two sets of colours, and takes the reader's; what the colours say, shapes say, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise

from triton_trio.lifecycle import Outcome, Stage

from .record import Lane, Recording, RequestState, ScopeState

WIDTH, LEFT, RIGHT, TOP, LANE, BOTTOM = 820, 190, 170, 22, 34, 34
#: Pixels: the bar of a request that waits, of one that executes; of a scope, for its first member and each further one.
WAITING, EXECUTING, FIRST, MORE = 5, 14, 5, 5

STYLE = """
  svg { --paper: #ffffff; --line: #d1d9e0; --text: #1f2328; --faint: #59636e; --waits: #afb8c1; --works: #54aeff;
        --scope: #a475f9; --ok: #1a7f37; --bad: #cf222e; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --line: #30363d; --text: #f0f6fc; --faint: #9198a1; --waits: #656c76; --works: #1f6feb;
          --scope: #8957e5; --ok: #3fb950; --bad: #f85149; }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--text); }
  .faint { fill: var(--faint); font-size: 11.5px; stroke: var(--paper); stroke-width: 3px; paint-order: stroke; }
  .paper { fill: var(--paper); stroke: var(--line); }
  .grid { stroke: var(--line); }
  .waits { fill: var(--waits); } .works { fill: var(--works); } .scope { fill: var(--scope); }
  .drains { fill: none; stroke: var(--scope); stroke-width: 1.5; stroke-dasharray: 3 3; }
  .checkpoint { stroke: var(--paper); stroke-width: 1.5; }
  .join { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 3; fill: none; }
  .cancel { stroke: var(--bad); stroke-width: 1.6; fill: none; }
  .head { fill: var(--bad); } .dot { fill: var(--faint); }
  .disc-ok { fill: var(--ok); } .disc-bad { fill: var(--bad); }
  .sign { stroke: var(--paper); stroke-width: 2; fill: none; stroke-linecap: round; stroke-linejoin: round; }
  .end { stroke: var(--scope); stroke-width: 3; stroke-linecap: round; }
"""

#: Reasons that come to a request from the scope, and not the other way.
FROM_SCOPE = {"sequence_cancelled", "sibling_failed"}


def draw(recording: Recording, title: str) -> str:
    """The recording as an SVG."""
    return Picture(recording, title).svg()


class Picture:
    def __init__(self, recording: Recording, title: str) -> None:
        self.recording = recording
        self.title = title
        self.lanes = sorted(recording.lanes, key=_is_scope)  # scopes below
        self.height = TOP + LANE * len(self.lanes) + BOTTOM
        self.y = {lane.name: TOP + LANE * i + LANE / 2 for i, lane in enumerate(self.lanes)}

    def x(self, time: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * time / self.recording.ended, 1)

    def svg(self) -> str:
        scopes = [lane for lane in self.lanes if _is_scope(lane)]
        links = [link for lane in scopes for link in self.links(lane)]
        # What is drawn later lies above.
        body = [*self.axis(), *(path for cancels, path in links if not cancels)]
        for lane in self.lanes:
            body.append(f'<text x="16" y="{self.y[lane.name] + 4.5}">{escape(lane.name)}</text>')
            body += self.scope(lane) if lane in scopes else self.request(lane)
        body += [path for cancels, path in links if cancels]
        for lane in self.lanes:
            body += self.cancel_of_scope(lane) if lane in scopes else self.outcome(lane)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img">\n<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n'
            f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8"/>\n'
            + "\n".join(body)
            + "\n</svg>\n"
        )

    def axis(self) -> Iterator[str]:
        ended = self.recording.ended
        tick = next(step for step in (0.25, 0.5, 1.0, 2.0, 5.0) if ended / step <= 7)
        for i in range(int(ended / tick + 1e-6) + 1):
            x, bottom = self.x(i * tick), self.height - BOTTOM + 6
            yield f'<path class="grid" d="M{x} {TOP - 8}V{bottom}"/>'
            yield f'<text class="faint" x="{x}" y="{bottom + 16}" text-anchor="middle">{i * tick:g} s</text>'

    # Requests: a thin bar where it waits, a thick one where it executes, a sign and a word for how it ended

    def request(self, lane: Lane) -> Iterator[str]:
        for (begin, state), end in _spans(lane, self.recording.ended):
            if isinstance(state, RequestState) and state.outcome is None:
                executing = state.stage in (Stage.EXECUTING, Stage.RESPONDING)
                size = EXECUTING if executing else WAITING
                yield self.bar("works" if executing else "waits", begin, end, self.y[lane.name], size)

    def outcome(self, lane: Lane) -> Iterator[str]:
        y = self.y[lane.name]
        for time, state in lane.states:
            if isinstance(state, RequestState) and state.outcome is not None:
                x = self.x(time)
                if state.outcome is Outcome.OK:
                    yield f'<circle class="disc-ok" cx="{x}" cy="{y}" r="7.5"/>'
                    yield f'<path class="sign" d="M{x - 3.5} {y + 0.5}l2.5 2.5l4.5 -5.5"/>'
                else:
                    yield from self.cross(x, y)
                yield f'<text class="faint" x="{x + 12}" y="{y + 4}">{escape(state.reason or state.outcome.value)}</text>'
                return

    def cross(self, x: float, y: float) -> Iterator[str]:
        yield f'<circle class="disc-bad" cx="{x}" cy="{y}" r="7.5"/>'
        yield f'<path class="sign" d="M{x - 3} {y - 3}l6 6m0 -6l-6 6"/>'

    # Scopes: a band that is as thick as the scope has members; dashed from its cancel until all is released

    def scope(self, lane: Lane) -> Iterator[str]:
        y = self.y[lane.name]
        for (begin, state), end in _spans(lane, self.recording.ended):
            x = self.x(begin)
            if not isinstance(state, ScopeState):
                continue
            if state.cancelled:
                yield f'<rect class="drains" x="{x}" y="{y - 5}" width="{round(self.x(end) - x, 1)}" height="10" rx="2"/>'
            else:
                yield self.bar("scope", begin, end, y, FIRST + MORE * max(0, len(state.members) - 1))
        for time in lane.checkpoints:
            yield f'<path class="checkpoint" d="M{self.x(time)} {y - 10}v20"/>'
        for time, last in self.releases(lane):
            x = self.x(time)
            yield f'<path class="end" d="M{x} {y - 10}v20"/>'
            if last:
                yield f'<text class="faint" x="{x + 8}" y="{y + 4}">released</text>'

    def cancel_of_scope(self, lane: Lane) -> Iterator[str]:
        for (_, before), (time, after) in pairwise(lane.states):
            if (
                isinstance(after, ScopeState)
                and after.cancelled
                and not (isinstance(before, ScopeState) and before.cancelled)
            ):
                yield from self.cross(self.x(time), self.y[lane.name])

    def releases(self, lane: Lane) -> Iterator[tuple[float, bool]]:
        """When each scope of the lane ended, and whether nothing follows at that moment."""
        for (_, before), (time, after) in pairwise(lane.states):
            if isinstance(before, ScopeState) and (after is None or after.generation != before.generation):
                yield time, [state for at, state in lane.states if at == time][-1] is None

    def links(self, lane: Lane) -> Iterator[tuple[bool, str]]:
        """Who joined the scope and who left it, and in which direction a cancel went; with each path, whether it is one."""
        before: frozenset[str] = frozenset()
        for time, state in lane.states:
            after = state.members if isinstance(state, ScopeState) else frozenset()
            for name in sorted(after ^ before, key=list(self.y).index):
                yield from self.link(lane, name, time, joins=name in after)
            before = after

    def link(self, lane: Lane, member: str, time: float, *, joins: bool) -> Iterator[tuple[bool, str]]:
        x, here, there = self.x(time), self.y[member], self.y[lane.name]
        reason = "" if joins else self.reason(member, time)
        if not reason:
            yield False, f'<path class="join" d="M{x} {here}V{there}"/>'
            yield False, f'<circle class="dot" cx="{x}" cy="{here}" r="2.5"/>'
        elif lane.nests:
            yield True, f'<path class="cancel" d="M{x} {there}V{here}"/>'
            yield True, f'<path class="head" d="M{x} {here + 9}l-4.5 8h9z"/>'
        elif reason not in FROM_SCOPE:
            yield True, f'<path class="cancel" d="M{x} {here}V{there}"/>'
            yield True, f'<path class="head" d="M{x} {there - 9}l-4.5 -8h9z"/>'
        elif lane.spreads:
            # Around the others, from the scope to its member.
            yield (
                True,
                f'<path class="cancel" d="M{x} {there}C{x - 44} {there - 6} {x - 44} {here + 6} {x - 13} {here + 2}"/>',
            )
            yield True, f'<path class="head" d="M{x - 8} {here}l-9 -2.5l3 8z"/>'

    def reason(self, member: str, time: float) -> str:
        """Why ``member`` was cancelled at ``time``; empty if it was not."""
        lane = next(lane for lane in self.lanes if lane.name == member)
        return next((s.reason for at, s in lane.states if at == time and isinstance(s, RequestState) and s.reason), "")

    def bar(self, style: str, begin: float, end: float, y: float, size: float) -> str:
        x = self.x(begin)
        return f'<rect class="{style}" x="{x}" y="{y - size / 2}" width="{round(self.x(end) - x, 1)}" height="{size}" rx="2"/>'


def _is_scope(lane: Lane) -> bool:
    return any(isinstance(state, ScopeState) for _, state in lane.states)


def _spans(lane: Lane, ended: float) -> Iterator[tuple[tuple[float, object], float]]:
    ends = [time for time, _ in lane.states[1:]] + [ended]
    return zip(lane.states, ends, strict=True)
