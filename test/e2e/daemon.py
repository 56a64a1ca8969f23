"""Starts and stops the server under test, and looks at what it leaves behind."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
OPTIONS = os.environ.get("TB_SERVER_OPTIONS", "").split()  # of every server, as "--backend cuda"
SANITIZER = re.compile(r"ERROR: \w*Sanitizer|WARNING: ThreadSanitizer|runtime error:|SUMMARY: \w*Sanitizer")


def find_daemon():
    """The binary: $TB_DAEMON, else one of the usual build folders."""
    named = os.environ.get("TB_DAEMON")
    if named:
        return os.path.abspath(named)
    for build in ("build", "builddir", "build/gcc"):
        path = os.path.join(ROOT, build, "src", "server", "tinkerbell")
        if os.access(path, os.X_OK):
            return path
    return None


def end(service):
    """Ends the session of the SDK's ServiceClient. 0.38's close() may wait for ever after that, though every request of its
    has its answer: its poller can lose the cancellation and go on waiting for work. So it gets 20 s."""
    with contextlib.suppress(TimeoutError):
        service.close("success").result(timeout=20)


class Daemon:
    """One server process. models: {name: folder}."""

    def __init__(self, models, data, dtype="f32", args=(), log=None):
        self.models, self.data, self.dtype, self.args = dict(models), str(data), dtype, list(args)
        self.log_path = str(log or os.path.join(self.data, "..", os.path.basename(self.data) + ".stderr"))
        self.process = self.url = None
        self.start_seconds = None

    def command(self):
        cmd = [find_daemon(), "serve"]
        for name, folder in self.models.items():
            cmd += ["--model", f"{name}={folder}"]
        return cmd + ["--listen", "127.0.0.1:0", "--data", self.data, "--dtype", self.dtype, *OPTIONS, *self.args]

    def start(self, timeout=120):
        os.makedirs(self.data, exist_ok=True)
        env = dict(os.environ)
        env.setdefault("ASAN_OPTIONS", "detect_stack_use_after_return=1:strict_string_checks=1:detect_leaks=1:"
                       "allocator_may_return_null=1")
        env.setdefault("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1")
        env.setdefault("TSAN_OPTIONS", "allocator_may_return_null=1:suppressions=" + os.path.join(ROOT, "test", "tsan.supp"))
        began = time.monotonic()
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, stderr=log, env=env, text=True)
        line = [None]

        def read():
            line[0] = self.process.stdout.readline()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(timeout)
        match = re.match(r"tinkerbell: listening on (http://\S+)$", (line[0] or "").strip())
        if not match:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"the server did not start: {line[0]!r}\n{self.log()[-4000:]}")
        self.url = match.group(1)
        self.start_seconds = time.monotonic() - began
        return self

    def log(self):
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as f:
                return f.read()
        except FileNotFoundError:
            return ""

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout=60):
        """SIGTERM; the server must drain, exit with 0 and leave no sanitizer report."""
        if self.process is None:
            return
        process, self.process = self.process, None
        early = process.poll()
        if early is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"the server did not exit within {timeout} s of SIGTERM\n{self.log()[-4000:]}") from None
        process.stdout.close()
        report = SANITIZER.search(self.log())
        assert not report, self.log()[max(0, report.start() - 200):][:8000]
        assert early is None, f"the server died early with code {early}\n{self.log()[-4000:]}"
        assert process.returncode == 0, f"exit code {process.returncode} after SIGTERM\n{self.log()[-4000:]}"

    def kill(self):
        """As a power cut would."""
        process, self.process = self.process, None
        process.kill()
        process.wait()
        process.stdout.close()

    def restart(self):
        self.stop()
        return self.start()

    def memory(self, what="VmRSS"):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            for line in f:
                if line.startswith(what + ":"):
                    return int(line.split()[1]) * 1024
        return 0
