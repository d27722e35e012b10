"""How a run ends, whatever ends it: where it stood is said and written down."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sep.errors import EndedError, InterruptedRunError, SepError
from megatron_sep.train.run import Run
from megatron_sep.weights.sealed import finished_checkpoints


@contextmanager
def accounted_for(run: Run) -> Iterator[None]:
    """Around the steps of a run. Raises InterruptedRunError for an interrupt, PeerError for a process that is lost."""
    run.requests.can_finish = True
    run.topology.watch.last_words.append(lambda lost: run.history.add("failed", step=run.state.step, message=lost))
    try:
        yield
    except KeyboardInterrupt:
        run.history.add("interrupted", step=run.state.step)
        raise InterruptedRunError(_interrupted(run)) from None
    except SepError as end:
        run.history.add("stopped" if isinstance(end, EndedError) else "failed", step=run.state.step, message=str(end))
        _close(run)
        raise
    except Exception as error:
        found = run.topology.watch.named(error) or error
        run.history.add("failed", step=run.state.step, message=str(found) or repr(found))
        raise found from (None if found is error else error)
    finally:
        run.requests.can_finish = False
        run.topology.watch.last_words.clear()
    run.history.add("done", step=run.state.step)
    _close(run)


def _close(run: Run) -> None:
    run.metrics.log(run.state.step, run.statistics.times("save"))
    run.metrics.close()


def _interrupted(run: Run) -> str:
    """Where it stopped, and how to go on."""
    saved = finished_checkpoints(run.checkpoints.dir)
    start = f"{saved[-1]}, its newest checkpoint" if saved else "its beginning: no checkpoint is written yet"
    return f"interrupted after step {run.state.step} of {run.config.train.steps}; the same command goes on from {start}"
