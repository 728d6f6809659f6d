# SPDX-License-Identifier: Apache-2.0
"""When tests of clusters are skipped, and that what they share is done once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cluster_support import REQUIRED, need, once


def test_missing_program_skips_unless_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.delenv(REQUIRED, raising=False)
    need(("bash",), "bash")
    with pytest.raises(pytest.skip.Exception, match="no-such-program not found: apt-get install it"):
        need(("bash", "no-such-program"), "it")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-program not found"):
        need(("no-such-program",), "it")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(pytest.fail.Exception, match="needs to be root"):
        need(("bash",), "bash")


def test_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    assert once(tmp_path / "good", calls.append) == once(tmp_path / "good", calls.append) == tmp_path / "good"
    assert calls == [tmp_path / "good"]

    def fail(folder: Path) -> None:
        calls.append(folder)
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError):
        once(tmp_path / "bad", fail)
    with pytest.raises(RuntimeError, match=r"(?s)failed in another process.*broken"):
        once(tmp_path / "bad", fail)
    assert len(calls) == 2
