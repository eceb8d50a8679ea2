"""Programs around gapjax: flags to plain arguments, files and pages."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"]:  # this package is imported to start one of its programs

    def _interrupt(number: int, frame: object) -> None:
        # while the process imports; later `experiments.program` handles the signals
        os.write(2, b"interrupted before any work was begun\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _interrupt)
