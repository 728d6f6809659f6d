# SPDX-License-Identifier: Apache-2.0
"""torchrun, but for runs that cannot go on: those are not started again.

    python -m megatron_bert.launching.agent [OPTIONS OF TORCHRUN] -m megatron_bert pretrain CONFIG.yaml ...

torchrun starts a failed run again as often as it may. That helps where a process was killed, and not where a setting is
wrong or an error comes back in the same step.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from megatron_bert.launching.failures import why_final
from megatron_bert.launching.launched import LOG_VARIABLE
from megatron_bert.starting import collect_rarely
from parallel.errors import UserError

#: Exit code of a command that refuses what it was given.
REFUSED = 2


class RunAgent(LocalElasticAgent):
    """Starts the processes of a host, and starts them again while that can help."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and self._remaining_restarts > 0:
            reason = _why_final(result)
            if reason is not None:
                print(f"not started again: {reason}", file=sys.stderr, flush=True)
                self._remaining_restarts = 0
        return result


def _why_final(result: RunResult) -> str | None:
    if any(failure.exitcode == REFUSED for failure in result.failures.values()):
        return "it was refused with the sentence above"
    if folder := os.environ.get(LOG_VARIABLE):
        with suppress(UserError):
            final = why_final(Path(folder))
            return None if final is None else final.reason
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun's own command line; its exit code is that of a refusal, 128 and more after a signal, 1 otherwise."""
    api.LocalElasticAgent = RunAgent  # type: ignore[misc]
    collect_rarely()  # at the end, above all, which took half a second
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        if any(failure.exitcode == REFUSED for failure in error.failures.values()):
            return REFUSED
        if LOG_VARIABLE not in os.environ:  # else whoever started this reports it from the records there
            print(error, file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
