"""Results as figures and as a page.

The functions of `experiments.show.figures` take the dictionary that the main program writes as
results.json, and return matplotlib figures. They need no display and no workdir:

>>> import json
>>> from pathlib import Path
>>> from experiments.show import figures
>>> results = json.loads(Path("experiments/results/digits/results.json").read_text())
>>> figure = figures.overview(results)
>>> [axes.get_title(loc="left") for axes in figure.axes]
['1a  Train and test', '1b  Test, and after optimal inference', '2  Test, by kind of inference']
>>> png, pdf = figures.save(figure, "overview")
>>> png.name, pdf.name
('overview.png', 'overview.pdf')

The results of several seeds are passed as a list, `figures.overview([first, second])`.

`experiments.show.report.write_report` writes the HTML page.
"""

from collections.abc import Mapping
from typing import Any

# The contents of results.json or of ledger.json, or a part of them.
Results = Mapping[str, Any]
