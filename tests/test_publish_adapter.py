"""publish-adapter on a real tritonserver: another adapter goes live under load, and the one before it comes back."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from flora_export.artifact import open_artifact
from flora_export.backends.triton.config import Serving, read_serving
from flora_export.backends.triton.repository import live
from flora_export.bank import COLUMNS, STACK
from flora_export.cli import main
from flora_export.errors import ArtifactError
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, VerifyOptions, build
from flora_export.publish import publish, publish_adapter, roll_back
from tests.conftest import silent
from tests.families import make_adapter
from tests.test_bank_serving import QUESTION, STEPS, greedy, make_members
from tests.test_triton_server import SERVER, Server, post

SERVING = Serving(concurrent=3, threads=1, max_batch=4, max_queue=99, check_files=False)


class Clients:
    """Clients that ask without a pause, each for one adapter, and count the answers."""

    def __init__(self, server: Server, adapters: list[str]) -> None:
        self.server, self.answers, self.failed, self.running = server, Counter[tuple[str, str]](), list[object](), True
        self.threads = [threading.Thread(target=self._ask, args=(name,)) for name in adapters]
        for thread in self.threads:
            thread.start()

    def _ask(self, name: str) -> None:
        while self.running:
            status, answer = post(self.server, {"text_input": QUESTION, "max_tokens": STEPS, "adapter": name})
            if status != 200:
                self.failed.append(answer)
            else:
                self.answers[name, answer["text_output"]] += 1

    def until(self, name: str, text: str) -> None:
        """Wait for an answer that is new."""
        seen, end = self.answers[name, text], time.monotonic() + 120
        while self.answers[name, text] <= seen:
            assert time.monotonic() < end, self.answers
            time.sleep(0.05)

    def stop(self) -> None:
        self.running = False
        for thread in self.threads:
            thread.join()


def test_an_adapter_goes_live_under_load(tmp_path: Path) -> None:
    base, members = make_members(tmp_path)
    other = make_adapter(base, tmp_path / "other", seed=7, r=3, alpha=128.0)
    bank = build(members[0][1], str(base), tmp_path / "out", BuildOptions(bank=BankOptions(members, STACK, 4)), silent)[0]
    repo = tmp_path / "repo"
    publish(bank, repo, SERVING, silent)
    running = Server(SERVER, repo, log=tmp_path / "server.log")
    try:
        running.wait()
        clients = Clients(running, ["second", "second", "first", "base"])
        done = CliRunner().invoke(main, ["publish-adapter", str(repo), str(other), "--name", "second", "--base", str(base), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["version"] == 2
        now = open_artifact(repo / "decoder" / "2")
        was, will = (greedy(each, "second", QUESTION, STEPS) for each in (bank, now))
        assert was != will
        clients.until("second", will)
        publish_adapter(repo, "fourth", other, str(base), VerifyOptions(), silent)  # a new name
        roll_back(repo, 1)
        clients.until("second", was)
        clients.stop()
    finally:
        running.stop()
    assert not clients.failed, clients.failed[:3]
    steady = {(name, greedy(bank, name, QUESTION, STEPS)) for name in ("first", "base")}
    assert set(clients.answers) == {("second", was), ("second", will), *steady}
    assert open_artifact(repo / "decoder" / "3").manifest.bank is not None
    assert list(open_artifact(repo / "decoder" / "3").manifest.bank.taken) == ["first", "second", "third", "fourth"]  # type: ignore[union-attr]
    assert read_serving(repo) == SERVING


def test_what_is_live_must_be_a_bank_and_stay_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, members = make_members(tmp_path)
    repo, new = tmp_path / "repo", members[2][1]
    side = build(members[0][1], str(base), tmp_path / "side", BuildOptions(bank=BankOptions(members[:2], COLUMNS)), silent)[0]
    publish(side, repo, SERVING, silent)
    with pytest.raises(ArtifactError, match="no slots to be filled"):
        publish_adapter(repo, "third", new, str(base), VerifyOptions(), silent)
    options = BuildOptions(bank=BankOptions(members[:2], STACK, 3), align=12)  # room for the third's rank
    stack = build(members[0][1], str(base), tmp_path / "stack", options, silent)[0]
    publish(stack, repo, SERVING, silent)

    def meanwhile(what: str, done: int, of: int) -> None:
        if what == "replaying the other adapters":
            publish(stack, repo, SERVING, silent)

    with pytest.raises(ArtifactError, match="version 3 went live while this one was made from version 2"):
        publish_adapter(repo, "third", new, str(base), VerifyOptions(), meanwhile)
    assert live(repo) == {"decoder": 3, "generate": 3}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
