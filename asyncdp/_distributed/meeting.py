"""What all processes do between two steps, such as saving a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from .exchange import Stage, StepExchange


class Meeting(StepExchange):
    """This process's part in something that all do between two steps, in the same place in their order.

    Whoever fails, or is out of step, has it fail everywhere, as with steps.
    """

    what = "the checkpoint"
    _text = ""
    _texts: Sequence[str] = ()

    def gather(self, text: str) -> Sequence[str] | None:
        """Give a text to all processes; return that of each, or None if this process has failed meanwhile.

        Raises:
            PeerStepError: another process has failed, or does something else.
        """
        self._text = text
        self.begin()
        return self._texts if self._wait(Stage.AGREED) else None

    def workload(self) -> str:
        """Return this process's text."""
        return self._text

    def on_gathered(self, texts: Sequence[str]) -> None:
        """Note the texts of all."""
        self._texts = texts
        self._go(Stage.AGREED)
