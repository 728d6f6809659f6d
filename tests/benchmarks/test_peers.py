# SPDX-License-Identifier: Apache-2.0
"""What benchmarks say where the library that they compare with is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("benchmarks.peers")
    assert ended.value.code == 2
    assert "transformers is not installed: run `bash launch/setup.sh --test`" in capsys.readouterr().err
