"""`--keep-selections DIR`: what each sparse request attended to, in a file of its own, for `sglang_mm.plan draw`."""

import logging
from pathlib import Path

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.select import Report
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest, file_name, pack, save
from sglang_mm.serving.prompts import Known

logger = logging.getLogger(__name__)


class Keeper:
    """Of one rank. writes: whether this rank does; with T > 1 its own heads are what is kept. plan: its title."""

    def __init__(self, directory: str, plan: str, *, writes: bool):
        self._directory, self._plan, self._writes = Path(directory), plan, writes

    def add(self, known: Known, chunk: range, layer: int, selection: Selection, report: Report) -> None:
        """One layer of one chunk. selection: with the lists of all row blocks."""
        if self._writes:
            if not known.kept or known.kept[-1][0] != chunk:
                known.kept.append((chunk, []))
            known.kept[-1][1].append(pack(KeptLayer(layer, selection, report.verdicts, report.densities)))

    def save(self, known: Known, group: int) -> None:
        """All chunks, when the prompt is done. group: query heads per K/V head.

        A file that cannot be written is told in the log: the answer goes on without it.
        """
        if not known.kept:
            return
        chunks, layers = zip(*known.kept)
        kept = KeptRequest(
            known.prompt.rid, known.tokens.to("cpu"), chunks, group, self._plan, tuple(map(tuple, layers))
        )
        try:
            save(self._directory / file_name(known.prompt.rid), kept)
        except (ConfigError, OSError) as error:
            logger.error("what request %r attended to is not kept: %s", known.prompt.rid, error)
