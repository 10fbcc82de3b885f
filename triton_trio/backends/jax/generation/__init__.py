"""Text generation: a Llama-type model whose programs serve many generations at once and can be left between any two.

::

    tokenizer.py chat.py   text and conversations to token ids, ids to text as they come
    gguf.py safetensors.py the two file formats
    weights.py             from files to parameters on the device
    placement.py           which part of an array is on which device
    config.py              the numbers of a model, and of its slots
    llama.py sampling.py   the network; from logits to tokens
    slots.py               the state of all generations, and the two programs that move it on
    programs.py            compiled
    loading.py             all of it made ready: memory, compilations, a first run
    schedule.py accounts.py who is in which slot and what the device does next; who pays for it
    request.py text.py     what a request may ask for; stop strings
    engine.py instance.py  a device's task, and a slot as an instance of the server
    model.py options.py    loading
    plan.py fingerprint.py several hosts: what one decides, written down for the others; whether all have the same files
    leader.py follower.py hosts.py  who sends it, who replays it, where they meet

The network and its programs are pure functions, schedule and plan decide synchronously; only engine, model and hosts wait.
"""

from .config import LlamaConfig as LlamaConfig
from .config import SlotSpec as SlotSpec
from .placement import Placement as Placement
from .programs import LlamaPrograms as LlamaPrograms
from .programs import ProgramMemory as ProgramMemory
from .programs import slot_spec as slot_spec
from .slots import NO_TOKEN as NO_TOKEN
from .slots import Emitted as Emitted
from .slots import PromptChunk as PromptChunk
from .slots import SlotState as SlotState
from .tokenizer import TextStream as TextStream
from .tokenizer import Tokenizer as Tokenizer
from .weights import Checkpoint as Checkpoint
from .weights import find_weights as find_weights
from .weights import load_params as load_params
from .weights import open_checkpoint as open_checkpoint
