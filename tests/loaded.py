"""A Python that has loaded the libraries already: what it runs is a fork of one process, and starts at once.

`loaded_python()` stands in place of `sys.executable` where a test is of what a command does; its own `sys.executable`
is that again, so that processes of its cases start at once too. Where a test is of how a command starts (imports,
variables that libraries read as they load), of groups of processes or of the memory of one, Python itself is needed.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
USED = """
    pytest lightning.pytorch vl_convert jinja2 torch.utils.flop_counter antlr4
    isoforward.app.train isoforward.app.generate isoforward.attach.measurement isoforward.show.phases
"""


@cache
def loaded_python() -> str:
    """The process behind it starts at the first call, and ends with ours."""
    import subprocess  # here and below: each command would wait for them
    import tempfile

    directory = tempfile.TemporaryDirectory()
    program = Path(directory.name, "python")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {directory.name}/socket "$@"\n')
    program.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{directory.name}/socket")
        listener.listen(64)
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-c", f"from tests.loaded import serve; serve({number}, '{program}')"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=[number],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # as a command mostly has them
            stderr=subprocess.PIPE,
        )
    atexit.register(directory.cleanup)
    atexit.register(server.kill)
    return str(program)


def serve(number: int, program: str) -> None:
    """Comes back in a fork alone, when its command has ended."""
    import gc
    from importlib import import_module

    from isoforward.base.subprocesses import die_with_parent

    die_with_parent()
    for name in USED.split():
        import_module(name)
    sys.executable = program
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever watched a command that has ended needs no burial
    gc.freeze()  # so that forks share what is loaded
    listener = socket.socket(fileno=number)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    content, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    if command := os.fork():
        watch(command, connection)
    connection.close()
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    run(**json.loads(content))


def watch(command: int, connection: socket.socket) -> None:
    """Passes signals on to the command, ends it if nobody waits any more, and tells its exit code."""
    ended = os.pidfd_open(command)
    while ended not in select.select([ended, connection.fileno()], [], [])[0]:
        told = connection.recv(1)
        os.kill(command, told[0] if told else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def run(arguments: list[str], directory: str, variables: dict[str, str]) -> None:
    """`script.py`, `-m module` or `-P -c code`, as Python does."""
    import runpy

    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    encoding, _, errors = variables.get("PYTHONIOENCODING", "").partition(":")
    sys.stdout.reconfigure(encoding=encoding or None, errors=errors or None)  # type: ignore[union-attr]  # a TextIO here
    sys.stderr.reconfigure(encoding=encoding or None, errors="backslashreplace")  # type: ignore[union-attr]
    sys.path[:1] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    first, *rest = arguments
    if first == "-P":
        exec(rest[1], {"__name__": "__main__"})
        return
    sys.path.insert(0, directory if first == "-m" else str(Path(first).absolute().parent))
    sys.argv = rest if first == "-m" else arguments
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def main(address: str, arguments: list[str]) -> None:
    """In the process that was started: its streams and signals are the command's, whose end is its own."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    call = {"arguments": arguments, "directory": str(Path.cwd()), "variables": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(call).encode()], [0, 1, 2])
    code = int(connection.recv(8) or b"1")
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
