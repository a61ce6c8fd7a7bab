"""The flusher of the owner of a shared state.

Theory of operation. The flusher commits the changes of the layer, with the results of the calls that made
them. After each successful commit, it does three things in one step of the event loop. It applies the changes to the
copy, sends the record to the followers, and then answers the clients and the tasks of the owner. So no process
shows a change that is not durable, and each answer comes after its record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from lab_state import _batch
from lab_state._bulk import run_in_steps, run_whole
from lab_state._calls import Calls
from lab_state._clock import Clock
from lab_state._durability import copied
from lab_state._entries import ChangeSet
from lab_state._flusher import Flusher
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._snapshots import SnapshotViews
from lab_state._state import State
from lab_state._state._contents import no_clock
from lab_state.config import Config
from lab_state.exceptions import FencedError, LabStateError, StorageError
from lab_state.shared._attempts import PATIENCE
from lab_state.shared._engine import C, Engine
from lab_state.shared._executed import Executed
from lab_state.shared._last_records import LastRecords
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import Answer, Call, Refused
from lab_state.shared._records import ParsedRecord, RecordApplier, record_of
from lab_state.shared._results import RecordCalls
from lab_state.shared._views import FrameViews
from lab_state.storage._protocol import StorageSession

R = TypeVar("R")
C_contra = TypeVar("C_contra", contravariant=True)


class Listener(Protocol[C_contra]):
    """The connections of the owner. The flusher calls these methods. After `closed`, no message is sent."""

    def record(self, data: bytes, /) -> object:
        """Put a durable record into the queue of each follower."""
        ...

    def answers(self, connection: C_contra, answers: Sequence[Answer], /) -> object:
        """Put answers into the queue of a connection. If the connection has ended, do nothing."""
        ...

    def closed(self, error: LabStateError, /) -> object:
        """Close all connections at once, without further answers: there will be no further commit. A second call does nothing."""
        ...

    async def hand_over(self) -> bool:
        """Hand the durable state over to a follower, which continues the journal. Return False if a checkpoint is needed instead.

        If the result is True, the flusher calls `finish` in the same step. So no follower can leave before that.
        """
        ...

    async def finish(self) -> None:
        """Send the queued messages, for at most a second, and close all connections. The flusher frees the lock after this."""
        ...


class OwnerFlusher(Flusher, Generic[C]):
    """The task that makes the changes of a shared state durable. Its attribute `state` is the layer, and `shown` is the copy.

    Attributes:
        engine: The engine, which executes the calls.
        last_records: The last durable records, for clients that connect with a copy.
        turn_ended: A callback for the end of each call that was executed in steps, or that has waited for such a call.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and each has a different type
        self,
        layer: OwnerLayer,
        engine: Engine[C],
        listener: Listener[C],
        session: StorageSession,
        config: Config,
        clock: Clock,
        logger: Log,
        committed: Callable[[ChangeSet], bool],
        times: FlushTimes,
        on_fenced: Callable[[FencedError], object] | None = None,
    ) -> None:
        """Prepare to run on the present event loop; see `Flusher`.

        Args:
            layer: The layer over the loaded state.
            engine: The engine of this layer.
            listener: The connections.
            session: The session of the storage. It still has the recovered records.
            config: The settings. The flush interval is 0.
            clock: The clock of the manager.
            logger: The logger of the manager.
            committed: See `Flusher`. It is called after the copy was changed and the answers were queued, in the same step.
            times: The object that collects the durations of commits; see `Flusher`.
            on_fenced: A function of the application; see `Manager`.
        """
        self._layer = layer
        super().__init__(layer, session, config, clock, logger, committed, times, on_fenced)
        self.engine: Engine[C] = engine
        self.last_records: LastRecords = LastRecords(session.recovery.records, layer.copy.revision)
        self._listener = listener
        self._applier = RecordApplier(layer.copy)
        self._record = ParsedRecord(0, 0, cleared=False, changes={})  # the record of the commit under way
        self._data = b""
        self._asked = False  # whether a client has asked for the next commit
        self._turn = asyncio.Lock()  # held while a call is executed in steps
        self._attempts: dict[str, asyncio.Future[None]] = {}
        engine.attempts.on_made = self._attempted
        self._in_steps: set[asyncio.Task[Any]] = set()
        self.turn_ended: Callable[[], object] = no_clock

    @property
    def shown(self) -> State:
        """The copy, which has the durable state."""
        return self._layer.copy

    # Calls

    def call(self, connection: C, client: str, call: Call) -> Answer | None:
        """Execute a call of a client; see `Engine.call`. If the result is `None`, the listener gets the answer later."""
        answer = self.engine.call(connection, client, call)
        if answer is None:
            self._ask()
        return answer

    @property
    def is_busy(self) -> bool:
        """Whether a call is executed in steps. Then other calls wait for their turn, and so does the next commit."""
        return self._turn.locked()

    async def in_turn(self, steps: Callable[[], Generator[None, None, R]], key: str | None = None) -> R:
        """Wait until no other call is executed in steps. Then run the given steps, and return their result.

        If the caller is cancelled, the steps are run nevertheless. For `key`, see `run`.
        """
        task = asyncio.create_task(self._run_in_turn(steps, key), name=f"lab_state {self._name} call")
        self._in_steps.add(task)  # the event loop keeps only a weak reference
        task.add_done_callback(self._in_steps.discard)
        return await asyncio.shield(task)

    async def _run_in_turn(self, steps: Callable[[], Generator[None, None, R]], key: str | None) -> R:
        try:
            if key is not None:
                await self._let_go_first(key)
            async with self._turn:
                return await run_whole(steps())
        finally:
            self._ask()
            self.turn_ended()

    def _ask(self) -> None:
        """Ask for the next commit, as a waiting caller does, unless the commit under way has all changes."""
        if not self._asked and self.state.revision > self.state.taken:
            self._asked = True
            self._waiters.next.append((self.state.revision, self.loop.create_future()))
            self._wake.set()

    async def make(self, call: Call) -> tuple[bytes, int] | Refused:
        """Execute a call of this process, and wait until it is durable. Return its result as JSON, and its revision.

        The number and the acknowledgement in `call` are ignored. If the check of the call does not hold, return the
        refusal, and wait for no commit. If the caller is cancelled, the call goes on.

        Raises:
            TypeMismatchError: The stored value does not allow the call. Nothing was changed.
            InvalidValueError: The new value cannot be stored. Nothing was changed.
            FencedError: A newer writer owns the state; nothing was changed.
            StorageError: The flush task has ended, and nothing was changed. Or the change, or a change that the call has read, is
                not durable yet, and may become durable later.
            RuntimeError: The caller runs on another event loop.
        """
        self._check_call()
        if self.is_busy or self.engine.is_large(call):
            executed = await self.in_turn(partial(self._execute_in_steps, call))
        else:
            executed = self.engine.execute(call)
            if not isinstance(executed, Refused):
                self.engine.own(executed)
        return executed if isinstance(executed, Refused) else await self._answer(executed)

    def _execute_in_steps(self, call: Call) -> Generator[None, None, Executed[bytes] | Refused]:
        self._check_call()  # the state may have been fenced, or the manager stopped, while the call waited for its turn
        executed = yield from self.engine.execute_in_steps(call)
        if not isinstance(executed, Refused):
            self.engine.own(executed)
        return executed

    async def run(
        self, body: Callable[[Calls], Coroutine[Any, Any, R]], prefix: str = "", key: str | None = None
    ) -> tuple[R, int]:
        """Run a function that makes one call, such as an `update`, and wait until that call is durable.

        Return the result of the function, and the revision of the call.

        If the call raises an error, raise this error when everything that the call has read is durable. If the caller
        is cancelled, the call goes on.

        Args:
            body: A function that gets calls on the layer and makes one of them. The call must not wait.
            prefix: The prefix of the keys of these calls.
            key: The key of the call. If a client is about to make another attempt to change this key, wait for the client first,
                for at most 10 ms.

        Raises:
            FencedError: A newer writer owns the state; nothing was changed.
            StorageError: The flush task has ended, and nothing was changed. Or the change, or a change that the call has read, is
                not durable yet, and may become durable later.
            RuntimeError: The caller runs on another event loop.
        """
        self._check_call()
        if self.is_busy or (key is not None and self.engine.attempts.is_awaited(key)):
            executed = await self.in_turn(partial(self._run_once, body, prefix), key)
        else:
            executed = self.engine.run(body, prefix)
            self.engine.own(executed)
        return await self._answer(executed)

    async def _let_go_first(self, key: str) -> None:
        """Let clients that are about to make another attempt to change a key go first. Wait for at most 10 ms."""
        attempts, until = self.engine.attempts, self.loop.time() + PATIENCE / 1e9
        while attempts.is_awaited(key) and self.loop.time() < until:
            made = self._attempts.get(key)
            if made is None:
                made = self._attempts[key] = self.loop.create_future()
                self.loop.call_later(PATIENCE / 1e9, self._attempted, key)
            await asyncio.wait({made})  # all waiting tasks share the future, so none of them may cancel it

    def _attempted(self, key: str) -> None:
        made = self._attempts.pop(key, None)
        if made is not None:
            made.set_result(None)

    def _run_once(
        self, body: Callable[[Calls], Coroutine[Any, Any, R]], prefix: str
    ) -> Generator[None, None, Executed[R]]:
        yield from ()  # there is only one step, but `in_turn` takes a generator
        self._check_call()
        executed = self.engine.run(body, prefix)
        self.engine.own(executed)
        return executed

    def _check_call(self) -> None:
        self.check_loop()
        self.check_writable()

    async def _answer(self, executed: Executed[R]) -> tuple[R, int]:
        try:
            await self.make_durable(executed.at)
        except asyncio.CancelledError:
            self._ask()  # otherwise the change would wait for the next caller
            raise
        return executed.result, executed.revision

    # Commits

    async def _commit(self) -> StorageError | None:
        # The last commit has answered tasks of this process. Let them run now, so that this commit includes their next calls
        # as well as the calls of other processes. Otherwise every second commit would have only the calls of these tasks.
        await asyncio.sleep(0)
        if self.is_busy:
            async with self._turn:
                pass  # from here on, no call is half executed
        return await super()._commit()

    async def _write(self, taken: ChangeSet, views: SnapshotViews, calls: RecordCalls | None = None) -> bool:  # noqa: ARG002 -- the views and the results of the owner are used instead
        self._asked = False
        calls = self.engine.begin(taken)  # this must be done in the same step as `take`
        self._record = record_of(taken, calls)
        frames = FrameViews(self.shown, taken, calls, given=self._progress.count)
        try:
            due = await super()._write(taken, frames, calls)
        finally:
            await frames.fold()
        if self._is_large:
            await run_in_steps(self._applier.prepare(self._record), bool)
        return due

    def _encoded(self, record: bytes) -> None:
        self._data = record

    @property
    def _is_large(self) -> bool:
        """Whether the record under way is applied to the copy in steps."""
        return len(self._record.changes) >= _batch.MANY

    def _succeeded(self, seconds: float) -> None:
        """Apply the record, which is durable now, to the copy, and answer its calls. Both are done in one step."""
        taken = self._under_way
        assert taken is not None  # the commit that succeeded
        try:
            self._show(taken)
        except (
            BaseException
        ):  # such as a MemoryError: the commit is repeated, and its callers get no result before that
            self.durable_revision = taken.start
            raise
        super()._succeeded(seconds)

    def _show(self, taken: ChangeSet) -> None:
        record, data = self._record, self._data
        if self._is_large:
            self._applier.finish()
        else:
            self._applier.apply(record)
        self._layer.landed(taken)
        answers = self.engine.landed()
        if record.end > record.start:  # a copy skips a record without changes, so such a record is not sent
            self.last_records.add(record.start, record.end, data)
            self._listener.record(data)
        self._tell(answers)
        self._record, self._data = ParsedRecord(0, 0, cleared=False, changes={}), b""

    def _tell(self, answers: Mapping[C, Sequence[Answer]]) -> None:
        for connection, some in answers.items():
            self._listener.answers(connection, some)

    def _put_back(self) -> None:
        self.engine.put_back()
        super()._put_back()

    def _commit_failed(self, error: StorageError, note: str) -> None:
        """Answer the calls of a failed commit. During a stop, send no answer. If no later commit succeeds, the next owner answers the calls."""
        self._asked = False
        if not self._stopping:
            # A path in the text may have lone surrogates, which a message cannot contain.
            text = str(copied(error, note)).encode(errors="backslashreplace").decode()
            self._tell(self.engine.failed(type(error).__name__, text))

    # The end

    async def _finish(self) -> None:
        async with self._turn:
            pass  # the call that is executed in steps ends before the last flush; waiting calls of clients are answered with "moved"
        await super()._finish()

    def _give_up(self, error: LabStateError) -> None:
        super()._give_up(error)
        self.engine.close()
        self._listener.closed(error)

    def move(self) -> None:
        """Move to the running event loop; see `Durability.move`. No connection of a closed loop gets an answer."""
        if self.loop.is_closed():
            self.engine.close()
            self._turn = asyncio.Lock()
            self._attempts = {}
        super().move()

    async def _write_last(self) -> None:
        """Hand the state over. If that is not possible, write a checkpoint."""
        if not await self._listener.hand_over():
            await super()._write_last()

    async def _close(self, *, hurried: bool) -> None:
        if not hurried:
            try:
                await self._listener.finish()
            except GeneratorExit:  # the event loop of this task was closed: `stop` starts another task
                raise
            except BaseException:  # the event loop cancels all its tasks
                await super()._close(hurried=True)
                raise
        await super()._close(hurried=hurried)
