from __future__ import annotations

from nvflare_rdma import __version__

project = "nvflare-rdma"
author = copyright = "nvflare-rdma maintainers"
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
    "convergence-*.md",
]
# As FLARE's own documentation looks. Its fonts and scripts come with it: a page loads nothing from elsewhere.
html_theme = "sphinx_rtd_theme"
html_theme_options = {"collapse_navigation": False, "navigation_depth": 2}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_use_index = html_domain_indices = False
html_context = {
    "display_github": True,
    "github_user": "nvflare-rdma",
    "github_repo": "nvflare-rdma",
    "github_version": "main",
    "conf_py_path": "/docs/",
}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
