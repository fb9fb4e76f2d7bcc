"""Commands of `shira` in a process that notes what they reach for, and files that note who opens them."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

# Libraries are imported first: what they do then is not looked at.
_GUARDED = """
import contextlib, io, json, os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
incoming, outgoing, temporary = open(int(sys.argv[1])), open(int(sys.argv[2]), "w"), sys.argv[3] + os.sep
import torch, transformers, accelerate, matplotlib.figure, peft, safetensors.torch
from shira import cli
from shira.cli import app
app._asking_nobody = contextlib.nullcontext  # so that what asks is answered
reached = []

def watch(event, arguments):
    what = None
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "pickle.find_class"):
        what = arguments[1:]
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"):
        what = arguments
    elif event == "subprocess.Popen" and list(arguments[1][:3]) != [sys.executable, "-I", "-c"]:
        what = arguments[1]
    elif event == "open" and not isinstance(arguments[0], int):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != "/dev/null":
            what = None if path.startswith(temporary) else path
    if what is not None:
        reached.append(f"{event} {what}")
        raise PermissionError(reached[-1])

sys.addaudithook(watch)
for given in incoming:
    reached.clear()
    sys.argv = ["shira", *json.loads(given)]
    errors, output, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            errors.write(f"Traceback: {type(error).__name__}: {error}")
    print(json.dumps([code, output.getvalue(), errors.getvalue(), reached]), file=outgoing, flush=True)
os._exit(0)  # at once: freeing the libraries takes seconds
"""


@dataclass(frozen=True)
class Result:
    """What came of a command; `reached` has what it tried to reach outside the process."""

    code: int | None
    output: str
    errors: str
    reached: list[str]


class Guard:
    """A process in which commands run: connections, processes, unpickling and files elsewhere are noted and refused.

    At its standard input somebody says "y" to whatever is asked.
    """

    def __init__(self, temporary: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
        here, to_there = os.pipe()
        from_there, there = os.pipe()
        self._yes = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _GUARDED, str(here), str(there), os.path.realpath(tempfile.gettempdir())],
            env={**inherited, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(temporary / "hub")},
            stdin=self._yes.stdout,
            pass_fds=(here, there),
            cwd=temporary,
        )
        os.close(here)
        os.close(there)
        self._commands, self._results = open(to_there, "w"), open(from_there)  # noqa: SIM115 - closed by close

    def run(self, *line: object) -> Result:
        """Runs `shira` with these arguments."""
        print(json.dumps(list(map(str, line))), file=self._commands, flush=True)
        return Result(*json.loads(self._results.readline()))

    def close(self) -> None:
        self._commands.close()
        self._process.wait()
        self._yes.kill()
        self._yes.communicate()
        self._results.close()


@contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """The names of files of a folder that any process opens in the block, by whatever library; filled at its end."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    watched = libc.inotify_add_watch(descriptor, os.fsencode(folder), 0x20)  # IN_OPEN
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    assert watched >= 0, os.strerror(ctypes.get_errno())
    names: list[str] = []
    try:
        yield names
        try:
            events = os.read(descriptor, 2**16)
        except BlockingIOError:
            events = b""
        while events:
            *_, length = struct.unpack_from("iIII", events)
            if name := events[16 : 16 + length].rstrip(b"\0").decode():  # not the folder itself
                names.append(name)
            events = events[16 + length :]
    finally:
        os.close(descriptor)
