"""Sphinx: Markdown pages and the docstrings of the public API. ``make docs``."""

import dmax_kernels

project = "dmax_kernels"
release = dmax_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = []
html_theme = "furo"
html_title = f"dmax_kernels {release}"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
