"""Every draft method: its name in run files, and where its section is. One line per method."""

from __future__ import annotations

from paceline.table import Table

DEFAULT_METHOD = "eagle3"
METHODS = Table(
    "draft method",
    "paceline.methods",
    {
        "eagle3": "paceline.methods.eagle3.settings:Eagle3Section",
        "p-eagle": "paceline.methods.eagle3.settings:PEagleSection",
        "dflash": "paceline.methods.dflash.settings:DFlashSection",
        "dspark": "paceline.methods.dflash.settings:DSparkSection",
        "domino": "paceline.methods.dflash.settings:DominoSection",
        "dflash2": "paceline.methods.dflash.settings:DFlash2Section",
    },
)
