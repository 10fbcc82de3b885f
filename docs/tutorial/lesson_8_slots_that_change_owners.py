from collections import deque

import numpy as np
import trio
from stage import run, say

from triton_trio.backends.jax.generation import NO_TOKEN, Emitted, LlamaConfig, SlotSpec
from triton_trio.backends.jax.generation.schedule import Generation, Program, Settings, SlotSchedule

MODEL = LlamaConfig(vocab_size=128, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, hidden=1, context=64)
SPEC = SlotSpec(MODEL, slots=2, context=64)


class Parrot:
    """A device with a model on it.  Tokens are letters, and the model says its prompt again, in capitals.

    What it says next, it finds in its slot, as a real model does: if a slot's old owner wrote there, one would hear it.
    """

    def __init__(self) -> None:
        self.owner = [0] * SPEC.slots  # who is answered; 0: nobody
        self.heard = [""] * SPEC.slots
        self.said = [0] * SPEC.slots
        self.wanted = [0] * SPEC.slots

    def run(self, program: Program) -> Emitted:
        if (chunk := program.chunk) is not None:
            slot = chunk.slot
            before = self.heard[slot] if chunk.start else ""
            self.heard[slot] = before + "".join(map(chr, chunk.tokens))
            # Only the last piece has an owner: until then, this slot says nothing.
            self.owner[slot], self.said[slot], self.wanted[slot] = chunk.owner, 0, chunk.max_tokens
            return self.speak([slot] if chunk.owner else [], steps=1)
        for slot, owner in enumerate(program.evict):
            if owner and self.owner[slot] == owner:
                self.owner[slot] = 0
        return self.speak([s for s in range(SPEC.slots) if self.owner[s] and not program.hold[s]], program.steps)

    def speak(self, slots: list[int], steps: int) -> Emitted:
        shape = (steps, SPEC.slots)
        emitted = Emitted(np.array(self.owner), np.full(shape, NO_TOKEN), np.zeros(shape), np.zeros(shape, bool))
        for step in range(steps):
            for slot in slots:
                if self.owner[slot]:
                    heard = self.heard[slot].upper()
                    emitted.tokens[step, slot] = ord(heard[self.said[slot] % len(heard)])
                    self.said[slot] += 1
                    if self.said[slot] == self.wanted[slot]:
                        emitted.ended[step, slot] = True
                        self.owner[slot] = 0
        return emitted


class Client:
    def __init__(self, name: str) -> None:
        self.name = name
        self.live, self.cancelled = True, False

    def cancel(self) -> None:
        self.live, self.cancelled = False, True

    def charge(self, seconds: float, steps: int) -> None: ...
    def spare(self, seconds: float) -> None: ...


class Engine:
    """Two programs are out at a time, one that runs and one behind it; each takes a tenth of a second."""

    def __init__(self) -> None:
        self.schedule = SlotSchedule(SPEC, chunks=(8,))
        self.parrot = Parrot()
        self.out: deque[tuple[Program, Emitted]] = deque()
        self.texts: dict[int, str] = {}
        self.names = {0: "-"}

    def admit(self, client: Client, slot: int, prompt: str, tokens: int = 20) -> Generation:
        letters = np.array([*map(ord, prompt)], np.int32)
        generation = self.schedule.admit(slot, letters, Settings(max_tokens=tokens), client)
        self.names[generation.owner] = client.name
        self.texts[generation.owner] = ""
        return generation

    def fill(self, steps: int = 2) -> None:
        while len(self.out) < 2 and (program := self.schedule.next_program(waiting=False, steps=steps)):
            self.out.append((program, self.parrot.run(program)))
            say(f"   out:  {self.describe(program):34} the device has {[self.names[o] for o in self.parrot.owner]}")

    async def turns(self, count: int) -> None:
        self.fill()
        while self.out and count:
            await trio.sleep(0.1)
            program, emitted = self.out.popleft()
            self.fill()  # the device must not wait until somebody has read
            self.schedule.receive(program, emitted, seconds=0.1)
            for row in program.rows:
                self.texts[row.owner] += "".join(chr(token.id) for token in row.unread)
                row.unread.clear()
                if row.ended:
                    self.schedule.leave(row)
            say(f"   back: {', '.join(f'{self.names[o]}: {text}' for o, text in self.texts.items() if text)}")
            count -= 1

    def describe(self, program: Program) -> str:
        if program.chunk is not None:
            return f"{program.rows[0].reader.name}'s prompt: {''.join(map(chr, program.chunk.tokens))!r}"
        evicted = [self.names[owner] for owner in program.evict if owner]
        text = f"{program.steps} for {' and '.join(row.reader.name for row in program.rows)}"
        return text + (f", and {evicted[0]} is out" if evicted else "")


async def lesson() -> None:
    engine = Engine()
    schedule = engine.schedule

    say("1. Ada's prompt is short, Ben's is long. His comes in pieces, and she does not wait for them.")
    ada, ben = Client("Ada"), Client("Ben")
    adas = engine.admit(ada, 0, "who?")
    bens = engine.admit(ben, 1, "what do parrots eat?")
    await engine.turns(7)

    say("2. Ben leaves. The next program puts him out; the two that are out already still speak to him.")
    ben.cancel()
    await engine.turns(1)
    say(f"   slots in use: {schedule.statistics().slots_in_use}; stale letters: {schedule.statistics().stale_tokens}")

    say("3. Cho has the slot now. The second of Ben's programs comes back. And somebody is late, and evicts him again.")
    engine.admit(Client("Cho"), 1, "hello", tokens=10)
    await engine.turns(1)
    say(f"   stale letters: {schedule.statistics().stale_tokens}")
    engine.parrot.run(Program((), steps=1, evict=np.array([0, bens.owner]), hold=np.array([True, True])))
    say(f"   after that, the device has {[engine.names[owner] for owner in engine.parrot.owner]}")
    await engine.turns(2)

    say("4. Ada leaves, and Dag is there before any program could put her out: the first piece of his prompt does.")
    ada.cancel()
    schedule.leave(adas)
    engine.admit(Client("Dag"), 0, "me too", tokens=6)
    await engine.turns(99)
    found = schedule.statistics()
    say(
        f"   tokens {found.tokens}, stale {found.stale_tokens}, evictions {found.evictions}, in use {found.slots_in_use}"
    )


if __name__ == "__main__":
    run(lesson)
