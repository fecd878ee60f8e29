"""Work that runs in a process of its own, on command, so that what one holds or frees is no other's affair."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import cloudpickle

from isoforward.base.errors import BadInput
from isoforward.measure.benchmark import Part, Work


def remote(parts: tuple[Part, ...], serve: Callable[..., None], *arguments: object) -> Work:
    """`serve(line, *arguments)` receives how many executions, and sends the seconds of one, part by part.

    The process ends with this one; a sample after it has died is a BadInput.
    """
    line = start(serve, *arguments)

    def run(n: int) -> Sequence[float]:
        try:
            line.send(n)
            times: Sequence[float] = line.recv()
            return times
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise BadInput("a process that runs work on command ended early; its own message is above") from error

    return Work(parts=parts, run=run)


def start(serve: Callable[..., None], *arguments: object) -> Connection:
    ours, its = multiprocessing.Pipe()
    packed = cloudpickle.dumps((serve, arguments))
    process = multiprocessing.get_context("spawn").Process(target=run_packed, args=(its, packed), daemon=True)
    process.start()
    its.close()  # its end is then the end of the line
    return ours


def run_packed(line: Connection, packed: bytes) -> None:
    serve, arguments = cloudpickle.loads(packed)
    try:
        serve(line, *arguments)
    except EOFError:  # nobody asks any more
        return
