"""The progress bar of what takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

Progress = Callable[[str], None]


@contextmanager
def progress_bar(visible: bool) -> Iterator[Progress]:
    """A bar that counts steps and names the one that is running."""
    with tqdm(disable=not visible, desc="autosp", bar_format="{desc}: {n_fmt} steps [{elapsed}{postfix}]") as bar:

        def show(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield show
