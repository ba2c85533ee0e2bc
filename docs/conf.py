from __future__ import annotations

from nvflare_rdma import __version__

project = "nvflare-rdma"
author = "nvflare-rdma maintainers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
# Links to headings, as on GitHub.
myst_heading_anchors = 3
# What other pages include.
exclude_patterns = [
    "_build",
    "auto-table.md",
    "controllers-table.md",
    "controllers-fedrdma.md",
    "wan-table.md",
    "wan-rounds-table.md",
    "convergence-rounding.md",
    "convergence-differences.md",
]
html_theme = "alabaster"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
