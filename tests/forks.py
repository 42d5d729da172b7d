"""Run Python programs in forks of one process that has imported their libraries already.

To start papermill and a kernel, and to import torch and transformers in it, takes longer than
most notebooks take at the sizes of these tests. `Forks(folder, env).run([...])` does what
`subprocess.run([sys.executable, ...])` would, but for sizes that a notebook leaves to the
profile `demo` (see `make_small`). The kernels of such a program are forks, too.

python tests/forks.py serve SOCKET             the process that is forked; ends with its input
python tests/forks.py SOCKET -m MODULE ...     as `python -m MODULE ...`, in a fork
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ANYWHERE = """ipykernel.kernelapp seaborn scipy.stats datasets torch papermill nbclient
ipywidgets""".split()
IN_A_KERNEL = "transformers.trainer qr_rlhf.experiments qr_rlhf.studies qr_rlhf.rated".split()
KERNEL = dict(language="python", display_name="Python 3")
STANDARD_INPUT = 0
BACKEND = "module://matplotlib_inline.backend_inline"


# the side that asks


class Forks:
    "Runs programs in forks; the process that is forked starts with the first one."

    def __init__(self, folder, env):
        self.folder, self.server = Path(folder).absolute(), None
        self.socket = str(self.folder / "forks")
        kernel = self.folder / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        command = [__file__, self.socket, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel.write_text(json.dumps(KERNEL | dict(argv=[sys.executable, *command])))
        self.env = {**env, "JUPYTER_PATH": str(self.folder), "MPLBACKEND": BACKEND}

    def run(self, arguments, cwd, **env):
        "Run `python` with arguments, and return the finished process."
        self.begin(cwd)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with open(os.devnull) as nothing:
                files = [nothing.fileno(), out.fileno(), err.fileno()]
                code = ask(self.socket, arguments, cwd, self.env | env, files)
            texts = [file.seek(0) or file.read() for file in (out, err)]
        return subprocess.CompletedProcess([sys.executable, *arguments], code, *texts)

    def begin(self, cwd):
        "Start the process that is forked, unless it runs already."
        if self.server is None:
            command = [sys.executable, __file__, "serve", self.socket]
            options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.server = subprocess.Popen(command, cwd=cwd, env=self.env, **options)
            assert self.server.stdout.readline() == b"ready\n"

    def stop(self):
        if self.server:
            self.server.stdin.close()
            self.server.wait(60)


def ask(place, arguments, cwd, env, files):
    "Have a program run in a fork, pass signals on to it, and return its exit code."
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        request = json.dumps(dict(arguments=arguments, cwd=str(cwd), env=dict(env))).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
        connection.sendall(request)
        if __name__ == "__main__":  # or else the one who asks has handlers of its own
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda n, frame: connection.sendall(bytes([n])))
        code = connection.recv(4)
        return int.from_bytes(code, "big", signed=True) if code else -signal.SIGKILL


# the side that is forked


def serve(place):
    "Import the libraries, and fork for each request until the input ends."
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        print("ready", flush=True)
        while STANDARD_INPUT not in select.select([listening, STANDARD_INPUT], [], [])[0]:
            connection, _ = listening.accept()
            if not os.fork():
                listening.close()
                handle(connection)
            connection.close()


def preload():
    "Import what notebooks import; progress bars look at once whether they are in a kernel."
    from unittest import mock

    for module in ANYWHERE:
        importlib.import_module(module)
    kernel = SimpleNamespace(config=dict(IPKernelApp={}))
    with mock.patch("IPython.get_ipython", lambda: kernel):
        for module in IN_A_KERNEL:
            importlib.import_module(module)
    make_small()


def make_small():
    "Where a notebook doesn't say how large its models and pictures are, they are small here."
    from qr_rlhf import runs, settings

    settings.PROFILES["demo"] |= dict(vocab_size=400, n_layer=1, n_embd=32, n_head=2)
    settings.PROFILES["demo"] |= dict(evaluations=2)
    runs.DPI = 50


def handle(connection):
    "Start the program in a fork of this fork; pass signals in, and its exit code out."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    request, size = b"", int.from_bytes(length, "big")
    while len(request) < size:
        request += connection.recv(size - len(request))
    if not (process := os.fork()):
        connection.close()
        become(files, **json.loads(request))
    threading.Thread(target=pass_signals, args=(connection, process), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def pass_signals(connection, process):
    "Send a process the signals that are asked for; kill it when nobody is there to ask."
    with suppress(ProcessLookupError, ConnectionError):
        while number := connection.recv(1):
            os.kill(process, number[0])
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def become(files, arguments, cwd, env):
    "Be `python -m MODULE ...` from now on."
    os.setsid()
    for target, file in enumerate(files):
        os.dup2(file, target)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r") for n in range(3))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # a kernel ends with its parent
    flag, module, *others = arguments
    assert flag == "-m"
    sys.argv[1:], sys.path[0] = others, cwd
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:], os.getcwd(), os.environ, [0, 1, 2]))
